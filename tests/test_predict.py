"""Predicting a file: a line out for every row in, in order, nothing of a row lost, no bad row in the way."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterator
from datetime import date
from pathlib import Path

import numpy as np
import pytest
from conftest import fake_artifact, fake_engine, text_of
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from hf_bucket.data import Record, read_records
from hf_bucket.errors import BucketWarning, DataError, InputError
from hf_bucket.ladder import make_ladder
from hf_bucket.pipelines import CallOptions, TextClassificationPipeline
from hf_bucket.predict import Outcome, predict
from hf_bucket.runner import Runner
from hf_bucket.session import FakeSession

in_one_folder = settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
LADDER = make_ladder([8, 16, 32], batch_sizes=[1, 4])


@pytest.fixture(scope="module")
def runner(tmp_path_factory: pytest.TempPathFactory) -> Runner:
    return Runner(fake_artifact(tmp_path_factory.mktemp("artifact"), LADDER), engine=fake_engine)


@pytest.fixture(scope="module")
def strict(runner: Runner) -> TextClassificationPipeline:
    """Refuses texts of more than 32 tokens. A text of known words scores the sum of its ids, under "sum"."""
    return TextClassificationPipeline(runner, CallOptions(), overflow="error")


def run(classify, records, **options) -> tuple[list[str], Outcome]:
    """Lines without their newlines, and the outcome."""
    chunks: list[str] = []
    outcome = predict(classify, records, chunks.append, **options)
    assert all(chunk.endswith("\n") for chunk in chunks)
    return "".join(chunks).split("\n")[:-1], outcome


def parsed(lines: list[str]) -> list[dict]:
    return [json.loads(line, parse_constant=pytest.fail) for line in lines]


def table(lines: list[str]) -> list[list[str]]:
    return list(csv.reader(io.StringIO("".join(f"{line}\n" for line in lines), newline=""), strict=True))


def records_of(*fields: dict) -> list[Record]:
    return [Record(line=line, fields=row) for line, row in enumerate(fields, 1)]


def total(text: str) -> float:
    """The score of a text: the ids of its words, of ``[CLS]`` and of ``[SEP]``."""
    return float(sum(int(word.removeprefix("w")) + 4 for word in text.split()) + 3)


# Properties

GOOD = st.integers(0, 30).map(lambda words: text_of(words, start=1))
BAD = st.sampled_from([None, 3, ["w1"], "\ud800", text_of(31), text_of(60)])


@in_one_folder
@given(texts=st.lists(GOOD | BAD, max_size=30), window=st.integers(1, 12), as_csv=st.booleans())
def test_every_row_is_one_line_in_its_place_and_bad_rows_cost_only_themselves(strict, texts, window, as_csv) -> None:
    lines, outcome = run(
        strict,
        records_of(*({"text": text, "id": number} for number, text in enumerate(texts))),
        column="text",
        window=window,
        as_csv=as_csv,
    )
    if as_csv:
        header, *cells = table(lines)
        rows = [dict(zip(header, row, strict=True)) for row in cells]
    else:
        rows = parsed(lines)
    assert [int(row["id"]) for row in rows] == list(range(len(texts)))
    failed = [bool(row.get("error")) for row in rows]
    assert failed == [not isinstance(text, str) or text == "\ud800" or len(text.split()) > 30 for text in texts]
    assert outcome == Outcome(rows=len(texts), failed=sum(failed))
    for row, text in zip(rows, texts, strict=True):
        if row.get("error"):
            assert int(row["line"]) == int(row["id"]) + 1
        else:
            assert (row["label"], float(row["score"])) == ("sum", total(text))


JSON_VALUES = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text()
NAMES = st.text(max_size=3) | st.sampled_from(["label", "score", "line", "error", "predicted_label", "raw"])


@in_one_folder
@given(
    objects=st.lists(st.dictionaries(NAMES, JSON_VALUES, max_size=5), max_size=8),
    ascii_only=st.booleans(),
    separators=st.sampled_from([(",", ":"), (", ", ": "), (" ,\t", " : ")]),
)
def test_jsonl_objects_keep_their_characters_and_gain_only_names_they_lack(
    strict, tmp_path, objects, ascii_only, separators
) -> None:
    given_lines = [json.dumps(fields, ensure_ascii=ascii_only, separators=separators) for fields in objects]
    path = tmp_path / "a.jsonl"
    path.write_bytes("\n".join(given_lines).encode("utf-8", "backslashreplace"))
    records = list(read_records(path))
    lines, outcome = run(strict, records, column="text")
    assert outcome.rows == len(objects)
    for line, was, record in zip(lines, given_lines, records, strict=True):
        line.encode("utf-8")
        now = json.loads(line)
        if record.error is None:
            assert line.startswith(record.json[:-1].rstrip())
            assert {name: now[name] for name in record.fields} == record.fields
            assert len(now) == len(record.fields) + 2
        else:
            assert now["raw"] == was.encode("utf-8", "backslashreplace").decode()


@in_one_folder
@given(cells=st.lists(st.text(st.sampled_from('w1 ",\n\r\té'), max_size=8), min_size=1, max_size=8))
def test_csv_values_come_back_as_they_were(strict, tmp_path, cells: list[str]) -> None:
    path = tmp_path / "a.csv"
    with path.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file, quoting=csv.QUOTE_ALL).writerows([["text", "id"], *([cell, "w1"] for cell in cells)])
    lines, outcome = run(strict, read_records(path), as_csv=True)
    header, *got = table(lines)
    assert header == ["text", "id", "label", "score", "line", "error", "rest"]
    assert [row[0] for row in got] == cells
    assert outcome == Outcome(rows=len(cells), failed=0)


# What a line looks like


def test_a_line_is_the_row_and_its_best_label(strict) -> None:
    lines, outcome = run(strict, records_of({"text": "w1 w2", "id": 7, "é": "\u2028"}))
    assert lines == ['{"text": "w1 w2", "id": 7, "é": "\u2028", "label": "sum", "score": 14.0}']
    assert outcome == Outcome(rows=1, failed=0)


@pytest.mark.parametrize(("top_k", "labels"), [(1, ["sum"]), (2, ["sum", "count"]), (99, ["sum", "count"])])
def test_several_labels_are_a_list_best_first(strict, top_k: int, labels: list[str]) -> None:
    (row,) = parsed(run(strict, records_of({"text": "w1 w2"}), top_k=top_k)[0])
    scores = {"sum": 14.0, "count": 4.0}
    assert row == {"text": "w1 w2", "labels": [{"label": label, "score": scores[label]} for label in labels]}
    header, cells = table(run(strict, records_of({"text": "w1 w2"}), top_k=top_k, as_csv=True)[0])
    assert header == ["text", "labels", "line", "error", "rest"]
    assert json.loads(cells[1]) == row["labels"]


def test_the_pipelines_own_top_k_does_not_change_the_lines(runner) -> None:
    classify = TextClassificationPipeline(runner, CallOptions(top_k=None))
    assert parsed(run(classify, records_of({"text": "w1"}))[0]) == [{"text": "w1", "label": "sum", "score": 8.0}]


def test_pairs_are_read_from_two_columns(strict) -> None:
    lines, _ = run(strict, records_of({"a": "w1", "b": "w2"}), pair_column="b")
    assert parsed(lines) == [{"a": "w1", "b": "w2", "label": "sum", "score": 16.0}]


def test_names_that_a_row_has_already_stay_its_own(strict) -> None:
    rows = records_of(
        {"text": "w1", "label": 1, "line": "x"},
        {"text": "w1", "label": 1, "predicted_label": 2, "score": 3},
        {"text": None, "line": "x", "error": "y", "label": 1},
    )
    lines, _ = run(strict, rows)
    assert parsed(lines) == [
        {"text": "w1", "label": 1, "line": "x", "predicted_label": "sum", "score": 8.0},
        {
            "text": "w1",
            "label": 1,
            "predicted_label": 2,
            "score": 3,
            "predicted_predicted_label": "sum",
            "predicted_score": 8.0,
        },
        {
            "text": None,
            "line": "x",
            "error": "y",
            "label": 1,
            "predicted_line": 3,
            "predicted_error": "column 'text' holds None; expected a text",
        },
    ]
    header, *_ = table(run(strict, rows[:1], as_csv=True)[0])
    assert header == ["text", "label", "line", "predicted_label", "score", "predicted_line", "error", "rest"]


def test_what_json_and_csv_cannot_say_is_written_as_text(strict) -> None:
    fields = {
        "text": "w1",
        "when": date(2024, 5, 1),
        "raw": b"\xff",
        "v": [float("nan"), {"i": float("inf")}, (1, None)],
    }
    (row,) = parsed(run(strict, records_of(fields))[0])
    expected = {"when": "2024-05-01", "raw": "b'\\xff'", "v": ["nan", {"i": "inf"}, [1, None]]}
    assert {name: row[name] for name in expected} == expected
    _, cells = table(run(strict, records_of({**fields, "n": None, "t": True}), as_csv=True)[0])
    assert cells[1:6] == ['"2024-05-01"', "\"b'\\\\xff'\"", '["nan", {"i": "inf"}, [1, null]]', "", "true"]


def test_a_field_without_a_column_goes_to_the_rest_and_so_does_a_malformed_line(strict, tmp_path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "w1"}\n{"text": "w2", "new": 1}\n{oops\n{"raw": "w3"}', encoding="utf-8")
    header, *cells = table(run(strict, read_records(path), window=1, as_csv=True)[0])
    assert header == ["text", "label", "score", "line", "error", "rest"]
    assert cells[:2] == [["w1", "sum", "8.0", "", "", ""], ["w2", "sum", "9.0", "", "", '{"new": 1}']]
    assert cells[2][:4] == ["", "", "", "3"]
    assert cells[2][4].startswith("not JSON: ")
    assert cells[2][5] == '{"raw": "{oops"}'
    assert cells[3] == ["", "", "", "4", "no column 'text'; the file has raw", '{"raw": "w3"}']


def test_a_column_called_raw_is_not_what_is_left_of_a_malformed_line(strict, tmp_path) -> None:
    path = tmp_path / "a.csv"
    path.write_text("raw\nw1\nx,y\n", encoding="utf-8")
    header, *cells = table(run(strict, read_records(path), as_csv=True)[0])
    assert header[0] == "raw"
    assert cells[1] == ["", "", "", "3", "2 values; expected 1, one for each of raw", '{"raw": "x,y"}']


# Rows that cannot be classified


@pytest.mark.parametrize(
    ("fields", "error"),
    [
        ({"x": "w1"}, "no column 'text'; the file has x"),
        ({"text": None}, "column 'text' holds None; expected a text"),
        ({"text": 5}, "column 'text' holds 5; expected a text"),
        (
            {"text": "w1\ud800"},
            "the text has a lone surrogate at position 2, which is no Unicode character; decode the source with "
            'errors="replace", or drop it',
        ),
        (
            {"text": text_of(40)},
            'the text has 42 tokens but the largest bucket holds 32; pass overflow="truncate", or add a bucket '
            "of length >= 42 (this model's maximum is 64)",
        ),
    ],
    ids=["missing", "None", "number", "surrogate", "long"],
)
def test_a_bad_row_says_why_among_good_ones(strict, fields: dict, error: str) -> None:
    good = {"text": "w1"}
    rows = parsed(run(strict, records_of(good, fields, good), column="text")[0])
    assert rows == [
        {"text": "w1", "label": "sum", "score": 8.0},
        {**fields, "line": 2, "error": error},
        {"text": "w1", "label": "sum", "score": 8.0},
    ]


def test_a_long_text_is_cut_where_the_pipeline_cuts(runner) -> None:
    classify = TextClassificationPipeline(runner, CallOptions())
    with pytest.warns(BucketWarning, match="was cut to the largest bucket, 32 tokens"):
        _, outcome = run(classify, records_of({"text": text_of(40)}))
    assert outcome == Outcome(rows=1, failed=0)


def test_scores_that_are_no_numbers_are_errors_and_not_invalid_json(tmp_path) -> None:
    class NanSession(FakeSession):
        def run(self, arrays):
            logits = super().run(arrays)["logits"]
            return {"logits": np.where(logits[:, :1] == 8, np.float32("nan"), logits)}

    runner = Runner(
        fake_artifact(tmp_path, LADDER),
        engine=lambda artifact, options: {bucket: NanSession(bucket) for bucket in artifact.manifest.ladder},
    )
    classify = TextClassificationPipeline(runner, CallOptions())
    rows = parsed(run(classify, records_of({"text": "w1"}, {"text": "w2"}), top_k=2)[0])
    assert (rows[0]["text"], rows[0]["line"]) == ("w1", 1)
    assert rows[0]["error"].startswith("the text got logits that are not finite from bucket b1_s8; look whether")
    assert rows[1]["labels"][0] == {"label": "sum", "score": 9.0}


def test_bad_rows_do_not_keep_good_ones_from_sharing_batches(runner, strict) -> None:
    before = runner.stats()["buckets"]["b4_s8"]["batches"]
    texts = [text_of(60) if number % 9 == 0 else "w1" for number in range(1024)]
    _, outcome = run(strict, records_of(*({"text": text} for text in texts)))
    assert outcome == Outcome(rows=1024, failed=114)
    assert runner.stats()["buckets"]["b4_s8"]["batches"] - before < 1.05 * 910 / 4


# The column


def test_the_column_is_picked_from_the_first_row_that_can_be_read(strict) -> None:
    bad = Record(line=1, fields={"raw": "{"}, error="not JSON")
    rows = [bad, bad, *records_of({"id": 1, "review": "w1"}, {"review": 3, "text": "w2"})]
    lines, outcome = run(strict, rows, window=1)
    assert [("error" in row) for row in parsed(lines)] == [True, True, False, True]
    assert outcome == Outcome(rows=4, failed=3)


def test_a_column_that_is_not_clear_is_an_error_before_its_window_is_written(strict) -> None:
    with pytest.raises(DataError, match="2 of the columns a, b hold a string; name the column of the text"):
        run(strict, records_of({"a": "w1", "b": "w2"}))


# Windows


@pytest.mark.parametrize("window", [1, 4, 10])
def test_at_most_a_window_of_rows_is_read_ahead(strict, window: int) -> None:
    read = written = 0

    def source() -> Iterator[Record]:
        nonlocal read
        for number in range(25):
            assert read - written < window
            read += 1
            yield Record(line=number, fields={"text": text_of(number)})

    def write(lines: str) -> None:
        nonlocal written
        written += lines.count("\n")

    assert predict(strict, source(), write, window=window) == Outcome(rows=25, failed=0)
    assert written == 25


@pytest.mark.parametrize("where", ["engine", "records", "write"])
def test_an_exception_comes_after_the_lines_of_earlier_windows(tmp_path: Path, where: str) -> None:
    class Broken(FakeSession):
        def run(self, arrays):
            if where == "engine" and (arrays["input_ids"] == 9).any():
                raise RuntimeError("broken")
            return super().run(arrays)

    def source() -> Iterator[Record]:
        for number in range(20):
            if where == "records" and number == 5:
                raise RuntimeError("broken")
            yield Record(line=number, fields={"text": f"w{number}"})

    chunks: list[str] = []

    def write(lines: str) -> None:
        if where == "write" and chunks:
            raise RuntimeError("broken")
        chunks.append(lines)

    runner = Runner(
        fake_artifact(tmp_path, LADDER),
        engine=lambda artifact, options: {bucket: Broken(bucket) for bucket in artifact.manifest.ladder},
    )
    with pytest.raises(RuntimeError, match="broken"):
        predict(TextClassificationPipeline(runner, CallOptions()), source(), write, window=4)
    assert [row["text"] for row in parsed("".join(chunks).split("\n")[:-1])] == ["w0", "w1", "w2", "w3"]


def test_no_rows_are_no_lines_and_in_csv_a_header(strict) -> None:
    assert run(strict, []) == ([], Outcome(rows=0, failed=0))
    assert run(strict, [], as_csv=True) == (["label,score,line,error,rest"], Outcome(rows=0, failed=0))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"window": 0}, "window must be a number of rows of at least 1, got 0"),
        ({"top_k": 0}, "top_k must be a number of at least 1, or None for all labels; got 0"),
    ],
    ids=str,
)
def test_impossible_options_are_refused_and_not_taken_for_bad_rows(strict, options: dict, message: str) -> None:
    with pytest.raises(InputError, match=message):
        run(strict, records_of({"text": "w1"}), **options)
