"""Padding and un-padding are each other's inverse, and no axis is cut for having the bucket's size by chance."""

from __future__ import annotations

import copy
from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_bucket.assign import Assignment
from hf_bucket.batch import Features, PaddedBatch, pad, unpad
from hf_bucket.ladder import Bucket
from hf_bucket.tasks import InputSpec, OutputSpec, Signature

PAD_ID, PAD_TYPE = 7, 5
SIGNATURE = Signature(
    inputs=(
        InputSpec(name="input_ids", dtype="int64", axes=("row", "token"), pad_id=PAD_ID),
        InputSpec(name="attention_mask", dtype="int64", axes=("row", "token"), pad_id=0),
        InputSpec(name="token_type_ids", dtype="int32", axes=("row", "token"), pad_id=PAD_TYPE),
    ),
    outputs=(
        OutputSpec(name="logits", dtype="float32", axes=("row", "label")),
        OutputSpec(name="tags", dtype="float32", axes=("row", "token", "label")),
        OutputSpec(name="score", dtype="float32", axes=("row",)),
    ),
)
ECHO = Signature(
    inputs=SIGNATURE.inputs,
    outputs=tuple(OutputSpec(name=spec.name, dtype=spec.dtype, axes=spec.axes) for spec in SIGNATURE.inputs),
)


def features_of(lengths: Sequence[int]) -> Features:
    """Features whose numbers tell row and position: 1002 is row 1, position 2; types are 1 more by row."""
    return Features(
        lengths=tuple(lengths),
        columns={
            "input_ids": [[1000 * row + position for position in range(n)] for row, n in enumerate(lengths)],
            "attention_mask": [[1] * n for n in lengths],
            "token_type_ids": [[100 + row] * n for row, n in enumerate(lengths)],
        },
    )


def padded(lengths: Sequence[int], rows: Sequence[int], *, batch_size: int, length: int) -> PaddedBatch:
    bucket = Bucket(batch_size=batch_size, extent=(length,))
    return pad(features_of(lengths), Assignment(bucket=bucket, rows=tuple(rows)), SIGNATURE)


@st.composite
def requests(draw: st.DrawFn) -> tuple[list[int], list[int], Bucket]:
    """Lengths of a request, the rows that share a batch, and a bucket that holds them."""
    lengths = draw(st.lists(st.integers(0, 12), min_size=1, max_size=8))
    rows = draw(st.lists(st.sampled_from(range(len(lengths))), min_size=1, unique=True))
    batch_size = draw(st.integers(len(rows), len(rows) + 3))
    return lengths, rows, Bucket(batch_size=batch_size, extent=(draw(st.integers(max(1, *lengths, 0), 16)),))


quick = settings(deadline=None, max_examples=40)


# properties


@quick
@given(requests())
def test_unpadding_gives_back_what_was_padded(request_: tuple[list[int], list[int], Bucket]) -> None:
    lengths, rows, bucket = request_
    features = features_of(lengths)
    batch = pad(features, Assignment(bucket=bucket, rows=tuple(rows)), SIGNATURE)
    back = unpad(batch, batch.arrays, ECHO)
    assert sorted(back) == sorted(rows)
    for row in rows:
        for name, column in features.columns.items():
            assert back[row][name].tolist() == column[row]


@quick
@given(requests())
def test_every_array_has_exactly_the_buckets_shape_and_the_inputs_dtype(
    request_: tuple[list[int], list[int], Bucket],
) -> None:
    lengths, rows, bucket = request_
    batch = padded(lengths, rows, batch_size=bucket.batch_size, length=bucket.length)
    assert list(batch.arrays) == [spec.name for spec in SIGNATURE.inputs]
    for spec in SIGNATURE.inputs:
        assert batch.arrays[spec.name].shape == (bucket.batch_size, bucket.length)
        assert batch.arrays[spec.name].dtype == spec.dtype


@quick
@given(requests())
def test_a_padding_token_holds_its_inputs_pad_id(request_: tuple[list[int], list[int], Bucket]) -> None:
    lengths, rows, bucket = request_
    batch = padded(lengths, rows, batch_size=bucket.batch_size, length=bucket.length)
    for position, row in enumerate(rows):
        for spec in SIGNATURE.inputs:
            filler = batch.arrays[spec.name][position, lengths[row] :]
            assert filler.tolist() == [spec.pad_id] * (bucket.length - lengths[row])


@quick
@given(requests())
def test_a_padding_row_repeats_the_first_row(request_: tuple[list[int], list[int], Bucket]) -> None:
    lengths, rows, bucket = request_
    batch = padded(lengths, rows, batch_size=bucket.batch_size, length=bucket.length)
    for array in batch.arrays.values():
        for position in range(len(rows), bucket.batch_size):
            assert array[position].tolist() == array[0].tolist()


@quick
@given(requests())
def test_padding_never_reaches_a_result(request_: tuple[list[int], list[int], Bucket]) -> None:
    lengths, rows, bucket = request_
    batch = padded(lengths, rows, batch_size=bucket.batch_size, length=bucket.length)
    shape = (bucket.batch_size, bucket.length)
    real = np.zeros(shape, dtype=bool)
    for position, length in enumerate(batch.lengths):
        real[position, :length] = True
    outputs = {
        "logits": np.where(np.arange(shape[0])[:, None] < len(rows), 1.0, np.nan).repeat(3, axis=1),
        "tags": np.where(real, 1.0, np.nan)[:, :, None].repeat(2, axis=2),
        "score": np.where(np.arange(shape[0]) < len(rows), 1.0, np.nan),
    }
    for row, result in unpad(batch, outputs, SIGNATURE).items():
        assert result["tags"].shape == (lengths[row], 2)
        assert not any(np.isnan(value).any() for value in result.values())


