"""The cache of compiled models: one folder per model, in it one artifact per ladder."""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
import shutil
import tempfile
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from fnmatch import fnmatch
from multiprocessing.util import Finalize
from pathlib import Path

import filelock
from huggingface_hub import constants

from hf_bucket.artifact import Artifact, hash_file, is_artifact, open_artifact, remove_leftovers, write_folder
from hf_bucket.errors import ArtifactError, BucketError, BucketWarning
from hf_bucket.ladder import Ladder
from hf_bucket.manifest import MANIFEST, SCHEMA_VERSION

_MODEL_FILES = (
    "*.json",
    "*.txt",
    "*.model",
    "*.safetensors",
    "pytorch_model*.bin",
    "*.onnx",
    "*.onnx.data",
    "*.onnx_data",
)
MACHINES = "machine"  # folder of what fits one type of CPU only: packed weights, measured costs
_LOCK = "writing.lock"
_KEY = re.compile(r"[0-9a-f]{32}|[0-9a-f]{64}")  # of a model: the name of its folder


def cache_root() -> Path:
    """Return the folder of compiled models: ``HF_BUCKET_CACHE``, or ``hf_bucket`` under the Hugging Face home."""
    chosen = os.environ.get("HF_BUCKET_CACHE")
    return Path(chosen).expanduser() if chosen else Path(constants.HF_HOME) / "hf_bucket"


def in_cache(key: str, ladder: Ladder, fill: Callable[[Path], None]) -> Artifact:
    """Return the cache entry, filled if need be; without a usable cache, one that lasts as long as the process."""
    name = _entry_name(ladder)
    target = cache_root() / key / name
    with contextlib.suppress(ArtifactError, OSError):  # damaged, or out of reach: told of below
        if is_artifact(target):
            return open_artifact(target)  # from a cache that may only be read, too
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        # one for all ladders of a model: the second finds the first's export, and its weights, instead of its own
        with filelock.FileLock(target.with_name(_LOCK)):
            if is_artifact(target):
                try:
                    return open_artifact(target)
                except ArtifactError as error:
                    warnings.warn(f"compiling again: {error}", BucketWarning, stacklevel=2)
            _remove_leftovers()
            write_folder(target, fill)
            return open_artifact(target)
    except BucketError:
        raise
    except OSError as error:
        warn_unwritable(error)
    return _without_cache(name, fill)


def _entry_name(ladder: Ladder) -> str:
    return hashlib.sha256(str(ladder).encode()).hexdigest()[:16]


_unwritable: set[Path] = set()


def warn_unwritable(error: OSError) -> None:
    """Warn, once per process, that the cache cannot be written."""
    root = cache_root()
    if root not in _unwritable:
        _unwritable.add(root)
        warnings.warn(
            f"the cache {root} cannot be written ({error}); compiling without it, and packing weights and measuring "
            f"costs anew in every process. Set HF_BUCKET_CACHE to a folder with free space, or save the model",
            BucketWarning,
            stacklevel=3,
        )


def _without_cache(name: str, fill: Callable[[Path], None]) -> Artifact:
    """Return an artifact that lasts as long as the process."""
    try:
        folder = temporary_folder()
        write_folder(folder / name, fill)
    except BucketError:
        raise
    except OSError as error:
        raise ArtifactError(
            f"neither the cache {cache_root()} nor {tempfile.tempdir or 'a temporary folder'} can hold the compiled "
            f"model ({error}); free some space, or set HF_BUCKET_CACHE to a folder that has it"
        ) from error
    return open_artifact(folder / name)


def temporary_folder() -> Path:
    """Return a new folder that lasts as long as the process."""
    folder = Path(tempfile.mkdtemp(prefix="hf_bucket-"))
    # not atexit, which the children of multiprocessing skip; a forked child leaves its parent's folder alone
    Finalize(None, shutil.rmtree, [folder], {"ignore_errors": True}, exitpriority=0)
    return folder


def _remove_leftovers() -> None:
    """Remove what writers that were killed left anywhere in the cache."""
    for folder in cache_root().iterdir():
        if folder.is_dir():
            remove_leftovers(folder)


def _whole_entries(pattern: str, root: Path) -> list[Path]:
    """Return the folders with a manifest; hidden ones are still being written, or were when their writer was killed."""
    found = sorted(path.parent for path in root.glob(f"{pattern}/{MANIFEST}"))
    return [folder for folder in found if not folder.name.startswith(".")]


def model_key(folder: Path, options: Sequence[str]) -> str:
    """Return a key that changes with any file of the model in ``folder`` and with any of ``options``."""
    digest = hashlib.sha256(repr([SCHEMA_VERSION, *options]).encode())
    for path in sorted(folder.iterdir()):
        if path.is_file() and any(fnmatch(path.name, pattern) for pattern in _MODEL_FILES):
            digest.update(f"{path.name}:{hash_file(path)};".encode())
    return digest.hexdigest()[:32]


def any_ladder(key: str, besides: Ladder | None = None) -> Artifact | None:
    """Return an artifact of the model with this key, whatever its ladder but ``besides``; None if there is none."""
    folder = cache_root() / key
    for candidate in _whole_entries("*", folder):
        if besides is not None and candidate.name == _entry_name(besides):
            continue
        try:
            return open_artifact(candidate)
        except ArtifactError as error:
            warnings.warn(f"ignoring a damaged cache entry: {error}", BucketWarning, stacklevel=2)
    return None


@dataclass(frozen=True, slots=True, kw_only=True)
class Entry:
    """One compiled model in the cache.

    Attributes:
        model: name it was compiled from; empty where the entry is damaged.
        problem: why it cannot be used; empty where it can.
        size: bytes of its files; artifacts of one model share their weights, so the sum is more than the disk holds.
    """

    folder: Path
    model: str
    ladder: str
    size: int
    problem: str


def entries() -> list[Entry]:
    """Return what the cache holds, every file checked."""
    return [_entry(folder) for folder in _whole_entries("*/*", cache_root())]


def _entry(folder: Path) -> Entry:
    size = sum(path.stat().st_size for path in folder.iterdir() if path.is_file())
    try:
        manifest = open_artifact(folder).manifest
    except ArtifactError as error:
        return Entry(folder=folder, model="", ladder="", size=size, problem=str(error))
    return Entry(folder=folder, model=manifest.source["name"], ladder=str(manifest.ladder), size=size, problem="")


def clear() -> int:
    """Remove all that hf_bucket keeps in the cache, what killed writers left too; return how many models there were.

    Raises:
        OSError: a folder cannot be removed.
    """
    root = cache_root()
    found = _whole_entries("*/*", root)
    if (root / MACHINES).is_dir():
        shutil.rmtree(root / MACHINES)
    models = [folder for folder in root.iterdir() if _KEY.fullmatch(folder.name)] if root.is_dir() else []
    for folder in {*(entry.parent for entry in found), *models}:
        shutil.rmtree(folder)
    return len(found)
