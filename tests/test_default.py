"""The classifier that ships in the package, and the reviews that it is measured on."""

from __future__ import annotations

import json
import re
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

import hf_bucket

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")

FOLDER = Path(hf_bucket.__file__).parent / "default"
FILES = {"README.md", "config.json", "model.safetensors", "reviews.jsonl", "tokenizer.json", "tokenizer_config.json"}
LABELS = ("negative", "positive")

if not (FOLDER / "config.json").is_file():
    pytest.skip(
        "the default model is not in this version yet: scripts/train_default.py makes it", allow_module_level=True
    )


@pytest.fixture(scope="module")
def reviews() -> list[dict[str, str]]:
    return [json.loads(line) for line in (FOLDER / "reviews.jsonl").read_text(encoding="utf-8").splitlines()]


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(FOLDER)


@pytest.fixture(scope="module")
def model() -> Any:
    import torch
    from transformers import AutoModelForSequenceClassification

    return AutoModelForSequenceClassification.from_pretrained(FOLDER, dtype=torch.float32).eval()


def _predict(model: Any, tokenizer: Any, text: str) -> str:
    import torch

    with torch.inference_mode():
        return model.config.id2label[int(model(**tokenizer(text, return_tensors="pt")).logits.argmax())]


def _accuracy_on_the_card(data: str) -> tuple[float, int]:
    """The accuracy that the model card states for ``data``, and the number of rows."""
    card = (FOLDER / "README.md").read_text(encoding="utf-8")
    found = re.search(rf"^\| {re.escape(data)} +\| (\d+) +\| (0\.\d+) +\|", card, re.MULTILINE)
    assert found, f"the model card has no row for {data}"
    return float(found[2]), int(found[1])


def test_the_folder_holds_what_is_needed_and_stays_under_five_megabytes() -> None:
    assert {path.name for path in FOLDER.iterdir()} == FILES
    assert sum(path.stat().st_size for path in FOLDER.iterdir()) < 5e6


def test_the_model_has_the_labels_of_its_task_and_room_for_512_tokens(model: Any, tokenizer: Any) -> None:
    assert tuple(model.config.id2label[number] for number in range(2)) == LABELS
    assert model.config.problem_type == "single_label_classification"
    assert model.config.max_position_embeddings >= 512
    assert tokenizer.model_max_length == 512
    assert tokenizer.pad_token_id == model.config.pad_token_id
    assert len(tokenizer) == model.config.vocab_size


def test_the_tokenizer_neither_truncates_nor_pads_on_its_own() -> None:
    saved = json.loads((FOLDER / "tokenizer.json").read_text(encoding="utf-8"))
    assert saved["truncation"] is None
    assert saved["padding"] is None


def test_the_tokenizer_is_read_alike_with_and_without_transformers(tokenizer: Any, reviews: list) -> None:
    from tokenizers import Tokenizer

    alone = Tokenizer.from_file(str(FOLDER / "tokenizer.json"))
    for text in ["It DOESN'T fit, café!", *(row["text"] for row in reviews[:40])]:
        assert tokenizer(text)["input_ids"] == alone.encode(text).ids


def test_the_reviews_are_many_balanced_and_different(reviews: list[dict[str, str]]) -> None:
    counts = Counter(row["label"] for row in reviews)
    assert all(set(row) == {"text", "label"} for row in reviews)
    assert set(counts) == set(LABELS)
    assert len(reviews) >= 200
    assert max(counts.values()) <= 0.55 * len(reviews)
    assert len({" ".join(row["text"].lower().split()) for row in reviews}) == len(reviews)


def test_the_reviews_are_as_short_and_as_long_as_real_ones(reviews: list[dict[str, str]], tokenizer: Any) -> None:
    lengths = sorted(len(tokenizer(row["text"])["input_ids"]) for row in reviews)
    assert lengths[0] <= 4
    assert sum(length >= 300 for length in lengths) >= 6
    assert lengths[-1] <= 512


def test_the_accuracy_on_the_reviews_is_the_one_on_the_model_card(
    model: Any, tokenizer: Any, reviews: list[dict[str, str]]
) -> None:
    stated, n_reviews = _accuracy_on_the_card("reviews.jsonl")
    right = sum(_predict(model, tokenizer, row["text"]) == row["label"] for row in reviews)
    assert n_reviews == len(reviews)
    assert right / len(reviews) >= stated - 0.01


def test_the_accuracy_on_sst2_is_the_one_on_the_model_card(model: Any, tokenizer: Any, assets: Path) -> None:
    import pandas as pd

    stated, n_sentences = _accuracy_on_the_card("SST-2 validation")
    split = pd.read_parquet(assets / "data" / "glue" / "sst2" / "validation.parquet")
    right = sum(
        _predict(model, tokenizer, text) == LABELS[label]
        for text, label in zip(split["sentence"], split["label"], strict=True)
    )
    assert n_sentences == len(split)
    assert right / len(split) == pytest.approx(stated, abs=0.01)
    assert stated >= 0.80
