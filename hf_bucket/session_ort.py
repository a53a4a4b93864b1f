"""Sessions on onnxruntime: one dynamic graph behind all buckets (``shared``) or one graph per bucket (``static``).

On the CPU provider both run the graph whose weights are packed for this machine already, in one file that every session
maps into memory: however many sessions there are, the weights are there once.
"""

from __future__ import annotations

import contextlib
import ctypes
import hashlib
import importlib
import importlib.util
import os
import sys
import threading
import weakref
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Literal, get_args

import onnxruntime

from hf_bucket.artifact import GRAPH, WEIGHTS, Artifact
from hf_bucket.batch import Array, in_float32
from hf_bucket.errors import ArtifactError, ProviderError
from hf_bucket.fusions import OWN, Fusion, get_fusion
from hf_bucket.ladder import Bucket
from hf_bucket.machine import machine_folder, made_once, usable_cores
from hf_bucket.session import Session
from hf_bucket.session_cuda import CudaEngine, RecordedSession
from hf_bucket.session_openvino import left_behind, open_openvino

Mode = Literal["shared", "static", "auto"]

CPU = "CPUExecutionProvider"
CUDA = "CUDAExecutionProvider"
OPENVINO = "openvino"  # OpenVINO's own runtime; "OpenVINOExecutionProvider" is the same inside onnxruntime

_ONNXRUNTIME = tuple(map(int, onnxruntime.__version__.split(".")[:2]))

