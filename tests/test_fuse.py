"""What is made of a graph before it runs is chosen by measurement, and whatever is chosen, the answer is the same."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import text_of
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_bucket import finish as finishing
from hf_bucket import fuse
from hf_bucket.artifact import GRAPH, Artifact, open_artifact, record_files
from hf_bucket.compile import CompileOptions, compile_model
from hf_bucket.encode import Encoder
from hf_bucket.errors import ArtifactError, ExportError
from hf_bucket.fuse import _choice, _spread, choose_fusion
from hf_bucket.fusions import FUSIONS, OWN, get_fusion
from hf_bucket.ladder import Bucket, make_ladder
from hf_bucket.manifest import MANIFEST, FusionChoice
from hf_bucket.probes import PROBES, load_probes, sample_batch, validate
from hf_bucket.runner import Runner, RunOptions
from hf_bucket.session import Session
from hf_bucket.session_ort import CPU, EngineOptions, Mode
from hf_bucket.source import Source

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")

TEXTS = [text_of(length) for length in (1, 5, 6, 13, 14, 3, 2)]
NAMES = [fusion.name for fusion in FUSIONS]
REWRITTEN = [fusion for fusion in FUSIONS if fusion.rewritten]


@pytest.fixture(scope="module")
def compiled(tiny_bert: Path) -> Artifact:
    return compile_model(Source(name=str(tiny_bert)), CompileOptions(buckets=[8, 16], batch_sizes=[1, 3]))


@pytest.fixture
def folder(compiled: Artifact, tmp_path: Path) -> Path:
    """A copy that graphs may be left in."""
    return Path(shutil.copytree(compiled.folder, tmp_path / "model"))


def tried(folder: Path, monkeypatch: pytest.MonkeyPatch, said: list[str], **options: float) -> FusionChoice | None:
    """The choice for the tiny model, as if its runs were long enough to tell."""
    monkeypatch.setattr(fuse, "SHORTEST_S", 0.0)
    monkeypatch.setattr(fuse, "_EACH_S", 0.01)
    manifest = open_artifact(folder).manifest
    encoder = Encoder((folder / "tokenizer.json").read_text(), inputs=manifest.signature.input_names)

    def batches(bucket: Bucket) -> Mapping[str, np.ndarray]:
        return sample_batch(encoder, bucket, manifest.signature, manifest.vocab_size)

    reference, probes = load_probes(folder / PROBES)

    def check(session: Session) -> None:
        validate(
            session.bucket, session, probes, manifest.signature, reference=reference, atol=options.get("atol", 1e-4)
        )

    rewrite = options.get("rewrite", True)
    return choose_fusion(folder, manifest.ladder, batches, check=check if rewrite else None, report=said.append)


def logits(artifact: Artifact, mode: Mode = "shared") -> np.ndarray:
    return np.stack([row["logits"] for row in Runner(artifact, RunOptions(engine=EngineOptions(mode=mode)))(TEXTS)])


# the answer


@pytest.mark.parametrize("mode", ["shared", "static"])
@pytest.mark.parametrize("fusion", FUSIONS, ids=NAMES)
def test_every_way_gives_the_same_answer(
    compiled: Artifact, folder: Path, monkeypatch: pytest.MonkeyPatch, fusion, mode: Mode
) -> None:
    def always(relative: fuse.Relative, buckets: object) -> FusionChoice:
        assert set(relative) == set(NAMES), "all of them could be tried"
        return FusionChoice(provider="CPUExecutionProvider", chosen=fusion.name, buckets={}, relative={})

    monkeypatch.setattr(fuse, "_choice", always)
    said: list[str] = []
    choice = tried(folder, monkeypatch, said)
    assert said == []
    left = {path.name for path in folder.iterdir()} - {path.name for path in compiled.folder.iterdir()}
    assert left == ({fusion.rewritten} if fusion.rewritten else set()), "only the graph that is run stays"
    manifest = replace(open_artifact(compiled.folder).manifest, fusion=choice, files=record_files(folder))
    (folder / MANIFEST).write_text(manifest.to_json())
    np.testing.assert_allclose(logits(open_artifact(folder), mode), logits(compiled), atol=1e-5)


def test_rewritten_graphs_take_their_weights_from_the_same_file(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Path, "unlink", lambda *_, **__: None)
    weights = (folder / f"{GRAPH}.data").stat().st_size
    tried(folder, monkeypatch, [])
    for fusion in REWRITTEN:
        assert (folder / fusion.rewritten).stat().st_size < weights
        assert f"{GRAPH}.data".encode() in (folder / fusion.rewritten).read_bytes()


def test_a_manifest_that_asks_for_an_unknown_way_is_refused(folder: Path) -> None:
    choice = FusionChoice(provider="CPUExecutionProvider", chosen="magic", buckets={}, relative={})
    manifest = replace(open_artifact(folder).manifest, fusion=choice)
    (folder / MANIFEST).write_text(manifest.to_json())
    with pytest.raises(
        ArtifactError, match=r"asks for the fusion 'magic', known are onnxruntime, .*; upgrade hf_bucket"
    ):
        Runner(open_artifact(folder))


def test_another_provider_runs_the_graph_as_it_is(folder: Path) -> None:
    choice = FusionChoice(provider="SomeExecutionProvider", chosen="magic", buckets={}, relative={})
    manifest = replace(open_artifact(folder).manifest, fusion=choice)
    (folder / MANIFEST).write_text(manifest.to_json())
    assert len(logits(open_artifact(folder))) == len(TEXTS)


# the choice


def test_runs_too_short_to_tell_choose_nothing(compiled: Artifact) -> None:
    assert compiled.manifest.fusion is None


def test_every_bucket_tried_has_its_figures(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = tried(folder, monkeypatch, [], rewrite=False)
    assert found is not None
    assert (
        set(found.relative)
        == set(found.buckets)
        == {bucket.name for bucket in make_ladder([8, 16], batch_sizes=[1, 3])}
    )
    for ratios in found.relative.values():
        assert set(ratios) == set(NAMES) - {fusion.name for fusion in REWRITTEN}
        assert ratios[OWN.name] == 1.0
        assert min(ratios.values()) > 0


@settings(deadline=None)
@given(
    st.lists(st.tuples(st.integers(1, 9), st.integers(1, 99)), min_size=1, max_size=12, unique=True),
    st.integers(1, 1000),
)
def test_buckets_tried_reach_from_the_smallest_to_the_largest_that_is_not_too_long(
    pairs: list[tuple[int, int]], most_cells: int
) -> None:
    ladder = make_ladder(pairs)
    found = _spread(ladder, most_cells=most_cells)
    cells = sorted(bucket.cells for bucket in ladder)
    short = [size for size in cells if size <= most_cells] or cells[:1]
    assert len(found) == len(set(found)) == min(4, len(short))
    assert [bucket.cells for bucket in found] == sorted(bucket.cells for bucket in found)
    assert (found[0].cells, found[-1].cells) == (short[0], short[-1])


def test_a_run_that_is_too_long_to_be_timed_often_is_not_tried(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fuse, "_LONGEST_S", 0.5)
    monkeypatch.setattr(fuse._Way, "seconds", lambda *_: 1.0)
    found = tried(folder, monkeypatch, [], rewrite=False)
    assert found is not None
    assert set(found.buckets) == {"b1_s8", "b1_s16", "b3_s8"}, "the largest has 48 cells, half of them are 24"


SMALL, LARGE = make_ladder([(1, 8), (8, 64)])


@pytest.mark.parametrize(
    ("small", "large", "chosen", "buckets"),
    [
        pytest.param(0.98, 0.99, "onnxruntime", ("onnxruntime", "onnxruntime"), id="noise changes nothing"),
        pytest.param(0.9, 0.8, "none", ("none", "none"), id="better for both"),
        pytest.param(1.1, 0.8, "none", ("onnxruntime", "none"), id="better on the whole, worse for one"),
        pytest.param(1.2, 0.9, "onnxruntime", ("onnxruntime", "none"), id="worse on the whole, better for one"),
        pytest.param(0.94, 0.99, "none", ("none", "none"), id="a little better on the whole"),
    ],
)
def test_the_best_on_the_whole_is_chosen_and_another_where_it_is_clearly_better(
    small: float, large: float, chosen: str, buckets: tuple[str, str]
) -> None:
    relative = {OWN.name: {SMALL: 1.0, LARGE: 1.0}, "none": {SMALL: small, LARGE: large}}
    found = _choice(relative, [SMALL, LARGE])
    assert (found.chosen, tuple(found.buckets.values())) == (chosen, buckets)
    assert found.relative == {bucket.name: {n: r[bucket] for n, r in relative.items()} for bucket in (SMALL, LARGE)}


@pytest.mark.parametrize("fusion", REWRITTEN, ids=[fusion.name for fusion in REWRITTEN])
def test_a_tool_that_fails_is_reported_and_left_out(folder: Path, monkeypatch: pytest.MonkeyPatch, fusion) -> None:
    def fails(model: object, graph: Path) -> None:
        raise RuntimeError("no such pattern\nand more")

    tools = {
        "token-list": "_by_flatten",
        "ort_fusions": "_by_transformers",
        "onnxruntime.transformers": "_by_onnxruntime",
    }
    monkeypatch.setattr(fuse, tools[fusion.name], fails)
    said: list[str] = []
    found = tried(folder, monkeypatch, said)
    assert said == [f"{fusion.name} is not used on this model: RuntimeError: no such pattern"]
    assert found is not None
    assert all(fusion.name not in ratios for ratios in found.relative.values())


def test_a_graph_that_gives_another_answer_is_reported_and_left_out(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    said: list[str] = []
    found = tried(folder, monkeypatch, said, atol=-1.0)
    assert len(said) == len(REWRITTEN)
    for fusion, line in zip(REWRITTEN, said, strict=True):
        assert line.startswith(
            f"{fusion.name} is not used on this model: ExportError: bucket b1_s8 does not give the torch answer"
        )
    assert found is not None
    assert not [fusion for fusion in REWRITTEN if (folder / fusion.rewritten).exists()]


def test_a_graph_that_cannot_be_run_is_reported_and_left_out(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import onnx_ir

    def breaks(model: onnx_ir.Model, graph: Path) -> onnx_ir.Model:
        """Give the mask rows of 7 tokens, which no bucket has."""
        mask = next(value for value in model.graph.inputs if value.name == "attention_mask")
        sizes = onnx_ir.node("Constant", [], {"value": onnx_ir.tensor(np.array([-1, 7]))})
        wrong = onnx_ir.node("Reshape", [mask, sizes.outputs[0]])
        for node, slot in list(mask.uses()):
            if node is not wrong:
                node.replace_input_with(slot, wrong.outputs[0])
        model.graph.insert_before(model.graph[0], [sizes, wrong])
        return model

    monkeypatch.setattr(fuse, "_by_flatten", breaks)
    said: list[str] = []
    found = tried(folder, monkeypatch, said)
    (line,) = said
    assert line.startswith("token-list is not used on this model: ")
    assert "Reshape" in line
    assert found is not None
    assert all("token-list" not in ratios for ratios in found.relative.values())


def test_a_graph_that_flatten_leaves_alone_is_not_tried(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fuse, "flatten", lambda *_: 0)
    said: list[str] = []
    tried(folder, monkeypatch, said)
    assert said == ["token-list is not used on this model: ExportError: none of its linear layers takes rows of tokens"]


def test_a_graph_that_fails_in_a_bucket_that_was_not_tried_is_reported_and_left_out(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A later ladder takes over what was chosen for an earlier one."""
    manifest = replace(
        open_artifact(folder).manifest, fusion=FusionChoice(provider=CPU, chosen="ort_fusions", buckets={}, relative={})
    )
    shutil.copyfile(folder / GRAPH, folder / "model_ort_fusions.onnx")
    opened = finishing.open_unpacked

    def broken(artifact: Artifact, options: EngineOptions) -> Any:
        if artifact.manifest.fusion is not None:
            raise RuntimeError("bucket b3_s16 does not run")
        return opened(artifact, options)

    monkeypatch.setattr(finishing, "open_unpacked", broken)
    said: list[str] = []
    finishing.finish(folder, manifest, said.append)
    assert said[-1] == ("model_ort_fusions.onnx is not used on this model: RuntimeError: bucket b3_s16 does not run")
    made = open_artifact(folder).manifest
    assert (made.fusion, len(made.validation)) == (None, 4)
    assert not (folder / "model_ort_fusions.onnx").exists()
    monkeypatch.setattr(finishing, "open_unpacked", lambda *_: (_ for _ in ()).throw(ExportError("the graph's fault")))
    with pytest.raises(ExportError, match="the graph's fault"):
        finishing.finish(
            folder,
            replace(manifest, fusion=FusionChoice(provider=CPU, chosen="onnxruntime", buckets={}, relative={})),
            said.append,
        )


