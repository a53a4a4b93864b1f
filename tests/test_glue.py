"""GLUE data, label names, and the evaluation of three systems, with fakes in their place and once for real."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from multiprocessing import Pipe
from pathlib import Path
from threading import Thread

import numpy as np
import pyarrow
import pyarrow.csv
import pyarrow.parquet
import pytest
from conftest import save_tiny_bert, text_of
from hypothesis import given
from hypothesis import strategies as st

import hf_bucket
from hf_bucket.cli import main
from hf_bucket.errors import DataError, DependencyError, InputError, ModelError
from hf_bucket.evaluate import EvalRequest
from hf_bucket.glue import GLUE_TASKS, align_labels, evaluate, expand_split, get_glue_task, load_task, read_label_names
from hf_bucket.ladder import make_ladder
from hf_bucket.systems import (
    BucketEngine,
    Job,
    Loaded,
    Pass,
    PipelineEngine,
    TorchEngine,
    resident_bytes,
    run_pass,
    serve,
    start_worker,
)

REPOSITORY = Path(__file__).parents[1]
MNLI = ("entailment", "neutral", "contradiction")
MRPC_ROWS = {
    "sentence1": ["a b", "c", "d e f", "g"],
    "sentence2": ["b", "c c", "d", "h"],
    "label": [1, 0, 1, 0],
    "idx": [0, 1, 2, 3],
}


def make_checkpoint(folder, names):
    """Write a config whose label names stand in another order than their indices."""
    id2label = {str(index): name for index, name in reversed(list(enumerate(names)))}
    (folder / "config.json").write_text(json.dumps({"id2label": id2label}))


def write_parquet(path, columns):
    path.parent.mkdir(parents=True, exist_ok=True)
    pyarrow.parquet.write_table(pyarrow.table(columns), path)


def write_jsonl(path, columns):
    rows = zip(*columns.values(), strict=True)
    path.write_text("\n".join(json.dumps(dict(zip(columns, row, strict=True))) for row in rows))


def write_csv(path, columns):
    pyarrow.csv.write_csv(pyarrow.table(columns), path)


# The tasks


def test_all_nine_tasks_are_there_with_columns_and_labels():
    assert [task.name for task in GLUE_TASKS] == ["cola", "sst2", "mrpc", "qqp", "stsb", "mnli", "qnli", "rte", "wnli"]
    assert get_glue_task("mnli").labels == MNLI
    assert get_glue_task("wnli").labels == get_glue_task("rte").labels[::-1] == ("not_entailment", "entailment")
    assert [task.name for task in GLUE_TASKS if not task.labels] == ["stsb"]
    assert [task.name for task in GLUE_TASKS if len(task.columns) == 1] == ["cola", "sst2"]


def test_an_unknown_task_is_refused():
    with pytest.raises(DataError, match="task 'snli' is not in GLUE; use one of cola, sst2"):
        get_glue_task("snli")


@pytest.mark.parametrize(
    ("task", "split", "expected"),
    [
        pytest.param("mrpc", "validation", ("validation",), id="as it is"),
        pytest.param("mnli", "validation", ("validation_matched", "validation_mismatched"), id="both halves"),
        pytest.param("mnli", "validation_mismatched", ("validation_mismatched",), id="one half"),
        pytest.param("mrpc", "validation+test", ("validation", "test"), id="joined"),
        pytest.param(
            "mnli", "validation+validation_matched", ("validation_matched", "validation_mismatched"), id="once"
        ),
    ],
)
def test_a_split_name_stands_for_these_splits(task, split, expected):
    assert expand_split(get_glue_task(task), split) == expected


# Labels by name


@given(order=st.permutations(range(3)), style=st.sampled_from([str, str.upper, str.title]))
def test_labels_are_aligned_by_name_whatever_their_order_and_case(order, style):
    names = {index: style(MNLI[label]) for index, label in enumerate(order)}
    assert align_labels(names, MNLI) == tuple(order)


@pytest.mark.parametrize(
    ("names", "labels", "expected"),
    [
        pytest.param(["CONTRADICTION", "NEUTRAL", "ENTAILMENT"], MNLI, (2, 1, 0), id="roberta-large-mnli"),
        pytest.param(["contradiction", "entailment", "neutral"], MNLI, (2, 0, 1), id="another checkpoint"),
        pytest.param(["POSITIVE", "NEGATIVE"], ("negative", "positive"), (1, 0), id="case"),
        pytest.param(["not equivalent", "Equivalent"], ("not_equivalent", "equivalent"), (0, 1), id="a space"),
        pytest.param(["entailment", "not-entailment"], ("not_entailment", "entailment"), (1, 0), id="a hyphen"),
        pytest.param(["LABEL_0"], (), (0,), id="a regression has one output of any name"),
    ],
)
def test_label_names_are_matched(names, labels, expected):
    assert align_labels(dict(enumerate(names)), labels) == expected


def test_a_label_order_replaces_names_that_say_nothing():
    names = {0: "LABEL_0", 1: "LABEL_1", 2: "LABEL_2"}
    assert align_labels(names, MNLI, ["Neutral", "contradiction", "entailment"]) == (1, 2, 0)


@pytest.mark.parametrize(
    ("names", "labels", "order", "message"),
    [
        pytest.param(
            ["LABEL_0", "LABEL_1", "LABEL_2"],
            MNLI,
            None,
            r"\(LABEL_0, LABEL_1, LABEL_2\) do not say which label is which; "
            r"list the task's labels \(entailment, neutral, contradiction\) in the model's order with --label-order",
            id="LABEL_0",
        ),
        pytest.param(["negative", "label 1"], ("negative", "positive"), None, "do not say which", id="one of them"),
        pytest.param(
            ["bad", "good"],
            ("negative", "positive"),
            None,
            r"the model's labels are bad, good, which are not the task's; list the task's labels \(negative, pos",
            id="other names",
        ),
        pytest.param(
            ["Negative", "negative"], ("negative", "positive"), None, "which are not the task's", id="doubled"
        ),
        pytest.param(
            ["a", "b"], MNLI, None, r"has 2 outputs \(a, b\); this task needs the labels entailment, ", id="too few"
        ),
        pytest.param(
            ["a", "b"], (), None, r"has 2 outputs \(a, b\); this task needs one output", id="not a regression"
        ),
        pytest.param(
            ["a"], (), ["a"], "label_order is a, but a regression has no labels; drop it", id="order of nothing"
        ),
        pytest.param(
            ["LABEL_0", "LABEL_1"],
            ("negative", "positive"),
            ["negative", "negative"],
            "label_order is negative, negative, which are not the task's",
            id="an order that doubles",
        ),
        pytest.param(
            ["LABEL_0", "LABEL_1"], ("negative", "positive"), ["positive"], "label_order is positive, which", id="short"
        ),
        pytest.param(
            ["LABEL_0", "LABEL_1"],
            ("negative", "positive"),
            ["negative", "positive", "positive"],
            "label_order is negative, positive, positive, which",
            id="long",
        ),
    ],
)
def test_label_names_that_cannot_be_matched_are_refused(names, labels, order, message):
    with pytest.raises(DataError, match=message):
        align_labels(dict(enumerate(names)), labels, order)


def test_label_names_come_from_the_config_in_the_order_of_the_logits(tmp_path):
    make_checkpoint(tmp_path, ["b", "a"])
    assert read_label_names(str(tmp_path)) == {0: "b", 1: "a"}


def test_a_config_without_names_has_those_of_transformers(tmp_path):
    (tmp_path / "config.json").write_text('{"num_labels": 3}')
    assert read_label_names(str(tmp_path)) == {0: "LABEL_0", 1: "LABEL_1", 2: "LABEL_2"}


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        pytest.param("bucket_config.json", "{}", "is a compiled artifact without torch weights", id="artifact"),
        pytest.param("config.json", "{", "cannot read the config.json of", id="damaged"),
        pytest.param("other.json", "{}", "cannot read the config.json of .*No such file", id="no config"),
    ],
)
def test_a_folder_that_is_no_checkpoint_is_refused(tmp_path, file, content, message):
    (tmp_path / file).write_text(content)
    with pytest.raises(ModelError, match=message):
        read_label_names(str(tmp_path))


def test_a_model_that_is_nowhere_is_refused(tmp_path):
    with pytest.raises(ModelError, match=r"cannot read the config\.json of .*missing"):
        read_label_names(str(tmp_path / "missing"))


# Texts and labels


@pytest.mark.parametrize("place", ["mrpc/validation", "validation"])
@pytest.mark.parametrize(("suffix", "write"), [("parquet", write_parquet), ("csv", write_csv), ("jsonl", write_jsonl)])
def test_a_split_is_read_from_a_folder(tmp_path, place, suffix, write):
    path = tmp_path / f"{place}.{suffix}"
    path.parent.mkdir(exist_ok=True)
    write(path, MRPC_ROWS)
    data = load_task("mrpc", "validation", data_dir=tmp_path)
    assert data.texts == [("a b", "b"), ("c", "c c"), ("d e f", "d"), ("g", "h")]
    assert data.labels.tolist() == [1, 0, 1, 0]
    assert (data.task.name, data.split, data.labels.dtype) == ("mrpc", "validation", np.int64)


def test_the_task_folder_comes_before_the_folder_itself(tmp_path):
    write_parquet(tmp_path / "mrpc" / "test.parquet", MRPC_ROWS)
    write_parquet(tmp_path / "test.parquet", {**MRPC_ROWS, "label": [0, 0, 0, 0]})
    assert load_task("mrpc", "test", data_dir=tmp_path).labels.tolist() == [1, 0, 1, 0]


def test_a_limit_takes_the_first_rows(tmp_path):
    write_parquet(tmp_path / "validation.parquet", MRPC_ROWS)
    assert load_task("mrpc", "validation", data_dir=tmp_path, limit=2).texts == [("a b", "b"), ("c", "c c")]
    assert len(load_task("mrpc", "validation", data_dir=tmp_path, limit=9).texts) == 4


@pytest.mark.parametrize(
    "texts",
    [
        pytest.param(["1", "2"], id="numbers"),
        pytest.param(["", "NA", "null", "nan"], id="missing values"),
        pytest.param(['a "quoted", word', "'"], id="quotes"),
        pytest.param(["two\nlines\nor three"] * 60_000, id="lines in more than a block"),
    ],
)
def test_a_text_of_a_csv_stays_a_text_when_it_looks_like_something_else(tmp_path, texts):
    write_csv(tmp_path / "validation.csv", {"sentence": texts, "label": [0] * len(texts)})
    assert load_task("sst2", "validation", data_dir=tmp_path).texts == texts


def test_a_regression_keeps_its_fractions(tmp_path):
    write_parquet(tmp_path / "validation.parquet", {**MRPC_ROWS, "label": [0.0, 2.5, 5.0, 3.75]})
    assert load_task("stsb", "validation", data_dir=tmp_path).labels.tolist() == [0.0, 2.5, 5.0, 3.75]


@pytest.mark.parametrize(
    ("task", "columns", "message"),
    [
        pytest.param("mrpc", {"label": [-1, -1]}, r"has no labels \(2 of 2 rows hold -1 or nothing\)", id="-1"),
        pytest.param("stsb", {"label": [2.0, -1.0]}, r"has no labels \(1 of 2 rows", id="-1.0"),
        pytest.param("mrpc", {"label": [1, None]}, r"has no labels \(1 of 2 rows", id="null"),
        pytest.param("mrpc", {"label": [0, 2]}, "the label of row 1 in .* is 2; expected 0 to 1", id="out of range"),
        pytest.param("mrpc", {"label": ["0", "1"]}, "the label of row 0 in .* is '0'; expected 0 to 1", id="text"),
        pytest.param("stsb", {"label": ["5", "1"]}, "the label of row 0 in .* is '5'; expected a num", id="number"),
        pytest.param("mrpc", {"sentence2": ["x", None]}, "row 1 of column 'sentence2' in .* holds None", id="no text"),
        pytest.param("qnli", {}, "no column 'question'; it has sentence1, sentence2, label, and qnli", id="column"),
        pytest.param("mrpc", {"sentence1": [], "sentence2": [], "label": []}, "has no rows", id="empty"),
    ],
)
def test_rows_that_cannot_be_used_are_refused(tmp_path, task, columns, message):
    write_parquet(
        tmp_path / "validation.parquet", {"sentence1": ["a", "b"], "sentence2": ["c", "d"], "label": [0, 1], **columns}
    )
    with pytest.raises(DataError, match=message):
        load_task(task, "validation", data_dir=tmp_path)


def test_a_missing_file_is_refused_with_a_list_of_those_there(tmp_path):
    write_parquet(tmp_path / "mrpc" / "train.parquet", MRPC_ROWS)
    write_parquet(tmp_path / "test.parquet", MRPC_ROWS)
    with pytest.raises(DataError, match=r"has no mrpc/dev\.parquet .*; it has mrpc/train\.parquet, test\.parquet"):
        load_task("mrpc", "dev", data_dir=tmp_path)
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match=r"has no mrpc/dev\.parquet .*; it has no data file"):
        load_task("mrpc", "dev", data_dir=tmp_path / "empty")
    with pytest.raises(DataError, match=r"is not a folder; expected one with mrpc/dev\.parquet"):
        load_task("mrpc", "dev", data_dir=tmp_path / "nowhere")


def test_a_damaged_file_is_refused(tmp_path):
    (tmp_path / "validation.parquet").write_bytes(b"PAR1 no more")
    with pytest.raises(DataError, match=r"validation\.parquet cannot be read"):
        load_task("mrpc", "validation", data_dir=tmp_path)


def hub_split(columns, **features):
    datasets = pytest.importorskip("datasets")
    dataset = datasets.Dataset.from_dict(columns)
    for name, feature in features.items():
        dataset = dataset.cast_column(name, getattr(datasets, feature[0])(**feature[1]))
    return dataset


def test_without_a_folder_a_split_comes_from_the_hub(monkeypatch):
    datasets = pytest.importorskip("datasets")
    asked = []
    split = hub_split(MRPC_ROWS, label=("ClassLabel", {"names": ["not_equivalent", "equivalent"]}))
    monkeypatch.setattr(datasets, "load_dataset", lambda *args, **options: asked.append((args, options)) or split)
    data = load_task("mrpc", "test", limit=3)
    assert asked == [(("nyu-mll/glue", "mrpc"), {"split": "test"})]
    assert (data.texts, data.labels.tolist()) == ([("a b", "b"), ("c", "c c"), ("d e f", "d")], [1, 0, 1])


def test_labels_that_changed_on_the_hub_are_refused(monkeypatch):
    datasets = pytest.importorskip("datasets")
    split = hub_split(MRPC_ROWS, label=("ClassLabel", {"names": ["equivalent", "not_equivalent"]}))
    monkeypatch.setattr(datasets, "load_dataset", lambda *args, **options: split)
    with pytest.raises(DataError, match="mrpc now labels equivalent, not_equivalent; expected not_equivalent, equiv"):
        load_task("mrpc", "validation")


def test_a_split_that_the_hub_has_not_is_refused_without_asking():
    with pytest.raises(DataError, match="glue mnli has no split 'dev'; it has train, validation_matched, "):
        load_task("mnli", "dev")


def test_an_unreachable_hub_is_an_error_that_names_the_way_out(monkeypatch):
    datasets = pytest.importorskip("datasets")

    def unreachable(*args, **options):
        raise ConnectionError("no route")

    monkeypatch.setattr(datasets, "load_dataset", unreachable)
    with pytest.raises(DataError, match=r"cannot be had from the Hub \(no route\); .* data_dir with rte/validation\."):
        load_task("rte", "validation")


def test_missing_datasets_names_the_command_that_installs_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(DependencyError, match=r'loading GLUE needs datasets, .* pip install "hf-bucket\[eval\]"'):
        load_task("rte", "validation")


@pytest.mark.parametrize(
    ("task", "split", "n", "first", "label"),
    [
        ("mrpc", "validation", 408, ("He said the foodservice pie business", '" The foodservice pie'), 1),
        ("mrpc", "test", 1725, ("PCCW 's chief operating officer", "Current Chief Operating"), 1),
        ("sst2", "validation", 872, ("it 's a charming",), 1),
        ("cola", "validation", 1043, ("The sailors rode the breeze",), 1),
        ("stsb", "validation", 1500, ("A man with a hard hat is dancing.", "A man wearing a hard hat"), 5.0),
        ("wnli", "validation", 71, ("The drain is clogged", "The hair has to be"), 0),
    ],
)
def test_the_real_files_load(assets, task, split, n, first, label):
    data = load_task(task, split, data_dir=assets / "data" / "glue")
    assert len(data.texts) == len(data.labels) == n
    texts = data.texts[0] if isinstance(data.texts[0], tuple) else (data.texts[0],)
    assert len(texts) == len(first)
    assert all(text.startswith(start) for text, start in zip(texts, first, strict=True))
    assert data.labels[0] == label


# Evaluation, with fakes for the three processes

# The model's order is the data set's turned round; row 3 is wrong, so the accuracy is 3/4.
NAMES = ["equivalent", "not_equivalent"]
LOGITS = np.array([[2, -1], [-1, 1], [3, 0], [1, 0.5]], dtype=np.float32)


SYSTEMS = ("torch", "torch-sorted", "transformers", "hf_bucket")


class FakeWorkers:
    """Stands in for the processes: what each system answers is given, what is asked of it is recorded."""

    def __init__(self, logits=None, seconds=None, waste=(0.0,), truncated=(0,), peaks=(5_000_000,)):
        self.logits = logits or {}
        self.seconds = seconds or {}
        self.waste, self.truncated, self.peaks = waste, truncated, peaks
        self.log = []
        self.jobs = {}

    @contextmanager
    def __call__(self, system, job):
        self.log.append(f"start {system}")
        self.jobs[system] = job
        ladder = ("b1_s4", "b1_s8") if system == "hf_bucket" else ()
        yield FakeWorker(self, system, Loaded(max_length=96, ladder=ladder, memory_bytes=4_000_000))
        self.log.append(f"stop {system}")


class FakeWorker:
    def __init__(self, workers, system, loaded):
        self.workers, self.system, self.loaded = workers, system, loaded
        self.rounds = 0

    def run(self):
        workers, number = self.workers, self.rounds
        workers.log.append(f"run {self.system}")
        self.rounds += 1
        pick = lambda values: values[min(number, len(values) - 1)]  # noqa: E731
        return Pass(
            logits=workers.logits.get(self.system, LOGITS),
            seconds=pick(workers.seconds.get(self.system, (1.0,))),
            waste=pick(workers.waste),
            truncated=pick(workers.truncated),
            peak_bytes=pick(workers.peaks),
        )


@pytest.fixture
def request_mrpc(tmp_path):
    make_checkpoint(tmp_path, NAMES)
    write_parquet(tmp_path / "mrpc" / "validation.parquet", MRPC_ROWS)
    return EvalRequest(task="mrpc", model=str(tmp_path), buckets=[4, 8], data_dir=tmp_path, rounds=1)


def shifted(row, label, by):
    logits = LOGITS.copy()
    logits[row, label] += by
    return logits


def test_systems_take_turns_after_the_model_was_compiled(request_mrpc):
    workers = FakeWorkers()
    evaluate(replace(request_mrpc, rounds=3), start=workers)
    turn = [f"run {system}" for system in SYSTEMS]
    starts = [f"start {system}" for system in SYSTEMS]
    stops = [f"stop {system}" for system in reversed(SYSTEMS)]
    assert workers.log == ["start hf_bucket", "stop hf_bucket", *starts, *turn * 3, *stops]


def test_every_system_is_cut_at_the_maximum_of_the_bucketed_model(request_mrpc):
    workers = FakeWorkers()
    report = evaluate(request_mrpc, start=workers)
    assert {system: job.max_length for system, job in workers.jobs.items()} == dict.fromkeys(workers.jobs, 96)
    assert report.max_length == 96
    assert report.ladder == ("b1_s4", "b1_s8")


def test_a_flipped_label_is_counted_and_fails_the_evaluation(request_mrpc):
    report = evaluate(request_mrpc, start=FakeWorkers({"hf_bucket": shifted(1, 0, 2.5)}))
    assert (report.bucketed.label_flips, report.bucketed.flipped_rows) == (1, (1,))
    assert report.failed


def test_a_label_that_int8_flips_is_counted_and_fails_nothing(request_mrpc, tmp_path):
    write_parquet(tmp_path / "mrpc" / "train.parquet", {"sentence1": ["x"], "sentence2": ["y"], "label": [0]})
    workers = FakeWorkers({"hf_bucket": shifted(1, 0, 2.5)})
    report = evaluate(replace(request_mrpc, quantize="int8"), start=workers)
    assert (report.bucketed.label_flips, report.failed) == (1, False)
    assert report.to_json()["precision"] == "float32, hf_bucket int8"
    assert report.table().splitlines()[2].endswith("rounds in turns, float32, hf_bucket int8")
    options = workers.jobs["hf_bucket"].options
    assert (options["quantize"], options["calibration_dataset"]) == ("int8", [{"text": "x", "text_pair": "y"}])
    assert report.calibration == "train"


def test_a_label_flipped_by_anyone_else_is_reported_only(request_mrpc):
    report = evaluate(request_mrpc, start=FakeWorkers({"transformers": shifted(1, 0, 2.5)}))
    assert [figures.label_flips for figures in report.systems] == [0, 0, 1, 0]
    assert not report.failed


def test_a_shift_that_flips_nothing_is_the_delta(request_mrpc):
    report = evaluate(request_mrpc, start=FakeWorkers({"hf_bucket": shifted(2, 1, -0.25)}))
    assert [figures.max_delta_logit for figures in report.systems] == [0.0, 0.0, 0.0, 0.25]
    assert not report.failed


def test_speed_is_texts_by_the_median_round(request_mrpc):
    seconds = {"torch": (9.0, 2.0, 1.0), "torch-sorted": (4.0,), "hf_bucket": (0.5, 4.0, 0.25)}
    report = evaluate(replace(request_mrpc, rounds=3), start=FakeWorkers(seconds=seconds))
    torch, *_, bucketed = report.systems
    assert torch.texts_per_s == {"median": 2.0, "min": 4 / 9, "max": 4.0}
    assert bucketed.texts_per_s == {"median": 8.0, "min": 1.0, "max": 16.0}
    assert [figures.speed_ratio for figures in report.systems] == [1.0, 0.5, 2.0, 4.0]


def test_counts_are_those_of_the_first_pass_and_memory_that_of_the_worst(request_mrpc):
    workers = FakeWorkers(waste=(0.25, 0.5), truncated=(1, 2), peaks=(7, 9, 8))
    bucketed = evaluate(replace(request_mrpc, rounds=3), start=workers).bucketed
    assert (bucketed.waste, bucketed.truncated) == (0.25, 1)
    assert (bucketed.loaded_bytes, bucketed.peak_bytes) == (4_000_000, 9)


def test_predictions_are_scored_in_the_order_of_the_data(request_mrpc):
    report = evaluate(request_mrpc, start=FakeWorkers({"hf_bucket": shifted(3, 1, 1)}))
    assert report.labels == ("equivalent", "not_equivalent")
    assert [figures.metrics["accuracy"] for figures in report.systems] == [0.75, 0.75, 0.75, 1.0]
    assert report.systems[0].metrics["f1"] == pytest.approx(0.8)  # precision 2/3, recall 1


def test_a_label_order_decides_where_names_are_empty(request_mrpc, tmp_path):
    make_checkpoint(tmp_path, ["LABEL_0", "LABEL_1"])
    ordered = replace(request_mrpc, label_order=["equivalent", "not_equivalent"])
    assert evaluate(ordered, start=FakeWorkers()).bucketed.metrics["accuracy"] == 0.75
    ordered = replace(request_mrpc, label_order=["not_equivalent", "equivalent"])
    assert evaluate(ordered, start=FakeWorkers()).bucketed.metrics["accuracy"] == 0.25


def test_a_regression_has_correlations_and_no_label_to_flip(request_mrpc, tmp_path):
    make_checkpoint(tmp_path, ["LABEL_0"])
    write_parquet(tmp_path / "stsb" / "validation.parquet", {**MRPC_ROWS, "label": [0.5, 2.5, 5.0, 3.5]})
    reference = np.array([[0.1], [0.3], [0.9], [0.5]], dtype=np.float32)
    workers = FakeWorkers({**dict.fromkeys(SYSTEMS, reference), "hf_bucket": -reference})
    report = evaluate(replace(request_mrpc, task="stsb"), start=workers)
    assert report.systems[0].metrics["spearman"] == pytest.approx(1.0)
    assert report.bucketed.metrics["spearman"] == pytest.approx(-1.0)
    assert (report.bucketed.label_flips, report.failed, report.labels) == (None, False, ())


def test_mnli_is_scored_on_both_halves_apart(request_mrpc, tmp_path):
    make_checkpoint(tmp_path, ["CONTRADICTION", "NEUTRAL", "ENTAILMENT"])
    texts = {"premise": ["a", "b", "c"], "hypothesis": ["d", "e", "f"]}
    write_parquet(tmp_path / "validation_matched.parquet", {**texts, "label": [0, 1, 2]})
    write_parquet(tmp_path / "validation_mismatched.parquet", {**texts, "label": [2, 1, 0]})
    logits = np.array([[0, 0, 1], [0, 1, 0], [0, 0, 1], [1, 0, 0]], dtype=np.float32)
    workers = FakeWorkers(dict.fromkeys(SYSTEMS, logits))
    report = evaluate(replace(request_mrpc, task="mnli", limit=2), start=workers)
    assert (report.split, report.n) == ("validation_matched+validation_mismatched", 4)
    assert workers.jobs["torch"].texts == [("a", "d"), ("b", "e")] * 2
    # entailment, neutral of labels 0, 1; entailment, contradiction of labels 2, 1
    assert report.bucketed.metrics == {"accuracy_validation_matched": 1.0, "accuracy_validation_mismatched": 0.0}


@pytest.mark.parametrize(
    ("logits", "message"),
    [
        pytest.param(
            shifted(2, 1, np.nan), r"hf_bucket gave logits that are not finite, first in row 2: \[3", id="nan"
        ),
        pytest.param(LOGITS[:3], r"hf_bucket gave logits of shape \(3, 2\), torch of shape \(4, 2\)", id="a row short"),
    ],
)
def test_logits_that_cannot_be_compared_are_refused(request_mrpc, logits, message):
    with pytest.raises(DataError, match=message):
        evaluate(request_mrpc, start=FakeWorkers({"hf_bucket": logits}))


def test_what_cannot_be_scored_fails_before_anything_starts(request_mrpc, tmp_path):
    write_parquet(tmp_path / "stsb" / "validation.parquet", {**MRPC_ROWS, "label": [2.0] * 4})
    workers = FakeWorkers()
    with pytest.raises(DataError, match="pearson is undefined: all 4 predictions are 2"):
        evaluate(replace(request_mrpc, task="stsb"), start=workers)
    make_checkpoint(tmp_path, ["LABEL_0", "LABEL_1"])
    with pytest.raises(DataError, match="do not say which label is which"):
        evaluate(request_mrpc, start=workers)
    assert workers.log == []


@pytest.mark.parametrize("name", ["limit", "rounds", "pipeline_batch_size"])
def test_a_count_below_one_is_refused(request_mrpc, name):
    with pytest.raises(InputError, match=f"{name} must be at least 1, got 0"):
        replace(request_mrpc, **{name: 0})


def test_only_what_was_asked_for_reaches_the_model(request_mrpc):
    workers = FakeWorkers()
    evaluate(request_mrpc, start=workers)
    assert workers.jobs["hf_bucket"].options == {"buckets": [4, 8]}
    chosen = {"batch_sizes": [1, 2], "n_buckets": 3, "mode": "static", "provider": "CPUExecutionProvider"}
    evaluate(replace(request_mrpc, **chosen, revision="v2", pipeline_batch_size=7), start=workers)
    assert workers.jobs["hf_bucket"].options == {"buckets": [4, 8], **chosen, "revision": "v2"}
    assert (workers.jobs["torch"].revision, workers.jobs["transformers"].pipeline_batch_size) == ("v2", 7)


def test_a_ladder_is_planned_from_the_train_split_where_there_is_one(request_mrpc, tmp_path):
    workers = FakeWorkers()
    auto = replace(request_mrpc, buckets="auto")
    report = evaluate(auto, start=workers)
    own = [{"text": first, "text_pair": second} for first, second in workers.jobs["torch"].texts]
    assert report.calibration == "validation"
    assert workers.jobs["hf_bucket"].options == {"buckets": "auto", "calibration_dataset": own}
    write_parquet(tmp_path / "mrpc" / "train.parquet", {"sentence1": ["x"], "sentence2": ["y"], "label": [0]})
    report = evaluate(auto, start=workers)
    assert report.calibration == "train"
    assert workers.jobs["hf_bucket"].options["calibration_dataset"] == [{"text": "x", "text_pair": "y"}]
    assert evaluate(request_mrpc, start=workers).calibration is None


def test_the_report_is_json(request_mrpc):
    seconds = {"hf_bucket": (0.5, 0.25)}
    report = evaluate(
        replace(request_mrpc, rounds=2, command="typed"), start=FakeWorkers(seconds=seconds, waste=(0.5,))
    )
    result = json.loads(json.dumps(report.to_json(), allow_nan=False))
    expected = {"task": "mrpc", "split": "validation", "n": 4, "ladder": ["b1_s4", "b1_s8"], "rounds": 2}
    assert {name: result[name] for name in expected} == expected
    assert (result["command"], result["precision"]) == ("typed", "float32")
    assert {"python", "hf-bucket", "onnxruntime", "numpy"} <= set(result["versions"])
    assert result["machine"]["usable_cores"] >= 1
    assert result["machine"]["cpu"]
    assert list(result["systems"]) == [*SYSTEMS]
    assert result["systems"]["hf_bucket"] == {
        "metrics": {"accuracy": 0.75, "f1": pytest.approx(0.8)},
        "label_flips": 0,
        "flipped_rows": [],
        "max_delta_logit": 0.0,
        "texts_per_s": {"median": pytest.approx(4 / 0.375), "min": 8.0, "max": 16.0},
        "seconds": [0.5, 0.25],
        "speed_ratio_to_torch": pytest.approx(1 / 0.375),
        "waste": 0.5,
        "truncated": 0,
        "memory": {"loaded_bytes": 4_000_000, "peak_bytes": 5_000_000},
    }


def test_the_table_has_a_line_per_system_and_aligned_columns(request_mrpc):
    lines = evaluate(request_mrpc, start=FakeWorkers(waste=(0.125,))).table().splitlines()
    header, *rows = lines[lines.index("") + 1 :]
    assert [row.split()[0] for row in rows] == [*SYSTEMS]
    assert {len(row) for row in rows} == {len(header)}
    assert " ".join(rows[-1].split()[1:]) == "4.0 (4.0-4.0) 1.00 0.125 0 0 0.0e+00 4 (5) 0.7500 0.8000"


# One system in its process


class FakeEngine:
    """Gives each text its length as logits; loading and running can fail."""

    max_length, ladder = 8, ("b1_s8",)

    def __init__(self, job):
        if job.model == "broken":
            raise ModelError("cannot be loaded")

    def run(self, texts):
        return np.array([[len(text), 0.0] for text in texts], dtype=np.float32)

    def padding(self, texts):
        return 0.5, len(texts)


class LoudEngine(FakeEngine):
    def run(self, texts):
        print(f"running in process {os.getpid()}", flush=True)
        return super().run(texts)


class MortalEngine(FakeEngine):
    def run(self, texts):
        os._exit(3)


class SlowEngine(FakeEngine):
    """Lets its own clock pass: 3 s in a run, 5 s counting padding."""

    now_s = 100.0

    def run(self, texts):
        self.now_s += 3
        return super().run(texts)

    def padding(self, texts):
        self.now_s += 5
        return super().padding(texts)


def test_only_the_run_is_timed():
    engine = SlowEngine(Job(model="m", texts=[]))
    one = run_pass(engine, ["a", "bb"], clock=lambda: engine.now_s)
    assert (one.seconds, one.waste, one.truncated) == (3, 0.5, 2)
    assert one.logits.tolist() == [[1.0, 0.0], [2.0, 0.0]]


def test_a_worker_answers_each_request_until_the_other_end_hangs_up():
    ours, theirs = Pipe()
    worker = Thread(target=serve, args=(theirs, FakeEngine, Job(model="m", texts=["abc"])))
    worker.start()
    loaded = ours.recv()
    ours.send("run")
    one = ours.recv()
    ours.close()
    worker.join(timeout=10)
    assert (loaded.max_length, loaded.ladder, one.logits.tolist()) == (8, ("b1_s8",), [[3.0, 0.0]])
    assert loaded.memory_bytes > 10_000_000
    assert not worker.is_alive()


def test_a_worker_sends_the_error_that_the_user_should_read():
    ours, theirs = Pipe()
    serve(theirs, FakeEngine, Job(model="broken", texts=[]))
    with ours, theirs:
        error = ours.recv()
    assert isinstance(error, ModelError)
    assert str(error) == "cannot be loaded"


def test_a_system_runs_in_a_process_of_its_own_whose_prints_stay_off_stdout(capfd):
    with start_worker("loud", Job(model="m", texts=["a", "bb"]), engines={"loud": LoudEngine}) as worker:
        passes = [worker.run(), worker.run()]
    assert [one.logits.tolist() for one in passes] == [[[1.0, 0.0], [2.0, 0.0]]] * 2
    assert passes[1].peak_bytes >= worker.loaded.memory_bytes > 10_000_000
    out, err = capfd.readouterr()
    assert (out, err.count("running in process")) == ("", 2)
    assert f"running in process {os.getpid()}" not in err


def test_an_error_in_a_process_is_raised_as_it_was():
    with (
        pytest.raises(ModelError, match=r"^cannot be loaded$"),
        start_worker("fake", Job(model="broken", texts=["a"]), engines={"fake": FakeEngine}),
    ):
        pass


def test_a_process_that_dies_is_an_error():
    with (
        pytest.raises(ModelError, match="the mortal process ended without an answer; its last words are above"),
        start_worker("mortal", Job(model="m", texts=["a"]), engines={"mortal": MortalEngine}) as worker,
    ):
        worker.run()


def test_the_resident_set_is_at_most_its_peak():
    now, peak = resident_bytes()
    assert 10_000_000 < now <= peak


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """A tiny BERT stored in float16 that holds 16 tokens and has two labels of one name."""
    transformers = pytest.importorskip("transformers")
    names = {0: "same", 1: "same", 2: "other"}
    folder = save_tiny_bert(tmp_path_factory.mktemp("tiny"), num_labels=3, id2label=names, max_position_embeddings=16)
    transformers.BertForSequenceClassification.from_pretrained(folder).half().save_pretrained(folder)
    return folder


# of 3, 7, 8, 32, 16 and 5 tokens
TEXTS = ["w1", text_of(5), ("w1 w2", "w3 w4 w5"), text_of(30), (text_of(12), "w9"), ("w7", "w8")]


def test_torch_and_the_pipeline_give_the_same_logits_in_float32(tiny):
    job = Job(model=str(tiny), texts=TEXTS, max_length=16, pipeline_batch_size=2)
    reference, pipeline = TorchEngine(job), PipelineEngine(job)
    logits = reference.run(TEXTS)
    assert (logits.shape, logits.dtype) == ((6, 3), np.float32)
    assert np.ptp(logits, axis=0).min() > 1e-3
    np.testing.assert_allclose(pipeline.run(TEXTS), logits, atol=1e-4)
    assert reference.padding(TEXTS) == (0.0, 1)
    # batches of 2 x 7, 2 x 16 and 2 x 16 cells, of which 3 + 7, 8 + 16 and 16 + 5 are real
    assert pipeline.padding(TEXTS) == (pytest.approx(1 - 55 / 78), 1)


def test_a_pair_stays_a_pair_for_torch_when_its_second_text_is_empty(tiny):
    engine = TorchEngine(Job(model=str(tiny), texts=TEXTS, max_length=16))
    pair, text, batched = ("w1 w2", ""), "w1 w2", engine._checkpoint.tokenizer(["w1 w2"], [""], return_tensors="pt")
    np.testing.assert_allclose(engine.run([pair])[0], engine._checkpoint.model(**batched).logits.detach()[0], atol=1e-6)
    assert np.abs(engine.run([pair]) - engine.run([text])).max() > 1e-3


def test_a_model_that_transformers_cannot_load_is_an_error(tmp_path):
    pytest.importorskip("transformers")
    with pytest.raises(ModelError, match=r"transformers cannot load .*nothing"):
        TorchEngine(Job(model=str(tmp_path / "nothing"), texts=["a"]))


class FakeModel:
    """Stands in for the bucketed model; cuts every text longer than 4 characters."""

    def __init__(self, options):
        self.options = options
        self.ladder = make_ladder([4, 8], batch_sizes=[2])
        self.truncated = 0
        self.runner = self.Runner(self)

    @classmethod
    def from_pretrained(cls, model, **options):
        return cls({"model": model, **options})

    def stats(self):
        return {"waste": 0.25, "truncated": self.truncated}

    class Runner:
        max_length = 16

        def __init__(self, model):
            self.model = model

        def __call__(self, texts):
            self.model.truncated += sum(len(text) > 4 for text in texts)
            return [{"logits": np.array([len(text), 1], dtype=np.float32)} for text in texts]


def test_the_bucketed_model_truncates_and_counts_each_pass(monkeypatch):
    monkeypatch.setattr(hf_bucket, "BucketedModelForSequenceClassification", FakeModel, raising=False)
    engine = BucketEngine(Job(model="m", texts=[], options={"buckets": [4, 8]}))
    assert engine._model.options == {"model": "m", "overflow": "truncate", "buckets": [4, 8]}
    assert (engine.max_length, engine.ladder) == (16, ("b2_s4", "b2_s8"))
    texts = ["a", "bbbbb", "cc"]
    for _ in range(2):
        assert engine.run(texts).tolist() == [[1, 1], [5, 1], [2, 1]]
        assert engine.padding(texts) == (0.25, 1)


# The script


@pytest.fixture
def script(monkeypatch):
    def run(*arguments, workers=None):
        monkeypatch.setattr("hf_bucket.glue.evaluate", partial(evaluate, start=workers or FakeWorkers()))
        return main(["eval", *map(str, arguments)])

    return run


@pytest.fixture
def arguments(request_mrpc):
    return ["--task", "mrpc", "--model", request_mrpc.model, "--data-dir", request_mrpc.data_dir, "--buckets", "4,8"]


def test_the_script_prints_the_table_on_stdout_and_progress_on_stderr(script, arguments, capsys):
    assert script(*arguments, "--rounds", "2") == 0
    out, err = capsys.readouterr()
    assert out.startswith("mrpc validation, 4 texts, ")
    assert "hf_bucket" in out
    assert "round 2 of 2: hf_bucket took 1.00 s" in err


def test_the_script_prints_json_and_nothing_else_on_stdout(script, arguments, capsys):
    assert script(*arguments, "--json") == 0
    result = json.loads(capsys.readouterr().out)
    assert result["systems"]["hf_bucket"]["label_flips"] == 0
    assert result["command"].startswith("hf-bucket eval --task mrpc --model ")


def test_the_script_fails_when_a_label_flips_and_still_writes_the_result(script, arguments, capsys, tmp_path):
    output = tmp_path / "result.json"
    workers = FakeWorkers({"hf_bucket": shifted(1, 0, 2.5)})
    assert script(*arguments, "--output", output, workers=workers) == 1
    assert (
        "error: 1 of 4 labels differ from torch's without padding, in rows 1; 0 rows were cut"
        in capsys.readouterr().err
    )
    assert json.loads(output.read_text())["systems"]["hf_bucket"]["label_flips"] == 1


def test_the_script_reports_an_error_in_one_line(script, arguments, capsys):
    assert script(*arguments, "--split", "dev") == 1
    out, err = capsys.readouterr()
    assert (out, err.count("\n")) == ("", 1)
    assert err.startswith("error: ")
    assert "has no mrpc/dev.parquet" in err


def test_the_script_never_overwrites_a_result_unasked(script, arguments, capsys, tmp_path):
    output = tmp_path / "result.json"
    output.write_text("precious")
    with pytest.raises(SystemExit, match="2"):
        script(*arguments, "--output", output)
    assert "exists; give another one, or --force to replace it" in capsys.readouterr().err
    assert output.read_text() == "precious"
    assert script(*arguments, "--output", output, "--force") == 0
    assert json.loads(output.read_text())["task"] == "mrpc"


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        pytest.param(["--task", "snli"], "task 'snli' is not in GLUE; use one of cola, sst2", id="task"),
        pytest.param(["--buckets", "64,x"], "'x' is not a whole number of at least 1", id="buckets"),
        pytest.param(["--rounds", "0"], "'0' is not a whole number of at least 1", id="rounds"),
        pytest.param(["--output", "no/such/folder/r.json"], "is not a folder; make it first", id="output"),
        pytest.param(["--wrong"], "unrecognized arguments: --wrong", id="option"),
    ],
)
def test_the_script_exits_with_2_when_used_wrongly(script, arguments, capsys, extra, message):
    with pytest.raises(SystemExit, match="2"):
        script(*arguments, *extra)
    assert message in capsys.readouterr().err


def test_every_option_of_the_script_reaches_the_evaluation(script, arguments, tmp_path):
    workers = FakeWorkers()
    chosen = "--batch-sizes 1,8 --n-buckets 3 --mode static --provider p --revision r --limit 2 --buckets auto"
    order = "--label-order equivalent,not_equivalent --pipeline-batch-size 5"
    workers.logits = dict.fromkeys(SYSTEMS, LOGITS[:2])
    assert script(*arguments, *chosen.split(), *order.split(), workers=workers) == 0
    job = workers.jobs["hf_bucket"]
    calibration = [{"text": "a b", "text_pair": "b"}, {"text": "c", "text_pair": "c c"}]
    assert job.options == {
        "buckets": "auto",
        "batch_sizes": [1, 8],
        "n_buckets": 3,
        "mode": "static",
        "provider": "p",
        "revision": "r",
        "calibration_dataset": calibration,
    }
    assert (job.pipeline_batch_size, len(job.texts)) == (5, 2)


def test_the_script_runs_from_the_repository_root_and_glue_is_light():
    heavy = ("torch", "transformers", "datasets", "sklearn", "scipy", "pyarrow")
    code = f"import sys, hf_bucket.glue; print([name for name in {heavy} if name in sys.modules])"
    light = subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, capture_output=True, text=True, check=True)
    assert light.stdout.strip() == "[]"
    help_text = subprocess.run(
        [sys.executable, "scripts/eval.py", "--help"], cwd=REPOSITORY, capture_output=True, text=True
    )
    assert (help_text.returncode, "--label-order" in help_text.stdout) == (0, True)
