"""A representative part of ``make architectures``: what the library makes of tiny random models of many families."""

from __future__ import annotations

import importlib.util
import shutil
from pathlib import Path
from types import ModuleType

import pytest
from conftest import tiny_tokenizer

from hf_bucket.artifact import GRAPH
from hf_bucket.compile import CompileOptions, compile_model
from hf_bucket.errors import ModelError
from hf_bucket.flatten import flatten
from hf_bucket.graph import load_graph, save_rewritten, shapes_by_size
from hf_bucket.probes import PROBES, load_probes, validate
from hf_bucket.session_ort import EngineOptions, OrtSession, open_graph
from hf_bucket.source import Source

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
    "mbart",
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
REFUSED = {
    "funnel": "torch itself fails",
    "jamba": "free dimensions",
    "longformer": "free dimensions",
    "zamba": "free dimensions",
}


@pytest.fixture(autouse=True)
def one_thread() -> None:
    import torch

    torch.set_num_threads(1)


@pytest.mark.parametrize("model_type", SAME)
def test_every_bucket_gives_unpadded_torchs_answer(architectures: ModuleType, tmp_path: Path, model_type: str) -> None:
    found = architectures.examine(model_type, tmp_path)
    assert (found.verdict, found.reason) == ("same", "")
    assert found.runs > 100
    assert found.difference <= 1e-4 * found.spread


@pytest.mark.parametrize(
    ("model_type", "layers"),
    [
        pytest.param("bert", 12, id="bert"),
        pytest.param("albert", 13, id="albert: another width of embeddings"),
        pytest.param("bart", 32, id="bart: a decoder looks at the encoder's rows"),
        pytest.param("deberta-v2", 12, id="deberta-v2: layers on positions, not on rows"),
        pytest.param("modernbert", 8, id="modernbert: layers split in two"),
        pytest.param("xlnet", 0, id="xlnet: tokens before rows"),
    ],
)
def test_linear_layers_on_lists_of_tokens_give_unpadded_torchs_answer(
    architectures: ModuleType, tmp_path: Path, model_type: str, layers: int
) -> None:
    architectures.save(*architectures.build(model_type), tmp_path)
    compiled = compile_model(Source(name=str(tmp_path)), CompileOptions(buckets=[6, 13], batch_sizes=[1, 3]))
    graph = Path(shutil.copytree(compiled.folder, tmp_path / "compiled")) / GRAPH
    model = load_graph(graph)
    assert flatten(model, shapes_by_size(graph)) == layers
    save_rewritten(model, graph, graph)
    shared = open_graph(graph, EngineOptions(threads=1))
    signature = compiled.manifest.signature
    reference, probes = load_probes(compiled.folder / PROBES)
    for bucket in compiled.manifest.ladder:
        session = OrtSession(bucket, shared, tuple(spec.name for spec in signature.outputs))
        validate(bucket, session, probes, signature, reference=reference, atol=1e-4)


@pytest.mark.parametrize("model_type", LEAKS)
def test_a_model_that_padding_changes_is_refused(architectures: ModuleType, tmp_path: Path, model_type: str) -> None:
    found = architectures.examine(model_type, tmp_path)
    assert found.verdict == "leaks"
    assert min(found.moved.values()) > 1e-3
    assert found.reason.startswith(("PaddingLeakError: padding changes what", "ExportError: torch itself fails"))


@pytest.mark.parametrize("model_type", REFUSED)
def test_a_model_that_cannot_be_compiled_is_refused(architectures: ModuleType, tmp_path: Path, model_type: str) -> None:
    found = architectures.examine(model_type, tmp_path)
    assert (found.verdict, found.difference) == ("refused", None)
    assert REFUSED[model_type] in found.reason


def test_a_model_that_transformers_cannot_build_here_is_refused(tmp_path: Path) -> None:
    """LayoutLMv2 needs detectron2, which nothing here brings."""
    from transformers import LayoutLMv2Config

    if importlib.util.find_spec("detectron2"):
        pytest.skip("detectron2 is installed: LayoutLMv2 can be built")
    LayoutLMv2Config().save_pretrained(tmp_path)
    tiny_tokenizer().save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "model.safetensors").write_bytes(b"")
    with pytest.raises(ModelError, match=r"cannot build LayoutLMv2Config here: .* requires the detectron2"):
        compile_model(Source(name=str(tmp_path)), CompileOptions(buckets=[8]), report=lambda line: None)


def test_weights_that_are_damaged_are_an_error_of_ours(tiny_bert: Path, tmp_path: Path) -> None:
    shutil.copytree(tiny_bert, tmp_path / "model")
    (tmp_path / "model" / "model.safetensors").write_bytes(b"half a file")
    with pytest.raises(ModelError, match="cannot be loaded for text-classification"):
        compile_model(Source(name=str(tmp_path / "model")), CompileOptions(buckets=[8]), report=lambda line: None)
