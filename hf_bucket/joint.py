"""Lengths and batch sizes chosen together: the buckets that run a window of rows in the fewest predicted seconds."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Protocol, TypeAlias, runtime_checkable

import numpy as np
import numpy.typing as npt

from hf_bucket.errors import LadderError
from hf_bucket.ladder import Bucket, Ladder, _size, cross

Floats: TypeAlias = npt.NDArray[np.float64]
Ints: TypeAlias = npt.NDArray[np.int64]

WINDOW = 1024  # rows that are scheduled together: what the pipeline and ``predict`` read ahead
BATCH_SIZES = (1, 2, 4, 8, 16, 32)
MOST_BATCH_SIZES = 8  # every set of them is tried, and each more of them doubles the sets
_EQUAL = 1 + 1e-12  # totals that differ by less are equal but for rounding


@runtime_checkable
class RunCost(Protocol):
    """Seconds of one run of any bucket, as ``costs.Costs`` has them; ``of`` is what the scheduler goes by."""

    def __call__(self, bucket: Bucket, /) -> float: ...

    def of(self, ladder: Ladder, /) -> Mapping[Bucket, float]: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """What a ladder may take; None is no limit.

    Attributes:
        n_buckets: buckets in all, each one batch size at one length.
        memory_bytes: of the largest bucket; needs ``memory_of``, which tells the bytes of any bucket.
        compile_s: seconds for compiling all buckets; needs ``bucket_compile_s``, what one bucket takes.

    Raises:
        LadderError: a limit that is none, or without the figure it needs.
    """

    n_buckets: int | None = None
    memory_bytes: int | None = None
    memory_of: Callable[[Bucket], int] | None = None
    compile_s: float | None = None
    bucket_compile_s: float | None = None

    def __post_init__(self) -> None:
        for name in ("n_buckets", "memory_bytes"):
            if getattr(self, name) is not None:
                object.__setattr__(self, name, _size(getattr(self, name), name))
        for name in ("compile_s", "bucket_compile_s"):
            value = getattr(self, name)
            if value is not None and not (isinstance(value, (int, float)) and 0 < value < math.inf):
                raise LadderError(f"{name} must be a number of seconds above 0, got {value!r}; None is no limit")
        for name, figure in (("memory_bytes", "memory_of"), ("compile_s", "bucket_compile_s")):
            if getattr(self, name) is not None and getattr(self, figure) is None:
                raise LadderError(f"{name}={getattr(self, name)} cannot be kept without {figure}; give it too")

    def most_buckets(self) -> int | None:
        """Return how many buckets there may be; None where nothing limits them.

        Raises:
            LadderError: there is no time for a single one.
        """
        if self.compile_s is None or self.bucket_compile_s is None:
            return self.n_buckets
        in_time = math.floor(self.compile_s / self.bucket_compile_s * (1 + 1e-9))  # 0.3 / 0.1 is below 3
        if not in_time:
            raise LadderError(
                f"compile_s is {self.compile_s:g} but one bucket, the least there can be, takes "
                f"{self.bucket_compile_s:g} s to compile; allow at least that much"
            )
        return in_time if self.n_buckets is None else min(in_time, self.n_buckets)

    def check_memory(self, tops: Sequence[Bucket]) -> None:
        """Raise a LadderError where none of ``tops``, the buckets that hold the longest row, is within the limit."""
        if self.memory_bytes is None or self.memory_of is None:
            return
        needed, least = min((self.memory_of(bucket), bucket.name) for bucket in tops)
        if needed > self.memory_bytes:
            raise LadderError(
                f"memory_bytes is {self.memory_bytes:,} but {least}, the least that holds {tops[0].length} tokens, "
                f"needs {needed:,}; allow at least that much, or plan for a smaller max_length"
            )

    def allows(self, bucket: Bucket) -> bool:
        """Return whether a bucket's memory is within the limit."""
        return self.memory_bytes is None or self.memory_of is None or self.memory_of(bucket) <= self.memory_bytes


def best_ladder(
    lengths: Sequence[int], rows: Sequence[float], cost: RunCost, *, batch_sizes: Sequence[int], limits: Limits
) -> Ladder:
    """Return the buckets that run ``rows`` in the fewest seconds; of equally fast ladders, one of the fewest buckets.

    No other ladder of these lengths and batch sizes is faster, if every row goes to the smallest length that holds it
    and each length runs its rows as ``run_seconds`` says. Dynamic programming: ``least[n, j]`` is the time of the rows
    of the first j lengths in n buckets; the last length of its ladder is the j-th, has one of the sets of batch sizes,
    and holds the rows back to where the ladder of an earlier i ends.

    Args:
        lengths: the lengths there may be, ascending. The ladder holds the last.
        rows: of each length, in a window; any number of at least 0, whole or not.
        batch_sizes: those there may be, at any length.

    Raises:
        LadderError: no ladder keeps the limits, or a cost is not a positive number.
    """
    shapes = [_shapes(lengths, size) for size in _batch_sizes(batch_sizes)]
    limits.check_memory([row[-1] for row in shapes])
    prices = np.array([[_price(cost, bucket) for bucket in row] for row in shapes])
    allowed = np.array([[limits.allows(bucket) for bucket in row] for row in shapes])
    sizes = np.array([row[0].batch_size for row in shapes])
    most = min(limits.most_buckets() or prices.size, prices.size)
    runs = [_best_sets(prices, allowed, sizes, np.asarray(rows), n) for n in range(1, min(len(sizes), most) + 1)]
    chosen = _cheapest_chain([seconds for seconds, _ in runs], most)
    return Ladder(tuple(shapes[k][end] for start, end, n in chosen for k in runs[n - 1][1][end, start]))


