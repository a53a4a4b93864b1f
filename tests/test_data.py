"""Data files: every row once and in order, whatever is wrong with some of them."""

from __future__ import annotations

import csv
import io
import json
import subprocess
import sys
import threading
from datetime import datetime
from pathlib import Path
from types import SimpleNamespace

import pyarrow
import pyarrow.parquet
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from hf_bucket.data import (
    KINDS,
    SUFFIXES,
    Record,
    columns_of,
    pick_column,
    read_column,
    read_dataset_column,
    read_records,
    text_of,
)
from hf_bucket.errors import DataError, DependencyError

BOM = b"\xef\xbb\xbf"
in_one_folder = settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
JSON_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=5,
)
CELLS = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), max_size=8) | st.text(
    '",\n\r a', max_size=6
)


@pytest.fixture
def write(tmp_path: Path):
    def write(name: str, content: bytes | str) -> Path:
        path = tmp_path / name
        path.write_bytes(content.encode() if isinstance(content, str) else content)
        return path

    return write


@pytest.fixture
def parquet(tmp_path: Path):
    def write(columns, **options) -> Path:
        path = tmp_path / "rows.parquet"
        pyarrow.parquet.write_table(columns if isinstance(columns, pyarrow.Table) else pyarrow.table(columns), path)
        return path

    return write


def rows(path: Path | None, kind: str | None = None) -> list[tuple[int, dict]]:
    """Line and fields of every record, all of which can be read."""
    records = list(read_records(path, kind=kind))
    assert [record.error for record in records] == [None] * len(records)
    return [(record.line, dict(record.fields)) for record in records]


# Properties


