"""What differs between architectures, as data: the only place that knows model types by name."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal

from hf_bucket.tasks import PaddingSide

Positions = Literal["counted", "after padding", "unlimited"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Family:
    """Model types that are padded and limited alike.

    Attributes:
        model_types: as in ``config.json``.
        positions: ``"counted"``: the configuration says how many tokens there are positions for. ``"after padding"``:
            positions start behind the padding id, so that as many fewer are left. ``"unlimited"``: relative or computed
            ones, whatever number the configuration carries.
        padding_side: where padding tokens go. Heads that read the last position, or states that run from left to right
            without looking at the mask, need them on the left.
        reads_eos: the head reads the last end-of-sequence token, and finds it by cutting a batch into equal parts: rows
            with different numbers of them must not share one.
        limit: most tokens for which the model computes what its graph does; None where there is no such bound.
    """

    model_types: tuple[str, ...] = ()
    positions: Positions = "counted"
    padding_side: PaddingSide = "right"
    reads_eos: bool = False
    limit: Callable[[Mapping[str, object]], int | None] | None = None


def _full_attention_tokens(config: Mapping[str, object]) -> int | None:
    """Return how long a row may be before BigBird goes over to sparse attention, by its padded length.

    Source: ``BigBirdModel.forward`` in transformers, ``max_tokens_to_attend``.
    """
    random, size = config.get("num_random_blocks"), config.get("block_size")
    sparse = config.get("attention_type") == "block_sparse"
    return (5 + 2 * random) * size if sparse and isinstance(random, int) and isinstance(size, int) else None


FAMILIES = (
    Family(
        # transformers, create_position_ids_from_input_ids
        model_types=(
            "camembert",
            "data2vec-text",
            "esm",
            "ibert",
            "layoutlmv3",
            "lilt",
            "longformer",
            "luke",
            "markuplm",
            "mpnet",
            "roberta",
            "roberta-prelayernorm",
            "xlm-roberta",
            "xlm-roberta-xl",
            "xmod",
        ),
        positions="after padding",
    ),
    Family(model_types=("bloom",), positions="unlimited"),
    Family(model_types=("mt5", "t5", "umt5"), positions="unlimited", reads_eos=True),
    Family(model_types=("bart", "mbart", "mvp", "plbart"), reads_eos=True),
    Family(model_types=("big_bird",), limit=_full_attention_tokens),
    Family(model_types=("bigbird_pegasus",), limit=_full_attention_tokens, reads_eos=True),
    Family(model_types=("xlnet",), positions="unlimited", padding_side="left"),
)

_OF_TYPE = {model_type: family for family in FAMILIES for model_type in family.model_types}

# Names that configurations give to the number of positions.
_POSITION_KEYS = ("max_position_embeddings", "n_positions", "max_seq_len", "max_sequence_length")


def family_of(config: Mapping[str, object]) -> Family:
    """Return the family of a model; one that no row names is padded on the right and counts its positions."""
    return _OF_TYPE.get(str(config.get("model_type")), Family())


def text_part(config: Mapping[str, object]) -> Mapping[str, object]:
    """Return the configuration of the part that reads text: models of several kinds of input nest it."""
    inner = config.get("text_config")
    return inner if isinstance(inner, Mapping) else config


def true_max_length(config: Mapping[str, object]) -> int | None:
    """Return the most tokens a model's positions allow; None where there is no limit.

    Args:
        config: content of ``config.json``. RoBERTa-like models hold ``max_position_embeddings - pad_token_id - 1``.
    """
    text, family = text_part(config), family_of(config)
    limits = [value for key in _POSITION_KEYS if isinstance(value := text.get(key), int) and value > 0]
    bound = None if family.limit is None else family.limit(text)
    if family.positions == "unlimited" or not limits:
        return bound
    padding = text.get("pad_token_id")
    if family.positions == "after padding":
        limits[0] -= (padding if isinstance(padding, int) else 1) + 1
    return limits[0] if bound is None else min(limits[0], bound)


def counted_id(config: Mapping[str, object]) -> int | None:
    """Return the token of which all rows of a batch must have equally many; None for nearly all models."""
    eos = text_part(config).get("eos_token_id")
    return eos if family_of(config).reads_eos and isinstance(eos, int) else None
