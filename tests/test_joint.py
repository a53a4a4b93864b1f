"""Joint plans are never slower than any other ladder within the limits; the linter goes by the same seconds."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_bucket.assign import assign, cover
from hf_bucket.costs import Costs
from hf_bucket.errors import LadderError
from hf_bucket.histogram import Histogram
from hf_bucket.joint import BATCH_SIZES, MOST_BATCH_SIZES, Limits, RunCost, best_ladder, run_seconds
from hf_bucket.ladder import Bucket, Ladder, cross, make_ladder
from hf_bucket.planner import MOST_LENGTHS, lint, plan, resolve_ladder, seconds_per_row

TOP = 5
SIZES = (1, 2, 4)
ALL = cross(range(1, TOP + 1), SIZES)
rows_strategy = st.lists(st.integers(1, TOP), min_size=1, max_size=25)
n_strategy = st.integers(1, 4)
optional_top = st.none() | st.integers(1, TOP)
quick = settings(deadline=None, max_examples=60)

# whole numbers, so that ties are exact
any_costs = st.lists(st.integers(1, 30), min_size=len(ALL), max_size=len(ALL)).map(
    lambda table: Costs(seconds=dict(zip(ALL, map(float, table), strict=True)))
)
rising_costs = any_costs.map(lambda costs: Costs(seconds=costs.of(ALL)))
formulas = st.tuples(st.floats(0, 0.01), st.floats(1e-5, 1e-3), st.floats(0, 1e-5)).map(
    lambda f: Formula(lambda b: f[0] + f[1] * b.cells + f[2] * b.cells * b.length)
)


class Formula:
    """Costs that are not measured but known."""

    def __init__(self, seconds: Callable[[Bucket], float]) -> None:
        self._seconds = seconds

    def __call__(self, bucket: Bucket) -> float:
        return self._seconds(bucket)

    def of(self, ladder: Ladder) -> dict[Bucket, float]:
        return {bucket: self(bucket) for bucket in ladder}


def scheduled(rows: Sequence[int], ladder: Ladder, cost: RunCost) -> float:
    """Mean seconds of the rows when they run together, every one in its smallest length; too long ones in the last."""
    lengths = [min(row, ladder.max_length) for row in rows]
    return sum(cost(batch.bucket) for batch in assign(lengths, ladder, cost, promote=False)) / len(rows)


def all_ladders(lengths: Sequence[int], top: int, n_buckets: int) -> Iterator[Ladder]:
    """Every ladder of at most ``n_buckets`` buckets of some lengths that holds ``top``."""
    buckets = [bucket for bucket in ALL if bucket.length in lengths and bucket.length <= top]
    for n in range(1, n_buckets + 1):
        for chosen in itertools.combinations(buckets, n):
            if chosen[-1].length == top:
                yield Ladder(chosen)


def joint(rows: Sequence[int], **options: Any) -> Any:
    return plan(rows, **{"batch_sizes": SIZES, "window": len(rows), **options})


# the oracle: every ladder there is, run by the scheduler


@quick
@given(rows_strategy, n_strategy, any_costs, optional_top)
def test_no_ladder_of_lengths_with_rows_is_faster(rows: list[int], n: int, costs: Costs, top: int | None) -> None:
    found = joint(rows, n_buckets=n, cost=costs, max_length=top)
    last = top or max(rows)
    lengths = {min(row, last) for row in rows} | {last}
    best = min(scheduled(rows, ladder, costs) for ladder in all_ladders(sorted(lengths), last, n))
    assert found.cost == pytest.approx(best)
    assert found.cost == pytest.approx(scheduled(rows, found.ladder, costs))
    assert (len(found.ladder) <= n, found.ladder.max_length) == (True, last)


@quick
@given(rows_strategy, n_strategy, rising_costs, optional_top)
def test_no_ladder_at_all_is_faster_where_longer_is_never_faster(
    rows: list[int], n: int, costs: Costs, top: int | None
) -> None:
    found = joint(rows, n_buckets=n, cost=costs, max_length=top)
    totals = [
        (round(scheduled(rows, ladder, costs) * len(rows)), len(ladder))
        for ladder in all_ladders(range(1, TOP + 1), top or max(rows), n)
    ]
    assert (round(found.cost * len(rows)), len(found.ladder)) == min(totals), "of equally fast ones, the fewest buckets"


@quick
@given(rows_strategy, n_strategy, any_costs, st.data())
def test_no_ladder_within_the_limits_is_faster(rows: list[int], n: int, costs: Costs, data: st.DataObject) -> None:
    table = data.draw(st.lists(st.integers(1, 9), min_size=len(ALL), max_size=len(ALL)))
    memory = dict(zip(ALL, table, strict=True))
    most = data.draw(st.integers(min(memory[bucket] for bucket in ALL.of_length(max(rows))), 9))
    limits = Limits(
        n_buckets=4, memory_bytes=most, memory_of=memory.__getitem__, compile_s=n * 0.1, bucket_compile_s=0.1
    )
    found = joint(rows, cost=costs, limits=limits)
    ladders = [
        ladder
        for ladder in all_ladders(sorted(set(rows)), max(rows), n)
        if max(memory[bucket] for bucket in ladder) <= most
    ]
    assert found.cost == pytest.approx(min(scheduled(rows, ladder, costs) for ladder in ladders))
    assert found.ladder in ladders


# properties


@quick
@given(
    st.lists(st.integers(1, 300), min_size=1, max_size=80),
    st.integers(1, 4),
    st.sampled_from([(1,), (8,), (1, 8), (2, 32), (1, 4, 16)]),
    formulas,
    st.sampled_from([1, 7, 64, 1024, 5000]),
)
def test_no_set_of_batch_sizes_at_planned_lengths_is_faster(
    rows: list[int], n: int, sizes: tuple[int, ...], cost: RunCost, window: int
) -> None:
    histogram = Histogram.from_lengths(rows)
    found = plan(histogram, n_buckets=n * len(sizes), cost=cost, window=window)
    for by_length in (None, lambda length: cost(Bucket(batch_size=max(sizes), extent=(length,)))):
        crossed = plan(histogram, n_buckets=n, batch_sizes=sizes, cost=by_length).ladder
        assert found.cost <= seconds_per_row(crossed, histogram, cost, window=window) * (1 + 1e-9)


@quick
@given(rows_strategy, rising_costs, optional_top)
def test_more_buckets_are_never_slower(rows: list[int], costs: Costs, top: int | None) -> None:
    means = [joint(rows, n_buckets=n, cost=costs, max_length=top, window=50).cost for n in range(1, 9)]
    assert all(more <= fewer * (1 + 1e-9) for fewer, more in itertools.pairwise(means))


@quick
@given(st.integers(0, 700), st.sets(st.integers(1, 20), min_size=1, max_size=4), formulas)
def test_any_number_of_rows_of_one_length_is_covered_as_the_scheduler_does(
    n: int, sizes: set[int], cost: RunCost
) -> None:
    ladder = cross([16], sorted(sizes))
    seconds = [sum(map(cost, cover(rows, ladder.buckets, cost))) for rows in (n, n + 1)]
    assert run_seconds(ladder, [n], cost) == pytest.approx(seconds[0])
    assert run_seconds(ladder, [n + 0.25], cost) == pytest.approx(0.75 * seconds[0] + 0.25 * seconds[1])


@quick
@given(rows_strategy, rising_costs, n_strategy)
def test_one_row_at_a_time_is_planned_as_by_the_cost_of_its_length(rows: list[int], costs: Costs, n: int) -> None:
    def alone(length: int) -> float:
        return min(costs(bucket) for bucket in ALL.of_length(length))

    assert joint(rows, n_buckets=n, cost=costs, window=1).cost == pytest.approx(
        plan(rows, n_buckets=n, cost=alone).cost
    )


@settings(deadline=None, max_examples=15)
@given(st.sets(st.integers(1, 4000), min_size=600, max_size=900), st.integers(1, 6))
def test_of_very_many_lengths_some_are_tried_and_no_row_is_padded_far(lengths: set[int], n: int) -> None:
    seen: set[int] = set()

    def seconds(bucket: Bucket) -> float:
        seen.add(bucket.length)
        return float(bucket.cells)

    found = plan(list(lengths), n_buckets=n, cost=Formula(seconds), batch_sizes=[1, 8])
    assert found.ladder.max_length == max(lengths)
    assert len(seen) <= MOST_LENGTHS
    assert seen <= lengths
    spread = (max(lengths) / min(lengths)) ** (1 / (MOST_LENGTHS - 1))
    assert all(min(edge for edge in seen if edge >= row) <= row * spread * (1 + 1e-9) for row in lengths)


# the linter


@quick
@given(rows_strategy, st.sets(st.sampled_from(ALL.buckets), min_size=1, max_size=6), any_costs)
def test_what_the_linter_finds_unused_the_scheduler_never_runs(
    rows: list[int], buckets: set[Bucket], costs: Costs
) -> None:
    ladder, histogram = Ladder(tuple(buckets)), Histogram.from_lengths(rows)
    found = lint(ladder, min_length=1, max_length=None, histogram=histogram, cost=costs, window=len(rows))
    unused = {finding.bucket for finding in found if finding.kind == "unused"}
    dropped = {length for length in ladder.lengths if ladder.of_length(length)[0] in unused}
    lengths = [min(row, ladder.max_length) for row in rows]
    run = {batch.bucket for batch in assign(lengths, ladder, costs.of(ladder).__getitem__)}
    without_rows = {n for n in ladder.lengths if n not in {ladder.choose(length).length for length in lengths}}
    assert without_rows <= dropped
    weak = {finding.bucket.length for finding in found if finding.kind == "saves-too-little"}
    judged = {bucket for bucket in ladder if bucket.length not in without_rows | weak}
    assert unused & judged == judged - run


@quick
@given(
    rows_strategy, st.sets(st.sampled_from(ALL.buckets), min_size=1, max_size=6), any_costs, st.sampled_from([0, 0.1])
)
def test_a_length_is_worth_what_running_without_it_takes(
    rows: list[int], buckets: set[Bucket], costs: Costs, price: float
) -> None:
    ladder = Ladder(tuple(buckets))
    found = {
        finding.bucket.length
        for finding in lint(
            ladder,
            min_length=1,
            max_length=None,
            histogram=Histogram.from_lengths(rows),
            cost=costs,
            bucket_price=price,
            window=len(rows),
        )
        if finding.kind == "saves-too-little"
    }
    total = scheduled(rows, ladder, costs)
    used = {ladder.choose(min(row, ladder.max_length)).length for row in rows}
    for length in used - {ladder.max_length}:
        rise = scheduled(rows, Ladder(tuple(b for b in ladder if b.length != length)), costs) - total
        assert (length in found) == (rise < price * total) or math.isclose(rise, price * total, abs_tol=1e-9)
    assert found <= used - {ladder.max_length}


def test_findings_are_in_predicted_seconds_and_name_batch_sizes_that_never_run() -> None:
    cost = Formula(lambda bucket: 0.01 * bucket.cells)
    rows = Histogram.from_lengths([8] * 9 + [16])
    found = lint(cross([8, 9, 16], [1, 32]), min_length=1, max_length=None, histogram=rows, cost=cost, window=10)
    assert [(finding.kind, finding.message) for finding in found] == [
        ("unused", "bucket b1_s9 is used by none of the 10 rows; drop length 9"),
        ("unused", "the scheduler never runs bucket b32_s8 for 10 such rows at a time; drop it"),
        ("unused", "the scheduler never runs bucket b32_s16 for 10 such rows at a time; drop it"),
    ]
    (weak,) = lint(cross([15, 16], [1]), min_length=1, max_length=None, histogram=rows, cost=cost, bucket_price=0.1)
    assert weak.message == (
        "without bucket b1_s15 1,000 rows take +9 s, +5.96%, less than the 10.00% a length should save; drop length 15"
    )


# tables


@pytest.mark.parametrize(
    ("options", "match"),
    [
        pytest.param({"n_buckets": 0}, "n_buckets must be a whole number of at least 1, got 0", id="no bucket"),
        pytest.param({"n_buckets": None}, "a plan needs n_buckets, such as n_buckets=8, or limits", id="no number"),
        pytest.param({"window": 0}, "window .* must be a whole number of at least 1, got 0", id="no window"),
        pytest.param({"window": 1.5}, "window .* got 1.5", id="half a row"),
        pytest.param({"batch_sizes": []}, "batch_sizes is empty", id="no batch sizes"),
        pytest.param({"batch_sizes": [2, 2]}, "b2_s1 is given more than once", id="a batch size twice"),
        pytest.param({"batch_sizes": range(1, 11)}, f"at most {MOST_BATCH_SIZES}, got 10; give the likely", id="many"),
        pytest.param({"cost": Formula(lambda b: 0)}, r"cost\(b1_s3\) returned 0; the seconds of a run", id="no time"),
        pytest.param({"cost": Formula(lambda b: math.nan)}, r"cost\(b1_s3\) returned nan", id="nan"),
        pytest.param({"cost": Formula(lambda b: math.inf)}, r"cost\(b1_s3\) returned inf", id="infinite"),
        pytest.param(
            {"limits": Limits(memory_bytes=3999, memory_of=lambda b: 1000 * b.cells)},
            "memory_bytes is 3,999 but b1_s5, the least that holds 5 tokens, needs 5,000; allow at least that much",
            id="no memory",
        ),
        pytest.param(
            {"limits": Limits(compile_s=1.5, bucket_compile_s=2)},
            "compile_s is 1.5 but one bucket, the least there can be, takes 2 s to compile; allow at least that much",
            id="no time to compile",
        ),
        pytest.param(
            {"cost": None, "limits": Limits(memory_bytes=9, memory_of=lambda b: b.cells)},
            "limits on memory and compile time are for joint plans; pass measured costs",
            id="limits without costs",
        ),
    ],
)
def test_a_joint_plan_that_cannot_be_made_is_refused(options: dict[str, Any], match: str) -> None:
    cost = Formula(lambda bucket: float(bucket.cells))
    with pytest.raises(LadderError, match=match):
        plan([3, 5], **{"n_buckets": 2, "cost": cost, **options})


@pytest.mark.parametrize(
    ("limits", "match"),
    [
        pytest.param({"n_buckets": 0}, "n_buckets must be a whole number", id="buckets"),
        pytest.param({"memory_bytes": 0, "memory_of": len}, "memory_bytes must be a whole number", id="memory"),
        pytest.param({"memory_bytes": 5}, "memory_bytes=5 cannot be kept without memory_of; give it too", id="of what"),
        pytest.param({"compile_s": 5}, "compile_s=5 cannot be kept without bucket_compile_s", id="at what speed"),
        pytest.param({"compile_s": -1, "bucket_compile_s": 1}, "compile_s must be .* above 0, got -1", id="time"),
        pytest.param({"bucket_compile_s": math.nan}, "bucket_compile_s must be .* got nan", id="nan"),
    ],
)
def test_a_limit_that_is_none_is_refused(limits: dict[str, Any], match: str) -> None:
    with pytest.raises(LadderError, match=match):
        Limits(**limits)


@pytest.mark.parametrize(
    ("n_buckets", "limits", "most"),
    [
        pytest.param(3, None, 3, id="no limits"),
        pytest.param(None, {"n_buckets": 2}, 2, id="in the limits alone"),
        pytest.param(3, {"n_buckets": 2}, 2, id="the lower one"),
        pytest.param(3, {"compile_s": 0.3, "bucket_compile_s": 0.1}, 3, id="exactly in time"),
        pytest.param(4, {"compile_s": 0.29, "bucket_compile_s": 0.1}, 2, id="not quite in time"),
    ],
)
def test_the_lower_number_of_buckets_holds(n_buckets: int | None, limits: dict[str, Any] | None, most: int) -> None:
    cost = Formula(lambda bucket: float(bucket.cells))
    found = plan(
        range(1, 99),
        n_buckets=n_buckets,
        cost=cost,
        batch_sizes=[1],
        limits=None if limits is None else Limits(**limits),
    )
    assert len(found.ladder) == most


# single examples


def test_a_dear_run_wants_large_batches_and_a_dear_cell_short_ones() -> None:
    rows = [4] * 32 + [64] * 4
    dear_run = plan(rows, n_buckets=2, cost=Formula(lambda b: 1 + 1e-6 * b.cells), window=36).ladder
    dear_cell = plan(rows, n_buckets=2, cost=Formula(lambda b: 1e-6 + b.cells), window=36).ladder
    assert dear_run == make_ladder([(32, 4), (4, 64)])
    assert dear_cell == make_ladder([(32, 4), (4, 64)])
    assert plan(rows, n_buckets=1, cost=Formula(lambda b: 1e-6 + b.cells), window=36).ladder == make_ladder([(4, 64)])


def test_a_top_bucket_that_no_row_needs_is_there_all_the_same() -> None:
    found = plan([4] * 8, n_buckets=2, cost=Formula(lambda b: 1.0 + b.cells), max_length=64, window=8)
    assert found.ladder == make_ladder([(8, 4), (1, 64)])
    assert found.rows == (8, 0)


def test_a_row_rarer_than_one_in_a_window_counts_for_its_share() -> None:
    """One row in a hundred is long: in a window of ten rows a run for it takes place every tenth time."""
    cost = Formula(lambda bucket: float(bucket.cells))
    assert plan([1] * 99 + [50], n_buckets=2, cost=cost, batch_sizes=[1], window=10).cost * 10 == pytest.approx(9.9 + 5)


def test_512_lengths_and_6_batch_sizes_are_planned_for_32_buckets() -> None:
    counts = np.random.default_rng(0).integers(1, 500, 512)
    histogram = Histogram(lengths=tuple(range(1, 513)), counts=tuple(counts.tolist()))
    cost = Costs(seconds={b: 1e-3 + 1e-5 * b.cells + 1e-8 * b.cells * b.length for b in cross([16, 64, 256], [1, 8])})
    found = plan(histogram, n_buckets=32, cost=cost)
    assert (len(found.ladder) <= 32, found.ladder.max_length) == (True, 512)
    crossed = plan(histogram, n_buckets=16, batch_sizes=[1, 32]).ladder
    assert found.cost < seconds_per_row(crossed, histogram, cost)
    assert {bucket.batch_size for bucket in found.ladder} <= set(BATCH_SIZES)


def test_auto_with_the_seconds_of_a_run_is_the_joint_plan() -> None:
    cost = Formula(lambda bucket: float(bucket.cells))
    histogram = Histogram.from_lengths([1, 20, 21, 90, 700])
    ladder = resolve_ladder("auto", min_length=2, max_length=512, histogram=histogram, n_buckets=4, cost=cost)
    assert ladder == plan([2, 20, 21, 90, 512], n_buckets=4, cost=cost).ladder


def test_a_function_of_a_length_is_not_taken_for_the_seconds_of_a_run() -> None:
    assert not isinstance(lambda tokens: tokens, RunCost)
    assert isinstance(Costs(seconds={}), RunCost)
    assert plan([3, 30], n_buckets=2, cost=lambda tokens: tokens).ladder == make_ladder([3, 30])


def test_the_ladder_of_one_length_is_found_by_hand() -> None:
    """Seven rows take 1.2 + 2.2 + 4 in runs of 1, 2 and 4; two runs of 4 take 8, and any other runs no less."""
    one, two, four = ALL.of_length(TOP)
    cost, limits = Costs(seconds={one: 1.2, two: 2.2, four: 4.0}), Limits(n_buckets=3)
    assert best_ladder([TOP], [7], cost, batch_sizes=SIZES, limits=limits) == Ladder((one, two, four))
    assert best_ladder([TOP], [8], cost, batch_sizes=SIZES, limits=limits) == Ladder((four,))
