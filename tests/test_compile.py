"""From a checkpoint or a graph to an artifact whose every bucket gives torch's unpadded answer."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx_ir
import onnxruntime
import pytest
from conftest import WORDS, save_tiny_bert, text_of, tiny_tokenizer

import hf_bucket
from hf_bucket.artifact import GRAPH, WEIGHTS, Artifact, open_artifact
from hf_bucket.cache import MACHINES, cache_root, clear, entries
from hf_bucket.compile import CompileOptions, compile_model, measured_costs
from hf_bucket.errors import (
    ArtifactError,
    BucketWarning,
    ExportError,
    LadderError,
    ModelError,
    PaddingLeakError,
    ProviderError,
)
from hf_bucket.export import export
from hf_bucket.finish import check_buckets
from hf_bucket.graph import adopt, save_graph, specialise
from hf_bucket.ladder import Bucket, Ladder
from hf_bucket.manifest import MANIFEST
from hf_bucket.planner import plan
from hf_bucket.runner import Runner, RunOptions
from hf_bucket.session_ort import EngineOptions
from hf_bucket.source import Source
from hf_bucket.tasks import get_task

# libraries that exporting needs announce their own deprecations
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")

BUCKETS = [7, 16, 64]


def silent(line: str) -> None:
    """Take a progress line."""


@pytest.fixture(scope="module")
def artifact(tiny_bert: Path) -> Artifact:
    return compile_model(
        Source(name=str(tiny_bert)), CompileOptions(buckets=BUCKETS, batch_sizes=[1, 3]), report=silent
    )


@pytest.fixture(scope="module")
def torch_logits(tiny_bert: Path):
    """Plain torch, one text at a time, without padding."""
    import torch
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    model = AutoModelForSequenceClassification.from_pretrained(tiny_bert, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(tiny_bert)

    def run(text: str | tuple[str, str]) -> np.ndarray:
        parts = (text,) if isinstance(text, str) else text
        with torch.inference_mode():
            return model(**tokenizer(*parts, return_tensors="pt")).logits[0].numpy()

    return run


TEXTS = [text_of(n, start=3 * n) for n in (0, 1, 4, 5, 6, 13, 14, 15, 40, 62)] + [
    (text_of(3), text_of(5)),
    ("", text_of(2)),
]


@pytest.mark.parametrize("mode", ["shared", "static"])
def test_every_text_gets_torchs_unpadded_answer(artifact: Artifact, torch_logits, mode) -> None:
    runner = hf_bucket.load(artifact.folder, mode=mode)
    expected = np.stack([torch_logits(text) for text in TEXTS])
    together = np.stack([row["logits"] for row in runner(TEXTS)])
    alone = np.stack([runner([text])[0]["logits"] for text in TEXTS])
    assert np.abs(together - expected).max() <= 1e-4
    assert np.abs(alone - expected).max() <= 1e-4
    assert (together.argmax(1) == expected.argmax(1)).all()
    assert np.ptp(expected) > 1, "the weights are too small to show a leak"


def test_every_bucket_that_holds_a_text_gives_the_same_answer(
    tiny_bert: Path, artifact: Artifact, torch_logits
) -> None:
    text = text_of(4)
    for bucket in artifact.manifest.ladder:
        only = Ladder((bucket,))
        one = compile_model(
            Source(name=str(artifact.folder)),
            CompileOptions(buckets=[(b.batch_size, b.length) for b in only]),
            report=silent,
        )
        got = hf_bucket.load(one.folder, mode="static")([text])[0]["logits"]
        assert np.abs(got - torch_logits(text)).max() <= 1e-4, bucket.name


def test_the_manifest_says_how_every_bucket_compared_with_torch(artifact: Artifact) -> None:
    checks = {check.bucket: check for check in artifact.manifest.validation}
    assert set(checks) == {bucket.name for bucket in artifact.manifest.ladder}
    for check in checks.values():
        assert check.reference == "torch"
        assert check.n > 0
        assert check.label_flips == 0
        assert 0 <= check.max_abs_delta <= 1e-3


def test_the_artifact_holds_what_the_design_says(artifact: Artifact) -> None:
    names = {path.name for path in artifact.folder.iterdir()}
    variants = {f"model_{bucket.name}.onnx" for bucket in artifact.manifest.ladder}
    assert {MANIFEST, GRAPH, WEIGHTS, "config.json", "tokenizer.json", "tokenizer_config.json", *variants} <= names
    assert set(artifact.manifest.files) == names - {MANIFEST}


def test_free_dimensions_are_called_batch_and_length(artifact: Artifact) -> None:
    session = onnxruntime.InferenceSession(artifact.path(GRAPH), providers=["CPUExecutionProvider"])
    assert {value.name: value.shape for value in session.get_inputs()} == {
        name: ["batch", "length"] for name in ("input_ids", "attention_mask", "token_type_ids")
    }
    assert [(value.name, value.shape) for value in session.get_outputs()] == [("logits", ["batch", 2])]


def test_every_shape_of_a_variant_is_fixed_and_no_weight_is_in_it(artifact: Artifact) -> None:
    for bucket in artifact.manifest.ladder:
        graph = onnx_ir.load(artifact.variant(bucket)).graph
        for node in graph:
            for output in node.outputs:
                assert output.shape is not None, (bucket.name, output.name)
                assert all(isinstance(size, int) for size in output.shape), (bucket.name, output.name, output.shape)
        inside = [v for v in graph.initializers.values() if not isinstance(v.const_value, onnx_ir.ExternalTensor)]
        assert all(v.const_value.size <= 8192 for v in inside)


def test_a_second_ladder_never_exports_again(tiny_bert: Path, artifact: Artifact, monkeypatch) -> None:
    monkeypatch.setattr("hf_bucket.compile.export", lambda *args, **kwargs: pytest.fail("exported again"))
    lines: list[str] = []
    other = compile_model(
        Source(name=str(tiny_bert)), CompileOptions(buckets=[9, 33], batch_sizes=[2]), report=lines.append
    )
    assert str(other.manifest.ladder) == "[b2_s9, b2_s33]"
    assert lines == ["specialising and checking 2 buckets: [b2_s9, b2_s33]"]
    assert other.path(WEIGHTS).stat().st_nlink > 1, "ladders of one model share their weights on disk"


def test_a_second_time_comes_from_the_cache_without_a_word(tiny_bert: Path, artifact: Artifact) -> None:
    again = compile_model(
        Source(name=str(tiny_bert)), CompileOptions(buckets=BUCKETS, batch_sizes=[1, 3]), report=pytest.fail
    )
    assert again == artifact


def test_a_damaged_cache_entry_is_made_again_with_a_warning(tiny_bert: Path) -> None:
    options = CompileOptions(buckets=[11], batch_sizes=[1])
    first = compile_model(Source(name=str(tiny_bert)), options, report=silent)
    variant = first.variant(first.manifest.ladder.buckets[0])
    variant.write_bytes(variant.read_bytes()[:-1])
    with pytest.warns(BucketWarning, match=r"compiling again: .*model_b1_s11\.onnx has \d+ bytes"):
        second = compile_model(Source(name=str(tiny_bert)), options, report=silent)
    assert open_artifact(second.folder) == second


@pytest.mark.parametrize("blocked", ["a file", "read-only"])
def test_without_a_usable_cache_the_model_still_compiles_with_one_warning(
    artifact: Artifact, tmp_path: Path, monkeypatch, blocked: str
) -> None:
    cache = tmp_path / "cache"
    if blocked == "a file":
        cache.write_text("in the way", encoding="utf-8")
    else:
        monkeypatch.setattr(
            "hf_bucket.cache.filelock.FileLock", lambda path: (_ for _ in ()).throw(PermissionError(path))
        )
    monkeypatch.setenv("HF_BUCKET_CACHE", str(cache))
    with pytest.warns(BucketWarning, match=r"cannot be written .*compiling without it") as caught:
        other = compile_model(Source(name=str(artifact.folder)), CompileOptions(buckets=[10]), report=silent)
    assert len(caught) == 1
    assert cache_root() not in other.folder.parents
    assert len(hf_bucket.load(other.folder)(["w1"])) == 1


def test_a_cache_that_may_only_be_read_serves_what_it_has(tiny_bert: Path, artifact: Artifact, monkeypatch) -> None:
    monkeypatch.setattr("hf_bucket.cache.filelock.FileLock", lambda path: (_ for _ in ()).throw(PermissionError(path)))
    options = CompileOptions(buckets=BUCKETS, batch_sizes=[1, 3])
    assert compile_model(Source(name=str(tiny_bert)), options, report=pytest.fail) == artifact


def test_a_cache_that_may_not_even_be_searched_is_done_without(artifact: Artifact, tmp_path: Path, monkeypatch) -> None:
    (tmp_path / "cache").write_text("in the way", encoding="utf-8")
    monkeypatch.setenv("HF_BUCKET_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("hf_bucket.cache.is_artifact", lambda path: (_ for _ in ()).throw(PermissionError(path)))
    with pytest.warns(BucketWarning, match="cannot be written"):
        compile_model(Source(name=str(artifact.folder)), CompileOptions(buckets=[10]), report=silent)


def test_a_disk_that_fills_up_leaves_no_half_entry_in_the_cache(
    artifact: Artifact, tmp_path: Path, monkeypatch
) -> None:
    cache, room = tmp_path / "cache", iter([1])
    monkeypatch.setenv("HF_BUCKET_CACHE", str(cache))

    def on_a_small_disk(*args) -> None:
        specialise(*args)
        if cache in args[-1].parents and next(room, 0) == 0:
            raise OSError(28, "No space left on device")

    monkeypatch.setattr("hf_bucket.finish.specialise", on_a_small_disk)
    with pytest.warns(BucketWarning, match="No space left on device"):
        other = compile_model(Source(name=str(artifact.folder)), CompileOptions(buckets=[10]), report=silent)
    assert len(hf_bucket.load(other.folder)(["w1"])) == 1
    assert not [
        path for path in cache.rglob("*") if path.is_file() and path.suffix != ".lock" and MACHINES not in path.parts
    ]


@pytest.fixture(scope="module")
def onnx_folder(artifact: Artifact, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The layout that optimum writes: ``onnx/model.onnx`` with its own names for free dimensions."""
    folder = tmp_path_factory.mktemp("onnx-export")
    (folder / "onnx").mkdir()
    model = onnx_ir.load(artifact.path(GRAPH))
    for value in (*model.graph.inputs, *model.graph.outputs):
        dims = [{"batch": "batch_size", "length": "sequence_length"}.get(str(dim), dim) for dim in value.shape]
        value.shape = onnx_ir.Shape(dims)
    copied = folder / "weights"
    copied.mkdir()
    for name in (GRAPH, WEIGHTS):
        shutil.copyfile(artifact.path(name), copied / name)
    for tensor in [v.const_value for v in model.graph.initializers.values()]:
        if isinstance(tensor, onnx_ir.ExternalTensor):
            tensor.base_dir = str(copied)
    onnx_ir.save(model, folder / "onnx" / "model.onnx", external_data="model.onnx_data")
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(artifact.path(name), folder / name)
    shutil.rmtree(copied)
    return folder


