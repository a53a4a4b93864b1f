"""What a certificate rests on: rows as tokens, and what torch, or another reference, answers to them."""

from __future__ import annotations

from array import array
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Protocol, TypeAlias, TypeVar

import numpy as np
from numpy.typing import NDArray

from hf_bucket.artifact import Artifact, hash_file
from hf_bucket.batch import Features
from hf_bucket.data import Record, check_columns, pick_column, read_records, text_of
from hf_bucket.encode import Encoder, Text
from hf_bucket.errors import DataError, DependencyError, ModelError
from hf_bucket.manifest import MANIFEST
from hf_bucket.probes import PROBES, load_probes, probe_features
from hf_bucket.runner import Runner
from hf_bucket.source import Source, locate
from hf_bucket.systems import Job, TorchEngine

PROBE_DATA = "probes"
WINDOW = 256  # rows that are tokenised, and answered by the reference, at a time

T = TypeVar("T")
Answer: TypeAlias = Callable[[Sequence[Text]], NDArray[np.float32]]
Report: TypeAlias = Callable[[str], None]


class Watch(Protocol):
    """Shows rows going by."""

    def __call__(self, rows: Iterable[T], what: str, total: int) -> Iterable[T]:
        """Return ``rows`` as they are; ``what`` is done with each, and there are ``total`` of them."""


def unwatched(rows: Iterable[T], what: str, total: int) -> Iterable[T]:
    """Show nothing."""
    return rows


@dataclass(frozen=True, slots=True, kw_only=True)
class TextFile:
    """The texts of a data file, read from the disk each time they are asked for.

    Attributes:
        path: the file; nobody may write to it meanwhile.
        column: of the text.
        kind: as in ``data.read_records``.
        pair_column: of the second text of a pair.
        label_column: of the model's label, by name or by index; None where accuracy is not asked for.
        limit: rows to read, from the first; None reads all.
        written: the file's size in bytes and time of change in nanoseconds when it was first looked at.
    """

    path: Path
    column: str
    kind: str | None
    pair_column: str | None
    limit: int | None
    written: tuple[int, int]
    label_column: str | None = None

    def labels(self, names: Sequence[str]) -> list[int]:
        """Return the index of every row's label; none where there is no column for it.

        Raises:
            DataError: a row has no label, or one that is not among ``names``.
        """
        if self.label_column is None:
            return []
        known = {str(index): index for index in range(len(names))} | {name: index for index, name in enumerate(names)}
        found = []
        for record in islice(read_records(self.path, kind=self.kind), self.limit):
            label = record.fields.get(self.label_column)
            if str(label) not in known or isinstance(label, bool):
                raise DataError(
                    f"{self.path}, line {record.line}: {self.label_column} is {label!r}, expected one of "
                    f"{', '.join(names)}, or its index"
                )
            found.append(known[str(label)])
        return found

    def __iter__(self) -> Iterator[tuple[int, Text]]:
        """Yield the line number and the text of every row.

        Raises:
            DataError: a row cannot be read or holds no text, with its line; or the file was changed.
        """
        if _written(self.path) != self.written:
            raise DataError(f"{self.path} was changed while it was read; validate again when it is complete")
        for record in islice(read_records(self.path, kind=self.kind), self.limit):
            yield record.line, self._text(record)

    def _text(self, record: Record) -> Text:
        try:
            text = text_of(record, self.column, self.pair_column)
            "".join(text).encode("utf-8")
        except DataError as error:
            raise DataError(f"{self.path}, line {record.line}: {error}") from error
        except UnicodeEncodeError as error:
            raise DataError(
                f"{self.path}, line {record.line}: a lone surrogate, which is no Unicode character; remove it"
            ) from error
        return text


