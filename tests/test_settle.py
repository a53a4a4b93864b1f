"""``"auto"``: the mode and the provider that fit and are clearly faster, measured once per machine."""

from __future__ import annotations

import json
import multiprocessing
import os
import pickle
import threading
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from conftest import fake_artifact, text_of
from hypothesis import assume, given, settings
from hypothesis import strategies as st

import hf_bucket
from hf_bucket import preflight, providers, session_ort, settle
from hf_bucket.artifact import WEIGHTS, Artifact
from hf_bucket.batch import Array
from hf_bucket.cache import cache_root
from hf_bucket.cli import main
from hf_bucket.compile import CompileOptions, compile_model
from hf_bucket.costs import Costs
from hf_bucket.describe import describe_choice, describe_providers
from hf_bucket.engines import costs_path
from hf_bucket.errors import ArtifactError, BucketWarning, ProviderError
from hf_bucket.ladder import Bucket, Ladder, make_ladder
from hf_bucket.manifest import FileRecord
from hf_bucket.memory import Footprint
from hf_bucket.preflight import Trial
from hf_bucket.providers import Comparison, after_fork, best_provider, compare_provider
from hf_bucket.runner import Runner, RunOptions
from hf_bucket.session import FakeSession
from hf_bucket.session_ort import CPU, OPENVINO, EngineOptions, versioned
from hf_bucket.settle import Choice, Settled, choose_mode
from hf_bucket.source import Source

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")

AUTO = EngineOptions(mode="auto", workers=1, threads=1)
LADDER = make_ladder([8, 16, 32, 64], batch_sizes=[1, 4])
TEXTS = [text_of(length) for length in (1, 5, 13, 2)]


class Bench:
    """An engine on a clock of its own: a run in static mode takes ``ratio`` of what it does in shared mode."""

    def __init__(self, ratio: float, first_s: float = 0.0) -> None:
        self.now, self.ratio, self.first_s = 0.0, ratio, first_s
        self.opened: list[tuple[str, int]] = []
        self.closed = 0
        self.order: list[str] = []
        self.lock = threading.Lock()

    def clock(self) -> float:
        return self.now

    def luck(self, factor: float, run: int) -> float:
        return 1.0

    def __call__(self, artifact: Artifact, options: EngineOptions) -> dict[Bucket, FakeSession]:
        self.opened.append((options.mode, len(artifact.manifest.ladder)))
        return self.sessions(artifact.manifest.ladder, options.mode)

    def sessions(self, buckets: object, mode: str) -> dict[Bucket, FakeSession]:
        return self.timed(buckets, self.ratio if mode == "static" else 1.0, mode)

    def timed(self, buckets: object, factor: float, name: str = "") -> dict[Bucket, FakeSession]:
        bench = self

        class Timed(FakeSession):
            runs = 0

            def run(self, arrays: Mapping[str, Array]) -> dict[str, Array]:
                cost = self.bucket.cells * 0.001 * factor * bench.luck(factor, self.runs)
                with bench.lock:  # copies of a batch run at once
                    bench.now += cost if self.runs else cost + bench.first_s
                    bench.order.append(name)
                    self.runs += 1
                return super().run(arrays) if arrays else {}

            def close(self) -> None:
                bench.closed += 1

        return {bucket: Timed(bucket) for bucket in buckets}  # type: ignore[attr-defined]