def test_a_folder_with_a_graph_is_taken_without_torch(onnx_folder: Path, torch_logits) -> None:
    code = (
        "import sys, json; sys.modules.update(torch=None, transformers=None, optimum=None)\n"
        "import hf_bucket\n"
        f"pipe = hf_bucket.pipeline(model={str(onnx_folder)!r}, buckets=[8, 32], function_to_apply='none')\n"
        f"print(json.dumps([pipe.runner.artifact.manifest.source, pipe([{text_of(5)!r}], top_k=None)]))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    source, [answer] = json.loads(done.stdout)
    scores = {entry["label"]: entry["score"] for entry in answer}
    assert [scores["LABEL_0"], scores["LABEL_1"]] == pytest.approx(list(torch_logits(text_of(5))), abs=1e-4)
    assert source["made_by"] == "onnx"


def test_a_graph_is_compared_with_what_it_answered_before_anything_was_done_to_it(
    onnx_folder: Path, tmp_path: Path, monkeypatch
) -> None:
    def spoil(model: onnx_ir.Model) -> None:
        weight = next(v for v in model.graph.initializers.values() if v.name == "classifier.weight")
        weight.const_value = onnx_ir.tensor(weight.const_value.numpy() + 1, name=weight.name)

    folder = Path(shutil.copytree(onnx_folder, tmp_path / "another"))
    (folder / "config.json").write_text((folder / "config.json").read_text() + "\n")  # not the one in the cache
    monkeypatch.setattr("hf_bucket.graph.narrow", spoil)
    with pytest.raises(ExportError, match="does not give the onnx answer: a logit differs by"):
        compile_model(Source(name=str(folder)), CompileOptions(buckets=[8]), report=silent)


def test_a_graph_with_fixed_dimensions_is_refused(artifact: Artifact, onnx_folder: Path, tmp_path: Path) -> None:
    shutil.copytree(onnx_folder, tmp_path / "fixed")
    bucket = artifact.manifest.ladder.buckets[0]
    target = tmp_path / "fixed" / "onnx"
    shutil.copyfile(artifact.variant(bucket), target / "model.onnx")
    with pytest.raises(ArtifactError, match=r"keeps weights in 'model\.onnx\.data', which cannot be read"):
        compile_model(Source(name=str(tmp_path / "fixed")), CompileOptions(buckets=[8]), report=silent)
    shutil.copyfile(artifact.path(WEIGHTS), target / WEIGHTS)
    with pytest.raises(ExportError, match=r"has shape .*'1', '7'.* expected free dimensions"):
        compile_model(Source(name=str(tmp_path / "fixed")), CompileOptions(buckets=[8]), report=silent)


def test_a_file_that_is_no_graph_is_refused_by_name(onnx_folder: Path, tmp_path: Path) -> None:
    shutil.copytree(onnx_folder, tmp_path / "bad")
    (tmp_path / "bad" / "onnx" / "model.onnx").write_bytes(b"not onnx")
    with pytest.raises(ExportError, match=r"model\.onnx cannot be read as ONNX"):
        compile_model(Source(name=str(tmp_path / "bad")), CompileOptions(buckets=[8]), report=silent)


@pytest.mark.parametrize(
    ("buckets", "message"),
    [
        ([], "buckets is empty"),
        ([0], "whole number of at least 1, got 0"),
        ([-8], "whole number of at least 1, got -8"),
        ([8, 8], "b1_s8 is given more than once"),
        ([65], "65.*maximum of 64"),
        ([1, 8], "b1_s1.*"),
        ("big", "'big'.*auto.*pow2|auto.*pow2.*'big'"),
    ],
    ids=["empty", "zero", "negative", "doubled", "too large", "unreachable", "unknown preset"],
)
def test_a_ladder_that_does_not_fit_is_refused_before_the_export(
    tiny_bert: Path, monkeypatch, buckets, message
) -> None:
    monkeypatch.setattr("hf_bucket.compile.export", lambda *args, **kwargs: pytest.fail("exported"))
    with pytest.raises(LadderError, match=message):
        compile_model(Source(name=str(tiny_bert)), CompileOptions(buckets=buckets), report=silent)


@pytest.mark.parametrize(
    "calibration",
    [
        [text_of(3)] * 9 + [text_of(20)],
        [{"text": text_of(3)}] * 9 + [{"text": text_of(10), "text_pair": text_of(9)}],
        [5] * 9 + [22],
        np.array([5] * 9 + [22]),
    ],
    ids=["texts", "dicts", "lengths", "array"],
)
def test_an_automatic_ladder_follows_the_calibration_data_and_reaches_the_maximum(
    artifact: Artifact, calibration
) -> None:
    options = CompileOptions(buckets="auto", n_buckets=3, batch_sizes=[1], calibration=calibration)
    other = compile_model(Source(name=str(artifact.folder)), options, report=silent)
    assert other.manifest.ladder.lengths == (5, 22, 64)


def test_without_calibration_an_automatic_ladder_says_so(artifact: Artifact) -> None:
    lines: list[str] = []
    options = CompileOptions(buckets="auto", n_buckets=2, batch_sizes=[1])
    other = compile_model(Source(name=str(artifact.folder)), options, report=lines.append)
    assert "no calibration_dataset" in lines[0]
    assert other.manifest.ladder.max_length == 64


@pytest.mark.parametrize(
    ("calibration", "message"), [([], "empty"), ("w1", "not a single text")], ids=["empty", "text"]
)
def test_calibration_data_that_is_none_is_refused(artifact: Artifact, calibration, message) -> None:
    with pytest.raises(LadderError, match=message):
        compile_model(Source(name=str(artifact.folder)), CompileOptions(buckets="auto", calibration=calibration))


def test_automatic_batch_sizes_are_the_joint_plan_and_the_same_the_second_time(
    tiny_bert: Path, tmp_path: Path, monkeypatch
) -> None:
    monkeypatch.setenv("HF_BUCKET_CACHE", str(tmp_path / "cache"))
    exports: list[object] = []
    monkeypatch.setattr(
        "hf_bucket.compile.export", lambda *args, **kwargs: exports.append(1) or export(*args, **kwargs)
    )
    lines: list[str] = []
    calibration = [text_of(3)] * 30 + [text_of(20)] * 5
    options = CompileOptions(batch_sizes="auto", n_buckets=3, calibration=iter(calibration), measure_s=0.2)
    first = compile_model(Source(name=str(tiny_bert)), options, report=lines.append)
    assert [line for line in lines if "measuring what a run of every bucket costs" in line] == [lines[2]]
    costs = measured_costs(first, EngineOptions(), 0.0, report=pytest.fail)
    assert first.manifest.ladder == plan([5] * 30 + [22] * 5, n_buckets=3, cost=costs, max_length=64).ladder
    Runner(first, RunOptions(measure_s=0.1)).close()  # measures its buckets too
    assert measured_costs(first, EngineOptions(), 0.0, report=pytest.fail).seconds == costs.seconds
    again = replace(options, calibration=calibration)
    assert compile_model(Source(name=str(tiny_bert)), again, report=pytest.fail) == first
    other = compile_model(Source(name=str(first.folder)), replace(again, calibration=[5, 64]), report=silent)
    assert other.manifest.ladder == plan([5, 64], n_buckets=3, cost=costs).ladder
    assert len(exports) == 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"buckets": [8], "calibration": [5]},
            r'batch_sizes="auto" is for buckets="auto", got \[8\]; give batch sizes',
        ),
        ({"buckets": "pow2", "calibration": [5]}, 'batch_sizes="auto" is for buckets="auto", got \'pow2\''),
        ({"buckets": "auto"}, 'batch_sizes="auto" needs to know the texts; give calibration_dataset'),
        ({}, 'batch_sizes="auto" needs to know the texts'),
        (
            {"batch_sizes": "all", "calibration": [5]},
            r"batch_sizes must be a list such as \[1, 8\], or \"auto\"; got 'all'",
        ),
    ],
    ids=["lengths", "pow2", "no texts", "nothing", "unknown"],
)
def test_automatic_batch_sizes_need_automatic_lengths_of_known_texts(options, message) -> None:
    with pytest.raises(LadderError, match=message):
        CompileOptions(**{"batch_sizes": "auto", **options})