def open_texts(
    path: Path,
    *,
    kind: str | None = None,
    column: str | None = None,
    pair_column: str | None = None,
    label_column: str | None = None,
    limit: int | None = None,
) -> TextFile:
    """Return the texts of a file; a column that is not named is what ``data.pick_column`` picks from the first row.

    Raises:
        DataError: no such file, no row, or no column for the text; the message lists the columns there are.
    """
    check_columns(path, kind=kind, column=column, pair_column=pair_column)
    written = _written(path)
    if column is None:
        fields = next((record.fields for record in read_records(path, kind=kind) if record.error is None), None)
        if fields is None:
            raise DataError(f"{path} has no row that can be read; give a file with texts")
        try:
            column = pick_column(fields, pair_column)
        except DataError as error:
            raise DataError(f"{path}: {error}") from error
    return TextFile(
        path=path,
        column=column,
        kind=kind,
        pair_column=pair_column,
        label_column=label_column,
        limit=limit,
        written=written,
    )


def _written(path: Path) -> tuple[int, int]:
    status = path.stat()
    return status.st_size, status.st_mtime_ns


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenRow:
    """One row as tokens.

    Attributes:
        where: what to call it in messages, such as ``"line 7"``.
        text: what the tokens were made of; empty for a probe.
        columns: the values of every graph input, unpadded.
    """

    where: str
    text: Text
    columns: Mapping[str, Sequence[int] | NDArray[np.int64]]

    @property
    def length(self) -> int:
        """Number of tokens."""
        return len(self.columns["input_ids"])


@dataclass(frozen=True, slots=True, kw_only=True)
class Evidence:
    """Rows, and what the reference answers to them.

    Attributes:
        rows: gives the rows in their order, anew each time; those that no bucket holds are left out of a text file.
        expected: the reference's logits. Shape: (row, label).
        reference, data, data_sha256, checkpoint: as in ``Certificate``.
        too_long: rows left out because they are longer than the largest bucket.
        empty: rows left out because they have no token at all.
        labels: index of every row's own label; None where they are not known. Shape: (row,).
    """

    rows: Callable[[], Iterable[TokenRow]]
    expected: NDArray[np.float64]
    reference: str
    data: str
    data_sha256: str | None = None
    checkpoint: str | None = None
    too_long: int = 0
    empty: int = 0
    labels: NDArray[np.int64] | None = None


def probe_evidence(artifact: Artifact) -> Evidence:
    """Return the artifact's own probes with the answers stored beside them.

    Raises:
        ArtifactError: the probes cannot be read.
    """
    reference, probes = load_probes(artifact.folder / PROBES)
    features = probe_features([probe.input_ids for probe in probes])
    rows = [_token_row(features, row, f"probe {row}", "") for row in range(len(features))]
    expected = np.array([probe.logits for probe in probes], dtype=np.float64)
    return Evidence(rows=lambda: rows, expected=expected, reference=reference, data=PROBE_DATA)


def text_evidence(
    artifact: Artifact,
    texts: TextFile,
    *,
    checkpoint: str | None = None,
    window: int = WINDOW,
    report: Report,
    watch: Watch = unwatched,
) -> Evidence:
    """Return the texts of a file with the reference's answers; in memory are one window of rows and all answers.

    The whole file is read once before anything is run, so that a row that is no text is found early.

    Args:
        checkpoint: folder or Hub id to compare with; None takes the one that the artifact was compiled from if it is
            on this machine, else the bucket that each text would otherwise use.
        window: rows tokenised at a time.
        report: is told which reference it is, and why.

    Raises:
        DataError: a row cannot be read, or none fits any bucket.
        ModelError: ``checkpoint`` cannot be loaded or has other labels, or the reference's logits are not finite.
    """
    ladder = artifact.manifest.ladder
    encoder = Encoder(artifact.tokenizer_json(), inputs=artifact.manifest.signature.input_names)
    lengths = array("l", (row.length for row in _token_rows(texts, encoder, window)))
    too_long, empty = sum(length > ladder.max_length for length in lengths), lengths.count(0)
    n = len(lengths) - too_long - empty
    if n == 0:
        raise DataError(
            f"{texts.path} has no row to compare: {len(lengths)} rows, {too_long} of them longer than the largest "
            f"bucket, {ladder.max_length} tokens, and {empty} without a token"
        )

    def rows() -> Iterator[TokenRow]:
        return (row for row in _token_rows(texts, encoder, window) if 0 < row.length <= ladder.max_length)

    known = texts.labels(artifact.manifest.labels)
    labels = [label for label, length in zip(known, lengths, strict=False) if 0 < length <= ladder.max_length]
    name, answer = choose_reference(artifact, checkpoint, report)
    windows = _chunks(watch(rows(), f"{name} answers", n), window)
    expected = np.concatenate([_finite_answers(name, answer, chunk) for chunk in windows])
    return Evidence(
        rows=rows,
        expected=expected,
        reference=name,
        data=texts.path.name,
        data_sha256=hash_file(texts.path),
        checkpoint=checkpoint,
        too_long=too_long,
        empty=empty,
        labels=np.array(labels, dtype=np.int64) if labels else None,
    )


