"""What is ``"auto"`` in an engine's options, settled before sessions are opened: that they fit, provider, and mode."""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import mean

from hf_bucket import memory
from hf_bucket.artifact import Artifact
from hf_bucket.costs import compare
from hf_bucket.errors import BucketWarning, ProviderError
from hf_bucket.ladder import Ladder
from hf_bucket.machine import measured_once, read_figures, write_figures
from hf_bucket.memory import FASTER, check_fits
from hf_bucket.preflight import Trial, figures_path, takes, texts_of
from hf_bucket.providers import Comparison, best_provider, compare_provider
from hf_bucket.session_ort import EngineOptions, Mode, named

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
        shared_fits: whether there is memory enough for shared mode.
    """

    seconds: Seconds
    static_bytes: int
    available: int | None
    shared_fits: bool = True

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
        """``"static"`` where it fits and is faster by a clear margin, or alone fits, else ``"shared"``."""
        return "static" if self.fits and (self.ratio <= FASTER or not self.shared_fits) else "shared"

    def to_json(self) -> dict[str, object]:
        """Return the choice and its figures."""
        seconds = {name: dict(zip(_WAYS, pair, strict=True)) for name, pair in self.seconds.items()}
        memory = {
            "static_bytes": self.static_bytes,
            "available_bytes": self.available,
            "shared_fits": self.shared_fits,
        }
        return {"mode": self.mode, "ratio": self.ratio, **memory, "seconds": seconds}


@dataclass(frozen=True, slots=True, kw_only=True)
class Settled:
    """What an engine's options became, and why.

    Attributes:
        engine: the options, with a provider and a mode that are not ``"auto"``.
        provider: how another provider compared, or why it did not; None where there was no choice.
        mode: how modes compared; None where one was named.
    """

    engine: EngineOptions
    provider: Comparison | None
    mode: Choice | None


def settle(artifact: Artifact, options: EngineOptions, trial: Trial) -> Settled:
    """Return the options with a provider and a mode that are not ``"auto"``, once it is known that sessions fit.

    Where only static mode fits, ``mode="auto"`` is that.

    Raises:
        LadderError: the sessions do not fit.
    """
    choice = None
    if options.mode == "auto" and trial.available is not None:
        shared, static = (takes(artifact, replace(options, mode=mode)).total for mode in _WAYS)
        if static <= trial.available < shared:
            choice = Choice(seconds={}, static_bytes=static, available=trial.available, shared_fits=False)
            options = replace(options, mode="static")
    open_questions = (options.provider == "auto") + (options.mode == "auto")
    trial = replace(trial, budget_s=trial.budget_s / max(1, open_questions))
    check_fits(takes(artifact, options), trial.available)
    compared = compare_provider(artifact, options, trial)
    engine = best_provider(artifact, options, compared)
    if engine.mode == "auto":
        choice = choose_mode(artifact, engine, trial)
        engine = replace(engine, mode=choice.mode)
    return Settled(engine=engine, provider=compared, mode=choice)


def choose_mode(artifact: Artifact, options: EngineOptions, trial: Trial) -> Choice:
    """Return which mode is faster here and fits; what was measured stays in this machine's cache."""
    static = takes(artifact, replace(options, mode="static")).total
    choice = Choice(seconds={}, static_bytes=static, available=trial.available)
    path = figures_path(artifact, options, f"{named(options)}-modes")

    def measured() -> Seconds:
        seconds = _compare_modes(artifact, options, trial)
        if seconds:
            write_figures(path, replace(choice, seconds=seconds).to_json())
        return seconds

    if not choice.fits or not trial.budget_s:
        return replace(choice, seconds=_read(path) or {})
    return replace(choice, seconds=measured_once(path, lambda: _read(path), measured, again=trial.again))


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
    batches = texts_of(artifact, trial)
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