# oracle


@quick
@given(requests())
def test_a_batch_equals_numpys_own_padding(request_: tuple[list[int], list[int], Bucket]) -> None:
    lengths, rows, bucket = request_
    features = features_of(lengths)
    batch = padded(lengths, rows, batch_size=bucket.batch_size, length=bucket.length)
    for spec in SIGNATURE.inputs:
        filled = [
            np.pad(
                np.array(features.columns[spec.name][row], dtype=spec.dtype),
                (0, bucket.length - lengths[row]),
                constant_values=spec.pad_id,
            )
            for row in [*rows, *[rows[0]] * (bucket.batch_size - len(rows))]
        ]
        np.testing.assert_array_equal(batch.arrays[spec.name], np.stack(filled))


# tables


@pytest.mark.parametrize(
    ("axes", "shape", "expected"),
    [
        pytest.param(("row", "label"), (8, 64), (64,), id="64 labels in a 64-token bucket"),
        pytest.param(("row", "token"), (8, 64), (5,), id="one value per token"),
        pytest.param(("row", "token", "label"), (8, 64, 64), (5, 64), id="64 labels per token"),
        pytest.param(("row", "token", "token"), (8, 64, 64), (5, 5), id="a score per pair of tokens"),
        pytest.param(("row", "label", "token"), (8, 64, 64), (64, 5), id="tokens last"),
        pytest.param(("token", "row"), (64, 8), (5,), id="rows last"),
        pytest.param(("row", "query", "label"), (8, 64, 8), (64, 8), id="sizes of both bucket axes by chance"),
        pytest.param(("row",), (8,), (), id="one number per row"),
    ],
)
def test_an_axis_is_cut_by_its_name_and_never_by_its_size(
    axes: tuple[str, ...], shape: tuple[int, ...], expected: tuple[int, ...]
) -> None:
    batch = padded([9, 5, 64], [1], batch_size=8, length=64)
    signature = Signature(inputs=(), outputs=(OutputSpec(name="out", dtype="float32", axes=axes),))
    result = unpad(batch, {"out": np.zeros(shape, dtype=np.float32)}, signature)
    assert result[1]["out"].shape == expected


@pytest.mark.parametrize(
    ("lengths", "rows", "batch_size", "length", "ids"),
    [
        pytest.param([2], [0], 1, 2, [[0, 1]], id="no padding at all"),
        pytest.param([2], [0], 1, 3, [[0, 1, PAD_ID]], id="one padding token"),
        pytest.param([1, 2], [1, 0], 2, 2, [[1000, 1001], [0, PAD_ID]], id="rows in the assignment's order"),
        pytest.param([1, 2], [1], 2, 2, [[1000, 1001], [1000, 1001]], id="one padding row"),
        pytest.param([0], [0], 1, 2, [[PAD_ID, PAD_ID]], id="a row without tokens"),
        pytest.param([1, 1], [0, 1], 2, 1, [[0], [1000]], id="the smallest bucket"),
    ],
)
def test_a_batch_looks_as_the_table_says(
    lengths: list[int], rows: list[int], batch_size: int, length: int, ids: list[list[int]]
) -> None:
    assert padded(lengths, rows, batch_size=batch_size, length=length).arrays["input_ids"].tolist() == ids


# examples


def test_results_do_not_share_memory_with_the_engines_output() -> None:
    batch = padded([2, 3], [0, 1], batch_size=2, length=4)
    outputs = {
        "logits": np.ones((2, 2), dtype=np.float32),
        "tags": np.ones((2, 4, 2), dtype=np.float32),
        "score": np.ones(2, dtype=np.float32),
    }
    results = unpad(batch, outputs, SIGNATURE)
    for array in outputs.values():
        array[:] = 9.0
    for result in results.values():
        assert all((value == 1.0).all() for value in result.values())
        assert not any(np.shares_memory(value, array) for value in result.values() for array in outputs.values())


def test_the_callers_features_stay_as_they_were() -> None:
    features = features_of([2, 3])
    arrays = {name: [np.array(row) for row in column] for name, column in features.columns.items()}
    numpy_features = Features(lengths=features.lengths, columns=arrays)
    before = copy.deepcopy(arrays)
    batch = pad(numpy_features, Assignment(bucket=Bucket(batch_size=4, extent=(8,)), rows=(1, 0)), SIGNATURE)
    batch.arrays["input_ids"][:] = -1
    for name, column in before.items():
        for row, values in enumerate(column):
            np.testing.assert_array_equal(arrays[name][row], values)


def test_inputs_the_graph_does_not_take_are_left_out() -> None:
    only_ids = Signature(inputs=SIGNATURE.inputs[:1], outputs=())
    batch = pad(features_of([2]), Assignment(bucket=Bucket(batch_size=1, extent=(4,)), rows=(0,)), only_ids)
    assert list(batch.arrays) == ["input_ids"]


def test_features_count_their_rows() -> None:
    assert len(features_of([])) == 0
    assert len(features_of([3, 0])) == 2
