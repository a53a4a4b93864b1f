"""The scheduler: which rows share which batch of which bucket, so that the predicted cost is least."""

from __future__ import annotations

from bisect import bisect_left
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from hf_bucket.errors import too_long
from hf_bucket.ladder import Bucket, Ladder

Cost = Callable[[Bucket], float]
Costs = NDArray[np.float64]

# One run of a session costs about as much as this many more cells: MiniLM-L6 in a batch of 1 x 64 against 8 x 64, as
# benchmarks/overhead.py measures it (extra_cells_per_run).
RUN_OVERHEAD_CELLS = 24

# Rows that may wait for a longer bucket at a time, if that is more than two of the largest batches: more would fill
# batches of the longer bucket alone, which a batch of their own length does for less.
_PROMOTED = 32


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
    promote: bool = True,
) -> list[Assignment]:
    """Return the batches that run every row once, shortest buckets first.

    No other batches cost less, as long as no more rows than twice the largest batch have to move to a longer bucket.
    A row moves there only where that is cheaper than a batch of its own length, never on a tie. Takes time linear in
    the rows.

    Args:
        lengths: tokens of every row, special tokens included.
        cost: what one run of a bucket costs, in any unit.
        kinds: rows of different kinds never share a batch; None makes all alike.
        promote: let rows move to a longer bucket; False keeps every row in the smallest length that holds it.
        exact: give a row that is longer than the largest bucket one of its own, outside the ladder.

    Raises:
        TooLongError: a row is longer than the largest bucket, and ``exact`` is not set.
    """
    groups: dict[int, dict[int, list[int]]] = defaultdict(lambda: defaultdict(list))
    alone: list[Assignment] = []
    known = ladder.lengths
    for row, length in enumerate(lengths):
        if length <= known[-1]:
            groups[kinds[row] if kinds else 0][known[bisect_left(known, length)]].append(row)
        elif exact:
            alone.append(Assignment(bucket=Bucket(batch_size=1, extent=(length,)), rows=(row,)))
        else:
            raise too_long(length, ladder.max_length, maximum=None, row=row)
    found = [one for _, rows in sorted(groups.items()) for one in _schedule(rows, ladder, cost, promote)]
    return sorted(found, key=lambda one: one.bucket.length) + alone


def _schedule(rows: dict[int, list[int]], ladder: Ladder, cost: Cost, promote: bool) -> list[Assignment]:
    """Return the cheapest batches for rows that may share any; ``rows`` has them by the length that holds them."""
    shortest = min(rows)
    if rows == {shortest: rows[shortest][:1]}:  # one row alone, as a server gets them
        longest = ladder.max_length if promote else shortest
        bucket = min((bucket for bucket in ladder if shortest <= bucket.length <= longest), key=cost)
        return [Assignment(bucket=bucket, rows=(rows[shortest][0],))]
    lengths = [length for length in ladder.lengths if length >= shortest]
    counts, options = [len(rows.get(length, ())) for length in lengths], [ladder.of_length(n) for n in lengths]
    covers = _promote(counts, options, cost, most=None if promote else 0)
    waiting: list[int] = []
    assignments: list[Assignment] = []
    for length, runs in zip(lengths, covers, strict=True):
        waiting = sorted([*waiting, *rows.get(length, ())])
        start = 0
        for bucket in runs:
            assignments.append(Assignment(bucket=bucket, rows=tuple(waiting[start : start + bucket.batch_size])))
            start += bucket.batch_size
        waiting = waiting[start:]
    return assignments


def _promote(
    counts: Sequence[int], options: Sequence[Sequence[Bucket]], cost: Cost, *, most: int | None
) -> list[list[Bucket]]:
    """Return the runs of every length, when rows may wait for a longer one.

    Dynamic programming over the lengths: ``least[k]`` is the cost of all shorter rows but ``k``, which wait.

    Args:
        counts: rows whose smallest length this is, per length.
        options: buckets of every length.
        most: rows that may wait at a time; None is twice the largest batch, and at least ``_PROMOTED``.
    """
    if most is None:
        most = max(_PROMOTED, 2 * max(bucket.batch_size for buckets in options for bucket in buckets))
    least, total = np.zeros(1), 0
    tables, choices = [], []
    for place, count in enumerate(counts):
        total += count
        waiting_after = min(most, total) if place < len(counts) - 1 else 0
        tables.append(_Cover(options[place], cost, count + len(least) - 1))
        here = count + np.arange(len(least))[:, None] - np.arange(waiting_after + 1)[None, :]
        totals = np.where(here < 0, np.inf, least[:, None] + tables[-1].costs_of(np.maximum(here, 0)))
        choices.append(totals.argmin(axis=0))
        least = totals.min(axis=0)
    runs, waits = [], 0
    for count, table, choice in zip(reversed(counts), reversed(tables), reversed(choices), strict=True):
        before = int(choice[waits])
        runs.append(table.runs(count + before - waits))
        waits = before
    return runs[::-1]


def cover(n_rows: int, options: Sequence[Bucket], cost: Cost) -> list[Bucket]:
    """Return the cheapest runs that hold ``n_rows`` rows of one length, largest batch first.

    Args:
        options: buckets of one length that differ in batch size.
    """
    return _Cover(options, cost, n_rows).runs(n_rows)


class _Cover:
    """The cheapest runs for up to ``most`` rows of one length.

    The answer is exact. A bucket cheapest per row fills all but the last few rows: among any ``batch_size`` other
    runs some have sizes adding up to a multiple of its batch size, and could be replaced by it at no greater cost.
    """

    def __init__(self, options: Sequence[Bucket], cost: Cost, most: int) -> None:
        prices = [(bucket, cost(bucket)) for bucket in options]
        self._best, self._price = min(prices, key=lambda item: (item[1] / item[0].batch_size, -item[0].batch_size))
        size = min(most, self._best.batch_size * max(bucket.batch_size for bucket in options))
        least = [0.0] + [float("inf")] * size
        self._last = [self._best] * (size + 1)
        for rows in range(1, size + 1):
            for bucket, price in prices:
                total = least[max(0, rows - bucket.batch_size)] + price
                if total < least[rows]:
                    least[rows], self._last[rows] = total, bucket
        self._least = np.array(least)

    def _bulk(self, n_rows: NDArray[np.int64]) -> NDArray[np.int64]:
        """Return how many runs of the bucket cheapest per row come first."""
        return np.maximum(0, -(-(n_rows - len(self._least) + 1) // self._best.batch_size))

    def costs_of(self, n_rows: NDArray[np.int64]) -> Costs:
        """Return the least cost of every number of rows."""
        bulk = self._bulk(n_rows)
        costs: Costs = bulk * self._price + self._least[np.maximum(0, n_rows - bulk * self._best.batch_size)]
        return costs

    def runs(self, n_rows: int) -> list[Bucket]:
        """Return the runs for one number of rows, largest batch first."""
        bulk = int(self._bulk(np.array(n_rows)))
        runs, rest = [self._best] * bulk, n_rows - bulk * self._best.batch_size
        while rest > 0:
            runs.append(self._last[rest])
            rest -= self._last[rest].batch_size
        return sorted(runs, key=lambda bucket: -bucket.batch_size)
