"""Text, JSONL, CSV and parquet files as streams of records; a row that cannot be read is a record too, and says why."""

from __future__ import annotations

import codecs
import csv
import importlib
import json
import sys
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, BinaryIO, NoReturn, TypeAlias

from hf_bucket.errors import DataError, missing_part

if TYPE_CHECKING:
    from hf_bucket.encode import Text

_OF_LINES = {".txt": "text", ".jsonl": "jsonl", ".ndjson": "jsonl", ".json": "jsonl", ".csv": "csv", ".tsv": "csv"}
SUFFIXES: Mapping[str, str] = MappingProxyType({**_OF_LINES, ".parquet": "parquet"})
KINDS = tuple(dict.fromkeys(SUFFIXES.values()))

_RECORD_BYTES = 1 << 20  # of one CSV record of several lines; a quote that is open for longer was never meant to be one
_MOST_DIGITS = 100  # of a length in a file of texts; Python itself refuses to read a number of some thousands


@dataclass(frozen=True, slots=True, kw_only=True)
class Record:
    """One row of a file.

    Attributes:
        line: number of its first line, from 1, a CSV's header counted; in a parquet file the number of the row, from 1.
        fields: values by column, ``{"text": line}`` of a text file; strings in CSV, JSON's types in JSONL. Of a row
            that cannot be read ``{"raw": ...}``, what could be; bytes that are not UTF-8 look like ``\\xff`` in it.
        error: why the row cannot be read; None when it can.
        json: the object as it stands in a JSONL file, without surrounding spaces; None for other files and bad lines.
    """

    line: int
    fields: Mapping[str, Any]
    error: str | None = None
    json: str | None = None


def read_records(path: Path | None, *, kind: str | None = None) -> Iterator[Record]:
    """Return the rows of a file in their order, read as they are asked for.

    Lines end with a newline, with or without a carriage return before it; a UTF-8 byte order mark is dropped. A blank
    line is an empty text of a text file. In JSONL and CSV blank lines at the end are nothing, elsewhere they are
    malformed. A CSV file starts with its column names; ``.tsv`` is CSV with tabs.

    Args:
        path: None is standard input.
        kind: ``"text"``, ``"jsonl"``, ``"csv"`` or ``"parquet"``; None goes by the suffix.

    Raises:
        DataError: no such file or kind; while reading, column names that are missing or doubled, a damaged file.
        DependencyError: a parquet file without pyarrow.
    """
    source = _source(path, kind)
    return _read_parquet(source) if source.kind == "parquet" else _read_lines(source)


def columns_of(path: Path, kind: str | None = None) -> tuple[str, ...]:
    """Return the column names; of JSONL the keys of the first readable line. Raises what ``read_records`` does."""
    source = _source(path, kind)
    if source.kind == "text":
        return ("text",)
    if source.kind == "parquet":
        with _parquet_file(source) as file:
            return _distinct(file.schema_arrow.names, source)
    if source.kind == "csv":
        with _opened(source) as stream:
            return _csv_header(_csv_records(stream, source), source)
    return next((tuple(record.fields) for record in read_records(path, kind=kind) if record.error is None), ())


def check_columns(path: Path, *, kind: str | None = None, column: str | None, pair_column: str | None) -> None:
    """Raise a DataError if a column that is named is in none of a file's first 1,024 rows; None names none."""
    known = dict.fromkeys(columns_of(path, kind))
    for record in islice(read_records(path, kind=kind), 1024):
        known.update(dict.fromkeys(() if record.error else record.fields))
    for name in (column, pair_column):
        if known and name is not None and name not in known:
            raise DataError(f"{path} has no column {name!r}; it has {_listed(known)}")


def pick_column(fields: Mapping[str, Any], pair_column: str | None = None) -> str:
    """Return the text's column: ``text``, or ``sentence``, or the only one, or the only one that holds a string.

    Raises:
        DataError: it is not clear which, among all but ``pair_column``; the message lists the columns.
    """
    others = [name for name in fields if name != pair_column]
    strings = [name for name in others if isinstance(fields[name], str)]
    for names in (["text"], ["sentence"], others, strings):
        if len(names) == 1 and names[0] in others:
            return names[0]
    found = f"{len(strings)} of the columns {_listed(others)} hold a string"
    raise DataError(f'no column is called "text" or "sentence", and {found}; name the column of the text')


