"""Charts hold every row, fit their frame, and are whole files or none."""

from __future__ import annotations

import builtins
import json
import xml.etree.ElementTree as ElementTree
from itertools import pairwise
from pathlib import Path
from typing import Any

import matplotlib
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_bucket.errors import DataError, DependencyError, InputError
from hf_bucket.evaluate import EvalReport, SystemFigures
from hf_bucket.histogram import Histogram
from hf_bucket.planner import Plan, plan
from hf_bucket.report import MIN_WIDTH, bin_rows, draw_evaluation, draw_plan, plan_chart_text, spread

quick = settings(deadline=None, max_examples=60)
rows = st.lists(st.integers(1, 200) | st.integers(1, 2**20), min_size=1, max_size=40)

PLANS = {
    "one-row": plan([7], n_buckets=1),
    "one-token": plan([1], n_buckets=1),
    "one-length": plan([9] * 50, n_buckets=3),
    "one-bucket": plan(range(10, 60), n_buckets=1),
    "bucket-above-the-rows": plan([10, 12, 15], n_buckets=2, max_length=128),
    "clipped": plan([10, 30, 900], n_buckets=2, max_length=64),
    "twenty-buckets": plan(range(5, 300, 3), n_buckets=20),
    "hundred-buckets": plan(range(1000, 1100), n_buckets=100),
    "huge-tail": plan([*range(1, 40), 2**20], n_buckets=8),
}
plans = pytest.mark.parametrize("chosen", PLANS.values(), ids=PLANS)


def png_size(path: Path) -> tuple[int, int]:
    """Width and height in pixels, from the header that the PNG specification puts first."""
    data = path.read_bytes()
    assert data.startswith(b"\x89PNG\r\n\x1a\n\x00\x00\x00\rIHDR")
    assert data.endswith(b"IEND\xaeB`\x82")
    return int.from_bytes(data[16:20], "big"), int.from_bytes(data[20:24], "big")


@pytest.fixture
def evaluation() -> dict[str, Any]:
    """A report as evaluate.py writes it, through JSON."""
    systems = [
        SystemFigures(
            system=name,
            metrics={"accuracy": 0.8},
            label_flips=0,
            flipped_rows=(),
            max_delta_logit=1e-6,
            n=100,
            seconds=seconds,
            speed_ratio=4 / sorted(seconds)[1],
            waste=waste,
            truncated=0,
            loaded_bytes=10**8,
            peak_bytes=10**8,
        )
        for name, seconds, waste in (("torch", (4.0, 3.9, 4.2), 0.0), ("hf_bucket", (2.0, 2.5, 1.9), 0.125))
    ]
    report = EvalReport(
        task="mrpc",
        split="validation",
        n=100,
        model="somebody/a-model-that-costs-$5-$6",
        revision=None,
        labels=("no", "yes"),
        calibration=None,
        ladder=tuple(f"b8_s{length}" for length in range(8, 512, 8)),
        max_length=512,
        rounds=3,
        pipeline_batch_size=32,
        command="",
        versions={},
        machine={"cpu": "a CPU", "usable_cores": 2},
        systems=tuple(systems),
    )
    found: dict[str, Any] = json.loads(json.dumps(report.to_json()))
    return found


@quick
@given(rows, st.integers(1, 60))
def test_bins_are_neighbours_that_hold_every_row_once(lengths: list[int], n_bins: int) -> None:
    bins = bin_rows(Histogram.from_lengths(lengths), n_bins)
    assert [one.rows for one in bins] == [sum(one.low <= n <= one.high for n in lengths) for one in bins]
    assert sum(one.rows for one in bins) == len(lengths)
    assert all(one.high + 1 == following.low for one, following in pairwise(bins))
    assert bins[0].low >= 1


@pytest.mark.parametrize("n_bins", [1, 16, 60])
@plans
def test_there_are_about_as_many_bins_as_asked_for(chosen: Plan, n_bins: int) -> None:
    assert len(bin_rows(chosen.histogram, n_bins)) <= n_bins + 2


@quick
@given(st.lists(st.floats(0, 1), min_size=1, max_size=20).map(sorted), st.floats(0, 0.05))
def test_labels_spread_out_inside_the_frame_in_their_order(wanted: list[float], gap: float) -> None:
    places = spread(wanted, gap)
    assert len(places) == len(wanted)
    assert all(right - left >= gap - 1e-9 for left, right in pairwise(places))
    assert places[0] >= -1e-9
    assert places[-1] <= 1 + 1e-9


def test_labels_with_room_stay_where_they_are_and_crowded_ones_share_the_way() -> None:
    assert spread([0.1, 0.5, 0.9], 0.1) == pytest.approx([0.1, 0.5, 0.9])
    assert spread([0.5, 0.5], 0.2) == pytest.approx([0.4, 0.6])
    assert spread([0.99, 1.0], 0.2) == pytest.approx([0.8, 1.0])
    assert spread([0.0, 0.0], 0.2) == pytest.approx([0.0, 0.2])


@pytest.mark.parametrize("ascii_only", [False, True], ids=["blocks", "ascii"])
@pytest.mark.parametrize("width", [MIN_WIDTH, 80, 200])
@plans
def test_no_line_of_a_text_chart_exceeds_the_width(chosen: Plan, width: int, ascii_only: bool) -> None:
    text = plan_chart_text(chosen, width=width, arrival_waste=0.5, ascii_only=ascii_only)
    assert all(len(line) <= width and line == line.rstrip() for line in text.split("\n"))
    assert all(character.isprintable() for character in text if character != "\n")
    assert text.isascii() or not ascii_only


