"""The artifact: a folder with the weights once, the variants, a manifest, the tokenizer and the config."""

from __future__ import annotations

import ctypes
import errno
import hashlib
import json
import os
import secrets
import shutil
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from hf_bucket.errors import ArtifactError
from hf_bucket.ladder import Bucket
from hf_bucket.manifest import MANIFEST, FileRecord, Manifest

GRAPH = "model.onnx"
WEIGHTS = "model.onnx.data"


@dataclass(frozen=True, slots=True, kw_only=True)
class Artifact:
    """An artifact on disk whose files have been checked."""

    folder: Path
    manifest: Manifest

    def path(self, name: str) -> Path:
        """Return the path of one of the manifest's files.

        Raises:
            ArtifactError: the manifest does not list it.
        """
        if name not in self.manifest.files:
            raise ArtifactError(f"{self.folder} has no {name} in its manifest; compile the model again")
        return self.folder / name

    def variant(self, bucket: Bucket) -> Path:
        """Return the path of the graph specialised for ``bucket``."""
        return self.path(variant_name(bucket))

    def tokenizer_json(self) -> str:
        """Return the content of ``tokenizer.json``."""
        return self.path("tokenizer.json").read_text(encoding="utf-8")

    def truncation_side(self) -> Literal["left", "right"]:
        """Return the end that the tokenizer's author had texts cut at: ``"right"`` unless the tokenizer says left."""
        if "tokenizer_config.json" not in self.manifest.files:
            return "right"
        settings = json.loads(self.path("tokenizer_config.json").read_text(encoding="utf-8"))
        return "left" if settings.get("truncation_side") == "left" else "right"


def variant_name(bucket: Bucket) -> str:
    """Return the file name of a bucket's graph."""
    return f"model_{bucket.name}.onnx"


def is_artifact(folder: Path) -> bool:
    """Return whether a folder claims to be an artifact."""
    return (folder / MANIFEST).is_file()


def open_artifact(folder: str | os.PathLike[str]) -> Artifact:
    """Return the artifact in ``folder`` after comparing every file with its manifest.

    Raises:
        ArtifactError: the folder or the manifest is missing or unreadable, or a file is missing, truncated or altered;
            the message names the file.
    """
    root = Path(folder)
    try:
        text = (root / MANIFEST).read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ArtifactError(f"{root / MANIFEST} is not UTF-8 text ({error}); compile the model again") from error
    except OSError as error:
        reason = f"there is no {MANIFEST} in it" if root.is_dir() else "there is no such folder"
        raise ArtifactError(f"{root} is not an artifact: {reason} ({error}); compile the model first") from error
    manifest = Manifest.from_json(text)
    for name, expected in manifest.files.items():
        _check_file(root / name, expected)
    return Artifact(folder=root, manifest=manifest)


def _check_file(path: Path, expected: FileRecord) -> None:
    advice = "compile the model again, or copy the artifact again"
    try:
        size = path.stat().st_size
        sha256 = hash_file(path) if size == expected.size else ""
    except FileNotFoundError as error:
        raise ArtifactError(f"{path} is missing; {advice}") from error
    except OSError as error:
        raise ArtifactError(f"{path} cannot be read ({error.strerror}); {advice}") from error
    if size != expected.size:
        raise ArtifactError(f"{path} has {size} bytes, its manifest says {expected.size}; {advice}")
    if sha256 != expected.sha256:
        raise ArtifactError(f"{path} was altered: its sha256 is not the one in its manifest; {advice}")


