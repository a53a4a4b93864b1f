"""The one seam to an engine: something that runs exactly one bucket. ``FakeSession`` stands in for it in tests."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np

from hf_bucket.batch import Array
from hf_bucket.ladder import Bucket


class Session(Protocol):
    """Runs one bucket. ``run`` may be called by many threads at once."""

    @property
    def bucket(self) -> Bucket:
        """The shape this session runs."""

    def run(self, arrays: Mapping[str, Array]) -> dict[str, Array]:
        """Return every output by name.

        Args:
            arrays: every graph input by name, each of shape ``(bucket.batch_size, *bucket.extent)``.
        """

    def close(self) -> None:
        """Release the engine's memory. The session cannot run afterwards."""


@dataclass(slots=True)
class FakeSession:
    """A session whose logits tell which row they came from, and change when padding leaks in.

    ``logits[row] = (sum of real token ids, number of real tokens)``, shape ``(batch_size, 2)``, float32.
    ``shapes`` records the shape of every batch it ran.
    """

    bucket: Bucket
    shapes: list[tuple[int, ...]] = field(default_factory=list)

    def run(self, arrays: Mapping[str, Array]) -> dict[str, Array]:
        """Return ``{"logits": ...}`` computed from ``input_ids`` and ``attention_mask``."""
        ids = np.asarray(arrays["input_ids"], dtype=np.int64)
        mask = np.asarray(arrays["attention_mask"], dtype=np.int64)
        expected = (self.bucket.batch_size, *self.bucket.extent)
        if ids.shape != expected or mask.shape != expected:
            raise ValueError(f"session {self.bucket.name} got {ids.shape}, expected {expected}")
        self.shapes.append(ids.shape)
        return {"logits": np.stack([(ids * mask).sum(axis=1), mask.sum(axis=1)], axis=1).astype(np.float32)}

    def close(self) -> None:
        """Nothing to release."""
