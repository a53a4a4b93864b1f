"""Where a model comes from: a local folder or the Hugging Face Hub. ``Hub`` is the one seam that fetches."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import huggingface_hub
from huggingface_hub import constants
from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError, HFValidationError
from huggingface_hub.errors import HTTPError as TransportError  # type: ignore[attr-defined]  # httpx's or httpx2's

from hf_bucket.errors import ModelError

SMALL_FILES = ("*.json", "*.txt", "*.model", "*.jinja")
CHECKPOINT_FILES = ("*.safetensors", "*.safetensors.index.json")
LEGACY_CHECKPOINT_FILES = ("pytorch_model*.bin", "pytorch_model*.bin.index.json")
GRAPH_PATHS = ("model.onnx", "onnx/model.onnx")

DEFAULT_MODEL = "default"  # as a name: the small classifier that comes with the package
_DEFAULT_FOLDER = Path(__file__).with_name("default")


@dataclass(frozen=True, slots=True, kw_only=True)
class Source:
    """What to load, in the terms of ``from_pretrained``.

    Attributes:
        name: a local folder, a Hub id such as ``org/model``, or ``DEFAULT_MODEL``.
        revision: branch, tag or commit; None is the default branch.
        subfolder: folder inside the repository that holds the model.
        token: Hub token; None uses the logged-in one, False none.
        cache_dir: root of the Hub cache; None is the library's own.
        local_files_only: never ask the network.
        trust_remote_code: run model code that comes with the repository.
    """

    name: str
    revision: str | None = None
    subfolder: str = ""
    token: str | bool | None = None
    cache_dir: str | None = None
    local_files_only: bool = False
    trust_remote_code: bool = False


class Hub(Protocol):
    """What is asked of the Hub."""

    def files(self, source: Source) -> list[str]:
        """Return the paths of all files in the repository at that revision."""

    def download(self, source: Source, patterns: Sequence[str]) -> Path:
        """Return the local folder of that revision after fetching the files that match ``patterns``."""


@dataclass(frozen=True, slots=True)
class HubClient:
    """The real Hub, through ``huggingface_hub``; what is cached locally serves when the network may not be asked."""

    def files(self, source: Source) -> list[str]:
        """Return the paths of all files in the repository at that revision."""
        if not source.local_files_only and not constants.HF_HUB_OFFLINE:
            try:
                api = huggingface_hub.HfApi(token=source.token)
                return list(api.list_repo_files(source.name, revision=source.revision))
            except HfHubHTTPError:
                raise
            except TransportError:
                pass  # no connection: the cache may hold the model
        folder = self.download(source, [])  # with patterns, a snapshot that lacks any match would be refused
        return [path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()]

    def download(self, source: Source, patterns: Sequence[str]) -> Path:
        """Return the local folder of that revision after fetching the files that match ``patterns``."""
        return Path(
            huggingface_hub.snapshot_download(
                source.name,
                revision=source.revision,
                token=source.token,
                cache_dir=source.cache_dir,
                local_files_only=source.local_files_only,
                allow_patterns=list(patterns),
            )
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Files:
    """A model's files on this machine.

    Attributes:
        folder: holds config and tokenizer, and what ``kind`` says.
        kind: ``"artifact"`` (compiled), ``"checkpoint"`` (weights) or ``"onnx"`` (a graph with free dimensions).
        graph: the graph, for ``"onnx"``.
    """

    folder: Path
    kind: str
    graph: Path | None = None


def locate(source: Source, *, export: bool | None, manifest: str, hub: Hub | None = None) -> Files:
    """Return the files of a model, fetching them from the Hub if its name is no local folder.

    Args:
        export: True insists on the checkpoint, False on an existing graph; None prefers an artifact, then a
            checkpoint, then a graph.
        manifest: file name that marks an artifact.
        hub: stands in for the real Hub.

    Raises:
        ModelError: no such folder or repository, or nothing in it that can be run.
    """
    root = local_path(source.name)
    if source.name and os.path.isdir(root):
        folder = root / source.subfolder
        paths = [path for place in (folder, folder / "onnx") if place.is_dir() for path in place.iterdir()]
        names = [path.relative_to(root).as_posix() for path in paths if path.is_file()]
        return _classify(root, names, source, export, manifest)
    if root.is_absolute() or source.name.startswith((".", "~")) or source.name.count("/") > 1 or os.path.exists(root):
        raise ModelError(f"{source.name!r} is not a folder; expected a model folder or a Hub id such as org/model")
    try:
        return _fetch(source, export, manifest, HubClient() if hub is None else hub)
    except (OSError, TransportError, HFValidationError, EntryNotFoundError) as error:
        reason = next(iter(str(error).splitlines()), "no reason given")
        raise ModelError(
            f"{source.name!r} is neither a local folder nor to be had from the Hub at revision "
            f"{source.revision or 'main'} ({type(error).__name__}: {reason}); "
            f"check the name, the token and the network"
        ) from error


def local_path(name: str) -> Path:
    """Return where a model called ``name`` would lie on this machine; a folder called default is ``./default``."""
    return _DEFAULT_FOLDER if name == DEFAULT_MODEL else Path(os.path.expanduser(name))


def locate_tokenizer(source: Source, *, hub: Hub | None = None) -> Path:
    """Return the ``tokenizer.json`` of a model, fetching no weights.

    Raises:
        ModelError: no such model, or it has no ``tokenizer.json``.
    """
    root = local_path(source.name)
    if not root.is_dir():
        try:
            root = (HubClient() if hub is None else hub).download(source, SMALL_FILES)
        except (OSError, TransportError, HFValidationError, EntryNotFoundError) as error:
            raise ModelError(f"{source.name!r} is no local folder and cannot be had from the Hub ({error})") from error
    path = root / source.subfolder / "tokenizer.json"
    if not path.is_file():
        raise ModelError(f"{source.name} has no tokenizer.json; choose a model with a fast tokenizer")
    return path


def _fetch(source: Source, export: bool | None, manifest: str, hub: Hub) -> Files:
    prefix = _prefix(source)
    names = hub.files(source)
    kind, weights = _kind(names, prefix, source, export, manifest)
    patterns = [
        prefix + pattern for pattern in ((*SMALL_FILES, "*.onnx", "*.onnx.data") if kind == "artifact" else SMALL_FILES)
    ]
    if kind == "onnx":
        patterns += [weights, f"{weights}*data"]
    elif kind == "checkpoint":
        here = [name[len(prefix) :] for name in names if name.startswith(prefix)]
        safetensors = any("/" not in name and name.endswith(".safetensors") for name in here)
        patterns += [prefix + pattern for pattern in (CHECKPOINT_FILES if safetensors else LEGACY_CHECKPOINT_FILES)]
        patterns += ["*.py"] if source.trust_remote_code else []
    return _classify(hub.download(source, patterns), names, source, export, manifest)


def _classify(root: Path, names: Sequence[str], source: Source, export: bool | None, manifest: str) -> Files:
    prefix = _prefix(source)
    kind, graph = _kind(names, prefix, source, export, manifest)
    return Files(folder=root / source.subfolder, kind=kind, graph=root / graph if kind == "onnx" else None)


def _prefix(source: Source) -> str:
    """Return what the paths of the subfolder's files start with."""
    subfolder = source.subfolder.rstrip("/")
    return f"{subfolder}/" if subfolder else ""


def _kind(names: Sequence[str], prefix: str, source: Source, export: bool | None, manifest: str) -> tuple[str, str]:
    """Return the kind of model and, for a graph, its path in the repository."""
    here = {name[len(prefix) :] for name in names if name.startswith(prefix)}
    graphs = [prefix + path for path in GRAPH_PATHS if path in here]
    checkpoint = any(
        "/" not in name
        and (name.endswith(".safetensors") or (name.startswith("pytorch_model") and name.endswith(".bin")))
        for name in here
    )
    if manifest in here and export is None:
        return "artifact", ""
    if checkpoint and export is not False:
        return "checkpoint", ""
    if graphs and export is not True:
        return "onnx", graphs[0]
    wanted = {True: "weights (*.safetensors)", False: " or ".join(GRAPH_PATHS), None: f"weights, a graph or {manifest}"}
    found = ", ".join(sorted(here)[:8]) or "nothing"
    where = f"{source.name}{os.sep + source.subfolder if source.subfolder else ''}"
    raise ModelError(f"{where} holds no {wanted[export]}; found: {found}")