@in_one_folder
@given(lines=st.lists(st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\n"), max_size=8)))
@pytest.mark.parametrize("end", ["\n", "\r\n"], ids=["LF", "CRLF"])
def test_every_line_of_a_text_file_is_one_text(write, lines: list[str], end: str) -> None:
    lines = [line.removesuffix("\r") for line in lines]
    path = write("a.txt", "".join(line + end for line in lines))
    expected = [(number, {"text": line}) for number, line in enumerate(lines, 1)]
    if expected:
        expected[0][1]["text"] = lines[0].removeprefix("\ufeff")
    assert rows(path) == expected


@in_one_folder
@given(objects=st.lists(st.dictionaries(st.text(), JSON_VALUES, max_size=4), max_size=8), ascii_only=st.booleans())
def test_every_json_line_is_read_as_it_was_written(write, objects: list[dict], ascii_only: bool) -> None:
    lines = [json.dumps(fields, ensure_ascii=ascii_only) for fields in objects]
    path = write("a.jsonl", "\n".join(lines).encode("utf-8", "surrogatepass"))
    assert rows(path) == [(number, fields) for number, fields in enumerate(objects, 1)]
    assert [record.json for record in read_records(path)] == lines


@in_one_folder
@given(table=st.lists(st.tuples(CELLS, CELLS), max_size=8), end=st.sampled_from(["\n", "\r\n"]), final=st.booleans())
@pytest.mark.parametrize(("suffix", "delimiter"), [(".csv", ","), (".tsv", "\t")])
def test_every_csv_row_comes_back_whatever_is_in_it(write, table, end, final, suffix, delimiter) -> None:
    buffer = io.StringIO(newline="")
    csv.writer(buffer, delimiter=delimiter, lineterminator=end, quoting=csv.QUOTE_ALL).writerows([("a", "b"), *table])
    content = buffer.getvalue()
    path = write(f"a{suffix}", content if final else content.removesuffix(end))
    got = rows(path)
    assert [tuple(fields.values()) for _, fields in got] == table
    starts = [1 + (content[: _offset(table, n, delimiter, end)]).count("\n") for n in range(len(table))]
    assert [line for line, _ in got] == starts


def _offset(table, row: int, delimiter: str, end: str) -> int:
    buffer = io.StringIO(newline="")
    writer = csv.writer(buffer, delimiter=delimiter, lineterminator=end, quoting=csv.QUOTE_ALL)
    writer.writerows([("a", "b"), *table[:row]])
    return len(buffer.getvalue())


@in_one_folder
@given(content=st.binary(max_size=60) | st.text('a",\n{}\r\x00é', max_size=40).map(str.encode))
@pytest.mark.parametrize("kind", ["text", "jsonl", "csv"])
def test_no_content_stops_the_reading_and_lines_only_go_forward(write, content: bytes, kind: str) -> None:
    path = write("a.any", b"h\n" + content if kind == "csv" else content)
    records = list(read_records(path, kind=kind))
    numbers = [record.line for record in records]
    assert numbers == sorted(set(numbers))
    assert all((record.error is None) == ("raw" not in record.fields) for record in records)
    if kind != "csv":
        lines = content.removeprefix(BOM).split(b"\n")
        filled = [number for number, line in enumerate(lines, 1) if line.strip()]
        last = len(lines) - (not lines[-1]) if kind == "text" else max(filled, default=0)
        assert numbers == list(range(1, last + 1))


@in_one_folder
@given(bad=st.sets(st.integers(0, 9)), kind=st.sampled_from(["jsonl", "csv"]))
def test_bad_lines_among_good_ones_cost_only_themselves(write, bad: set[int], kind: str) -> None:
    good = {"jsonl": '{{"text": "t{0}"}}', "csv": '"t{0}",{0}'}[kind]
    wrong = {"jsonl": '{{"text": "t{0}"', "csv": '"t{0}" t,{0}'}[kind]
    lines = [(wrong if number in bad else good).format(number) for number in range(10)]
    header = ["text,id"] if kind == "csv" else []
    records = list(read_records(write(f"a.{kind}", "\n".join(header + lines))))
    assert [record.line for record in records] == [number + 1 + len(header) for number in range(10)]
    for number, record in enumerate(records):
        assert (record.error is not None) == (number in bad)
        assert record.fields.get("raw" if number in bad else "text") == (
            lines[number] if number in bad else f"t{number}"
        )


# Ends, marks and blanks


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        pytest.param("a.txt", b"", [], id="empty text"),
        pytest.param("a.txt", BOM, [], id="only a mark"),
        pytest.param("a.txt", b"\n", [(1, {"text": ""})], id="one empty text"),
        pytest.param("a.txt", b"a\n\nb", [(1, {"text": "a"}), (2, {"text": ""}), (3, {"text": "b"})], id="blank text"),
        pytest.param(
            "a.TXT", BOM + b"a\r\nb\r", [(1, {"text": "a"}), (2, {"text": "b\r"})], id="lone return at the end"
        ),
        pytest.param(
            "a.txt", "a\u2028b\x0bc\x85d".encode(), [(1, {"text": "a\u2028b\x0bc\x85d"})], id="other separators"
        ),
        pytest.param("a.jsonl", b"", [], id="empty JSONL"),
        pytest.param("a.jsonl", b"\n \r\n\t\n", [], id="blank JSONL"),
        pytest.param("a.json", BOM + b' {"a": 1} \r\n\n', [(1, {"a": 1})], id="mark, return, blank end"),
        pytest.param("a.ndjson", b'{"a": 1}\n{"a": 2}', [(1, {"a": 1}), (2, {"a": 2})], id="no newline at the end"),
        pytest.param("a.csv", b"", [], id="empty CSV"),
        pytest.param("a.csv", b"text,id\r\n", [], id="header alone"),
        pytest.param("a.csv", BOM + b'"text",id\r\na,1\r\n\r\n', [(2, {"text": "a", "id": "1"})], id="mark and quote"),
        pytest.param(
            "a.csv", b'text\n"a\n\nb"\nc', [(2, {"text": "a\n\nb"}), (5, {"text": "c"})], id="quoted newlines"
        ),
        pytest.param("a.csv", b'text\n""\n', [(2, {"text": ""})], id="quoted nothing"),
        pytest.param("a.csv", b'text\n5" disk\n', [(2, {"text": '5" disk'})], id="a quote in the middle"),
        pytest.param("a.csv", b",text\n0,a\n", [(2, {"": "0", "text": "a"})], id="unnamed column"),
        pytest.param("a.tsv", b"text\tid\na,b\t1\n", [(2, {"text": "a,b", "id": "1"})], id="tabs"),
    ],
)
def test_marks_line_ends_and_blank_ends_are_no_rows(write, name, content, expected) -> None:
    assert rows(write(name, content)) == expected


LONG = "x" * 200_000


def test_a_text_longer_than_the_csv_modules_limit_is_read(write) -> None:
    assert rows(write("a.csv", f'text,id\n"{LONG}",1\n{LONG},2')) == [
        (2, {"text": LONG, "id": "1"}),
        (3, {"text": LONG, "id": "2"}),
    ]


# Malformed lines