def test_automatic_batch_sizes_come_through_the_doors(artifact: Artifact) -> None:
    options = {"buckets": "auto", "batch_sizes": "auto", "calibration_dataset": [5] * 9 + [22], "n_buckets": 2}
    model = hf_bucket.BucketedModelForSequenceClassification.from_pretrained(artifact.folder, **options)
    classify = hf_bucket.pipeline(model=artifact.folder, **options)
    assert (len(model.ladder) <= 2, model.ladder) == (True, classify.ladder)


def test_a_checkpoint_without_the_head_is_refused(tmp_path: Path) -> None:
    from transformers import BertModel

    folder = save_tiny_bert(tmp_path / "headless")
    BertModel.from_pretrained(folder).save_pretrained(folder)
    with pytest.raises(
        ModelError, match=r"has no weights for classifier.bias, classifier.weight: it was not trained for"
    ):
        compile_model(Source(name=str(folder)), CompileOptions(buckets=[8]), report=silent)


def test_a_tokenizer_that_knows_more_than_the_model_is_refused(tmp_path: Path) -> None:
    folder = save_tiny_bert(tmp_path / "small", vocab_size=50)
    with pytest.raises(ModelError, match="the tokenizer has ids up to 93 but the model embeds only 0 to 49"):
        compile_model(Source(name=str(folder)), CompileOptions(buckets=[8]), report=silent)


