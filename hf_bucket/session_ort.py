"""Sessions on onnxruntime: one dynamic graph behind all buckets (``shared``) or one graph per bucket (``static``).

On the CPU provider both run the graph whose weights are packed for this machine already, in one file that every session
maps into memory: however many sessions there are, the weights are there once.
"""

from __future__ import annotations

import contextlib
import ctypes
import importlib
import importlib.util
import os
import threading
import weakref
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import onnxruntime

from hf_bucket.artifact import GRAPH, WEIGHTS, Artifact
from hf_bucket.batch import Array
from hf_bucket.errors import ArtifactError, ProviderError
from hf_bucket.fusions import OWN, Fusion, get_fusion
from hf_bucket.ladder import Bucket
from hf_bucket.machine import machine_folder, made_once, usable_cores
from hf_bucket.session import Session
from hf_bucket.session_bound import BoundSession
from hf_bucket.session_openvino import left_behind, open_openvino

Mode = Literal["shared", "static", "auto"]

CPU = "CPUExecutionProvider"
CUDA = "CUDAExecutionProvider"
OPENVINO = "openvino"  # OpenVINO's own runtime; "OpenVINOExecutionProvider" is the same inside onnxruntime

# Providers that come as a plugin: package that brings it.
PLUGINS = {"OpenVINOExecutionProvider": "onnxruntime_ep_openvino"}

# Providers with a version of their own, beside onnxruntime's: package that has it.
_PACKAGES = {**PLUGINS, OPENVINO: "openvino"}