@pytest.mark.parametrize(
    ("name", "content", "line", "raw", "error"),
    [
        pytest.param(
            "a.txt",
            b"\xffok\r\n",
            1,
            "\\xffok",
            "byte 0xff at position 0 is not UTF-8; save the file as UTF-8",
            id="text",
        ),
        pytest.param(
            "a.jsonl",
            b'{"a": "\xe9"}',
            1,
            '{"a": "\\xe9"}',
            "byte 0xe9 at position 7 is not UTF-8; save the file as UTF-8",
            id="Latin-1",
        ),
        pytest.param(
            "a.jsonl",
            b'{"a": 1,\n',
            1,
            '{"a": 1,',
            "not JSON: Expecting property name enclosed in double quotes at character 9; expected an object",
            id="cut",
        ),
        pytest.param(
            "a.jsonl", b"{} {}", 1, "{} {}", "not JSON: Extra data at character 4; expected an object", id="two"
        ),
        pytest.param("a.jsonl", b"[1]", 1, "[1]", "the line holds [1]; expected a JSON object", id="array"),
        pytest.param("a.jsonl", b"null", 1, "null", "the line holds null; expected a JSON object", id="null"),
        pytest.param(
            "a.jsonl",
            b'{"a": NaN}',
            1,
            '{"a": NaN}',
            "not JSON that can be read: JSON has no NaN; expected an object",
            id="NaN",
        ),
        pytest.param("a.jsonl", b"\n{}", 1, "", "the line is blank; remove it", id="blank"),
        pytest.param(
            "a.csv", b"a,b\n1,2,3", 2, "1,2,3", "3 values; expected 2, one for each of a, b", id="too many values"
        ),
        pytest.param("a.csv", b"a,b\n\n1,2", 2, "", "the line is blank; remove it", id="blank row"),
        pytest.param(
            "a.csv", b'a,b\n"1\n2"\n', 2, '"1\n2"', "1 values; expected 2, one for each of a, b", id="too few"
        ),
        pytest.param(
            "a.csv",
            b'a\n"1" 2\n',
            2,
            '"1" 2',
            "not CSV: ',' expected after '\"'; double the quotes inside a value",
            id="after the quote",
        ),
        pytest.param(
            "a.csv", b'a\n"1\n', 2, '"1', "not CSV: unexpected end of data; double the quotes inside a value", id="open"
        ),
        pytest.param(
            "a.csv",
            b"a\n\xff\n",
            2,
            "\\xff",
            "byte 0xff at position 0 is not UTF-8; save the file as UTF-8",
            id="bytes",
        ),
    ],
)
def test_a_malformed_line_is_a_record_that_says_why(write, name, content, line, raw, error) -> None:
    first = next(read_records(write(name, content)))
    assert first == Record(line=line, fields={"raw": raw}, error=error)


@pytest.mark.parametrize("content", [b'{"a": ' + b"1" * 5000 + b"}", b"[" * 100_000], ids=["digits", "brackets"])
def test_json_beyond_pythons_limits_is_malformed(write, content: bytes) -> None:
    (record,) = read_records(write("a.jsonl", content))
    assert record.error is not None
    assert record.error.startswith("not JSON that can be read: ")
    assert record.fields == {"raw": content.decode()}


def test_after_a_quote_that_is_never_closed_the_next_line_is_read_again(write) -> None:
    content = 'text,id\n"open,1\nb,2\n"c",3\n' + "d,4\n" * 3
    records = list(read_records(write("a.csv", content)))
    assert [(record.line, record.fields.get("id"), record.error is None) for record in records] == [
        (2, None, False),
        (3, "2", True),
        (4, "3", True),
        (5, "4", True),
        (6, "4", True),
        (7, "4", True),
    ]


def test_an_open_quote_is_not_looked_for_in_the_rest_of_a_large_file(write) -> None:
    records = read_records(write("a.csv", 'text\n"open\n' + ("x" * 999 + "\n") * 3000))
    assert (
        next(records).error == "not CSV: a quote is not closed within 1048576 bytes; double the quotes inside a value"
    )
    assert [len(record.fields["text"]) for record in records] == [999] * 3000


# Streaming


def test_standard_input_is_read_line_by_line_as_it_arrives() -> None:
    code = (
        "from hf_bucket.data import read_records\n"
        "for record in read_records(None, kind='jsonl'): print(record.fields['n'], flush=True)"
    )
    with subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as child:
        for number in (b"1", b"2"):
            child.stdin.write(b'{"n": ' + number + b"}\n")
            child.stdin.flush()
            assert child.stdout.readline().strip() == number


