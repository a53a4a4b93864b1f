"""A representative part of ``make architectures``: what the library makes of tiny random models of many families."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).resolve().parents[1]

pytestmark = pytest.mark.filterwarnings("ignore")  # the models' and exporters' own

SAME = [
    "albert",
    "bart",
    "bert",
    "big_bird",
    "bloom",
    "deberta-v2",
    "distilbert",
    "electra",
    "gemma",
    "gpt2",
    "layoutlmv3",
    "llama",
    "mistral",
    "modernbert",
    "mpnet",
    "mpt",
    "opt",
    "qwen2",
    "roberta",
    "squeezebert",
    "t5",
    "xlm-roberta",
    "xlnet",
]
LEAKS = ["canine", "convbert", "fnet", "mobilebert", "nystromformer", "reformer", "t5gemma", "t5gemma2", "yoso"]
REFUSED = {"funnel": "torch itself fails", "jamba": "free dimensions", "longformer": "free dimensions"}


@pytest.fixture(scope="module")
def script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("architectures", ROOT / "scripts" / "architectures.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules["architectures"] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture(autouse=True)
def one_thread() -> None:
    import torch

    torch.set_num_threads(1)


@pytest.mark.parametrize("model_type", SAME)
def test_every_bucket_gives_unpadded_torchs_answer(script: ModuleType, tmp_path: Path, model_type: str) -> None:
    found = script.examine(model_type, tmp_path)
    assert (found.verdict, found.reason) == ("same", "")
    assert found.runs > 100
    assert found.difference <= 1e-4 * found.spread


@pytest.mark.parametrize("model_type", LEAKS)
def test_a_model_that_padding_changes_is_refused(script: ModuleType, tmp_path: Path, model_type: str) -> None:
    found = script.examine(model_type, tmp_path)
    assert found.verdict == "leaks"
    assert min(found.moved.values()) > 1e-3
    assert found.reason.startswith(("PaddingLeakError: padding changes what", "ExportError: torch itself fails"))


@pytest.mark.parametrize("model_type", REFUSED)
def test_a_model_that_cannot_be_compiled_is_refused(script: ModuleType, tmp_path: Path, model_type: str) -> None:
    found = script.examine(model_type, tmp_path)
    assert (found.verdict, found.difference) == ("refused", None)
    assert REFUSED[model_type] in found.reason