def text_of(record: Record, column: str, pair_column: str | None = None) -> Text:
    """Return the text of a record, or its pair of texts when ``pair_column`` is given.

    Raises:
        DataError: the record could not be read, lacks a column, or holds something else than a string there.
    """
    if record.error is not None:
        raise DataError(record.error)
    text = _string(record, column)
    return text if pair_column is None else (text, _string(record, pair_column))


def read_column(
    path: Path | None, *, kind: str | None = None, column: str | None = None, pair_column: str | None = None
) -> list[str | tuple[str, str]] | list[int]:
    """Return a whole column to plan a ladder from: texts, pairs, or lengths in tokens.

    Whole numbers are lengths, and so are the strings of a text file or a CSV column when every one of them is a whole
    number, blank ones left out.

    Args:
        column: None is what ``pick_column`` picks from the first row.
        pair_column: column of the second texts; then numbers are not lengths.

    Raises:
        DataError: as ``read_records`` and ``text_of`` do, with the line; or there are no rows.
    """
    source = _source(path, kind)
    values = _planned(read_records(path, kind=kind), source.name, column, pair_column)
    if source.kind in ("text", "csv") and pair_column is None:
        filled = [value.strip() for value in values if value.strip()]
        if filled and all(value.isascii() and value.isdecimal() and len(value) <= _MOST_DIGITS for value in filled):
            return [int(value) for value in filled]
    return values


def read_dataset_column(
    name: str,
    *,
    config: str | None = None,
    split: str = "train",
    column: str | None = None,
    pair_column: str | None = None,
) -> list[str | tuple[str, str]] | list[int]:
    """Return a column of a data set on the Hub, or in the Hub's cache, as ``read_column`` does that of a file.

    Raises:
        DataError, DependencyError: as ``read_column`` does, or when the data set or the library is not there.
    """
    where = " ".join(part for part in (name, config, split) if part)
    try:
        rows = importlib.import_module("datasets").load_dataset(name, config, split=split)
    except ModuleNotFoundError as error:
        raise missing_part("datasets", "eval", "reading data sets of the Hub") from error
    except (OSError, ValueError) as error:
        raise DataError(f"{where} cannot be had from the Hub ({error}); check its name and the network") from error
    records = (Record(line=number, fields=row) for number, row in enumerate(rows, 1))
    return _planned(records, where, column, pair_column)


def _planned(records: Iterable[Record], name: str, column: str | None, pair_column: str | None) -> list[Any]:
    values: list[Any] = []
    for record in records:
        if column is None and record.error is None:
            column = pick_column(record.fields, pair_column)
        number = record.fields.get(column or "") if pair_column is None else None
        try:
            values.append(number if type(number) is int else text_of(record, column or "", pair_column))
        except DataError as error:
            raise DataError(f"{name}, line {record.line}: {error}") from error
    counted = sum(isinstance(value, int) for value in values)
    if not values or counted not in (0, len(values)):
        found = f"{counted} lengths and {len(values) - counted} texts" if values else "no rows"
        raise DataError(f"{name} has {found}; give a file with only texts, or only whole numbers, in a column")
    return values


def _string(record: Record, column: str) -> str:
    if column not in record.fields:
        raise DataError(f"no column {column!r}; the file has {_listed(record.fields)}")
    value = record.fields[column]
    if not isinstance(value, str):
        raise DataError(f"column {column!r} holds {value!r:.50}; expected a text")
    return value


def _listed(names: Iterable[str]) -> str:
    return ", ".join(names) or "no columns"


@dataclass(frozen=True, slots=True, kw_only=True)
class _Source:
    path: Path | None
    kind: str
    delimiter: str

    @property
    def name(self) -> str:
        return "standard input" if self.path is None else str(self.path)