def test_a_tokenizer_without_a_pad_token_is_refused(tmp_path: Path) -> None:
    from transformers import PreTrainedTokenizerFast

    folder = save_tiny_bert(tmp_path / "padless")
    PreTrainedTokenizerFast(tokenizer_object=tiny_tokenizer(), unk_token="[UNK]").save_pretrained(folder)
    with pytest.raises(ModelError, match="the tokenizer has no pad token"):
        compile_model(Source(name=str(folder)), CompileOptions(buckets=[8]), report=silent)


def test_an_unknown_dtype_lists_the_known_ones() -> None:
    with pytest.raises(ModelError, match="dtype must be one of float32, float16, got 'int8'"):
        CompileOptions(dtype="int8")  # type: ignore[arg-type]


def test_a_provider_that_is_not_installed_lists_those_that_are(artifact: Artifact) -> None:
    with pytest.raises(
        ProviderError, match=r"'TensorrtExecutionProvider' is not installed; use .*CPUExecutionProvider"
    ):
        hf_bucket.load(artifact.folder, provider="TensorrtExecutionProvider")


def test_an_unknown_mode_lists_the_known_ones(artifact: Artifact) -> None:
    with pytest.raises(ProviderError, match='mode must be "shared", "static" or "auto", got \'fast\''):
        hf_bucket.load(artifact.folder, mode="fast")  # type: ignore[arg-type]


