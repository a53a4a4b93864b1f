"""What buckets cost here: measured within a budget, kept, predicted where there was no time, used for scheduling."""

from __future__ import annotations

import pickle
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest
from conftest import fake_artifact, fake_engine, text_of
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_bucket.artifact import Artifact
from hf_bucket.assign import cells_cost
from hf_bucket.batch import Array
from hf_bucket.costs import (
    LENGTHS,
    TURNS,
    Costs,
    compare,
    faster_at_once,
    measure,
    read_costs,
    spread,
    write_costs,
)
from hf_bucket.describe import describe_costs
from hf_bucket.errors import InputError
from hf_bucket.ladder import Bucket, Ladder, make_ladder
from hf_bucket.runner import Runner, RunOptions
from hf_bucket.session import FakeSession
from hf_bucket.session_ort import EngineOptions
from hf_bucket.workers import Workers

LADDER = make_ladder([8, 16, 32], batch_sizes=[1, 4])
SMALL, LARGE = LADDER.buckets[0], LADDER.buckets[-1]


class Time:
    """A clock that only sessions move on."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


class Slow(FakeSession):
    """A session that takes as long as it has cells, and longer the first time."""

    time: Time
    per_cell_s = 0.001
    first_s = 0.0
    runs = 0

    def run(self, arrays: Mapping[str, Array]) -> dict[str, Array]:
        self.time.now += self.bucket.cells * self.per_cell_s + (0 if self.runs else self.first_s)
        self.runs += 1
        return {} if not arrays else super().run(arrays)


def slow_sessions(ladder: Ladder, time: Time, **options: float) -> dict[Bucket, FakeSession]:
    kind = type("Kind", (Slow,), {"time": time, **options})
    return {bucket: kind(bucket) for bucket in ladder}


def nothing(bucket: Bucket) -> dict[str, Array]:
    return {}


# measuring


def test_every_bucket_gets_the_median_of_its_runs_without_the_first() -> None:
    time = Time()
    found = measure(slow_sessions(LADDER, time, first_s=5.0), nothing, budget_s=1000, clock=time)
    assert found == pytest.approx({bucket: bucket.cells * 0.001 for bucket in LADDER})


@settings(deadline=None)
@given(budget_s=st.floats(0, 2))
def test_the_budget_is_kept_but_for_one_run_of_what_is_not_known_yet(budget_s: float) -> None:
    time = Time()
    found = measure(slow_sessions(LADDER, time), nothing, budget_s=budget_s, clock=time)
    assert found.keys() >= {SMALL}
    assert time.now <= budget_s + LARGE.cells * 0.001 + 1e-9
    assert list(found) == sorted(found, key=lambda bucket: bucket.cells)[: len(found)]


def test_batches_run_at_once_only_where_that_is_faster() -> None:
    time, workers = Time(), Workers(1)  # a worker that runs one after another adds up the time of both
    every_core, one_thread = (slow_sessions(LADDER, time, per_cell_s=cost) for cost in (0.001, 0.0015))
    seconds = {SMALL: 0.01}
    assert faster_at_once(one_thread, every_core, workers, nothing, seconds, time, budget_s=1.0)
    assert not faster_at_once(every_core, one_thread, workers, nothing, seconds, time, budget_s=1.0)


@pytest.mark.parametrize(("budget_s", "tried"), [(0.01, False), (0.1, True), (1.0, True), (60.0, True)])
def test_whether_at_once_is_faster_is_tried_within_the_budget_or_not_at_all(budget_s: float, tried: bool) -> None:
    time = Time()
    sessions = slow_sessions(LADDER, time)
    seconds = {bucket: bucket.cells * 0.001 for bucket in LADDER}
    assert faster_at_once(sessions, sessions, Workers(1), nothing, seconds, time, budget_s=budget_s)
    assert (time.now > 0) == tried
    assert time.now <= 2 * budget_s, "about: the last call of either way may go over its half"


def test_a_single_request_takes_one_thread_only_where_every_core_is_no_faster() -> None:
    costs = Costs(seconds={SMALL: 0.001, LARGE: 0.004}, alone={SMALL: 0.001, LARGE: 0.002})
    assert costs.quick == {SMALL}
    assert Costs(seconds={LARGE: 0.002}, alone={SMALL: 0.001}).quick == frozenset(), "nobody knows"


@pytest.mark.parametrize(("seconds", "quick"), [(0.010, {SMALL}), (0.011, set())])
def test_a_long_run_is_worth_every_core_whatever_a_busy_moment_showed(seconds: float, quick: set[Bucket]) -> None:
    assert Costs(seconds={SMALL: seconds}, alone={SMALL: 0.02}).quick == quick


def test_a_bucket_larger_than_one_that_gains_from_every_core_gains_too_whatever_a_busy_moment_showed() -> None:
    by_length = {length: Bucket(batch_size=1, extent=(length,)) for length in (8, 16, 32, 64)}
    seconds = {by_length[8]: 0.001, by_length[16]: 0.002, by_length[32]: 0.004, by_length[64]: 0.008}
    alone = {by_length[8]: 0.0011, by_length[16]: 0.0015, by_length[32]: 0.0044, by_length[64]: 0.005}
    assert Costs(seconds=seconds, alone=alone).quick == {by_length[8]}


@pytest.mark.parametrize(
    ("one_thread_s", "every_core_s", "taken"),
    [pytest.param(0.005, 0.01, 1, id="one thread"), pytest.param(0.01, 0.005, 0, id="every core")],
)
def test_a_single_request_runs_on_the_sessions_that_were_faster_for_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, one_thread_s: float, every_core_s: float, taken: int
) -> None:
    monkeypatch.setenv("HF_BUCKET_CACHE", str(tmp_path / "cache"))
    artifact = fake_artifact(tmp_path / "fake", make_ladder([8, 16], batch_sizes=[1, 4]))
    time, asked = Time(), []

    def engine(artifact: Artifact, options: EngineOptions) -> dict[Bucket, FakeSession]:
        per_run = one_thread_s if options.threads else every_core_s

        class Noted(FakeSession):
            def run(self, arrays: Mapping[str, Array]) -> dict[str, Array]:
                time.now += per_run
                asked.append(options.threads)
                return super().run(arrays)

        return {bucket: Noted(bucket) for bucket in artifact.manifest.ladder}

    runner = Runner(artifact, RunOptions(engine=EngineOptions(workers=2)), engine=engine)
    runner.measure(1.0, clock=time)
    again = Runner(artifact, RunOptions(engine=EngineOptions(workers=2), measure_s=1.0), engine=engine)
    asked.clear()
    assert len(again(["w1 w2"])) == 1
    assert asked == [taken]
    again.close()
    assert len(again(["w1 w2"])) == 1


def test_measuring_a_ladder_on_two_cores_spends_about_what_it_is_given(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_BUCKET_CACHE", str(tmp_path / "cache"))
    artifact, time = fake_artifact(tmp_path / "fake", make_ladder([8, 16, 32, 64], batch_sizes=[1, 4])), Time()

    class Ten(FakeSession):
        def run(self, arrays: Mapping[str, Array]) -> dict[str, Array]:
            time.now += 0.01
            return super().run(arrays)

    options = RunOptions(engine=EngineOptions(workers=2), warmup=False)
    runner = Runner(artifact, options, engine=lambda artifact, _: {one: Ten(one) for one in artifact.manifest.ladder})
    costs = runner.measure(0.4, clock=time)
    assert time.now == pytest.approx(0.4, abs=0.05)
    assert len(costs.seconds) == 8
    assert len(costs.alone) == 4


class Turns(Slow):
    """A session that notes when it is asked."""

    asked: list[str]
    name: str

    def run(self, arrays: Mapping[str, Array]) -> dict[str, Array]:
        self.asked.append(self.name)
        return super().run(arrays)


def systems(time: Time, asked: list[str], ladder: Ladder = LADDER) -> dict[str, dict[Bucket, FakeSession]]:
    made = {}
    for name, cost in (("one", 0.001), ("two", 0.0008)):
        kind = type("Kind", (Turns,), {"time": time, "asked": asked, "name": name, "per_cell_s": cost, "first_s": 2.0})
        made[name] = {bucket: kind(bucket) for bucket in ladder}
    return made


def test_systems_are_compared_in_turns_and_first_runs_do_not_count() -> None:
    time, asked = Time(), []
    ladder = make_ladder([8], batch_sizes=[1])
    found = compare(systems(time, asked, ladder), nothing, budget_s=1000, clock=time)
    assert found == {"one": {SMALL: pytest.approx(0.008)}, "two": {SMALL: pytest.approx(0.0064)}}
    pairs = [tuple(asked[place : place + 2]) for place in range(0, len(asked), 2)]
    assert pairs == ([("one", "two"), ("two", "one")] * (TURNS // 2 + 1))[: TURNS + 1]


@settings(deadline=None)
@given(budget_s=st.floats(0, 40))
def test_what_is_compared_is_compared_by_every_system_and_within_the_budget_but_for_the_smallest_and_one_more(
    budget_s: float,
) -> None:
    time = Time()
    found = compare(systems(time, []), nothing, budget_s=budget_s, clock=time)
    assert found["one"].keys() == found["two"].keys()
    assert SMALL in found["one"]
    one_turn = 2 * 2.0 + 2 * 2 * 0.0018 * LARGE.cells
    assert time.now <= budget_s + 2 * one_turn


def test_what_is_told_of_single_requests_is_of_this_ladder() -> None:
    """The cache has costs of other ladders too."""
    others = make_ladder([99], batch_sizes=[1]).buckets
    costs = Costs(seconds={SMALL: 0.005, others[0]: 0.01}, alone={SMALL: 0.005, others[0]: 0.02})
    told = describe_costs(costs, make_ladder([8], batch_sizes=[1]))
    assert "A request of one row runs on every core, but for 1 of 1 buckets." in told
    assert "99" not in told


# predicting


@settings(deadline=None)
@given(
    factors=st.tuples(st.floats(0, 1e-3), st.floats(1e-6, 1e-3), st.floats(0, 1e-6)),
    left_out=st.sampled_from(list(make_ladder([8, 16, 32, 64], batch_sizes=[1, 4, 8]))),
)
def test_a_cost_that_follows_the_formula_is_predicted(factors: tuple[float, float, float], left_out: Bucket) -> None:
    def true(bucket: Bucket) -> float:
        return factors[0] + factors[1] * bucket.cells + factors[2] * bucket.cells * bucket.length

    ladder = make_ladder([8, 16, 32, 64], batch_sizes=[1, 4, 8])
    costs = Costs(seconds={bucket: true(bucket) for bucket in ladder if bucket != left_out})
    assert costs(left_out) == pytest.approx(true(left_out), rel=0.01)


def test_where_caches_end_the_neighbours_of_the_same_batch_size_tell() -> None:
    """Eight rows at once take half as much again from 64 tokens on; those of 32 and 128 alone were measured."""

    def true(bucket: Bucket) -> float:
        return bucket.cells * 1e-4 * (1.5 if bucket.batch_size == 8 and bucket.length >= 64 else 1.0)

    ladder = make_ladder([8, 16, 32, 64, 128, 256], batch_sizes=[1, 8])
    costs = Costs(seconds={bucket: true(bucket) for bucket in ladder if bucket.length not in (64, 256)})
    for bucket in ladder:
        if bucket.length == 64 and bucket.batch_size == 8:
            assert true(bucket) / 1.4 < costs(bucket) < true(bucket), "halfway"
        else:
            assert costs(bucket) == pytest.approx(true(bucket), rel=0.2), "beyond what was measured it is a guess"
    one, eight = (Bucket(batch_size=size, extent=(256,)) for size in (1, 8))
    assert costs(eight) > 8 * costs(one)


@settings(deadline=None)
@given(
    st.lists(st.integers(1, 512), min_size=1, max_size=80, unique=True),
    st.lists(st.integers(1, 32), min_size=1, max_size=3, unique=True),
)
def test_of_a_long_ladder_some_lengths_from_the_shortest_to_the_longest_are_measured(
    lengths: list[int], sizes: list[int]
) -> None:
    ladder = make_ladder(lengths, batch_sizes=sizes)
    chosen = spread(ladder)
    assert chosen == sorted(set(chosen), key=chosen.index)
    assert [bucket.cells for bucket in chosen] == sorted(bucket.cells for bucket in chosen)
    for size in sizes:
        same = [bucket.length for bucket in chosen if bucket.batch_size == size]
        assert {min(lengths), max(lengths)} <= set(same)
        assert len(same) <= LENGTHS
        if len(lengths) <= LENGTHS:
            assert sorted(same) == sorted(lengths)


@settings(deadline=None)
@given(st.dictionaries(st.sampled_from(list(LADDER)), st.floats(1e-5, 10), max_size=6))
def test_no_bucket_costs_less_than_one_it_could_stand_in_for(seconds: dict[Bucket, float]) -> None:
    found = Costs(seconds=seconds).of(LADDER)
    assert list(found) == list(LADDER)
    for one in LADDER:
        assert found[one] > 0
        for other in LADDER:
            if one.batch_size <= other.batch_size and one.length <= other.length:
                assert found[one] <= found[other]


def test_where_nothing_was_measured_cells_are_the_cost() -> None:
    assert Costs(seconds={}).of(LADDER) == {bucket: cells_cost(bucket) for bucket in LADDER}
    assert not Costs(seconds={}).tell(LADDER)


@pytest.mark.parametrize("seconds", [0.0, -1.0, float("nan"), float("inf")])
def test_a_cost_that_is_none_is_refused(seconds: float) -> None:
    with pytest.raises(InputError, match="costs must be positive numbers of seconds"):
        Costs(seconds={SMALL: seconds})


# keeping


def test_costs_are_kept_beside_those_of_other_ladders(tmp_path: Path) -> None:
    path = tmp_path / "machine" / "costs.json"
    assert read_costs(path) == Costs(seconds={})
    write_costs(path, Costs(seconds={SMALL: 0.5, LARGE: 0.75}))
    write_costs(path, Costs(seconds={LARGE: 1.5}, alone={SMALL: 0.25}, at_once=False))
    assert read_costs(path) == Costs(seconds={SMALL: 0.5, LARGE: 1.5}, alone={SMALL: 0.25}, at_once=False)
    assert [entry.name for entry in path.parent.iterdir()] == ["costs.json"]


@pytest.mark.parametrize(
    "text", ["", "[]", "{", '{"seconds": 3}', '{"seconds": {"b1_s8": -1.0, "x": 1.0, "b0_s8": 1.0, "b1_s8x8": 1.0}}']
)
def test_costs_that_were_damaged_are_measured_again(tmp_path: Path, text: str) -> None:
    (tmp_path / "costs.json").write_text(text, encoding="utf-8")
    assert read_costs(tmp_path / "costs.json") == Costs(seconds={})


# using


@pytest.fixture
def make_runner(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("HF_BUCKET_CACHE", str(tmp_path / "cache"))
    artifact = fake_artifact(tmp_path / "fake", make_ladder([8, 16], batch_sizes=[1, 4]))

    def make(measure_s: float, run_s: float = 0.01) -> Runner:
        """A runner on which every run takes the same time, whatever the shape."""
        same = dict.fromkeys(artifact.manifest.ladder, run_s)
        monkeypatch.setattr("hf_bucket.engines.measure", lambda sessions, batches, **options: same)
        options = RunOptions(engine=EngineOptions(workers=1), measure_s=measure_s)
        return Runner(artifact, options, engine=fake_engine)

    return make


def batches(runner: Runner) -> dict[str, int]:
    return {name: figures["batches"] for name, figures in runner.stats()["buckets"].items() if figures["batches"]}


def test_measured_costs_decide_which_rows_share_a_batch(make_runner) -> None:
    texts = ["w1", text_of(10), "w2", text_of(12)]
    plain, measured = make_runner(0.0), make_runner(10.0)
    found = [row["logits"].tolist() for row in measured(texts)]
    assert found == [row["logits"].tolist() for row in plain(texts)]
    assert batches(plain) == {"b4_s8": 1, "b1_s16": 2}
    assert batches(measured) == {"b4_s16": 1}, "every run costs the same, so one is best"


def test_runs_too_short_to_tell_apart_leave_every_row_in_its_smallest_bucket(make_runner) -> None:
    runner = make_runner(10.0, run_s=0.0001)
    runner(["w1", text_of(10), "w2", text_of(12)])
    assert batches(runner) == {"b4_s8": 1, "b1_s16": 2}


def test_a_machine_measures_a_model_once(make_runner) -> None:
    make_runner(10.0)
    again = make_runner(10.0, run_s=5.0)
    assert again.measure(1.0, again=False)(SMALL) == 0.01
    assert again.measure(1.0)(SMALL) == 5.0


def test_buckets_of_another_ladder_are_measured_when_it_is_loaded_and_those_there_was_no_time_for_are_not_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_BUCKET_CACHE", str(tmp_path / "cache"))
    time, asked = Time(), []

    def load(*lengths: int) -> Runner:
        artifact = fake_artifact(tmp_path / "fake", make_ladder(lengths, batch_sizes=[1, 4]))

        class Noted(Slow):
            def run(self, arrays: Mapping[str, Array]) -> dict[str, Array]:
                asked.append(self.bucket.name)
                return super().run(arrays)

        kind = type("Kind", (Noted,), {"time": time, "per_cell_s": 0.001})
        options = RunOptions(engine=EngineOptions(workers=1), warmup=False)
        return Runner(
            artifact, options, engine=lambda artifact, _: {one: kind(one) for one in artifact.manifest.ladder}
        )

    first = load(8, 16).measure(1.0, again=False, clock=time)
    assert {bucket.name for bucket in first.seconds} == {"b1_s8", "b4_s8", "b1_s16", "b4_s16"}
    asked.clear()
    costs = load(8, 32).measure(0.02, again=False, clock=time)
    assert set(asked) == {"b1_s32"}, "those of 8 tokens are known, and for b4_s32 there is no time"
    assert costs.seconds.keys() == {*first.seconds, *make_ladder([32], batch_sizes=[1]).buckets}
    asked.clear()
    assert load(8, 32).measure(1.0, again=False, clock=time) == costs
    assert asked == [], "once for a ladder"
    assert load(16, 32).measure(10.0, again=False, clock=time).seconds.keys() == {
        *first.seconds,
        *make_ladder([32], batch_sizes=[1, 4]).buckets,
    }
    assert set(asked) == {"b4_s32"}, "another ladder has the time"
    asked.clear()
    assert load(8, 32).measure(10.0, clock=time).seconds.keys() == set(make_ladder([8, 32], batch_sizes=[1, 4]))
    assert set(asked) == {"b1_s8", "b4_s8", "b1_s32", "b4_s32"}, "all of them again"


def test_what_costs_tell_is_of_a_ladder_and_not_of_all_there_are() -> None:
    costs = Costs(seconds={SMALL: 0.0001, LARGE: 0.5})
    assert not costs.tell(LADDER)
    assert costs.tell(Ladder((LARGE,)))


def test_costs_survive_pickling() -> None:
    costs = Costs(seconds={SMALL: 0.5}).of(LADDER).__getitem__
    again = pickle.loads(pickle.dumps(costs))
    assert [again(bucket) for bucket in LADDER] == [costs(bucket) for bucket in LADDER]


@pytest.mark.parametrize("measure_s", [-1, float("nan"), float("inf"), "1"])
def test_a_budget_that_is_none_is_refused(measure_s: object) -> None:
    with pytest.raises(InputError, match="measure_s must be a number of seconds of at least 0"):
        RunOptions(measure_s=measure_s)  # type: ignore[arg-type]


def test_numbers_of_another_kind_are_left_out() -> None:
    assert Costs.from_json({"seconds": {"b1_s8": np.nan, "b1_s16": 1}}) == Costs(seconds={})