def test_standard_input_stays_open(monkeypatch) -> None:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"a,b\n1,2\n")))
    assert rows(None, "csv") == [(2, {"a": "1", "b": "2"})]
    assert not sys.stdin.buffer.closed


def test_reading_needs_memory_for_a_line_and_not_for_the_file(write) -> None:
    import tracemalloc

    path = write("a.jsonl", '{"text": "some words of a text"}\n' * 20_000 + "\n" * 20_000)
    tracemalloc.start()
    assert sum(1 for _ in read_records(path)) == 20_000
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 200_000


def test_threads_read_long_csv_texts_at_once(write) -> None:
    path, found = write("a.csv", "text\n" + f"{LONG}\n" * 5), []
    threads = [threading.Thread(target=lambda: found.append(len(rows(path)))) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [5] * 4


# Parquet


def test_parquet_rows_come_in_order_with_their_types(parquet) -> None:
    count = 2500
    path = parquet(
        {"text": [f"t{n}" for n in range(count)], "n": list(range(count)), "v": [[n, None] for n in range(count)]}
    )
    assert rows(path) == [(n + 1, {"text": f"t{n}", "n": n, "v": [n, None]}) for n in range(count)]
    assert columns_of(path) == ("text", "n", "v")


def test_a_parquet_row_with_bytes_that_are_no_text_is_malformed(parquet) -> None:
    text = pyarrow.array([b"good", b"b\xff", b"more"]).cast(pyarrow.binary()).view(pyarrow.string())
    records = list(read_records(parquet(pyarrow.table({"text": text, "n": [1, 2, 3]}))))
    assert [record.line for record in records] == [1, 2, 3]
    assert [record.error is None for record in records] == [True, False, True]
    assert records[1].fields == {"raw": {"n": 2}}
    assert records[1].error.startswith("column 'text' cannot be read: 'utf-8' codec can't decode byte 0xff")


def test_parquet_without_pyarrow_names_the_command(parquet, monkeypatch) -> None:
    path = parquet({"text": ["a"]})
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    with pytest.raises(
        DependencyError, match=r"reading parquet files needs pyarrow.*pip install \"hf-bucket\[eval\]\""
    ):
        next(read_records(path))


def test_a_damaged_parquet_file_is_an_error(write) -> None:
    with pytest.raises(DataError, match=r"a\.parquet cannot be read: .*Parquet"):
        next(read_records(write("a.parquet", b"PAR1 no more")))


# What concerns the whole file


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"a,b,a\n1,2,3\n", r"a\.csv has more than one column 'a'; rename all but one of them"),
        (b"\na,b\n", r"a\.csv: line 1 is blank; the first line must hold the column names"),
        (b'"a" b\n', r"a\.csv: not CSV: ',' expected after '\"'; .*; the first line must hold the column names"),
        (b"\xff\n", r"a\.csv: byte 0xff at position 0 is not UTF-8; save the file as UTF-8; the first line"),
    ],
    ids=["doubled", "blank", "malformed", "bytes"],
)
def test_a_csv_without_usable_column_names_is_an_error(write, content: bytes, message: str) -> None:
    path = write("a.csv", content)
    for read in (columns_of, lambda path: next(read_records(path))):
        with pytest.raises(DataError, match=message):
            read(path)


def test_doubled_parquet_columns_are_an_error(parquet) -> None:
    path = parquet(pyarrow.table([[1], [2]], names=["a", "a"]))
    for read in (columns_of, lambda path: next(read_records(path))):
        with pytest.raises(DataError, match=r"^\S+rows\.parquet has more than one column 'a'"):
            read(path)


@pytest.mark.parametrize(
    ("name", "kind", "message"),
    [
        ("none.txt", None, r"none\.txt does not exist; give one data file"),
        ("", None, r" is a folder; give one data file"),
        (
            "a.xlsx",
            None,
            r"a\.xlsx has none of the suffixes \.txt, .*\.parquet; rename it, or name its kind: text, jsonl, csv",
        ),
        ("a.xlsx", "excel", "kind 'excel' is not known; use one of text, jsonl, csv, parquet"),
        (None, None, "standard input needs its kind; use one of text, jsonl, csv$"),
        (None, "parquet", "standard input cannot be parquet, which is not read from front to back; use one of text"),
    ],
    ids=["missing", "folder", "suffix", "kind", "stdin", "stdin parquet"],
)
def test_what_cannot_be_read_is_refused_before_the_first_row(write, tmp_path, name, kind, message) -> None:
    write("a.xlsx", b"")
    with pytest.raises(DataError, match=message):
        read_records(None if name is None else tmp_path / name, kind=kind)


