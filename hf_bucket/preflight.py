"""Before sessions are opened: whether they fit the memory, and the faster of providers and modes where that is open."""

from __future__ import annotations

import contextlib
import hashlib
import math
import time
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import mean

from hf_bucket import memory
from hf_bucket.artifact import Artifact
from hf_bucket.batch import Array
from hf_bucket.costs import Batches, Clock, Sessions, compare
from hf_bucket.encode import Encoder
from hf_bucket.errors import ArtifactError, BucketWarning, InputError, ProviderError
from hf_bucket.ladder import Bucket, Ladder
from hf_bucket.machine import available_bytes, machine_folder, read_figures, write_figures
from hf_bucket.memory import FASTER, Footprint, check_fits, footprint, sets_of
from hf_bucket.probes import sampler
from hf_bucket.session import Session
from hf_bucket.session_ort import (
    CPU,
    OPENVINO,
    Engine,
    EngineOptions,
    Mode,
    auto_providers,
    open_sessions,
    resolve_provider,
)
from hf_bucket.workers import Workers

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
    each = len(artifact.manifest.ladder) if mode == "static" else 1
    copies = 0 if resolve_provider(options.provider) == CPU else sets * each
    return footprint(artifact.manifest, mode=mode, at_once=many.workers, sets=sets, copies=copies)


def settle(
    artifact: Artifact,
    options: EngineOptions,
    *,
    engine: Engine,
    batches: Batches,
    memory_bytes: int | None,
    budget_s: float,
) -> EngineOptions:
    """Return the options with a provider and a mode that are not ``"auto"``, once it is known that sessions fit.

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
    provider = choose_provider(artifact, shared, budget_s=budget_s, engine=engine, batches=batches, available=available)
    options = replace(options, provider=provider)
    if options.mode != "auto":
        return options
    choice = choose(artifact, options, budget_s=budget_s, engine=engine, batches=batches, memory_bytes=memory_bytes)
    return replace(options, mode=choice.mode)


def after_fork(asked: EngineOptions, settled: EngineOptions) -> EngineOptions:
    """Return what a forked child runs on: the CPU provider if ``"auto"`` chose OpenVINO: its threads stayed behind."""
    if asked.provider != "auto" or settled.provider != OPENVINO:
        return settled
    warnings.warn(
        "in this forked process the model runs on onnxruntime's CPU provider, since OpenVINO's threads do not survive "
        'a fork; start processes with "spawn" to keep it',
        BucketWarning,
        stacklevel=4,
    )
    return replace(settled, provider=CPU)


def choose_provider(
    artifact: Artifact,
    options: EngineOptions,
    *,
    budget_s: float,
    engine: Engine = open_sessions,
    batches: Batches | None = None,
    available: int | None = None,
    again: bool = False,
    clock: Clock = time.perf_counter,
) -> str:
    """Return what ``provider="auto"`` means here: the CPU provider, unless another fits and is faster.

    Faster is one that is clearly so for as many batches at once as would run in use, since what engines take from each
    other counts, and no slower for a request of one row. The figures stay in this machine's cache. Runs too short to
    tell anything apart are the CPU provider's.

    Args:
        budget_s: seconds to spend, about; 0 measures nothing.
        available: memory there is; None is plenty.
        again: measure even though the cache has figures for this ladder.
    """
    if options.provider != "auto":
        return options.provider
    fitting = [
        name
        for name in auto_providers()
        if available is None or takes(artifact, replace(options, provider=name)).total <= available
    ]
    path = _figures(artifact, options, f"providers-{options.mode}")
    kept = {} if again else _ratios(path)
    missing = [name for name in fitting if name not in kept]
    if missing and budget_s and (again or read_figures(path).get("short") is not True):
        made = batches or _texts(artifact)
        found = _compare_providers(artifact, options, missing, engine, made, budget_s=budget_s, clock=clock)
        kept |= found or {}
        figures = {name: asdict(ratios) for name, ratios in kept.items()}
        write_figures(path, {"short": True} if found is None else figures)
    faster = [name for name in fitting if name in kept and kept[name].faster]
    return min(faster, key=lambda name: kept[name].many, default=CPU)


@dataclass(frozen=True, slots=True, kw_only=True)
class Ratios:
    """The time that a provider takes over the CPU provider's, for a run of some buckets one after another.

    Attributes:
        many: as many batches at once as in use.
        one: one batch with every core to itself, as a request of one row has it.
    """

    many: float
    one: float

    @property
    def faster(self) -> bool:
        """Whether the provider is to be preferred."""
        return self.many <= FASTER and self.one <= _NO_SLOWER


_NO_SLOWER = 1.02  # more than that is no noise
_WORTH_S = 0.005  # a run of fewer seconds is not worth another engine's memory, threads and start


def provider_ratios(artifact: Artifact, options: EngineOptions) -> dict[str, Ratios]:
    """Return what ``choose_provider`` measured of every provider but the CPU's; empty where it did not."""
    return _ratios(_figures(artifact, replace(options, provider="auto"), f"providers-{options.mode}"))


def _ratios(path: Path) -> dict[str, Ratios]:
    """Return the ratios kept in a file; those that cannot be are left out."""
    found = {}
    for name, figures in read_figures(path).items():
        many, one = (figures.get(use) if isinstance(figures, dict) else None for use in ("many", "one"))
        if isinstance(many, float) and isinstance(one, float) and 0 < min(many, one) < math.inf:
            found[name] = Ratios(many=many, one=one)
    return found


