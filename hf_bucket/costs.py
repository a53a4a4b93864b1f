"""What one run of every bucket costs on this machine: measured, kept in the cache, predicted where it was not."""

from __future__ import annotations

import contextlib
import hashlib
import math
import re
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from statistics import median

import numpy as np

from hf_bucket.assign import cells_cost
from hf_bucket.batch import Array
from hf_bucket.errors import InputError, LadderError
from hf_bucket.ladder import Bucket, Ladder
from hf_bucket.machine import read_figures, write_figures
from hf_bucket.session import Session
from hf_bucket.workers import Workers

Batches = Callable[[Bucket], Mapping[str, Array]]
Sessions = Mapping[Bucket, Session]
Clock = Callable[[], float]

ROUNDS = 9  # runs of one bucket at most: a median of more tells nothing new
TURNS = 60  # ... where systems are compared, whose differences are smaller than those of buckets
LENGTHS = 8  # of one batch size that are measured; those between are predicted
SHORTEST_S = 0.001  # what Python does around a run costs as much, and the clock's noise is larger than differences
_QUICK_S = 0.01  # what threads wait for each other in a longer run is little beside what they compute
_NAME = re.compile(r"b([0-9]{1,7})_s([0-9]{1,7})")


@dataclass(frozen=True, slots=True, kw_only=True)
class Costs:
    """Seconds of one run per bucket, on one thread of its own where batches run at once.

    Called with a bucket it returns its seconds: the measured ones, or for a bucket that was not measured those that
    ``a + b * cells + c * cells * length`` predicts, fitted to the others (attention is what grows with the square),
    times what buckets of the same batch size and of lengths around it took over what the fit says of them: no formula
    knows where the processor's caches end.

    Attributes:
        seconds: medians of what was measured.
        alone: the same of runs that have every core to themselves, of buckets that a request of one row runs in.
        at_once: whether several batches on one thread each were faster than one after another on every core.
        ladders: keys of the ladders whose buckets were measured as far as there was time: see ``key_of``.
    """

    seconds: Mapping[Bucket, float]
    alone: Mapping[Bucket, float] = field(default_factory=dict)
    at_once: bool = True
    ladders: frozenset[str] = frozenset()

    def __post_init__(self) -> None:
        if any(not 0 < value < float("inf") for value in (*self.seconds.values(), *self.alone.values())):
            raise InputError("costs must be positive numbers of seconds; measure again with hf-bucket tune")

    def __call__(self, bucket: Bucket) -> float:
        measured = self.seconds.get(bucket)
        return self.predict(bucket) if measured is None else measured

    def tell(self, ladder: Ladder) -> bool:
        """Return whether there are costs, and the runs of a ladder are long enough to tell one bucket from another."""
        return bool(self.seconds) and min(self(bucket) for bucket in ladder) >= SHORTEST_S

    @property
    def quick(self) -> frozenset[Bucket]:
        """Buckets whose run takes no longer on one thread than on every core: measured both ways, not predicted.

        More cores are worth more the more there is to do: where a smaller bucket gains from them, a larger one that did
        not was measured at a busy moment, and so was a run of more than a hundredth of a second.
        """
        both = {bucket: self.seconds[bucket] <= value for bucket, value in self.alone.items() if bucket in self.seconds}
        gains = min((bucket.cells for bucket, quick in both.items() if not quick), default=float("inf"))
        short = {bucket for bucket in both if self.seconds[bucket] <= _QUICK_S}
        return frozenset(bucket for bucket in short if both[bucket] and bucket.cells < gains)

    def of(self, ladder: Ladder) -> dict[Bucket, float]:
        """Return the cost of every bucket of a ladder, none less than that of a bucket it could stand in for."""
        costs: dict[Bucket, float] = {}
        for bucket in ladder:
            within = [one for one in costs if one.batch_size <= bucket.batch_size and one.length <= bucket.length]
            costs[bucket] = max([self(bucket), *(costs[one] for one in within)])
        return costs

    def predict(self, bucket: Bucket) -> float:
        """Return what is to be expected of a bucket; in cells, as ``assign.cells_cost``, if nothing was measured."""
        if not self.seconds:
            return cells_cost(bucket)
        lengths, ratios = _corrections(tuple(self.seconds.items()), bucket.batch_size)
        ratio = float(np.interp(math.log(bucket.length), lengths, ratios)) if lengths else 1.0
        return fitted(self.seconds, bucket) * ratio

    def to_json(self) -> dict[str, object]:
        """Return what ``from_json`` reads."""
        tables = {"seconds": self.seconds, "alone": self.alone}
        named = {key: {bucket.name: value for bucket, value in table.items()} for key, table in tables.items()}
        return {"at_once": self.at_once, "ladders": sorted(self.ladders), **named}

    @classmethod
    def from_json(cls, data: Mapping[str, object]) -> Costs:
        """Return the costs that ``to_json`` wrote; what cannot be read is left out, and is measured again."""
        tables = {key: _buckets(data.get(key)) for key in ("seconds", "alone")}
        keys = data.get("ladders")
        ladders = frozenset(map(str, keys)) if isinstance(keys, list) else frozenset()
        return cls(**tables, at_once=data.get("at_once") is not False, ladders=ladders)

    def joined(self, newer: Costs) -> Costs:
        """Return these costs with newer ones, which count where both have a bucket."""
        return Costs(
            seconds={**self.seconds, **newer.seconds},
            alone={**self.alone, **newer.alone},
            at_once=newer.at_once,
            ladders=self.ladders | newer.ladders,
        )


