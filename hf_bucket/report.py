"""Plans and evaluations as pictures: PNG or SVG by matplotlib, and plans as text for a terminal."""

from __future__ import annotations

import io
import math
import os
import secrets
import threading
from bisect import bisect_left
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from statistics import mean
from typing import TYPE_CHECKING, Any

from hf_bucket.errors import DataError, InputError, missing_part
from hf_bucket.histogram import Histogram
from hf_bucket.planner import Plan

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

SUFFIXES = (".png", ".svg")
SIZE_INCHES = (8.0, 4.5)
DPI = 200  # 1600 x 900 pixels: sharp where a page shows them 800 wide
MIN_WIDTH = 40  # columns of a text chart

# Okabe and Ito's palette, which colour-blind readers can tell apart: https://jfly.uni-koeln.de/color/
BLUE, VERMILLION, GREEN, ORANGE, PURPLE = "#0072B2", "#D55E00", "#009E73", "#E69F00", "#CC79A7"
GREY, DARK = "#999999", "#444444"

_TAIL = 8  # medians that the longest row may have before the axis of lengths turns logarithmic
_PLOT_WIDTH = 420.0  # points, about: of the axis of lengths
_RC_LOCK = threading.Lock()  # matplotlib's settings are the process's
_SETTINGS: Any = {
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "figure.constrained_layout.w_pad": 0.1,
    "figure.constrained_layout.h_pad": 0.08,
    "svg.hashsalt": "hf_bucket",  # the same picture is the same bytes
    "text.parse_math": False,  # a $ in a name is a $
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Bin:
    """Rows of ``low`` to ``high`` tokens, both included."""

    low: int
    high: int
    rows: int


def bin_rows(histogram: Histogram, n_bins: int) -> list[Bin]:
    """Return at most ``n_bins`` + 2 neighbouring bins that hold every row.

    They are equally wide, 1, 2 or 5 times a power of ten; or, where the tail is long, about equally wide by ratio.
    """
    first, last = histogram.lengths[0], histogram.max
    if _has_long_tail(histogram):
        uppers, ratio = [first], (last / first) ** (1 / n_bins)
        while uppers[-1] < last:
            uppers.append(min(last, max(uppers[-1] + 1, round(uppers[-1] * ratio))))
        edges = [first - 1, *uppers]
    else:
        step = next(s for s in _round_numbers() if (last - first) / s < n_bins)
        start = (first - 1) // step * step
        edges = list(range(start, last + step, step))
    counts = dict.fromkeys(edges[1:], 0)
    for length, rows in zip(histogram.lengths, histogram.counts, strict=True):
        counts[edges[bisect_left(edges, length)]] += rows
    return [Bin(low=below + 1, high=high, rows=counts[high]) for below, high in pairwise(edges)]


def _has_long_tail(histogram: Histogram) -> bool:
    return histogram.max > _TAIL * histogram.quantile(0.5)


def _round_numbers() -> Iterator[int]:
    """Yield 1, 2, 5, 10, 20, 50 and so on."""
    power = 1
    while True:
        yield from (power, 2 * power, 5 * power)
        power *= 10


def draw_plan(plan: Plan, path: Path, *, arrival_waste: float | None = None, title: str | None = None) -> None:
    """Write a picture of a plan: the lengths of the rows, the edges of the buckets, and the waste.

    Args:
        path: ends in one of ``SUFFIXES``; a file there is replaced.
        arrival_waste: waste of batches of 32 in arrival order, each as long as its longest row; None leaves it out.
        title: of the picture; None counts rows and buckets.

    Raises:
        DataError: another suffix.
        DependencyError: matplotlib is not installed.
    """
    wastes = _wastes(plan, arrival_waste)
    with _drawing(path) as figure:
        lengths, waste = figure.subplots(2, 1, height_ratios=[3, 0.3 * len(wastes)])
        figure.suptitle(_shorten(title or _plan_title(plan), 80), fontsize=11, fontweight="bold")
        _draw_lengths(lengths, plan)
        colours = [GREY, GREEN] if arrival_waste is None else [GREY, ORANGE, GREEN]
        bars = waste.barh(list(wastes), [100 * value for value in wastes.values()], color=colours, height=0.7)
        waste.bar_label(bars, labels=[f"{value:.1%}" for value in wastes.values()], padding=3)
        waste.set_xlim(0, 110)
        waste.set_xticks(range(0, 101, 20))
        waste.invert_yaxis()
        waste.tick_params(axis="y", length=0)
        waste.set_xlabel("waste: % of the computed cells that are padding")


def _plan_title(plan: Plan) -> str:
    rows, buckets = plan.histogram.total_rows, len(plan.lengths)
    return f"{rows:,} text{'s'[: rows > 1]}, {buckets} bucket length{'s'[: buckets > 1]}"


def _wastes(plan: Plan, arrival_waste: float | None) -> dict[str, float]:
    """Return the waste of each way of padding, by its name in a chart."""
    arrival = {} if arrival_waste is None else {"batches of 32 in arrival order": arrival_waste}
    planned = "planned: 1 length" if len(plan.lengths) == 1 else f"planned: {len(plan.lengths)} lengths"
    return {f"one bucket of {plan.ladder.max_length:,}": plan.waste_single, **arrival, planned: plan.waste}


def _clipped_note(plan: Plan) -> str:
    return f"{plan.clipped:,} longer than {plan.ladder.max_length:,} count as {plan.ladder.max_length:,}"


def _draw_lengths(axes: Axes, plan: Plan) -> None:
    """Draw bars of rows by length and a labelled line where each bucket ends."""
    bins = bin_rows(plan.histogram, 24 if _has_long_tail(plan.histogram) else 60)
    lefts = [one.low - 0.5 for one in bins]
    widths = [one.high + 0.5 - left for one, left in zip(bins, lefts, strict=True)]
    axes.bar(lefts, [one.rows for one in bins], widths, align="edge", color=BLUE, edgecolor="white", linewidth=0.4)
    low, high = lefts[0], max(bins[-1].high, plan.ladder.max_length) + 0.5
    logarithmic = _has_long_tail(plan.histogram)
    if logarithmic:
        axes.set_xscale("log", base=2)
        axes.xaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")
    margin = (high / low) ** 0.01 if logarithmic else 0.01 * (high - low)
    low, high = (max(low / margin, 0.55), high * margin) if logarithmic else (low - margin, high + margin)
    axes.set_xlim(low, high)
    axes.set_ylabel("texts per bar")
    axes.locator_params(axis="y" if logarithmic else "both", integer=True)
    note = f" ({_clipped_note(plan)})" if plan.clipped else ""
    axes.set_xlabel(f"length in tokens{', logarithmic' if logarithmic else ''}{note}")
    axes.grid(axis="y", color="#DDDDDD", linewidth=0.5)

    def share(edge: float) -> float:
        """Place along the axis, in [0, 1]."""
        if logarithmic:
            return math.log(edge / low) / math.log(high / low)
        return (edge - low) / (high - low)

    for length in plan.lengths:
        axes.axvline(length + 0.5, color=VERMILLION, linewidth=1.1)
    _label_edges(axes, plan.lengths, [share(length + 0.5) for length in plan.lengths])


def _label_edges(axes: Axes, lengths: Sequence[int], shares: Sequence[float]) -> None:
    """Write each length above its line, which is at one of ``shares`` of the axis; aside where labels are crowded."""
    names = [f"{length:,}" for length in lengths]
    gap = (5.0 * max(map(len, names)) + 9.0) / _PLOT_WIDTH
    upright = len(names) * gap > 0.7  # moved far aside, labels are hard to trace to their lines
    gap = 11.0 / _PLOT_WIDTH if upright else gap
    step = math.ceil(len(names) * gap)  # beyond what fits, every so many lines are labelled, and always the last
    shown = range((len(names) - 1) % step, len(names), step)
    for index, place in zip(shown, spread([shares[index] for index in shown], gap), strict=True):
        axes.annotate(
            names[index],
            xy=(shares[index], 1),
            xytext=(place, 1.06),
            xycoords="axes fraction",
            textcoords="axes fraction",
            color=VERMILLION,
            fontsize=8,
            ha="center",
            va="bottom",
            rotation=90 if upright else 0,
            arrowprops={"arrowstyle": "-", "color": VERMILLION, "linewidth": 0.7, "shrinkA": 0, "shrinkB": 0},
        )
    heading = f"vertical lines: tokens that each bucket holds{f' (1 of {step} labelled)' if step > 1 else ''}"
    axes.set_title(
        heading, loc="left", fontsize=8, color=VERMILLION, pad=24 + (3 * max(map(len, names)) if upright else 0)
    )


def spread(wanted: Sequence[float], gap: float) -> list[float]:
    """Return places in [0, 1] at least ``gap`` apart, in the same order, as near as can be to the ascending ``wanted``.

    Least squares by pooling neighbours that are too close (isotonic regression). Places that do not fit start at 0.
    """
    pools: list[list[float]] = []
    for index, place in enumerate(wanted):
        pools.append([place - index * gap])
        while len(pools) > 1 and mean(pools[-2]) > mean(pools[-1]):
            pools[-2:] = [pools[-2] + pools[-1]]
    room = max(0.0, 1 - (len(wanted) - 1) * gap)
    bases = [min(max(mean(pool), 0.0), room) for pool in pools for _ in pool]
    return [base + index * gap for index, base in enumerate(bases)]


def draw_evaluation(report: Mapping[str, Any], path: Path) -> None:
    """Write a picture of an evaluation: texts per second and waste of every system.

    Args:
        report: what ``EvalReport.to_json`` returns.
        path: ends in one of ``SUFFIXES``; a file there is replaced.

    Raises:
        DataError: another suffix, or a report without the figures.
        DependencyError: matplotlib is not installed.
    """
    systems, title, caption = _read_report(report)
    colours = [(GREY, ORANGE, GREEN, BLUE, PURPLE)[index % 5] for index in range(len(systems))]
    names = [_shorten(one.name, 32) for one in systems]
    places = range(len(systems))
    medians = [one.median for one in systems]
    with _drawing(path) as figure:
        speed, waste = figure.subplots(1, 2, width_ratios=[2, 1])
        figure.suptitle(title, fontsize=11, fontweight="bold")
        speed.barh(places, medians, color=colours, height=0.62)
        whiskers = [[one.median - one.slowest for one in systems], [one.fastest - one.median for one in systems]]
        speed.errorbar(medians, places, xerr=whiskers, fmt="none", ecolor=DARK, capsize=4, linewidth=1.2)
        for place, one in zip(places, systems, strict=True):
            text = f"{one.median:,.4g} /s\n{one.ratio:.2f} x torch"
            speed.annotate(text, (one.fastest, place), (7, 0), textcoords="offset points", va="center")
        speed.set_xlim(0, 1.35 * max(one.fastest for one in systems))
        speed.set_yticks(list(places), names)
        speed.set_xlabel("texts per second (more is better)\nmedian round; whiskers: slowest and fastest")
        bars = waste.barh(places, [100 * one.waste for one in systems], color=colours, height=0.62)
        waste.bar_label(bars, labels=[f"{one.waste:.1%}" for one in systems], padding=3)
        waste.set_xlim(0, max(1.0, 135 * max(one.waste for one in systems)))
        waste.set_yticks([])
        waste.set_xlabel("waste (less is better)\n% of cells that are padding")
        for axes in (speed, waste):
            axes.set_ylim(len(systems) - 0.4, -0.6)
            axes.tick_params(axis="y", length=0)
        figure.supxlabel(caption, fontsize=7.5, color=DARK)


@dataclass(frozen=True, slots=True, kw_only=True)
class _System:
    """Figures of one system: texts per second, as multiple of torch's, and waste."""

    name: str
    slowest: float
    median: float
    fastest: float
    ratio: float
    waste: float


def _read_report(report: Mapping[str, Any]) -> tuple[list[_System], str, str]:
    """Return the figures of every system, a title, and a caption that says how they were measured."""
    try:
        systems = [
            _System(
                name=name,
                slowest=float(one["texts_per_s"]["min"]),
                median=float(one["texts_per_s"]["median"]),
                fastest=float(one["texts_per_s"]["max"]),
                ratio=float(one["speed_ratio_to_torch"]),
                waste=float(one["waste"]),
            )
            for name, one in report["systems"].items()
        ]
        title = f"{report['task']} {report['split']}, {report['n']:,} texts"
        machine = f"{report['machine']['cpu']}, {report['machine']['usable_cores']} cores"
        caption = [str(report["model"]), f"{machine}; {report['rounds']} rounds in turns, {report['precision']}"]
        caption.append(f"buckets {', '.join(report['ladder'])}")
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise DataError(f"the report lacks a figure ({error!r}); give what EvalReport.to_json() returns") from error
    if not systems:
        raise DataError("the report has no systems; give what EvalReport.to_json() returns")
    return systems, title, "\n".join(_shorten(line, 120) for line in caption)


def _shorten(text: str, width: int) -> str:
    """Return ``text`` in at most ``width`` characters, without its middle if need be."""
    return text if len(text) <= width else f"{text[: width - width // 2 - 3]}...{text[len(text) - width // 2 :]}"


@contextmanager
def _drawing(path: Path) -> Iterator[Figure]:
    """Lend an empty figure; once it is drawn, put it at ``path`` in one step."""
    suffix = path.suffix.lower()
    if suffix not in SUFFIXES:
        raise DataError(f"{path} has the suffix {path.suffix!r}; a chart is written as one of {', '.join(SUFFIXES)}")
    try:
        import matplotlib
        from matplotlib.figure import Figure
    except ImportError as error:
        raise missing_part("matplotlib", "plot", "drawing a chart") from error
    picture = io.BytesIO()
    with _RC_LOCK, matplotlib.rc_context():
        matplotlib.rcdefaults()  # whatever the user's matplotlibrc says
        matplotlib.rcParams.update(_SETTINGS)
        figure = Figure(figsize=SIZE_INCHES, dpi=DPI, layout="constrained")
        yield figure
        metadata = {"Date": None} if suffix == ".svg" else {}
        figure.savefig(picture, format=suffix[1:], dpi=DPI, metadata=metadata)
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(f".{path.name}-{secrets.token_hex(8)}")
    try:
        aside.write_bytes(picture.getvalue())
        os.replace(aside, path)
    finally:
        aside.unlink(missing_ok=True)


def plan_chart_text(
    plan: Plan, *, width: int = 80, arrival_waste: float | None = None, ascii_only: bool = False
) -> str:
    """Return a plan as lines of text: the lengths of the rows, the edges of the buckets, and the waste.

    Args:
        width: columns that no line exceeds, at least ``MIN_WIDTH``.
        arrival_waste: as for ``draw_plan``.
        ascii_only: draw with ``#`` and ``<`` for terminals without block characters.

    Raises:
        InputError: a smaller width.
    """
    if width < MIN_WIDTH:
        raise InputError(f"a chart needs at least {MIN_WIDTH} columns, got width={width}")
    arrow = "<" if ascii_only else "\u25c4"
    bins = bin_rows(plan.histogram, 16)
    labels = [f"{one.low:,}-{one.high:,}" if one.low < one.high else f"{one.high:,}" for one in bins]
    marks = _edge_marks(plan.lengths, bins, width // 4, arrow)
    column = max(map(len, [*labels, "tokens"]))
    lines = _bar_lines(
        [label.rjust(column) for label in labels],
        [one.rows for one in bins],
        [f"{one.rows:,}" for one in bins],
        width=width - max(map(len, marks)),
        ascii_only=ascii_only,
    )
    wastes = _wastes(plan, arrival_waste)
    waste_lines = _bar_lines(
        [name.ljust(max(map(len, wastes))) for name in wastes],
        list(wastes.values()),
        [f"{value:.1%}" for value in wastes.values()],
        width=width,
        ascii_only=ascii_only,
        full=1.0,
    )
    clipped = [_clipped_note(plan)] if plan.clipped else []
    texts = "texts".rjust(len(f"{max(one.rows for one in bins):,}"))
    heading = f"{'tokens'.rjust(column)} {texts}  {arrow} end of a bucket"
    drawn = [f"{line}{mark}" for line, mark in zip(lines, marks, strict=True)]
    parts = [_plan_title(plan), *clipped, "", heading, *drawn, "", "waste: % of cells that are padding", *waste_lines]
    return "\n".join(part[:width].rstrip() for part in parts)


def _edge_marks(lengths: Sequence[int], bins: Sequence[Bin], width: int, arrow: str) -> list[str]:
    """Return, for every bin, the bucket lengths that end in it; for the last one also those beyond."""
    marks = []
    for one in bins:
        inside = [f"{length:,}" for length in lengths if one.low <= length and (length <= one.high or one is bins[-1])]
        marks.append(_shorten(f" {arrow} {' '.join(inside)}", width) if inside else "")
    return marks


def _bar_lines(
    names: Sequence[str],
    values: Sequence[float],
    figures: Sequence[str],
    *,
    width: int,
    ascii_only: bool,
    full: float | None = None,
) -> list[str]:
    """Return a line for every value: its name, its figure and a bar, padded to ``width``.

    Args:
        names: all equally wide.
        full: value of the longest bar there may be; None is the largest of ``values``.
    """
    column = max(5, *map(len, figures))
    room = max(1, width - len(names[0]) - column - 3)
    longest = full or max(values)
    lines = []
    for name, value, figure in zip(names, values, figures, strict=True):
        eighths = max(math.ceil(8 * room * value / longest), 1) if value else 0
        if ascii_only:
            bar = "#" * -(-eighths // 8)
        else:
            bar = "\u2588" * (eighths // 8) + (chr(0x2590 - eighths % 8) if eighths % 8 else "")
        lines.append(f"{name} {figure.rjust(column)} {bar}".ljust(width))
    return lines
