"""Fine-tuned models on real GLUE rows: plain torch's logits, labels and metric. Skipped where the assets are absent."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from hf_bucket import BucketedModelForSequenceClassification
from hf_bucket.glue import load_task
from hf_bucket.metrics import score

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")

ROWS = 96


def _torch_logits(folder: Path, texts: list) -> np.ndarray:
    import torch
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    model = AutoModelForSequenceClassification.from_pretrained(folder, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    rows = []
    with torch.inference_mode():
        for text in texts:
            parts = (text,) if isinstance(text, str) else text
            rows.append(model(**tokenizer(*parts, return_tensors="pt")).logits[0].numpy())
    return np.stack(rows)


@pytest.mark.parametrize("task", ["mrpc", "sst2"])
def test_real_models_give_torchs_answer_at_given_and_at_planned_buckets(assets: Path, task: str) -> None:
    folder = assets / "models" / f"minilm-{task}"
    data = load_task(task, "validation", data_dir=assets / "data" / "glue", limit=ROWS)
    texts = list(data.texts)
    expected = _torch_logits(folder, texts)
    for options in ({"buckets": [64, 128]}, {"buckets": "auto", "n_buckets": 4, "calibration_dataset": texts}):
        model = BucketedModelForSequenceClassification.from_pretrained(folder, **options)
        got = np.stack([row["logits"] for row in model.runner(texts)])
        assert np.abs(got - expected).max() <= 1e-4
        assert (got.argmax(1) == expected.argmax(1)).all()
        assert score(task, got.argmax(1), data.labels) == score(task, expected.argmax(1), data.labels)
    assert model.stats()["waste"] < 0.35
