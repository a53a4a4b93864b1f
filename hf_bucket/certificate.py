"""The certificate: rows run through every bucket that holds them, and compared with what the reference answers."""

from __future__ import annotations

import contextlib
import os
import secrets
import shutil
import time
from array import array
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from statistics import median
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from hf_bucket.artifact import Artifact
from hf_bucket.assign import Assignment
from hf_bucket.batch import Features, pad, unpad
from hf_bucket.errors import ArtifactError, ModelError, not_finite
from hf_bucket.evidence import Evidence, TokenRow, Watch, unwatched
from hf_bucket.ladder import Bucket
from hf_bucket.manifest import MANIFEST, Certificate, Manifest
from hf_bucket.probes import ATOL, tolerance
from hf_bucket.session import Session
from hf_bucket.session_ort import EngineOptions, OrtSession, open_unpacked, open_variant
from hf_bucket.tasks import Signature

Open: TypeAlias = Callable[[Bucket], Session]


def variants(artifact: Artifact) -> Open:
    """Return what opens the graph specialised for a bucket."""
    return lambda bucket: open_variant(artifact, bucket, EngineOptions())


def shared_graph(artifact: Artifact) -> Open:
    """Return what opens a bucket of the graph with free dimensions, which is loaded once."""
    engine = open_unpacked(artifact, EngineOptions())
    names = tuple(spec.name for spec in artifact.manifest.signature.outputs)
    return lambda bucket: OrtSession(bucket, engine, names)


def certify(
    manifest: Manifest,
    evidence: Evidence,
    opens: Mapping[str, Open],
    *,
    atol: float | None = None,
    watch: Watch = unwatched,
) -> tuple[Certificate, ...]:
    """Run every row through every bucket that holds it, neighbours in file order, and return what differed.

    Args:
        opens: what opens a bucket's sessions, by the name of the graph; the worst of them is what is certified.
        atol: allowed difference of a logit, for logits up to 1 in size; it grows with the largest that is expected.
            None is ``probes.ATOL`` of the precision; it judges neither int8 nor a model that is known to leak.

    Raises:
        ModelError: a bucket returns logits that are not finite, or another number of them than the reference.
        ArtifactError: a graph cannot be loaded.
    """
    found = []
    for precision in (manifest.source.get("dtype", "float32"),):
        judged = atol is not None or (manifest.padding_leak is None and precision in ATOL)
        allowed = tolerance(evidence.expected, ATOL[precision] if atol is None else atol) if judged else None
        for bucket in manifest.ladder:
            measured = []
            for name, start in opens.items():
                what = f"bucket {bucket.name} ({precision}), {name}"
                shown = replace(evidence, rows=partial(_shown, evidence, watch, what))
                measured.append(_measure(start(bucket), shown, manifest.signature, precision, allowed))
            found.append(max(measured, key=lambda figures: (figures.label_flips, figures.max_abs_delta)))
    return tuple(found)


def _shown(evidence: Evidence, watch: Watch, what: str) -> Iterable[TokenRow]:
    return watch(evidence.rows(), what, len(evidence.expected))


def _measure(
    session: Session, evidence: Evidence, signature: Signature, precision: str, allowed: float | None
) -> Certificate:
    """Compare one session with the reference; in memory are one batch and one number per row."""
    bucket, deltas, flips, right = session.bucket, array("d"), 0, [0, 0]
    seconds = array("d")
    fitting = ((number, row) for number, row in enumerate(evidence.rows()) if row.length <= bucket.length)
    for chunk in _batches(fitting, bucket.batch_size, signature.counted_id):
        numbers = [number for number, _ in chunk]
        start = time.perf_counter()
        got = _answers(session, [row for _, row in chunk], signature)
        seconds.append(time.perf_counter() - start)
        expected = evidence.expected[numbers]
        if got.shape != expected.shape:
            raise ModelError(
                f"bucket {bucket.name} returns {got.shape[1]} logits, the reference {expected.shape[1]}; compile the "
                f"model again"
            )
        deltas.extend(np.abs(got - expected).max(axis=1))
        flips += int((got.argmax(axis=1) != expected.argmax(axis=1)).sum())
        if evidence.labels is not None:
            right[0] += int((got.argmax(axis=1) == evidence.labels[numbers]).sum())
            right[1] += int((expected.argmax(axis=1) == evidence.labels[numbers]).sum())
    judged = len(deltas) if evidence.labels is not None else 0
    ordered = np.sort(np.frombuffer(deltas, dtype=np.float64)) if deltas else np.zeros(1)
    return Certificate(
        bucket=bucket.name,
        precision=precision,
        reference=evidence.reference,
        data=evidence.data,
        data_sha256=evidence.data_sha256,
        checkpoint=evidence.checkpoint,
        n=len(deltas),
        max_abs_delta=float(ordered[-1]),
        p99_abs_delta=nearest_rank(ordered, 99),
        label_flips=flips,
        allowed=allowed,
        accuracy=right[0] / judged if judged else None,
        reference_accuracy=right[1] / judged if judged else None,
        batch_s=median(seconds) if seconds else None,
    )


