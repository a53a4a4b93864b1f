"""A session on buffers that never move, as a CUDA graph needs: one graph, captured in the first run, per bucket."""

from __future__ import annotations

import threading
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import onnxruntime

from hf_bucket.batch import Array
from hf_bucket.ladder import Bucket

_TYPES = {"tensor(float)": np.float32, "tensor(float16)": np.float16, "tensor(int64)": np.int64}


@dataclass(slots=True)
class BoundSession:
    """One bucket of an onnxruntime session whose inputs and outputs stay at one place of a device's memory.

    With the provider option ``enable_cuda_graph`` onnxruntime records the first run as a CUDA graph and replays it for
    every other, which takes the same addresses each time. Runs of one bucket wait for each other.

    Attributes:
        engine: of the bucket's own graph: every shape in it is fixed.
        device: ``"cuda"``; ``"cpu"`` works alike, without a graph.
        device_id: which of them, as the provider option of that name.
    """

    bucket: Bucket
    engine: Any
    device: str
    device_id: int = 0
    _inputs: dict[str, Any] = field(default_factory=dict)
    _outputs: dict[str, Any] = field(default_factory=dict)
    _binding: Any = None
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def run(self, arrays: Mapping[str, Array]) -> dict[str, Array]:
        """Return every output; half-precision logits come back as float32."""
        with self._lock:
            if self._binding is None:
                self._bind(arrays)
            else:
                for name, value in self._inputs.items():
                    value.update_inplace(np.ascontiguousarray(arrays[name]))
            self.engine.run_with_iobinding(self._binding)
            found = {name: np.array(value.numpy()) for name, value in self._outputs.items()}
        return {name: value.astype(np.float32) if value.dtype == np.float16 else value for name, value in found.items()}

    def _bind(self, arrays: Mapping[str, Array]) -> None:
        """Take memory on the device for every input and output."""
        binding = self.engine.io_binding()
        for entry in self.engine.get_inputs():
            array = np.ascontiguousarray(arrays[entry.name])
            self._inputs[entry.name] = value = onnxruntime.OrtValue.ortvalue_from_numpy(
                array, self.device, self.device_id
            )
            binding.bind_ortvalue_input(entry.name, value)
        for entry in self.engine.get_outputs():
            place = (self.device, self.device_id)
            value = onnxruntime.OrtValue.ortvalue_from_shape_and_type(entry.shape, _TYPES[entry.type], *place)
            self._outputs[entry.name] = value
            binding.bind_ortvalue_output(entry.name, value)
        self._binding = binding

    def close(self) -> None:
        """Let go of the device's memory; the next run takes it again."""
        with self._lock:
            self._inputs, self._outputs, self._binding = {}, {}, None
