"""Systems measured in turns over the same texts, and what came of it: figures, a table, JSON."""

from __future__ import annotations

import platform
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from importlib.metadata import PackageNotFoundError
from pathlib import Path
from statistics import median

import numpy as np

from hf_bucket.errors import DataError, InputError
from hf_bucket.machine import package_version, usable_cores
from hf_bucket.metrics import Logits, flipped_rows, max_delta
from hf_bucket.systems import BUCKETED, ENGINES, REFERENCE, Job, Loaded, Pass, Start, Worker

SCHEMA_VERSION = 1

_PACKAGES = (
    "hf-bucket",
    "onnxruntime",
    "torch",
    "transformers",
    "tokenizers",
    "numpy",
    "datasets",
    "scikit-learn",
    "scipy",
)


@dataclass(frozen=True, slots=True, kw_only=True)
class EvalRequest:
    """What to evaluate. None leaves a choice to the model's or the data set's own default.

    Attributes:
        task: a task of GLUE; not looked at where ``data`` is given.
        data: a data file of the user's instead of GLUE, with a text in ``column``, for pairs another in
            ``pair_column``, and one of the model's labels, by name or by index, in ``label_column``.
        model: checkpoint on the Hub or in a folder, or ``"default"``.
        buckets: lengths, ``"auto"`` (planned from the train split) or ``"pow2"``.
        split: one split, or several joined by ``+``; ``validation`` is both of MNLI's.
        calibration: texts or lengths to plan ``"auto"`` from, instead of the train split.
        data_dir: folder with ``<task>/<split>.parquet`` (or .csv, .jsonl) instead of the Hub.
        limit: rows of each split that are used, from the first.
        rounds: passes of every system over the data.
        label_order: the task's label names in the model's order, for models whose names do not say.
        quantize: ``"int8"``, calibrated on the train split or on ``calibration``, or ``"int8-dynamic"``.
        command: what was typed, for the record.

    Raises:
        InputError: a count below 1.
    """

    task: str
    model: str
    buckets: Sequence[int] | str
    split: str = "validation"
    batch_sizes: Sequence[int] | None = None
    n_buckets: int | None = None
    calibration: Sequence[object] | None = None
    data_dir: Path | None = None
    data: Path | None = None
    column: str = "text"
    pair_column: str | None = None
    label_column: str = "label"
    limit: int | None = None
    rounds: int = 3
    label_order: Sequence[str] | None = None
    mode: str | None = None
    provider: str | None = None
    revision: str | None = None
    pipeline_batch_size: int = 32
    quantize: str | None = None
    command: str = ""

    def __post_init__(self) -> None:
        for name in ("limit", "rounds", "pipeline_batch_size"):
            count = getattr(self, name)
            if count is not None and count < 1:
                raise InputError(f"{name} must be at least 1, got {count}")


@dataclass(frozen=True, slots=True, kw_only=True)
class Measurement:
    """What each system said, by name, in the order they took turns.

    Raises:
        DataError: a system whose first logits are not finite, or differ in shape from the reference's.
    """

    loaded: Mapping[str, Loaded]
    passes: Mapping[str, Sequence[Pass]]

    def __post_init__(self) -> None:
        expected = self.logits(REFERENCE).shape
        for system in self.passes:
            logits = self.logits(system)
            if logits.shape != expected:
                raise DataError(f"{system} gave logits of shape {logits.shape}, {REFERENCE} of shape {expected}")
            if not np.isfinite(logits).all():
                row = int(np.argmin(np.isfinite(logits).all(axis=1)))
                raise DataError(f"{system} gave logits that are not finite, first in row {row}: {logits[row].tolist()}")

    def logits(self, system: str) -> Logits:
        """Return the logits of a system's first pass. Shape: (row, label)."""
        return self.passes[system][0].logits

    @property
    def ladder(self) -> tuple[str, ...]:
        """Names of the bucketed model's buckets."""
        return self.loaded[BUCKETED].ladder

    @property
    def max_length(self) -> int | None:
        """The model's true maximum in tokens; None where it has none."""
        return self.loaded[BUCKETED].max_length


