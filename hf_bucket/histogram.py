"""How many rows of each length there are: what ladders are planned for."""

from __future__ import annotations

import math
import operator
from bisect import bisect_right
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise

import numpy as np

from hf_bucket.errors import LadderError, too_long
from hf_bucket.ladder import LONGEST, Ladder, _size


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
        object.__setattr__(self, "lengths", tuple(tokens(length, "a row's length") for length in self.lengths))
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


def tokens(value: int, what: str) -> int:
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
