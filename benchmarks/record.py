"""What every benchmark writes beside its figures: command, machine, versions."""

from __future__ import annotations

import json
import platform
import re
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any

from hf_bucket.machine import package_version, usable_cores

# A folder of this machine: nothing that is written down may name one.
_FOLDERS = re.compile(r"(?<![\w.:/~…-])(?:~|[A-Za-z]:)?[\\/](?:[\w.+@-]+[\\/])+(?=[\w.+@-])")

PACKAGES = ("hf-bucket", "onnxruntime", "torch", "transformers", "tokenizers", "numpy")


def circumstances() -> dict[str, Any]:
    """Return the command, the machine and the versions of this run."""
    return {
        "command": without_folders(" ".join(["python", *sys.argv])),
        "processor": _processor(),
        "usable_cores": usable_cores(),
        "python": platform.python_version(),
        "versions": {package: package_version(package) for package in PACKAGES},
        "commit": _commit(),
    }


def _commit() -> str:
    """Return the commit of the code that is measured, with a plus where files differ from it; empty without git."""
    root, code = Path(__file__).resolve().parents[1], ["hf_bucket", "benchmarks/*.py", "benchmarks/environments.toml"]
    try:
        head = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=root, capture_output=True, text=True)
        status = ["git", "status", "--porcelain", "--", *code]
        changed = subprocess.run(status, cwd=root, capture_output=True, text=True)
    except FileNotFoundError:
        return ""
    return head.stdout.strip() + ("+" if changed.stdout else "") if head.returncode == 0 else ""


def without_folders(value: Any) -> Any:
    """Return JSON's own types with the folders of every absolute path in any string replaced by an ellipsis."""
    if isinstance(value, str):
        return _FOLDERS.sub("…/", value)
    if isinstance(value, Mapping):
        return {key: without_folders(one) for key, one in value.items()}
    if isinstance(value, (list, tuple)):
        return [without_folders(one) for one in value]
    return value


def show(result: Mapping[str, Any], output: Path | None) -> None:
    """Print a result as JSON, and write it to a file if one is given."""
    text = json.dumps(result, indent=2)
    print(text)
    if output:
        output.parent.mkdir(parents=True, exist_ok=True)
        output.write_text(text + "\n", encoding="utf-8")


def spread(values: Sequence[float]) -> dict[str, float]:
    """Return the median of several measurements, with the smallest, the largest and how many there were."""
    return {"median": median(values), "min": min(values), "max": max(values), "n": len(values)}


def _processor() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text(encoding="utf-8").splitlines() if cpuinfo.exists() else []
    return next(
        (line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.processor()
    )
