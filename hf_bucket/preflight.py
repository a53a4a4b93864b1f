"""Before sessions are opened: whether they fit the memory, and the faster of providers and modes where that is open."""

from __future__ import annotations

import contextlib
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
from hf_bucket.costs import Batches, Clock, Sessions, compare, key_of
from hf_bucket.encode import Encoder
from hf_bucket.errors import ArtifactError, BucketWarning, InputError, ProviderError
from hf_bucket.ladder import Bucket, Ladder
from hf_bucket.machine import available_bytes, machine_folder, measured_once, read_figures, write_figures
from hf_bucket.memory import FASTER, Footprint, check_fits, footprint
from hf_bucket.probes import sampler
from hf_bucket.session import Session
from hf_bucket.session_ort import (
    CPU,
    CUDA,
    OPENVINO,
    Engine,
    EngineOptions,
    Mode,
    auto_providers,
    in_use,
    named,
    open_sessions,
    resolve_provider,
    versioned,
)
from hf_bucket.workers import Workers

_TRIED = 3  # buckets: the smallest, the largest and the one between
_WAYS: tuple[memory.Mode, ...] = ("shared", "static")

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
    providers = [resolve_provider(use.provider) for use in ([options] if many.workers == 1 else [options, many])]
    # on CUDA all buckets run one session in static mode too
    mode: memory.Mode = "static" if options.mode == "static" and CUDA not in providers else "shared"
    each = len(artifact.manifest.ladder) if mode == "static" else 1
    copies, sets = each * sum(provider != CPU for provider in providers), len(providers)
    return footprint(artifact.manifest, mode=mode, at_once=many.workers, sets=sets, copies=copies)


@dataclass(frozen=True, slots=True, kw_only=True)
class Trial:
    """How ways of running a ladder are compared.

    Attributes:
        budget_s: seconds to spend, about, where this machine has not compared them yet; 0 measures nothing.
        available: bytes of memory there are; None is plenty.
        engine: makes the sessions.
        batches: makes what a bucket runs on; None is a row that looks like a text.
        again: compare even though the cache has figures for this ladder.
    """

    budget_s: float
    available: int | None
    engine: Engine = open_sessions
    batches: Batches | None = None
    again: bool = False
    clock: Clock = time.perf_counter


def room(memory_bytes: int | None) -> int | None:
    """Return the bytes of memory that may be taken: those given, or what the machine has; None where nobody knows."""
    return available_bytes() if memory_bytes is None else memory_bytes


def settle(artifact: Artifact, options: EngineOptions, trial: Trial) -> EngineOptions:
    """Return the options with a provider and a mode that are not ``"auto"``, once it is known that sessions fit.

    Where only static mode fits, ``mode="auto"`` is that.

    Raises:
        LadderError: the sessions do not fit.
    """
    if options.mode == "auto" and trial.available is not None:
        fits = {mode: takes(artifact, replace(options, mode=mode)).total <= trial.available for mode in _WAYS}
        if fits == {"shared": False, "static": True}:
            options = replace(options, mode="static")
    open_questions = (options.provider == "auto") + (options.mode == "auto")
    trial = replace(trial, budget_s=trial.budget_s / max(1, open_questions))
    check_fits(takes(artifact, options), trial.available)
    options = choose_provider(artifact, options, trial)
    return options if options.mode != "auto" else replace(options, mode=choose_mode(artifact, options, trial).mode)


def after_fork(asked: EngineOptions, settled: EngineOptions) -> EngineOptions:
    """Return what a forked child runs on: the CPU provider if ``"auto"`` chose OpenVINO: its threads stayed behind."""
    if asked.provider != "auto" or OPENVINO not in (settled.provider, settled.provider_of_many):
        return settled
    warnings.warn(
        "in this forked process the model runs on onnxruntime's CPU provider, since OpenVINO's threads do not survive "
        'a fork; start processes with "spawn" to keep it',
        BucketWarning,
        stacklevel=4,
    )
    return replace(settled, provider=CPU, provider_of_many=None)


