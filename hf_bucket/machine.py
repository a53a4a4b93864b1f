"""This machine: the cores that may be used, and what the cache keeps for it alone."""

from __future__ import annotations

import contextlib
import ctypes
import hashlib
import json
import math
import os
import platform
import re
import secrets
import threading
import warnings
from collections.abc import Callable, Mapping
from functools import lru_cache
from importlib.metadata import version
from pathlib import Path, PurePosixPath
from typing import TypeVar

import filelock

from hf_bucket.artifact import hash_file, write_folder
from hf_bucket.cache import MACHINES, cache_root, temporary_folder, warn_unwritable
from hf_bucket.errors import BucketError, BucketWarning

_RECORD = "files.json"


def usable_cores(root: Path = Path("/")) -> int:
    """Return the cores this process may use: by affinity, and by the quotas of its cgroups, rounded up.

    Args:
        root: of the file system that ``/proc`` and ``/sys`` are read from.
    """
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    quotas = [_quota(folder) for folder in _cgroups(root, "cpu")]
    return max(1, min([cores, *(math.ceil(quota) for quota in quotas if quota is not None)]))


def _quota(folder: Path) -> float | None:
    """Return the cores that one cgroup allows; None where it has no limit."""
    first = " ".join(_text(folder / f"cpu.cfs_{name}_us").strip() for name in ("quota", "period"))
    for text in (_text(folder / "cpu.max"), first):  # version 2, and version 1, where -1 is no limit
        found = re.fullmatch(r"([0-9]+) ([1-9][0-9]*)\s*", text)
        if found is not None:
            return int(found[1]) / int(found[2])
    return None


def available_bytes(root: Path = Path("/")) -> int | None:
    """Return the memory this process may still take: what the system has, and what its cgroups leave it.

    None where nothing is known, as on systems other than Linux. Files that are only kept in memory count as free in
    both: the kernel drops them when memory is wanted.

    Args:
        root: of the file system that ``/proc`` and ``/sys`` are read from.
    """
    found = re.search(r"^MemAvailable:\s+(\d+) kB", _text(root / "proc/meminfo"), re.MULTILINE)
    known = [] if found is None else [int(found[1]) * 1024]
    known += [left for folder in _cgroups(root, "memory") for left in _left(folder)]
    return min(known, default=None)


def trim_heap() -> None:
    """Give back to the system what the C library keeps of freed memory, where it has a call for that, as glibc has.

    Sessions free most of what they allocate while they are made, in pieces between those that they keep.
    """
    trim = _malloc_trim()
    if trim is not None:
        trim(ctypes.c_size_t(0))


@lru_cache(maxsize=1)
def _malloc_trim() -> Callable[[object], object] | None:
    if os.name != "posix":
        return None
    with contextlib.suppress(OSError):  # a Python that cannot load libraries has none to look in
        return getattr(ctypes.CDLL(None), "malloc_trim", None)
    return None


def _cgroups(root: Path, controller: str) -> list[Path]:
    """Return the folders of the cgroups this process is in that may limit something, those above included.

    In version 2 there is one hierarchy for everything; in version 1 every controller has a folder of its own, mounted
    under its name, or under those of the controllers that share it.
    """
    mounted = root / "sys/fs/cgroup"
    folders: list[Path] = []
    for controllers, path in re.findall(r"^\d+:(.*):/(.*)$", _text(root / "proc/self/cgroup"), re.MULTILINE):
        if controllers == "":
            tops = [mounted]
        elif controller in controllers.split(","):
            tops = [mounted / controllers, mounted / controller]
        else:
            continue
        folders += [top / part for top in tops for part in (path, *PurePosixPath(path).parents)]
    return folders


def _left(folder: Path) -> list[int]:
    """Return what the limit of one cgroup leaves; nothing where it has none."""
    names = ("memory.max", "memory.current"), ("memory.limit_in_bytes", "memory.usage_in_bytes")
    sizes = [[_text(folder / name).strip() for name in pair] for pair in names]
    cached = re.findall(r"^(?:in)?active_file (\d+)$", _text(folder / "memory.stat"), re.MULTILINE)
    return [
        max(0, int(limit) - int(used) + sum(map(int, cached)))
        for limit, used in sizes
        if limit.isdecimal() and used.isdecimal()
    ]


def _text(path: Path) -> str:
    """Return what the kernel says in a file; nothing where there is no such file."""
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, ValueError):
        return ""


def processor() -> str:
    """Return the processor's name."""
    return _cpuinfo().get("model name", platform.processor() or platform.machine())


def _cpuinfo() -> dict[str, str]:
    """Return what Linux says of the first core; empty elsewhere."""
    path = Path("/proc/cpuinfo")
    lines = path.read_text(encoding="utf-8").partition("\n\n")[0].splitlines() if path.exists() else []
    pairs = (line.partition(":") for line in lines)
    return {name.strip(): value.strip() for name, _, value in pairs}


def _gpus(driver: Path) -> list[str]:
    """Return the names of NVIDIA's GPUs, as its driver for Linux has them."""
    files = sorted(driver.glob("gpus/*/information"))
    lines = [line for path in files for line in path.read_text(encoding="utf-8").splitlines()]
    return [line.partition(":")[2].strip() for line in lines if line.startswith("Model:")]