def test_a_squeeze_that_names_no_axes_keeps_a_batch_of_one(tmp_path: Path) -> None:
    """As in mBART's decoder: torch squeezed what was 1 in a batch of two, onnxruntime would the batch too."""
    onnx, helper = pytest.importorskip("onnx"), pytest.importorskip("onnx.helper")
    inputs = [
        helper.make_tensor_value_info(name, onnx.TensorProto.INT64, ["n", "s"])
        for name in ("input_ids", "attention_mask")
    ]
    nodes = [
        helper.make_node("Mul", ["input_ids", "attention_mask"], ["product"]),
        helper.make_node("ReduceSum", ["product", "one"], ["column"], keepdims=1),
        helper.make_node("Squeeze", ["column"], ["bare"]),
        helper.make_node("Unsqueeze", ["bare", "one"], ["again"]),
        helper.make_node("Cast", ["again"], ["logits"], to=onnx.TensorProto.FLOAT),
    ]
    graph = helper.make_graph(
        nodes,
        "squeezing",
        inputs,
        [helper.make_tensor_value_info("logits", onnx.TensorProto.FLOAT, ["n", 1])],
        [helper.make_tensor("one", onnx.TensorProto.INT64, [1], [1])],
        value_info=[helper.make_tensor_value_info("column", onnx.TensorProto.INT64, ["n", 1])],
    )
    model = onnx_ir.from_proto(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10))
    signature = adopt(model, get_task("text-classification"), {"input_ids": 0, "attention_mask": 0})
    save_graph(model, tmp_path / GRAPH)
    specialise(tmp_path / GRAPH, Bucket(batch_size=1, extent=(2,)), signature, tmp_path / "variant.onnx")
    arrays = {name: np.array([[3, 4]]) for name in ("input_ids", "attention_mask")}
    for path in (tmp_path / GRAPH, tmp_path / "variant.onnx"):
        (logits,) = onnxruntime.InferenceSession(str(path)).run(None, arrays)
        np.testing.assert_array_equal(logits, [[25.0]])


