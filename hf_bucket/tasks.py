"""One row of data per task: what goes into its graph, how each input is filled, and what every output axis means."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from hf_bucket.errors import ModelError

AXES = ("row", "token", "label", "height", "width", "query")


@dataclass(frozen=True, slots=True, kw_only=True)
class Task:
    """What distinguishes one task from another.

    Attributes:
        name: the name in transformers' ``pipeline`` and optimum's ``TasksManager``.
        aliases: other names users know it by.
        input_axes: axes of every input, in order.
        pad_ids: per input that a graph may take, what a padding token holds: a number, or the name of the
            tokenizer's attribute that knows it.
        output_axes: per output, the name of every axis, in order.
        auto_class: the transformers class that loads a checkpoint with this head.
        head: the end of the class name of such a checkpoint.
    """

    name: str
    aliases: tuple[str, ...]
    input_axes: tuple[str, ...]
    pad_ids: Mapping[str, int | str]
    output_axes: Mapping[str, tuple[str, ...]]
    auto_class: str
    head: str


TASKS = (
    Task(
        name="text-classification",
        aliases=("sentiment-analysis", "sequence-classification"),
        input_axes=("row", "token"),
        pad_ids={"input_ids": "pad_token_id", "attention_mask": 0, "token_type_ids": "pad_token_type_id"},
        output_axes={"logits": ("row", "label")},
        auto_class="AutoModelForSequenceClassification",
        head="ForSequenceClassification",
    ),
)


def get_task(name: str) -> Task:
    """Return the task called ``name`` or known by that alias.

    Raises:
        ModelError: no such task.
    """
    for task in TASKS:
        if name == task.name or name in task.aliases:
            return task
    known = ", ".join(f'"{known}"' for task in TASKS for known in (task.name, *task.aliases))
    raise ModelError(f"task {name!r} is not supported; use one of {known}")


@dataclass(frozen=True, slots=True, kw_only=True)
class InputSpec:
    """One input of a graph: its name, numpy dtype, named axes and the value of a padding token."""

    name: str
    dtype: str
    axes: tuple[str, ...]
    pad_id: int


@dataclass(frozen=True, slots=True, kw_only=True)
class OutputSpec:
    """One output of a graph: its name, numpy dtype and named axes."""

    name: str
    dtype: str
    axes: tuple[str, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Signature:
    """What a graph takes and returns; padding and un-padding read nothing else."""

    inputs: tuple[InputSpec, ...]
    outputs: tuple[OutputSpec, ...]

    @property
    def input_names(self) -> tuple[str, ...]:
        """Names in the graph's order."""
        return tuple(spec.name for spec in self.inputs)


# Names that configurations give to the number of position embeddings.
_POSITION_KEYS = ("max_position_embeddings", "n_positions", "max_seq_len", "max_sequence_length")

# Model types whose positions start after the padding id (transformers, create_position_ids_from_input_ids).
_POSITIONS_AFTER_PADDING = {
    "camembert",
    "data2vec-text",
    "esm",
    "ibert",
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
}

# Model types whose positions are relative without any limit, whatever number their configuration carries.
_UNLIMITED_POSITIONS = {"bloom", "mpt", "mt5", "t5", "umt5", "xlnet"}


def true_max_length(config: Mapping[str, object]) -> int | None:
    """Return the most tokens a model's positions allow; None where there is no limit.

    Args:
        config: content of ``config.json``. RoBERTa-like models hold ``max_position_embeddings - pad_token_id - 1``.
    """
    model_type = config.get("model_type")
    limits = [value for key in _POSITION_KEYS if isinstance(value := config.get(key), int) and value > 0]
    if model_type in _UNLIMITED_POSITIONS or not limits:
        return None
    padding = config.get("pad_token_id")
    if model_type in _POSITIONS_AFTER_PADDING:
        return limits[0] - (padding if isinstance(padding, int) else 1) - 1
    return limits[0]