def run_seconds(ladder: Ladder, rows: Sequence[float], cost: RunCost) -> float:
    """Return the predicted seconds of running ``rows`` of each of the ladder's lengths, none in a longer one.

    Whole rows run in the cheapest batches, as ``assign.cover`` finds them; a part of a row, where a window has fewer
    than one on average, takes that part of what one more row takes.
    """
    total = 0.0
    for length, count in zip(ladder.lengths, rows, strict=True):
        options = ladder.of_length(length)
        prices = np.array([[_price(cost, bucket)] for bucket in options])
        sizes = np.array([bucket.batch_size for bucket in options])
        total += float(_cover_seconds(prices, sizes, np.array([count], dtype=np.float64), np.zeros(1, np.int64))[0])
    return total


def _best_sets(
    prices: Floats, allowed: npt.NDArray[np.bool_], sizes: Ints, rows: Floats, n: int
) -> tuple[Floats, Ints]:
    """Return for every run of lengths the seconds of its rows with the best ``n`` batch sizes, and which these are.

    *Shape:* ``prices`` and ``allowed`` ``(batch sizes, lengths)``, ``rows`` ``(lengths,)``; returned are
    ``(last length, first length)`` and ``(last length, first length, n)``. Infinite where a limit forbids them all.
    """
    ends, starts = np.tril_indices(len(rows))
    rows_up_to = np.append(0.0, np.cumsum(rows))
    together = rows_up_to[ends + 1] - rows_up_to[starts]
    least, sets = np.full(len(ends), np.inf), np.zeros((len(ends), n), dtype=np.int64)
    for chosen in map(list, combinations(range(len(sizes)), n)):
        seconds = _cover_seconds(prices[chosen], sizes[chosen], together, ends)
        within = np.logical_and.reduce(allowed[chosen])
        better = (seconds < least) & within[ends]
        least[better], sets[better] = seconds[better], chosen
    seconds_of, sets_of = np.full((len(rows), len(rows)), np.inf), np.zeros((len(rows), len(rows), n), dtype=np.int64)
    seconds_of[ends, starts], sets_of[ends, starts] = least, sets
    return seconds_of, sets_of


def _cheapest_chain(seconds: Sequence[Floats], most: int) -> list[tuple[int, int, int]]:
    """Return the runs of lengths (first, last, buckets) of the fastest ladder of at most ``most`` buckets.

    *Shape:* ``seconds[n - 1]`` is ``(last length, first length)``, for a run in n buckets.
    """
    n_lengths = len(seconds[0])
    least = np.full((most + 1, n_lengths + 1), np.inf)  # in so many buckets, of the first so many lengths
    least[0, 0] = 0.0
    starts, used = np.zeros(least.shape, dtype=np.int64), np.zeros(least.shape, dtype=np.int64)
    for end in range(1, n_lengths + 1):
        for n, runs in enumerate(seconds, 1):
            totals = least[: most + 1 - n, :end] + runs[end - 1, :end]
            first = totals.argmin(axis=1)
            lowest = np.take_along_axis(totals, first[:, None], axis=1)[:, 0]
            better = np.flatnonzero(lowest < least[n:, end])
            least[n + better, end] = lowest[better]
            starts[n + better, end], used[n + better, end] = first[better], n
    left, end, chain = int((least[:, -1] <= least[:, -1].min() * _EQUAL).argmax()), n_lengths, []
    while end:
        chain.append((int(starts[left, end]), end - 1, int(used[left, end])))
        left, end = left - chain[-1][2], chain[-1][0]
    return chain[::-1]


def _cover_seconds(prices: Floats, sizes: Ints, rows: Floats, at: Ints) -> Floats:
    """Return the least seconds for ``rows[i]`` rows of length ``at[i]``, in batches of ``sizes``.

    As in ``assign.cover``, the batch that is cheapest per row takes all but the last few rows. *Shape:* ``prices``
    ``(sizes, lengths)``, ``sizes`` ``(sizes,)``, ``rows``, ``at`` and the result ``(n,)``.
    """
    best = (prices / sizes[:, None]).argmin(axis=0)
    size, price = sizes[best][at], prices[best, np.arange(prices.shape[1])][at]
    last = min(math.ceil(rows.max()) + 1, int(sizes.max()) ** 2)
    least = np.zeros((last + 1, prices.shape[1]))
    for n in range(1, last + 1):
        least[n] = (least[np.maximum(0, n - sizes)] + prices).min(axis=0)

    def whole(n: Ints) -> Floats:
        bulk = np.maximum(0, -((last - n) // size))
        found: Floats = bulk * price + least[n - bulk * size, at]
        return found

    below = np.floor(rows).astype(np.int64)
    low = whole(below)
    return low + (rows - below) * (whole(below + 1) - low)


def _shapes(lengths: Sequence[int], batch_size: int) -> list[Bucket]:
    return [Bucket(batch_size=batch_size, extent=(length,)) for length in lengths]


def _batch_sizes(batch_sizes: Sequence[int]) -> list[int]:
    """Return batch sizes checked and in order."""
    sizes = [bucket.batch_size for bucket in cross([1], batch_sizes)]
    if len(sizes) > MOST_BATCH_SIZES:
        raise LadderError(
            f"a joint plan tries every set of batch_sizes and takes at most {MOST_BATCH_SIZES}, got {len(sizes)}; give "
            f"the likely ones, such as {list(BATCH_SIZES)}"
        )
    return sizes


def _price(cost: RunCost, bucket: Bucket) -> float:
    price = cost(bucket)
    if not (isinstance(price, (int, float)) and 0 < price < math.inf):  # numpy's float64 is a float
        raise LadderError(f"cost({bucket}) returned {price!r}; the seconds of a run must be a finite number above 0")
    return float(price)
