"""One row of data per task: what goes into its graph, how each input is filled, and what every output axis means."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from hf_bucket.errors import ModelError

PaddingSide = Literal["right", "left"]

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
    """What a graph takes and returns; padding and un-padding read nothing else.

    Attributes:
        padding_side: where padding tokens go.
        counted_id: a token of which all rows of a batch must have equally many, and at least one; None for nearly all
            models.
    """

    inputs: tuple[InputSpec, ...]
    outputs: tuple[OutputSpec, ...]
    padding_side: PaddingSide = "right"
    counted_id: int | None = None

    @property
    def input_names(self) -> tuple[str, ...]:
        """Names in the graph's order."""
        return tuple(spec.name for spec in self.inputs)
