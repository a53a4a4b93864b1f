"""onnxruntime's CUDA provider: one thread of the process runs it, and records a CUDA graph for every bucket.

While one thread records, CUDA refuses most of what any other thread asks of it, and the recording fails. And
onnxruntime keeps the CUDA graphs of each thread apart: it would record them anew for every thread that comes along. So
everything is done by one thread, whoever asks: opening sessions, running them, and letting go of them.
"""

from __future__ import annotations

import atexit
import os
import threading
import traceback
import weakref
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from queue import Empty, SimpleQueue
from typing import Any, TypeAlias, TypeVar

import numpy as np
import onnxruntime

from hf_bucket.batch import Array, in_float32
from hf_bucket.errors import ProviderError
from hf_bucket.ladder import Bucket

_TYPES = {"tensor(float)": np.float32, "tensor(float16)": np.float16, "tensor(int64)": np.int64}

_Result = TypeVar("_Result")
_Task: TypeAlias = tuple[Callable[[], Any], "Future[Any] | None"]  # a function, and who waits for what it returns


@dataclass(frozen=True, slots=True)
class _Bound:
    """Where a bucket's inputs and outputs lie on the GPU: a CUDA graph reads and writes no other place."""

    inputs: dict[str, Any]
    outputs: dict[str, Any]
    binding: Any
    options: Any


@dataclass(eq=False, slots=True)
class _Held:
    """What an engine has on the GPU; only the GPU's thread touches it."""

    session: Any = None
    bound: dict[Bucket, _Bound] = field(default_factory=dict)
    recorded: int = 0  # CUDA graphs so far: onnxruntime keeps them under their numbers, of buckets let go of too

    def clear(self) -> None:
        self.bound.clear()
        self.session = None


class _Gpu:
    """The thread that uses CUDA, there while an engine is in use. It alone knows which are."""

    def __init__(self) -> None:
        self._inherited: list[tuple[set[_Held], SimpleQueue[_Task]]] = []
        self._begin()

    def _begin(self) -> None:
        self._lock = threading.Lock()  # of starting and ending the thread
        self._thread: threading.Thread | None = None
        self._tasks: SimpleQueue[_Task] = SimpleQueue()  # while there is no thread, only of what was dropped
        self._in_use: set[_Held] = set()
        self._ending = False

    def call(self, held: _Held, function: Callable[..., _Result], *arguments: object) -> _Result:
        """Return what a function returns on the thread; from now on its engine is in use.

        Raises:
            ProviderError: the engine is a parent process's, or the interpreter is exiting.
        """
        if self._ending or self._is_inherited(held):
            why = "the interpreter exits" if self._ending else "it belongs to the process this one was forked from"
            raise ProviderError(f"CUDA cannot run this model any more: {why}")

        def use() -> _Result:
            self._in_use.add(held)
            return function(*arguments)

        return self._do(use)[0]

    def release(self, held: _Held) -> None:
        """Let go of what an engine has for its runs, until it is used again, and end the thread if none is in use."""
        if self._ending or self._is_inherited(held) or not (held.bound or held in self._in_use):
            return

        def unuse() -> None:
            held.bound.clear()
            self._in_use.discard(held)

        if threading.current_thread() is self._thread:  # something that was garbage closes it
            self._tasks.put((unuse, None))
            return
        thread = self._do(unuse)[1]
        if self._thread is not thread:  # it has decided to end
            thread.join()

    def drop(self, held: _Held) -> None:
        """Let go of all that an engine had, which is garbage.

        The garbage collector calls this at any point of any thread, locks held: it may wait for none.
        """
        if self._is_inherited(held):
            return

        def forget() -> None:
            held.clear()
            self._in_use.discard(held)

        self._tasks.put((forget, None))
        self._sweep()

    def end(self) -> None:
        """End the thread, before the interpreter does: whoever waited for it then would wait for ever."""
        self._ending, thread = True, self._thread
        if thread is not None and thread.is_alive():
            self._tasks.put((lambda: None, None))
            thread.join(_PATIENCE_S)

    def leave_parent(self) -> None:
        """In a forked child, never touch what the parent has on the GPU: its thread stayed there."""
        self._inherited.append((self._in_use, self._tasks))
        self._begin()

    def _is_inherited(self, held: _Held) -> bool:
        return any(held in in_use for in_use, _ in self._inherited)

    def _do(self, function: Callable[[], _Result]) -> tuple[_Result, threading.Thread]:
        """Return what a function returns on the thread, and the thread."""
        thread = threading.current_thread()
        if thread is self._thread:
            return function(), thread
        future: Future[_Result] = Future()
        with self._lock:
            if self._thread is None:
                started = threading.Thread(target=self._work, name="hf_bucket", daemon=True)
                started.start()
                self._thread = started
            thread = self._thread
            self._tasks.put((function, future))
        try:
            return future.result(), thread
        finally:
            del function, future  # an exception has a traceback with this frame

    def _work(self) -> None:
        """Do one task after another until no engine is in use."""
        goes_on = True
        while goes_on:
            function, future = self._tasks.get()
            result, error = None, None
            try:
                result = function()
            except BaseException as raised:  # noqa: BLE001 - it is raised where the result is waited for
                error = raised
                _forget_locals(raised)
            if self._ending or not self._in_use:
                with self._lock:
                    if self._ending or self._tasks.empty():
                        self._thread, goes_on = None, False
            if future is not None:
                future.set_result(result) if error is None else future.set_exception(error)
            del function, future, result, error  # nothing is kept while there is nothing to do
        if not self._ending:
            self._sweep()

    def _sweep(self) -> None:
        """Let go of what was dropped while there is no thread; if another thread is at it, that one does."""
        while self._thread is None and not self._tasks.empty() and self._lock.acquire(blocking=False):
            try:
                while self._thread is None:
                    self._tasks.get_nowait()[0]()
            except Empty:
                pass
            finally:
                self._lock.release()