def test_a_graph_that_is_repaired_is_its_own_reference(onnx_folder: Path, tmp_path: Path) -> None:
    """A Squeeze without axes would take the batch of one away from the reference, too."""
    folder = Path(shutil.copytree(onnx_folder, tmp_path / "squeezing"))
    model = onnx_ir.load(folder / "onnx" / "model.onnx")
    logits = model.graph.outputs[0]
    axes = onnx_ir.node("Constant", [], {"value": onnx_ir.tensor(np.array([2]))})
    wider = onnx_ir.node("Unsqueeze", [logits, axes.outputs[0]])
    wider.outputs[0].shape = onnx_ir.Shape([*logits.shape, 1])
    wider.outputs[0].dtype = logits.dtype
    squeezed = onnx_ir.node("Squeeze", [wider.outputs[0]])
    out = squeezed.outputs[0]
    out.shape, out.dtype = onnx_ir.Shape(logits.shape), logits.dtype
    logits.name, out.name = "before", "logits"
    model.graph.extend([axes, wider, squeezed])
    model.graph.outputs[:] = [out]
    onnx_ir.save(model, folder / "onnx" / "model.onnx")
    made = compile_model(Source(name=str(folder)), CompileOptions(buckets=[8], batch_sizes=[1, 2]), report=silent)
    assert all(check.n > 0 and check.max_abs_delta < 1e-4 for check in made.manifest.validation)


