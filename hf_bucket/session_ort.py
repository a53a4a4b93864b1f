"""Sessions on onnxruntime: one dynamic graph behind all buckets (``shared``) or one graph per bucket (``static``)."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import onnxruntime

from hf_bucket.artifact import GRAPH, Artifact
from hf_bucket.batch import Array
from hf_bucket.errors import ArtifactError, ProviderError
from hf_bucket.ladder import Bucket
from hf_bucket.session import Session

Mode = Literal["shared", "static"]


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineOptions:
    """How sessions are made.

    Attributes:
        mode: ``"shared"`` holds the weights once, behind one graph with free dimensions; ``"static"`` gives every
            bucket a session of its own, with fixed shapes and its own copy of the weights.
        provider: an onnxruntime execution provider by name, or ``"auto"``.
        provider_options: passed to the provider as they are.
        threads: threads one run may use; 0 means every core this process may use.
    """

    mode: Mode = "shared"
    provider: str = "auto"
    provider_options: Mapping[str, str] = field(default_factory=dict)
    threads: int = 0

    def __post_init__(self) -> None:
        if self.mode not in ("shared", "static"):
            raise ProviderError(f'mode must be "shared" or "static", got {self.mode!r}')
        if not isinstance(self.threads, int) or isinstance(self.threads, bool) or self.threads < 0:
            raise ProviderError(f"threads must be 0 (every core) or a positive number, got {self.threads!r}")


@dataclass(frozen=True, slots=True)
class OrtSession:
    """One bucket of an onnxruntime session, which other buckets may share."""

    bucket: Bucket
    engine: Any
    output_names: tuple[str, ...]

    def run(self, arrays: Mapping[str, Array]) -> dict[str, Array]:
        """Return every output; half-precision logits come back as float32."""
        outputs = self.engine.run(self.output_names, dict(arrays))
        named = zip(self.output_names, outputs, strict=True)
        return {name: value.astype(np.float32) if value.dtype == np.float16 else value for name, value in named}

    def close(self) -> None:
        """Nothing to do: the engine goes when the last bucket that uses it is dropped."""


def open_sessions(artifact: Artifact, options: EngineOptions) -> dict[Bucket, Session]:
    """Return a session for every bucket of the ladder.

    Raises:
        ProviderError: the provider is not available here.
        ArtifactError: onnxruntime cannot load a graph.
    """
    ladder = artifact.manifest.ladder
    if options.mode == "static":
        return {bucket: open_variant(artifact, bucket, options) for bucket in ladder}
    engine = open_graph(artifact.path(GRAPH), options)
    return {bucket: OrtSession(bucket, engine, _output_names(artifact)) for bucket in ladder}


def open_dynamic(
    artifact: Artifact, options: EngineOptions, sessions: Mapping[Bucket, Session]
) -> Callable[[Bucket], Session]:
    """Return a function that makes a session for a shape outside the ladder, on the graph with free dimensions.

    Args:
        sessions: those of the ladder; in ``"shared"`` mode they run that graph already, and it is not loaded twice.
    """
    shared = next((session for session in sessions.values() if isinstance(session, OrtSession)), None)
    engine = shared.engine if shared and options.mode == "shared" else open_graph(artifact.path(GRAPH), options)
    names = _output_names(artifact)
    return lambda bucket: OrtSession(bucket, engine, names)


def open_variant(artifact: Artifact, bucket: Bucket, options: EngineOptions) -> OrtSession:
    """Return a session on the graph specialised for one bucket."""
    return OrtSession(bucket, open_graph(artifact.variant(bucket), options), _output_names(artifact))


def _output_names(artifact: Artifact) -> tuple[str, ...]:
    return tuple(spec.name for spec in artifact.manifest.signature.outputs)


Engine = Callable[[Artifact, EngineOptions], Mapping[Bucket, Session]]
Dynamic = Callable[[Artifact, EngineOptions, Mapping[Bucket, Session]], Callable[[Bucket], Session]]


def open_graph(path: Path, options: EngineOptions) -> Any:
    """Return an onnxruntime ``InferenceSession`` on one graph.

    Raises:
        ProviderError: the provider is not available here.
        ArtifactError: onnxruntime cannot load the graph.
    """
    provider = resolve_provider(options.provider)
    settings = onnxruntime.SessionOptions()
    settings.intra_op_num_threads = options.threads or usable_cores()
    settings.inter_op_num_threads = 1
    settings.log_severity_level = 3
    try:
        engine = onnxruntime.InferenceSession(
            str(path), settings, providers=[(provider, dict(options.provider_options))], enable_fallback=False
        )
    except Exception as error:  # onnxruntime's own exceptions share no public base class
        raise ArtifactError(f"{path} cannot be loaded by onnxruntime on {provider}: {error}") from error
    if engine.get_providers()[0] != provider:
        raise ProviderError(f"{provider} did not start; onnxruntime offered {engine.get_providers()} instead")
    return engine


def resolve_provider(name: str) -> str:
    """Return the name of an installed execution provider; ``"auto"`` is the CPU's.

    Raises:
        ProviderError: not installed; the message lists those that are.
    """
    installed = onnxruntime.get_available_providers()
    if name == "auto":
        return "CPUExecutionProvider"
    if name not in installed:
        raise ProviderError(f'provider {name!r} is not installed; use "auto" or one of {", ".join(installed)}')
    return name


def usable_cores() -> int:
    """Return the cores this process may use: by affinity, and by the cgroup's quota rounded up."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    try:
        with open("/sys/fs/cgroup/cpu.max", encoding="ascii") as file:
            quota, period = file.read().split()
    except (OSError, ValueError):
        return cores
    if quota == "max":
        return cores
    return max(1, min(cores, -(-int(quota) // int(period))))
