"""``provider="auto"``: which engine runs many texts here, and which a single one, by measurement."""

from __future__ import annotations

import contextlib
import math
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from hf_bucket.artifact import Artifact
from hf_bucket.batch import Array
from hf_bucket.costs import Batches, Sessions, compare
from hf_bucket.errors import ArtifactError, BucketWarning, ProviderError
from hf_bucket.ladder import Bucket, Ladder
from hf_bucket.machine import measured_once, read_figures, write_figures
from hf_bucket.preflight import Trial, figures_path, takes, texts_of
from hf_bucket.session import Session
from hf_bucket.session_ort import CPU, OPENVINO, Engine, EngineOptions, auto_provider, versioned
from hf_bucket.workers import Workers

# Of the CPU provider's time. For less than a twentieth another engine's memory and start are not worth it; so much is
# seen on a few buckets too, as on whole data sets: docs/benchmarks.md, "Which provider".
_WORTH = 0.95
_NO_SLOWER = 1.02  # more than that is no noise
_BOUND = 1.1  # for many, of a provider for requests of a few batches, which can be as large as those of many
_LEAST = 5  # runs of each; what is chosen is kept, and fewer are at the mercy of a busy moment
_WORTH_S = 0.005  # a run of fewer seconds is not worth another engine's memory, threads and start


@dataclass(frozen=True, slots=True, kw_only=True)
class Comparison:
    """What another provider takes of the CPU provider's time, for a run of some buckets one after another.

    Attributes:
        provider: the other.
        many: with as many batches at once as in use; None where nothing was measured.
        one: with one batch that has every core to itself, as a request of one row has it.
        why: nothing was measured.
    """

    provider: str
    many: float | None = None
    one: float | None = None
    why: str = ""


def compare_provider(artifact: Artifact, options: EngineOptions, trial: Trial) -> Comparison | None:
    """Return how the provider that ``"auto"`` could become compares with the CPU's; None where there is no choice.

    It is measured for as many batches at once as would run in use, since what engines take from each other counts, and
    for a request of one row; figures stay in the machine's cache. There is no choice where a provider is named, where
    no other can run here, where there is no time to measure and nothing is kept, and in static mode, where others hold
    the weights once for every bucket.
    """
    name = auto_provider() if options.provider == "auto" and options.mode != "static" else None
    if name is None:
        return None
    other = replace(options, provider=name)
    if trial.available is not None and takes(artifact, other).total > trial.available:
        return Comparison(provider=name, why="there is no memory for the sessions of both uses, which measuring opens")
    path = figures_path(artifact, options, f"{versioned(name)}-ratios")

    def measured() -> Comparison:
        found = _compared(artifact, other, trial)
        figures = {"many": found.many, "one": found.one, "why": found.why}
        write_figures(path, {key: value for key, value in figures.items() if value})
        return found

    if not trial.budget_s:
        return _read(path, name)
    return measured_once(path, lambda: _read(path, name), measured, again=trial.again)


def best_provider(artifact: Artifact, options: EngineOptions, found: Comparison | None) -> EngineOptions:
    """Return the options with what ``provider="auto"`` means here: the CPU provider, unless another is faster.

    Many texts and a single one each have the provider that is better for them, unless the two cannot part: where both
    run in one session; where the mode is still to be chosen, which they have in common; in less than float32, where two
    engines can round one text to two answers; and of a graph made elsewhere, of which nobody knows.
    """
    if options.provider != "auto":
        return options
    on_cpu = replace(options, provider=CPU)
    if found is None or found.many is None or found.one is None:
        return on_cpu
    both, many, one = replace(options, provider=found.provider), found.many, found.one
    source = artifact.manifest.source
    float32 = source.get("dtype", "float32") == "float32" and source.get("made_by") != "onnx"
    may_part = on_cpu.for_many_batches().workers > 1 and options.mode != "auto" and float32
    at_once = both.for_many_batches().workers > 1
    if not (may_part and at_once) and min(many, one) <= _WORTH and max(many, one) <= _NO_SLOWER:
        return both
    if not may_part:
        return on_cpu
    of_many = found.provider if at_once and many <= _WORTH else CPU
    of_one = found.provider if one <= _WORTH and many <= _BOUND else CPU
    return replace(options, provider=of_one, provider_of_many=None if of_one == of_many else of_many)


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


def _read(path: Path, name: str) -> Comparison | None:
    """Return what is kept in a file; None where that is nothing, or damaged, and is measured again."""
    found = read_figures(path)
    why, figures = found.get("why"), [found.get(use) for use in ("many", "one")]
    if isinstance(why, str) and why:
        return Comparison(provider=name, why=why)
    many, one = (figure if isinstance(figure, float) and 0 < figure < math.inf else None for figure in figures)
    return None if many is None or one is None else Comparison(provider=name, many=many, one=one)


def _compared(artifact: Artifact, other: EngineOptions, trial: Trial) -> Comparison:
    """Open some buckets on both providers, time them in turns, and close them again."""
    name, part, batches = other.provider, _usual(artifact), texts_of(artifact, trial)
    with contextlib.ExitStack() as stack:
        own = stack.enter_context(contextlib.closing(_Ways(part, replace(other, provider=CPU), trial.engine)))
        largest = max(own.many, key=lambda bucket: bucket.cells)
        alone = {CPU: {largest: own.many[largest]}}
        if compare(alone, batches, budget_s=0.0, clock=trial.clock)[CPU][largest] < _WORTH_S:
            return Comparison(provider=name, why=f"runs of less than {_WORTH_S * 1e3:.0f} ms are not worth it")
        try:
            ways = stack.enter_context(contextlib.closing(_Ways(part, other, trial.engine)))
        except (ArtifactError, ProviderError) as error:
            warnings.warn(f'provider="auto" leaves out {name}: {error}', BucketWarning, stacklevel=9)
            return Comparison(provider=name, why=f"it cannot run this model: {error}")
        each = replace(trial, budget_s=trial.budget_s / 2)
        many = _ratio(own.many, ways.many, batches, each) * own.workers.n / ways.workers.n  # batches in a run's time
        return Comparison(provider=name, many=many, one=_ratio(own.one, ways.one, batches, each))


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
        self._made, self.workers = {id(one): one for one in many.values()}, Workers(used.workers)
        try:
            alone = many if used.workers == 1 else engine(artifact, replace(options, workers=1))
        except BaseException:
            self.close()
            raise
        self._made.update({id(one): one for one in alone.values()})
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