def hash_file(path: Path) -> str:
    """Return the sha256 of a file in hexadecimal."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def record_files(folder: Path) -> dict[str, FileRecord]:
    """Return the records of all files in a folder but the manifest."""
    return {
        path.name: FileRecord(size=path.stat().st_size, sha256=hash_file(path))
        for path in sorted(folder.iterdir())
        if path.is_file() and path.name != MANIFEST
    }


def write_folder(target: Path, fill: Callable[[Path], None]) -> None:
    """Make a folder aside with ``fill``, then put it in the place of ``target`` in one step.

    Files in ``target`` that ``fill`` does not write and no manifest there lists are kept. Whatever happens before the
    last step, ``target`` is as it was; afterwards it is complete.

    Raises:
        ArtifactError: ``target`` is the working directory or a mount point, which cannot be exchanged.
        OSError: the disk is full, or the parent folder cannot be written.
    """
    target = target.resolve()
    if target == Path.cwd() or target.is_mount():
        raise ArtifactError(f"{target} is the working directory or a mount point; choose a folder inside it")
    target.parent.mkdir(parents=True, exist_ok=True)
    aside = target.with_name(f".{target.name}-{secrets.token_hex(8)}")
    aside.mkdir()
    try:
        fill(aside)
        if target.exists():
            _keep_foreign_files(target, aside)
            shutil.copymode(target, aside)
        _sync(aside)
        _put_in_place(aside, target)
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def copy_artifact(artifact: Artifact, folder: Path) -> Artifact:
    """Write a copy into ``folder``, as ``write_folder`` does, and return it; its files are nobody else's.

    Raises:
        ArtifactError: ``folder`` is a file, the working directory or a mount point.
    """
    if folder.is_file():
        raise ArtifactError(f"{folder} is a file; choose a folder")
    names = (*artifact.manifest.files, MANIFEST)
    write_folder(folder, lambda aside: link_files([artifact.folder / name for name in names], aside, copy=True))
    return Artifact(folder=folder, manifest=artifact.manifest)


def link_files(paths: Iterable[Path], folder: Path, *, copy: bool = False) -> None:
    """Give ``folder`` every file by hard link, so that weights lie on disk once; by copy where links cannot go.

    Args:
        copy: always copy: for folders of the user's, whose files may be changed.
    """
    place = shutil.copyfile if copy else _link
    for path in paths:
        place(path.resolve(), folder / path.name)


def _link(source: str | Path, target: str | Path) -> None:
    """Link a file, or a symbolic link itself; copy it where hard links cannot go."""
    try:
        os.link(source, target, follow_symlinks=False)
    except OSError as error:
        if error.errno not in (errno.EXDEV, errno.EPERM, errno.EMLINK, errno.ENOTSUP):
            raise
        shutil.copy2(source, target, follow_symlinks=False)


def _keep_foreign_files(old: Path, new: Path) -> None:
    listed = {MANIFEST}
    if is_artifact(old):
        try:
            listed |= set(Manifest.from_json((old / MANIFEST).read_text(encoding="utf-8")).files)
        except (ArtifactError, ValueError):
            listed |= {GRAPH, WEIGHTS}  # a damaged manifest is replaced; nothing else in its folder is touched
    for path in old.iterdir():
        if path.name in listed or (new / path.name).exists():
            continue
        if path.is_symlink() or not path.is_dir():
            _link(path, new / path.name)
        else:
            shutil.copytree(path, new / path.name, symlinks=True, copy_function=_link)


def _sync(folder: Path) -> None:
    """Have the folder's files on disk before its name says that they are."""
    for path in [*folder.iterdir(), folder]:
        if path.is_symlink() or not (path.is_file() or path == folder):
            continue
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def _put_in_place(aside: Path, target: Path) -> None:
    """Rename ``aside`` to ``target``; an old ``target`` ends up at ``aside``."""
    if not target.exists():
        aside.rename(target)
    elif not _exchange(aside, target):
        old = aside.with_name(f"{aside.name}-old")
        target.rename(old)
        try:
            aside.rename(target)
        except BaseException:
            old.rename(target)
            raise
        shutil.rmtree(old, ignore_errors=True)


def _exchange(first: Path, second: Path) -> bool:
    """Swap two folders in one step (renameat2 with RENAME_EXCHANGE); False where the system has no such call."""
    rename = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None) if os.name == "posix" else None
    if rename is None:
        return False
    at_cwd, exchange = -100, 2
    if rename(at_cwd, os.fsencode(first), at_cwd, os.fsencode(second), exchange) == 0:
        return True
    code = ctypes.get_errno()
    if code in (errno.ENOSYS, errno.EINVAL, errno.ENOTSUP):
        return False
    raise OSError(code, os.strerror(code), str(second))
