"""What the measurements of one data set come to: figures, and the table made of them."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from statistics import median
from typing import Any

import numpy as np
from bench_systems import OURS
from numpy.typing import NDArray
from record import spread


@dataclass(frozen=True, slots=True, kw_only=True)
class Measured:
    """What one system did.

    Attributes:
        seconds: one per round, from texts to labels.
        singles: seconds of single requests.
        logits: of the first, untimed pass. Shape: (row, label).
        labels: of the last round.
        cells: computed in a pass, padding included; None where the system cannot say.
        memory: the largest ``peak_bytes`` and ``pss_bytes`` it reported.
        load_s: one per start of its process.
        prepare_s: of its export; None without one, or where it was there already.
        first_pass_s: of the first pass, which may compile.
    """

    seconds: tuple[float, ...]
    singles: tuple[float, ...]
    logits: NDArray[np.float32]
    labels: tuple[str, ...]
    cells: int | None
    memory: Mapping[str, int]
    load_s: tuple[float, ...]
    prepare_s: float | None
    first_pass_s: float
    versions: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class Reference:
    """What plain torch says, one text at a time. Shape of the logits: (row, label)."""

    logits: NDArray[np.float32]
    labels: tuple[str, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Work:
    """What the texts need at least.

    Attributes:
        tokens: real ones, after truncation.
        flops: of the real tokens alone.
        peak_gflops: of this machine's float32 matrix product, measured in the same run.
    """

    texts: int
    tokens: int
    flops: int
    peak_gflops: float


def figures(measured: Measured, ours: Measured | None, *, reference: Reference, work: Work) -> dict[str, Any]:
    """Return one system's figures as JSON's own types.

    ``ratio`` is its median seconds over ours: above 1 means that hf_bucket is faster; ``paired_ratio`` is the spread of
    the same in every round. Both are None without ``ours``.
    """
    gflops = work.flops / median(measured.seconds) / 1e9
    return {
        "seconds": list(measured.seconds),
        "texts_per_s": rates(work.texts, measured.seconds),
        "real_tokens_per_s": rates(work.tokens, measured.seconds),
        "ratio": None if ours is None else median(measured.seconds) / median(ours.seconds),
        "paired_ratio": None if ours is None else paired(measured.seconds, ours.seconds),
        "useful_gflops": gflops,
        "share_of_peak": gflops / work.peak_gflops,
        "single_p50_ms": 1e3 * percentile(measured.singles, 50),
        "single_p99_ms": 1e3 * percentile(measured.singles, 99),
        "single_n": len(measured.singles),
        "waste": None if measured.cells is None else 1 - work.tokens / measured.cells,
        "memory": dict(measured.memory),
        "load_s": spread(measured.load_s),
        "prepare_s": measured.prepare_s,
        "first_pass_s": measured.first_pass_s,
        "max_delta_logit": float(np.abs(measured.logits - reference.logits).max()),
        "label_flips": sum(one != other for one, other in zip(measured.labels, reference.labels, strict=True)),
        "versions": dict(measured.versions),
    }


def rates(count: int, seconds: Sequence[float]) -> dict[str, float]:
    """Return ``count`` per second in the median, the slowest and the fastest round, and how many rounds there were."""
    return {
        "median": count / median(seconds),
        "min": count / max(seconds),
        "max": count / min(seconds),
        "n": len(seconds),
    }


def paired(theirs: Sequence[float], ours: Sequence[float]) -> dict[str, float]:
    """Return the spread of their seconds over ours, round by round."""
    return spread([one / other for one, other in zip(theirs, ours, strict=True)])


def percentile(values: Sequence[float], percent: float) -> float:
    """Return the smallest value that at least ``percent`` % of all do not exceed (nearest rank)."""
    return sorted(values)[max(0, math.ceil(len(values) * percent / 100) - 1)]


_HEADER = (
    "system",
    "texts/s, median (min-max)",
    "x hf_bucket",
    "paired (min-max)",
    "real tokens/s",
    "useful GFLOP/s (of peak)",
    "single p50 / p99 ms",
    "waste",
    "peak / Pss MB",
    "load s",
    r"max \|delta logit\|",
    "label flips",
)


def table(result: Mapping[str, Any]) -> str:
    """Return the result of one data set in Markdown: a caption, a row per system, fastest first, and who is missing."""
    rows = [_cells(name, one) for name, one in by_speed(result)]
    lines = [_line(_HEADER), _line(["---", *["---:"] * (len(_HEADER) - 1)]), *map(_line, rows)]
    lines += ["", *_environments(result)]
    missing = [f"- not measured: {name}: {reason}" for name, reason in result["not_measured"].items()]
    return "\n".join([caption(result), "", *lines, *missing])


def by_speed(result: Mapping[str, Any]) -> list[tuple[str, Mapping[str, Any]]]:
    """Return the systems of a result with their figures, the fastest first."""
    return sorted(result["systems"].items(), key=lambda item: -float(item[1]["texts_per_s"]["median"]))


def caption(result: Mapping[str, Any]) -> str:
    """Return in one paragraph how a result was measured."""
    peak, commit = result["peak_gflops"], result.get("commit")
    return (
        f"{result['n']:,} texts, {result['real_tokens']:,} real tokens (at most {result['max_length']} per text), "
        f"{result['rounds']} rounds in turns after an untimed one, float32. {result['processor']}, "
        f"{result['usable_cores']} cores, matrix product {max(peak.values()):.0f} GFLOP/s; hf_bucket "
        f"{result['versions']['hf-bucket']}{f' at {commit}' if commit else ''}. `{result['command']}`"
    )


def _environments(result: Mapping[str, Any]) -> list[str]:
    """Return a line with the versions of every environment that took part."""
    found = {one["environment"]: one["versions"] for one in result["systems"].values()}
    return [
        f"- environment {name}: {', '.join(f'{package} {number}' for package, number in versions.items())}"
        for name, versions in sorted(found.items())
    ]


def _line(cells: Iterable[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _cells(name: str, one: Mapping[str, Any]) -> tuple[str, ...]:
    speed, pairs = one["texts_per_s"], one["paired_ratio"]
    memory = [f"{one['memory'][key] / 1e6:.0f}" if key in one["memory"] else "-" for key in ("peak_bytes", "pss_bytes")]
    return (
        f"**{name}**" if name == OURS else name,
        f"{speed['median']:.4g} ({speed['min']:.4g}-{speed['max']:.4g})",
        "-" if one["ratio"] is None else f"{one['ratio']:.2f}",
        "-" if pairs is None else f"{pairs['median']:.2f} ({pairs['min']:.2f}-{pairs['max']:.2f})",
        f"{one['real_tokens_per_s']['median']:,.0f}",
        f"{one['useful_gflops']:.1f} ({one['share_of_peak']:.0%})",
        f"{one['single_p50_ms']:.1f} / {one['single_p99_ms']:.1f}",
        "-" if one["waste"] is None else f"{one['waste']:.1%}",
        " / ".join(memory),
        f"{one['load_s']['median']:.1f}",
        f"{one['max_delta_logit']:.0e}",
        str(one["label_flips"]),
    )
