"""The script that trains the bundled model makes the same model again."""

from __future__ import annotations

import importlib.util
import json
import sys
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).resolve().parents[1]
SENTENCES = [
    f"a {word} film that {verb} us for {n} hours"
    for n, word in enumerate(["good", "bad", "dull", "fine"] * 8)
    for verb in ("held", "lost")
]

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")


@pytest.fixture(scope="module")
def script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("train_default", ROOT / "scripts" / "train_default.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules["train_default"] = module
    spec.loader.exec_module(module)
    return module


def test_the_same_seed_makes_the_same_model_and_another_seed_another(script: ModuleType, tmp_path: Path) -> None:
    import pandas as pd
    import torch

    split = pd.DataFrame({"sentence": SENTENCES, "label": [n % 2 for n in range(len(SENTENCES))]})
    recipe = replace(
        script.Recipe(), epochs=1, vocabulary=200, min_count=1, substituted=20, framed=20, documents=1, batch_rows=64
    )
    try:
        for name, seed in (("first", 0), ("again", 0), ("other", 1)):
            script.train(replace(recipe, seed=seed), split, ROOT / "hf_bucket" / "default", tmp_path / name, print)
    finally:
        torch.use_deterministic_algorithms(False)
    weights = {name: (tmp_path / name / "model.safetensors").read_bytes() for name in ("first", "again", "other")}
    assert weights["first"] == weights["again"]
    assert weights["first"] != weights["other"]
    config = json.loads((tmp_path / "first" / "config.json").read_text())
    assert (config["vocab_size"], config["max_position_embeddings"]) == (200, 512)
    accuracy, rows = script.evaluate(tmp_path / "first", split)
    assert (rows, 0 <= accuracy <= 1) == (len(SENTENCES), True)
