"""Before sessions are opened: what they take of the memory, and how ways of running are tried."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path

from hf_bucket import memory
from hf_bucket.artifact import Artifact
from hf_bucket.costs import Batches, Clock, key_of
from hf_bucket.encode import Encoder
from hf_bucket.errors import InputError
from hf_bucket.machine import available_bytes, machine_folder
from hf_bucket.memory import Footprint, footprint
from hf_bucket.probes import sampler
from hf_bucket.session_ort import CPU, CUDA, Engine, EngineOptions, in_use, open_sessions, resolve_provider


def check_memory_bytes(value: object) -> None:
    """Raise an InputError for a limit that is none."""
    if value is not None and (not isinstance(value, int) or isinstance(value, bool) or value < 1):
        raise InputError(f"memory_bytes must be a number of bytes of at least 1, or None for all; got {value!r}")


def takes(artifact: Artifact, options: EngineOptions) -> Footprint:
    """Return what running an artifact with these options takes."""
    many = options.for_many_batches()
    providers = [resolve_provider(use.provider) for use in ([options] if many.workers == 1 else [options, many])]
    # on CUDA all buckets run one session in static mode too
    mode: memory.Mode = "static" if options.mode == "static" and CUDA not in providers else "shared"
    each = len(artifact.manifest.ladder) if mode == "static" else 1
    copies, sets = each * sum(provider != CPU for provider in providers), len(providers)
    return footprint(artifact.manifest, mode=mode, at_once=many.workers, sets=sets, copies=copies)


@dataclass(frozen=True, slots=True, kw_only=True)
class Trial:
    """How ways of running a ladder are compared.

    Attributes:
        budget_s: seconds to spend, about, where this machine has not compared them yet; 0 measures nothing.
        available: bytes of memory there are; None is plenty.
        engine: makes the sessions.
        batches: makes what a bucket runs on; None is a row that looks like a text.
        again: compare even though the cache has figures for this ladder.
    """

    budget_s: float
    available: int | None
    engine: Engine = open_sessions
    batches: Batches | None = None
    again: bool = False
    clock: Clock = time.perf_counter


def room(memory_bytes: int | None) -> int | None:
    """Return the bytes of memory that may be taken: those given, or what the machine has; None where nobody knows."""
    return available_bytes() if memory_bytes is None else memory_bytes


def figures_path(artifact: Artifact, options: EngineOptions, what: str) -> Path:
    """Return the file of this machine's cache for what trying ways of running a ladder found."""
    return machine_folder(artifact.graph_sha256()) / f"{what}-{in_use(options)}-{key_of(artifact.manifest.ladder)}.json"


def texts_of(artifact: Artifact, trial: Trial) -> Batches:
    """Return what makes the batches that a trial runs."""
    manifest = artifact.manifest
    if trial.batches is not None:
        return trial.batches
    encoder = Encoder(artifact.tokenizer_json(), inputs=manifest.signature.input_names)
    return sampler(encoder, manifest.signature, manifest.vocab_size)
