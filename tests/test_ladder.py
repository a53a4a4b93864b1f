"""Ladders are ordered, hold nothing twice, and give every input its smallest bucket."""

from __future__ import annotations

import dataclasses
import pickle
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hf_bucket.errors import LadderError, TooLongError
from hf_bucket.ladder import DEFAULT_BATCH_SIZES, Bucket, Ladder, cross, is_auto, make_ladder

sizes = st.lists(st.integers(1, 64), min_size=1, max_size=6, unique=True)
pairs = st.lists(st.tuples(st.integers(1, 8), st.integers(1, 64)), min_size=1, max_size=8, unique=True)


def bucket(batch_size: int, *extent: int) -> Bucket:
    return Bucket(batch_size=batch_size, extent=extent)


# properties


@given(pairs, st.randoms())
def test_the_order_in_which_buckets_are_given_does_not_matter(given_pairs: list[tuple[int, int]], random: Any) -> None:
    shuffled = random.sample(given_pairs, len(given_pairs))
    assert make_ladder(shuffled) == make_ladder(given_pairs)


@given(pairs)
def test_buckets_ascend_by_length_and_then_by_batch_size(given_pairs: list[tuple[int, int]]) -> None:
    ladder = make_ladder(given_pairs)
    assert [(b.length, b.batch_size) for b in ladder] == sorted((length, batch) for batch, length in given_pairs)
    assert list(ladder.lengths) == sorted({length for _, length in given_pairs})
    assert ladder.max_length == ladder.lengths[-1]


@given(pairs)
def test_a_ladder_is_made_from_its_own_pairs_again(given_pairs: list[tuple[int, int]]) -> None:
    ladder = make_ladder(given_pairs)
    assert make_ladder([(b.batch_size, b.length) for b in ladder]) == make_ladder(ladder) == ladder


@given(sizes, sizes)
def test_every_length_is_combined_with_every_batch_size(lengths: list[int], batch_sizes: list[int]) -> None:
    ladder = cross(lengths, batch_sizes)
    assert {(b.batch_size, b.length) for b in ladder} == {(batch, n) for batch in batch_sizes for n in lengths}
    assert len(ladder) == len(lengths) * len(batch_sizes)
    assert all([b.batch_size for b in ladder.of_length(n)] == sorted(batch_sizes) for n in lengths)


# oracle


@given(pairs, st.integers(0, 70))
def test_choose_returns_the_smallest_bucket_that_fits(given_pairs: list[tuple[int, int]], length: int) -> None:
    ladder = make_ladder(given_pairs)
    fitting = [b for b in ladder.buckets if b.length >= length]
    if fitting:
        assert ladder.choose(length) == min(fitting, key=lambda b: (b.length, b.batch_size))
    else:
        with pytest.raises(TooLongError, match=f"{length} tokens but the largest bucket holds {ladder.max_length}"):
            ladder.choose(length)


# tables


@pytest.mark.parametrize(
    ("buckets", "batch_sizes", "names"),
    [
        pytest.param(64, [8], ["b8_s64"], id="one length"),
        pytest.param([128, 64], [1], ["b1_s64", "b1_s128"], id="several lengths"),
        pytest.param((64, 128), [1], ["b1_s64", "b1_s128"], id="a tuple of lengths"),
        pytest.param(range(8, 25, 8), [1], ["b1_s8", "b1_s16", "b1_s24"], id="a range"),
        pytest.param([(8, 64), (1, 128)], None, ["b8_s64", "b1_s128"], id="pairs"),
        pytest.param([[8, 64]], None, ["b8_s64"], id="a pair as a list, as in JSON"),
        pytest.param(np.int64(64), [8], ["b8_s64"], id="a numpy integer"),
        pytest.param([np.int32(64), np.uint8(16)], [np.int64(8)], ["b8_s16", "b8_s64"], id="numpy integers"),
        pytest.param(np.array([64, 128]), np.array([8]), ["b8_s64", "b8_s128"], id="numpy arrays"),
        pytest.param(np.array([[8, 64]]), None, ["b8_s64"], id="a numpy array of pairs"),
        pytest.param(64, None, [f"b{batch}_s64" for batch in DEFAULT_BATCH_SIZES], id="default batch sizes"),
        pytest.param([1], [1], ["b1_s1"], id="the smallest bucket there is"),
    ],
)
def test_users_may_write_a_ladder_in_many_ways(buckets: Any, batch_sizes: Any, names: list[str]) -> None:
    ladder = make_ladder(buckets, batch_sizes=batch_sizes)
    assert [b.name for b in ladder] == names
    assert all(type(size) is int for b in ladder for size in (b.batch_size, *b.extent))


