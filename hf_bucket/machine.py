"""This machine: the cores that may be used, and what the cache keeps for it alone."""

from __future__ import annotations

import hashlib
import json
import os
import platform
import re
from collections.abc import Callable, Mapping
from functools import lru_cache
from importlib.metadata import version
from pathlib import Path, PurePosixPath

import filelock

from hf_bucket.artifact import hash_file, write_folder
from hf_bucket.cache import MACHINES, cache_root, warn_unwritable
from hf_bucket.errors import BucketError

_RECORD = "files.json"


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


def available_bytes(root: Path = Path("/")) -> int | None:
    """Return the memory this process may still take: what the system has, and what its cgroups leave it.

    None where nothing is known, as on systems other than Linux. Files that are only kept in memory count as free in
    both: the kernel drops them when memory is wanted.

    Args:
        root: of the file system that ``/proc`` and ``/sys`` are read from.
    """
    found = re.search(r"^MemAvailable:\s+(\d+) kB", _text(root / "proc/meminfo"), re.MULTILINE)
    known = [] if found is None else [int(found[1]) * 1024]
    cgroups = root / "sys/fs/cgroup"
    for controllers, path in re.findall(r"^\d+:(.*):/(.*)$", _text(root / "proc/self/cgroup"), re.MULTILINE):
        if controllers in ("", "memory"):  # the one hierarchy of version 2, or that of memory in version 1
            top = cgroups / controllers
            folders = [top / path, *(top / parent for parent in PurePosixPath(path).parents)]
            known += [left for folder in folders for left in _left(folder)]
    return min(known, default=None)


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


@lru_cache(maxsize=1)
def machine_key() -> str:
    """Return a key that changes with the type of CPU, what it can do, and the version of onnxruntime."""
    info = _cpuinfo()
    facts = [platform.machine(), processor(), info.get("flags", info.get("Features", "")), version("onnxruntime")]
    return hashlib.sha256("\n".join(facts).encode()).hexdigest()[:32]


def machine_folder(graph_sha256: str) -> Path:
    """Return the folder of the cache for what was made of one graph on this machine; it need not exist."""
    return cache_root() / MACHINES / machine_key() / graph_sha256[:32]


def made_once(folder: Path, make: Callable[[Path], None]) -> Path | None:
    """Return ``folder``, filled by ``make`` unless it is there, whole and unaltered; two processes make it once.

    None, and a warning, where the cache cannot be written.
    """
    try:
        if _is_whole(folder):
            return folder
        folder.parent.mkdir(parents=True, exist_ok=True)
        with filelock.FileLock(folder.with_name(f"{folder.name}.lock")):
            if not _is_whole(folder):
                write_folder(folder, lambda aside: _fill(aside, make))
        return folder
    except BucketError:  # a graph that cannot be loaded is no fault of the cache
        raise
    except OSError as error:
        warn_unwritable(error)
        return None


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
        aside = path.with_name(f".{path.name}-{os.getpid()}")
        aside.write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")
        os.replace(aside, path)
    except OSError as error:
        warn_unwritable(error)