# What a provider is told unless the user says otherwise: by itself CUDA rounds float32 to 10 bits (TF32) before it
# multiplies, which moved logits of MiniLM by 5e-3.
_EXACT: dict[str, dict[str, str]] = {CUDA: {"use_tf32": "0"}}

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
            session of its own, with fixed shapes; ``"auto"`` is static where that is faster and fits (``settle``).
        provider: an onnxruntime execution provider by name, or ``"auto"``.
        provider_options: passed to the provider as they are; onnxruntime's CPU provider has none.
        threads: threads one run may use; 0 means every core this process may use for a request of a few batches, and
            one for each of many batches that run at once.
        workers: batches of one request that run at once; 0 means as many as the cores allow, and one on a provider
            other than the CPU's and OpenVINO. On CUDA there are no more.
        provider_of_many: runs many batches at once where that is another than ``provider``: what ``"auto"`` can become.
    """

    mode: Mode = "shared"
    provider: str = "auto"
    provider_options: Mapping[str, str] = field(default_factory=dict)
    threads: int = 0
    workers: int = 0
    provider_of_many: str | None = None

    def __post_init__(self) -> None:
        if self.mode not in get_args(Mode):
            raise ProviderError(f'mode must be "shared", "static" or "auto", got {self.mode!r}')
        if self.provider_options and self.provider in ("auto", CPU):
            given = ", ".join(sorted(self.provider_options))
            raise ProviderError(
                f"provider {self.provider!r} takes no provider_options, got {given}; "
                f"name the provider they are for: one of {', '.join(installed_providers())}"
            )
        named = "auto" not in (self.provider, self.provider_of_many)
        if self.provider_of_many and (not named or self.provider_options):
            raise ProviderError("provider_of_many needs a provider by name, and no provider_options")
        if self.provider == CUDA and "enable_cuda_graph" in self.provider_options:
            raise ProviderError('enable_cuda_graph is what mode="static" does on CUDA; leave the option out')
        if self.provider == CUDA and isinstance(self.workers, int) and self.workers > 1:
            raise ProviderError(f"CUDA runs one batch after another; leave workers out, which was {self.workers}")
        if self.provider == CUDA and not str(self.provider_options.get("device_id", "0")).isdecimal():
            raise ProviderError(f"device_id must be the number of a GPU, got {self.provider_options['device_id']!r}")
        for name, zero in (("threads", "every core"), ("workers", "as many as the cores allow")):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < 0:
                raise ProviderError(f"{name} must be 0 ({zero}) or a positive number, got {value!r}")

    def for_many_batches(self) -> EngineOptions:
        """Return the options of sessions that several workers use at once, and how many workers there are."""
        threads, provider = self.threads or 1, self.provider_of_many or self.provider
        on_cpu = resolve_provider(provider) in (CPU, OPENVINO)
        workers = self.workers or (max(1, usable_cores() // threads) if on_cpu else 1)
        threads = threads if workers > 1 else self.threads
        return replace(self, provider=provider, provider_of_many=None, workers=workers, threads=threads)


@dataclass(frozen=True, slots=True)
class OrtSession:
    """One bucket of an onnxruntime session, which other buckets may share."""

    bucket: Bucket
    engine: Any
    output_names: tuple[str, ...]

    def run(self, arrays: Mapping[str, Array]) -> dict[str, Array]:
        """Return every output; half-precision logits come back as float32."""
        outputs = self.engine.run(self.output_names, dict(arrays))
        return in_float32(dict(zip(self.output_names, outputs, strict=True)))

    def close(self) -> None:
        """End the thread of a CUDA engine; the engine itself goes when the last bucket that uses it is dropped."""
        if isinstance(self.engine, CudaEngine):
            self.engine.close()


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
        return open_recorded(artifact, options)
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


# Operators that tell the host how large their result is, while they run: a replay tells no one. As they lie in a file.
_NOT_RECORDED = {bytes([34, len(name)]) + name.encode(): name for name in ("NonZero", "Compress", "Unique")}


def open_recorded(artifact: Artifact, options: EngineOptions) -> dict[Bucket, Session]:
    """Return sessions that replay one CUDA graph each; they share the weights and the memory they compute in.

    Raises:
        ProviderError: the model cannot be recorded.
    """
    path, refused = artifact.path(GRAPH), 'in static mode, as CUDA graphs, {}; use mode="shared"'
    if _ONNXRUNTIME < (1, 31):  # a replay of GatherND reads memory that is gone: microsoft/onnxruntime#32120
        raise ProviderError(refused.format(f"{CUDA} needs onnxruntime 1.31, here is {onnxruntime.__version__}"))
    graph = path.read_bytes()
    for encoded, operator in _NOT_RECORDED.items():
        if encoded in graph:
            raise ProviderError(refused.format(f"{CUDA} cannot run this model, which has the operator {operator}"))
    try:
        engine = open_graph(path, replace(options, mode="shared"), cuda_graphs=True)
    except ProviderError as error:
        if "graph capture" not in str(error):
            raise
        raise ProviderError(refused.format(f"{CUDA} cannot run this model, part of which stays on the CPU")) from error
    return {bucket: RecordedSession(bucket, engine) for bucket in artifact.manifest.ladder}


def _output_names(artifact: Artifact) -> tuple[str, ...]:
    return tuple(spec.name for spec in artifact.manifest.signature.outputs)


Engine = Callable[[Artifact, EngineOptions], Mapping[Bucket, Session]]
Dynamic = Callable[[Artifact, EngineOptions, Mapping[Bucket, Session]], Callable[[Bucket], Session]]


def open_graph(
    path: Path,
    options: EngineOptions,
    *,
    bucket: Bucket | None = None,
    fusion: Fusion = OWN,
    cuda_graphs: bool = False,
) -> Any:
    """Return an onnxruntime ``InferenceSession`` on one graph, or what has its ``run``.

    Args:
        bucket: fixes the free dimensions of a graph that has them.
        fusion: what onnxruntime may make of it.
        cuda_graphs: record runs, and replay them: see ``session_cuda``.

    Raises:
        ProviderError: the provider is not available here, or cannot run this graph.
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
        given = {**_EXACT.get(provider, {}), **options.provider_options}
        arguments["providers"] = [(provider, {**given, "enable_cuda_graph": "1"} if cuda_graphs else given)]

    def start() -> Any:
        try:
            session = _start(path, settings, arguments)
        except ArtifactError as error:
            _check_provider(path, provider, options.provider_options, error)
            raise
        if session.get_providers()[0] != provider:
            found, hint = session.get_providers(), '; "onnxruntime-gpu[cuda,cudnn]" has what it needs'
            raise ProviderError(f"{provider} did not start: {found} did{hint if provider == CUDA else ''}")
        return session

    if provider != CUDA:
        return start()
    _prepare_cuda()
    return CudaEngine(start, device_id=int(options.provider_options.get("device_id", "0")))