# What onnxruntime does to fixed shapes and should not. The first turns a MatMul and an Add into a Gemm, whose weights
# would be packed anew for every bucket; the second joins two nodes into one whose kernel is slower on one thread.
_UNWANTED = ["MatMulAddFusion", "SkipLayerNormFusion"]


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineOptions:
    """How sessions are made.

    Attributes:
        mode: ``"shared"`` runs every bucket on one graph with free dimensions; ``"static"`` gives every bucket a
            session of its own, with fixed shapes; ``"auto"`` is static where that is faster and fits (``preflight``).
        provider: an onnxruntime execution provider by name, or ``"auto"``.
        provider_options: passed to the provider as they are; onnxruntime's CPU provider has none.
        threads: threads one run may use; 0 means every core this process may use for a request of a few batches, and
            one for each of many batches that run at once.
        workers: batches of one request that run at once; 0 means as many as the cores allow, and on a provider other
            than the CPU's one.
    """

    mode: Mode = "shared"
    provider: str = "auto"
    provider_options: Mapping[str, str] = field(default_factory=dict)
    threads: int = 0
    workers: int = 0

    def __post_init__(self) -> None:
        if self.mode not in get_args(Mode):
            raise ProviderError(f'mode must be "shared", "static" or "auto", got {self.mode!r}')
        if self.provider_options and self.provider in ("auto", CPU):
            given = ", ".join(sorted(self.provider_options))
            raise ProviderError(
                f"provider {self.provider!r} takes no provider_options, got {given}; "
                f"name the provider they are for: one of {', '.join(installed_providers())}"
            )
        for name, zero in (("threads", "every core"), ("workers", "as many as the cores allow")):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < 0:
                raise ProviderError(f"{name} must be 0 ({zero}) or a positive number, got {value!r}")

    def for_many_batches(self) -> EngineOptions:
        """Return the options of sessions that several workers use at once, and how many workers there are."""
        threads = self.threads or 1
        on_cpu = resolve_provider(self.provider) in (CPU, OPENVINO)
        workers = self.workers or (max(1, usable_cores() // threads) if on_cpu else 1)
        return replace(self, workers=workers, threads=threads if workers > 1 else self.threads)


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
    """Return a session for every bucket of the ladder; ``mode="auto"``, if nobody has chosen yet, is shared.

    Raises:
        ProviderError: the provider is not available here.
        ArtifactError: onnxruntime cannot load a graph.
    """
    ladder, names = artifact.manifest.ladder, _output_names(artifact)
    if options.mode != "static":
        engine = open_shared(artifact, options)
        return {bucket: OrtSession(bucket, engine, names) for bucket in ladder}
    if resolve_provider(options.provider) == CUDA:
        return {bucket: open_cuda_graph(artifact, bucket, options) for bucket in ladder}
    if resolve_provider(options.provider) != CPU:
        return {bucket: open_variant(artifact, bucket, options) for bucket in ladder}
    sessions: dict[Bucket, Session] = {}
    for bucket in ladder:
        fusion = fusion_of(artifact, options, bucket)
        path = packed_graph(artifact, options, fusion) or artifact.path(fusion.rewritten or GRAPH)
        sessions[bucket] = OrtSession(bucket, open_graph(path, options, bucket=bucket, fusion=fusion), names)
    return sessions


def open_shared(artifact: Artifact, options: EngineOptions) -> Any:
    """Return the engine of the graph with free dimensions."""
    fusion = fusion_of(artifact, options)
    packed = packed_graph(artifact, options, fusion)
    return open_unpacked(artifact, options) if packed is None else open_graph(packed, options, fusion=fusion)


def open_unpacked(artifact: Artifact, options: EngineOptions) -> Any:
    """Return the engine of the graph with free dimensions as it lies in the artifact; nothing is kept in the cache."""
    fusion = fusion_of(artifact, options)
    return open_graph(artifact.path(fusion.rewritten or GRAPH), options, fusion=fusion)


def fusion_of(artifact: Artifact, options: EngineOptions, bucket: Bucket | None = None) -> Fusion:
    """Return what the manifest wants made of the graph; of a bucket's own one, or of that behind all of them."""
    choice = artifact.manifest.fusion
    if choice is None or choice.provider != resolve_provider(options.provider):
        return OWN
    return get_fusion(choice.chosen if bucket is None else choice.buckets.get(bucket.name, choice.chosen))


def packed_graph(artifact: Artifact, options: EngineOptions, fusion: Fusion = OWN) -> Path | None:
    """Return the artifact's graph, optimised and with weights packed for this machine; it lies in the cache.

    None for other providers, which have layouts of their own, and where no file can be written.
    """
    if resolve_provider(options.provider) != CPU:
        return None

    def pack(folder: Path) -> None:
        settings = _settings(EngineOptions(threads=1), fusion)
        settings.optimized_model_filepath = str(folder / GRAPH)
        settings.add_session_config_entry("session.optimized_model_external_initializers_file_name", WEIGHTS)
        settings.add_session_config_entry("session.optimized_model_external_initializers_min_size_in_bytes", "1024")
        settings.add_session_config_entry("session.save_external_prepacked_constant_initializers", "1")
        arguments = {"providers": [CPU], "disabled_optimizers": [*fusion.disabled]}
        path = artifact.path(fusion.rewritten or GRAPH)
        try:
            _start(path, settings, arguments)
        except ArtifactError as error:
            open_graph(path, options, fusion=fusion)  # raises if the graph is at fault, and not the disk that is full
            raise OSError(str(error)) from error

    folder = machine_folder(artifact.graph_sha256())
    rewritten = artifact.manifest.files[fusion.rewritten].sha256[:16] if fusion.rewritten else ""
    made = made_once(folder / f"packed-{fusion.name}{rewritten}", pack)
    return None if made is None else made / GRAPH


def open_dynamic(
    artifact: Artifact, options: EngineOptions, sessions: Mapping[Bucket, Session]
) -> Callable[[Bucket], Session]:
    """Return a function that makes a session for a shape outside the ladder, on the graph with free dimensions.

    Args:
        sessions: those of the ladder; in ``"shared"`` mode they run that graph already, and it is not loaded twice.
    """
    shared = next((session for session in sessions.values() if isinstance(session, OrtSession)), None)
    engine = shared.engine if shared and options.mode != "static" else open_shared(artifact, options)
    names = _output_names(artifact)
    return lambda bucket: OrtSession(bucket, engine, names)


def open_variant(artifact: Artifact, bucket: Bucket, options: EngineOptions) -> OrtSession:
    """Return a session on the graph specialised for one bucket."""
    return OrtSession(bucket, open_graph(artifact.variant(bucket), options), _output_names(artifact))


def open_cuda_graph(artifact: Artifact, bucket: Bucket, options: EngineOptions) -> BoundSession:
    """Return a session that replays one CUDA graph of one bucket."""
    graphs = {"enable_cuda_graph": "1", **options.provider_options}
    engine = open_graph(artifact.variant(bucket), replace(options, provider_options=graphs))
    return BoundSession(bucket, engine, "cuda", int(options.provider_options.get("device_id", "0")))


def _output_names(artifact: Artifact) -> tuple[str, ...]:
    return tuple(spec.name for spec in artifact.manifest.signature.outputs)


Engine = Callable[[Artifact, EngineOptions], Mapping[Bucket, Session]]
Dynamic = Callable[[Artifact, EngineOptions, Mapping[Bucket, Session]], Callable[[Bucket], Session]]


def open_graph(path: Path, options: EngineOptions, *, bucket: Bucket | None = None, fusion: Fusion = OWN) -> Any:
    """Return an onnxruntime ``InferenceSession`` on one graph.

    Args:
        bucket: fixes the free dimensions of a graph that has them.
        fusion: what onnxruntime may make of it.

    Raises:
        ProviderError: the provider is not available here.
        ArtifactError: onnxruntime cannot load the graph.
    """
    provider = resolve_provider(options.provider)
    if provider == OPENVINO:
        streams = options.workers or 1
        threads = streams * options.threads or usable_cores()
        return open_openvino(path, threads=threads, streams=streams, options=options.provider_options)
    settings = _settings(options, fusion)
    arguments: dict[str, Any] = {"disabled_optimizers": [*fusion.disabled]}
    if bucket is not None:
        settings.add_free_dimension_override_by_name("batch", bucket.batch_size)
        settings.add_free_dimension_override_by_name("length", bucket.length)
        arguments["disabled_optimizers"] += _UNWANTED
    if provider in PLUGINS:
        settings.add_provider_for_devices(_devices(provider), dict(options.provider_options))
    else:
        arguments["providers"] = [(provider, dict(options.provider_options))]
    try:
        engine = _start(path, settings, arguments)
    except ArtifactError as error:
        _check_options(path, provider, options.provider_options, error)
        raise
    if engine.get_providers()[0] != provider:
        raise ProviderError(f"{provider} did not start; onnxruntime offered {engine.get_providers()} instead")
    return engine


def _check_options(path: Path, provider: str, given: Mapping[str, str], cause: ArtifactError) -> None:
    """Raise a ProviderError if a graph cannot be opened for an option that its provider does not have."""
    if not given or provider in PLUGINS:
        return
    try:
        plain = _start(path, onnxruntime.SessionOptions(), {"providers": [provider]})
    except ArtifactError:
        return  # the graph is at fault, or the provider
    known = plain.get_provider_options().get(provider, {})
    unknown = sorted(set(given) - set(known))
    if known and unknown:
        raise ProviderError(
            f"{provider} has no option {', '.join(unknown)}; it has {', '.join(sorted(known))}"
        ) from cause


# microsoft/onnxruntime#27916; without it threads spin for tens of milliseconds, unless they stop when a run ends
_SPINS_FOR_A_TIME = tuple(map(int, onnxruntime.__version__.split(".")[:2])) >= (1, 26)


def _settings(options: EngineOptions, fusion: Fusion) -> Any:
    _share_arena()
    settings = onnxruntime.SessionOptions()
    settings.intra_op_num_threads = options.threads or usable_cores()
    settings.inter_op_num_threads = 1
    settings.log_severity_level = 3
    # Both plan where tensors lie and double what runs compute in: worth it in shared mode only, see docs/memory.md.
    settings.enable_mem_pattern = settings.enable_mem_reuse = options.mode != "static"
    settings.add_session_config_entry("session.use_env_allocators", "1")
    # Threads that wait by spinning take the cores from other sessions. In shared mode the next run is mostly of this
    # session, and may come at once.
    settings.add_session_config_entry("session.intra_op.spin_duration_us", "1000")
    if options.mode == "static" or not _SPINS_FOR_A_TIME:
        settings.add_session_config_entry("session.force_spinning_stop", "1")
    if fusion.basic:
        settings.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_BASIC
    return settings


def _start(path: Path, settings: Any, arguments: Mapping[str, Any]) -> Any:
    try:
        engine = onnxruntime.InferenceSession(str(path), settings, enable_fallback=False, **arguments)
    except Exception as error:  # onnxruntime's own exceptions share no public base class
        raise ArtifactError(f"{path} cannot be loaded by onnxruntime: {error}") from error
    _alive.add(engine)
    return engine


# A session waits for its threads when it is destroyed. A forked child has the session but not the threads, and would
# wait for ever: there inherited sessions are never destroyed, not even at exit.
_alive: weakref.WeakSet[Any] = weakref.WeakSet()


def _keep_inherited() -> None:
    for engine in _alive:
        for inherited in (engine, engine._sess):
            ctypes.pythonapi.Py_IncRef(ctypes.py_object(inherited))


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_keep_inherited)


_lock = threading.Lock()
_registered: set[str] = set()


def _share_arena() -> None:
    """Let all sessions of the process take their memory for activations from one place."""
    with _lock:
        if CPU not in _registered:
            _registered.add(CPU)
            kind = onnxruntime.OrtAllocatorType.ORT_ARENA_ALLOCATOR
            place = onnxruntime.OrtMemoryInfo("Cpu", kind, 0, onnxruntime.OrtMemType.DEFAULT)
            onnxruntime.create_and_register_allocator(place, None)


def _devices(provider: str) -> list[Any]:
    """Return what a plugin provider can run on here.

    Raises:
        ProviderError: nothing.
    """
    with _lock:
        if provider not in _registered:
            package = importlib.import_module(PLUGINS[provider])
            try:
                onnxruntime.register_execution_provider_library(provider, package.get_library_path())
            except Exception as error:  # onnxruntime's own exceptions share no public base class
                raise ProviderError(f"the plugin of {provider} cannot be loaded: {error}; install it again") from error
            _registered.add(provider)
    every = onnxruntime.get_ep_devices()
    found = [device for device in every if device.ep_name == provider]
    if not found:
        raise ProviderError(
            f"{provider} is installed but finds nothing to run on among {sorted({d.device.vendor for d in every})}: "
            f'OpenVINO\'s plugin takes Intel processors only (microsoft/onnxruntime#31981); use "auto"'
        )
    return found


def installed_providers() -> list[str]:
    """Return the execution providers that onnxruntime has here, plugins included."""
    plugins = [name for name, package in PLUGINS.items() if importlib.util.find_spec(package)]
    runtime = [OPENVINO] if importlib.util.find_spec("openvino") else []
    return [*onnxruntime.get_available_providers(), *plugins, *runtime]


def versioned(provider: str) -> str:
    """Return a provider's name, with a version where that is not onnxruntime's."""
    try:
        return f"{provider}-{version(_PACKAGES[provider])}" if provider in _PACKAGES else provider
    except PackageNotFoundError:  # it is not installed, or not by pip: nobody knows its version
        return provider


def auto_providers() -> list[str]:
    """Return the providers that ``"auto"`` may choose instead of the CPU's: those installed that can run here."""
    found = [OPENVINO] if OPENVINO in installed_providers() and not left_behind() else []
    for name, package in PLUGINS.items():
        if importlib.util.find_spec(package):
            with contextlib.suppress(ProviderError):  # it finds nothing to run on
                found = [name] if _devices(name) else found
    return found


def resolve_provider(name: str) -> str:
    """Return the name of an installed execution provider; ``"auto"``, until ``preflight`` has chosen, is the CPU's.

    Raises:
        ProviderError: not installed; the message lists those that are.
    """
    if name == "auto":
        return CPU
    if name not in installed_providers():
        missing = f" (pip install hf-bucket[openvino] brings {name})" if name in (*PLUGINS, OPENVINO) else ""
        raise ProviderError(
            f'provider {name!r} is not installed{missing}; use "auto" or one of {", ".join(installed_providers())}'
        )
    return name
