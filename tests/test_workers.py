"""Batches run at once give the results of batches run one after another, and leave no thread behind."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest
from conftest import fake_artifact, fake_engine, text_of
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_bucket.batch import Array
from hf_bucket.errors import InputError, ProviderError
from hf_bucket.ladder import Bucket, make_ladder
from hf_bucket.runner import Runner, RunOptions
from hf_bucket.session import FakeSession
from hf_bucket.session_ort import EngineOptions
from hf_bucket.workers import Workers


@settings(deadline=None, max_examples=30)
@given(st.integers(1, 4), st.lists(st.integers(), max_size=20))
def test_results_come_in_the_order_of_the_items(n: int, items: list[int]) -> None:
    before, workers = set(threading.enumerate()), Workers(n)
    assert workers.map(lambda item: item + 1, items) == [item + 1 for item in items]
    workers.close()
    assert set(threading.enumerate()) <= before


def test_items_run_at_once() -> None:
    together, workers = threading.Barrier(3, timeout=30), Workers(3)
    assert sorted(workers.map(lambda _: together.wait(), range(3))) == [0, 1, 2]
    workers.close()


def test_an_exception_ends_what_has_not_begun_and_leaves_the_pool_usable(before: set[threading.Thread]) -> None:
    workers, begun, never = Workers(2), [], threading.Event()

    def fail(item: int) -> int:
        begun.append(item)
        never.wait(0.1)  # longer than it takes to hand over all items
        raise ValueError(f"item {item}")

    with pytest.raises(ValueError, match="item"):
        workers.map(fail, range(1000))
    assert len(begun) < 1000
    assert workers.map(abs, [-1, -2]) == [1, 2]
    workers.close()
    assert set(threading.enumerate()) <= before


@pytest.fixture
def before() -> set[threading.Thread]:
    """The threads that there were before the test, those of runners that other tests left open among them."""
    return set(threading.enumerate())


@pytest.fixture
def runner(tmp_path: Path, before: set[threading.Thread]) -> Runner:
    options = RunOptions(engine=EngineOptions(workers=2))
    return Runner(fake_artifact(tmp_path, make_ladder([8, 16], batch_sizes=[1, 4])), options, engine=fake_engine)


def test_many_batches_give_the_rows_of_one_at_a_time_in_the_callers_order(
    runner: Runner, before: set[threading.Thread]
) -> None:
    texts = [text_of(length % 14) for length in range(60)]
    expected = [runner([text])[0]["logits"].tolist() for text in texts]
    assert [row["logits"].tolist() for row in runner(texts)] == expected
    assert runner.stats()["rows"] == 120
    runner.close()
    assert set(threading.enumerate()) <= before
    assert [row["logits"].tolist() for row in runner(texts)] == expected
    runner.close()


def test_a_request_of_one_batch_starts_no_thread(runner: Runner, before: set[threading.Thread]) -> None:
    runner(["w1"])
    assert set(threading.enumerate()) <= before


def test_a_row_that_fails_among_many_leaves_the_runner_usable(tmp_path: Path) -> None:
    class Bad(FakeSession):
        def run(self, arrays: dict[str, Array]) -> dict[str, Array]:  # type: ignore[override]
            outputs = super().run(arrays)
            outputs["logits"][arrays["input_ids"][:, 1] == 4] = float("nan")  # texts that begin with w0
            return outputs

    options = RunOptions(engine=EngineOptions(workers=2), warmup=False)
    artifact = fake_artifact(tmp_path, make_ladder([8, 16], batch_sizes=[1]))
    runner = Runner(artifact, options, engine=lambda artifact, options: {b: Bad(b) for b in artifact.manifest.ladder})
    with pytest.raises(InputError, match=r"input 2 got logits that are not finite from bucket b1_s8"):
        runner(["w1", "w2", "w0", "w3", "w4"])
    assert len(runner(["w1", "w2", "w3"])) == 3
    runner.close()


@pytest.mark.parametrize(
    ("options", "cores", "threads", "workers"),
    [
        pytest.param({}, 2, 1, 2, id="one thread each"),
        pytest.param({}, 1, 0, 1, id="one core: one after another"),
        pytest.param({"threads": 2}, 4, 2, 2, id="two threads each"),
        pytest.param({"threads": 8}, 4, 8, 1, id="more threads than cores"),
        pytest.param({"workers": 1}, 4, 0, 1, id="one worker uses every core"),
        pytest.param({"workers": 3}, 4, 1, 3, id="as many workers as told"),
    ],
)
def test_workers_and_threads_never_take_more_cores_than_there_are_unless_told(
    monkeypatch: pytest.MonkeyPatch, options: dict[str, int], cores: int, threads: int, workers: int
) -> None:
    monkeypatch.setattr("hf_bucket.session_ort.usable_cores", lambda: cores)
    many = EngineOptions(**options).for_many_batches()  # type: ignore[arg-type]
    assert (many.threads, many.workers) == (threads, workers)


@pytest.mark.parametrize("workers", [-1, 1.5, True, "2"])
def test_a_number_of_workers_that_is_none_is_refused(workers: object) -> None:
    with pytest.raises(ProviderError, match=r"workers must be 0 .as many as the cores allow. or a positive number"):
        EngineOptions(workers=workers)  # type: ignore[arg-type]


def test_the_dearest_batches_begin_first(tmp_path: Path) -> None:
    ran: list[Bucket] = []

    class Noting(FakeSession):
        def run(self, arrays: dict[str, Array]) -> dict[str, Array]:  # type: ignore[override]
            ran.append(self.bucket)
            return super().run(arrays)

    options = RunOptions(engine=EngineOptions(workers=1), warmup=False)
    artifact = fake_artifact(tmp_path, make_ladder([8, 16], batch_sizes=[1]))
    engine = lambda artifact, options: {b: Noting(b) for b in artifact.manifest.ladder}  # noqa: E731
    Runner(artifact, options, engine=engine)(["w1", text_of(12), "w2", text_of(13)])
    assert [bucket.length for bucket in ran] == [16, 16, 8, 8]
