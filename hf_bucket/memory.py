"""What running an artifact takes in memory, and whether that much is there."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from hf_bucket.artifact import GRAPH, WEIGHTS, variant_name
from hf_bucket.errors import LadderError
from hf_bucket.manifest import Manifest

Mode = Literal["shared", "static"]

FASTER = 0.97  # static takes more memory: mode="auto" wants it to save this much of the time

# What onnxruntime takes for every byte that it computes in, and for every byte of a graph that a session holds, as
# measured: see docs/memory.md.
ARENA: Mapping[Mode, float] = {"shared": 3.2, "static": 1.7}
SESSION = 30.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Footprint:
    """What running a ladder takes in bytes, beside what Python and the libraries do.

    Attributes:
        weights: of all buckets: they are there once on the CPU provider.
        sessions: what the graphs of all sessions take.
        activations: what one batch computes in, by the name of its bucket; a bucket is missing where nobody knows.
        at_once: batches that run at once.
    """

    weights: int
    sessions: int
    activations: Mapping[str, int]
    at_once: int = 1

    @property
    def largest(self) -> str | None:
        """The bucket that computes in the most; None where it is known of none."""
        return max(self.activations, key=self.activations.__getitem__, default=None)

    @property
    def total(self) -> int:
        """All of it: every batch that runs at once may be of the largest bucket."""
        return self.weights + self.sessions + self.at_once * max(self.activations.values(), default=0)


def footprint(
    manifest: Manifest, *, mode: Mode = "shared", at_once: int = 1, sets: int = 1, copies: int = 0
) -> Footprint:
    """Return what running takes, as the manifest has it.

    Args:
        mode: in ``"static"`` every bucket has a session of its own.
        at_once: batches that run at once.
        sets: how often the sessions are opened: those on one thread and those on every core are two.
        copies: of the weights, beside those on disk, that an engine packs for itself.
    """
    graphs = [variant_name(bucket) for bucket in manifest.ladder] if mode == "static" else [GRAPH]
    held = [manifest.files[name].size for name in graphs if name in manifest.files]
    return Footprint(
        weights=(1 + copies) * (manifest.files[WEIGHTS].size if WEIGHTS in manifest.files else 0),
        sessions=round(sets * SESSION * sum(held)),
        activations={
            bucket.name: round(ARENA[mode] * manifest.memory[bucket.name])
            for bucket in manifest.ladder
            if bucket.name in manifest.memory
        },
        at_once=at_once,
    )


def sets_of(at_once: int) -> int:
    """Return how often sessions are opened: on one thread each for batches that run at once, and on every core."""
    return 1 if at_once == 1 else 2


def check_fits(needed: Footprint, available: int | None) -> None:
    """Return if a ladder fits the memory there is; where nobody knows how much that is, everything fits.

    Raises:
        LadderError: it does not; the message has the numbers.
    """
    if available is None or needed.total <= available:
        return
    name = needed.largest
    if name is None:
        raise LadderError(
            f"the model needs {_mb(needed.total)} of memory for its weights, {_mb(available)} are there; free some, or "
            f"set memory_bytes to what may be used"
        )
    raise LadderError(
        f"the ladder needs {_mb(needed.total)} of memory: weights {_mb(needed.weights)}, sessions "
        f"{_mb(needed.sessions)}, and its largest bucket {name} {_mb(needed.activations[name])} for each of "
        f"{needed.at_once} batches at once; {_mb(available)} are there. Drop {name}, choose smaller batch_sizes or "
        f"fewer workers, or set memory_bytes to what may be used"
    )


def _mb(size: int) -> str:
    return f"{size / 1e6:.1f} MB"