def test_a_file_that_the_system_cannot_read_is_a_data_error(write, monkeypatch) -> None:
    path = write("a.txt", b"a")

    def refuse(self, mode):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "open", refuse)
    with pytest.raises(DataError, match=r"a\.txt cannot be read: Permission denied"):
        next(read_records(path))


def test_every_suffix_has_a_kind_and_a_kind_given_wins(write) -> None:
    assert set(SUFFIXES.values()) == set(KINDS)
    assert rows(write("a.csv", b'{"a": 1}'), "jsonl") == [(1, {"a": 1})]


# Columns


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        ("a.txt", b"", ("text",)),
        ("a.csv", b'"a",b\n', ("a", "b")),
        ("a.csv", b"", ()),
        ("a.jsonl", b'oops\n{"a": 1, "b": 2}\n{"c": 3}', ("a", "b")),
        ("a.jsonl", b"", ()),
    ],
    ids=["text", "CSV", "empty CSV", "JSONL", "empty JSONL"],
)
def test_the_columns_of_a_file(write, name, content, expected) -> None:
    assert columns_of(write(name, content)) == expected


@pytest.mark.parametrize(
    ("fields", "pair_column", "expected"),
    [
        ({"sentence": "a", "text": "b", "x": "c"}, None, "text"),
        ({"x": "c", "sentence": "a"}, None, "sentence"),
        ({"id": 3, "review": "a", "stars": 5.0}, None, "review"),
        ({"length": 3}, None, "length"),
        ({"a": "x", "b": "y"}, "b", "a"),
        ({"text": "x", "b": "y"}, "text", "b"),
    ],
    ids=["text", "sentence", "only string", "only column", "not the pair", "the pair is called text"],
)
def test_the_text_column_is_found_when_it_is_clear(fields, pair_column, expected) -> None:
    assert pick_column(fields, pair_column) == expected


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"a": "x", "b": "y", "c": 1}, "and 2 of the columns a, b, c hold a string; name the column of the text"),
        ({"a": 1, "b": 2}, "and 0 of the columns a, b hold a string"),
        ({}, 'no column is called "text" or "sentence", and 0 of the columns no columns hold a string'),
    ],
    ids=["two", "none", "empty"],
)
def test_a_text_column_that_is_not_clear_is_an_error_with_the_columns(fields, message: str) -> None:
    with pytest.raises(DataError, match=message):
        pick_column(fields)


def test_a_text_or_a_pair_is_taken_from_a_record() -> None:
    record = Record(line=1, fields={"a": "x", "b": ""})
    assert text_of(record, "a") == "x"
    assert text_of(record, "a", "b") == ("x", "")


@pytest.mark.parametrize(
    ("record", "message"),
    [
        (Record(line=1, fields={"a": "x", "c": "y"}), "no column 'b'; the file has a, c"),
        (Record(line=1, fields={}), "no column 'a'; the file has no columns"),
        (Record(line=1, fields={"a": None}), "column 'a' holds None; expected a text"),
        (Record(line=1, fields={"a": "x", "b": 3}), "column 'b' holds 3; expected a text"),
        (Record(line=1, fields={"raw": "{"}, error="not JSON"), "^not JSON$"),
    ],
    ids=["missing", "empty", "None", "number", "malformed"],
)
def test_a_record_without_a_text_says_what_it_has(record: Record, message: str) -> None:
    with pytest.raises(DataError, match=message):
        text_of(record, "a", "b")


# Planning


