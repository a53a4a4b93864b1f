"""Classify the rows of a file: one line out for every row in, in order, whatever is wrong with some of them."""

from __future__ import annotations

import csv
import io
import json
import math
import os
import re
import signal
import sys
import threading
from collections.abc import Callable, Container, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hf_bucket.data import Record, pick_column, text_of
from hf_bucket.errors import DataError, InputError, TooLongError
from hf_bucket.pipelines import CallOptions, TextClassificationPipeline

if TYPE_CHECKING:
    from hf_bucket.encode import Text


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """How many rows were written, and how many of them with an error instead of a label."""

    rows: int
    failed: int


def predict(
    classify: TextClassificationPipeline,
    records: Iterable[Record],
    write: Callable[[str], object],
    *,
    column: str | None = None,
    pair_column: str | None = None,
    top_k: int | None = None,
    window: int = 1024,
    as_csv: bool = False,
) -> Outcome:
    """Write every record with its labels.

    A line is the record's fields as they were (of JSONL character by character), then ``label`` and ``score``, or with
    ``top_k`` ``labels``: ``[{"label", "score"}, ...]``, best first. A row that cannot be classified (a malformed line,
    no text, a lone surrogate, too long a text that may not be cut, logits that are no numbers) has ``line`` and
    ``error`` instead. A name of ours that the row has already gets ``predicted_`` before it, as often as it takes. What
    JSON cannot say (dates, bytes, NaN) becomes its ``str()``.

    In CSV the columns are those of the readable rows of the first window, then ``label``, ``score`` (or ``labels``, in
    JSON), ``line``, ``error``, and ``rest``: in JSON, fields that have no column and what is left of a malformed line.

    Args:
        write: gets whole lines, each with its newline, after every window; no line holds a lone surrogate.
        column: column of the text; None is what ``pick_column`` picks from the first readable record.
        pair_column: column of the second text of a pair.
        top_k: labels per row; None is the best one alone, a number above that of the labels all of them.
        window: records read ahead at most, so that they can be sorted into buckets.

    Raises:
        InputError: ``top_k`` or ``window`` below 1.
        DataError: it is not clear which column holds the text; or ``records`` raised it.

    What ``records``, ``write`` or the engine raises comes after the lines of all windows before were written.
    """
    if window < 1:
        raise InputError(f"window must be a number of rows of at least 1, got {window!r}")
    CallOptions(top_k=top_k)  # refused here, where it is not yet taken for the fault of a row
    form = _Csv(top_k) if as_csv else _Jsonl()
    iterator, rows, failed = iter(records), 0, 0
    while batch := list(islice(iterator, window)):
        if column is None:
            readable = next((record.fields for record in batch if record.error is None), None)
            column = None if readable is None else pick_column(readable, pair_column)
        answers = _answer(classify, batch, (column or "", pair_column), top_k)
        write(form(answers))
        rows += len(answers)
        failed += sum("error" in answer.result for answer in answers)
    if as_csv and not rows:
        write(form([]))
    return Outcome(rows=rows, failed=failed)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Answer:
    """A record and what is added to it: names of ours and their values."""

    record: Record
    result: Mapping[str, Any]


def _answer(
    classify: TextClassificationPipeline, batch: Sequence[Record], columns: tuple[str, str | None], top_k: int | None
) -> list[_Answer]:
    texts: dict[int, Text] = {}
    results: dict[int, Mapping[str, Any]] = {}
    for row, record in enumerate(batch):
        try:
            texts[row] = text_of(record, *columns)
        except DataError as error:
            results[row] = {"error": str(error)}
    results.update(_classify(classify, texts, top_k))
    for row, result in results.items():
        if "error" in result:
            results[row] = {"line": batch[row].line, **result}
    return [_Answer(record=record, result=results[row]) for row, record in enumerate(batch)]


