"""Plans are never worse than any other ladder of that size; presets and findings fit the model."""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
import pickle
import re
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_bucket.errors import LadderError, TooLongError
from hf_bucket.histogram import Histogram
from hf_bucket.ladder import DEFAULT_BATCH_SIZES, LONGEST, Ladder, cross, make_ladder
from hf_bucket.planner import PRESET_CAP, Finding, Plan, lint, plan, resolve_ladder

Cost = Callable[[int], float]

TOP = 9
rows_strategy = st.lists(st.integers(1, TOP), min_size=1, max_size=14)
n_strategy = st.integers(1, 5)
optional_top = st.none() | st.integers(1, TOP)
tables = st.lists(st.integers(0, 12), min_size=TOP, max_size=TOP)  # whole numbers, so that ties are exact
float_tables = st.lists(st.floats(0, 1e6), min_size=TOP, max_size=TOP)
exact_costs: st.SearchStrategy[Cost] = st.one_of(
    st.just(lambda tokens: tokens),
    st.integers(1, 4).map(lambda step: lambda tokens: math.ceil(tokens / step) * step),  # plateaus
    st.integers(0, 9).map(lambda start: lambda tokens: start + tokens * tokens),
    tables.map(lambda table: lambda tokens: sorted(table)[tokens - 1]),
    tables.map(lambda table: lambda tokens: table[tokens - 1]),  # not monotone
)
costs = exact_costs | float_tables.map(lambda table: lambda tokens: table[tokens - 1])
quick = settings(deadline=None, max_examples=150)


def mean_cost(lengths: Sequence[int], ladder: Sequence[int], cost: Cost) -> float:
    """Mean cost when each row takes the smallest length of ``ladder`` that holds it, too long rows the largest."""
    return math.fsum(cost(min((n for n in ladder if n >= row), default=max(ladder))) for row in lengths) / len(lengths)


def all_ladders(top: int, n_buckets: int) -> Iterator[tuple[int, ...]]:
    """Every ladder of at most ``n_buckets`` lengths that ends at ``top``, observed lengths or not."""
    for n_below in range(min(n_buckets, top)):
        yield from ((*below, top) for below in itertools.combinations(range(1, top), n_below))


# properties of plan, and its oracle


@quick
@given(rows_strategy, n_strategy, costs, optional_top)
def test_no_ladder_of_that_size_is_cheaper(rows: list[int], n_buckets: int, cost: Cost, top: int | None) -> None:
    found = plan(rows, n_buckets=n_buckets, cost=cost, max_length=top)
    best = min(mean_cost(rows, ladder, cost) for ladder in all_ladders(top or max(rows), n_buckets))
    assert found.cost == pytest.approx(best, rel=1e-9, abs=1e-300)
    assert found.cost == pytest.approx(mean_cost(rows, found.lengths, cost), rel=1e-9, abs=1e-300)
    assert len(found.lengths) <= n_buckets


@quick
@given(rows_strategy, n_strategy, exact_costs, optional_top)
def test_of_equally_cheap_ladders_one_with_the_fewest_lengths_wins(
    rows: list[int], n_buckets: int, cost: Cost, top: int | None
) -> None:
    found = plan(rows, n_buckets=n_buckets, cost=cost, max_length=top)
    ladders = [(mean_cost(rows, ladder, cost), len(ladder)) for ladder in all_ladders(top or max(rows), n_buckets)]
    assert len(found.lengths) == min(size for price, size in ladders if price == min(ladders)[0])


@quick
@given(rows_strategy, n_strategy, exact_costs, optional_top)
def test_a_length_is_as_long_as_its_cost_allows(rows: list[int], n_buckets: int, cost: Cost, top: int | None) -> None:
    for length in plan(rows, n_buckets=n_buckets, cost=cost, max_length=top).lengths:
        assert all(cost(longer) > cost(length) for longer in range(length + 1, (top or max(rows)) + 1))


