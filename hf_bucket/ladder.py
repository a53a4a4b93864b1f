"""Buckets and ladders: the shapes a model is compiled for, and which of them holds an input."""

from __future__ import annotations

import itertools
import operator
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from math import prod

from hf_bucket.errors import LadderError, too_long

DEFAULT_BATCH_SIZES = (1, 8)
LONGEST = 2**20  # tokens: above it a length is a mistake, such as a tokenizer's 1e30 for "no limit"


@dataclass(frozen=True, slots=True, kw_only=True)
class Bucket:
    """One compiled shape.

    Attributes:
        batch_size: rows, at least 1.
        extent: size of every other free axis: ``(length,)`` in tokens for text, ``(height, width)`` for images.

    Raises:
        LadderError: a size is not a whole number of at least 1, or the extent has one above ``LONGEST``.
    """

    batch_size: int
    extent: tuple[int, ...]

    def __post_init__(self) -> None:
        if not isinstance(self.extent, Sequence) or not self.extent:
            raise LadderError(f"a bucket needs an extent such as (64,), got {self.extent!r}")
        object.__setattr__(self, "batch_size", _size(self.batch_size, "a batch size"))
        extent = tuple(_size(size, "a bucket's length") for size in self.extent)
        if max(extent) > LONGEST:
            raise LadderError(f"a bucket's length must be at most {LONGEST:,}, got {max(extent)}; drop the bucket")
        object.__setattr__(self, "extent", extent)

    @property
    def length(self) -> int:
        """Tokens a row holds. Only for text.

        Raises:
            LadderError: the extent has more than one axis.
        """
        if len(self.extent) != 1:
            raise LadderError(f"a bucket with extent {self.extent} has no single length; read its extent")
        return self.extent[0]

    @property
    def cells(self) -> int:
        """Cells that one run computes, padding included."""
        return self.batch_size * prod(self.extent)

    @property
    def name(self) -> str:
        """``b8_s64``: as in file names and in ``stats()``."""
        return f"b{self.batch_size}_s{'x'.join(map(str, self.extent))}"

    def __str__(self) -> str:
        return self.name


def _size(value: object, what: str) -> int:
    """Return ``value`` as an int of at least 1; numpy integers pass, bools and floats do not."""
    try:
        size = operator.index(value)  # type: ignore[arg-type]  # anything else raises TypeError, handled here
    except TypeError:
        size = 0
    if isinstance(value, bool) or size < 1:
        raise LadderError(f"{what} must be a whole number of at least 1, got {value!r}")
    return size


@dataclass(frozen=True, slots=True)
class Ladder:
    """All buckets of a model: at least one, ordered from the smallest extent to the largest, without duplicates.

    Raises:
        LadderError: no bucket, a bucket given twice, or buckets whose extents have different numbers of axes.
    """

    buckets: tuple[Bucket, ...]
    _sizes: tuple[int, ...] = field(init=False, repr=False, compare=False)  # ``lengths``, found once

    def __post_init__(self) -> None:
        ordered = tuple(sorted(self.buckets, key=lambda b: (prod(b.extent), b.extent, b.batch_size)))
        if not ordered:
            raise LadderError("buckets is empty; give at least one length, e.g. buckets=[64, 128]")
        doubled = [b.name for b, following in itertools.pairwise(ordered) if b == following]
        if doubled:
            raise LadderError(f"bucket {doubled[0]} is given more than once; give each bucket once")
        if len({len(b.extent) for b in ordered}) > 1:
            raise LadderError(f"buckets mix extents of different kinds: {', '.join(b.name for b in ordered)}")
        object.__setattr__(self, "buckets", ordered)
        object.__setattr__(self, "_sizes", tuple(dict.fromkeys(b.extent[0] for b in ordered)))

    def __iter__(self) -> Iterator[Bucket]:
        return iter(self.buckets)

    def __len__(self) -> int:
        return len(self.buckets)

    def __contains__(self, bucket: object) -> bool:
        return bucket in self.buckets

    def __str__(self) -> str:
        return "[" + ", ".join(b.name for b in self.buckets) + "]"

    @property
    def lengths(self) -> tuple[int, ...]:
        """Distinct lengths in tokens, ascending. Only for text, as ``Bucket.length``."""
        return self._sizes if self.max_length else ()

    @property
    def max_length(self) -> int:
        """Tokens the largest bucket holds."""
        return self.buckets[-1].length

    def choose(self, length: int) -> Bucket:
        """Return the smallest bucket that holds one row of ``length`` tokens.

        Raises:
            TooLongError: no bucket is that long.
        """
        for bucket in self.buckets:
            if bucket.length >= length:
                return bucket
        raise too_long(length, self.max_length, maximum=None)

    def smallest_batches(self) -> tuple[Bucket, ...]:
        """Return, of every length, the bucket with the smallest batch: what a request of one row runs in."""
        return tuple(self.of_length(length)[0] for length in self.lengths)

    def largest_batches(self) -> tuple[Bucket, ...]:
        """Return, of every length, the bucket with the largest batch: what many rows run in."""
        return tuple(self.of_length(length)[-1] for length in self.lengths)

    def of_length(self, length: int) -> tuple[Bucket, ...]:
        """Return the buckets of exactly ``length`` tokens, smallest batch first; empty when there is none."""
        return tuple(b for b in self.buckets if b.length == length)


