"""Fuzzes the readers of data files: any bytes are records in their order, bad ones among them, or a DataError."""

from __future__ import annotations

import io
import json
import tempfile
from pathlib import Path
from typing import Any

import atheris
from drive import drive

with atheris.instrument_imports(include=["hf_bucket"]):
    from hf_bucket.data import Record, check_columns, columns_of, pick_column, read_column, read_records, text_of
    from hf_bucket.errors import DataError

SUFFIXES = (".txt", ".jsonl", ".csv", ".tsv", ".parquet")  # the first byte of an input says which
FOLDER = tempfile.TemporaryDirectory(prefix="fuzz-data-")


def read(data: bytes) -> None:
    """Read a file in every way there is."""
    suffix = SUFFIXES[data[0] % len(SUFFIXES)] if data else ".txt"
    path = Path(FOLDER.name) / f"x{suffix}"
    path.write_bytes(data[1:])
    try:
        records = list(read_records(path))
        columns = columns_of(path)
        check_columns(path, column=None, pair_column=None)
    except DataError:
        return
    numbers = [record.line for record in records]
    assert numbers == sorted(set(numbers))
    for record in records:
        _check(record, columns)
    try:
        assert len(read_column(path)) <= len(records)
    except DataError:
        return


def _check(record: Record, columns: tuple[str, ...]) -> None:
    assert (record.error is None) or set(record.fields) == {"raw"}
    if record.json is not None:
        assert json.loads(record.json) == record.fields
    try:
        column = pick_column(record.fields)
        assert record.error is not None or not columns or column in record.fields
        assert isinstance(text_of(record, column), str)
    except DataError:
        return


def parquet(columns: dict[str, Any], **options: Any) -> bytes:
    """A small parquet file."""
    import pyarrow
    import pyarrow.parquet

    file = io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.table(columns), file, **options)
    return file.getvalue()


if __name__ == "__main__":
    plain = {"use_dictionary": False, "compression": "none", "write_statistics": False}
    contents = {
        "text": b"\0a film\n\nb\r\n12\n",
        "jsonl": b'\1{"text": "a", "n": [1, 2.5, null, true]}\n{"sentence": "\\ud800"}\nx\n{"n": NaN}\n',
        "csv": b'\2text,label\n"a, ""b""\nc",0\n\nd,1\nbad,1,2\n',
        "tsv": b"\3\xef\xbb\xbftext\tn\na\t1\n\xff\t2\n",
        "parquet": b"\4" + parquet({"text": ["a", None, "é"], "n": [1, 2, 3]}, store_schema=False),
        "plain-parquet": b"\4" + parquet({"sentence": ["a"]}, store_schema=False, **plain),
    }
    words = [
        '{"text": "',
        '"}',
        "NaN",
        "Infinity",
        "\\ud800",
        '"',
        '""',
        ",",
        "\t",
        "\r",
        "\r\n",
        "\n",
        "\0",
        "\ufeff",
        "\u2028",
    ]
    words += ["text", "sentence", "label", "[" * 60, "9" * 60, "1e999", "PAR1"]
    drive(read, seeds=contents, words=words)