def _source(path: Path | None, kind: str | None) -> _Source:
    if kind is not None and kind not in KINDS:
        raise DataError(f"kind {kind!r} is not known; use one of {', '.join(KINDS)}")
    suffix = "" if path is None else path.suffix.lower()
    if path is None:
        if kind in (None, "parquet"):
            which = "needs its kind" if kind is None else "cannot be parquet, which is not read from front to back"
            raise DataError(f"standard input {which}; use one of {', '.join(KINDS[:-1])}")
    elif not path.exists() or path.is_dir():
        raise DataError(f"{path} {'is a folder' if path.exists() else 'does not exist'}; give one data file")
    elif kind is None and suffix not in SUFFIXES:
        raise DataError(
            f"{path} has none of the suffixes {', '.join(SUFFIXES)}; rename it, or name its kind: {', '.join(KINDS)}"
        )
    return _Source(path=path, kind=kind or SUFFIXES[suffix], delimiter="\t" if suffix == ".tsv" else ",")


@contextmanager
def _opened(source: _Source) -> Iterator[BinaryIO]:
    try:
        with nullcontext(sys.stdin.buffer) if source.path is None else source.path.open("rb") as file:
            yield file
    except OSError as error:
        raise DataError(f"{source.name} cannot be read: {error.strerror or error}") from error


_Parse: TypeAlias = Callable[[str], Mapping[str, Any]]  # the fields of a row, or DataError
_Row: TypeAlias = tuple[
    int, bytes, _Parse | None
]  # line, content, how to parse it; None of a blank line that is no row


def _read_lines(source: _Source) -> Iterator[Record]:
    blank = 0
    with _opened(source) as stream:
        for line, content, parse in _csv_rows(stream, source) if source.kind == "csv" else _line_rows(stream, source):
            if parse is None:
                blank += 1
                continue
            for earlier in range(line - blank, line):  # which were not the end of the file after all
                yield Record(line=earlier, fields={"raw": ""}, error="the line is blank; remove it")
            blank = 0
            yield _record(line, content, parse, is_json=source.kind == "jsonl")


def _lines(stream: BinaryIO) -> Iterator[tuple[int, bytes]]:
    """Yield line numbers and lines with their ends; not ``str.splitlines``, which also splits at U+2028 and others."""
    for number, line in enumerate(stream, 1):
        content = line.removeprefix(codecs.BOM_UTF8) if number == 1 else line
        if content:
            yield number, content


def _record(line: int, content: bytes, parse: _Parse, *, is_json: bool = False) -> Record:
    """Return the record that ``parse`` makes of a row, or that of a bad row when it raises DataError."""
    content = content[:-2] if content.endswith(b"\r\n") else content.removesuffix(b"\n")
    try:
        text = content.decode("utf-8")
        return Record(line=line, fields=parse(text), json=text.strip() if is_json else None)
    except UnicodeDecodeError as bad:
        error = f"byte {content[bad.start]:#04x} at position {bad.start} is not UTF-8; save the file as UTF-8"
    except DataError as bad:
        error = str(bad)
    return Record(line=line, fields={"raw": content.decode("utf-8", "backslashreplace")}, error=error)


def _line_rows(stream: BinaryIO, source: _Source) -> Iterator[_Row]:
    for number, line in _lines(stream):
        if source.kind == "text":
            yield number, line, lambda text: {"text": text}
        else:
            yield number, line, None if line.isspace() else _json_fields


def _json_fields(text: str) -> dict[str, Any]:
    try:
        fields = json.loads(text, parse_constant=_refuse_constant)
    except json.JSONDecodeError as error:
        raise DataError(f"not JSON: {error.msg} at character {error.pos + 1}; expected an object") from error
    except (ValueError, RecursionError) as error:  # NaN, a number of thousands of digits, brackets without end
        raise DataError(f"not JSON that can be read: {error}; expected an object") from error
    if not isinstance(fields, dict):
        raise DataError(f"the line holds {text:.50}; expected a JSON object")
    return fields


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"JSON has no {name}")


