"""What a GPU gets, on the processor: one thread, and buffers that never move (on a GPU: test_cuda)."""

from __future__ import annotations

import gc
import os
import signal
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
from conftest import text_of

import hf_bucket.session_cuda as room
from hf_bucket.artifact import GRAPH, Artifact
from hf_bucket.compile import CompileOptions, compile_model
from hf_bucket.errors import ProviderError
from hf_bucket.ladder import Bucket
from hf_bucket.runner import Runner
from hf_bucket.session_cuda import CudaEngine, RecordedSession
from hf_bucket.session_ort import EngineOptions, open_graph
from hf_bucket.source import Source

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")

LATE_S = 60.0
TEXTS = [text_of(length, 3 * length) for length in (1, 5, 6, 13, 14, 3, 2)]


@pytest.fixture(autouse=True)
def of_this_test_alone(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A thread that engines of other tests do not keep alive, and that ends with the test, garbage or not."""
    gpu = room._Gpu()
    monkeypatch.setattr(room, "_gpu", gpu)
    monkeypatch.setattr(Recorder, "lives", [])
    yield
    gpu.end()
    assert gpu._thread is None


@pytest.fixture(scope="module")
def compiled(tiny_bert: Path) -> Artifact:
    return compile_model(Source(name=str(tiny_bert)), CompileOptions(buckets=[8, 16], batch_sizes=[1, 3]))


class Recorder:
    """onnxruntime with a CUDA graph per number and thread: a replay reads and writes what the recorded run did.

    Like CUDA it wants to be alone while it records.
    """

    busy = threading.Lock()

    lives: ClassVar[list[threading.Thread]] = []  # threads that opened a session or let go of one

    def __init__(self, session: Any) -> None:
        self.lives.append(threading.current_thread())
        self.session = session
        self.graphs: dict[tuple[threading.Thread, str], Any] = {}

    def __del__(self) -> None:
        self.lives.append(threading.current_thread())

    def __getattr__(self, name: str) -> Any:
        return getattr(self.session, name)

    def run_with_iobinding(self, binding: Any, options: Any) -> None:
        assert self.busy.acquire(blocking=False), "another thread uses CUDA"
        try:
            key = threading.current_thread(), options.get_run_config_entry("gpu_graph_id")
            self.session.run_with_iobinding(self.graphs.setdefault(key, binding))
        finally:
            self.busy.release()

    def run(self, names: Any, arrays: Any) -> Any:
        assert self.busy.acquire(blocking=False), "another thread uses CUDA"
        try:
            return self.session.run(names, arrays)
        finally:
            self.busy.release()


def open_engine(artifact: Artifact) -> CudaEngine:
    return CudaEngine(lambda: Recorder(open_graph(artifact.path(GRAPH), EngineOptions())), "cpu")


def recorded(artifact: Artifact, options: EngineOptions | None = None) -> dict[Bucket, RecordedSession]:
    engine = open_engine(artifact)
    return {bucket: RecordedSession(bucket, engine) for bucket in artifact.manifest.ladder}


def logits(runner: Runner, texts: list[str]) -> np.ndarray:
    return np.stack([row["logits"] for row in runner(texts)])


@pytest.fixture(scope="module")
def plain(compiled: Artifact) -> np.ndarray:
    return logits(Runner(compiled), TEXTS)


def test_run_after_run_on_the_same_buffers_gives_the_answers_of_any_session(
    compiled: Artifact, plain: np.ndarray
) -> None:
    runner = Runner(compiled, engine=recorded)
    for order in (slice(None), slice(None, None, -1), slice(1, 4)):
        np.testing.assert_allclose(logits(runner, TEXTS[order]), plain[order], atol=1e-5)
    runner.close()
    np.testing.assert_allclose(logits(runner, TEXTS), plain, atol=1e-5)


def test_threads_that_share_a_bucket_do_not_get_each_others_answers(compiled: Artifact, plain: np.ndarray) -> None:
    runner = Runner(compiled, engine=recorded)

    def ask(number: int) -> None:
        row = number % len(TEXTS)
        np.testing.assert_allclose(logits(runner, [TEXTS[row]])[0], plain[row], atol=1e-5)

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(ask, range(100)))


def test_results_stay_when_the_buffer_is_used_again(compiled: Artifact) -> None:
    bucket = compiled.manifest.ladder.buckets[0]
    session = recorded(compiled)[bucket]
    names = compiled.manifest.signature.input_names
    first: Mapping[str, np.ndarray] = {name: np.ones((1, 8), dtype=np.int64) for name in names}
    kept = session.run(first)["logits"]
    before = kept.copy()
    session.run({**first, "input_ids": np.full((1, 8), 7)})
    np.testing.assert_array_equal(kept, before)
    assert all((array == 1).all() for array in first.values()), "the buffers are not the caller's arrays"


def feed(bucket: Bucket, number: int) -> dict[str, np.ndarray]:
    shape = (bucket.batch_size, bucket.length)
    values = {"input_ids": 5 + number % 12, "attention_mask": 1, "token_type_ids": 0}
    return {name: np.full(shape, value) for name, value in values.items()}


def test_every_bucket_is_recorded_once_whatever_thread_asks(compiled: Artifact, plain: np.ndarray) -> None:
    sessions = recorded(compiled)
    runner = Runner(compiled, engine=lambda artifact, options: sessions)

    def ask(number: int) -> None:
        row = number % len(TEXTS)
        np.testing.assert_allclose(logits(runner, [TEXTS[row]])[0], plain[row], atol=1e-5)

    for _ in range(3):
        with ThreadPoolExecutor(4) as pool:
            list(pool.map(ask, range(40)))
    np.testing.assert_allclose(logits(runner, TEXTS), plain, atol=1e-5)
    graphs = next(iter(sessions.values())).engine.session.graphs
    assert len(graphs) == len(compiled.manifest.ladder)
    assert len({thread for thread, _ in graphs}) == 1


def test_engines_take_turns_while_others_are_opened_closed_and_dropped(compiled: Artifact) -> None:
    before, engine = set(threading.enumerate()), open_engine(compiled)
    buckets = list(compiled.manifest.ladder)
    reference = open_graph(compiled.path(GRAPH), EngineOptions())
    expected = {
        bucket: [reference.run(["logits"], feed(bucket, number))[0] for number in range(12)] for bucket in buckets
    }

    def ask(number: int) -> None:
        which = open_engine(compiled) if number % 20 == 0 else engine
        bucket = buckets[number % len(buckets)]
        arrays = feed(bucket, number)
        got = which.run_recorded(bucket, arrays)["logits"] if number % 3 else which.run(["logits"], arrays)[0]
        np.testing.assert_allclose(got, expected[bucket][number % 12], atol=1e-5)
        if number % 10 == 0:
            which.close()

    with ThreadPoolExecutor(6) as pool:
        list(pool.map(ask, range(240)))
    engine.close()
    assert {thread for thread in threading.enumerate() if thread.is_alive()} <= before


def test_the_thread_goes_with_the_last_engine_also_without_close(compiled: Artifact) -> None:
    before = set(threading.enumerate())
    engines = [open_engine(compiled) for _ in range(2)]
    sessions = [weakref.ref(engine.session.session) for engine in engines]
    (thread,) = set(threading.enumerate()) - before
    del engines[0]
    engines[0].run(["logits"], feed(compiled.manifest.ladder.buckets[0], 1))
    assert thread.is_alive()
    assert [session() is None for session in sessions] == [True, False]
    engines.clear()
    thread.join(LATE_S)
    assert not thread.is_alive()
    assert sessions[1]() is None
    assert set(Recorder.lives) == {thread}
    assert len(Recorder.lives) == 4


def test_a_closed_engine_holds_no_buffers_and_goes_without_a_thread(
    compiled: Artifact, monkeypatch: pytest.MonkeyPatch
) -> None:
    sessions = list(recorded(compiled).values())
    engine = sessions[0].engine
    for session in sessions:
        session.run(feed(session.bucket, 1))
    running = room._gpu._thread
    assert len(engine._held.bound) == len(sessions) == 4
    with monkeypatch.context() as patch:
        patch.setattr(room._gpu, "_sweep", lambda: time.sleep(0.3))  # the last that the thread does
        sessions[0].close()
    assert not engine._held.bound
    assert not running.is_alive()
    with monkeypatch.context() as patch:  # there is nothing to do for the others
        patch.setattr(threading.Thread, "start", lambda thread: pytest.fail("a thread for nothing"))
        for session in sessions:
            session.close()
        inner = weakref.ref(engine.session.session)
        del engine, session
        sessions.clear()
        assert inner() is None
    assert room._gpu._tasks.empty()


def test_what_a_failed_opening_leaves_is_let_go_of_at_once_by_the_thread() -> None:
    def fail() -> None:
        half = Recorder(None)
        try:
            half.session.run()
        except AttributeError as error:
            raise ValueError("no such graph") from error

    gc.disable()
    try:
        with pytest.raises(ValueError, match="no such graph") as caught:
            CudaEngine(fail, "cpu")
        opened, let_go = Recorder.lives
        assert opened is let_go is not threading.current_thread()
        opened.join(LATE_S)
        assert not opened.is_alive()
        assert room._gpu._thread is None
        assert isinstance(caught.value.__cause__, AttributeError)
    finally:
        gc.enable()


def test_a_thread_that_cannot_be_started_is_tried_again(compiled: Artifact, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(thread: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", refused)
        with pytest.raises(RuntimeError, match="can't start new thread"):
            open_engine(compiled)
    bucket = compiled.manifest.ladder.buckets[0]
    assert open_engine(compiled).run_recorded(bucket, feed(bucket, 1))["logits"].shape == (1, 2)


def test_what_the_thread_itself_asks_does_not_wait_for_it(compiled: Artifact) -> None:
    engine, other = open_engine(compiled), open_engine(compiled)
    bucket = compiled.manifest.ladder.buckets[0]
    expected = other.run_recorded(bucket, feed(bucket, 1))["logits"]

    def asks() -> np.ndarray:
        other.close()  # as garbage that holds a runner may
        return other.run_recorded(bucket, feed(bucket, 1))["logits"]

    np.testing.assert_array_equal(room._gpu.call(engine._held, asks), expected)
    assert not other._held.bound or other._held not in room._gpu._in_use  # it was closed after what was asked


def test_garbage_that_comes_as_the_thread_ends_is_let_go_of(compiled: Artifact) -> None:
    engine, closed = open_engine(compiled), open_engine(compiled)
    closed.close()
    gone = weakref.ref(closed.session.session)
    waiting = [closed]
    del closed

    class Late:
        """The queue, at the worst moment."""

        def __init__(self, queue: Any) -> None:
            self.queue = queue

        def __getattr__(self, name: str) -> Any:
            return getattr(self.queue, name)

        def empty(self) -> bool:
            found = self.queue.empty()
            waiting.clear()
            return found

    room._gpu._tasks = Late(room._gpu._tasks)
    thread = room._gpu._thread
    engine.close()
    thread.join(LATE_S)
    assert gone() is None
    assert room._gpu._tasks.empty()


@pytest.mark.parametrize("how", ["deleted at the end", "left open", "closed at exit"])
def test_the_interpreter_exits_whatever_was_left_open(compiled: Artifact, how: str) -> None:
    program = """
import atexit, sys
from pathlib import Path
from hf_bucket.session_cuda import CudaEngine
from hf_bucket.session_ort import EngineOptions, open_graph

class Owner:
    closes = sys.argv[2] == "deleted at the end"
    def __init__(self): self.engine = CudaEngine(lambda: open_graph(Path(sys.argv[1]), EngineOptions()), "cpu")
    def __del__(self):
        if self.closes: self.engine.close()

owner = Owner()
if sys.argv[2] == "closed at exit": atexit.register(owner.engine.close)
print("done", flush=True)
"""
    command = [sys.executable, "-c", program, str(compiled.path(GRAPH)), how]
    done = subprocess.run(command, capture_output=True, text=True, timeout=LATE_S)
    assert (done.stdout, done.returncode) == ("done\n", 0), done.stderr


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_a_forked_child_leaves_its_parents_engines_alone_and_has_its_own(compiled: Artifact) -> None:
    engine, bucket = open_engine(compiled), compiled.manifest.ladder.buckets[0]
    expected = engine.run_recorded(bucket, feed(bucket, 1))["logits"]
    child = os.fork()
    if child == 0:
        status = 1
        try:
            inherited = engine._held
            engine.close()
            with pytest.raises(ProviderError, match="it belongs to the process this one was forked from"):
                engine.run_recorded(bucket, feed(bucket, 1))
            del engine
            gc.collect()
            own = open_engine(compiled).run_recorded(bucket, feed(bucket, 1))["logits"]
            kept = inherited.session is not None and bool(inherited.bound)
            status = 0 if kept and np.allclose(own, expected, atol=1e-5) else 2
        finally:
            os._exit(status)
    late = threading.Timer(LATE_S, os.kill, (child, signal.SIGKILL))
    late.start()
    _, status = os.waitpid(child, 0)
    late.cancel()
    assert status == 0
    np.testing.assert_array_equal(engine.run_recorded(bucket, feed(bucket, 1))["logits"], expected)
    engine.close()
    assert room._gpu._thread is None