@quick
@given(rows_strategy, costs, optional_top)
def test_more_buckets_never_cost_more(rows: list[int], cost: Cost, top: int | None) -> None:
    means = [plan(rows, n_buckets=n, cost=cost, max_length=top).cost for n in range(1, 8)]
    assert all(more <= fewer * (1 + 1e-9) for fewer, more in itertools.pairwise(means))


@quick
@given(rows_strategy, n_strategy, st.integers(1, TOP + 3))
def test_the_top_bucket_has_max_length_and_longer_rows_are_clipped(rows: list[int], n_buckets: int, top: int) -> None:
    found = plan(rows, n_buckets=n_buckets, max_length=top)
    assert found.ladder.max_length == top
    assert len(found.lengths) <= n_buckets
    assert found.clipped == sum(row > top for row in rows)
    assert found.histogram == Histogram.from_lengths([min(row, top) for row in rows])


@quick
@given(rows_strategy, n_strategy, costs, optional_top)
def test_a_plan_says_what_counting_row_by_row_says(
    rows: list[int], n_buckets: int, cost: Cost, top: int | None
) -> None:
    found = plan(rows, n_buckets=n_buckets, cost=cost, max_length=top)
    real = [min(row, top or TOP) for row in rows]
    padded = [found.ladder.choose(row).length for row in real]
    assert found.rows == tuple(padded.count(length) for length in found.lengths)
    assert found.waste == pytest.approx(1 - sum(real) / sum(padded))
    assert found.waste_single == pytest.approx(1 - sum(real) / (found.ladder.max_length * len(rows)))
    assert 0 <= found.waste <= found.waste_single < 1


@quick
@given(st.lists(st.integers(1, 400), min_size=1, max_size=60), st.integers(1, 12))
def test_a_long_histogram_is_planned_as_by_trying_every_start(rows: list[int], n_buckets: int) -> None:
    lengths, counts = np.unique(rows, return_counts=True)
    seen = np.append(0, np.cumsum(counts))
    totals = [0.0, *(seen[1:] * lengths)]
    for _ in range(n_buckets - 1):
        totals = [0.0] + [
            min(totals[start] + (seen[end] - seen[start]) * lengths[end - 1] for start in range(end))
            for end in range(1, len(totals))
        ]
    assert plan(rows, n_buckets=n_buckets).cost == pytest.approx(totals[-1] / len(rows), rel=1e-12)


# properties of Histogram


@given(rows_strategy, st.sampled_from([np.int64, np.int32, np.uint8]))
def test_every_container_of_lengths_is_counted_alike(rows: list[int], dtype: Any) -> None:
    expected = Histogram(lengths=tuple(sorted(set(rows))), counts=tuple(rows.count(n) for n in sorted(set(rows))))
    array = np.array(rows, dtype=dtype)
    for container in (rows, tuple(rows), iter(rows), array, list(array), Column(rows)):
        counted = Histogram.from_lengths(container)
        assert counted == expected
        assert all(type(number) is int for number in counted.lengths + counted.counts)


class Column:
    """What a column of a data set offers: its rows, one by one."""

    def __init__(self, rows: list[int]) -> None:
        self.rows = rows

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, row: int) -> int:
        return self.rows[row]

    def __iter__(self) -> Iterator[int]:
        return iter(self.rows)


@given(rows_strategy)
def test_a_histogram_knows_its_totals_and_survives_json_and_pickling(rows: list[int]) -> None:
    histogram = Histogram.from_lengths(rows)
    assert (histogram.total_rows, histogram.total_tokens, histogram.max) == (len(rows), sum(rows), max(rows))
    assert Histogram.from_json(json.loads(json.dumps(histogram.to_json()))) == histogram
    assert pickle.loads(pickle.dumps(histogram)) == histogram
    assert hash(histogram) == hash(Histogram.from_lengths(reversed(rows)))