def measure(job: Job, *, rounds: int, start: Start, say: Callable[[str], None]) -> Measurement:
    """Let all systems take turns for ``rounds`` rounds.

    The bucketed model is loaded once beforehand, in a process that ends: compiling needs torch and much memory, which
    would otherwise count as its own. The worker that is measured finds the compiled model in the cache.

    Args:
        job: its ``max_length`` is replaced by what the bucketed model says.
        start: starts one system and waits until it has loaded.
        say: receives one line per step.

    Raises:
        BucketError: a system failed, or its logits cannot be compared.
    """
    say(f"compiling {job.model}, or finding it in the cache")
    with start(BUCKETED, job) as compiled:
        job = replace(job, max_length=compiled.loaded.max_length)
    with ExitStack() as stack:
        workers: dict[str, Worker] = {}
        for system in ENGINES:
            say(f"loading {system}")
            workers[system] = stack.enter_context(start(system, job))
        passes: dict[str, list[Pass]] = {system: [] for system in workers}
        for number in range(1, rounds + 1):
            for system, worker in workers.items():
                passes[system].append(worker.run())
                say(f"round {number} of {rounds}: {system} took {passes[system][-1].seconds:.2f} s")
        return Measurement(loaded={system: worker.loaded for system, worker in workers.items()}, passes=passes)


@dataclass(frozen=True, slots=True, kw_only=True)
class SystemFigures:
    """What was measured of one system.

    Attributes:
        metrics: the task's official metrics, as fractions.
        label_flips: rows whose label differs from torch's without padding; None for a regression, which has no label.
        flipped_rows: those rows, ascending.
        max_delta_logit: largest absolute difference of any logit from torch's without padding.
        n: texts.
        seconds: one per round, from texts to logits.
        speed_ratio: texts per second as a multiple of torch's, both at their median round.
        waste: share of the computed cells that were padding.
        truncated: rows that were cut.
        loaded_bytes: resident set of the system's own process after loading.
        peak_bytes: largest resident set of that process.
    """

    system: str
    metrics: Mapping[str, float]
    label_flips: int | None
    flipped_rows: tuple[int, ...]
    max_delta_logit: float
    n: int
    seconds: tuple[float, ...]
    speed_ratio: float
    waste: float
    truncated: int
    loaded_bytes: int
    peak_bytes: int

    @property
    def texts_per_s(self) -> dict[str, float]:
        """Texts per second in the median, the slowest and the fastest round."""
        rounds = {"median": median(self.seconds), "min": max(self.seconds), "max": min(self.seconds)}
        return {name: self.n / seconds for name, seconds in rounds.items()}

    def to_json(self) -> dict[str, object]:
        """Return the figures as JSON's own types."""
        return {
            "metrics": dict(self.metrics),
            "label_flips": self.label_flips,
            "flipped_rows": list(self.flipped_rows),
            "max_delta_logit": self.max_delta_logit,
            "texts_per_s": self.texts_per_s,
            "seconds": list(self.seconds),
            "speed_ratio_to_torch": self.speed_ratio,
            "waste": self.waste,
            "truncated": self.truncated,
            "memory": {"loaded_bytes": self.loaded_bytes, "peak_bytes": self.peak_bytes},
        }