def key_of(ladder: Ladder) -> str:
    """Return what stands for a ladder where figures are kept."""
    return hashlib.sha256(str(ladder).encode()).hexdigest()[:16]


def _buckets(table: object) -> dict[Bucket, float]:
    """Return what can be read of a table of seconds by the names of buckets."""
    found: dict[Bucket, float] = {}
    for name, value in table.items() if isinstance(table, dict) else ():
        sizes = _NAME.fullmatch(name)
        if sizes and isinstance(value, float) and 0 < value < float("inf"):
            with contextlib.suppress(LadderError):
                found[Bucket(batch_size=int(sizes[1]), extent=(int(sizes[2]),))] = value
    return found


def fitted(figures: Mapping[Bucket, float], bucket: Bucket) -> float:
    """Return what ``a + b * cells + c * cells * length``, fitted to figures of other buckets, says of a bucket."""
    return float(np.dot(_fit(tuple(figures.items())), _terms(bucket)))


def _terms(bucket: Bucket) -> tuple[float, float, float]:
    return 1.0, float(bucket.cells), float(bucket.cells * bucket.length)


@lru_cache(maxsize=8)
def _fit(seconds: tuple[tuple[Bucket, float], ...]) -> tuple[float, ...]:
    """Return the factors of ``_terms`` that fit best, none negative, by relative error."""
    terms = np.array([_terms(bucket) for bucket, _ in seconds])
    times = np.array([value for _, value in seconds])
    for columns in ([0, 1, 2], [0, 1], [1, 2], [1]):
        factors, *_ = np.linalg.lstsq(terms[:, columns] / times[:, None], np.ones(len(times)), rcond=None)
        if len(times) >= len(columns) and (factors >= 0).all():
            break
    fitted = np.zeros(3)
    fitted[columns] = factors
    return tuple(float(factor) for factor in fitted)


