"""From rows of tokens to one static batch and back: pad and unpad are each other's inverse."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from hf_bucket.assign import Assignment
from hf_bucket.ladder import Bucket
from hf_bucket.overflow import Pool
from hf_bucket.tasks import Signature

Array = NDArray[np.generic]
Row = Mapping[str, Array]


@dataclass(frozen=True, slots=True, kw_only=True)
class Features:
    """A request as tokens, without padding.

    Attributes:
        lengths: tokens of every row.
        columns: per graph input, the values of every row; row ``i`` has ``lengths[i]`` of them.
        truncated: rows that were cut to fit, ascending.
        owners: position in the request of the text that each row is a window of; None where every row is its own.
        pool: how the outputs of the windows of one text become one.
    """

    lengths: tuple[int, ...]
    columns: Mapping[str, Sequence[Sequence[int] | NDArray[np.int64]]]
    truncated: tuple[int, ...] = ()
    owners: tuple[int, ...] | None = None
    pool: Pool = "mean"

    def __len__(self) -> int:
        return len(self.lengths)


@dataclass(frozen=True, slots=True, kw_only=True)
class PaddedBatch:
    """One static batch, with all that is needed to take its padding off again.

    Attributes:
        rows: position in the request of every real row; they come first, padding rows after them.
        lengths: tokens of every real row.
        arrays: per graph input, an array of shape ``(bucket.batch_size, *bucket.extent)``.
    """

    bucket: Bucket
    rows: tuple[int, ...]
    lengths: tuple[int, ...]
    arrays: Mapping[str, Array]


def pad(features: Features, assignment: Assignment, signature: Signature) -> PaddedBatch:
    """Return the static batch of one assignment.

    A padding token holds its input's ``pad_id`` and comes after the real ones, or before them where the signature says
    so. A padding row repeats the first real row: values the model has seen, so that no architecture divides by a row
    without tokens.
    """
    bucket, rows = assignment.bucket, assignment.rows
    lengths = tuple(features.lengths[row] for row in rows)
    arrays: dict[str, Array] = {}
    for spec in signature.inputs:
        column = features.columns[spec.name]
        array = np.full((bucket.batch_size, *bucket.extent), spec.pad_id, dtype=spec.dtype)
        for position, (row, length) in enumerate(zip(rows, lengths, strict=True)):
            start = bucket.length - length if signature.padding_side == "left" else 0
            array[position, start : start + length] = column[row]
        array[len(rows) :] = array[0]
        arrays[spec.name] = array
    return PaddedBatch(bucket=bucket, rows=rows, lengths=lengths, arrays=arrays)


def unpad(batch: PaddedBatch, outputs: Mapping[str, Array], signature: Signature) -> dict[int, Row]:
    """Return every real row's outputs by its position in the request.

    Only axes named ``token`` are cut to the row's length; an axis of the same size by chance is left alone.
    """
    results: dict[int, Row] = {}
    for position, (row, length) in enumerate(zip(batch.rows, batch.lengths, strict=True)):
        result: dict[str, Array] = {}
        tokens = slice(length) if signature.padding_side == "right" else slice(batch.bucket.length - length, None)
        for spec in signature.outputs:
            index = tuple(
                position if axis == "row" else tokens if axis == "token" else slice(None) for axis in spec.axes
            )
            result[spec.name] = outputs[spec.name][index].copy()
        results[row] = result
    return results


def pool(rows: Sequence[Row], features: Features) -> list[Row]:
    """Return one row of outputs per input: those of its windows, pooled element by element."""
    if features.owners is None:
        return list(rows)
    groups: dict[int, list[Row]] = defaultdict(list)
    for owner, row in zip(features.owners, rows, strict=True):
        groups[owner].append(row)
    pooled = _POOLS[features.pool]
    return [
        {name: pooled(np.stack([row[name] for row in group])) for name in group[0]}
        for _, group in sorted(groups.items())
    ]


_POOLS: Mapping[Pool, Callable[[Array], Array]] = {
    "mean": lambda windows: windows.mean(axis=0),
    "max": lambda windows: windows.max(axis=0),
    "first": lambda windows: windows[0],
}


def in_float32(outputs: Mapping[str, Array]) -> dict[str, Array]:
    """Return outputs with half precision as float32."""
    return {name: value.astype(np.float32) if value.dtype == np.float16 else value for name, value in outputs.items()}
