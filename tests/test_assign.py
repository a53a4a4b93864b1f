"""Every row runs once, in a bucket that holds it, and no other choice of buckets is cheaper."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_bucket.assign import Assignment, Cost, assign, cells_cost, cover
from hf_bucket.errors import TooLongError
from hf_bucket.ladder import Bucket, Ladder, make_ladder

LONGEST = 20

ladders = st.lists(st.tuples(st.integers(1, 6), st.integers(1, LONGEST)), min_size=1, max_size=8, unique=True).map(
    make_ladder
)
requests = st.lists(st.integers(0, LONGEST), max_size=30)
sizes_and_costs = st.dictionaries(st.integers(1, 7), st.integers(0, 30), min_size=1, max_size=4)
quick = settings(deadline=None, max_examples=40)


def buckets_of(batch_sizes: Sequence[int], length: int = 16) -> list[Bucket]:
    return [Bucket(batch_size=size, extent=(length,)) for size in batch_sizes]


def table_cost(costs: dict[int, float]) -> Cost:
    return lambda bucket: costs[bucket.batch_size]


def cheapest_by_trying_all(n_rows: int, options: Sequence[Bucket], cost: Cost) -> float:
    """Least cost among all ways to take each option some number of times."""
    counts = [range(-(-n_rows // bucket.batch_size) + 1) for bucket in options]
    return min(
        sum(count * cost(bucket) for count, bucket in zip(chosen, options, strict=True))
        for chosen in itertools.product(*counts)
        if sum(count * bucket.batch_size for count, bucket in zip(chosen, options, strict=True)) >= n_rows
    )


def cheapest_by_growing(n_rows: int, options: Sequence[Bucket], cost: Cost) -> float:
    """Least cost from the least costs of all smaller requests; for counts too large to try all."""
    least = [0.0]
    for rows in range(1, n_rows + 1):
        least.append(min(least[max(0, rows - bucket.batch_size)] + cost(bucket) for bucket in options))
    return least[n_rows]


# properties


@quick
@given(requests, ladders)
def test_every_row_runs_exactly_once(lengths: list[int], ladder: Ladder) -> None:
    lengths = [min(length, ladder.max_length) for length in lengths]
    ran = Counter(row for assignment in assign(lengths, ladder) for row in assignment.rows)
    assert ran == Counter(range(len(lengths)))


@quick
@given(requests, ladders)
def test_every_row_runs_in_a_bucket_that_holds_it(lengths: list[int], ladder: Ladder) -> None:
    lengths = [min(length, ladder.max_length) for length in lengths]
    for assignment in assign(lengths, ladder):
        assert assignment.bucket in ladder
        assert all(lengths[row] <= assignment.bucket.length for row in assignment.rows)


@quick
@given(requests, st.lists(st.integers(1, LONGEST), min_size=1, max_size=8, unique=True))
def test_in_batches_of_one_every_row_runs_in_its_smallest_length(lengths: list[int], sizes: list[int]) -> None:
    ladder = make_ladder(sizes, batch_sizes=[1])
    lengths = [min(length, ladder.max_length) for length in lengths]
    for assignment in assign(lengths, ladder):
        assert [ladder.choose(lengths[row]).length for row in assignment.rows] == [assignment.bucket.length]


@quick
@given(requests, ladders)
def test_a_batch_is_neither_empty_nor_fuller_than_its_bucket(lengths: list[int], ladder: Ladder) -> None:
    for assignment in assign([min(length, ladder.max_length) for length in lengths], ladder):
        assert 1 <= len(assignment.rows) <= assignment.bucket.batch_size


@quick
@given(requests, ladders)
def test_batches_ascend_by_length_and_rows_within_a_length(lengths: list[int], ladder: Ladder) -> None:
    assignments = assign([min(length, ladder.max_length) for length in lengths], ladder)
    order = [(assignment.bucket.length, row) for assignment in assignments for row in assignment.rows]
    assert order == sorted(order)
    assert all(list(assignment.rows) == sorted(assignment.rows) for assignment in assignments)


@quick
@given(st.integers(0, 60), sizes_and_costs)
def test_a_cover_holds_all_rows_and_no_run_of_it_is_idle(n_rows: int, costs: dict[int, int]) -> None:
    runs = [bucket.batch_size for bucket in cover(n_rows, buckets_of(list(costs)), table_cost(costs))]
    assert sum(runs) >= n_rows
    assert runs == sorted(runs, reverse=True)
    assert sum(runs[:-1]) < n_rows or not runs


# oracles


@quick
@given(st.integers(0, 9), st.dictionaries(st.integers(1, 5), st.integers(0, 20), min_size=1, max_size=3))
def test_no_other_choice_of_batch_sizes_is_cheaper(n_rows: int, costs: dict[int, int]) -> None:
    options, cost = buckets_of(list(costs)), table_cost(costs)
    found = sum(cost(bucket) for bucket in cover(n_rows, options, cost))
    assert found == cheapest_by_trying_all(n_rows, options, cost)


@quick
@given(st.integers(0, 300), sizes_and_costs)
def test_filling_the_bulk_with_the_cheapest_per_row_stays_exact(n_rows: int, costs: dict[int, int]) -> None:
    options, cost = buckets_of(list(costs)), table_cost(costs)
    found = sum(cost(bucket) for bucket in cover(n_rows, options, cost))
    assert found == cheapest_by_growing(n_rows, options, cost)


@quick
@given(st.integers(0, 60), st.dictionaries(st.integers(1, 7), st.floats(0.01, 1e3), min_size=1, max_size=4))
def test_measured_costs_are_as_exact_as_their_rounding(n_rows: int, costs: dict[int, float]) -> None:
    options, cost = buckets_of(list(costs)), table_cost(costs)
    found = sum(cost(bucket) for bucket in cover(n_rows, options, cost))
    assert found == pytest.approx(cheapest_by_growing(n_rows, options, cost), rel=1e-9)


def smallest_fit(lengths: Sequence[int], ladder: Ladder, cost: Cost) -> float:
    """Least cost when no row may move to a longer bucket."""
    per_length = Counter(ladder.choose(length).length for length in lengths)
    return sum(cheapest_by_growing(n, ladder.of_length(held), cost) for held, n in per_length.items())


def cheapest_by_trying_all_buckets(lengths: Sequence[int], ladder: Ladder, cost: Cost) -> float:
    """Least cost among all sets of buckets: longest rows first, each takes a place in any bucket that holds it."""
    need = [sum(length > shorter for length in lengths) for shorter in (-1, *ladder.lengths[:-1])]
    counts = [range(-(-len(lengths) // bucket.batch_size) + 1) for bucket in ladder]
    least = float("inf")
    for chosen in itertools.product(*counts):
        places = [
            sum(n * b.batch_size for n, b in zip(chosen, ladder, strict=True) if b.length >= length)
            for length in ladder.lengths
        ]
        if all(have >= wanted for have, wanted in zip(places, need, strict=True)):
            least = min(least, sum(n * cost(b) for n, b in zip(chosen, ladder, strict=True)))
    return least


@quick
@given(
    st.lists(st.integers(0, 12), max_size=5),
    st.dictionaries(st.tuples(st.integers(1, 4), st.integers(1, 12)), st.integers(0, 30), min_size=1, max_size=5),
)
def test_no_other_choice_of_buckets_is_cheaper_whatever_they_cost(
    lengths: list[int], prices: dict[tuple[int, int], int]
) -> None:
    ladder = make_ladder(list(prices))
    lengths = [min(length, ladder.max_length) for length in lengths]
    cost = lambda bucket: float(prices[bucket.batch_size, bucket.length])  # noqa: E731
    found = sum(cost(assignment.bucket) for assignment in assign(lengths, ladder, cost))
    assert found == cheapest_by_trying_all_buckets(lengths, ladder, cost)


@quick
@given(st.lists(st.integers(0, LONGEST), max_size=400), ladders, st.integers(0, 200))
def test_no_request_costs_more_than_with_every_row_in_its_smallest_length(
    lengths: list[int], ladder: Ladder, overhead: int
) -> None:
    lengths = [min(length, ladder.max_length) for length in lengths]
    cost = lambda bucket: bucket.cells + overhead  # noqa: E731
    found = sum(cost(assignment.bucket) for assignment in assign(lengths, ladder, cost))
    assert found <= smallest_fit(lengths, ladder, cost)


@quick
@given(requests, ladders, st.lists(st.integers(0, 2), min_size=30, max_size=30))
def test_rows_of_different_kinds_never_share_a_batch(lengths: list[int], ladder: Ladder, kinds: list[int]) -> None:
    lengths = [min(length, ladder.max_length) for length in lengths]
    found = assign(lengths, ladder, kinds=kinds)
    assert Counter(row for assignment in found for row in assignment.rows) == Counter(range(len(lengths)))
    assert all(len({kinds[row] for row in assignment.rows}) == 1 for assignment in found)


# tables


@pytest.mark.parametrize(
    ("lengths", "expected"),
    [
        pytest.param([], [], id="empty request"),
        pytest.param([0], [("b1_s8", (0,))], id="a row without tokens"),
        pytest.param([1], [("b1_s8", (0,))], id="the shortest"),
        pytest.param([8], [("b1_s8", (0,))], id="exactly a bucket"),
        pytest.param([9], [("b1_s16", (0,))], id="one over a bucket"),
        pytest.param([16], [("b1_s16", (0,))], id="the longest"),
        pytest.param([5, 5, 5, 5], [("b4_s8", (0, 1, 2, 3))], id="ties keep the caller's order"),
        pytest.param([16, 3], [("b1_s8", (1,)), ("b1_s16", (0,))], id="short buckets first"),
        pytest.param([16, 3, 9, 8], [("b4_s16", (0, 1, 2, 3))], id="places in a longer batch are cheaper than a run"),
        pytest.param([8] * 5, [("b4_s8", (0, 1, 2, 3)), ("b1_s8", (4,))], id="one over a full batch"),
        pytest.param(np.array([9, 8]), [("b1_s8", (1,)), ("b1_s16", (0,))], id="numpy lengths"),
    ],
)
def test_rows_go_where_the_table_says(lengths: Sequence[int], expected: list[tuple[str, tuple[int, ...]]]) -> None:
    found = assign(lengths, make_ladder([8, 16], batch_sizes=[1, 4]))
    assert [(assignment.bucket.name, assignment.rows) for assignment in found] == expected


@pytest.mark.parametrize(
    ("n_rows", "costs", "expected"),
    [
        pytest.param(0, {1: 1, 8: 4}, [], id="no rows"),
        pytest.param(1, {8: 4}, [8], id="only a large batch"),
        pytest.param(3, {1: 1, 8: 4}, [1, 1, 1], id="small runs are cheaper"),
        pytest.param(5, {1: 1, 8: 4}, [8], id="a part-filled batch is cheaper"),
        pytest.param(9, {1: 1, 8: 4}, [8, 1], id="one over a full batch"),
        pytest.param(6, {3: 3, 4: 3.5}, [3, 3], id="the best per row does not divide"),
        pytest.param(10, {3: 3, 4: 3.5}, [4, 3, 3], id="the best per row fills the rest"),
        pytest.param(1, {1: 5, 8: 4}, [8], id="a large batch that is cheaper than a small one"),
    ],
)
def test_the_cheapest_runs_are_taken(n_rows: int, costs: dict[int, float], expected: list[int]) -> None:
    runs = cover(n_rows, buckets_of(list(costs)), table_cost(costs))
    assert [bucket.batch_size for bucket in runs] == expected


@pytest.mark.parametrize("row", [0, 1, 3], ids=["first", "middle", "last"])
def test_a_row_that_is_one_over_the_longest_bucket_is_named(row: int) -> None:
    lengths = [16] * 4
    lengths[row] = 17
    with pytest.raises(TooLongError, match=rf"input {row} has 17 tokens but the largest bucket holds 16"):
        assign(lengths, make_ladder([8, 16]))


# examples


def test_a_run_costs_its_cells_and_a_fixed_part() -> None:
    small, large = buckets_of([1, 8], length=64)
    assert cells_cost(large) - cells_cost(small) == 7 * 64
    assert cells_cost(small) > 64


def test_the_cost_that_is_passed_in_decides() -> None:
    ladder = make_ladder([16], batch_sizes=[1, 4])
    assert assign([3, 3], ladder, lambda bucket: bucket.batch_size) == [
        Assignment(bucket=ladder.buckets[0], rows=(0,)),
        Assignment(bucket=ladder.buckets[0], rows=(1,)),
    ]
    assert assign([3, 3], ladder, lambda bucket: 1.0) == [Assignment(bucket=ladder.buckets[1], rows=(0, 1))]


def test_a_length_that_only_one_batch_size_has_uses_that_one() -> None:
    ladder = make_ladder([(4, 8), (1, 16)])
    names = [(one.bucket.name, one.rows) for one in assign([8, 8, 8, 9, 16], ladder)]
    assert names == [("b4_s8", (0, 1, 2)), ("b1_s16", (3,)), ("b1_s16", (4,))]