def test_the_largest_bucket_is_checked_though_it_is_not_timed(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checked: list[str] = []
    monkeypatch.setattr(fuse, "_LONGEST_S", 0.5)
    monkeypatch.setattr(fuse, "SHORTEST_S", 0.0)
    monkeypatch.setattr(fuse, "_EACH_S", 0.01)
    monkeypatch.setattr(fuse._Way, "seconds", lambda *_: 1.0)
    manifest = open_artifact(folder).manifest
    encoder = Encoder((folder / "tokenizer.json").read_text(), inputs=manifest.signature.input_names)
    choose_fusion(
        folder,
        manifest.ladder,
        lambda bucket: sample_batch(encoder, bucket, manifest.signature, manifest.vocab_size),
        check=lambda session: checked.append(session.bucket.name),
        report=[].append,
    )
    assert set(checked) == {bucket.name for bucket in manifest.ladder}


def test_a_graph_that_loses_the_padding_mask_is_noticed(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Full rows alone would not tell."""
    import onnx_ir

    def forgets(model: onnx_ir.Model, graph: Path) -> onnx_ir.Model:
        mask = next(value for value in model.graph.inputs if value.name == "attention_mask")
        ids = next(value for value in model.graph.inputs if value.name == "input_ids")
        whole = onnx_ir.node("Equal", [ids, ids])
        cast = onnx_ir.node("Cast", [whole.outputs[0]], {"to": 7})
        for node, slot in list(mask.uses()):
            node.replace_input_with(slot, cast.outputs[0])
        model.graph.insert_before(model.graph[0], [whole, cast])
        return model

    monkeypatch.setattr(fuse, "_by_transformers", forgets)
    said: list[str] = []
    tried(folder, monkeypatch, said)
    assert [line.split(" does")[0] for line in said] == [
        "ort_fusions is not used on this model: ExportError: bucket b1_s8"
    ]


def test_ways_have_names_of_their_own() -> None:
    assert len(set(NAMES)) == len(NAMES)
    assert [get_fusion(name) for name in NAMES] == list(FUSIONS)