def package_version(package: str) -> str:
    """Return an installed package's version; onnxruntime's is its own word, since other packages bring it too.

    Raises:
        PackageNotFoundError: it is not installed.
    """
    if package != "onnxruntime":
        return version(package)
    import onnxruntime

    return str(onnxruntime.__version__)


@lru_cache(maxsize=1)
def machine_key() -> str:
    """Return a key that changes with the type of CPU, what it can do, NVIDIA's GPUs, and the version of onnxruntime."""
    info = _cpuinfo()
    features = info.get("flags", info.get("Features", ""))
    facts = [
        platform.machine(),
        processor(),
        features,
        package_version("onnxruntime"),
        *_gpus(Path("/proc/driver/nvidia")),
    ]
    return hashlib.sha256("\n".join(facts).encode()).hexdigest()[:32]


def machine_folder(graph_sha256: str) -> Path:
    """Return the folder of the cache for what was made of one graph on this machine; it need not exist."""
    return cache_root() / MACHINES / machine_key() / graph_sha256[:32]


def made_once(folder: Path, make: Callable[[Path], None]) -> Path | None:
    """Return ``folder``, filled by ``make`` unless it is there, whole and unaltered; two processes make it once.

    Where the cache cannot be written a warning says so, and it is a folder that lasts as long as the process; None
    where that cannot be written either.
    """
    try:
        if _is_whole(folder):
            return folder
        if folder in _here:
            return _made_here(folder, make)
        folder.parent.mkdir(parents=True, exist_ok=True)
        with filelock.FileLock(folder.with_name(f"{folder.name}.lock")):
            if not _is_whole(folder):
                write_folder(folder, lambda aside: _fill(aside, make))
        return folder
    except BucketError:  # a graph that cannot be loaded is no fault of the cache
        raise
    except OSError as error:
        warn_unwritable(error)
    return _made_here(folder, make)


_here: dict[Path, Path | None] = {}  # by the folder of the cache that could not be written: what stands for it
_here_lock = threading.Lock()


def _made_here(folder: Path, make: Callable[[Path], None]) -> Path | None:
    """Return a folder of this process alone in the place of one of the cache; None where that cannot be written."""
    with _here_lock:
        place = _here.get(folder)
        if folder in _here and (place is None or _is_whole(place)):
            return place
        try:
            place = temporary_folder() / folder.name
            write_folder(place, lambda aside: _fill(aside, make))
        except BucketError:
            raise
        except OSError as error:
            if None not in _here.values():
                warnings.warn(
                    f"no temporary folder can hold them either ({error}): every session packs weights of its own, "
                    f"which takes that much more memory",
                    BucketWarning,
                    stacklevel=4,
                )
            place = None
        _here[folder] = place
        return place


def _new_lock() -> None:
    """In a forked child, nobody holds what another thread of the parent held."""
    global _here_lock
    _here_lock = threading.Lock()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_new_lock)


def _fill(folder: Path, make: Callable[[Path], None]) -> None:
    make(folder)
    record = {path.name: [path.stat().st_size, hash_file(path)] for path in sorted(folder.iterdir())}
    (folder / _RECORD).write_text(json.dumps(record), encoding="utf-8")


_whole: dict[Path, list[tuple[str, int, int]]] = {}  # what this process has read to the end already


def _is_whole(folder: Path) -> bool:
    """Return whether a folder has the very files that ``_fill`` left in it."""
    try:
        state = [(path.name, path.stat().st_size, path.stat().st_mtime_ns) for path in sorted(folder.iterdir())]
        if _whole.get(folder) == state:
            return True
        record = json.loads((folder / _RECORD).read_text(encoding="utf-8"))
        whole = isinstance(record, dict) and all(
            (folder / name).stat().st_size == size and hash_file(folder / name) == sha256
            for name, (size, sha256) in record.items()
        )
    except (OSError, ValueError, TypeError):
        return False
    if whole:
        _whole[folder] = state
    return whole


_T = TypeVar("_T")


def measured_once(path: Path, read: Callable[[], _T | None], measure: Callable[[], _T], *, again: bool) -> _T:
    """Return what ``read`` finds, or what ``measure`` returns where that is None.

    Processes that would measure what the folder of ``path`` keeps take turns: they would slow each other down, and
    whoever waited finds the figures there. Nobody waits longer than a minute, or where the cache cannot be written:
    ``write_figures`` says so.

    Args:
        measure: writes the figures too.
        again: measure whatever is kept.
    """
    found = None if again else read()
    if found is not None:
        return found
    with contextlib.ExitStack() as stack:
        with contextlib.suppress(OSError):
            path.parent.mkdir(parents=True, exist_ok=True)
            stack.enter_context(filelock.FileLock(path.with_name("measuring.lock")).acquire(timeout=_PATIENCE_S))
        found = None if again else read()  # another process may have measured meanwhile
        return measure() if found is None else found


_PATIENCE_S = 60.0


def read_figures(path: Path) -> Mapping[str, object]:
    """Return what ``write_figures`` wrote; nothing where it is missing or unreadable, and is measured again."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}


def write_figures(path: Path, figures: Mapping[str, object]) -> None:
    """Write figures measured on this machine; where that is impossible, a warning says so."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        aside = path.with_name(f".{path.name}-{secrets.token_hex(8)}")
        aside.write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")
        os.replace(aside, path)
    except OSError as error:
        warn_unwritable(error)