def is_auto(buckets: object) -> bool:
    """Return whether ``buckets`` leaves the choice to a plan; arrays and lists, which compare item by item, do not."""
    return isinstance(buckets, str) and buckets == "auto"


def make_ladder(buckets: int | Sequence[object] | Ladder, *, batch_sizes: Sequence[int] | None = None) -> Ladder:
    """Build a text ladder from what users write.

    Args:
        buckets: one length, several lengths (``[64, 128]``), ``(batch_size, length)`` pairs, or a ladder.
        batch_sizes: combined with every length; None means ``DEFAULT_BATCH_SIZES``. Not allowed beside pairs or
            a ladder.

    Raises:
        LadderError: empty, zero, negative, fractional or doubled sizes, or lengths mixed with pairs.
    """
    if isinstance(buckets, Ladder):
        buckets = [(bucket.batch_size, bucket.length) for bucket in buckets]
    if hasattr(buckets, "tolist"):  # a numpy array or number
        buckets = buckets.tolist()
    if isinstance(buckets, (str, bytes)) or not (isinstance(buckets, Sequence) or hasattr(buckets, "__index__")):
        raise LadderError(
            f'buckets must be a length, a list of lengths, a list of (batch_size, length) pairs, "auto" or "pow2"; '
            f"got {buckets!r}"
        )
    entries = list(buckets) if isinstance(buckets, Sequence) else [buckets]
    pairs = [entry for entry in entries if isinstance(entry, (tuple, list))]
    if pairs and len(pairs) < len(entries):
        raise LadderError(f"buckets mixes lengths and (batch_size, length) pairs: {entries!r}; use one form")
    if pairs:
        if batch_sizes is not None:
            raise LadderError("buckets given as (batch_size, length) pairs carry their batch sizes; drop batch_sizes")
        wrong = [pair for pair in pairs if len(pair) != 2]
        if wrong:
            raise LadderError(f"a bucket pair is (batch_size, length), got {wrong[0]!r}")
        return Ladder(tuple(Bucket(batch_size=batch, extent=(length,)) for batch, length in pairs))
    return cross(entries, DEFAULT_BATCH_SIZES if batch_sizes is None else batch_sizes)


def cross(lengths: Sequence[object], batch_sizes: Sequence[object]) -> Ladder:
    """Return the ladder of every length with every batch size.

    Raises:
        LadderError: a list is empty, or a size is doubled or not a whole number of at least 1.
    """
    if isinstance(batch_sizes, (str, bytes)) or not isinstance(batch_sizes, Iterable):
        raise LadderError(f"batch_sizes must be a list such as [1, 8], got {batch_sizes!r}")
    sizes = [_size(batch, "a batch size") for batch in batch_sizes]
    if not sizes:
        raise LadderError("batch_sizes is empty; give at least one, e.g. batch_sizes=[1, 8]")
    tokens = [_size(length, "a bucket's length") for length in lengths]
    return Ladder(tuple(Bucket(batch_size=batch, extent=(length,)) for length in tokens for batch in sizes))
