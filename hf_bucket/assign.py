"""Which rows share which batch: every row goes to the smallest length that holds it."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from hf_bucket.errors import too_long
from hf_bucket.ladder import Bucket, Ladder

Cost = Callable[[Bucket], float]

# One run of a session costs about as much as this many more cells: MiniLM-L6 in a batch of 1 x 64 against 8 x 64, as
# benchmarks/overhead.py measures it (extra_cells_per_run).
RUN_OVERHEAD_CELLS = 24


@dataclass(frozen=True, slots=True, kw_only=True)
class Assignment:
    """One batch to run: ``rows`` are positions in the request, at most ``bucket.batch_size`` of them."""

    bucket: Bucket
    rows: tuple[int, ...]


def cells_cost(bucket: Bucket) -> float:
    """Return the cost of one run in cells, where no measurement is at hand."""
    return bucket.cells + RUN_OVERHEAD_CELLS


def assign(
    lengths: Sequence[int],
    ladder: Ladder,
    cost: Cost = cells_cost,
    *,
    exact: bool = False,
    kinds: Sequence[int] | None = None,
) -> list[Assignment]:
    """Return the batches that run every row once, shortest buckets first.

    Args:
        lengths: tokens of every row, special tokens included.
        cost: what one run of a bucket costs, in any unit.
        kinds: rows of different kinds never share a batch; None makes all alike.
        exact: give a row that is longer than the largest bucket one of its own, outside the ladder.

    Raises:
        TooLongError: a row is longer than the largest bucket, and ``exact`` is not set.
    """
    groups: dict[tuple[int, int], list[int]] = defaultdict(list)
    alone: list[Assignment] = []
    holder = [ladder.buckets[0].length] * (ladder.buckets[0].length + 1)
    for length in ladder.lengths:
        holder.extend([length] * (length + 1 - len(holder)))
    for row, length in enumerate(lengths):
        if length <= ladder.max_length:
            groups[holder[length], kinds[row] if kinds else 0].append(row)
        elif exact:
            alone.append(Assignment(bucket=Bucket(batch_size=1, extent=(length,)), rows=(row,)))
        else:
            raise too_long(length, ladder.max_length, maximum=None, row=row)
    assignments: list[Assignment] = []
    for (length, _), rows in sorted(groups.items()):
        start = 0
        for bucket in cover(len(rows), ladder.of_length(length), cost):
            assignments.append(Assignment(bucket=bucket, rows=tuple(rows[start : start + bucket.batch_size])))
            start += bucket.batch_size
    return assignments + alone


def cover(n_rows: int, options: Sequence[Bucket], cost: Cost) -> list[Bucket]:
    """Return the cheapest runs that hold ``n_rows`` rows of one length, largest batch first.

    Args:
        options: buckets of one length that differ in batch size.

    The answer is exact. A bucket cheapest per row fills all but the last few rows: among any ``batch_size`` other
    runs some have sizes adding up to a multiple of its batch size, and could be replaced by it at no greater cost.
    """
    best = min(options, key=lambda bucket: (cost(bucket) / bucket.batch_size, -bucket.batch_size))
    largest = max(bucket.batch_size for bucket in options)
    bulk = max(0, n_rows - best.batch_size * largest) // best.batch_size
    rest = n_rows - bulk * best.batch_size
    least = [0.0] + [float("inf")] * rest
    last: list[Bucket] = [best] * (rest + 1)
    for rows in range(1, rest + 1):
        for bucket in options:
            total = least[max(0, rows - bucket.batch_size)] + cost(bucket)
            if total < least[rows]:
                least[rows], last[rows] = total, bucket
    runs = [best] * bulk
    while rest > 0:
        runs.append(last[rest])
        rest -= last[rest].batch_size
    return sorted(runs, key=lambda bucket: -bucket.batch_size)