@pytest.mark.parametrize(
    ("name", "content", "options", "expected"),
    [
        ("a.txt", "12\n 7\n\n300\n", {}, [12, 7, 300]),
        ("a.txt", "12\nseven\n", {}, ["12", "seven"]),
        ("a.txt", "\n\n", {}, ["", ""]),
        ("a.txt", "²\n", {}, ["²"]),
        ("a.txt", "12\x1d\n\x1c7\n", {}, [12, 7]),  # spaces to str.strip, but not to int
        ("a.txt", "9" * 5000, {}, ["9" * 5000]),
        ("a.csv", "length\n3\n4\n", {}, [3, 4]),
        ("a.csv", "a,b\n3,4\n", {"column": "a", "pair_column": "b"}, [("3", "4")]),
        ("a.jsonl", '{"text": "3"}\n', {}, ["3"]),
        ("a.jsonl", '{"n": 3}\n{"n": 4}\n', {}, [3, 4]),
        ("a.jsonl", '{"n": 3, "s": "x"}\n', {"column": "n"}, [3]),
        ("a.jsonl", '{"p": "x", "q": "y"}\n', {"pair_column": "q"}, [("x", "y")]),
    ],
    ids=[
        "numbers",
        "mixed",
        "blank",
        "superscript",
        "separators",
        "too long",
        "CSV",
        "CSV pair",
        "JSON text",
        "JSON",
        "named",
        "pair",
    ],
)
def test_a_column_is_texts_pairs_or_lengths(write, name, content, options, expected) -> None:
    assert read_column(write(name, content), **options) == expected


def test_a_parquet_column_is_lengths_or_texts(parquet) -> None:
    path = parquet({"text": ["a", "b"], "n": [5, 6]})
    assert read_column(path) == ["a", "b"]
    assert read_column(path, column="n") == [5, 6]


@pytest.mark.parametrize(
    ("content", "options", "message"),
    [
        ("", {}, r"a\.jsonl has no rows; give a file with only texts, or only whole numbers, in a column"),
        ('{"n": 1}\n{"n": "x"}\n', {}, r"a\.jsonl has 1 lengths and 1 texts; give a file with only texts"),
        ('{"n": 1}\n{"m": 2}\n', {}, r"a\.jsonl, line 2: no column 'n'; the file has m"),
        ('{"n": true}\n', {}, r"a\.jsonl, line 1: column 'n' holds True; expected a text"),
        ('{"n": 1.5}\n', {}, r"a\.jsonl, line 1: column 'n' holds 1.5; expected a text"),
        (
            '{"n": 1, "m": "a"}\n',
            {"column": "n", "pair_column": "m"},
            "line 1: column 'n' holds 1; expected a text",
        ),
        ("{}}\n", {}, r"a\.jsonl, line 1: not JSON: Extra data"),
    ],
    ids=["empty", "mixed", "missing", "bool", "float", "pair", "malformed"],
)
def test_a_column_that_cannot_be_planned_from_is_an_error_with_its_line(write, content, options, message) -> None:
    with pytest.raises(DataError, match=message):
        read_column(write("a.jsonl", content), **options)


@pytest.mark.parametrize(
    ("rows", "options", "expected"),
    [
        ([{"text": "a", "label": 1}, {"text": "b", "label": 0}], {}, ["a", "b"]),
        ([{"q": "a", "s": "b"}], {"column": "q", "pair_column": "s"}, [("a", "b")]),
        ([{"length": 3}], {}, [3]),
    ],
    ids=["texts", "pairs", "lengths"],
)
def test_a_column_of_a_data_set_is_like_that_of_a_file(monkeypatch, rows, options, expected) -> None:
    asked: list[tuple] = []
    hub = SimpleNamespace(load_dataset=lambda *names, split: asked.append((*names, split)) or rows)
    monkeypatch.setitem(sys.modules, "datasets", hub)
    assert read_dataset_column("a/b", config="c", split="test", **options) == expected
    assert asked == [("a/b", "c", "test")]


def test_a_data_set_that_cannot_be_had_is_an_error(monkeypatch) -> None:
    def load_dataset(name, config, *, split):
        if name == "empty":
            return []
        raise ValueError("Unknown split")

    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=load_dataset))
    with pytest.raises(DataError, match=r"a/b train cannot be had from the Hub \(Unknown split\); check its name"):
        read_dataset_column("a/b")
    with pytest.raises(DataError, match="empty mrpc train has no rows"):
        read_dataset_column("empty", config="mrpc")
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(DependencyError, match="reading data sets of the Hub needs datasets"):
        read_dataset_column("a/b")


def test_reading_lines_loads_no_heavy_library() -> None:
    heavy = ("numpy", "pyarrow", "tokenizers", "pandas")
    code = f"import sys, hf_bucket.data; print([name for name in {heavy} if name in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout == "[]\n"


def test_dates_in_parquet_stay_dates(parquet) -> None:
    assert rows(parquet({"when": [datetime(2024, 5, 1)]})) == [(1, {"when": datetime(2024, 5, 1)})]