def test_a_text_chart_is_what_it_is() -> None:
    chosen = plan([3] * 4 + [5] * 3 + [9], n_buckets=2, batch_sizes=[1])
    assert plan_chart_text(chosen, width=40, ascii_only=True) == (
        "8 texts, 2 bucket lengths\n"
        "\n"
        "tokens texts  < end of a bucket\n"
        "     3     4 ######################\n"
        "     4     0\n"
        "     5     3 #################       < 5\n"
        "     6     0\n"
        "     7     0\n"
        "     8     0\n"
        "     9     1 ######                  < 9\n"
        "\n"
        "waste: % of cells that are padding\n"
        "one bucket of 9    50.0% #######\n"
        "planned: 2 lengths 18.2% ###"
    )


def test_a_small_bar_is_not_no_bar() -> None:
    text = plan_chart_text(plan([3] * 100_000 + [4], n_buckets=1), width=60)
    assert "4       1 \u258f" in text


@plans
def test_every_bucket_is_marked_in_a_wide_text_chart(chosen: Plan) -> None:
    text = plan_chart_text(chosen, width=4000)
    marked = [
        name
        for line in text.split("end of a bucket")[1].split("\n")
        if "\u25c4" in line
        for name in line.split("\u25c4")[1].split()
    ]
    assert marked == [f"{length:,}" for length in chosen.lengths]


def test_a_chart_of_too_few_columns_is_refused() -> None:
    with pytest.raises(InputError, match="at least 40 columns, got width=39"):
        plan_chart_text(PLANS["one-row"], width=39)


@plans
def test_every_plan_can_be_drawn(chosen: Plan, tmp_path: Path) -> None:
    draw_plan(chosen, tmp_path / "plan.png", arrival_waste=0.25)
    assert png_size(tmp_path / "plan.png") == (1600, 900)
    assert [path.name for path in tmp_path.iterdir()] == ["plan.png"]


def test_the_same_plan_is_the_same_svg(tmp_path: Path) -> None:
    for name in ("a.svg", "b.SVG"):
        draw_plan(PLANS["twenty-buckets"], tmp_path / name, title="$x$ & <b>")
    assert (tmp_path / "a.svg").read_bytes() == (tmp_path / "b.SVG").read_bytes()
    root = ElementTree.fromstring((tmp_path / "a.svg").read_text(encoding="utf-8"))
    assert (root.tag, root.get("width")) == ("{http://www.w3.org/2000/svg}svg", "576pt")


def test_an_evaluation_can_be_drawn(evaluation: dict[str, Any], tmp_path: Path) -> None:
    for name in ("evaluation.png", "evaluation.svg"):
        draw_evaluation(evaluation, tmp_path / "new folder" / name)
    assert png_size(tmp_path / "new folder" / "evaluation.png") == (1600, 900)


@pytest.mark.parametrize("broken", [{}, {"systems": {}}, {"systems": {"torch": {}}}, {"systems": 3}], ids=str)
def test_a_report_without_figures_is_refused(
    broken: dict[str, Any], evaluation: dict[str, Any], tmp_path: Path
) -> None:
    with pytest.raises(DataError, match=r"the report .*; give what EvalReport\.to_json\(\) returns"):
        draw_evaluation({**evaluation, **broken} if broken else {}, tmp_path / "x.png")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["plan.pdf", "plan", ".png"])
def test_another_suffix_is_refused_with_those_that_are_known(name: str, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"suffix '.*'; a chart is written as one of \.png, \.svg"):
        draw_plan(PLANS["one-row"], tmp_path / name)


def test_a_failure_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target = tmp_path / "plan.svg"
    target.write_text("old")

    def fail(*_: object) -> None:
        raise OSError("disk full")

    monkeypatch.setattr("hf_bucket.report.os.replace", fail)
    with pytest.raises(OSError, match="disk full"):
        draw_plan(PLANS["one-row"], target)
    assert [path.read_text() for path in tmp_path.iterdir()] == ["old"]


def test_drawing_leaves_the_settings_of_the_process_alone_and_heeds_none(tmp_path: Path) -> None:
    draw_plan(PLANS["one-row"], tmp_path / "a.svg")
    with matplotlib.rc_context({"font.size": 30.0, "text.usetex": True}):
        before = dict(matplotlib.rcParams)
        draw_plan(PLANS["one-row"], tmp_path / "b.svg")
        assert dict(matplotlib.rcParams) == before
    assert (tmp_path / "a.svg").read_bytes() == (tmp_path / "b.svg").read_bytes()


def test_without_matplotlib_the_error_names_the_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real_import = builtins.__import__

    def refuse(name: str, *args: Any) -> Any:
        if name.startswith("matplotlib"):
            raise ImportError(name=name)
        return real_import(name, *args)

    monkeypatch.setattr(builtins, "__import__", refuse)
    with pytest.raises(DependencyError, match=r'drawing a chart needs matplotlib.*pip install "hf-bucket\[plot\]"'):
        draw_plan(PLANS["one-row"], tmp_path / "x.png")