def figures(measurement: Measurement, system: str, metrics: Mapping[str, float]) -> SystemFigures:
    """Return what was measured of ``system``; its ``metrics`` are computed by the caller, who knows the labels."""
    passes = measurement.passes[system]
    logits, reference = measurement.logits(system), measurement.logits(REFERENCE)
    flips = flipped_rows(logits, reference)
    reference_s = median(one.seconds for one in measurement.passes[REFERENCE])
    return SystemFigures(
        system=system,
        metrics=metrics,
        label_flips=len(flips) if logits.shape[1] > 1 else None,
        flipped_rows=tuple(flips),
        max_delta_logit=max_delta(logits, reference),
        n=len(logits),
        seconds=tuple(one.seconds for one in passes),
        speed_ratio=reference_s / median(one.seconds for one in passes),
        waste=passes[0].waste,
        truncated=passes[0].truncated,
        loaded_bytes=measurement.loaded[system].memory_bytes,
        peak_bytes=max(one.peak_bytes for one in passes),
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class EvalReport:
    """What an evaluation found. All systems computed in float32, but for the bucketed model if ``quantize`` says so.

    Attributes:
        split: one split, or several joined by ``+``.
        n: texts.
        labels: the task's label names in the model's order; empty for a regression.
        calibration: what the ladder was planned from, a split or the recipe's texts; None where it was given.
        ladder: names of the buckets.
        max_length: the model's true maximum in tokens; None where it has none.
        command: what was typed.
    """

    task: str
    split: str
    n: int
    model: str
    revision: str | None
    labels: tuple[str, ...]
    calibration: str | None
    ladder: tuple[str, ...]
    max_length: int | None
    rounds: int
    pipeline_batch_size: int
    command: str
    versions: Mapping[str, str]
    machine: Mapping[str, str | int]
    systems: tuple[SystemFigures, ...]
    quantize: str | None = None

    @property
    def bucketed(self) -> SystemFigures:
        """The figures of the bucketed model."""
        return next(figures for figures in self.systems if figures.system == BUCKETED)

    @property
    def precision(self) -> str:
        """What was computed in: ``"float32"``, or ``"float32, hf_bucket int8"`` where the systems differ."""
        return f"float32, {BUCKETED} {self.quantize}" if self.quantize else "float32"

    @property
    def failed(self) -> bool:
        """Whether bucketing changed a label; what int8 changes is told, and is no failure."""
        return bool(self.bucketed.label_flips) and self.quantize is None

    def complaint(self) -> str:
        """Return which labels flipped, in one line."""
        rows = self.bucketed.flipped_rows
        return (
            f"error: {len(rows)} of {self.n} labels differ from torch's without padding, in rows "
            f"{', '.join(map(str, rows[:10]))}{' ...' if len(rows) > 10 else ''}; "
            f"{self.bucketed.truncated} rows were cut to fit the largest bucket"
        )

    def to_json(self) -> dict[str, object]:
        """Return the report as JSON's own types."""
        return {
            "schema_version": SCHEMA_VERSION,
            "task": self.task,
            "split": self.split,
            "n": self.n,
            "model": self.model,
            "revision": self.revision,
            "precision": self.precision,
            "labels": list(self.labels),
            "ladder": list(self.ladder),
            "calibration": self.calibration,
            "max_length": self.max_length,
            "rounds": self.rounds,
            "pipeline_batch_size": self.pipeline_batch_size,
            "command": self.command,
            "versions": dict(self.versions),
            "machine": dict(self.machine),
            "systems": {figures.system: figures.to_json() for figures in self.systems},
        }

    def table(self) -> str:
        """Return the report as aligned plain text, one line per system."""
        return "\n".join(
            [
                f"{self.task} {self.split}, {self.n} texts, {self.model}",
                f"ladder {', '.join(self.ladder)}",
                f"{self.machine['cpu']}, {self.machine['usable_cores']} cores; {self.rounds} rounds in turns, "
                f"{self.precision}",
                "",
                *_aligned([_HEADER + tuple(self.bucketed.metrics), *(_cells(figures) for figures in self.systems)]),
            ]
        )


_FLIPS, _DELTA = "label flips", "max |delta logit|"
_HEADER = ("system", "texts/s (min-max)", "x torch", "waste", "truncated", _FLIPS, _DELTA, "MB (peak)")


def _cells(figures: SystemFigures) -> tuple[str, ...]:
    speed = figures.texts_per_s
    return (
        figures.system,
        f"{speed['median']:.1f} ({speed['min']:.1f}-{speed['max']:.1f})",
        f"{figures.speed_ratio:.2f}",
        f"{figures.waste:.3f}",
        str(figures.truncated),
        "-" if figures.label_flips is None else str(figures.label_flips),
        f"{figures.max_delta_logit:.1e}",
        f"{figures.loaded_bytes / 1e6:.0f} ({figures.peak_bytes / 1e6:.0f})",
        *(f"{value:.4f}" for value in figures.metrics.values()),
    )


def _aligned(rows: Iterable[tuple[str, ...]]) -> list[str]:
    """Return lines whose columns are as wide as their widest cell: the first to the left, the others to the right."""
    columns = list(zip(*rows, strict=True))
    widths = [max(len(cell) for cell in column) for column in columns]
    return [
        "  ".join(cell.rjust(width) if index else cell.ljust(width) for index, (cell, width) in enumerate(pairs))
        for pairs in (list(zip(row, widths, strict=True)) for row in zip(*columns, strict=True))
    ]


def installed_versions() -> dict[str, str]:
    """Return the versions of Python and of every installed package that takes part."""
    versions = {"python": platform.python_version()}
    for package in _PACKAGES:
        try:
            versions[package] = package_version(package)
        except PackageNotFoundError:
            continue
    return versions


def this_machine() -> dict[str, str | int]:
    """Return the CPU's name and how many of its cores this process may use."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return {"cpu": (names or [platform.processor() or platform.machine()])[0], "usable_cores": usable_cores()}
