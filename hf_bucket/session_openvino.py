"""OpenVINO's own runtime, with onnxruntime's ``run``: the same graphs, without onnxruntime in between.

onnxruntime's OpenVINO plugin takes Intel processors only; the runtime takes any x86 or ARM one.
"""

from __future__ import annotations

import ctypes
import importlib
import os
import threading
import weakref
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from hf_bucket.batch import Array
from hf_bucket.errors import ArtifactError, ProviderError, missing_part


@dataclass(frozen=True, slots=True)
class Output:
    """An output of the graph, as ``InferenceSession.get_outputs`` has them."""

    name: str


@dataclass(eq=False)
class OpenVinoEngine:
    """A compiled graph. ``run`` may be called by many threads at once: each has a request of its own.

    Attributes:
        compiled: the model; as many requests run at once as it was compiled with streams.
    """

    compiled: Any
    _requests: threading.local = field(default_factory=threading.local)

    def get_outputs(self) -> list[Output]:
        """Return the outputs in the graph's order."""
        return [Output(output.get_any_name()) for output in self.compiled.outputs]

    def run(self, names: Sequence[str], arrays: Mapping[str, Array]) -> list[Array]:
        """Return the named outputs; they stay as they are whatever is run next."""
        request = getattr(self._requests, "own", None)
        if request is None:
            request = self._requests.own = self.compiled.create_infer_request()
        request.infer(dict(arrays), share_inputs=True)
        return [np.array(request.get_tensor(name).data) for name in names]


_engines: weakref.WeakSet[OpenVinoEngine] = weakref.WeakSet()


def open_openvino(path: Path, *, threads: int, streams: int, options: Mapping[str, str]) -> OpenVinoEngine:
    """Return a graph compiled for the processor, in the precision of its weights.

    Args:
        threads: that all streams share.
        streams: requests that run at once.
        options: properties of the device's, by name.

    Raises:
        DependencyError: OpenVINO is not installed.
        ProviderError: a property that the device does not have; or this process was forked from one that used OpenVINO.
        ArtifactError: OpenVINO cannot load the graph.
    """
    try:
        openvino = importlib.import_module("openvino")
    except ImportError as error:
        raise missing_part("openvino", "openvino", "running on OpenVINO") from error
    if _forked:
        raise ProviderError(
            "OpenVINO was used before this process was forked, and its threads stayed in the parent: it would wait for "
            'them for ever; start processes with "spawn", or load the model in them only, or use provider="auto"'
        )
    core = _core(openvino)
    known = set(core.get_property("CPU", "SUPPORTED_PROPERTIES"))
    unknown = sorted(set(options) - known)
    if unknown:
        raise ProviderError(f"OpenVINO has no property {', '.join(unknown)}; it has {', '.join(sorted(known))}")
    settings = {"NUM_STREAMS": str(streams), "INFERENCE_NUM_THREADS": str(threads), "INFERENCE_PRECISION_HINT": "f32"}
    try:
        engine = OpenVinoEngine(core.compile_model(core.read_model(path), "CPU", {**settings, **options}))
    except RuntimeError as error:
        raise ArtifactError(f"{path} cannot be loaded by OpenVINO: {str(error).strip().splitlines()[0]}") from error
    _engines.add(engine)
    return engine


_lock = threading.Lock()
_alive: dict[str, Any] = {}
_forked = False  # whether a parent of this process had used OpenVINO before it forked


def _core(openvino: Any) -> Any:
    """Return the process's one core; it starts threads that all compiled graphs share.

    OpenVINO's bindings make their tables of numpy's types when those are first asked for, and two threads that do so at
    once wait for each other for ever (seen with 2026.4): they are made here, by one thread.
    """
    with _lock:
        if "core" not in _alive:
            openvino.Type(np.dtype(np.float32)).to_dtype()
            _alive["core"] = openvino.Core()
        return _alive["core"]


def left_behind() -> bool:
    """Return whether OpenVINO's threads stayed in a parent of this process, which cannot run it then."""
    return _forked


def _leave_parent() -> None:
    """In a forked child, never destroy what the parent opened: its threads stayed there, and would be waited for."""
    global _lock, _forked
    _lock, _forked = threading.Lock(), _forked or bool(_alive)
    for inherited in [*_alive.values(), *(engine.compiled for engine in _engines)]:
        ctypes.pythonapi.Py_IncRef(ctypes.py_object(inherited))
    _alive.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_leave_parent)