@lru_cache(maxsize=64)
def _corrections(
    seconds: tuple[tuple[Bucket, float], ...], batch_size: int
) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Return logarithms of lengths, ascending, and what buckets of these took over what the fit says of them."""
    figures = dict(seconds)
    same = sorted((bucket for bucket in figures if bucket.batch_size == batch_size), key=lambda bucket: bucket.length)
    ratios = tuple(figures[bucket] / fitted(figures, bucket) for bucket in same)
    return tuple(math.log(bucket.length) for bucket in same), ratios


def spread(buckets: Iterable[Bucket]) -> list[Bucket]:
    """Return the buckets to measure, the smallest first: of every batch size some lengths in even steps of size.

    A ladder of many lengths would use up any budget on its short ones, and the long ones are what costs.
    """
    chosen: list[Bucket] = []
    sizes: dict[int, list[Bucket]] = {}
    for bucket in sorted(buckets, key=lambda bucket: bucket.length):
        sizes.setdefault(bucket.batch_size, []).append(bucket)
    for same in sizes.values():
        steps = np.geomspace(same[0].length, same[-1].length, min(LENGTHS, len(same)))
        nearest = [min(same, key=lambda bucket: abs(math.log(bucket.length / step))) for step in steps]
        chosen += same if len(same) <= LENGTHS else dict.fromkeys(nearest)
    return sorted(chosen, key=lambda bucket: bucket.cells)


def measure(
    sessions: Sessions, batches: Batches, *, budget_s: float, clock: Clock = time.perf_counter
) -> dict[Bucket, float]:
    """Return the median seconds of a run of every bucket that the budget allows for, measured in turns.

    Smaller buckets come first; one whose run would go over the budget is left out, but the smallest never. The first
    run of a bucket prepares its memory and counts only where there is no other.

    Args:
        batches: makes what a bucket runs on.
        budget_s: seconds to spend, about.
    """
    end = clock() + budget_s
    runs: dict[Bucket, list[float]] = {bucket: [] for bucket in sorted(sessions, key=lambda bucket: bucket.cells)}
    for _ in range(ROUNDS + 1):
        for bucket, times in runs.items():
            start = clock()
            expected = times[-1] if times else 0.0
            if start + expected > end and any(runs.values()):
                continue
            arrays = batches(bucket)
            start = clock()
            sessions[bucket].run(arrays)
            times.append(clock() - start)
    return {bucket: median(times[1:] or times) for bucket, times in runs.items() if times}


def compare(
    systems: Mapping[str, Sessions],
    batches: Batches,
    *,
    budget_s: float,
    least: int = 1,
    clock: Clock = time.perf_counter,
) -> dict[str, dict[Bucket, float]]:
    """Return the median seconds of a run of every bucket by several systems, which take turns over each batch.

    Buckets as many as the budget allows for are compared, smallest first, and at least one; each by every system.

    Args:
        systems: sessions of the same buckets, by name.
        budget_s: seconds to spend, about.
        least: runs of a bucket by each system that count, whatever they take.
    """
    end = clock() + budget_s
    found: dict[str, dict[Bucket, float]] = {name: {} for name in systems}
    buckets = sorted(set.intersection(*(set(sessions) for sessions in systems.values())), key=lambda one: one.cells)
    for place, bucket in enumerate(buckets):
        share = (end - clock()) / (len(buckets) - place)
        if place and share <= 0:
            break
        arrays, until = batches(bucket), clock() + share
        times: dict[str, list[float]] = {name: [] for name in systems}
        for number in range(TURNS + 1):
            for name, sessions in list(systems.items())[:: -1 if number % 2 else 1]:
                start = clock()
                sessions[bucket].run(arrays)
                times[name].append(clock() - start)
            if number >= least and clock() >= until:
                break
        for name, seconds in times.items():
            found[name][bucket] = median(seconds[1:])
    return found


def faster_at_once(
    one: Sessions,
    many: Sessions,
    workers: Workers,
    batches: Batches,
    seconds: Mapping[Bucket, float],
    clock: Clock,
    *,
    budget_s: float,
) -> bool:
    """Return whether several batches should run at once: unless one after another was faster by a clear margin.

    It is not tried, and they should, where every bucket takes too long for the budget.

    Each way is tried some times on end, not in turns: engine threads keep a core busy for a while after a run, which
    would slow down what comes next in the other way.

    Args:
        one: sessions that use every core for one batch.
        many: sessions that use one thread each.
        seconds: of ``many``; the largest bucket is tried that the budget allows two runs of in either way.
        budget_s: seconds to spend, about.
    """
    quick = [bucket for bucket, value in seconds.items() if 4 * value <= budget_s]
    if not quick:
        return True
    bucket = max(quick, key=lambda bucket: bucket.cells)
    feeds = [batches(bucket)] * workers.n
    at_once = _seconds(lambda: workers.map(many[bucket].run, feeds), clock, budget_s / 2)
    after_another = _seconds(lambda: [one[bucket].run(feed) for feed in feeds], clock, budget_s / 2)
    return at_once <= after_another * _MARGIN


_MARGIN = 1.1


def _seconds(call: Callable[[], object], clock: Clock, budget_s: float) -> float:
    """Return the median seconds of up to three calls; one before them prepares what they use."""
    times: list[float] = []
    begin = clock()
    while len(times) < 2 or (len(times) < 4 and clock() - begin < budget_s):
        start = clock()
        call()
        times.append(clock() - start)
    return median(times[1:])


def read_costs(path: Path) -> Costs:
    """Return the costs kept in a file; none where there is no such file, or it is damaged."""
    return Costs.from_json(read_figures(path))


def write_costs(path: Path, costs: Costs) -> None:
    """Keep costs in a file of the machine's cache, with those of other buckets that it has already."""
    write_figures(path, read_costs(path).joined(costs).to_json())