def _classify(
    classify: TextClassificationPipeline, texts: Mapping[int, Text], top_k: int | None
) -> dict[int, Mapping[str, Any]]:
    """Return the result of every text by row. Texts that raise are found by halves, the long ones side by side."""
    if not texts:
        return {}
    try:
        answers = classify(list(texts.values()), top_k=1 if top_k is None else top_k)
    except (InputError, TooLongError) as error:
        if len(texts) == 1:  # of one text the pipeline says "input 0", which would be taken for a line
            return {row: {"error": str(error).replace("input 0 ", "the text ", 1)} for row in texts}
        rows = sorted(texts, key=lambda row: (len("".join(texts[row])), row))
        halves = (rows[: len(rows) // 2], rows[len(rows) // 2 :])
        found: dict[int, Mapping[str, Any]] = {}
        for half in halves:
            found.update(_classify(classify, {row: texts[row] for row in half}, top_k))
        return found
    return {row: labels[0] if top_k is None else {"labels": labels} for row, labels in zip(texts, answers, strict=True)}


class LineWriter:
    """Writes whole lines of UTF-8 to a file or standard output, unbuffered: an interrupt never leaves half a line.

    SIGINT during a write is kept back until the line that is being written has ended, and is then raised as
    ``KeyboardInterrupt``; a second one is raised at once, for a reader that never reads again.
    """

    def __init__(self, path: Path | None) -> None:
        self._file = (
            sys.stdout.fileno() if path is None else os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o666)
        )
        self._owned = path is not None

    def __enter__(self) -> LineWriter:
        return self

    def __exit__(self, *exception: object) -> None:
        if self._owned:
            os.close(self._file)

    def write(self, lines: str) -> None:
        """Write lines, each with its newline. Raises OSError, of which BrokenPipeError is one."""
        data = lines.encode("utf-8")
        with _kept_back() as interrupted:
            done, end = 0, len(data)
            while done < end:
                done += os.write(self._file, memoryview(data)[done:end])
                if interrupted:
                    end = data.index(b"\n", max(done - 1, 0)) + 1
        if interrupted:
            raise KeyboardInterrupt


@contextmanager
def _kept_back() -> Iterator[list[int]]:
    """Collect a first SIGINT instead of raising it; only the main thread of a process can."""
    collected: list[int] = []
    if threading.current_thread() is not threading.main_thread():
        yield collected
        return
    usual = signal.getsignal(signal.SIGINT)

    def collect(number: int, frame: object) -> None:
        collected.append(number)
        signal.signal(signal.SIGINT, usual)

    signal.signal(signal.SIGINT, collect)
    try:
        yield collected
    finally:
        signal.signal(signal.SIGINT, usual)


class _Jsonl:
    """Makes lines of JSON; what came from JSONL keeps its very characters."""

    def __call__(self, answers: Sequence[_Answer]) -> str:
        return "".join(f"{self._line(answer.record, answer.result)}\n" for answer in answers)

    def _line(self, record: Record, result: Mapping[str, Any]) -> str:
        ours = _dumps({_free(name, record.fields): value for name, value in result.items()})[1:-1]
        theirs = (_dumps(record.fields) if record.json is None else record.json)[1:-1].strip()
        return f"{{{theirs}, {ours}}}" if theirs else f"{{{ours}}}"


class _Csv:
    """Makes lines of CSV, before the first one the header; its columns are settled by the first call."""

    def __init__(self, top_k: int | None) -> None:
        self._ours = ("label", "score", "line", "error") if top_k is None else ("labels", "line", "error")
        self._columns: tuple[str, ...] | None = None

    def __call__(self, answers: Sequence[_Answer]) -> str:
        header = ""
        if self._columns is None:
            readable = (answer.record.fields for answer in answers if answer.record.error is None)
            self._columns = tuple(dict.fromkeys(name for fields in readable for name in fields))
            header = _csv_line([*self._columns, *(_free(name, self._columns) for name in (*self._ours, "rest"))])
        columns = self._columns
        return header + "".join(self._line(answer.record, answer.result, columns) for answer in answers)

    def _line(self, record: Record, result: Mapping[str, Any], columns: Sequence[str]) -> str:
        known = (
            record.fields if record.error is None else {}
        )  # "raw" of a bad line is no column, even if one is called so
        rest = {name: value for name, value in record.fields.items() if name not in columns or name not in known}
        theirs = [known.get(name) for name in columns]
        return _csv_line([*theirs, *(result.get(name) for name in self._ours), rest or None])


def _free(name: str, taken: Container[str]) -> str:
    """Return our name for a value, one that the row does not have already."""
    while name in taken:
        name = f"predicted_{name}"
    return name


def _csv_line(values: Iterable[object]) -> str:
    """Return values as they are if they are strings, None as nothing, and others as JSON."""
    line = io.StringIO()
    cells = (value if isinstance(value, str) else "" if value is None else _dumps(value) for value in values)
    csv.writer(line, lineterminator="\r\n").writerow(cells)  # a lone "\r" is quoted only if it ends lines, too
    return line.getvalue().removesuffix("\r\n").encode("utf-8", "backslashreplace").decode("utf-8") + "\n"


def _dumps(value: object) -> str:
    plain = _plain(value)
    text = json.dumps(plain, ensure_ascii=False, allow_nan=False)
    return json.dumps(plain, allow_nan=False) if _LONE_SURROGATE.search(text) else text


_LONE_SURROGATE = re.compile("[\ud800-\udfff]")


def _plain(value: object) -> object:
    """Return what JSON can say: dates, bytes, numbers that are none and other strangers become their ``str()``."""
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    known = value is None or isinstance(value, (str, int)) or (isinstance(value, float) and math.isfinite(value))
    return value if known else repr(value) if isinstance(value, bytes) else str(value)