_PATIENCE_S = 5.0  # for a run to end, when the interpreter does


def _forget_locals(error: BaseException) -> None:
    """Let go, on this thread, of sessions and buffers half made that an exception's traceback holds."""
    chain: list[BaseException] = [error]
    for one in chain:
        traceback.clear_frames(one.__traceback__)
        chain += [before for before in (one.__cause__, one.__context__) if before and before not in chain]


_gpu = _Gpu()
atexit.register(lambda: _gpu.end())
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=lambda: _gpu.leave_parent())


class CudaEngine:
    """An onnxruntime session of the CUDA provider. Many threads may use it; runs wait for each other.

    Args:
        make: opens the session.
        device: ``"cpu"`` works alike, without CUDA graphs.
        device_id: which of them, as the provider option of that name.
    """

    def __init__(self, make: Callable[[], Any], device: str = "cuda", device_id: int = 0) -> None:
        self._held, self._place = _Held(), (device, device_id)
        weakref.finalize(self, _gpu.drop, self._held).atexit = False
        try:
            self._held.session = _gpu.call(self._held, make)
        except BaseException:
            _gpu.drop(self._held)
            raise

    @property
    def session(self) -> Any:
        """The ``InferenceSession``."""
        return self._held.session

    def run(self, names: Sequence[str], arrays: Mapping[str, Array]) -> list[Array]:
        """Return the named outputs, as ``InferenceSession.run`` does."""
        found: list[Array] = _gpu.call(self._held, self._held.session.run, names, dict(arrays))
        return found

    def run_recorded(self, bucket: Bucket, arrays: Mapping[str, Array]) -> dict[str, Array]:
        """Return every output. The first run of a bucket is recorded as a CUDA graph, later ones replay that.

        The session needs the provider option ``enable_cuda_graph``, and is of a graph with free dimensions.
        """
        return _gpu.call(self._held, self._run_recorded, bucket, arrays)

    def _run_recorded(self, bucket: Bucket, arrays: Mapping[str, Array]) -> dict[str, Array]:
        bound = self._held.bound.get(bucket)
        if bound is None:
            bound = self._held.bound[bucket] = self._bind(bucket, arrays)
        else:
            for name, value in bound.inputs.items():
                value.update_inplace(np.ascontiguousarray(arrays[name]))
        self._held.session.run_with_iobinding(bound.binding, bound.options)
        return {name: np.array(value.numpy()) for name, value in bound.outputs.items()}

    def _bind(self, bucket: Bucket, arrays: Mapping[str, Array]) -> _Bound:
        """Return memory on the GPU for every input, filled, and every output, under a number of its own."""
        session, free = self._held.session, {"batch": bucket.batch_size, "length": bucket.length}
        inputs = {  # of copies: on the CPU a value is the array itself, and later runs write there
            entry.name: onnxruntime.OrtValue.ortvalue_from_numpy(np.array(arrays[entry.name], order="C"), *self._place)
            for entry in session.get_inputs()
        }
        outputs = {
            entry.name: onnxruntime.OrtValue.ortvalue_from_shape_and_type(
                [free.get(size, size) for size in entry.shape], _TYPES[entry.type], *self._place
            )
            for entry in session.get_outputs()
        }
        binding = session.io_binding()
        for name, value in inputs.items():
            binding.bind_ortvalue_input(name, value)
        for name, value in outputs.items():
            binding.bind_ortvalue_output(name, value)
        self._held.recorded += 1
        options = onnxruntime.RunOptions()
        options.add_run_config_entry("gpu_graph_id", str(self._held.recorded))
        return _Bound(inputs, outputs, binding, options)

    def close(self) -> None:
        """Let go of buffers, and end the thread if no other engine is in use.

        Weights and CUDA graphs go with the engine; a run before that records anew.
        """
        _gpu.release(self._held)


@dataclass(frozen=True, slots=True)
class RecordedSession:
    """One bucket of an engine that others share, weights and all: one CUDA graph."""

    bucket: Bucket
    engine: CudaEngine

    def run(self, arrays: Mapping[str, Array]) -> dict[str, Array]:
        """Return every output; half-precision logits come back as float32."""
        return in_float32(self.engine.run_recorded(self.bucket, arrays))

    def close(self) -> None:
        """Let go of what the engine holds for its runs, of every bucket."""
        self.engine.close()
