"""The artifact: a folder with the weights once, the variants, a manifest, the tokenizer and the config."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import hashlib
import json
import os
import re
import secrets
import shutil
import stat
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from hf_bucket.errors import ArtifactError
from hf_bucket.ladder import Bucket
from hf_bucket.manifest import MANIFEST, FileRecord, Manifest
from hf_bucket.tasks import TASKS
from hf_bucket.weights import check_external_data

try:
    import fcntl
except ImportError:  # no such locks on Windows
    fcntl = None  # type: ignore[assignment]

GRAPH = "model.onnx"
WEIGHTS = "model.onnx.data"

_LARGEST_MANIFEST = 16 << 20  # bytes; real ones have a few thousand
_ADVICE = "compile the model again, or copy the artifact again"

# What a killed writer leaves beside its target: ``.model-<16 digits>``, the new folder or the exchanged old one, and
# ``...-old`` where two renames stand in for an exchange.
_LEFTOVER = re.compile(r"\.(?P<name>.+)-[0-9a-f]{16}(?P<moved>-old)?", re.DOTALL)
_ABANDONED_S = 3600.0
_MOST_CELLS = 1 << 24  # of one bucket: 128 MB for every input; real ones have some thousands
_RENAME_ATTEMPTS = 1000


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

    def graph_sha256(self) -> str:
        """Return a digest of the graph with free dimensions and its weights."""
        files = [self.manifest.files[name].sha256 for name in (GRAPH, WEIGHTS) if name in self.manifest.files]
        return hashlib.sha256("".join(files).encode()).hexdigest()

    def tokenizer_json(self) -> str:
        """Return the content of ``tokenizer.json``.

        Raises:
            ArtifactError: it is missing, or another than when the artifact was opened.
        """
        return self._read("tokenizer.json")

    def truncation_side(self) -> Literal["left", "right"]:
        """Return the end that the tokenizer's author had texts cut at: ``"right"`` unless the tokenizer says left."""
        if "tokenizer_config.json" not in self.manifest.files:
            return "right"
        try:
            settings = json.loads(self._read("tokenizer_config.json"))
        except (ValueError, RecursionError) as error:
            raise ArtifactError(f"tokenizer_config.json cannot be read ({error}); {_ADVICE}") from error
        side = settings.get("truncation_side") if isinstance(settings, dict) else None
        return "left" if side == "left" else "right"

    def check_unchanged(self) -> None:
        """Return if the folder still has the manifest of this artifact's files; the files themselves are not read.

        Raises:
            ArtifactError: the folder is gone, or another artifact was written in its place.
        """
        try:
            same = Manifest.from_json(_read_manifest(self.folder)).files == self.manifest.files
        except ArtifactError as error:
            raise ArtifactError(f"{self.folder} changed since it was opened: {error}") from error
        if not same:
            raise ArtifactError(f"{self.folder} holds another artifact than when it was opened; load the model again")

    def _read(self, name: str) -> str:
        """Return the text of a small file, checked again: it may be read long after the artifact was opened."""
        path = self.path(name)
        _check_file(path, self.manifest.files[name])
        return path.read_text(encoding="utf-8")


def variant_name(bucket: Bucket) -> str:
    """Return the file name of a bucket's graph."""
    return f"model_{bucket.name}.onnx"


def is_artifact(folder: Path) -> bool:
    """Return whether a folder claims to be an artifact."""
    return (folder / MANIFEST).is_file()


def open_artifact(folder: str | os.PathLike[str]) -> Artifact:
    """Return the artifact in ``folder`` after comparing every file with its manifest.

    Raises:
        ArtifactError: the folder or the manifest is missing or unreadable; a file is missing, truncated or altered; or
            a graph keeps its weights outside the folder. The message names the file.
    """
    root = Path(folder).absolute()  # it is read again later, when the working directory may be another
    if not root.exists():
        _put_back_moved(root)
    content = _read_manifest(root)
    try:
        manifest = Manifest.from_json(content)
    except ArtifactError as error:
        raise ArtifactError(f"{root}: {error}") from error
    _check_sense(root, manifest)
    for name, expected in manifest.files.items():
        _check_file(root / name, expected)
        loose = check_external_data(root / name) - manifest.files.keys() if name.endswith(".onnx") else ()
        if loose:
            raise ArtifactError(
                f"{root / MANIFEST} does not list {min(loose)}, which {name} takes its weights from; {_ADVICE}"
            )
    return Artifact(folder=root, manifest=manifest)