@given(rows_strategy, st.integers(0, 100))
def test_a_quantile_is_a_length_that_so_many_rows_do_not_exceed(rows: list[int], percent: int) -> None:
    found = Histogram.from_lengths(rows).quantile(percent / 100)
    ranked = sorted(rows)
    assert found == ranked[max(1, -(-percent * len(rows) // 100)) - 1]


@given(rows_strategy, st.lists(st.integers(TOP, 40), min_size=1, unique=True))
def test_waste_is_the_share_of_padding_when_counted_cell_by_cell(rows: list[int], lengths: list[int]) -> None:
    ladder = make_ladder(lengths)
    cells = ["real" if column < row else "padding" for row in rows for column in range(ladder.choose(row).length)]
    assert Histogram.from_lengths(rows).waste(ladder) == pytest.approx(cells.count("padding") / len(cells))


@given(rows_strategy, st.integers(1, TOP), st.integers(TOP, 2 * TOP))
def test_clipping_counts_rows_as_clipping_each_of_them(rows: list[int], shortest: int, longest: int) -> None:
    clipped = Histogram.from_lengths(rows).clip(shortest=shortest, longest=longest)
    assert clipped == Histogram.from_lengths(np.clip(rows, shortest, longest))


# properties of presets and findings


@quick
@given(
    st.sampled_from(["auto", "pow2"]),
    st.integers(0, 40),
    st.none() | st.integers(40, 5000),
    st.none() | st.lists(st.integers(1, 3000), min_size=1, max_size=20).map(Histogram.from_lengths),
    st.integers(1, 12),
)
def test_a_preset_fits_every_model(
    preset: str, min_length: int, max_length: int | None, histogram: Histogram | None, n_buckets: int
) -> None:
    ladder = resolve_ladder(
        preset, min_length=min_length, max_length=max_length, histogram=histogram, n_buckets=n_buckets
    )
    known = 512 if histogram is None else histogram.max
    assert ladder.max_length == max(
        1, min_length, known if max_length is None else min(max_length, max(PRESET_CAP, known))
    )
    assert ladder.lengths[0] >= min_length
    assert {b.batch_size for b in ladder} == set(DEFAULT_BATCH_SIZES)
    assert preset == "pow2" or len(ladder.lengths) <= n_buckets


@quick
@given(rows_strategy, st.sets(st.integers(1, TOP), min_size=1), exact_costs, st.sampled_from([0.0, 0.01, 0.1, 0.5]))
def test_findings_agree_with_removing_each_length(rows: list[int], lengths: set[int], cost: Cost, price: float) -> None:
    ladder = cross(sorted(lengths), [1, 8])
    found = {
        (finding.kind, finding.bucket.length)
        for finding in lint(
            ladder,
            min_length=0,
            max_length=None,
            histogram=Histogram.from_lengths(rows),
            cost=cost,
            bucket_price=price,
        )
    }
    used = {ladder.choose(min(row, ladder.max_length)).length for row in rows}
    total = mean_cost(rows, ladder.lengths, cost)
    dear = {n: mean_cost(rows, sorted(lengths - {n}), cost) - total for n in used - {ladder.max_length}}
    cheap = {n for n, rise in dear.items() if rise < price * total and not math.isclose(rise, price * total)}
    maybe = {n for n, rise in dear.items() if math.isclose(rise, price * total, abs_tol=1e-12)}
    assert {length for kind, length in found if kind == "unused"} == lengths - used
    assert cheap - maybe <= {length for kind, length in found if kind == "saves-too-little"} <= cheap | maybe


# tables


@pytest.mark.parametrize(
    ("lengths", "match"),
    [
        pytest.param([], "lengths is empty; give the token count of at least one row", id="empty"),
        pytest.param(np.array([]), "lengths is empty", id="an empty array"),
        pytest.param([3, 0], "a row's length .* must be a whole number of at least 1, got 0", id="zero"),
        pytest.param(np.array([3, -2]), "must be a whole number of at least 1, got -2", id="negative"),
        pytest.param([3, 1.5], r"one whole number of tokens per row, got 1\.5; pass a list such as", id="fractional"),
        pytest.param(np.array([3.0]), r"one whole number of tokens per row, got 3\.0", id="an array of floats"),
        pytest.param([1, True], "one whole number of tokens per row, got True", id="a bool beside its equal"),
        pytest.param(np.array([True]), "one whole number of tokens per row, got True", id="an array of bools"),
        pytest.param([np.True_], "one whole number of tokens per row, got", id="a numpy bool"),
        pytest.param([3, None], "one whole number of tokens per row, got None", id="a gap"),
        pytest.param(["a text"], "one whole number of tokens per row, got 'a text'", id="texts"),
        pytest.param("a text", "one whole number of tokens per row, got str", id="one text"),
        pytest.param(b"bytes", "one whole number of tokens per row, got bytes", id="bytes"),
        pytest.param({12: 3}, "one whole number of tokens per row, got dict", id="a dict"),
        pytest.param(12, "one whole number of tokens per row, got int", id="one number"),
        pytest.param(np.int64(12), "one whole number of tokens per row, got int64", id="one numpy number"),
        pytest.param([[101, 102]], r"one whole number of tokens per row, got \[101, 102\]", id="ids, not lengths"),
        pytest.param(np.ones((2, 3), int), r"one whole number of tokens per row, got \[1, 1, 1\]", id="a matrix"),
        pytest.param([LONGEST + 1], "at most 1,048,576 tokens, got 1048577", id="one beyond the longest"),
        pytest.param([10**30], "at most 1,048,576 tokens, got 1000", id="beyond every integer type"),
    ],
)
def test_what_is_no_length_is_refused_with_the_value_that_was_got(lengths: Any, match: str) -> None:
    with pytest.raises(LadderError, match=match):
        plan(lengths, n_buckets=2)


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        pytest.param({"n_buckets": 0}, "n_buckets must be a whole number of at least 1, got 0", id="no bucket"),
        pytest.param({"n_buckets": 1.5}, "n_buckets must be .* got 1.5", id="half a bucket"),
        pytest.param({"max_length": 0}, "max_length .* must be a whole number of at least 1, got 0", id="no token"),
        pytest.param({"max_length": -1}, "max_length .* at least 1, got -1", id="negative maximum"),
        pytest.param({"max_length": int(1e30)}, "max_length must be at most .* pass None", id="a tokenizer's infinity"),
        pytest.param({"batch_sizes": []}, "batch_sizes is empty", id="no batch sizes"),
        pytest.param({"batch_sizes": [0]}, "batch size must be .* got 0", id="no rows"),
        pytest.param({"cost": lambda n: -n}, r"cost\(\d\) returned -\d; a cost must be a finite", id="negative cost"),
        pytest.param({"cost": lambda n: math.nan}, r"cost\(\d\) returned nan", id="cost is nan"),
        pytest.param({"cost": lambda n: math.inf}, r"cost\(\d\) returned inf", id="cost is infinite"),
        pytest.param({"cost": lambda n: None}, r"cost\(\d\) returned None", id="cost is None"),
        pytest.param({"cost": lambda n: "1"}, r"cost\(\d\) returned '1'", id="cost is text"),
        pytest.param({"cost": lambda n: [5, 5, 5, -1, 5][n - 1]}, r"cost\(4\) returned -1", id="between two rows"),
    ],
)
def test_a_plan_that_cannot_be_made_is_refused(arguments: dict[str, Any], match: str) -> None:
    with pytest.raises(LadderError, match=match):
        plan([3, 5], **{"n_buckets": 2, **arguments})


@pytest.mark.parametrize(
    ("data", "match"),
    [
        pytest.param({"lengths": [1]}, "a histogram is .* got {'lengths'", id="a key is missing"),
        pytest.param([1, 2], r"a histogram is .* got \[1, 2\]", id="a list"),
        pytest.param({"lengths": [1, 2], "counts": [1]}, "got 2 lengths and 1 counts", id="a count is missing"),
        pytest.param({"lengths": [2, 1], "counts": [1, 1]}, "ascending lengths", id="descending"),
        pytest.param({"lengths": [2, 2], "counts": [1, 1]}, "each once", id="a length twice"),
        pytest.param({"lengths": [2], "counts": [0]}, "a count of rows must be .* got 0", id="no rows"),
        pytest.param({"lengths": [2.5], "counts": [1]}, "must be a whole number of at least 1, got 2.5", id="half"),
        pytest.param({"lengths": [], "counts": []}, "lengths is empty", id="empty"),
    ],
)
def test_a_damaged_histogram_is_refused(data: Any, match: str) -> None:
    with pytest.raises(LadderError, match=match):
        Histogram.from_json(data)


@pytest.mark.parametrize(
    ("buckets", "min_length", "max_length", "n_buckets", "lengths"),
    [
        pytest.param("pow2", 2, 512, 8, (16, 32, 64, 128, 256, 512), id="pow2"),
        pytest.param("pow2", 2, 100, 8, (16, 32, 64, 100), id="pow2, cap between powers"),
        pytest.param("pow2", 2, 16, 8, (16,), id="pow2, cap at the first power"),
        pytest.param("pow2", 2, 15, 8, (15,), id="pow2, cap below the first power"),
        pytest.param("pow2", 33, 128, 8, (64, 128), id="pow2, long shortest input"),
        pytest.param("pow2", 32, 128, 8, (32, 64, 128), id="pow2, shortest input at a power"),
        pytest.param("pow2", 2, 8192, 8, (16, 32, 64, 128, 256, 512, 1024, 2048), id="pow2, longer than the cap"),
        pytest.param("pow2", 0, None, 8, (16, 32, 64, 128, 256, 512), id="pow2, unlimited"),
        pytest.param("auto", 2, 512, 6, (16, 32, 64, 128, 256, 512), id="auto"),
        pytest.param("auto", 2, 512, 1, (512,), id="auto, one bucket"),
        pytest.param("auto", 2, 30, 6, (16, 24, 30), id="auto, duplicates dropped and the cap no multiple of 8"),
        pytest.param("auto", 2, 7, 6, (7,), id="auto, a tiny model"),
        pytest.param([64, 32], 2, 512, 8, (32, 64), id="lengths"),
        pytest.param(512, 2, 512, 8, (512,), id="exactly the maximum"),
        pytest.param([2, 512], 2, 512, 8, (2, 512), id="exactly the shortest input"),
        pytest.param(np.array([32]), 2, None, 8, (32,), id="an array, unlimited"),
        pytest.param(600, 2, None, 8, (600,), id="unlimited"),
    ],
)
def test_buckets_resolve_to_lengths(
    buckets: Any, min_length: int, max_length: int | None, n_buckets: int, lengths: tuple[int, ...]
) -> None:
    ladder = resolve_ladder(buckets, min_length=min_length, max_length=max_length, n_buckets=n_buckets, batch_sizes=[4])
    assert ladder == cross(lengths, [4])


@pytest.mark.parametrize(
    ("buckets", "message"),
    [
        pytest.param(
            [(8, 600)],
            "bucket b8_s600 is longer than this model's maximum of 512 tokens; drop it or use 512",
            id="beyond the maximum",
        ),
        pytest.param([(1, 513)], "bucket b1_s513 is longer than this model's maximum of 512", id="one beyond"),
        pytest.param(
            [(4, 1)],
            "bucket b4_s1 holds no input: the shortest possible has 2 tokens; drop it or use 2",
            id="too short",
        ),
        pytest.param("pow3", 'buckets=\'pow3\' is no preset; use "auto", "pow2", a length, or a list', id="unknown"),
        pytest.param("", "buckets='' is no preset", id="empty text"),
        pytest.param([], "buckets is empty", id="empty"),
        pytest.param([64.0], "a bucket's length must be a whole number of at least 1, got 64.0", id="a float"),
    ],
)
def test_a_ladder_that_does_not_fit_the_model_is_refused(buckets: Any, message: str) -> None:
    with pytest.raises(LadderError, match="^" + re.escape(message)):
        resolve_ladder(buckets, min_length=2, max_length=512)


@pytest.mark.parametrize(
    ("ladder", "min_length", "max_length", "rows", "expected"),
    [
        pytest.param([4, 8], 4, 8, None, [], id="nothing wrong"),
        pytest.param([4, 8], 0, None, [4, 8], [], id="nothing wrong, unlimited"),
        pytest.param(
            [1, 8],
            2,
            8,
            None,
            [
                (
                    "unreachable",
                    "b1_s1",
                    "bucket b1_s1 holds no input: the shortest possible has 2 tokens; drop it or use 2",
                )
            ],
            id="unreachable",
        ),
        pytest.param(
            [8, 9],
            2,
            8,
            None,
            [
                (
                    "beyond-maximum",
                    "b1_s9",
                    "bucket b1_s9 is longer than this model's maximum of 8 tokens; drop it or use 8",
                )
            ],
            id="beyond the maximum",
        ),
        pytest.param(
            [4, 8, 16],
            2,
            16,
            [3, 3, 12],
            [("unused", "b1_s8", "bucket b1_s8 is used by none of the 3 rows; drop length 8")],
            id="unused",
        ),
        pytest.param(
            [8, 16],
            2,
            16,
            [8],
            [("unused", "b1_s16", "bucket b1_s16 is used by none of the 1 rows; drop length 16")],
            id="the largest is unused",
        ),
        pytest.param(
            [99, 100],
            2,
            100,
            [99, 100, 100],
            [
                (
                    "saves-too-little",
                    "b1_s99",
                    "without bucket b1_s99 the total cost changes by +0.33%, less than the 1.00% a length should save; "
                    "drop length 99",
                )
            ],
            id="saves too little",
        ),
        pytest.param([50, 100], 2, 100, [100] * 99 + [50, 50], [], id="saves just enough"),
        pytest.param(
            [1, 8],
            2,
            8,
            [1, 8],
            [
                (
                    "unreachable",
                    "b1_s1",
                    "bucket b1_s1 holds no input: the shortest possible has 2 tokens; drop it or use 2",
                )
            ],
            id="one finding per problem",
        ),
    ],
)
def test_each_finding_says_what_is_wrong(
    ladder: list[int], min_length: int, max_length: int | None, rows: list[int] | None, expected: list[Any]
) -> None:
    histogram = None if rows is None else Histogram.from_lengths(rows)
    found = lint(cross(ladder, [1]), min_length=min_length, max_length=max_length, histogram=histogram)
    assert [(finding.kind, finding.bucket.name, finding.message) for finding in found] == expected


# single examples


def test_a_million_rows_are_planned_for_32_buckets() -> None:
    lengths = np.random.default_rng(0).integers(1, 513, 1_000_000)
    found = plan(lengths, n_buckets=32, cost=lambda tokens: -(-tokens // 8) * 8)
    assert found.histogram.total_rows == sum(found.rows) == 1_000_000
    assert found.lengths == tuple(range(16, 513, 16))  # evenly distributed rows want evenly spread lengths
    assert found.waste < 0.04


def test_rows_that_are_all_equal_need_one_bucket() -> None:
    found = plan([7, 7, 7], n_buckets=5, batch_sizes=[2])
    assert found.ladder == cross([7], [2])
    assert (found.cost, found.waste, found.waste_single, found.rows, found.clipped) == (7.0, 0.0, 0.0, (3,), 0)


def test_the_longest_row_may_be_as_long_as_anything_is() -> None:
    assert plan([1, LONGEST], n_buckets=2).lengths == (1, LONGEST)


def test_a_cost_that_is_always_zero_needs_one_bucket() -> None:
    assert plan([1, 5, 9], n_buckets=3, cost=lambda tokens: 0).lengths == (9,)


def test_of_a_plateau_the_far_edge_is_taken() -> None:
    assert plan([3, 30], n_buckets=2, cost=lambda tokens: -(-tokens // 8) * 8).lengths == (8, 30)


def test_a_dip_in_the_cost_is_used_although_no_row_is_that_long() -> None:
    assert plan([10, 30], n_buckets=2, cost=lambda tokens: 1 if tokens == 13 else tokens).lengths == (13, 30)


def test_a_single_bucket_with_max_length_holds_it() -> None:
    found = plan([3, 4], n_buckets=1, max_length=16)
    assert (found.lengths, found.rows, found.clipped) == ((16,), (2,), 0)


def test_a_plan_takes_a_histogram_as_well_as_lengths() -> None:
    assert plan(Histogram.from_lengths([3, 9, 9]), n_buckets=2) == plan([3, 9, 9], n_buckets=2)


def test_a_plan_is_readable_and_its_json_makes_the_ladder_again() -> None:
    found = plan([10] * 3 + [100, 700], n_buckets=3, batch_sizes=[1, 8], max_length=512)
    data = json.loads(json.dumps(found.to_json()))
    assert make_ladder(data["ladder"]) == found.ladder
    assert Histogram.from_json(data["histogram"]) == found.histogram
    assert data["rows"] == {"10": 3, "100": 1, "512": 1}
    assert (data["cost"], data["clipped"], data["waste"]) == (found.cost, 1, 0.0)
    assert data["waste_single"] == pytest.approx(1 - 642 / (5 * 512))
    assert str(found).splitlines() == [
        "  length        rows   share",
        "      10           3   60.0%",
        "     100           1   20.0%",
        "     512           1   20.0%",
        "waste 0.0% (one bucket of 512: 74.9%)",
        "mean cost per row 128.4; 1 of 5 rows clipped",
    ]


def test_auto_with_a_histogram_is_the_plan_for_it() -> None:
    histogram = Histogram.from_lengths([1, 20, 21, 90, 700])
    ladder = resolve_ladder("auto", min_length=2, max_length=512, histogram=histogram, n_buckets=4, batch_sizes=[1])
    assert ladder == plan([2, 20, 21, 90, 512], n_buckets=4, batch_sizes=[1], max_length=512).ladder
    assert ladder.lengths == (2, 21, 90, 512)


def test_auto_listens_to_the_cost() -> None:
    histogram = Histogram.from_lengths([3, 30])
    flat = resolve_ladder("auto", min_length=2, max_length=64, histogram=histogram, cost=lambda tokens: 1.0)
    assert flat.lengths == (64,)


def test_a_ladder_passes_through_if_it_fits_the_model() -> None:
    ladder = plan([3, 30], n_buckets=2).ladder
    assert resolve_ladder(ladder, min_length=2, max_length=512) == ladder
    with pytest.raises(LadderError, match="b1_s30 is longer than this model's maximum of 16"):
        resolve_ladder(ladder, min_length=2, max_length=16)


def test_findings_about_a_length_name_its_first_bucket_and_those_about_a_shape_name_each() -> None:
    rows = Histogram.from_lengths([16])
    found = lint(cross([1, 8, 16, 32], [1, 4]), min_length=2, max_length=16, histogram=rows)
    assert [(finding.kind, finding.bucket.name) for finding in found] == [
        ("unreachable", "b1_s1"),
        ("unreachable", "b4_s1"),
        ("beyond-maximum", "b1_s32"),
        ("beyond-maximum", "b4_s32"),
        ("unused", "b1_s8"),
    ]


def test_a_row_longer_than_the_ladder_has_no_waste_but_an_error() -> None:
    histogram = Histogram.from_lengths([9])
    assert histogram.waste(make_ladder([9])) == 0
    with pytest.raises(TooLongError, match="9 tokens but the largest bucket holds 8"):
        histogram.waste(make_ladder([8]))


def test_a_quantile_is_not_one_row_too_far_because_of_rounding() -> None:
    assert 0.07 * 100 > 7
    assert Histogram.from_lengths(range(1, 101)).quantile(0.07) == 7


@pytest.mark.parametrize("share", [-0.01, 1.01, math.nan])
def test_a_quantile_outside_0_to_1_is_refused(share: float) -> None:
    with pytest.raises(LadderError, match=r"a share from 0 to 1, got .* use 0.99 for the 99th percentile"):
        Histogram.from_lengths([3]).quantile(share)


def test_plans_histograms_and_findings_cannot_be_changed() -> None:
    found: Plan = plan([3], n_buckets=1)
    finding = Finding(kind="unused", bucket=found.ladder.buckets[0], message="")
    for value, name in ((found, "cost"), (found.histogram, "counts"), (finding, "kind")):
        with pytest.raises(dataclasses.FrozenInstanceError, match=name):
            setattr(value, name, 0)
    assert isinstance(found.ladder, Ladder)
