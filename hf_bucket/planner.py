"""Which bucket lengths a model should be compiled for: counted rows, exact plans, presets and a linter."""

from __future__ import annotations

import math
import operator
from bisect import bisect_right
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from numbers import Real
from typing import Literal, TypeAlias

import numpy as np
import numpy.typing as npt

from hf_bucket.errors import LadderError, too_long
from hf_bucket.ladder import LONGEST, Bucket, Ladder, _size, cross, make_ladder

Cost: TypeAlias = Callable[[int], float]
Floats: TypeAlias = npt.NDArray[np.float64]
Ints: TypeAlias = npt.NDArray[np.int64]

PRESET_CAP = 2048  # tokens: a preset compiles nothing longer unless the data is, whatever the model could hold
PRESET_START = 16  # tokens: the shortest length a preset makes on its own
UNLIMITED_CAP = 512  # tokens: the cap where neither a model nor data knows one


@dataclass(frozen=True, slots=True, kw_only=True)
class Histogram:
    """How many rows of each length there are; anything else is a ``LadderError``.

    Attributes:
        lengths: distinct lengths in tokens, ascending, from 1 to ``LONGEST``; at least one.
        counts: rows of each length, at least 1 each; as many as ``lengths``.
    """

    lengths: tuple[int, ...]
    counts: tuple[int, ...]

    def __post_init__(self) -> None:
        object.__setattr__(self, "lengths", tuple(_tokens(length, "a row's length") for length in self.lengths))
        object.__setattr__(self, "counts", tuple(_size(count, "a count of rows") for count in self.counts))
        if not self.lengths:
            raise LadderError("lengths is empty; give the token count of at least one row")
        if len(self.lengths) != len(self.counts) or any(a >= b for a, b in pairwise(self.lengths)):
            got = f"got {len(self.lengths)} lengths and {len(self.counts)} counts; use Histogram.from_lengths"
            raise LadderError(f"a histogram needs ascending lengths, each once and each with a count, {got}")

    @classmethod
    def from_lengths(cls, lengths: Iterable[int]) -> Histogram:
        """Count the rows of each length, in tokens with special tokens: an iterable, array or column of integers."""
        counted = sorted(Counter(_whole_numbers(lengths)).items())
        return cls(lengths=tuple(length for length, _ in counted), counts=tuple(count for _, count in counted))

    @classmethod
    def from_json(cls, data: Mapping[str, Sequence[int]]) -> Histogram:
        """Rebuild what ``to_json`` returned."""
        if not isinstance(data, Mapping) or not {"lengths", "counts"} <= data.keys():
            raise LadderError(f'a histogram is {{"lengths": [...], "counts": [...]}}, got {data!r:.80}')
        return cls(lengths=tuple(data["lengths"]), counts=tuple(data["counts"]))

    def to_json(self) -> dict[str, list[int]]:
        """Return the same numbers as what ``json.dumps`` takes."""
        return {"lengths": list(self.lengths), "counts": list(self.counts)}

    @property
    def total_rows(self) -> int:
        """All rows."""
        return sum(self.counts)

    @property
    def total_tokens(self) -> int:
        """Real tokens of all rows."""
        return sum(map(operator.mul, self.lengths, self.counts))

    @property
    def max(self) -> int:
        """Tokens of the longest row."""
        return self.lengths[-1]

    def quantile(self, share: float) -> int:
        """Return the smallest length that at least ``share`` of the rows, in [0, 1], do not exceed."""
        if not 0 <= share <= 1:
            raise LadderError(f"a quantile is a share from 0 to 1, got {share!r}; use 0.99 for the 99th percentile")
        rank = max(1, math.ceil(round(share * self.total_rows, 9)))  # 0.07 * 100 is 7.000000000000001
        return next(n for n, seen in zip(self.lengths, accumulate(self.counts), strict=True) if seen >= rank)

    def clip(self, *, shortest: int = 1, longest: int) -> Histogram:
        """Return the histogram with every row at least ``shortest`` and at most ``longest`` tokens long."""
        clipped: Counter[int] = Counter()
        for length, count in zip(self.lengths, self.counts, strict=True):
            clipped[min(max(length, shortest), longest)] += count
        return Histogram(lengths=tuple(clipped), counts=tuple(clipped.values()))

    def rows_per_length(self, ladder: Ladder) -> tuple[int, ...]:
        """Return how many rows each of ``ladder.lengths`` is the smallest for; a row too long is a ``TooLongError``."""
        if self.max > ladder.max_length:
            raise too_long(self.max, ladder.max_length, maximum=None)
        seen = [0, *accumulate(self.counts)]
        ends = [0, *(bisect_right(self.lengths, length) for length in ladder.lengths)]
        return tuple(seen[end] - seen[start] for start, end in pairwise(ends))

    def waste(self, ladder: Ladder) -> float:
        """Return the share of cells, in [0, 1), that is padding when each row takes its smallest length."""
        cells: int = sum(map(operator.mul, ladder.lengths, self.rows_per_length(ladder)))
        return (cells - self.total_tokens) / cells


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """A ladder chosen from data, with what it is expected to cost.

    Attributes:
        ladder: the lengths, each with every batch size.
        cost: expected mean cost of one row, in the unit of the cost function (tokens by default).
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
    n_buckets: int,
    cost: Cost | None = None,
    batch_sizes: Sequence[int] | None = None,
    max_length: int | None = None,
) -> Plan:
    """Return the cheapest ladder of at most ``n_buckets`` lengths; of equally cheap ones, one with the fewest.

    Args:
        lengths: tokens of each row, special tokens included, or their histogram.
        cost: cost of one row padded to that many tokens; it may have plateaus and dips. None: the number of tokens.
        batch_sizes: combined with every length; None means ``DEFAULT_BATCH_SIZES``.
        max_length: tokens the top bucket holds, needed or not; longer rows are clipped. None: the longest row.

    Raises:
        LadderError: a size that is not a whole number of at least 1, or a cost that is negative or not finite.
    """
    given = lengths if isinstance(lengths, Histogram) else Histogram.from_lengths(lengths)
    top = given.max if max_length is None else _tokens(max_length, "max_length")
    histogram = given.clip(longest=top)
    ladder = make_ladder(_best_lengths(histogram, _size(n_buckets, "n_buckets"), cost, top), batch_sizes=batch_sizes)
    rows = histogram.rows_per_length(ladder)
    return Plan(
        ladder=ladder,
        cost=float(np.dot(rows, _prices(cost, ladder.lengths))) / histogram.total_rows,
        waste=histogram.waste(ladder),
        waste_single=histogram.waste(cross([top], [1])),
        rows=rows,
        clipped=sum(count for length, count in zip(given.lengths, given.counts, strict=True) if length > top),
        histogram=histogram,
    )


def resolve_ladder(
    buckets: str | int | Sequence[object] | Ladder,
    *,
    batch_sizes: Sequence[int] | None = None,
    min_length: int,
    max_length: int | None,
    histogram: Histogram | None = None,
    n_buckets: int = 8,
    cost: Cost | None = None,
) -> Ladder:
    """Return the ladder that ``buckets`` means for one model.

    Args:
        buckets: ``"pow2"``, ``"auto"`` (the plan for ``histogram``, or without one lengths evenly spread by ratio),
            or anything ``make_ladder`` takes.
        batch_sizes: combined with every length; None means ``DEFAULT_BATCH_SIZES``. Not beside pairs or a ladder.
        min_length, max_length: tokens of an empty text, and of the longest input the model takes (None: no limit).
        n_buckets, cost: for ``"auto"``, as in ``plan``.

    Raises:
        LadderError: an unknown preset, what ``make_ladder`` refuses, or a bucket no input of the model can use.
    """
    if isinstance(buckets, str):
        buckets = _preset_lengths(buckets, min_length, max_length, histogram, n_buckets, cost)
    ladder = make_ladder(buckets, batch_sizes=batch_sizes)
    for finding in lint(ladder, min_length=min_length, max_length=max_length):
        raise LadderError(finding.message)
    return ladder


def lint(
    ladder: Ladder,
    *,
    min_length: int,
    max_length: int | None,
    histogram: Histogram | None = None,
    cost: Cost | None = None,
    bucket_price: float = 0.01,
) -> list[Finding]:
    """Return what is wrong with each bucket, and with ``histogram`` each length that is not worth its place.

    Args:
        min_length, max_length: tokens of an empty text, and of the longest input the model takes (None: no limit).
        histogram: rows to judge the lengths by; rows longer than the ladder count as its longest.
        cost: as in ``plan``.
        bucket_price: share of the total cost that a length must save to be worth compiling.
    """
    impossible = [*_impossible_findings(ladder, min_length, max_length)]
    if histogram is None:
        return impossible
    skipped = {finding.bucket.length for finding in impossible}
    used = _used_findings(ladder, histogram.clip(longest=ladder.max_length), cost, bucket_price)
    return impossible + [finding for finding in used if finding.bucket.length not in skipped]


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


def _tokens(value: int, what: str) -> int:
    """Return ``value`` as an int, checked to be from 1 to ``LONGEST``."""
    tokens = _size(value, f"{what} (in tokens, special tokens included)")
    if tokens > LONGEST:
        raise LadderError(f"{what} must be at most {LONGEST:,} tokens, got {tokens}; 1e30 means no limit: pass None")
    return tokens


def _whole_numbers(lengths: Iterable[int]) -> list[int]:
    """Return ``lengths`` as a list, checked to hold integers only."""
    wanted = "lengths must be one whole number of tokens per row"
    values = lengths.tolist() if hasattr(lengths, "tolist") else lengths
    if isinstance(values, (str, bytes, Mapping)) or not isinstance(values, Iterable):
        raise LadderError(f"{wanted}, got {type(lengths).__name__}; pass a list such as [12, 57, 31]")
    values = list(values)
    for value in dict(zip(map(type, values), values, strict=True)).values():  # one of each type: quick for a million
        if isinstance(value, bool) or not isinstance(value, (int, np.integer)):
            raise LadderError(f"{wanted}, got {value!r:.80}; pass a list such as [12, 57, 31]")
    return values


def _preset_lengths(
    name: str, shortest: int, max_length: int | None, histogram: Histogram | None, n_buckets: int, cost: Cost | None
) -> Sequence[int]:
    """Return the lengths of the preset ``name``, none below ``shortest``; the last is the most a preset may hold."""
    longest = UNLIMITED_CAP if histogram is None else histogram.max
    cap = max(shortest, longest if max_length is None else min(max_length, max(PRESET_CAP, longest)))
    if name == "pow2":
        powers = (2**power for power in range(PRESET_START.bit_length() - 1, cap.bit_length()))
        return [*(length for length in powers if shortest <= length < cap), cap]
    if name != "auto":
        raise LadderError(f'buckets={name!r} is no preset; use "auto", "pow2", a length, or a list such as [64, 128]')
    if histogram is not None:
        rows = histogram.clip(shortest=shortest, longest=cap)
        return plan(rows, n_buckets=n_buckets, cost=cost, max_length=cap).lengths
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


def _used_findings(ladder: Ladder, histogram: Histogram, cost: Cost | None, bucket_price: float) -> Iterator[Finding]:
    """Yield the lengths that no row uses, and those whose rows could as well take the next length."""
    rows = np.array(histogram.rows_per_length(ladder), dtype=np.float64)
    prices = _prices(cost, ladder.lengths)
    total, rises = float(rows @ prices), np.append(rows[:-1] * np.diff(prices), np.inf)
    for length, used, rise in zip(ladder.lengths, rows, rises, strict=True):
        bucket = ladder.of_length(length)[0]
        if not used:
            message = f"bucket {bucket} is used by none of the {histogram.total_rows:,} rows; drop length {length}"
            yield Finding(kind="unused", bucket=bucket, message=message)
        elif rise < bucket_price * total:
            got = f"without bucket {bucket} the total cost changes by {rise / total:+.2%}"
            message = f"{got}, less than the {bucket_price:.2%} a length should save; drop length {length}"
            yield Finding(kind="saves-too-little", bucket=bucket, message=message)