class _CsvLines:
    """Lines for a ``csv.reader``. Of a record that cannot be parsed all but the first line can be read again."""

    def __init__(self, stream: BinaryIO) -> None:
        self._lines = _lines(stream)
        self._again: deque[tuple[int, bytes]] = deque()
        self._taken: list[tuple[int, bytes]] = []
        self._size = 0

    def __iter__(self) -> Iterator[str]:
        return self

    def __next__(self) -> str:
        if self._size > _RECORD_BYTES:
            raise csv.Error(f"a quote is not closed within {_RECORD_BYTES} bytes")
        line = self._again.popleft() if self._again else next(self._lines)
        self._taken.append(line)
        self._size += len(line[1])
        return line[1].decode("utf-8", "surrogateescape")

    def take(self, *, first_only: bool = False) -> tuple[int, bytes]:
        """Return the number of the first line and the content of all since the last call; or of the first alone."""
        taken = self._taken[:1] if first_only else self._taken
        self._again.extendleft(reversed(self._taken[len(taken) :]))
        self._taken, self._size = [], 0
        return taken[0][0], b"".join(line for _, line in taken)


_CsvRecord: TypeAlias = tuple[int, bytes, list[str] | csv.Error]  # line, content, values or what is wrong with them


def _csv_records(stream: BinaryIO, source: _Source) -> Iterator[_CsvRecord]:
    """Yield every record; a blank line has no values."""
    # The csv module's limit is one of the whole process and smaller; it is raised and never lowered, so threads agree.
    csv.field_size_limit(max(csv.field_size_limit(), 2 * _RECORD_BYTES))
    lines = _CsvLines(stream)
    reader = csv.reader(lines, delimiter=source.delimiter, strict=True)
    while True:
        try:
            values = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            yield *lines.take(first_only=True), error
            continue
        yield *lines.take(), values


def _csv_fields(text: str, *, values: list[str] | csv.Error, names: Sequence[str]) -> dict[str, str]:
    if isinstance(values, csv.Error):
        raise DataError(f"not CSV: {values}; double the quotes inside a value") from values
    if len(values) != len(names):
        raise DataError(f"{len(values)} values; expected {len(names)}, one for each of {_listed(names)}")
    return dict(zip(names, values, strict=True))


def _csv_header(records: Iterator[_CsvRecord], source: _Source) -> tuple[str, ...]:
    """Return the column names, none for a file without a line."""
    line, content, values = next(records, (0, b"", [""]))
    names = values if isinstance(values, list) else []
    error = _record(line, content, partial(_csv_fields, values=values, names=names)).error
    if error is not None or not names:
        raise DataError(f"{source.name}: {error or 'line 1 is blank'}; the first line must hold the column names")
    return _distinct(names, source) if line else ()


def _distinct(names: Sequence[str], source: _Source) -> tuple[str, ...]:
    doubled = next((name for name in names if names.count(name) > 1), None)
    if doubled is not None:
        raise DataError(f"{source.name} has more than one column {doubled!r}; rename all but one of them")
    return tuple(names)


def _csv_rows(stream: BinaryIO, source: _Source) -> Iterator[_Row]:
    records = _csv_records(stream, source)
    names = _csv_header(records, source)
    for line, content, values in records:
        yield line, content, None if values == [] else partial(_csv_fields, values=values, names=names)


@contextmanager
def _parquet_file(source: _Source) -> Iterator[Any]:
    try:
        parquet = importlib.import_module("pyarrow.parquet")
    except ModuleNotFoundError as error:
        raise missing_part("pyarrow", "eval", "reading parquet files") from error
    try:
        with parquet.ParquetFile(source.path) as file:
            yield file
    except DataError:
        raise
    except (OSError, ValueError, NotImplementedError) as error:  # what pyarrow's own exceptions are
        raise DataError(f"{source.name} cannot be read: {error}") from error


def _read_parquet(source: _Source) -> Iterator[Record]:
    with _parquet_file(source) as file:
        names = _distinct(file.schema_arrow.names, source)
        places = ((batch, row) for batch in file.iter_batches(batch_size=1024) for row in range(batch.num_rows))
        for number, (batch, row) in enumerate(places, 1):
            yield _parquet_record(number, {name: batch.column(name)[row] for name in names})


def _parquet_record(number: int, cells: Mapping[str, Any]) -> Record:
    fields: dict[str, Any] = {}
    error = None
    for name, cell in cells.items():
        try:
            fields[name] = cell.as_py()
        except ValueError as reason:  # bytes that are not UTF-8, a time finer than Python's
            error = error or f"column {name!r} cannot be read: {reason}"
    return Record(line=number, fields=fields if error is None else {"raw": fields}, error=error)