def choose_provider(artifact: Artifact, options: EngineOptions, trial: Trial) -> EngineOptions:
    """Return the options with what ``provider="auto"`` means here: the CPU provider, unless another fits and is faster.

    It is measured for as many batches at once as would run in use, since what engines take from each other counts, and
    for a request of one row; figures stay in the machine's cache. The CPU provider's are runs too short to tell
    anything apart, and static mode, where others hold the weights once for every bucket.
    """
    if options.provider != "auto":
        return options
    on_cpu = replace(options, provider=CPU)
    names = [] if options.mode == "static" else auto_providers()
    # measuring opens the sessions of both uses, whichever are chosen
    fitting = [
        name
        for name in names
        if trial.available is None or takes(artifact, replace(options, provider=name)).total <= trial.available
    ]
    if not fitting:
        return on_cpu
    path = _figures(artifact, options, "ratios")

    def read() -> dict[str, Ratios] | None:
        return _kept_ratios(path, fitting)

    def measured() -> dict[str, Ratios]:
        compared = _compare_providers(artifact, options, fitting, trial)
        others = {name: asdict(ratios) for name, ratios in _ratios(path).items()}
        new = {versioned(name): ratios and asdict(ratios) for name, ratios in (compared or {}).items()}
        write_figures(path, {"short": True} if compared is None else {**others, **new})
        return {name: ratios for name, ratios in (compared or {}).items() if ratios is not None}

    kept = measured_once(path, read, measured, again=trial.again) if trial.budget_s else read() or {}
    part = _may_part(artifact, options)
    ways = [_best_use(options, name, ratios, part=part) for name, ratios in kept.items()]
    return min(ways, key=lambda way: _time(way, kept), default=on_cpu)


def _may_part(artifact: Artifact, options: EngineOptions) -> bool:
    """Return whether a request of many batches may run on another provider than one of a few.

    Not where both run in one session, nor where the mode is still to be chosen, which both uses have in common; nor in
    less than float32, where two engines can round one text to two answers, as nobody knows of a graph made elsewhere.
    """
    at_once = replace(options, provider=CPU).for_many_batches().workers > 1
    source = artifact.manifest.source
    float32 = source.get("dtype", "float32") == "float32" and source.get("made_by") != "onnx"
    return at_once and options.mode != "auto" and float32


def _best_use(options: EngineOptions, name: str, ratios: Ratios, *, part: bool) -> EngineOptions:
    """Return the options with what a provider is better at than the CPU's: both uses, one of them, or none."""
    both, on_cpu = replace(options, provider=name), replace(options, provider=CPU)
    at_once = both.for_many_batches().workers > 1
    if ratios.for_both and not (part and at_once):
        return both
    if not part:
        return on_cpu
    many = name if at_once and ratios.many <= _WORTH else CPU
    one = name if ratios.one <= _WORTH and ratios.many <= _BOUND else CPU
    return replace(options, provider=one, provider_of_many=None if one == many else many)


def _time(way: EngineOptions, kept: Mapping[str, Ratios]) -> float:
    """Return the time of a way over that of the CPU provider, of both uses together."""
    one, many = kept.get(way.provider), kept.get(way.for_many_batches().provider)
    return (one.one if one else 1.0) * (many.many if many else 1.0)


def _kept_ratios(path: Path, names: Sequence[str]) -> dict[str, Ratios] | None:
    """Return the ratios of providers that are kept in a file, of those that can run the model; None where some lack.

    None of them where runs are too short.
    """
    found, known = read_figures(path), _ratios(path)
    if found.get("short") is True:
        return {}
    if any(versioned(name) not in known and found.get(versioned(name), "") is not None for name in names):
        return None
    return {name: known[versioned(name)] for name in names if versioned(name) in known}


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
    def for_both(self) -> bool:
        """Whether the provider is clearly faster in one use, and no slower in the other."""
        return min(self.many, self.one) <= _WORTH and max(self.many, self.one) <= _NO_SLOWER


