"""Which buckets a model should be compiled for: exact plans, presets and a linter."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate
from numbers import Real
from typing import Literal, TypeAlias

import numpy as np
import numpy.typing as npt

from hf_bucket.assign import assign
from hf_bucket.errors import LadderError
from hf_bucket.histogram import Histogram, tokens
from hf_bucket.joint import BATCH_SIZES, WINDOW, Limits, RunCost, best_ladder, run_seconds
from hf_bucket.ladder import Bucket, Ladder, _size, cross, is_auto, make_ladder

Cost: TypeAlias = Callable[[int], float]
Floats: TypeAlias = npt.NDArray[np.float64]
Ints: TypeAlias = npt.NDArray[np.int64]

PRESET_CAP = 2048  # tokens: a preset compiles nothing longer unless the data is, whatever the model could hold
PRESET_START = 16  # tokens: the shortest length a preset makes on its own
UNLIMITED_CAP = 512  # tokens: the cap where neither a model nor data knows one
MOST_LENGTHS = 512  # that a joint plan chooses from
_WINDOWS = 64  # windows of rows that the linter lets the scheduler run, at most


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """A ladder chosen from data, with what it is expected to cost.

    Attributes:
        ladder: the lengths, each with every batch size, or in a joint plan with its own.
        cost: expected mean cost of one row, in the unit of the cost function: tokens by default, seconds where the
            seconds of a run were given.
        waste: share of the computed cells that is padding, in [0, 1).
        waste_single: the same with one bucket as long as the ladder's longest.
        rows: data rows that use each of ``lengths``.
        clipped: rows longer than the ``max_length`` planned for; they count as that long.
        histogram: the rows as planned for, so after clipping.
    """

    ladder: Ladder
    cost: float
    waste: float
    waste_single: float
    rows: tuple[int, ...]
    clipped: int
    histogram: Histogram

    @property
    def lengths(self) -> tuple[int, ...]:
        """Lengths of the buckets in tokens, ascending."""
        return self.ladder.lengths

    def to_json(self) -> dict[str, object]:
        """Return the plan as what ``json.dumps`` takes; ``make_ladder`` takes its ``"ladder"``."""
        return {
            "ladder": [[bucket.batch_size, bucket.length] for bucket in self.ladder],
            "rows": {str(length): rows for length, rows in zip(self.lengths, self.rows, strict=True)},
            "cost": self.cost,
            "waste": self.waste,
            "waste_single": self.waste_single,
            "clipped": self.clipped,
            "histogram": self.histogram.to_json(),
        }

    def __str__(self) -> str:
        total = self.histogram.total_rows
        lines = ["  length        rows   share"]
        lines += [f"{n:>8,}{rows:>12,}{rows / total:>8.1%}" for n, rows in zip(self.lengths, self.rows, strict=True)]
        lines.append(f"waste {self.waste:.1%} (one bucket of {self.ladder.max_length:,}: {self.waste_single:.1%})")
        lines.append(f"mean cost per row {self.cost:,.4g}; {self.clipped:,} of {total:,} rows clipped")
        return "\n".join(lines)


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """A bucket, or the length ``bucket`` is the first of, that costs more than it gains; ``message`` says why."""

    kind: Literal["unreachable", "beyond-maximum", "unused", "saves-too-little"]
    bucket: Bucket
    message: str


def plan(
    lengths: Histogram | Iterable[int],
    *,
    n_buckets: int | None = None,
    cost: Cost | RunCost | None = None,
    batch_sizes: Sequence[int] | None = None,
    max_length: int | None = None,
    limits: Limits | None = None,
    window: int = WINDOW,
) -> Plan:
    """Return the cheapest ladder of at most ``n_buckets`` lengths; of equally cheap ones, one with the fewest.

    Where ``cost`` has the seconds of a run of any bucket (``costs.Costs``), lengths and batch sizes are chosen jointly,
    every length with batch sizes of its own, and ``n_buckets`` counts buckets, not lengths: see ``joint.best_ladder``.
    The ladder found is the fastest of all that end at lengths at which there are rows, and of all there are if no
    bucket takes longer than a longer one. Of more than ``MOST_LENGTHS`` such lengths it may use only so many, evenly
    spread by ratio, which pads no row by more than ``longest / shortest`` to the power of 1 / 511: 1.4 % for 1,024.

    Args:
        lengths: tokens of each row, special tokens included, or their histogram.
        n_buckets: lengths, or in a joint plan buckets, in all. None where ``limits`` say it.
        cost: cost of one row padded to that many tokens, which may have plateaus and dips; or the seconds of a run of
            any bucket. None: the number of tokens.
        batch_sizes: combined with every length; None means ``DEFAULT_BATCH_SIZES``. In a joint plan those that may be
            chosen; None means ``joint.BATCH_SIZES``.
        max_length: tokens the top bucket holds, needed or not; longer rows are clipped. None: the longest row.
        limits: of a joint plan, on memory and time for compiling; the lower of both numbers of buckets holds.
        window: for a joint plan, rows that are scheduled together: it is made for so many rows distributed as
            ``lengths`` are. 1 stands for a server that answers one by one.

    Raises:
        LadderError: a size that is not a whole number of at least 1, a cost that is negative or not finite, or limits
            that no ladder keeps.
    """
    given = lengths if isinstance(lengths, Histogram) else Histogram.from_lengths(lengths)
    top = given.max if max_length is None else tokens(max_length, "max_length")
    histogram, within = given.clip(longest=top), _within(n_buckets, limits)
    if isinstance(cost, RunCost):
        ladder = _joint_ladder(histogram, top, cost, batch_sizes, within, window)
        mean = seconds_per_row(ladder, histogram, cost, window=window)
    else:
        if within != Limits(n_buckets=within.n_buckets):
            raise LadderError("limits on memory and compile time are for joint plans; pass measured costs as cost=")
        best = _best_lengths(histogram, _size(within.n_buckets, "n_buckets"), cost, top)
        ladder = make_ladder(best, batch_sizes=batch_sizes)
        mean = float(np.dot(histogram.rows_per_length(ladder), _prices(cost, ladder.lengths))) / histogram.total_rows
    return Plan(
        ladder=ladder,
        cost=mean,
        waste=histogram.waste(ladder),
        waste_single=histogram.waste(cross([top], [1])),
        rows=histogram.rows_per_length(ladder),
        clipped=sum(count for length, count in zip(given.lengths, given.counts, strict=True) if length > top),
        histogram=histogram,
    )


def seconds_per_row(ladder: Ladder, histogram: Histogram, cost: RunCost, *, window: int = WINDOW) -> float:
    """Return the predicted seconds of a row when ``window`` rows like those of ``histogram`` run together.

    Rows longer than the ladder count as its longest. What the scheduler saves by letting rows wait for a longer bucket
    is not in it.
    """
    return run_seconds(ladder, _expected_rows(ladder, histogram, window), cost) / window


def resolve_ladder(
    buckets: str | int | Sequence[object] | Ladder,
    *,
    batch_sizes: Sequence[int] | None = None,
    min_length: int,
    max_length: int | None,
    histogram: Histogram | None = None,
    n_buckets: int = 8,
    cost: Cost | RunCost | None = None,
) -> Ladder:
    """Return the ladder that ``buckets`` means for one model.

    Args:
        buckets: ``"pow2"``, ``"auto"`` (the plan for ``histogram``, or without one lengths evenly spread by ratio),
            or anything ``make_ladder`` takes.
        batch_sizes: combined with every length; None means ``DEFAULT_BATCH_SIZES``. Not beside pairs or a ladder. For
            a joint plan as in ``plan``.
        min_length, max_length: tokens of an empty text, and of the longest input the model takes (None: no limit).
        n_buckets, cost: for ``"auto"``, as in ``plan``.

    Raises:
        LadderError: an unknown preset, what ``make_ladder`` refuses, or a bucket no input of the model can use.
    """
    longest = UNLIMITED_CAP if histogram is None else histogram.max
    cap = max(min_length, longest if max_length is None else min(max_length, max(PRESET_CAP, longest)))
    if is_auto(buckets) and histogram is not None:
        rows = histogram.clip(shortest=min_length, longest=cap)
        ladder = plan(rows, n_buckets=n_buckets, cost=cost, batch_sizes=batch_sizes, max_length=cap).ladder
    else:
        lengths = _preset_lengths(buckets, min_length, cap, n_buckets) if isinstance(buckets, str) else buckets
        ladder = make_ladder(lengths, batch_sizes=batch_sizes)
    for finding in lint(ladder, min_length=min_length, max_length=max_length):
        raise LadderError(finding.message)
    return ladder


def lint(
    ladder: Ladder,
    *,
    min_length: int,
    max_length: int | None,
    histogram: Histogram | None = None,
    cost: Cost | RunCost | None = None,
    bucket_price: float = 0.01,
    window: int = WINDOW,
) -> list[Finding]:
    """Return what is wrong with each bucket, and with ``histogram`` each length that is not worth its place.

    Args:
        min_length, max_length: tokens of an empty text, and of the longest input the model takes (None: no limit).
        histogram: rows to judge the lengths by; rows longer than the ladder count as its longest.
        cost: as in ``plan``. With the seconds of a run of any bucket, lengths are judged by predicted seconds, and
            buckets that the scheduler never runs for such rows are found too.
        bucket_price: share of the total cost that a length must save to be worth compiling.
        window: rows that are scheduled together, where ``cost`` has seconds.
    """
    impossible = [*_impossible_findings(ladder, min_length, max_length)]
    if histogram is None:
        return impossible
    skipped = {finding.bucket.length for finding in impossible}
    rows = histogram.clip(longest=ladder.max_length)
    used = [one for one in _used_findings(ladder, rows, cost, bucket_price, window) if one.bucket.length not in skipped]
    if isinstance(cost, RunCost):
        skipped |= {finding.bucket.length for finding in used}
        used += [one for one in _idle_findings(ladder, rows, cost, window) if one.bucket.length not in skipped]
    return impossible + used


def _best_lengths(histogram: Histogram, n_buckets: int, cost: Cost | None, top: int) -> list[int]:
    """Return the lengths, ascending and ending at ``top``, of the cheapest ladder.

    Exact although only observed lengths are tried: a bucket whose longest row has v tokens costs at least
    cheapest(v), the minimum of cost(e) over e in [v, top], and the edge that reaches it holds the same rows (of
    equal edges the largest holds more that were not seen). cheapest(v) never falls as v grows, so a row's best
    bucket is its smallest, and each bucket holds a run of neighbouring lengths.
    """
    lengths, counts = histogram.lengths, histogram.counts
    if histogram.max < top:
        lengths, counts = (*lengths, top), (*counts, 0)
    edges, prices = _cheapest_edges(np.array(lengths, dtype=np.int64), cost)
    rows_up_to = np.array([0, *accumulate(counts)], dtype=np.float64)
    ends = _cheapest_runs(rows_up_to, np.append(0.0, prices), n_buckets)
    return sorted({int(edges[end - 1]) for end in ends})


def _cheapest_edges(lengths: Ints, cost: Cost | None) -> tuple[Ints, Floats]:
    """Return the cheapest edge at or above each length (of ties the largest) and its cost. *Shape:* ``(lengths,)``"""
    top = int(lengths[-1])
    descending = _prices(cost, range(top, int(lengths[0]) - 1, -1))
    cheapest = np.minimum.accumulate(descending)
    cheaper = np.append(True, descending[1:] < cheapest[:-1])
    edges = top - np.maximum.accumulate(np.where(cheaper, np.arange(descending.size), 0))
    return edges[top - lengths], cheapest[top - lengths]


def _cheapest_runs(rows_up_to: Floats, prices: Floats, n_buckets: int) -> list[int]:
    """Return where each run ends (the last run first) in the cheapest split of the lengths into buckets.

    ``rows_up_to`` counts the rows of the first j lengths; ``prices``, never falling, is the cost of a row whose
    bucket ends at the j-th. *Shape:* ``(lengths + 1,)`` both.
    """
    totals, layers = rows_up_to * prices, []
    for _ in range(min(n_buckets, totals.size - 1) - 1):
        lower, starts = _add_bucket(totals, rows_up_to, prices)
        if lower[-1] >= totals[-1]:  # no further bucket saves more than this one does
            break
        totals = lower
        layers.append(starts)
    ends = [totals.size - 1]
    for starts in reversed(layers):
        ends.append(int(starts[ends[-1]]))
    return [end for end in ends if end > 0]


def _add_bucket(totals: Floats, rows_up_to: Floats, prices: Floats) -> tuple[Floats, Ints]:
    """Return the least totals with one more bucket, and where that bucket starts, for the first j lengths each.

    The later a run ends, the more it gains from starting later (the Monge condition), so the best start never moves
    back as j grows: that of the middle end bounds the others. *Shape:* ``(lengths + 1,)`` for all.
    """
    lower, starts = np.zeros_like(totals), np.zeros(totals.size, dtype=np.int64)
    spans = [(1, totals.size - 1, 0, totals.size - 2)]  # ends from first to last start from low to high
    while spans:
        first, last, low, high = spans.pop()
        end = (first + last) // 2
        tried = slice(low, min(high, end - 1) + 1)
        candidates = totals[tried] + (rows_up_to[end] - rows_up_to[tried]) * prices[end]
        best = int(candidates.argmin())
        lower[end], starts[end] = candidates[best], low + best
        halves = ((first, end - 1, low, low + best), (end + 1, last, low + best, high))
        spans += [half for half in halves if half[0] <= half[1]]
    return lower, starts


def _prices(cost: Cost | None, lengths: Sequence[int]) -> Floats:
    """Return the cost of one row of each length, checked to be finite and at least 0. *Shape:* ``(lengths,)``"""
    prices = [cost(length) for length in lengths] if cost else lengths
    for length, price in zip(lengths, prices, strict=True):
        if not (isinstance(price, Real) and math.isfinite(price) and price >= 0):
            raise LadderError(f"cost({length}) returned {price!r}; a cost must be a finite number of at least 0")
    return np.array(prices, dtype=np.float64)


def _preset_lengths(name: str, shortest: int, cap: int, n_buckets: int) -> list[int]:
    """Return the lengths of the preset ``name`` where no rows are known, from ``shortest`` to ``cap``."""
    if name == "pow2":
        powers = (2**power for power in range(PRESET_START.bit_length() - 1, cap.bit_length()))
        return [*(length for length in powers if shortest <= length < cap), cap]
    if name != "auto":
        raise LadderError(f'buckets={name!r} is no preset; use "auto", "pow2", a length, or a list such as [64, 128]')
    start = min(cap, max(PRESET_START, shortest))
    spread = np.geomspace(cap, start, _size(n_buckets, "n_buckets")).round().astype(int).tolist()
    return sorted({min(cap, -(-length // 8) * 8) for length in spread})


def _impossible_findings(ladder: Ladder, min_length: int, max_length: int | None) -> Iterator[Finding]:
    """Yield the buckets that no input of this model can use."""
    for bucket in ladder:
        if bucket.length < min_length:
            why = f"holds no input: the shortest possible has {min_length} tokens; drop it or use {min_length}"
            yield Finding(kind="unreachable", bucket=bucket, message=f"bucket {bucket} {why}")
        elif max_length is not None and bucket.length > max_length:
            why = f"is longer than this model's maximum of {max_length} tokens; drop it or use {max_length}"
            yield Finding(kind="beyond-maximum", bucket=bucket, message=f"bucket {bucket} {why}")


def _used_findings(
    ladder: Ladder, histogram: Histogram, cost: Cost | RunCost | None, bucket_price: float, window: int
) -> Iterator[Finding]:
    """Yield the lengths that no row uses, and those whose rows could as well take the next length."""
    total, rises = _rises(ladder, histogram, cost, window)
    for length, used, rise in zip(ladder.lengths, histogram.rows_per_length(ladder), [*rises, math.inf], strict=True):
        bucket = ladder.of_length(length)[0]
        if not used:
            message = f"bucket {bucket} is used by none of the {histogram.total_rows:,} rows; drop length {length}"
            yield Finding(kind="unused", bucket=bucket, message=message)
        elif rise < bucket_price * total:
            changes = (
                f"1,000 rows take {1000 * rise:+.3g} s," if isinstance(cost, RunCost) else "the total cost changes by"
            )
            got = f"without bucket {bucket} {changes} {rise / total:+.2%}"
            message = f"{got}, less than the {bucket_price:.2%} a length should save; drop length {length}"
            yield Finding(kind="saves-too-little", bucket=bucket, message=message)


def _rises(ladder: Ladder, histogram: Histogram, cost: Cost | RunCost | None, window: int) -> tuple[float, list[float]]:
    """Return the total cost, and by how much it rises without each length but the last, whose rows have no other."""
    if isinstance(cost, RunCost):
        total = seconds_per_row(ladder, histogram, cost, window=window)
        others = [Ladder(tuple(b for b in ladder if b.length != length)) for length in ladder.lengths[:-1]]
        return total, [seconds_per_row(other, histogram, cost, window=window) - total for other in others]
    rows, prices = np.array(histogram.rows_per_length(ladder), dtype=np.float64), _prices(cost, ladder.lengths)
    return float(rows @ prices), (rows[:-1] * np.diff(prices)).tolist()


def _idle_findings(ladder: Ladder, histogram: Histogram, cost: RunCost, window: int) -> Iterator[Finding]:
    """Yield the buckets that the scheduler runs in none of up to ``_WINDOWS`` windows of the rows, well mixed."""
    rows = np.random.default_rng(0).permutation(np.repeat(histogram.lengths, histogram.counts))
    windows = np.resize(rows, (min(_WINDOWS, -(-len(rows) // window)), window)).tolist()
    seconds = cost.of(ladder)
    run = {batch.bucket for lengths in windows for batch in assign(lengths, ladder, seconds.__getitem__)}
    for bucket in ladder:
        if bucket not in run:
            message = f"the scheduler never runs bucket {bucket} for {window:,} such rows at a time; drop it"
            yield Finding(kind="unused", bucket=bucket, message=message)


def _within(n_buckets: int | None, limits: Limits | None) -> Limits:
    """Return all limits as one, the lower number of buckets in it."""
    given = Limits() if limits is None else limits
    numbers = [_size(n, "n_buckets") for n in (n_buckets, given.n_buckets) if n is not None]
    if not numbers:
        raise LadderError("a plan needs n_buckets, such as n_buckets=8, or limits that have it; got neither")
    return replace(given, n_buckets=min(numbers))


def _joint_ladder(
    histogram: Histogram, top: int, cost: RunCost, batch_sizes: Sequence[int] | None, limits: Limits, window: int
) -> Ladder:
    """Return the fastest ladder that ends at ``top``, of at most ``MOST_LENGTHS`` lengths at which there are rows."""
    lengths = np.array(sorted({*histogram.lengths, top}), dtype=np.int64)
    if len(lengths) > MOST_LENGTHS:
        spread = np.geomspace(lengths[0], top, MOST_LENGTHS)
        lengths = np.unique(lengths[np.searchsorted(lengths, spread, side="right") - 1])
    candidates = cross(lengths.tolist(), [1])
    rows = _expected_rows(candidates, histogram, window)
    sizes = BATCH_SIZES if batch_sizes is None else batch_sizes
    return best_ladder(candidates.lengths, rows, cost, batch_sizes=sizes, limits=limits)


def _expected_rows(ladder: Ladder, histogram: Histogram, window: int) -> list[float]:
    """Return how many of ``window`` rows each length is the smallest for; rows too long count as the longest."""
    rows = histogram.clip(longest=ladder.max_length)
    share = _size(window, "window (rows that are scheduled together)") / rows.total_rows
    return [count * share for count in rows.rows_per_length(ladder)]