def _batches(
    rows: Iterable[tuple[int, TokenRow]], size: int, counted_id: int | None
) -> Iterator[list[tuple[int, TokenRow]]]:
    """Yield rows that may share a batch, ``size`` of them as long as there are so many, in the order they come."""
    waiting: dict[int, list[tuple[int, TokenRow]]] = defaultdict(list)
    for number, row in rows:
        kind = 0 if counted_id is None else list(row.columns["input_ids"]).count(counted_id)
        waiting[kind].append((number, row))
        if len(waiting[kind]) == size:
            yield waiting.pop(kind)
    yield from waiting.values()


def nearest_rank(ordered: NDArray[np.float64], percent: int) -> float:
    """Return the smallest of ascending values that at least ``percent`` of 100 of them do not exceed."""
    return float(ordered[-(-percent * len(ordered) // 100) - 1])


def _answers(session: Session, rows: Sequence[TokenRow], signature: Signature) -> NDArray[np.float64]:
    """Return the logits of rows that share a batch. Shape: (row, label)."""
    features = Features(
        lengths=tuple(row.length for row in rows),
        columns={name: [row.columns[name] for row in rows] for name in signature.input_names},
    )
    batch = pad(features, Assignment(bucket=session.bucket, rows=tuple(range(len(rows)))), signature)
    outputs = unpad(batch, session.run(batch.arrays), signature)
    logits = np.stack([outputs[position]["logits"] for position in range(len(rows))]).astype(np.float64)
    strange = ~np.isfinite(logits).all(axis=1)
    if strange.any():
        raise not_finite(session.bucket.name, f", {rows[int(strange.argmax())].where}")
    return logits


def store(artifact: Artifact, certificates: Sequence[Certificate]) -> Manifest:
    """Write certificates into the manifest in one step and return it; no other file is touched.

    They take the place of earlier ones with the same data, reference, checkpoint and precision; others stay.

    Raises:
        ArtifactError: the artifact was replaced by another one since it was opened.
        OSError: the folder cannot be written; the manifest is as it was.
    """
    path = artifact.folder / MANIFEST
    current = Manifest.from_json(path.read_text(encoding="utf-8"))
    if replace(current, certificates=()) != replace(artifact.manifest, certificates=()):
        raise ArtifactError(f"{artifact.folder} became another artifact while it was checked; validate it again")
    kept = [old for old in current.certificates if all(_subject(old) != _subject(new) for new in certificates)]
    manifest = replace(current, certificates=(*kept, *certificates))
    _replace_text(path, manifest.to_json())
    return manifest


def _subject(certificate: Certificate) -> tuple[str | None, ...]:
    told = (certificate.data_sha256, certificate.reference, certificate.checkpoint, certificate.precision)
    return certificate.data, *told


def _replace_text(path: Path, text: str) -> None:
    """Put a new file in the place of an old one; a link to a file elsewhere is replaced, not followed."""
    aside = path.with_name(f".{path.name}-{secrets.token_hex(8)}")
    try:
        with aside.open("x", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        shutil.copymode(path, aside)
        os.replace(aside, path)
    except BaseException:
        with contextlib.suppress(OSError):
            aside.unlink()
        raise