def _check_sense(root: Path, manifest: Manifest) -> None:
    """Raise an ArtifactError for values that are well-formed but cannot be: somebody wrote them by hand."""
    longest, vocabulary = manifest.ladder.max_length, manifest.vocab_size
    known = {name for task in TASKS for name in task.pad_ids}
    wrong = {
        f"a bucket of {bucket.cells} cells, expected at most {_MOST_CELLS}": bucket.cells > _MOST_CELLS
        for bucket in manifest.ladder
    }
    limit = longest if manifest.max_length is None else manifest.max_length
    wrong[f"max_length {limit} and a bucket of {longest} tokens"] = longest > limit
    wrong["no labels"] = not manifest.labels
    for spec in manifest.signature.inputs:
        wrong[f"an input {spec.name!r}, expected one of {', '.join(sorted(known))}"] = spec.name not in known
        wrong[f"input {spec.name} of {spec.dtype}, expected int64 or int32"] = spec.dtype not in ("int64", "int32")
        if spec.name == "input_ids" and vocabulary is not None:
            outside = not 0 <= spec.pad_id < vocabulary
            wrong[f"vocab_size {vocabulary} and pad_id {spec.pad_id} of input_ids"] = outside
    for what, so in wrong.items():
        if so:
            raise ArtifactError(f"{root / MANIFEST} has {what}; do not trust it, or compile the model again")


def _read_manifest(root: Path) -> str:
    path = root / MANIFEST
    try:
        size = _regular_size(path)
        text = path.read_text(encoding="utf-8") if size <= _LARGEST_MANIFEST else None
    except UnicodeDecodeError as error:
        raise ArtifactError(f"{path} is not UTF-8 text ({error}); compile the model again") from error
    except OSError as error:
        reason = f"there is no {MANIFEST} in it" if root.is_dir() else "there is no such folder"
        raise ArtifactError(f"{root} is not an artifact: {reason} ({error}); compile the model first") from error
    if text is None:
        raise ArtifactError(f"{path} has {size} bytes, expected at most {_LARGEST_MANIFEST}; do not trust it")
    return text


def _regular_size(path: Path) -> int:
    """Return the size of a file in bytes; pipes and devices, which could be read for ever, are an OSError."""
    status = path.stat()
    if not stat.S_ISREG(status.st_mode):
        raise OSError(errno.EINVAL, "it is not a regular file", str(path))
    return status.st_size


def _check_file(path: Path, expected: FileRecord) -> None:
    try:
        size = _regular_size(path)
        sha256 = hash_file(path) if size == expected.size else ""
    except FileNotFoundError as error:
        raise ArtifactError(f"{path} is missing; {_ADVICE}") from error
    except OSError as error:
        raise ArtifactError(f"{path} cannot be read ({error.strerror}); {_ADVICE}") from error
    if size != expected.size:
        raise ArtifactError(f"{path} has {size} bytes, its manifest says {expected.size}; {_ADVICE}")
    if sha256 != expected.sha256:
        raise ArtifactError(f"{path} was altered: its sha256 is not the one in its manifest; {_ADVICE}")


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
    last step, ``target`` is as it was; afterwards it is complete. Several may write one target: the last one stays.
    What earlier writers left when they were killed is removed.

    Raises:
        ArtifactError: ``target`` is the working directory or a mount point, which cannot be exchanged.
        OSError: the disk is full, or the parent folder cannot be written.
    """
    target = target.resolve()
    if target == Path.cwd() or target.is_mount():
        raise ArtifactError(f"{target} is the working directory or a mount point; choose a folder inside it")
    target.parent.mkdir(parents=True, exist_ok=True)
    remove_leftovers(target.parent, target.name)
    with _folder_aside(target) as aside:
        fill(aside)
        _take_over(target, aside)
        _sync(aside)
        _put_in_place(aside, target)
        with contextlib.suppress(OSError):  # some systems cannot sync a folder; the new artifact is in place already
            _sync_one(target.parent)


def copy_artifact(artifact: Artifact, folder: Path) -> Artifact:
    """Write a copy into ``folder``, as ``write_folder`` does, and return it; its files are nobody else's.

    Raises:
        ArtifactError: ``folder`` is a file, the working directory or a mount point; the disk is full; or the artifact
            changed since it was opened. What was in ``folder`` is still there.
    """
    if folder.is_file():
        raise ArtifactError(f"{folder} is a file; choose a folder")
    names = (*artifact.manifest.files, MANIFEST)

    def fill(aside: Path) -> None:
        artifact.check_unchanged()
        link_files([artifact.folder / name for name in names], aside, copy=True)
        try:
            open_artifact(aside)  # never a bad copy over a good one
        except ArtifactError as error:
            raise ArtifactError(f"{artifact.folder} changed since it was opened; load it again ({error})") from error

    try:
        write_folder(folder, fill)
    except ArtifactError:
        raise
    except OSError as error:
        raise ArtifactError(f"{folder} cannot be written: {_reason(error, artifact, folder)}") from error
    return Artifact(folder=folder.absolute(), manifest=artifact.manifest)


def _reason(error: OSError, artifact: Artifact, folder: Path) -> str:
    """Return why an artifact could not be saved, and the room it needs where there was too little."""
    if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        return f"{error}; what was there is unchanged; choose another folder"
    needed = sum(record.size for record in artifact.manifest.files.values())
    parents = [parent for parent in folder.absolute().parents if parent.is_dir()]
    return (
        f"{error.strerror}; the artifact needs {needed} bytes and {shutil.disk_usage(parents[0]).free} are free; "
        f"what was there is unchanged; free some space or choose another folder"
    )


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


def _take_over(target: Path, aside: Path) -> None:
    """Give ``aside`` what it keeps of ``target``; again where another writer took that away in the middle of it."""
    for attempt in range(1, _RENAME_ATTEMPTS + 1):
        if not target.exists():
            return
        try:
            _keep_foreign_files(target, aside)
            shutil.copymode(target, aside)
            return
        except FileNotFoundError:
            if attempt == _RENAME_ATTEMPTS:
                raise


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
    """Have the folder's files and the names of those below it on disk before its own name says that they are."""
    for place, _, names in os.walk(folder):
        here = Path(place)
        files = [here / name for name in names] if here == folder else []  # deeper ones are the user's, linked
        for path in [*files, here]:
            if path == here or (path.is_file() and not path.is_symlink()):
                _sync_one(path)