@pytest.fixture
def artifact(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Artifact:
    monkeypatch.setenv("HF_BUCKET_CACHE", str(tmp_path / "cache"))
    made = fake_artifact(tmp_path / "fake", LADDER)
    return replace(made, manifest=replace(made.manifest, memory={bucket.name: 1000 for bucket in LADDER}))


def chosen(artifact: Artifact, bench: Bench, **options: object) -> Choice:
    return choose_mode(artifact, AUTO, trial(bench, **options))


def trial(bench: Bench, **options: object) -> Trial:
    given: dict = {"budget_s": 100.0, "available": None, "engine": bench, "clock": bench.clock, **options}
    return Trial(**given)


# choosing


def test_where_a_provider_has_no_static_mode_auto_is_shared_and_says_why(artifact: Artifact) -> None:
    bench = Bench(0.5)

    def shared_only(artifact: Artifact, options: EngineOptions) -> dict[Bucket, FakeSession]:
        if options.mode == "static":
            raise ProviderError("it cannot be recorded")
        return bench(artifact, options)

    for _ in range(2):  # nothing is kept: another version may run it
        with pytest.warns(BucketWarning, match=r'^mode="auto" is shared: it cannot be recorded$'):
            assert chosen(artifact, bench, engine=shared_only).mode == "shared"
    assert bench.opened == [("shared", 3)] * 2
    assert bench.closed == 6
    assert chosen(artifact, bench).mode == "static"


@settings(deadline=None)
@given(
    percents=st.lists(st.integers(50, 150), min_size=1, max_size=3),
    needs=st.integers(1, 100),
    there=st.none() | st.integers(1, 100),
)
def test_static_is_chosen_only_where_it_fits_and_saves_three_percent(
    percents: list[int], needs: int, there: int | None
) -> None:
    assume(len(percents) == 1 or sum(percents) != 97 * len(percents))  # fractions of the margin itself are rounded
    seconds = {f"b1_s{number}": (100.0, float(percent)) for number, percent in enumerate(percents)}
    choice = Choice(seconds=seconds, static_bytes=needs, available=there)
    fits = there is None or needs <= there
    assert choice.mode == ("static" if fits and sum(percents) <= 97 * len(percents) else "shared")


@pytest.mark.parametrize(("ratio", "mode"), [(0.5, "static"), (0.96, "static"), (0.98, "shared"), (1.5, "shared")])
def test_the_faster_mode_is_chosen_from_a_few_buckets(artifact: Artifact, ratio: float, mode: str) -> None:
    bench = Bench(ratio, first_s=5.0)
    choice = chosen(artifact, bench)
    assert choice.mode == mode
    assert choice.ratio == pytest.approx(ratio)
    assert sorted(choice.seconds) == ["b1_s8", "b4_s16", "b4_s64"], "the smallest, the largest, and one between"
    assert bench.opened == [("shared", 3), ("static", 3)]
    assert bench.closed == 6


def test_static_is_not_even_measured_where_it_does_not_fit(artifact: Artifact) -> None:
    bench = Bench(0.5)
    choice = chosen(artifact, bench, available=1)
    assert (choice.mode, choice.fits, bench.opened) == ("shared", False, [])


def test_without_a_budget_nothing_is_measured_and_shared_is_taken(artifact: Artifact) -> None:
    bench = Bench(0.5)
    assert (chosen(artifact, bench, budget_s=0.0).mode, bench.opened) == ("shared", [])


# providers


Providers = tuple[str, str]
ON_CPU = (CPU, CPU)
BOTH = (OPENVINO, OPENVINO)


class Rival(Bench):
    """Engines by provider: a run of another one takes ``ratio`` of what it does on the CPU provider, and ``one`` of it
    where the run has every core.
    """

    def __init__(self, ratio: float, one: float = 1.0, **options: float) -> None:
        super().__init__(ratio, **options)
        self.one, self.workers = one, list[int]()

    def __call__(self, artifact: Artifact, options: EngineOptions) -> dict[Bucket, FakeSession]:
        self.workers.append(options.workers)
        self.opened.append((options.provider, len(artifact.manifest.ladder)))
        factor = 1.0 if options.provider == CPU else self.ratio if options.threads else self.one
        return self.timed(artifact.manifest.ladder, factor)


def provided(artifact: Artifact, bench: Bench, asked: EngineOptions | None = None, **options: object) -> Providers:
    """Return the providers of a request of one row, and of many batches."""
    asked = asked or EngineOptions(workers=2)
    settled = best_provider(artifact, asked, compare_provider(artifact, asked, trial(bench, **options)))
    assert settled.provider_of_many != settled.provider, "one for both has one name"
    return settled.provider, settled.for_many_batches().provider


@pytest.mark.parametrize(
    ("many", "one", "expected"),
    [
        pytest.param(0.5, 0.5, BOTH, id="twice as fast"),
        pytest.param(0.94, 1.01, (CPU, OPENVINO), id="faster for many"),
        pytest.param(0.5, 1.5, (CPU, OPENVINO), id="faster for many, slower for one"),
        pytest.param(1.01, 0.94, (OPENVINO, CPU), id="faster for one"),
        pytest.param(1.09, 0.94, (OPENVINO, CPU), id="faster for one, slower for many"),
        pytest.param(1.2, 0.5, ON_CPU, id="slower for one batch that is as large as those of many"),
        pytest.param(0.96, 0.96, ON_CPU, id="not worth it"),
        pytest.param(1.5, 1.5, ON_CPU, id="slower"),
    ],
)
def test_another_provider_is_taken_for_what_it_is_faster_at(
    artifact: Artifact, monkeypatch: pytest.MonkeyPatch, many: float, one: float, expected: Providers
) -> None:
    monkeypatch.setattr(providers, "auto_provider", lambda: OPENVINO)
    bench = Rival(many, one, first_s=5.0)
    assert provided(artifact, bench) == expected
    assert bench.opened == [(CPU, 6)] * 2 + [(OPENVINO, 6)] * 2, "three lengths, two batch sizes, both uses"
    assert bench.workers == [2, 1] * 2, "a request of one row has every core, as in use"
    assert bench.closed == 24
    found = compare_provider(artifact, EngineOptions(workers=2), trial(Rival(2.0)))
    assert found == Comparison(provider=OPENVINO, many=pytest.approx(many), one=pytest.approx(one))
    static = EngineOptions(workers=2, mode="static")
    assert compare_provider(artifact, static, trial(Rival(2.0))) is None, "it decides nothing there"
    assert provided(artifact, Rival(1 / many, 1 / one)) == expected, "kept"
    assert provided(artifact, Rival(0.5, 0.5), again=True) == BOTH


@pytest.mark.parametrize(
    ("many", "one", "expected"),
    [
        pytest.param(0.94, 1.01, BOTH, id="faster for many"),
        pytest.param(1.01, 0.94, BOTH, id="faster for one"),
        pytest.param(1.1, 0.5, ON_CPU, id="slower for many"),
        pytest.param(0.5, 1.1, ON_CPU, id="slower for one"),
        pytest.param(0.96, 0.96, ON_CPU, id="not worth it"),
    ],
)
@pytest.mark.parametrize("why", ["one session", "mode", "int8", "float16", "a graph made elsewhere"])
def test_where_uses_cannot_part_a_provider_that_is_slower_for_either_is_not_taken(
    artifact: Artifact, monkeypatch: pytest.MonkeyPatch, why: str, many: float, one: float, expected: Providers
) -> None:
    """One worker has one session; the mode is one for both; two engines can round the same text to different int8."""
    monkeypatch.setattr(providers, "auto_provider", lambda: OPENVINO)
    found = Comparison(provider=OPENVINO, many=many, one=one)
    monkeypatch.setattr(providers, "_compared", lambda *_: found)
    asked = EngineOptions(workers=1 if why == "one session" else 2, mode="auto" if why == "mode" else "shared")
    changes = {
        "int8": {"dtype": "int8"},
        "float16": {"dtype": "float16"},
        "a graph made elsewhere": {"made_by": "onnx"},
    }
    if why in changes:
        source = {**artifact.manifest.source, **changes[why]}
        artifact = replace(artifact, manifest=replace(artifact.manifest, source=source))
    assert provided(artifact, Rival(1.0), asked) == expected


@pytest.mark.parametrize(
    ("many", "one", "expected"),
    [
        pytest.param(0.5, 0.5, ("other", "other"), id="faster"),
        pytest.param(1.05, 0.5, ("other", CPU), id="faster for one"),
        pytest.param(0.5, 1.05, ON_CPU, id="faster for many, which it does not run at once"),
    ],
)
def test_a_provider_that_runs_one_batch_after_another_can_have_the_requests_of_one_row(
    artifact: Artifact, monkeypatch: pytest.MonkeyPatch, many: float, one: float, expected: Providers
) -> None:
    monkeypatch.setattr(session_ort, "installed_providers", lambda: [CPU, "other"])
    monkeypatch.setattr(session_ort, "usable_cores", lambda: 2)
    monkeypatch.setattr(providers, "auto_provider", lambda: "other")
    found = Comparison(provider="other", many=many, one=one)
    monkeypatch.setattr(providers, "_compared", lambda *_: found)
    assert provided(artifact, Rival(1.0), EngineOptions()) == expected


def test_a_provider_is_only_measured_where_the_sessions_that_measuring_opens_fit(
    artifact: Artifact, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Those of both uses: it packs the weights for each."""
    monkeypatch.setattr(providers, "auto_provider", lambda: OPENVINO)
    files = {**artifact.manifest.files, WEIGHTS: FileRecord(sha256="0" * 64, size=10**6)}
    artifact = replace(artifact, manifest=replace(artifact.manifest, files=files))
    both = preflight.takes(artifact, EngineOptions(provider=OPENVINO, workers=2)).total
    assert both > preflight.takes(artifact, EngineOptions(provider=CPU, workers=2)).total
    bench = Rival(1.0, 0.5)
    assert provided(artifact, bench, available=both - 1) == ON_CPU
    found = compare_provider(artifact, EngineOptions(workers=2), trial(bench, available=both - 1))
    assert found is not None
    assert found.why.startswith("there is no memory for the sessions of both uses")
    assert bench.opened == []
    assert provided(artifact, bench, available=both) == (OPENVINO, CPU)


@pytest.mark.parametrize("other", [{"threads": 1}, {"workers": 3}, {"cores": 4}], ids=["threads", "workers", "cores"])
def test_figures_are_those_of_as_many_threads_and_workers(
    artifact: Artifact, monkeypatch: pytest.MonkeyPatch, other: dict[str, int]
) -> None:
    monkeypatch.setattr(providers, "auto_provider", lambda: OPENVINO)
    cores = [2]
    monkeypatch.setattr(session_ort, "usable_cores", lambda: cores[0])
    first = EngineOptions(workers=2)
    assert provided(artifact, Rival(0.5, 0.5), first) == BOTH
    paths = {costs_path(artifact, first)}
    cores[0] = other.get("cores", 2)
    second = replace(first, **{name: value for name, value in other.items() if name != "cores"})
    assert provided(artifact, Rival(2.0, 2.0), second) == ON_CPU
    assert costs_path(artifact, second) not in paths


def test_a_provider_that_runs_one_batch_after_another_is_compared_batch_by_batch(
    artifact: Artifact, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two at once take twice the time of one on the clock here, so that a single one has to take half."""
    monkeypatch.setattr(session_ort, "installed_providers", lambda: [CPU, "other"])
    monkeypatch.setattr(session_ort, "usable_cores", lambda: 2)
    monkeypatch.setattr(providers, "auto_provider", lambda: "other")

    class OneByOne(Rival):
        def __call__(self, artifact: Artifact, options: EngineOptions) -> dict[Bucket, FakeSession]:
            self.workers.append(options.workers)
            return self.timed(artifact.manifest.ladder, 1.0 if options.provider == CPU else 0.5)

    bench = OneByOne(0.5)
    assert provided(artifact, bench, EngineOptions()) == ("other", "other")
    assert bench.workers == [2, 1, 1], "one session serves both of its uses"
    found = compare_provider(artifact, EngineOptions(), trial(Rival(2.0)))
    assert found == Comparison(provider="other", many=pytest.approx(0.5), one=pytest.approx(0.5))


@pytest.mark.parametrize(("lucky", "expected"), [(2, ON_CPU), (3, (OPENVINO, CPU))])
def test_five_runs_decide_however_little_time_there_is(
    artifact: Artifact, monkeypatch: pytest.MonkeyPatch, lucky: int, expected: Providers
) -> None:
    """What is chosen is kept: a busy moment, in which a provider seems faster in some runs, must not choose."""
    monkeypatch.setattr(providers, "auto_provider", lambda: OPENVINO)

    class Lucky(Rival):
        def luck(self, factor: float, run: int) -> float:
            return 0.25 if factor == self.one and 1 <= run <= lucky else 1.0  # the first prepares, and does not count

    assert provided(artifact, Lucky(1.0, one=2.0), budget_s=1e-9) == expected


def test_ratios_that_were_damaged_are_measured_again(artifact: Artifact, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(providers, "auto_provider", lambda: OPENVINO)
    assert provided(artifact, Rival(0.5, 0.5)) == BOTH
    (path,) = cache_root().rglob("*-ratios-*.json")
    for text in (
        "",
        "[]",
        '{"many": 0.5}',
        '{"many": 1, "one": 1}',
        '{"many": -1.0, "one": 1.0}',
        '{"many": 0.5, "one": NaN}',
        '{"why": 1}',
    ):
        path.write_text(text)
        bench = Rival(2.0)
        assert provided(artifact, bench) == ON_CPU
        assert bench.opened


def test_another_version_of_a_provider_is_measured_for_itself(
    artifact: Artifact, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(providers, "auto_provider", lambda: OPENVINO)
    assert provided(artifact, Rival(0.5, 0.5)) == BOTH
    monkeypatch.setattr(providers, "versioned", lambda name: f"{name}-2020.1")
    assert provided(artifact, Rival(2.0, 2.0)) == ON_CPU


def test_a_provider_that_is_named_or_the_only_one_or_too_large_is_not_measured(
    artifact: Artifact, monkeypatch: pytest.MonkeyPatch
) -> None:
    bench = Rival(0.5)
    named = replace(AUTO, provider=CPU)
    assert compare_provider(artifact, named, trial(bench)) is None
    assert best_provider(artifact, named, None) == named
    monkeypatch.setattr(providers, "auto_provider", lambda: None)
    assert provided(artifact, bench) == ON_CPU
    monkeypatch.setattr(providers, "auto_provider", lambda: OPENVINO)
    static = EngineOptions(mode="static", workers=2)
    assert provided(artifact, bench, static) == ON_CPU, "it would hold the weights once for every bucket"
    assert provided(artifact, bench, available=1) == ON_CPU
    assert provided(artifact, bench, budget_s=0.0) == ON_CPU
    assert bench.opened == []


def test_runs_too_short_to_tell_providers_apart_stay_on_the_cpu_provider(
    artifact: Artifact, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(providers, "auto_provider", lambda: OPENVINO)
    monkeypatch.setattr(providers, "_WORTH_S", 1.0)
    bench = Rival(0.5)
    assert provided(artifact, bench) == ON_CPU
    assert bench.opened == [(CPU, 6)] * 2
    assert provided(artifact, bench) == ON_CPU
    assert bench.opened == [(CPU, 6)] * 2, "kept"


def test_a_provider_that_cannot_run_the_model_is_left_out_with_a_warning(
    artifact: Artifact, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(providers, "auto_provider", lambda: OPENVINO)

    class Half(Rival):
        def __call__(self, artifact: Artifact, options: EngineOptions) -> dict[Bucket, FakeSession]:
            if options.provider == OPENVINO and options.workers == 1:  # those of many open
                raise ArtifactError("no such operator")
            return super().__call__(artifact, options)

    before, bench = set(threading.enumerate()), Half(0.5)
    with pytest.warns(BucketWarning, match='provider="auto" leaves out openvino: no such operator'):
        assert provided(artifact, bench) == ON_CPU
    opened = len(bench.opened)
    assert (opened, bench.closed) == (3, 18)
    assert provided(artifact, bench) == ON_CPU
    assert len(bench.opened) == opened, "kept, that it cannot run the model; and no second warning"
    assert set(threading.enumerate()) <= before


def test_a_forked_child_of_a_model_that_auto_put_on_openvino_says_that_it_runs_elsewhere() -> None:
    settled = EngineOptions(provider=OPENVINO)
    with pytest.warns(BucketWarning, match="OpenVINO's threads do not survive a fork; start processes with"):
        assert after_fork(EngineOptions(), settled).provider == CPU
    assert after_fork(settled, settled) == settled, "it was asked for by name"
    assert after_fork(EngineOptions(), EngineOptions(provider=CPU)).provider == CPU
    for one, many in ((OPENVINO, CPU), (CPU, OPENVINO)):
        parted = EngineOptions(provider=one, provider_of_many=many)
        with pytest.warns(BucketWarning, match="OpenVINO's threads do not survive a fork"):
            assert after_fork(EngineOptions(), parted) == EngineOptions(provider=CPU)


def test_what_is_settled_leaves_nothing_open(artifact: Artifact, monkeypatch: pytest.MonkeyPatch) -> None:
    compared = Comparison(provider=OPENVINO, many=0.5, one=0.5)
    monkeypatch.setattr(settle, "compare_provider", lambda *_: compared)
    bench = Bench(0.5)
    found = settle.settle(artifact, AUTO, trial(bench, batches=lambda bucket: {}))
    assert (found.engine.provider, found.engine.mode) == (OPENVINO, "static")
    assert found.provider == compared
    assert found.mode is not None
    assert found.mode.seconds
    assert bench.closed == 6


def test_where_only_static_mode_fits_it_is_taken_and_that_is_why(
    artifact: Artifact, monkeypatch: pytest.MonkeyPatch
) -> None:
    needs = {"shared": 1000, "static": 500}
    monkeypatch.setattr(
        settle, "takes", lambda artifact, options: Footprint(weights=needs[options.mode], sessions=0, activations={})
    )
    bench = Bench(1.0)
    found = settle.settle(artifact, replace(AUTO, provider=CPU), trial(bench, available=999))
    assert found.engine.mode == "static"
    assert found.mode == Choice(seconds={}, static_bytes=500, available=999, shared_fits=False)
    assert bench.opened == [], "there is nothing to choose"


def test_open_questions_share_the_budget(artifact: Artifact, monkeypatch: pytest.MonkeyPatch) -> None:
    spent: list[float] = []

    def provider(artifact: Artifact, options: EngineOptions, one: Trial) -> None:
        spent.append(one.budget_s)

    def mode(artifact: Artifact, options: EngineOptions, one: Trial) -> Choice:
        spent.append(one.budget_s)
        return Choice(seconds={}, static_bytes=1, available=None)

    monkeypatch.setattr(settle, "compare_provider", provider)
    monkeypatch.setattr(settle, "choose_mode", mode)
    settle.settle(artifact, AUTO, trial(Bench(1.0), budget_s=3.0))
    assert spent == [1.5, 1.5]


# keeping


def test_a_machine_compares_a_ladder_once(artifact: Artifact) -> None:
    assert chosen(artifact, Bench(0.5)).mode == "static"
    again = Bench(2.0)
    assert (chosen(artifact, again).mode, again.opened) == ("static", [])
    assert chosen(artifact, again, budget_s=0.0).mode == "static"
    assert chosen(artifact, again, available=1).mode == "shared", "memory is looked at every time"
    assert chosen(artifact, again, again=True).mode == "shared"
    assert chosen(artifact, Bench(0.5)).mode == "shared"


def test_another_ladder_is_compared_for_itself(artifact: Artifact) -> None:
    chosen(artifact, Bench(0.5))
    ladder = make_ladder([8, 16], batch_sizes=[1])
    other, bench = replace(artifact, manifest=replace(artifact.manifest, ladder=ladder)), Bench(2.0)
    assert chosen(other, bench).mode == "shared"
    assert bench.opened


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[]",
        '{"seconds": 3}',
        '{"seconds": {"b1_s8": 1.0}}',
        '{"seconds": {"b1_s8": {"shared": 1.0}}}',
        '{"seconds": {"b1_s8": {"shared": 0.0, "static": 1.0}}}',
        '{"seconds": {"b1_s8": {"shared": NaN, "static": 1.0}}}',
        '{"seconds": {"b1_s8": {"shared": "1", "static": 1.0}}}',
    ],
)
def test_figures_that_were_damaged_are_measured_again(artifact: Artifact, tmp_path: Path, text: str) -> None:
    chosen(artifact, Bench(0.5))
    (path,) = (tmp_path / "cache").rglob("*-modes-*.json")
    path.write_text(text, encoding="utf-8")
    bench = Bench(2.0)
    assert chosen(artifact, bench).mode == "shared"
    assert bench.opened


# using


@pytest.mark.parametrize(("ratio", "mode"), [(0.5, "static"), (2.0, "shared")])
def test_a_runner_opens_the_mode_that_was_chosen(
    artifact: Artifact, monkeypatch: pytest.MonkeyPatch, ratio: float, mode: str
) -> None:
    bench = Bench(ratio)
    figures = {bucket.name: (1.0, ratio) for bucket in LADDER}
    monkeypatch.setattr(settle, "_compare_modes", lambda *arguments, **options: figures)
    runner = Runner(artifact, RunOptions(engine=AUTO, measure_s=1e-9), engine=bench)
    assert bench.opened[-1] == (mode, len(LADDER))
    assert runner.options.engine.mode == "auto", "what was asked for, so that another machine chooses for itself"
    assert len(runner(["w1"])) == 1


@pytest.mark.parametrize(("one", "many"), [(OPENVINO, CPU), (CPU, OPENVINO), (CPU, CPU)])
def test_a_request_of_one_row_and_one_of_many_run_on_the_providers_chosen_for_them(
    artifact: Artifact, monkeypatch: pytest.MonkeyPatch, one: str, many: str
) -> None:
    monkeypatch.setattr(providers, "auto_provider", lambda: OPENVINO)
    ratios = {"many": 0.5 if many == OPENVINO else 1.05, "one": 0.5 if one == OPENVINO else 1.05}
    monkeypatch.setattr(providers, "_compared", lambda *_: Comparison(provider=OPENVINO, **ratios))
    opened: list[tuple[str, int]] = []
    ran: list[str] = []

    def engine(artifact: Artifact, options: EngineOptions) -> dict[Bucket, FakeSession]:
        opened.append((options.provider, options.workers))

        class Named(FakeSession):
            def run(self, arrays: Mapping[str, Array]) -> dict[str, Array]:
                ran.append(options.provider)
                return super().run(arrays)

        return {bucket: Named(bucket) for bucket in artifact.manifest.ladder}

    monkeypatch.setattr(Costs, "quick", frozenset())  # which fakes are quick is chance
    runner = Runner(artifact, RunOptions(engine=EngineOptions(workers=2), measure_s=1e-9), engine=engine)
    assert opened == [(one, 1), (many, 2)]
    ran.clear()
    runner(["w1"])
    assert ran == [one]
    ran.clear()
    runner(["w1 w2"] * 30)
    assert set(ran) == {many}
    (costs,) = [path.name for path in cache_root().rglob("*-shared-*-1x2.json") if "ratios" not in path.name]
    assert (versioned(one) in costs, versioned(many) in costs) == (True, True)
    runner.close()
    runner(["w1"])
    assert opened == [(one, 1), (many, 2), (one, 1)]


def test_a_forked_child_on_other_engines_knows_no_costs_and_runs_batches_at_once(
    artifact: Artifact, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(providers, "auto_provider", lambda: OPENVINO)
    compared = Comparison(provider=OPENVINO, many=1.05, one=0.5)
    monkeypatch.setattr(providers, "_compared", lambda *_: compared)
    bench = Rival(1.0)
    ladder = Ladder((Bucket(batch_size=4, extent=(8,)), Bucket(batch_size=1, extent=(64,))))
    artifact = replace(artifact, manifest=replace(artifact.manifest, ladder=ladder))
    runner = Runner(artifact, RunOptions(engine=EngineOptions(workers=2), measure_s=1e-9), engine=bench)
    runner._engines.use(Costs(seconds=dict(zip(ladder, (2.0, 1.0), strict=True)), at_once=False))
    runner(["w1"])
    assert {name: told["batches"] for name, told in runner.stats()["buckets"].items()} == {"b4_s8": 0, "b1_s64": 1}
    runner._engines._pid = -1  # as in a child
    before = len(bench.opened)
    with pytest.warns(BucketWarning, match="OpenVINO's threads do not survive a fork"):
        runner(["w1"])
    assert {name: told["batches"] for name, told in runner.stats()["buckets"].items()} == {"b4_s8": 1, "b1_s64": 1}
    runner(["w1 w2"] * 30)
    assert (bench.opened[before:], bench.workers[before:]) == ([(CPU, 2)] * 2, [1, 2]), "at once"


def test_a_provider_of_many_that_cannot_be_is_refused() -> None:
    for options in (
        {"provider_of_many": CPU},
        {"provider": CPU, "provider_of_many": "auto"},
        {"provider": OPENVINO, "provider_of_many": CPU, "provider_options": {"NUM_STREAMS": "1"}},
    ):
        with pytest.raises(ProviderError, match="provider_of_many needs a provider by name, and no"):
            EngineOptions(**options)  # type: ignore[arg-type]


def _answers(runner: Runner, queue: object) -> None:
    queue.put(np.stack([row["logits"] for row in runner(TEXTS)]))  # type: ignore[attr-defined]


@pytest.fixture
def compiled(tiny_bert: Path) -> Artifact:
    options = CompileOptions(buckets=[8, 16], batch_sizes=[1, 3])
    return compile_model(Source(name=str(tiny_bert)), options, report=lambda line: None)


@pytest.mark.parametrize("ratio", [0.5, 2.0], ids=["static", "shared"])
def test_the_answer_is_the_same_also_after_pickling_and_in_a_forked_child(
    compiled: Artifact, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ratio: float
) -> None:
    expected = np.stack([row["logits"] for row in hf_bucket.load(compiled.folder)(TEXTS)])
    monkeypatch.setenv("HF_BUCKET_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(settle, "_compare_modes", lambda *arguments, **options: {"b1_s8": (1.0, ratio)})
    runner = hf_bucket.load(compiled.folder, mode="auto")
    for one in (runner, pickle.loads(pickle.dumps(runner))):
        assert np.abs(np.stack([row["logits"] for row in one(TEXTS)]) - expected).max() < 1e-5
    if hasattr(os, "fork"):
        context = multiprocessing.get_context("fork")
        queue = context.SimpleQueue()
        child = context.Process(target=_answers, args=(runner, queue))
        child.start()
        assert np.abs(queue.get() - expected).max() < 1e-5
        child.join(60)
        assert child.exitcode == 0


def test_a_model_is_loaded_with_what_was_really_measured(
    compiled: Artifact, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_BUCKET_CACHE", str(tmp_path / "cache"))
    hf_bucket.load(compiled.folder, mode="auto", measure_s=0.1)
    (path,) = (tmp_path / "cache").rglob("*-modes-*.json")
    figures = json.loads(path.read_text(encoding="utf-8"))
    assert figures["mode"] in ("shared", "static")
    assert all(value > 0 for pair in figures["seconds"].values() for value in pair.values())
    monkeypatch.setattr(settle, "_compare_modes", lambda *arguments, **options: pytest.fail("measured twice"))
    hf_bucket.load(compiled.folder, mode="auto")


def test_tune_says_which_mode_and_why(
    compiled: Artifact, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd
) -> None:
    monkeypatch.setenv("HF_BUCKET_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(settle, "_compare_modes", lambda *arguments, **options: {"b1_s8": (0.004, 0.003)})
    assert main(["tune", str(compiled.folder), "--mode", "auto", "--seconds", "0.1"]) == 0
    out = capfd.readouterr().out
    assert "mode static: static takes 0.750 of shared's time, and is chosen at 0.97 or less" in out
    assert "Many batches are faster" in out
    assert main(["tune", str(compiled.folder), "--mode", "auto", "--seconds", "0.1", "--json"]) == 0
    choice = json.loads(capfd.readouterr().out)["choice"]
    assert (choice["mode"], choice["seconds"]) == ("static", {"b1_s8": {"shared": 0.004, "static": 0.003}})


def test_tune_takes_static_mode_where_it_alone_fits(
    compiled: Artifact, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd
) -> None:
    monkeypatch.setenv("HF_BUCKET_CACHE", str(tmp_path / "cache"))
    needs = {"shared": 1000, "static": 500}
    monkeypatch.setattr(
        settle, "takes", lambda artifact, options: Footprint(weights=needs[options.mode], sessions=0, activations={})
    )
    monkeypatch.setattr(preflight, "available_bytes", lambda: 999)
    assert main(["tune", str(compiled.folder), "--mode", "auto", "--seconds", "0.1", "--json"]) == 0
    told = json.loads(capfd.readouterr().out)
    assert (told["choice"]["mode"], told["choice"]["shared_fits"], told["compared"]) == ("static", False, None)
    assert list(cache_root().rglob(f"{CPU}-static-*.json")), "the costs of static mode are measured"


@pytest.mark.parametrize("named", [["--provider", CPU], ["--mode", "static"]], ids=["provider", "static"])
def test_tune_compares_no_providers_where_there_is_no_choice(
    compiled: Artifact, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd, named: list[str]
) -> None:
    monkeypatch.setenv("HF_BUCKET_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(providers, "auto_provider", lambda: OPENVINO)
    assert main(["tune", str(compiled.folder), "--seconds", "0.1", *named]) == 0
    out = capfd.readouterr().out
    assert out.startswith("provider CPUExecutionProvider: no other was measured.")
    assert "Many batches are faster" in out


def test_tune_says_which_provider_runs_what(
    compiled: Artifact, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd
) -> None:
    pytest.importorskip("openvino", reason='openvino is not installed; pip install "hf-bucket[openvino]"')
    monkeypatch.setenv("HF_BUCKET_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(session_ort, "usable_cores", lambda: 2)
    monkeypatch.setattr(providers, "auto_provider", lambda: OPENVINO)
    compared = Comparison(provider=OPENVINO, many=1.04, one=0.9)
    monkeypatch.setattr(providers, "_compared", lambda *_: compared)
    assert main(["tune", str(compiled.folder), "--seconds", "0.1"]) == 0
    assert capfd.readouterr().out.startswith(
        "provider openvino for a few rows and CPUExecutionProvider for many: "
        "openvino takes 1.040 of the CPU provider's time for many batches at once, 0.900 for one row."
    )
    assert main(["tune", str(compiled.folder), "--seconds", "0.1", "--json"]) == 0
    told = json.loads(capfd.readouterr().out)
    assert (told["provider"], told["provider_of_many"]) == (OPENVINO, CPU)
    assert told["compared"] == {"provider": OPENVINO, "many": 1.04, "one": 0.9, "why": ""}


@pytest.mark.parametrize(
    ("found", "said"),
    [
        (None, "provider CPUExecutionProvider: no other was measured."),
        (
            Comparison(provider=OPENVINO, why="it cannot run this model: no such operator"),
            "provider CPUExecutionProvider: openvino was not compared: it cannot run this model: no such operator.",
        ),
        (
            Comparison(provider=OPENVINO, why="runs of less than 5 ms are not worth it"),
            "provider CPUExecutionProvider: openvino was not compared: runs of less than 5 ms are not worth it.",
        ),
    ],
    ids=["no other", "refused", "too short"],
)
def test_it_is_said_why_providers_were_not_compared(found: Comparison | None, said: str) -> None:
    assert describe_providers(Settled(engine=EngineOptions(provider=CPU), provider=found, mode=None)) == said


@pytest.mark.parametrize(
    ("choice", "said"),
    [
        (
            Choice(seconds={}, static_bytes=2_000_000, available=1_000_000),
            "mode shared: static does not fit; static needs 2.0 MB of memory, there: 1.0 MB.",
        ),
        (
            Choice(seconds={}, static_bytes=2_000_000, available=None),
            "mode shared: nothing was measured; static needs 2.0 MB of memory, there: unknown.",
        ),
        (
            Choice(seconds={}, static_bytes=2_000_000, available=3_000_000, shared_fits=False),
            "mode static: shared does not fit; static needs 2.0 MB of memory, there: 3.0 MB.",
        ),
        (
            Choice(seconds={"b1_s8": (1.0, 1.1)}, static_bytes=1, available=2),
            "mode shared: static takes 1.100 of shared's time",
        ),
    ],
    ids=["no room", "no time", "only static", "slower"],
)
def test_a_choice_says_why(choice: Choice, said: str) -> None:
    assert said in describe_choice(choice)