@pytest.mark.parametrize(
    ("buckets", "batch_sizes", "match"),
    [
        pytest.param([], None, "buckets is empty", id="no lengths"),
        pytest.param(np.array([], dtype=int), None, "buckets is empty", id="an empty array"),
        pytest.param([64], [], "batch_sizes is empty", id="no batch sizes"),
        pytest.param([64], np.array([], dtype=int), "batch_sizes is empty", id="an empty array of batch sizes"),
        pytest.param([64, 64], [1], r"b1_s64 is given more than once", id="a length twice"),
        pytest.param([64], [8, 8], r"b8_s64 is given more than once", id="a batch size twice"),
        pytest.param([(8, 64), (8, 64)], None, r"b8_s64 is given more than once", id="a pair twice"),
        pytest.param(0, None, "length must be a whole number of at least 1, got 0", id="zero"),
        pytest.param([64, -1], None, "length must be a whole number of at least 1, got -1", id="negative"),
        pytest.param([64.0], None, "length must be a whole number of at least 1, got 64.0", id="a whole float"),
        pytest.param([True], None, "length must be a whole number of at least 1, got True", id="a bool"),
        pytest.param(True, None, "length must be a whole number of at least 1, got True", id="only a bool"),
        pytest.param(np.array([1.5]), None, "whole number of at least 1, got 1.5", id="an array of floats"),
        pytest.param(np.array([True]), None, "whole number of at least 1, got True", id="an array of bools"),
        pytest.param([None], None, "whole number of at least 1, got None", id="None inside"),
        pytest.param(["64"], None, "whole number of at least 1, got '64'", id="text inside"),
        pytest.param([64], [0], "batch size must be a whole number of at least 1, got 0", id="no rows"),
        pytest.param([64], [True], "batch size must be a whole number of at least 1, got True", id="a bool of rows"),
        pytest.param([(0, 64)], None, "batch size must be a whole number of at least 1, got 0", id="a pair of no rows"),
        pytest.param([64], 8, r"batch_sizes must be a list such as \[1, 8\], got 8", id="batch_sizes is a number"),
        pytest.param([64], "8", r"batch_sizes must be a list such as \[1, 8\], got '8'", id="batch_sizes is text"),
        pytest.param([64, (8, 128)], None, "mixes lengths and .* pairs", id="lengths and pairs"),
        pytest.param([(8, 64)], [1], "drop batch_sizes", id="pairs with batch sizes"),
        pytest.param(cross([64], [8]), [1], "drop batch_sizes", id="a ladder with batch sizes"),
        pytest.param([(8, 64, 1)], None, r"a bucket pair is .* got \(8, 64, 1\)", id="a triple"),
        pytest.param([(8,)], None, r"a bucket pair is .* got \(8,\)", id="a pair of one"),
        pytest.param(64.0, None, "buckets must be a length.* got 64.0", id="a float"),
        pytest.param(None, None, "buckets must be a length.* got None", id="None"),
        pytest.param("64", None, "buckets must be a length.* got '64'", id="text"),
        pytest.param({64: 8}, None, "buckets must be a length", id="a dict"),
    ],
)
def test_what_is_no_ladder_is_refused_with_the_value_that_was_got(buckets: Any, batch_sizes: Any, match: str) -> None:
    with pytest.raises(LadderError, match=match):
        make_ladder(buckets, batch_sizes=batch_sizes)


@pytest.mark.parametrize("extent", [(), 64, None, [0], (8, 0), (True,)], ids=repr)
def test_a_bucket_needs_an_extent_of_whole_numbers(extent: Any) -> None:
    with pytest.raises(LadderError, match=r"a bucket needs an extent|a bucket's length must be a whole number"):
        Bucket(batch_size=1, extent=extent)


@pytest.mark.parametrize(("length", "name"), [(1, "b1_s4"), (4, "b1_s4"), (5, "b1_s9"), (9, "b1_s9")])
def test_an_input_of_exactly_the_length_fits_and_one_more_token_does_not(length: int, name: str) -> None:
    assert make_ladder([4, 9], batch_sizes=[1, 8]).choose(length).name == name


# single examples


def test_one_token_beyond_the_largest_bucket_says_what_to_do() -> None:
    with pytest.raises(TooLongError, match=r"10 tokens .* holds 9; pass overflow=.* add a bucket of length >= 10"):
        make_ladder([4, 9]).choose(10)


def test_names_say_batch_size_and_extent() -> None:
    assert bucket(8, 64).name == str(bucket(8, 64)) == "b8_s64"
    assert bucket(2, 224, 160).name == "b2_s224x160"
    assert str(make_ladder([64], batch_sizes=[8, 1])) == "[b1_s64, b8_s64]"


def test_cells_count_every_row_and_column() -> None:
    assert bucket(8, 64).cells == 512
    assert bucket(2, 3, 5).cells == 30


def test_buckets_for_images_have_an_extent_but_no_length() -> None:
    ladder = Ladder((bucket(1, 20, 10), bucket(1, 10, 10), bucket(1, 10, 20)))
    assert [b.extent for b in ladder] == [(10, 10), (10, 20), (20, 10)]
    with pytest.raises(LadderError, match=r"extent \(10, 10\) has no single length"):
        _ = ladder.buckets[0].length


def test_text_and_image_buckets_do_not_mix() -> None:
    with pytest.raises(LadderError, match="mix extents of different kinds: b1_s4x8, b1_s64"):
        Ladder((bucket(1, 64), bucket(1, 4, 8)))


def test_a_ladder_without_buckets_does_not_exist() -> None:
    with pytest.raises(LadderError, match="buckets is empty"):
        Ladder(())


def test_a_ladder_knows_its_buckets() -> None:
    ladder = make_ladder([64], batch_sizes=[8])
    assert bucket(8, 64) in ladder
    assert bucket(1, 64) not in ladder
    assert ladder.of_length(65) == ()


def test_buckets_and_ladders_cannot_be_changed() -> None:
    ladder = make_ladder([64])
    with pytest.raises(dataclasses.FrozenInstanceError, match="buckets"):
        ladder.buckets = ()  # type: ignore[misc]
    with pytest.raises(dataclasses.FrozenInstanceError, match="batch_size"):
        ladder.buckets[0].batch_size = 2  # type: ignore[misc]


def test_equal_ladders_have_equal_hashes_and_survive_pickling() -> None:
    ladder = make_ladder([64, 128])
    assert len({ladder, make_ladder([128, 64]), pickle.loads(pickle.dumps(ladder))}) == 1


@pytest.mark.parametrize(
    "buckets", [None, "pow2", 8, [], ["auto"], np.array([]), np.array([8, 16]), np.array(["auto"])]
)
def test_only_the_word_auto_leaves_the_choice_to_a_plan(buckets: object) -> None:
    assert not is_auto(buckets)
    assert is_auto("auto")