def _compare_providers(
    artifact: Artifact,
    options: EngineOptions,
    names: Sequence[str],
    engine: Engine,
    batches: Batches,
    *,
    budget_s: float,
    clock: Clock,
) -> dict[str, Ratios] | None:
    """Return the ratios of every provider that can run the model; None where the runs are too short to be worth it."""
    with contextlib.ExitStack() as stack:
        workers = stack.enter_context(contextlib.closing(Workers(options.for_many_batches().workers)))
        ways = _Ways(_usual(artifact), replace(options, provider=CPU), engine, workers)
        own = stack.enter_context(contextlib.closing(ways))
        largest = max(own.many, key=lambda bucket: bucket.cells)
        if compare({CPU: {largest: own.many[largest]}}, batches, budget_s=0.0, clock=clock)[CPU][largest] < _WORTH_S:
            return None
        ratios = {}
        for name in names:
            try:
                other = _Ways(_usual(artifact), replace(options, provider=name), engine, workers)
            except (ArtifactError, ProviderError) as error:
                warnings.warn(f'provider="auto" leaves out {name}: {error}', BucketWarning, stacklevel=6)
                continue
            stack.enter_context(contextlib.closing(other))
            many, one = (
                _ratio(mine, theirs, batches, budget_s=budget_s / (2 * len(names)), clock=clock)
                for mine, theirs in ((own.many, other.many), (own.one, other.one))
            )
            ratios[name] = Ratios(many=many, one=one)
        return ratios


def _ratio(own: Sessions, other: Sessions, batches: Batches, *, budget_s: float, clock: Clock) -> float:
    """Return the other's time over one's own, for a run of every bucket one after another: engines that prepare for a
    shape when it changes have to do so here as in use.
    """
    feeds = {bucket: batches(bucket) for bucket in own}
    first = next(iter(own))
    systems = {"own": {first: _OneOfEach(own, feeds)}, "other": {first: _OneOfEach(other, feeds)}}
    found = compare(systems, lambda bucket: {}, budget_s=budget_s, clock=clock)
    return found["other"][first] / found["own"][first]


@dataclass(frozen=True, slots=True)
class _OneOfEach:
    """A session whose run is one of every bucket's."""

    sessions: Sessions
    feeds: Mapping[Bucket, Mapping[str, Array]]

    @property
    def bucket(self) -> Bucket:
        return next(iter(self.sessions))

    def run(self, arrays: Mapping[str, Array]) -> dict[str, Array]:
        return [session.run(self.feeds[bucket]) for bucket, session in self.sessions.items()][-1]

    def close(self) -> None:
        """Nothing to do: the sessions are closed by who opened them."""


def _usual(artifact: Artifact) -> Artifact:
    """Return the artifact with buckets that rows of usual lengths take: of a planned ladder the middle half."""
    lengths = artifact.manifest.ladder.lengths
    chosen = {lengths[min(len(lengths) - 1, len(lengths) * eighth // 8)] for eighth in range(2, 7)}
    buckets = tuple(bucket for bucket in artifact.manifest.ladder if bucket.length in chosen)
    return replace(artifact, manifest=replace(artifact.manifest, ladder=Ladder(buckets)))


class _Ways:
    """Sessions of a provider as many batches at once use them, and as a request of one row does."""

    def __init__(self, artifact: Artifact, options: EngineOptions, engine: Engine, workers: Workers) -> None:
        ladder = artifact.manifest.ladder
        many = engine(artifact, options.for_many_batches())
        alone = many if workers.n == 1 else engine(artifact, options)
        self._made = {id(one): one for one in (*many.values(), *alone.values())}
        self.many = {bucket: _AtOnce(many[bucket], workers) for bucket in ladder.largest_batches()}
        self.one = {bucket: alone[bucket] for bucket in ladder.smallest_batches()}

    def close(self) -> None:
        for session in self._made.values():
            session.close()


@dataclass(frozen=True, slots=True)
class _AtOnce:
    """A session that runs as many copies of a batch at once as there are workers."""

    session: Session
    workers: Workers

    @property
    def bucket(self) -> Bucket:
        return self.session.bucket

    def run(self, arrays: Mapping[str, Array]) -> dict[str, Array]:
        return self.workers.map(self.session.run, [arrays] * self.workers.n)[0]

    def close(self) -> None:
        self.session.close()


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
    path = _figures(artifact, options, f"{resolve_provider(options.provider)}-modes")
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
    return sampler(encoder, manifest.signature, manifest.vocab_size)


def _figures(artifact: Artifact, options: EngineOptions, what: str) -> Path:
    many = options.for_many_batches()
    ladder = hashlib.sha256(str(artifact.manifest.ladder).encode()).hexdigest()[:16]
    name = f"{what}-{many.threads}x{many.workers}-{ladder}.json"
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


def _few(artifact: Artifact) -> Artifact:
    """Return the artifact with a few of its buckets: the smallest, the largest and one between."""
    by_size = sorted(artifact.manifest.ladder, key=lambda bucket: bucket.cells)
    few = {by_size[round(step * (len(by_size) - 1) / (_TRIED - 1))] for step in range(_TRIED)}
    return replace(artifact, manifest=replace(artifact.manifest, ladder=Ladder(tuple(few))))


def _compare(
    artifact: Artifact, options: EngineOptions, engine: Engine, batches: Batches, *, budget_s: float, clock: Clock
) -> Seconds:
    """Open a few buckets in both modes, time them in turns, and close them again."""
    part, many = _few(artifact), options.for_many_batches()
    shared, static = (engine(part, replace(many, mode=mode)) for mode in ("shared", "static"))
    try:
        found = compare({"shared": shared, "static": static}, batches, budget_s=budget_s, clock=clock)
        return {bucket.name: (seconds, found["static"][bucket]) for bucket, seconds in found["shared"].items()}
    finally:
        for session in [*shared.values(), *static.values()]:
            session.close()