def test_a_graph_that_onnxruntime_refuses_is_named(artifact: Artifact, tmp_path: Path) -> None:
    folder = tmp_path / "broken"
    shutil.copytree(artifact.folder, folder)
    (folder / GRAPH).write_bytes(b"nothing")
    manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
    import hashlib

    del manifest["sha256"]
    manifest["files"][GRAPH] = {"size": 7, "sha256": hashlib.sha256(b"nothing").hexdigest()}
    (folder / MANIFEST).write_text(json.dumps(manifest), encoding="utf-8")
    with pytest.raises(ArtifactError, match=r"model\.onnx cannot be loaded by onnxruntime"):
        hf_bucket.load(folder)


def test_an_artifact_runs_with_torch_never_imported(artifact: Artifact) -> None:
    code = (
        "import sys, hf_bucket\n"
        f"runner = hf_bucket.load({str(artifact.folder)!r})\n"
        "assert len(runner(['w1', ('w2', 'w3')])) == 2\n"
        "print([name for name in ('torch', 'transformers', 'onnx', 'onnxscript') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_a_model_whose_answer_depends_on_padding_is_refused(tmp_path: Path) -> None:
    """ConvBERT's convolutions see the padding; torch itself answers differently when a row is padded."""
    import torch
    from transformers import ConvBertConfig, ConvBertForSequenceClassification, PreTrainedTokenizerFast

    torch.manual_seed(0)
    config = ConvBertConfig(
        vocab_size=4 + len(WORDS),
        hidden_size=32,
        embedding_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=64,
        max_position_embeddings=64,
        pad_token_id=3,
        initializer_range=0.5,
    )
    ConvBertForSequenceClassification(config).save_pretrained(tmp_path)
    PreTrainedTokenizerFast(tokenizer_object=tiny_tokenizer(), pad_token="[PAD]", unk_token="[UNK]").save_pretrained(
        tmp_path
    )
    wanted = CompileOptions(buckets=[16, 32])
    message = r"padding changes what ConvBertForSequenceClassification answers: .* allow_padding_leak=True"
    with pytest.raises(PaddingLeakError, match=message):
        compile_model(Source(name=str(tmp_path)), wanted, report=silent)
    allowed = compile_model(
        Source(name=str(tmp_path)), replace(wanted, allow_padding_leak=True), report=silent
    ).manifest
    assert allowed.padding_leak > 0.1
    assert max(check.max_abs_delta for check in allowed.validation) > 0.01


def test_the_cache_lists_what_it_holds_and_can_be_emptied(artifact: Artifact, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setenv("HF_BUCKET_CACHE", str(tmp_path / "cache"))
    assert entries() == []
    for length in (9, 10):
        made = compile_model(Source(name=str(artifact.folder)), CompileOptions(buckets=[length]), report=silent)
    assert [entry.ladder for entry in entries() if entry.folder == made.folder] == ["[b1_s10, b8_s10]"]
    (made.folder / GRAPH).unlink()
    assert "model.onnx is missing" in next(entry.problem for entry in entries() if entry.folder == made.folder)
    assert clear() == 2
    assert entries() == []


def test_an_artifact_can_be_checked_again_and_a_wrong_weight_shows(artifact: Artifact, tmp_path: Path) -> None:
    assert [check.bucket for check in check_buckets(artifact)] == [bucket.name for bucket in artifact.manifest.ladder]
    shutil.copytree(artifact.folder, tmp_path / "bent")
    weights = tmp_path / "bent" / WEIGHTS
    values = np.fromfile(weights, dtype=np.float32)
    (values * np.float32(1.01)).tofile(weights)
    with pytest.raises(ExportError, match="does not give the torch answer"):
        check_buckets(Artifact(folder=tmp_path / "bent", manifest=artifact.manifest))


def test_lengths_may_come_as_an_array(tiny_bert: Path) -> None:
    options = CompileOptions(buckets=np.array([8, 16]), batch_sizes=[1])
    made = compile_model(Source(name=str(tiny_bert)), options, report=lambda line: None)
    assert made.manifest.ladder.lengths == (8, 16)
    again = compile_model(Source(name=str(made.folder)), options, report=lambda line: None)
    assert again.manifest.ladder == made.manifest.ladder