def _token_rows(texts: Iterable[tuple[int, Text]], encoder: Encoder, window: int) -> Iterator[TokenRow]:
    for chunk in _chunks(texts, window):
        features = encoder([text for _, text in chunk])
        for position, (line, text) in enumerate(chunk):
            yield _token_row(features, position, f"line {line}", text)


def _token_row(features: Features, position: int, where: str, text: Text) -> TokenRow:
    return TokenRow(
        where=where, text=text, columns={name: column[position] for name, column in features.columns.items()}
    )


def _finite_answers(name: str, answer: Answer, rows: Sequence[TokenRow]) -> NDArray[np.float64]:
    logits = answer([row.text for row in rows]).astype(np.float64)
    strange = ~np.isfinite(logits).all(axis=1)
    if strange.any():
        where = rows[int(strange.argmax())].where
        raise ModelError(f"the reference, {name}, returns logits that are not finite, {where}; check the checkpoint")
    return logits


def choose_reference(artifact: Artifact, checkpoint: str | None, report: Report) -> tuple[str, Answer]:
    """Return the name of what to compare with, and a function that answers texts.

    Args:
        checkpoint: as in ``text_evidence``.

    Raises:
        ModelError: ``checkpoint`` cannot be loaded or has other labels.
        DependencyError: ``checkpoint`` needs torch or transformers, which is not installed.
    """
    origin = artifact.manifest.source
    if checkpoint is not None:
        report(f"reference: torch without padding, {checkpoint}")
        return "torch", _torch_answer(artifact, Source(name=checkpoint))
    source = Source(name=origin.get("name", ""), revision=origin.get("revision") or None, local_files_only=True)
    try:
        answer = _torch_answer(artifact, source)
    except (ModelError, DependencyError) as error:
        report(f"reference: the bucket that each text would otherwise use, because torch cannot run: {error}")
        return "bucket", _bucket_answer(artifact)
    report(f"reference: torch without padding, {source.name}, which the artifact was compiled from")
    return "torch", answer


def _torch_answer(artifact: Artifact, source: Source) -> Answer:
    """Return a function that runs the checkpoint in float32, one unpadded row at a time."""
    files = locate(source, export=True, manifest=MANIFEST)
    warm_up = Job(model=str(files.folder), texts=("a",), max_length=artifact.manifest.max_length)
    engine, n_labels = TorchEngine(warm_up), len(artifact.manifest.labels)
    found = engine.run(warm_up.texts).shape[1]
    if found != n_labels:
        raise ModelError(
            f"{source.name} answers with {found} logits, the artifact has {n_labels} labels; give the checkpoint that "
            f"it was compiled from"
        )
    return engine.run


def _bucket_answer(artifact: Artifact) -> Answer:
    """Return a function that runs the artifact as it usually does: shared graph, smallest bucket that fits."""
    runner = Runner(artifact)
    return lambda texts: np.stack([row["logits"] for row in runner(list(texts))]).astype(np.float32)


def _chunks(items: Iterable[T], size: int) -> Iterator[list[T]]:
    """Yield lists of ``size`` items, the last one shorter."""
    remaining = iter(items)
    for first in remaining:
        yield [first, *islice(remaining, size - 1)]
