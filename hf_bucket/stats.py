"""What a runner has run: counted batch by batch, reported as ``stats()``."""

from __future__ import annotations

import os
import threading
import weakref
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from hf_bucket.batch import Features, PaddedBatch
from hf_bucket.ladder import Bucket, Ladder


@dataclass(slots=True)
class _Tally:
    """What one shape has run; ``windows`` are rows that show a part of a longer text."""

    batches: int = 0
    rows: int = 0
    tokens: int = 0
    cells: int = 0
    truncated: int = 0
    windows: int = 0

    def report(self) -> dict[str, Any]:
        return {
            "batches": self.batches,
            "rows": self.rows,
            **_shares(self.tokens, self.cells),
            "truncated": self.truncated,
            "windows": self.windows,
        }


class Counts:
    """Counts for ``stats()``; many threads may add to one, and a forked child goes on with its own."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._tallies: dict[Bucket, _Tally] = defaultdict(_Tally)
        self._refused = 0
        self._warned = False
        _alive.add(self)

    def add(self, batches: Sequence[PaddedBatch], features: Features) -> None:
        """Count the batches that one request was run in."""
        cut = set(features.truncated)
        several: list[bool] = []
        if features.owners is not None:
            parts = Counter(features.owners)
            several = [parts[owner] > 1 for owner in features.owners]
        with self._lock:
            for batch in batches:
                tally = self._tallies[batch.bucket]
                tally.batches += 1
                tally.rows += len(batch.rows)
                tally.tokens += sum(batch.lengths)
                tally.cells += batch.bucket.cells
                tally.truncated += sum(row in cut for row in batch.rows)
                tally.windows += sum(several[row] for row in batch.rows) if several else 0

    def refuse(self) -> None:
        """Count a call that was refused for the length of an input."""
        with self._lock:
            self._refused += 1

    def first_truncation(self) -> bool:
        """Return True once, for the first caller."""
        with self._lock:
            first, self._warned = not self._warned, True
            return first

    def report(self, ladder: Ladder) -> dict[str, Any]:
        """Return what ``Runner.stats`` describes."""
        with self._lock:
            inside = [self._tallies.get(bucket, _Tally()) for bucket in ladder]
            outside = [tally for bucket, tally in self._tallies.items() if bucket not in ladder.buckets]
            dynamic = _sum(outside).report()
            totals = _sum([*inside, *outside]).report()
            del totals["batches"], dynamic["truncated"], dynamic["windows"]
            buckets = {bucket.name: tally.report() for bucket, tally in zip(ladder, inside, strict=True)}
            return {**totals, "refused": self._refused, "dynamic": dynamic, "buckets": buckets}


_alive: weakref.WeakSet[Counts] = weakref.WeakSet()


def _leave_parent() -> None:
    """In a forked child, take new locks: a thread that stayed behind in the parent may hold the others for ever."""
    for counts in _alive:
        counts._lock = threading.Lock()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_leave_parent)


def _sum(tallies: Sequence[_Tally]) -> _Tally:
    return _Tally(*(sum(getattr(tally, name) for tally in tallies) for name in _Tally.__slots__))


def _shares(real: int, cells: int) -> dict[str, float]:
    return {"real_tokens": real, "padded_tokens": cells - real, "waste": (cells - real) / cells if cells else 0.0}