def _sync_one(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def _folder_aside(target: Path) -> Iterator[Path]:
    """Make a folder beside ``target``, locked as long as this process lives, and remove what is there at the end."""
    aside = target.with_name(f".{target.name}-{secrets.token_hex(8)}")
    aside.mkdir()
    descriptor = None if fcntl is None else os.open(aside, os.O_RDONLY)
    try:
        if descriptor is not None:
            with contextlib.suppress(OSError):  # a file system without locks: age alone tells what is abandoned
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield aside
    finally:
        shutil.rmtree(aside, ignore_errors=True)
        if descriptor is not None:
            os.close(descriptor)


def remove_leftovers(folder: Path, name: str | None = None) -> None:
    """Remove what writers that were killed left in ``folder``, beside the target called ``name`` or beside any.

    Only what nobody has written to for an hour and whose writer is dead goes; what a writer had moved away, and put
    nothing in its place, is moved back.
    """
    for path in list(folder.iterdir()):
        found = _LEFTOVER.fullmatch(path.name)
        if found is None or name not in (None, found["name"]) or path.is_symlink() or not path.is_dir():
            continue
        if found["moved"]:
            _put_back_moved(folder / found["name"])
        with contextlib.suppress(OSError):  # its writer, or another who cleans up, was first
            if _is_abandoned(path):
                shutil.rmtree(path, ignore_errors=True)


def _is_abandoned(folder: Path) -> bool:
    if time.time() - folder.stat().st_mtime < _ABANDONED_S:
        return False
    if fcntl is None:
        return True
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        return error.errno not in (errno.EWOULDBLOCK, errno.EACCES)
    finally:
        os.close(descriptor)
    return True


def _put_back_moved(target: Path) -> None:
    """Undo the first of two renames if a writer was killed between them; the newest such folder goes back."""
    if target.exists() or not target.parent.is_dir():
        return
    moved = [
        path
        for path in target.parent.iterdir()
        if (found := _LEFTOVER.fullmatch(path.name)) and found["moved"] and found["name"] == target.name
    ]
    for path in sorted(moved, key=lambda path: path.lstat().st_mtime, reverse=True)[:1]:
        with contextlib.suppress(OSError):  # its writer lives, or another reader was first
            path.rename(target)


def _put_in_place(aside: Path, target: Path) -> None:
    """Rename ``aside`` to ``target``; an old ``target`` ends up at ``aside``, or is removed.

    Each turn but the last means that somebody else put something there, or took it away, in between.
    """
    for _ in range(_RENAME_ATTEMPTS):
        if not target.exists():
            if _rename_to_nothing(aside, target):
                return
            continue
        try:
            if _exchange(aside, target):
                return
        except FileNotFoundError:
            continue
        if _rename_twice(aside, target):
            return
    raise OSError(errno.EBUSY, f"others kept writing it, {_RENAME_ATTEMPTS} times", str(target))


def _rename_to_nothing(aside: Path, target: Path) -> bool:
    """Rename a folder; False if there is something at ``target`` by now."""
    try:
        aside.rename(target)
    except OSError as error:
        if error.errno in (errno.ENOTEMPTY, errno.EEXIST):
            return False
        raise
    return True


def _rename_twice(aside: Path, target: Path) -> bool:
    """Move ``target`` away and ``aside`` in its place; False if somebody else took or filled that place."""
    old = aside.with_name(f"{aside.name}-old")
    try:
        target.rename(old)
    except FileNotFoundError:
        return False
    try:
        done = _rename_to_nothing(aside, target)
    except BaseException:
        _rename_to_nothing(old, target)
        raise
    shutil.rmtree(old, ignore_errors=True)
    return done


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
