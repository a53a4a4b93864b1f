"""What a model is beside its weights: limits, labels and padding, read from its configuration."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hf_bucket.encode import Encoder
from hf_bucket.errors import ModelError
from hf_bucket.families import counted_id, family_of, text_part, true_max_length
from hf_bucket.tasks import PaddingSide, Task


@dataclass(frozen=True, slots=True, kw_only=True)
class Facts:
    """What a model is, beside its weights.

    Attributes:
        max_length: true maximum in tokens; None where there is no limit.
        vocab_size: token ids the embedding holds; None where the config does not say.
        labels: names in the order of the logits.
        problem_type: as in transformers' config.
        pad_ids: value of a padding token, for every input the model takes.
        padding_side: where padding tokens go.
        counted_id: as in ``Signature``.
    """

    max_length: int | None
    vocab_size: int | None
    labels: tuple[str, ...]
    problem_type: str | None
    pad_ids: Mapping[str, int]
    padding_side: PaddingSide = "right"
    counted_id: int | None = None


def check_vocabulary(encoder: Encoder, facts: Facts) -> None:
    """Compare a tokenizer with the model's embedding.

    Raises:
        ModelError: the tokenizer knows ids that the model has no row for.
    """
    if facts.vocab_size is not None and encoder.vocabulary_size > facts.vocab_size:
        raise ModelError(
            f"the tokenizer has ids up to {encoder.vocabulary_size - 1} but the model embeds only 0 to "
            f"{facts.vocab_size - 1}; use the tokenizer that came with the model, or resize its embeddings"
        )


def read_facts(folder: Path, task: Task, encoder: Encoder) -> Facts:
    """Return the facts of a folder that holds a graph, from its JSON files alone: neither torch nor transformers.

    Raises:
        ModelError: ``config.json`` is missing or has no usable label names, or no pad token is named anywhere.
    """
    config = _read_json(folder / "config.json")
    tokenizer = _read_json(folder / "tokenizer_config.json") if (folder / "tokenizer_config.json").exists() else {}
    pad_id = text_part(config).get("pad_token_id")
    token = tokenizer.get("pad_token")
    content = token.get("content") if isinstance(token, dict) else token
    if isinstance(content, str) and encoder.token_id(content) is not None:
        pad_id = encoder.token_id(content)
    if not isinstance(pad_id, int) or isinstance(pad_id, bool) or pad_id < 0:
        raise ModelError(f"{folder} names no pad token in config.json or tokenizer_config.json; add pad_token_id")
    special = {"pad_token_id": pad_id, "pad_token_type_id": tokenizer.get("pad_token_type_id") or 0}
    vocab_size, family = text_part(config).get("vocab_size"), family_of(config)
    return Facts(
        max_length=true_max_length(config),
        vocab_size=vocab_size if isinstance(vocab_size, int) else None,
        labels=_labels(config, folder),
        problem_type=config.get("problem_type"),
        pad_ids={name: rule if isinstance(rule, int) else special[rule] for name, rule in task.pad_ids.items()},
        padding_side=family.padding_side,
        counted_id=counted_id(config),
    )


def _labels(config: Mapping[str, Any], folder: Path) -> tuple[str, ...]:
    names = config.get("id2label")
    try:
        if not names:
            return tuple(f"LABEL_{index}" for index in range(config.get("num_labels", 2)))
        return tuple(str(names[key]) for key in sorted(names, key=int))
    except (TypeError, ValueError) as error:
        raise ModelError(
            f'{folder / "config.json"} has no usable label names ({error}); expected id2label such as {{"0": "no"}}'
        ) from error


def _read_json(path: Path) -> dict[str, Any]:
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ModelError(f"{path} cannot be read ({error}); a graph needs it beside it") from error
    if not isinstance(data, dict):
        raise ModelError(f"{path} holds a {type(data).__name__}, expected an object")
    return data