def _check_provider(path: Path, provider: str, given: Mapping[str, str], cause: ArtifactError) -> None:
    """Raise a ProviderError if a graph cannot be opened for its provider or the options, and not for itself."""

    def opened_by(name: str) -> Any:
        settings = onnxruntime.SessionOptions()
        settings.log_severity_level = 3
        device = {key: value for key, value in given.items() if key == "device_id" and name == CUDA}
        try:
            return _start(path, settings, {"providers": [(name, device)]})
        except ArtifactError:
            return None

    if provider == CPU or opened_by(CPU) is None:
        return  # the graph is at fault
    plain = opened_by(provider) if given and provider not in PLUGINS else None
    known = set() if plain is None else set(plain.get_provider_options().get(provider, ())) - {"enable_cuda_graph"}
    unknown = sorted(set(given) - known)
    if known and unknown:
        raise ProviderError(
            f"{provider} has no option {', '.join(unknown)}; it has {', '.join(sorted(known))}"
        ) from cause
    with_options = f" with {dict(given)}" if given else ""
    raise ProviderError(f"{provider}{with_options} cannot open a graph that {CPU} can: {cause}") from cause


# microsoft/onnxruntime#27916; without it threads spin for tens of milliseconds, unless they stop when a run ends
_SPINS_FOR_A_TIME = _ONNXRUNTIME >= (1, 26)


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
    global _cuda_stayed, _lock
    _cuda_stayed, _lock = _cuda_stayed or _cuda_was_used, threading.Lock()
    for engine in _alive:
        for inherited in (engine, engine._sess):
            ctypes.pythonapi.Py_IncRef(ctypes.py_object(inherited))


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_keep_inherited)


_cuda_was_used = False
_cuda_stayed = False  # whether a parent of this process had used CUDA before it forked


def _prepare_cuda() -> None:
    """Find the libraries that onnxruntime's CUDA provider needs, where NVIDIA's packages brought them.

    Raises:
        ProviderError: this process was forked from one that used CUDA.
    """
    global _cuda_was_used
    if _cuda_stayed:
        raise ProviderError(
            "CUDA was used before this process was forked, or tried, and does not survive that; "
            'start processes with "spawn", or load the model in them only, or use provider="auto"'
        )
    with _lock:
        first, _cuda_was_used = not _cuda_was_used, True
        if first and hasattr(onnxruntime, "preload_dlls"):  # onnxruntime has it from 1.21 on
            with contextlib.redirect_stdout(sys.stderr):  # it prints what it does not find
                onnxruntime.preload_dlls()


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


def named(options: EngineOptions) -> str:
    """Return a name of the providers and their options, for what was measured with them."""
    given = hashlib.sha256(repr(sorted(options.provider_options.items())).encode()).hexdigest()[:8]
    many = f"-{versioned(options.provider_of_many)}" if options.provider_of_many else ""
    return f"{versioned(resolve_provider(options.provider))}{many}{f'-{given}' if options.provider_options else ''}"


def in_use(options: EngineOptions) -> str:
    """Return a name of how many threads and workers run, for what was measured with them."""
    many, cores = options.for_many_batches(), usable_cores()
    return f"{options.threads or cores}-{many.threads or cores}x{many.workers}"


def auto_provider() -> str | None:
    """Return the provider that ``"auto"`` may choose instead of the CPU's: a plugin before OpenVINO's own runtime.

    None where none is installed, or can run here.
    """
    for name, package in PLUGINS.items():
        if importlib.util.find_spec(package):
            with contextlib.suppress(ProviderError):  # it finds nothing to run on
                _devices(name)
                return name
    return OPENVINO if OPENVINO in installed_providers() and not left_behind() else None


def resolve_provider(name: str) -> str:
    """Return the name of an installed execution provider; ``"auto"``, until ``settle`` has chosen, is the CPU's.

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
