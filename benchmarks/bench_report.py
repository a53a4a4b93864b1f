"""A result of the benchmark as a chart, and all results as a page of documentation."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from bench_figures import by_speed, table
from bench_systems import OURS

BEGIN, END = "<!-- made by benchmarks/bench.py: begin -->", "<!-- made by benchmarks/bench.py: end -->"

# As in hf_bucket.report: Okabe and Ito's palette, which colour-blind readers can tell apart.
_BLUE, _LIGHT_BLUE, _GREY, _DARK = "#0072B2", "#56B4E9", "#999999", "#444444"


def draw(result: Mapping[str, Any], path: Path) -> None:
    """Write a picture of a result: a bar of texts per second for every system, the fastest at the top."""
    from matplotlib.figure import Figure

    systems = by_speed(result)
    names = [name for name, _ in systems]
    speeds = [one["texts_per_s"] for _, one in systems]
    places = range(len(systems))
    figure = Figure(figsize=(9.0, 1.5 + 0.32 * len(systems)), dpi=150, layout="constrained")
    axes = figure.subplots()
    axes.barh(places, [one["median"] for one in speeds], color=[_colour(name) for name in names], height=0.7)
    whiskers = [[one["median"] - one["min"] for one in speeds], [one["max"] - one["median"] for one in speeds]]
    axes.errorbar(
        [one["median"] for one in speeds], places, xerr=whiskers, fmt="none", ecolor=_DARK, capsize=3, linewidth=1
    )
    for place, (_, one) in enumerate(systems):
        text = f"{one['texts_per_s']['median']:,.4g}"
        if one["ratio"]:
            text += f"  ({1 / one['ratio']:.2f} x)"
        axes.annotate(
            text,
            (one["texts_per_s"]["max"], place),
            (6, 0),
            textcoords="offset points",
            va="center",
            fontsize=8,
        )
    axes.set_yticks(list(places), names, fontsize=8)
    for tick, name in zip(axes.get_yticklabels(), names, strict=True):
        tick.set_fontweight("bold" if name.startswith(OURS) else "normal")
    axes.set_ylim(len(systems) - 0.4, -0.6)
    axes.set_xlim(0, 1.25 * max(one["max"] for one in speeds))
    axes.set_xlabel(
        "texts per second (more is better); in brackets: hf_bucket = 1\nmedian, slowest and fastest round",
        fontsize=8,
    )
    axes.tick_params(axis="x", labelsize=8)
    axes.tick_params(axis="y", length=0)
    axes.spines[["top", "right"]].set_visible(False)
    axes.set_title(f"{result['set']}, {result['model']}: {result['n']:,} texts", fontsize=11, fontweight="bold")
    machine = f"{result['processor']}, {result['usable_cores']} cores; {result['rounds']} rounds in turns, float32"
    figure.supxlabel(machine, fontsize=7.5, color=_DARK)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)


def _colour(name: str) -> str:
    if name == OURS:
        return _BLUE
    return _LIGHT_BLUE if name.startswith(OURS) else _GREY


def write_page(results: Sequence[Path], page: Path) -> None:
    """Put the tables and charts of all results between the page's two markers; the rest of the page stays as it is.

    Raises:
        ValueError: the page lacks the markers.
    """
    text = page.read_text(encoding="utf-8")
    if text.count(BEGIN) != 1 or text.count(END) != 1 or text.index(END) < text.index(BEGIN):
        raise ValueError(f"{page} must have one line {BEGIN!r} and, below it, one line {END!r}")
    head, tail = text[: text.index(BEGIN)], text[text.index(END) :]
    parts = [_section(path, page) for path in sorted(results)]
    page.write_text("\n\n".join([f"{head}{BEGIN}", *parts, tail]), encoding="utf-8")


def _section(path: Path, page: Path) -> str:
    result = json.loads(path.read_text(encoding="utf-8"))
    chart = os.path.relpath(path.with_suffix(".png"), page.parent).replace(os.sep, "/")
    title = f"{result['set']}, {result['model']}"
    return f"## {title}\n\n![Texts per second of every system: {title}]({chart})\n\n{table(result)}"
