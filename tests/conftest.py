"""Tiny models built in memory, and the real ones where they are at hand."""

from __future__ import annotations

import importlib.util
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

os.environ.setdefault("HF_HUB_OFFLINE", "1")

# Test processes beside each other take a core each; engines that all use every core would only wait for one another.
_worker = os.environ.get("PYTEST_XDIST_WORKER", "")
if _worker and hasattr(os, "sched_setaffinity"):
    _cores = sorted(os.sched_getaffinity(0))
    os.sched_setaffinity(0, {_cores[int(_worker.removeprefix("gw")) % len(_cores)]})

import numpy as np
import pytest
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors

import hf_bucket
from hf_bucket.artifact import Artifact, open_artifact, record_files
from hf_bucket.compile import CompileOptions, compile_model
from hf_bucket.ladder import Bucket, Ladder
from hf_bucket.manifest import MANIFEST, Manifest
from hf_bucket.session import FakeSession
from hf_bucket.session_ort import EngineOptions
from hf_bucket.source import Source
from hf_bucket.tasks import InputSpec, OutputSpec, Signature

ROOT = Path(__file__).resolve().parent.parent
WORDS = [f"w{number}" for number in range(90)]
PAD, UNK, CLS, SEP = "[PAD]", "[UNK]", "[CLS]", "[SEP]"


def tiny_tokenizer() -> Tokenizer:
    """A word-level tokenizer whose pad id is 3, so that a literal 0 shows; ``w0`` is id 4."""
    vocabulary = {token: number for number, token in enumerate([UNK, CLS, SEP, PAD, *WORDS])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token=UNK))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{CLS} $A {SEP}",
        pair=f"{CLS} $A {SEP} $B:1 {SEP}:1",
        special_tokens=[(CLS, 1), (SEP, 2)],
    )
    tokenizer.add_special_tokens([UNK, CLS, SEP, PAD])
    return tokenizer


def text_of(n_words: int, start: int = 0) -> str:
    """A text of ``n_words`` known words, ``n_words + 2`` tokens."""
    return " ".join(WORDS[(start + number) % len(WORDS)] for number in range(n_words))


@pytest.fixture(scope="session")
def shared_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that all test processes of one run share."""
    base = tmp_path_factory.getbasetemp()
    folder = (base.parent if os.environ.get("PYTEST_XDIST_WORKER") else base) / "shared"
    folder.mkdir(exist_ok=True)
    return folder


@pytest.fixture(scope="session", autouse=True)
def cache(shared_folder: Path) -> Iterator[Path]:
    """A compile cache of the run's own, so that every tiny model is exported once."""
    folder = shared_folder / "cache"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HF_BUCKET_CACHE", str(folder))
        yield folder


def save_tiny_bert(folder: Path, *, num_labels: int = 2, seed: int = 0, **config: object) -> Path:
    """Write a BERT checkpoint of random weights, large enough that a leak of padding shows in the logits."""
    import torch
    from transformers import BertConfig, BertForSequenceClassification, PreTrainedTokenizerFast

    torch.manual_seed(seed)
    settings: dict[str, object] = {
        "vocab_size": 4 + len(WORDS),
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "intermediate_size": 64,
        "max_position_embeddings": 64,
        "pad_token_id": 3,
        "initializer_range": 0.5,
        "num_labels": num_labels,
    }
    model = BertForSequenceClassification(BertConfig(**{**settings, **config}))
    model.save_pretrained(folder)
    PreTrainedTokenizerFast(
        tokenizer_object=tiny_tokenizer(),
        pad_token=PAD,
        unk_token=UNK,
        cls_token=CLS,
        sep_token=SEP,
        model_input_names=["input_ids", "token_type_ids", "attention_mask"],
        model_max_length=64,
    ).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def tiny_bert(shared_folder: Path) -> Path:
    """A BERT checkpoint of random weights with two labels, 64 positions."""
    import filelock

    folder = shared_folder / "tiny-bert"
    with filelock.FileLock(f"{folder}.lock"):
        return folder if folder.exists() else save_tiny_bert(folder)


@pytest.fixture(scope="module")
def compiled(tiny_bert: Path) -> Artifact:
    """The tiny BERT for some lengths and batches, for tests of what every engine keeps."""
    options = CompileOptions(buckets=[8, 16, 40], batch_sizes=[1, 3])
    return compile_model(Source(name=str(tiny_bert)), options, report=lambda line: None)


@pytest.fixture(scope="module")
def plain(compiled: Artifact) -> np.ndarray:
    """The answers of onnxruntime's CPU provider to ``promises.TEXTS``, every text alone."""
    from promises import TEXTS

    runner = hf_bucket.load(compiled.folder, provider="CPUExecutionProvider")
    answers = np.stack([runner([text])[0]["logits"] for text in TEXTS])
    runner.close()
    return answers


@pytest.fixture(scope="session")
def architectures() -> ModuleType:
    """``scripts/architectures.py``, which builds a tiny random model of any type."""
    spec = importlib.util.spec_from_file_location("architectures", ROOT / "scripts" / "architectures.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up there
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="session")
def assets() -> Path:
    """The real models and data, or a skip."""
    folder = Path(os.environ.get("HF_BUCKET_TEST_ASSETS", ROOT.parent / "shared"))
    if not (folder / "models" / "minilm-mrpc").is_dir():
        pytest.skip(f"no real models at {folder}; set HF_BUCKET_TEST_ASSETS")
    return folder


def fake_engine(artifact: Artifact, options: EngineOptions) -> dict[Bucket, FakeSession]:
    """Sessions that need no engine; their logits are (sum of token ids, number of tokens)."""
    return {bucket: FakeSession(bucket) for bucket in artifact.manifest.ladder}


def fake_artifact(folder: Path, ladder: Ladder, *, max_length: int | None = 64) -> Artifact:
    """An artifact without a graph, for ``fake_engine``."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "tokenizer.json").write_text(tiny_tokenizer().to_str(), encoding="utf-8")
    pads = {"input_ids": 3, "attention_mask": 0, "token_type_ids": 0}
    inputs = tuple(InputSpec(name=name, dtype="int64", axes=("row", "token"), pad_id=pad) for name, pad in pads.items())
    manifest = Manifest(
        task="text-classification",
        ladder=ladder,
        signature=Signature(
            inputs=inputs, outputs=(OutputSpec(name="logits", dtype="float32", axes=("row", "label")),)
        ),
        max_length=max_length,
        vocab_size=4 + len(WORDS),
        labels=("sum", "count"),
        problem_type="regression",
        source={"name": "fake"},
        versions={},
        validation=(),
        files=record_files(folder),
    )
    (folder / MANIFEST).write_text(manifest.to_json(), encoding="utf-8")
    return open_artifact(folder)