# Of the CPU provider's time. For less than a twentieth another engine's memory and start are not worth it; so much is
# seen on a few buckets too, as on whole data sets: docs/benchmarks.md, "Which provider".
_WORTH = 0.95
_NO_SLOWER = 1.02  # more than that is no noise
_BOUND = 1.1  # for many, of a provider for requests of a few batches, which can be as large as those of many
_LEAST = 5  # runs of each; what is chosen is kept, and fewer are at the mercy of a busy moment
_WORTH_S = 0.005  # a run of fewer seconds is not worth another engine's memory, threads and start


def provider_ratios(artifact: Artifact, options: EngineOptions) -> dict[str, Ratios]:
    """Return what ``choose_provider`` measured of the providers that are installed; empty where it did not."""
    if options.mode == "static":
        return {}
    known = _ratios(_figures(artifact, replace(options, provider="auto"), "ratios"))
    return {name: known[versioned(name)] for name in auto_providers() if versioned(name) in known}


def _ratios(path: Path) -> dict[str, Ratios]:
    """Return the ratios kept in a file; those that cannot be are left out."""
    found = {}
    for name, figures in read_figures(path).items():
        many, one = (figures.get(use) if isinstance(figures, dict) else None for use in ("many", "one"))
        if isinstance(many, float) and isinstance(one, float) and 0 < min(many, one) < math.inf:
            found[name] = Ratios(many=many, one=one)
    return found


def _compare_providers(
    artifact: Artifact, options: EngineOptions, names: Sequence[str], trial: Trial
) -> dict[str, Ratios | None] | None:
    """Return the ratios of every provider, None for one that cannot run the model; None where all is too short."""
    part, batches = _usual(artifact), trial.batches or _texts(artifact)
    each = replace(trial, budget_s=trial.budget_s / (2 * len(names)))
    with contextlib.ExitStack() as stack:
        own = stack.enter_context(contextlib.closing(_Ways(part, replace(options, provider=CPU), trial.engine)))
        largest = max(own.many, key=lambda bucket: bucket.cells)
        alone = {CPU: {largest: own.many[largest]}}
        if compare(alone, batches, budget_s=0.0, clock=trial.clock)[CPU][largest] < _WORTH_S:
            return None
        ratios: dict[str, Ratios | None] = {}
        for name in names:
            try:
                other = _Ways(part, replace(options, provider=name), trial.engine)
            except (ArtifactError, ProviderError) as error:
                warnings.warn(f'provider="auto" leaves out {name}: {error}', BucketWarning, stacklevel=9)
                ratios[name] = None
                continue
            stack.enter_context(contextlib.closing(other))
            many, one = _ratio(own.many, other.many, batches, each), _ratio(own.one, other.one, batches, each)
            many *= own.workers.n / other.workers.n  # batches in the time of a run
            ratios[name] = Ratios(many=many, one=one)
        return ratios


