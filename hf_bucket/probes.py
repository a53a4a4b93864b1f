"""Probes: rows of tokens with the reference's answer, kept in the artifact so that any bucket can be checked later."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from hf_bucket.assign import Assignment
from hf_bucket.batch import Features, pad, unpad
from hf_bucket.encode import Encoder
from hf_bucket.errors import ArtifactError, ExportError
from hf_bucket.ladder import Bucket
from hf_bucket.manifest import Validation
from hf_bucket.session import Session
from hf_bucket.tasks import Signature

PROBES = "probes.json"

# Lengths in tokens: one under, exact and one over the usual bucket edges, and some in between.
PROBE_LENGTHS = (1, 2, 3, 5, 8, 12, 16, 17, 24, 31, 32, 33, 48, 63, 64, 65, 96, 127, 128, 129, 192, 256, 384, 512)
_LONGEST_PROBE = 512
_ROWS_PER_BUCKET = 2

# By the dtype of the weights: allowed difference of a logit, for logits up to 1 in size; it grows with them.
ATOL = {"float32": 1e-4, "float16": 2e-2}


@dataclass(frozen=True, slots=True, kw_only=True)
class Probe:
    """One row of token ids and the logits that the reference gave for it, unpadded and alone."""

    input_ids: tuple[int, ...]
    logits: tuple[float, ...]


def probe_rows(
    encoder: Encoder,
    max_length: int | None,
    vocab_size: int | None,
    *,
    lengths: Sequence[int] | None = None,
) -> list[tuple[int, ...]]:
    """Return rows of random ordinary tokens between the special tokens of a single text.

    Args:
        max_length: no row is longer.
        vocab_size: ids are below it.
        lengths: tokens of each row; None takes ``PROBE_LENGTHS`` that fit, and the maximum itself where it is short.
    """
    head, tail = encoder.frame
    least = max(1, len(head) + len(tail))
    limit = _LONGEST_PROBE if max_length is None else max_length
    chosen = sorted({*PROBE_LENGTHS, min(limit, _LONGEST_PROBE)}) if lengths is None else lengths
    generator = np.random.default_rng(0)
    ordinary = encoder.ordinary_ids(vocab_size)
    return [
        (*head, *(int(value) for value in generator.choice(ordinary, length - len(head) - len(tail))), *tail)
        for length in chosen
        if least <= length <= limit
    ]


def save_probes(probes: Sequence[Probe], reference: str, folder: Path) -> None:
    """Write ``probes.json``."""
    rows = [{"input_ids": list(probe.input_ids), "logits": list(probe.logits)} for probe in probes]
    (folder / PROBES).write_text(json.dumps({"reference": reference, "rows": rows}) + "\n", encoding="utf-8")


def load_probes(path: Path) -> tuple[str, tuple[Probe, ...]]:
    """Return the reference's name and the probes.

    Raises:
        ArtifactError: the file is not what ``save_probes`` writes.
    """
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
        rows = [(tuple(map(int, row["input_ids"])), tuple(map(float, row["logits"]))) for row in data["rows"]]
        return str(data["reference"]), tuple(Probe(input_ids=ids, logits=logits) for ids, logits in rows)
    except (OSError, ValueError, KeyError, TypeError, OverflowError, RecursionError) as error:
        raise ArtifactError(f"{path} is not a file of probes ({error}); compile the model again") from error


def validate(
    bucket: Bucket, session: Session, probes: Sequence[Probe], signature: Signature, *, reference: str, atol: float
) -> Validation:
    """Run probes of several lengths through one bucket, as one batch where it has rows, and compare the logits.

    Args:
        atol: as in ``ATOL``; infinite for a model whose answer is known to depend on padding.

    Raises:
        ExportError: a logit differs by more, or is not finite.
    """
    fitting = [probe for probe in probes if len(probe.input_ids) <= bucket.length]
    count = min(len(fitting), max(_ROWS_PER_BUCKET, bucket.batch_size))
    chosen = [fitting[-1 - round(step)] for step in np.linspace(0, len(fitting) - 1, count)] if fitting else []
    rows = np.arange(len(chosen))
    features = probe_features([probe.input_ids for probe in chosen])
    answers: dict[int, Mapping[str, np.ndarray]] = {}
    for start in range(0, len(chosen), bucket.batch_size):
        assignment = Assignment(bucket=bucket, rows=tuple(int(row) for row in rows[start : start + bucket.batch_size]))
        batch = pad(features, assignment, signature)
        answers.update(unpad(batch, session.run(batch.arrays), signature))
    got = np.array([answers[row]["logits"] for row in range(len(chosen))], dtype=np.float64)
    expected = np.array([probe.logits for probe in chosen], dtype=np.float64)
    with np.errstate(invalid="ignore"):  # infinity less infinity is no number, and refused as such
        delta = float(np.abs(got - expected).max(initial=0.0))
    allowed = tolerance(expected, atol)
    flips = int((got.argmax(axis=-1) != expected.argmax(axis=-1)).sum()) if chosen else 0
    if not (np.isfinite(delta) and delta <= allowed):
        raise ExportError(
            f"bucket {bucket.name} does not give the {reference} answer: a logit differs by {delta:.2g}, allowed is "
            f"{allowed:.2g} (n={len(chosen)}); the graph is wrong for this shape, so the model cannot be bucketed"
        )
    return Validation(bucket=bucket.name, max_abs_delta=delta, label_flips=flips, n=len(chosen), reference=reference)


def tolerance(expected: NDArray[np.float64], atol: float) -> float:
    """Return the allowed difference of a logit, given all that are expected."""
    return atol * max(1.0, float(np.abs(expected).max(initial=0.0)))


def sample_batch(
    encoder: Encoder, bucket: Bucket, signature: Signature, vocab_size: int | None
) -> Mapping[str, NDArray[np.generic]]:
    """Return a full batch of one row that looks like a text: some heads fail without their special tokens."""
    rows = probe_rows(encoder, bucket.length, vocab_size, lengths=[bucket.length])
    return pad(probe_features(rows), Assignment(bucket=bucket, rows=(0,)), signature).arrays


def sampler(
    encoder: Encoder, signature: Signature, vocab_size: int | None
) -> Callable[[Bucket], Mapping[str, NDArray[np.generic]]]:
    """Return ``sample_batch`` as a function of the bucket, for what times several."""
    return lambda bucket: sample_batch(encoder, bucket, signature, vocab_size)


def padded_masks(probes: Sequence[Probe], signature: Signature) -> NDArray[np.generic] | None:
    """Return rows of an ``attention_mask`` as long as the longest probe; None where the graph has none.

    They have one token, two, half of all, or all, padded on the signature's side; in the last only both ends are real.
    """
    dtypes = [spec.dtype for spec in signature.inputs if spec.name == "attention_mask"]
    length = max((len(probe.input_ids) for probe in probes), default=0)
    if not length or not dtypes:
        return None
    masks = np.arange(length) < np.array([[1], [2], [length // 2], [length], [1]])
    masks[-1, -1] = True
    return (masks[:, ::-1] if signature.padding_side == "left" else masks).astype(dtypes[0])


def probe_features(rows: Sequence[tuple[int, ...]]) -> Features:
    """Return rows of token ids as a request of single texts, with every input that a graph may take."""
    return Features(
        lengths=tuple(map(len, rows)),
        columns={
            "input_ids": rows,
            "attention_mask": [[1] * len(row) for row in rows],
            "token_type_ids": [[0] * len(row) for row in rows],
        },
    )
