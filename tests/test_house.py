"""The house itself: which room may import which, what is public, and how heavy the front door is."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import hf_bucket

PACKAGE = Path(hf_bucket.__file__).parent

# A module imports only from rooms before its own (docs/architecture.md).
ROOMS = (
    {"errors", "surgery"},
    {"ladder", "tasks", "weights", "narrow", "attention", "liveness"},
    {"families", "overflow", "fusions", "flatten", "assign", "histogram", "joint"},
    {"planner", "metrics", "manifest", "source", "recipe", "data"},
    {"batch", "artifact", "collator", "report", "labels"},
    {"encode", "session", "graph", "cache", "stats", "workers", "memory"},
    {"facts", "probes", "machine", "describe", "session_openvino", "session_cuda"},
    {"session_ort", "costs"},
    {"preflight"},
    {"providers"},
    {"settle"},
    {"engines"},
    {"export", "runner", "systems", "quantize", "fuse"},
    {"finish", "evidence"},
    {"compile", "evaluate", "certificate"},
    {"models", "pipelines", "glue"},
    {"predict", "arguments", "advise"},
    {"__init__"},
    {"cli"},
)
ROOM_OF = {module: number for number, room in enumerate(ROOMS) for module in room}

PUBLIC = {
    "BucketedModelForSequenceClassification",
    "DataCollatorWithBucketing",
    "BucketBatchSampler",
    "pipeline",
    "plan",
    "Plan",
    "Bucket",
    "Ladder",
    "load",
}


def _imports(path: Path) -> set[str]:
    """Modules of the package that a file imports, lazily or not, but not only for types."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    typing_only = {
        id(inner)
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"
        for inner in ast.walk(node)
    }
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and id(node) not in typing_only and node.module:
            parts = node.module.split(".")
            if parts[0] == "hf_bucket":
                found |= {parts[1]} if len(parts) > 1 else {alias.name for alias in node.names} & set(ROOM_OF)
    return found


@pytest.mark.parametrize("path", sorted(PACKAGE.glob("*.py")), ids=lambda path: path.stem)
def test_a_module_imports_only_from_rooms_before_its_own(path: Path) -> None:
    own = ROOM_OF[path.stem]
    upwards = {module for module in _imports(path) if ROOM_OF[module] >= own}
    assert not upwards, f"{path.stem} (room {own}) imports {upwards}"


def test_the_public_names_are_those_of_the_design_and_all_resolve() -> None:
    assert set(hf_bucket.__all__) == PUBLIC
    for name in PUBLIC:
        assert getattr(hf_bucket, name).__name__ == name


def test_an_unknown_name_lists_the_known_ones() -> None:
    with pytest.raises(AttributeError, match="no attribute 'Pipeline'; it has Bucket, "):
        _ = hf_bucket.Pipeline


def _run(code: str) -> str:
    return subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout


def test_importing_the_package_loads_no_heavy_library() -> None:
    heavy = [
        "numpy",
        "torch",
        "transformers",
        "optimum",
        "onnx",
        "onnxruntime",
        "tokenizers",
        "huggingface_hub",
        "datasets",
        "sklearn",
    ]
    loaded = _run(f"import hf_bucket, sys; print([name for name in {heavy} if name in sys.modules])")
    assert loaded.strip() == "[]"


def test_importing_the_package_takes_a_fraction_of_pythons_own_start() -> None:
    """The promise is under 0.15 s; importing nothing heavy, it takes about a hundredth. Best of five, against noise."""
    code = "import time; start = time.perf_counter(); import hf_bucket; print(time.perf_counter() - start)"
    assert min(float(_run(code)) for _ in range(5)) < 0.15
