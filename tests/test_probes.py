"""A bucket is only trusted when rows of many lengths get the reference's answer through its padding."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest
from conftest import tiny_tokenizer
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_bucket.batch import Array
from hf_bucket.encode import Encoder
from hf_bucket.errors import ArtifactError, ExportError
from hf_bucket.ladder import Bucket
from hf_bucket.manifest import Validation
from hf_bucket.probes import PROBE_LENGTHS, PROBES, Probe, load_probes, padded_masks, probe_rows, save_probes, validate
from hf_bucket.session import FakeSession
from hf_bucket.tasks import InputSpec, OutputSpec, PaddingSide, Signature

COLUMNS = ("input_ids", "attention_mask", "token_type_ids")
ENCODER = Encoder(tiny_tokenizer().to_str(), inputs=COLUMNS)
SIGNATURE = Signature(
    inputs=tuple(
        InputSpec(name=name, dtype="int64", axes=("row", "token"), pad_id=3 if name == "input_ids" else 0)
        for name in COLUMNS
    ),
    outputs=(OutputSpec(name="logits", dtype="float32", axes=("row", "label")),),
)
ROWS = probe_rows(ENCODER, 64, None)


def probe_of(row: Sequence[int]) -> Probe:
    """A probe with the answer of ``FakeSession``."""
    return Probe(input_ids=tuple(row), logits=(float(sum(row)), float(len(row))))


PROBES_OF_ALL_LENGTHS = tuple(probe_of(row) for row in ROWS)


def bucket_of(batch_size: int, length: int) -> Bucket:
    return Bucket(batch_size=batch_size, extent=(length,))


@dataclass(slots=True)
class WrongSession:
    """A session that answers like ``FakeSession`` but adds something to the logits, which may depend on the arrays."""

    bucket: Bucket
    fault: str

    def run(self, arrays: Mapping[str, Array]) -> dict[str, Array]:
        logits = FakeSession(self.bucket).run(arrays)["logits"].astype(np.float64)
        padding = (1 - np.asarray(arrays["attention_mask"], dtype=np.int64)).sum(axis=1)
        if self.fault == "padding leaks":
            logits[:, 0] += padding
        elif self.fault == "a full batch leaks":
            logits[:, 0] += np.asarray(arrays["input_ids"])[::-1].sum(axis=1) % 7 if len(logits) > 1 else 0
        elif self.fault == "rows are swapped":
            logits = logits[::-1]
        elif self.fault == "types are read":
            logits[:, 0] += 1 + np.asarray(arrays["token_type_ids"], dtype=np.int64).sum(axis=1)
        else:
            logits[-1 if self.fault.endswith("last") else 0, 1] = float(self.fault.split()[0])
        return {"logits": logits.astype(np.float32)}

    def close(self) -> None:
        """Nothing to release."""


def check(session: FakeSession | WrongSession, probes: Sequence[Probe] = PROBES_OF_ALL_LENGTHS) -> Validation:
    return validate(session.bucket, session, probes, SIGNATURE, reference="torch", atol=1e-4)


# properties


@settings(deadline=None, max_examples=40)
@given(st.integers(1, 9), st.integers(1, 80))
def test_a_right_session_passes_at_every_shape(batch_size: int, length: int) -> None:
    session = FakeSession(bucket_of(batch_size, length))
    fitting = sum(len(row) <= length for row in ROWS)
    expected = Validation(
        bucket=session.bucket.name,
        max_abs_delta=0.0,
        label_flips=0,
        n=min(fitting, max(2, batch_size)),
        reference="torch",
    )
    assert check(session) == expected
    assert set(session.shapes) <= {(batch_size, length)}


@settings(deadline=None, max_examples=40)
@given(
    st.lists(
        st.builds(
            Probe,
            input_ids=st.lists(st.integers(0, 2**31), max_size=5).map(tuple),
            logits=st.lists(st.floats(allow_nan=False), max_size=3).map(tuple),
        ),
        max_size=4,
    )
)
def test_probes_come_back_as_they_were_saved(tmp_path_factory: pytest.TempPathFactory, probes: list[Probe]) -> None:
    folder = tmp_path_factory.mktemp("probes")
    save_probes(probes, "torch", folder)
    assert load_probes(folder / PROBES) == ("torch", tuple(probes))


@settings(deadline=None, max_examples=40)
@given(st.none() | st.integers(0, 600), st.none() | st.integers(5, 94))
def test_probe_rows_are_framed_and_within_the_models_limits(max_length: int | None, vocab_size: int | None) -> None:
    rows = probe_rows(ENCODER, max_length, vocab_size)
    limit = 512 if max_length is None else max_length
    wanted = sorted({n for n in (*PROBE_LENGTHS, min(limit, 512)) if 2 <= n <= limit})
    assert [len(row) for row in rows] == wanted
    for row in rows:
        assert (row[0], row[-1]) == (1, 2)
        assert all(4 <= token < (vocab_size or 94) for token in row[1:-1])


# oracle


def test_a_bucket_is_tried_with_its_longest_and_its_shortest_rows() -> None:
    seen: list[tuple[int, ...]] = []

    class Recorder(WrongSession):
        def run(self, arrays: Mapping[str, Array]) -> dict[str, Array]:
            for row in range(self.bucket.batch_size):
                length = int(arrays["attention_mask"][row].sum())
                seen.append(tuple(int(token) for token in arrays["input_ids"][row, :length]))
            return FakeSession(self.bucket).run(arrays)

    check(Recorder(bucket_of(4, 33), ""))
    fitting = [row for row in ROWS if len(row) <= 33]
    assert {len(row) for row in fitting} >= {5, 33}
    assert len(set(seen)) == 4
    assert set(seen) <= set(fitting)
    assert {fitting[0], fitting[-1]} <= set(seen)


# tables


@pytest.mark.parametrize(
    ("fault", "batch_size", "length"),
    [
        pytest.param("padding leaks", 1, 64, id="padding leaks"),
        pytest.param("padding leaks", 1, 8, id="padding leaks in a short bucket"),
        pytest.param("padding leaks", 4, 32, id="padding leaks in a batch"),
        pytest.param("a full batch leaks", 4, 32, id="a neighbour leaks"),
        pytest.param("rows are swapped", 2, 32, id="rows are swapped"),
        pytest.param("types are read", 2, 32, id="another graph"),
        pytest.param("nan first", 1, 16, id="NaN"),
        pytest.param("nan last", 2, 64, id="NaN in the last row"),
        pytest.param("inf first", 1, 16, id="infinity"),
        pytest.param("-inf first", 1, 16, id="minus infinity"),
    ],
)
def test_a_session_that_answers_otherwise_is_refused(fault: str, batch_size: int, length: int) -> None:
    session = WrongSession(bucket_of(batch_size, length), fault)
    with pytest.raises(ExportError, match=rf"bucket b{batch_size}_s{length} does not give the torch answer: a logit"):
        check(session)


@pytest.mark.parametrize("logit", [float("nan"), float("inf"), float("-inf")])
def test_a_reference_that_is_not_finite_is_never_agreed_with(logit: float) -> None:
    probes = [Probe(input_ids=row, logits=(logit, float(len(row)))) for row in ROWS]
    with pytest.raises(ExportError, match="does not give the torch answer"):
        check(FakeSession(bucket_of(2, 64)), probes)
    with pytest.raises(ExportError, match="does not give the torch answer"):
        check(WrongSession(bucket_of(1, 64), f"{logit} first"), [Probe(input_ids=ROWS[0], logits=(0.0, logit))])


@pytest.mark.parametrize(
    ("logits", "atol", "passes"),
    [
        pytest.param((0.5, 0.25), 1e-4, True, id="equal"),
        pytest.param((0.5, 0.25 + 0.9e-4), 1e-4, True, id="just within"),
        pytest.param((0.5, 0.25 + 1.1e-4), 1e-4, False, id="just beyond"),
        pytest.param((0.5, 0.25 - 1.1e-4), 1e-4, False, id="just below"),
        pytest.param((100.0, 0.25 + 0.9e-2), 1e-4, True, id="within what large logits allow"),
        pytest.param((100.0, 0.25 + 1.1e-2), 1e-4, False, id="beyond what large logits allow"),
    ],
)
def test_the_tolerance_grows_with_the_logits(logits: tuple[float, float], atol: float, passes: bool) -> None:
    answer = np.array([[logits[0], 0.25]], dtype=np.float64)

    class Constant(WrongSession):
        def run(self, arrays: Mapping[str, Array]) -> dict[str, Array]:
            return {"logits": answer}

    bucket = bucket_of(1, 8)
    probes = [Probe(input_ids=ROWS[0], logits=logits)]
    if passes:
        found = validate(bucket, Constant(bucket, ""), probes, SIGNATURE, reference="onnx", atol=atol)
        assert found.max_abs_delta == pytest.approx(abs(logits[1] - 0.25))
        assert found.reference == "onnx"
    else:
        with pytest.raises(ExportError, match=r"does not give the onnx answer: a logit differs by .* \(n=1\)"):
            validate(bucket, Constant(bucket, ""), probes, SIGNATURE, reference="onnx", atol=atol)


@pytest.mark.parametrize(
    "content",
    [
        pytest.param("", id="empty"),
        pytest.param("{", id="not JSON"),
        pytest.param("[" * 100_000, id="nested too deep"),
        pytest.param("[]", id="a list"),
        pytest.param("null", id="null"),
        pytest.param("{}", id="no rows"),
        pytest.param('{"rows": []}', id="no reference"),
        pytest.param('{"rows": 3, "reference": "torch"}', id="rows are a number"),
        pytest.param('{"rows": [{"input_ids": [1]}], "reference": "torch"}', id="no logits"),
        pytest.param('{"rows": [{"input_ids": 1, "logits": [1]}], "reference": "torch"}', id="ids are a number"),
        pytest.param('{"rows": [{"input_ids": ["a"], "logits": [1]}], "reference": "torch"}', id="ids are words"),
        pytest.param('{"rows": [{"input_ids": [1], "logits": [null]}], "reference": "torch"}', id="a logit is null"),
        pytest.param('{"rows": [{"input_ids": [Infinity], "logits": [1]}], "reference": "torch"}', id="endless id"),
    ],
)
def test_a_file_of_something_else_is_an_artifact_error(tmp_path: Path, content: str) -> None:
    (tmp_path / PROBES).write_text(content, encoding="utf-8")
    with pytest.raises(ArtifactError, match=rf"{PROBES} is not a file of probes"):
        load_probes(tmp_path / PROBES)


def test_a_missing_file_is_an_artifact_error(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match=rf"{PROBES} is not a file of probes .*No such file"):
        load_probes(tmp_path / PROBES)


# examples


def test_a_flipped_label_within_the_tolerance_is_counted() -> None:
    class Flipped(WrongSession):
        def run(self, arrays: Mapping[str, Array]) -> dict[str, Array]:
            return {"logits": np.array([[0.5, 0.50005]])}

    bucket = bucket_of(1, 8)
    probes = [Probe(input_ids=ROWS[0], logits=(0.50005, 0.5))]
    assert validate(bucket, Flipped(bucket, ""), probes, SIGNATURE, reference="torch", atol=1e-4).label_flips == 1


def test_a_bucket_that_no_probe_fits_is_checked_with_none() -> None:
    session = FakeSession(bucket_of(4, 1))
    assert check(session).n == 0
    assert session.shapes == []


def test_rows_of_given_lengths_are_made_once_for_all() -> None:
    rows = probe_rows(ENCODER, 64, None, lengths=[3, 10, 64])
    assert [len(row) for row in rows] == [3, 10, 64]
    assert rows == probe_rows(ENCODER, 64, None, lengths=[3, 10, 64])
    assert probe_rows(ENCODER, 64, None, lengths=[1, 65]) == []


def test_the_file_is_plain_json(tmp_path: Path) -> None:
    save_probes([probe_of([1, 4, 2])], "onnx", tmp_path)
    expected = {"reference": "onnx", "rows": [{"input_ids": [1, 4, 2], "logits": [7.0, 3.0]}]}
    assert json.loads((tmp_path / PROBES).read_text(encoding="utf-8")) == expected


@pytest.mark.parametrize("side", ["right", "left"])
def test_masks_have_from_one_token_to_all_and_one_a_hole(side: PaddingSide) -> None:
    masks = padded_masks(PROBES_OF_ALL_LENGTHS[::-1], replace(SIGNATURE, padding_side=side))
    assert masks is not None
    assert (masks.shape, masks.dtype) == ((5, 64), np.int64)
    assert masks.sum(axis=1).tolist() == [1, 2, 32, 64, 2]
    padding = np.diff(masks if side == "right" else masks[:, ::-1], axis=1)[:-1]
    assert (padding <= 0).all(), "which is on one side"
    assert masks[-1, [0, -1]].tolist() == [1, 1]


def test_without_probes_or_a_mask_there_are_no_masks() -> None:
    assert padded_masks((), SIGNATURE) is None
    assert padded_masks(PROBES_OF_ALL_LENGTHS, replace(SIGNATURE, inputs=SIGNATURE.inputs[:1])) is None
