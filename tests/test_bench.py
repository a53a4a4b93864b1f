"""The benchmark: figures, turns, workers that fail, results that are kept."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import WORDS, text_of, tiny_tokenizer
from hypothesis import given
from hypothesis import strategies as st

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "benchmarks"))

import bench
import bench_report
import bench_turns
import record
import singles
import worker
from bench_data import DataSet, Sizes, flat_texts, lengths_of
from bench_environments import read_environments
from bench_figures import Measured, Reference, Work, figures, paired, percentile, rates, table
from bench_systems import OURS, PROJECT, SYSTEMS, Place, ProcessWorker, System, WorkerError
from bench_turns import Progress, Request

LABELS = ("a", "b", "a")
LOGITS = np.array([[1, 0], [0, 1], [1, 0]], dtype=np.float32)
TEXTS = ("one text", "another", "the third")


def measured(*seconds: float, **changes: Any) -> Measured:
    """Three texts of two tokens each, classified as the reference does it."""
    base = Measured(
        seconds=seconds,
        singles=(0.001, 0.002, 0.003),
        logits=LOGITS,
        labels=LABELS,
        cells=8,
        memory={"peak_bytes": 2_000_000},
        load_s=(1.0, 3.0),
        prepare_s=None,
        first_pass_s=0.5,
        versions={"python": "3.11", "torch": "2.13"},
    )
    return replace(base, **changes)


REFERENCE = Reference(logits=LOGITS, labels=LABELS)
WORK = Work(texts=3, tokens=6, flops=4_000_000_000, peak_gflops=10.0)


# --- figures -------------------------------------------------------------------------------------------------


def test_a_ratio_above_one_means_that_hf_bucket_is_faster() -> None:
    found = figures(measured(2, 4, 6), measured(1, 1, 2), reference=REFERENCE, work=WORK)
    assert found["ratio"] == 4.0  # of the medians, 4 and 1
    assert found["paired_ratio"] == {"median": 3.0, "min": 2.0, "max": 4.0, "n": 3}


def test_figures_count_real_tokens_and_useful_work_only() -> None:
    found = figures(measured(2, 4, 6), None, reference=REFERENCE, work=WORK)
    assert found["real_tokens_per_s"] == {"median": 1.5, "min": 1.0, "max": 3.0, "n": 3}
    assert (found["useful_gflops"], found["share_of_peak"]) == (1.0, 0.1)
    assert found["waste"] == 0.25
    assert found["ratio"] is None


def test_a_flipped_label_and_a_moved_logit_show() -> None:
    moved = measured(1, labels=("a", "a", "a"), logits=LOGITS + np.float32([[0, 0], [0, -0.25], [0, 0]]))
    found = figures(moved, None, reference=REFERENCE, work=WORK)
    assert (found["label_flips"], found["max_delta_logit"]) == (1, 0.25)


@given(seconds=st.lists(st.floats(1e-6, 1e6), min_size=1))
def test_a_system_is_as_fast_as_itself_in_every_round(seconds: list[float]) -> None:
    assert paired(seconds, seconds) == {"median": 1.0, "min": 1.0, "max": 1.0, "n": len(seconds)}
    speeds = rates(10, seconds)
    assert speeds["min"] <= speeds["median"] <= speeds["max"]


@pytest.mark.parametrize(
    ("percent", "expected"), [(50, 50), (99, 99), (100, 100), (0.1, 1)], ids=["median", "p99", "largest", "smallest"]
)
def test_a_percentile_is_a_value_that_was_measured(percent: float, expected: int) -> None:
    assert percentile(range(100, 0, -1), percent) == expected


def test_useful_operations_are_those_torch_counts_without_padding(tiny_bert: Path) -> None:
    import torch
    from torch.utils.flop_counter import FlopCounterMode
    from transformers import AutoModelForSequenceClassification

    model = AutoModelForSequenceClassification.from_pretrained(tiny_bert, attn_implementation="eager").eval()
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        for length in (5, 17):
            model(input_ids=torch.ones((1, length), dtype=torch.int64))
    assert Sizes.of(tiny_bert).flops([5, 17]) == counter.get_total_flops()


def result_of(systems: Mapping[str, Any], missing: Mapping[str, str]) -> dict[str, Any]:
    return {
        "set": "mrpc",
        "model": "minilm",
        "n": 3,
        "real_tokens": 6,
        "max_length": 64,
        "rounds": 3,
        "processor": "a processor",
        "usable_cores": 2,
        "python": "3.11",
        "versions": {"hf-bucket": "0.1.0"},
        "command": "python benchmarks/bench.py",
        "peak_gflops": {"numpy": 10.0},
        "systems": systems,
        "not_measured": missing,
    }


def two_systems() -> dict[str, Any]:
    ours, rival = measured(1, 1, 2), measured(2, 4, 6, cells=None)
    return {
        name: {"environment": environment, **figures(one, ours, reference=REFERENCE, work=WORK)}
        for name, environment, one in (("rival", "st", rival), (OURS, "project", ours))
    }


def test_the_table_has_the_fastest_first_and_says_who_is_missing() -> None:
    lines = table(result_of(two_systems(), {"other": "its environment st is missing"})).splitlines()
    rows = [line for line in lines if line.startswith("| ")][2:]
    assert [row.split(" | ")[0] for row in rows] == [f"| **{OURS}**", "| rival"]
    assert " | 4.00 | 3.00 (2.00-4.00) | " in rows[1]
    assert len({row.count(" | ") for row in rows}) == 1
    assert lines[-3:-1] == [f"- environment {name}: python 3.11, torch 2.13" for name in ("project", "st")]
    assert lines[-1] == "- not measured: other: its environment st is missing"


def test_the_commit_that_was_measured_is_told_where_there_is_one(monkeypatch: pytest.MonkeyPatch) -> None:
    assert "; hf_bucket 0.1.0 at abc1234. `python" in table({**result_of({}, {}), "commit": "abc1234"})
    assert "; hf_bucket 0.1.0. `python" in table({**result_of({}, {}), "commit": ""})
    assert re.fullmatch(r"([0-9a-f]{7,}\+?)?", record.circumstances()["commit"])
    monkeypatch.setattr("sys.argv", ["benchmarks/ladder_cost.py", "--model", "/home/someone/models/mini"])
    assert record.circumstances()["command"] == "python benchmarks/ladder_cost.py --model …/mini"
    monkeypatch.setenv("PATH", "")
    assert record.circumstances()["commit"] == ""


def test_a_page_keeps_what_was_written_by_hand(tmp_path: Path) -> None:
    results, page = tmp_path / "results", tmp_path / "page.md"
    results.mkdir()
    path = results / "bench-mrpc-minilm.json"
    path.write_text(json.dumps(result_of(two_systems(), {})))
    page.write_text(f"# By hand\n\n{bench_report.BEGIN}\nold\n{bench_report.END}\n\nend\n")
    bench_report.write_page([path], page)
    once = page.read_text()
    bench_report.write_page([path], page)
    assert page.read_text() == once
    assert once.startswith(f"# By hand\n\n{bench_report.BEGIN}\n\n## mrpc, minilm\n")
    assert once.endswith(f"{bench_report.END}\n\nend\n")
    assert "old" not in once
    assert "(results/bench-mrpc-minilm.png)" in once


def test_a_page_without_markers_is_left_alone(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text("by hand")
    with pytest.raises(ValueError, match=r"page\.md must have one line"):
        bench_report.write_page([], page)
    assert page.read_text() == "by hand"


def test_a_chart_is_drawn(tmp_path: Path) -> None:
    bench_report.draw(result_of(two_systems(), {}), tmp_path / "chart.png")
    assert (tmp_path / "chart.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("no module at /home/me/x/site.py, line 3", "no module at …/site.py, line 3"),
        ("--models ~/shared/models", "--models …/models"),
        ("'C:\\Users\\me\\model'", "'…/model'"),
        ("benchmarks/bench.py and texts/s", "benchmarks/bench.py and texts/s"),
        ("see https://download.pytorch.org/whl/cpu", "see https://download.pytorch.org/whl/cpu"),
    ],
    ids=["posix", "home", "windows", "relative", "address"],
)
def test_no_folder_of_a_machine_is_written_down(text: str, expected: str) -> None:
    assert record.without_folders({"reasons": [text]}) == {"reasons": [expected]}


# --- data ----------------------------------------------------------------------------------------------------


@given(n=st.integers(1, 6), length=st.integers(3, 40), words=st.lists(st.sampled_from(WORDS), min_size=40))
def test_flat_texts_have_one_length_and_are_always_the_same(n: int, length: int, words: list[str]) -> None:
    tokenizer = tiny_tokenizer()
    texts = flat_texts(words, n, length=length, tokenizer=tokenizer)
    assert lengths_of(tokenizer, texts, max_length=512) == [length] * n
    assert texts == flat_texts(words, n, length=length, tokenizer=tokenizer)


def test_a_word_too_long_for_the_rest_of_a_flat_text_is_left_out() -> None:
    words = ["w1 w2 w3", "w4"]  # as a subword tokenizer sees them: of three tokens, and of one
    texts = flat_texts(words, 2, length=8, tokenizer=tiny_tokenizer())
    assert texts == ("w1 w2 w3 w4 w4 w4", "w1 w2 w3 w4 w4 w4")


def test_lengths_are_those_after_truncation() -> None:
    pair = (text_of(9), text_of(9))
    assert lengths_of(tiny_tokenizer(), [text_of(3), text_of(60), pair], max_length=20) == [5, 20, 20]


def test_words_that_cannot_make_a_flat_text_are_an_error() -> None:
    with pytest.raises(ValueError, match="31 words made 64 tokens, expected 65"):
        flat_texts(["w1 w2"], 1, length=65, tokenizer=tiny_tokenizer())


# --- turns ---------------------------------------------------------------------------------------------------


class FakeWorker:
    """Answers at once; writes down what it was asked. ``dies_at`` names the command it fails at."""

    def __init__(self, name: str, journal: list[tuple[str, str]], dies_at: str) -> None:
        self._name, self._journal, self._dies_at = name, journal, dies_at

    def ask(self, do: str, **message: Any) -> dict[str, Any]:
        self._journal.append((do, self._name))
        if do == self._dies_at:
            raise WorkerError("Boom: no /home/me/model here")
        if do == "verify":
            np.save(message["path"], LOGITS)
        if do == "prepare":
            Path(message["prepared"]).mkdir(parents=True)
        return {
            "seconds": [0.01] * len(message["rows"]) if do == "single" else 1.0,
            "memory": {"peak_bytes": len(self._journal)},
            "versions": {"torch": "2.13"},
            "labels": list(LABELS),
            "cells": 8,
            "gflops": {"numpy": 10.0},
        }

    def close(self) -> None:
        self._journal.append(("close", self._name))


class Fakes:
    """Starts fake workers and keeps their journal."""

    def __init__(self, **dies_at: str) -> None:
        self.journal: list[tuple[str, str]] = []
        self._dies_at = dies_at

    def __call__(self, system: System) -> FakeWorker:
        return FakeWorker(system.name, self.journal, self._dies_at.get(system.name, ""))

    def asked(self, do: str) -> list[str]:
        return [name for command, name in self.journal if command == do]


def system(name: str, **changes: Any) -> System:
    return System(name=name, engine="torch", **changes)


NAMES = (OURS, "one", "two", "three")


@pytest.fixture
def request_of_three(tiny_bert: Path, tmp_path: Path) -> Request:
    return Request(
        data=DataSet(name="mrpc", texts=TEXTS, calibration=()),
        model=tiny_bert,
        model_name="tiny",
        max_length=64,
        lengths=(2, 2, 2),
        rounds=5,
        single_rows=(2, 0, 1),
        again=False,
        seed=0,
        build=tmp_path,
    )


def quiet(*_: object) -> None:
    """Say nothing."""


def test_every_round_has_every_system_once_in_an_order_of_its_own(request_of_three: Request) -> None:
    start = Fakes()
    bench.measure(request_of_three, [system(name) for name in NAMES], start, say=quiet)
    runs = [name for name in start.asked("run") if name in NAMES]
    rounds = [tuple(runs[at : at + 4]) for at in range(0, 20, 4)]
    assert all(sorted(one) == sorted(NAMES) for one in rounds)
    assert len(set(rounds)) > 1


def test_the_reference_is_gone_before_anything_is_timed_and_every_process_is_ended(
    request_of_three: Request,
) -> None:
    start = Fakes()
    bench.measure(request_of_three, [system(name) for name in NAMES], start, say=quiet)
    reference = bench.REFERENCE.name
    asked = [(do, reference) for do in ("peak", "close", "load", "verify", "run", "close")]
    assert start.journal[:6] == asked
    assert start.journal[-2:] == asked[:2]  # the machine's speed once more, at the end
    assert sorted(start.asked("close")) == sorted([*[reference] * 3, *NAMES])


def test_single_requests_are_dealt_over_the_rounds(request_of_three: Request) -> None:
    result = bench.measure(request_of_three, [system(OURS)], Fakes(), say=quiet)
    assert result["systems"][OURS]["single_n"] == 3


@pytest.mark.parametrize("command", ["load", "verify", "run", "single"])
def test_a_dead_worker_costs_one_row(request_of_three: Request, command: str) -> None:
    start = Fakes(two=command)
    result = bench.measure(request_of_three, [system(name) for name in NAMES], start, say=quiet)
    assert sorted(result["systems"]) == sorted([OURS, "one", "three"])
    assert result["not_measured"] == {"two": "Boom: no …/model here"}
    assert all(one["paired_ratio"]["n"] == 5 for one in result["systems"].values())
    assert start.asked(command).count("two") == 1


def test_without_ours_the_others_have_figures_but_no_ratio(request_of_three: Request) -> None:
    result = bench.measure(request_of_three, [system(OURS), system("one")], Fakes(hf_bucket="run"), say=quiet)
    assert result["systems"]["one"]["ratio"] is None


def test_an_export_is_made_once_in_a_process_that_is_not_measured(request_of_three: Request) -> None:
    start = Fakes()
    systems = [system("one", prepared="export"), system("two", prepared="export")]
    result = bench.measure(request_of_three, systems, start, say=quiet)
    assert start.journal[6:9] == [("prepare", "one"), ("close", "one"), ("load", "one")]
    assert start.asked("prepare") == ["one"]
    assert [result["systems"][name]["prepare_s"] for name in ("one", "two")] == [1.0, None]
    bench.measure(request_of_three, systems, start, say=quiet)
    assert start.asked("prepare") == ["one"]
    bench.measure(replace(request_of_three, again=True), systems, start, say=quiet)
    assert start.asked("prepare") == ["one", "one"]


def test_where_memory_is_short_one_system_is_loaded_at_a_time(
    request_of_three: Request, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bench_turns, "free_bytes", lambda: 0)
    start = Fakes()
    systems = [system(name) for name in NAMES]
    result = bench.measure(request_of_three, systems, start, reserve_bytes=1, say=quiet)
    loaded: set[str] = set()
    for command, name in start.journal:
        loaded = loaded | {name} if command == "load" else loaded - {name} if command == "close" else loaded
        assert len(loaded) <= 1
    # a process that was loaded again has warmed up before it is timed
    commands = [command for command, name in start.journal if name == "one" and command in ("load", "warm", "run")]
    assert commands[:3] == ["load", "load", "warm"]
    assert commands.count("warm") == commands.count("load") - 1
    assert result["systems"]["one"]["load_s"]["n"] > 1


def test_progress_says_what_is_left(capsys: pytest.CaptureFixture[str]) -> None:
    times = iter([0.0, 0.0, 60.0])
    progress = Progress("mrpc", 3, 2, clock=lambda: next(times))
    progress("one", "loaded", 0, 3)
    progress("one", "1.00 s", 1, 3)
    loading, turn = capsys.readouterr().err.splitlines()
    assert loading == "[mrpc] loading 1 of 3: one: loaded; then 2 rounds"
    assert turn == "[mrpc] round 1 of 2: one: 1.00 s; 5 turns left, about 5 min"


# --- results that are kept -----------------------------------------------------------------------------------


SETTINGS = {"limit": None, "rounds": 7}


def test_a_result_of_the_same_systems_and_settings_is_kept(tmp_path: Path) -> None:
    path = tmp_path / "bench.json"
    assert not bench.is_done(path, systems=["one"], settings=SETTINGS)
    path.write_text(json.dumps({**SETTINGS, "systems": {"one": {}}, "not_measured": {"two": "why"}}))
    assert bench.is_done(path, systems=["one", "two"], settings=SETTINGS)


@pytest.mark.parametrize(
    ("systems", "settings", "message"),
    [
        (["one"], {"limit": 24, "rounds": 7}, "measured with {'limit': None, 'rounds': 7}; pass --again"),
        (["one", "two"], SETTINGS, "measured without two; pass --again"),
    ],
    ids=["other settings", "more systems"],
)
def test_another_result_is_never_replaced_silently(
    tmp_path: Path, systems: list[str], settings: dict[str, Any], message: str
) -> None:
    path = tmp_path / "bench.json"
    path.write_text(json.dumps({**SETTINGS, "systems": {"one": {}}, "not_measured": {}}))
    with pytest.raises(ValueError, match=message):
        bench.is_done(path, systems=systems, settings=settings)


def test_without_the_assets_the_error_names_the_variable(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv(bench.ASSETS, raising=False)
    with pytest.raises(SystemExit, match="2"):
        bench.parse(["--data", "mrpc"])
    assert "set HF_BUCKET_TEST_ASSETS to the folder with models/ and data/" in capsys.readouterr().err


def test_an_unknown_system_is_an_error_that_lists_the_known_ones() -> None:
    assert [one.name for one in bench.chosen(["torch, sorted", OURS])][-2:] == [
        "torch, sorted",
        "torch, sorted, batch 8",
    ]
    assert [one.name for one in bench.chosen(["hf_bucket"], ["hf_bucket int8", "hf_bucket mode"])] == [
        OURS,
        "hf_bucket provider=CPUExecutionProvider",
    ]
    for arguments in ((["nothing"], None), (None, ["nothing"])):
        with pytest.raises(ValueError, match="no system begins with 'nothing'; they are hf_bucket; "):
            bench.chosen(*arguments)


def test_every_system_has_a_name_an_engine_and_an_environment_that_exist() -> None:
    assert len({one.name for one in SYSTEMS}) == len(SYSTEMS)
    assert {one.engine for one in SYSTEMS} == set(worker.ENGINES)
    assert all(one.engine in worker.PREPARES for one in SYSTEMS if one.prepared)
    if sys.version_info >= (3, 11):
        assert {one.environment for one in SYSTEMS} - {PROJECT} == set(read_environments())


# --- workers -------------------------------------------------------------------------------------------------


def job_of(model: Path, data: Path, **options: Any) -> dict[str, Any]:
    data.write_text(json.dumps({"texts": [text_of(n) for n in (9, 2, 30, 5, 70)], "calibration": []}))
    return {
        "engine": "torch",
        "model": str(model),
        "prepared": "",
        "data": str(data),
        "max_length": 64,
        "full_length": 64,
        "threads": 1,
        "options": options,
    }


@pytest.mark.parametrize(
    ("options", "cells"),
    [
        ({"batch_size": 1, "sort": False}, 11 + 4 + 32 + 7 + 64),
        ({"batch_size": 2}, 2 * 7 + 2 * 32 + 64),
        ({"batch_size": 4, "sort": False, "pad": "all"}, 5 * 64),
    ],
    ids=["one at a time", "sorted", "padded alike"],
)
def test_torch_gives_the_same_labels_however_it_batches(
    tiny_bert: Path, tmp_path: Path, options: dict[str, Any], cells: int
) -> None:
    runs = []
    for one in ({"batch_size": 1, "sort": False}, options):
        server = worker.Server()
        server.answer({"do": "load", **job_of(tiny_bert, tmp_path / "texts.json", **one)})
        found = server.answer({"do": "verify", "path": str(tmp_path / "logits.npy")})
        runs.append((server.answer({"do": "run"})["labels"], np.load(tmp_path / "logits.npy"), found["cells"]))
    assert runs[1][0] == runs[0][0]
    np.testing.assert_allclose(runs[1][1], runs[0][1], atol=1e-4)
    assert runs[1][2] == cells


@pytest.fixture
def start_process(tmp_path: Path) -> Any:
    """Start real processes; they are ended afterwards."""
    started: list[ProcessWorker] = []

    def start(timeout_s: float = 60.0) -> ProcessWorker:
        one = ProcessWorker(Path(sys.executable), ours=False, log=tmp_path / "log", cache=tmp_path, timeout_s=timeout_s)
        started.append(one)
        return one

    yield start
    for one in started:
        one.close()


def test_a_process_answers_after_a_failed_command(start_process: Callable[..., ProcessWorker]) -> None:
    process = start_process()
    for _ in range(2):
        with pytest.raises(WorkerError, match="ValueError: unknown command 'dance'"):
            process.ask("dance")


def test_a_process_that_ends_or_hangs_is_an_error_that_says_when(start_process: Callable[..., ProcessWorker]) -> None:
    with pytest.raises(WorkerError, match="ended with code 0 during 'quit'"):
        start_process().ask("quit")
    with pytest.raises(WorkerError, match=r"ended with code -9 during 'dance' \(or took over 0 s\)"):
        start_process(timeout_s=0.0).ask("dance")


def test_a_missing_environment_names_the_command_that_builds_it(tmp_path: Path) -> None:
    place = Place(environments=tmp_path, build=tmp_path)
    with pytest.raises(WorkerError, match="environment st is missing; run make bench-environments"):
        place.start(system("one", environment="st"))


# --- single requests -----------------------------------------------------------------------------------------


def test_every_process_of_every_system_answers_the_same_requests_in_turns(request_of_three: Request) -> None:
    start = Fakes()
    request = replace(request_of_three, single_rows=tuple(range(7)), seed=1)
    found = singles.measure(request, [system(OURS), system("one")], start, processes=2)
    assert found == {OURS: [[0.01] * 7] * 2, "one": [[0.01] * 7] * 2}
    assert [start.journal.count((do, "one")) for do in ("load", "single", "close")] == [2, 2 * 3, 2]
    timed = start.asked("single")[4:]
    assert [sorted(timed[turn : turn + 4]) for turn in (0, 4)] == [[OURS, OURS, "one", "one"]] * 2
    assert timed[:4] != timed[4:], "in an order of their own"
    assert json.loads(request.texts_path.read_text())["texts"] == list(TEXTS)


def test_a_process_that_fails_leaves_none_behind(request_of_three: Request) -> None:
    start = Fakes(one="single")
    with pytest.raises(WorkerError, match="Boom"):
        singles.measure(request_of_three, [system(OURS), system("one")], start, processes=2)
    assert len(start.asked("close")) == len(start.asked("load")) == 2


def test_what_single_requests_need_is_exported_once(request_of_three: Request) -> None:
    start = Fakes()
    singles.measure(request_of_three, [system(OURS), system("one", prepared="exported")], start, processes=3)
    assert start.asked("prepare") == ["one"]


def test_single_requests_are_compared_text_by_text() -> None:
    found = singles.figures(
        {
            OURS: [[0.001, 0.010], [0.003, 0.010], [0.002, 0.040]],
            "one": [[0.004, 0.005], [0.005, 0.005], [0.003, 0.005]],
        }
    )
    assert found["one"]["x_hf_bucket"] == {"median": 1.25, "min": 0.5, "max": 2.0, "n": 2}
    assert found["one"]["p50_ms"] == pytest.approx(5.0)
    assert found[OURS]["processes_p50_ms"] == pytest.approx([5.5, 6.5, 21.0])
    assert found[OURS]["x_hf_bucket"] == {"median": 1.0, "min": 1.0, "max": 1.0, "n": 2}


def test_single_requests_without_ours_are_an_error(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["singles.py", "--only", "optimum", "--models", "m", "--data-dir", "d"])
    assert singles.main() == 1
    assert "without hf_bucket there is nothing to compare with" in capsys.readouterr().err


def test_what_was_exported_of_one_model_is_never_taken_for_another(request_of_three: Request) -> None:
    """MRPC and SST-2 have models of one name, of different weights."""
    exported = system("one", prepared="exported")
    other = replace(request_of_three, model=request_of_three.model.with_name("another"))
    assert request_of_three.job(exported)["prepared"] != other.job(exported)["prepared"]
