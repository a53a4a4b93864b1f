"""Before sessions are opened: whether they fit the memory, and which mode is faster here where that is left open."""

from __future__ import annotations

import hashlib
import math
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import mean, median

from hf_bucket import memory
from hf_bucket.artifact import Artifact
from hf_bucket.costs import ROUNDS, Batches, Clock, Sessions
from hf_bucket.encode import Encoder
from hf_bucket.errors import InputError
from hf_bucket.ladder import Bucket, Ladder
from hf_bucket.machine import available_bytes, machine_folder, read_figures, write_figures
from hf_bucket.memory import FASTER, Footprint, check_fits, footprint, sets_of
from hf_bucket.probes import sample
from hf_bucket.session_ort import Engine, EngineOptions, Mode, open_sessions, resolve_provider

_TRIED = 3  # buckets: the smallest, the largest and the one between
_WAYS = ("shared", "static")

Seconds = Mapping[str, tuple[float, float]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Choice:
    """Which mode was chosen by ``mode="auto"``, and why.

    Attributes:
        seconds: of one run in shared and in static mode, by the name of the bucket; empty where nothing was measured.
        static_bytes: what static mode takes.
        available: memory there was for it; None where nobody knows.
    """

    seconds: Seconds
    static_bytes: int
    available: int | None

    @property
    def fits(self) -> bool:
        """Whether there is memory enough for static mode."""
        return self.available is None or self.static_bytes <= self.available

    @property
    def ratio(self) -> float:
        """Time of static over that of shared, the mean over buckets; 1 where nothing was measured."""
        return mean(static / shared for shared, static in self.seconds.values()) if self.seconds else 1.0

    @property
    def mode(self) -> Mode:
        """``"static"`` where it fits and is faster by a clear margin, else ``"shared"``."""
        return "static" if self.fits and self.ratio <= FASTER else "shared"

    def to_json(self) -> dict[str, object]:
        """Return the choice and its figures."""
        seconds = {name: dict(zip(_WAYS, pair, strict=True)) for name, pair in self.seconds.items()}
        memory = {"static_bytes": self.static_bytes, "available_bytes": self.available}
        return {"mode": self.mode, "ratio": self.ratio, **memory, "seconds": seconds}


def check_memory_bytes(value: object) -> None:
    """Raise an InputError for a limit that is none."""
    if value is not None and (not isinstance(value, int) or isinstance(value, bool) or value < 1):
        raise InputError(f"memory_bytes must be a number of bytes of at least 1, or None for all; got {value!r}")


def takes(artifact: Artifact, options: EngineOptions) -> Footprint:
    """Return what running an artifact with these options takes."""
    many = options.for_many_batches()
    sets = 1 if many.threads == options.threads else sets_of(many.workers)
    mode: memory.Mode = "static" if options.mode == "static" else "shared"
    return footprint(artifact.manifest, mode=mode, at_once=many.workers, sets=sets)


def settle(
    artifact: Artifact,
    options: EngineOptions,
    *,
    engine: Engine,
    batches: Batches,
    memory_bytes: int | None,
    budget_s: float,
) -> EngineOptions:
    """Return the options with a mode that is not ``"auto"``, once it is known that sessions made with them fit.

    Args:
        engine: makes the sessions that are compared.
        batches: makes what a bucket runs on.
        memory_bytes: that may be taken; None is what the machine has.
        budget_s: seconds to spend on comparing, where this machine has not done so for this ladder yet.

    Raises:
        LadderError: the sessions do not fit.
    """
    available = available_bytes() if memory_bytes is None else memory_bytes
    shared = replace(options, mode="shared") if options.mode == "auto" else options
    check_fits(takes(artifact, shared), available)
    if options.mode != "auto":
        return options
    choice = choose(artifact, options, budget_s=budget_s, engine=engine, batches=batches, memory_bytes=memory_bytes)
    return replace(options, mode=choice.mode)


def choose(
    artifact: Artifact,
    options: EngineOptions,
    *,
    budget_s: float,
    engine: Engine = open_sessions,
    batches: Batches | None = None,
    memory_bytes: int | None = None,
    again: bool = False,
    clock: Clock = time.perf_counter,
) -> Choice:
    """Return which mode is faster here and fits; what was measured stays in this machine's cache.

    Args:
        budget_s: seconds to spend, about; 0 measures nothing.
        engine: makes the sessions that are compared.
        batches: makes what a bucket runs on; None is a row that looks like a text.
        memory_bytes: that may be taken; None is what the machine has.
        again: measure even though the cache has figures for this ladder.
    """
    available = available_bytes() if memory_bytes is None else memory_bytes
    static = takes(artifact, replace(options, mode="static")).total
    choice = Choice(seconds={}, static_bytes=static, available=available)
    path = _figures(artifact, options)
    kept = {} if again else _read(path)
    if kept or not choice.fits:
        return replace(choice, seconds=kept)
    if budget_s:
        made = batches or _texts(artifact)
        choice = replace(choice, seconds=_compare(artifact, options, engine, made, budget_s=budget_s, clock=clock))
        write_figures(path, choice.to_json())
    return choice


def _texts(artifact: Artifact) -> Batches:
    manifest = artifact.manifest
    encoder = Encoder(artifact.tokenizer_json(), inputs=manifest.signature.input_names)
    return lambda bucket: sample(encoder, bucket, manifest.signature, manifest.vocab_size)


def _figures(artifact: Artifact, options: EngineOptions) -> Path:
    many = options.for_many_batches()
    ladder = hashlib.sha256(str(artifact.manifest.ladder).encode()).hexdigest()[:16]
    name = f"{resolve_provider(options.provider)}-modes-{many.threads}x{many.workers}-{ladder}.json"
    return machine_folder(artifact.graph_sha256()) / name


def _read(path: Path) -> Seconds:
    """Return the seconds kept in a file; none where they are damaged, and are measured again."""
    seconds = read_figures(path).get("seconds")
    found: dict[str, tuple[float, float]] = {}
    for name, pair in seconds.items() if isinstance(seconds, dict) else ():
        shared, static = (pair.get(way) if isinstance(pair, dict) else None for way in _WAYS)
        if not isinstance(shared, float) or not isinstance(static, float) or not 0 < min(shared, static) < math.inf:
            return {}
        found[name] = (shared, static)
    return found


def _compare(
    artifact: Artifact, options: EngineOptions, engine: Engine, batches: Batches, *, budget_s: float, clock: Clock
) -> Seconds:
    """Open a few buckets in both modes, time them in turns, and close them again."""
    by_size = sorted(artifact.manifest.ladder, key=lambda bucket: bucket.cells)
    few = {by_size[round(step * (len(by_size) - 1) / (_TRIED - 1))] for step in range(_TRIED)}
    part = replace(artifact, manifest=replace(artifact.manifest, ladder=Ladder(tuple(few))))
    many = options.for_many_batches()
    shared, static = (engine(part, replace(many, mode=mode)) for mode in ("shared", "static"))
    try:
        return compare(shared, static, batches, budget_s=budget_s, clock=clock)
    finally:
        for session in [*shared.values(), *static.values()]:
            session.close()


def compare(shared: Sessions, static: Sessions, batches: Batches, *, budget_s: float, clock: Clock) -> Seconds:
    """Return the median seconds of a run in shared and in static mode, of every bucket that the budget allows for.

    The two ways take turns at going first. Smaller buckets come first; one whose runs would go over the budget is left
    out, but the smallest never. First runs prepare memory and count only where there are no others.
    """
    end = clock() + budget_s
    runs: dict[Bucket, list[tuple[float, float]]] = {bucket: [] for bucket in sorted(shared, key=lambda one: one.cells)}
    for turn in range(ROUNDS + 1):
        for bucket, times in runs.items():
            if clock() + (sum(times[-1]) if times else 0.0) > end and any(runs.values()):
                continue
            feed, pair = batches(bucket), {}
            for way, sessions in [("shared", shared), ("static", static)][:: -1 if turn % 2 else 1]:
                start = clock()
                sessions[bucket].run(feed)
                pair[way] = clock() - start
            times.append((pair["shared"], pair["static"]))
    counted = {bucket.name: times[1:] or times for bucket, times in runs.items() if times}
    return {name: (median(one for one, _ in times), median(two for _, two in times)) for name, times in counted.items()}