def _ratio(own: Sessions, other: Sessions, batches: Batches, trial: Trial) -> float:
    """Return the other's time over one's own, for a run of every bucket one after another: engines that prepare for a
    shape when it changes have to do so here as in use.
    """
    feeds = {bucket: batches(bucket) for bucket in own}
    first = next(iter(own))
    systems = {"own": {first: _OneOfEach(own, feeds)}, "other": {first: _OneOfEach(other, feeds)}}
    found = compare(systems, lambda bucket: {}, budget_s=trial.budget_s, least=_LEAST, clock=trial.clock)
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
    """Return the artifact with buckets that rows of usual lengths take: the quartiles of a planned ladder."""
    lengths = artifact.manifest.ladder.lengths
    chosen = {lengths[min(len(lengths) - 1, len(lengths) * quarter // 4)] for quarter in (1, 2, 3)}
    buckets = tuple(bucket for bucket in artifact.manifest.ladder if bucket.length in chosen)
    return replace(artifact, manifest=replace(artifact.manifest, ladder=Ladder(buckets)))


class _Ways:
    """Sessions of a provider as many batches at once use them, and as a request of one row does."""

    def __init__(self, artifact: Artifact, options: EngineOptions, engine: Engine) -> None:
        ladder, used = artifact.manifest.ladder, options.for_many_batches()
        many = engine(artifact, used)
        alone = many if used.workers == 1 else engine(artifact, replace(options, workers=1))
        self._made = {id(one): one for one in (*many.values(), *alone.values())}
        self.workers = Workers(used.workers)
        self.many = {bucket: _AtOnce(many[bucket], self.workers) for bucket in ladder.largest_batches()}
        self.one = {bucket: alone[bucket] for bucket in ladder.smallest_batches()}

    def close(self) -> None:
        self.workers.close()
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


def choose_mode(artifact: Artifact, options: EngineOptions, trial: Trial) -> Choice:
    """Return which mode is faster here and fits; what was measured stays in this machine's cache."""
    static = takes(artifact, replace(options, mode="static")).total
    choice = Choice(seconds={}, static_bytes=static, available=trial.available)
    path = _figures(artifact, options, f"{named(options)}-modes")

    def measured() -> Seconds:
        seconds = _compare_modes(artifact, options, trial)
        if seconds:
            write_figures(path, replace(choice, seconds=seconds).to_json())
        return seconds

    if not choice.fits or not trial.budget_s:
        return replace(choice, seconds=_read(path) or {})
    return replace(choice, seconds=measured_once(path, lambda: _read(path), measured, again=trial.again))


def _texts(artifact: Artifact) -> Batches:
    manifest = artifact.manifest
    encoder = Encoder(artifact.tokenizer_json(), inputs=manifest.signature.input_names)
    return sampler(encoder, manifest.signature, manifest.vocab_size)


def _figures(artifact: Artifact, options: EngineOptions, what: str) -> Path:
    return machine_folder(artifact.graph_sha256()) / f"{what}-{in_use(options)}-{key_of(artifact.manifest.ladder)}.json"


def _read(path: Path) -> Seconds | None:
    """Return the seconds kept in a file; None where there are none, or damaged ones, which are measured again."""
    seconds = read_figures(path).get("seconds")
    found: dict[str, tuple[float, float]] = {}
    for name, pair in seconds.items() if isinstance(seconds, dict) else ():
        shared, static = (pair.get(way) if isinstance(pair, dict) else None for way in _WAYS)
        if not isinstance(shared, float) or not isinstance(static, float) or not 0 < min(shared, static) < math.inf:
            return None
        found[name] = (shared, static)
    return found or None


def _few(artifact: Artifact) -> Artifact:
    """Return the artifact with a few of its buckets: the smallest, the largest and one between."""
    by_size = sorted(artifact.manifest.ladder, key=lambda bucket: bucket.cells)
    few = {by_size[round(step * (len(by_size) - 1) / (_TRIED - 1))] for step in range(_TRIED)}
    return replace(artifact, manifest=replace(artifact.manifest, ladder=Ladder(tuple(few))))


def _compare_modes(artifact: Artifact, options: EngineOptions, trial: Trial) -> Seconds:
    """Open a few buckets in both modes, time them in turns, and close them again.

    Nothing is returned where the provider cannot run the model in static mode; a warning says so.
    """
    part, many = _few(artifact), options.for_many_batches()
    batches = trial.batches or _texts(artifact)
    opened = {"shared": trial.engine(part, replace(many, mode="shared"))}
    try:
        try:
            opened["static"] = trial.engine(part, replace(many, mode="static"))
        except ProviderError as error:
            warnings.warn(f'mode="auto" is shared: {error}', BucketWarning, stacklevel=9)
            return {}
        found = compare(opened, batches, budget_s=trial.budget_s, clock=trial.clock)
        return {bucket.name: (seconds, found["static"][bucket]) for bucket, seconds in found["shared"].items()}
    finally:
        for sessions in opened.values():
            for session in sessions.values():
                session.close()
