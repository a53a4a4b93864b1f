"""Certificates: figures that torch alone confirms, failures that are told and kept, a manifest that is whole."""

from __future__ import annotations

import csv
import errno
import json
import os
import shutil
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx_ir
import pytest
from conftest import fake_artifact, save_tiny_bert, text_of, tiny_tokenizer
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_bucket import evidence as room
from hf_bucket.artifact import GRAPH, WEIGHTS, Artifact, copy_artifact, open_artifact, record_files
from hf_bucket.certificate import certify, nearest_rank, store, variants
from hf_bucket.cli import main
from hf_bucket.compile import CompileOptions, compile_model
from hf_bucket.encode import Encoder
from hf_bucket.errors import ArtifactError, DataError, DependencyError, ModelError
from hf_bucket.evidence import Evidence, open_texts, probe_evidence, text_evidence
from hf_bucket.graph import save_rewritten
from hf_bucket.ladder import make_ladder
from hf_bucket.manifest import MANIFEST, Certificate, FusionChoice, Manifest
from hf_bucket.session import FakeSession
from hf_bucket.session_ort import CPU
from hf_bucket.source import Source

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")

LENGTHS = (8, 32)
TEXTS = [text_of(n, start) for start, n in enumerate([1, 6, 7, 30, 0, 3, 12, 6, 25, 2, 31, 40, 5] * 3)]


@pytest.fixture(scope="module")
def compiled(tiny_bert: Path, tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    made = compile_model(Source(name=str(tiny_bert)), CompileOptions(buckets=list(LENGTHS), batch_sizes=[1, 4]))
    return copy_artifact(made, tmp_path_factory.mktemp("certificate") / "model")


@pytest.fixture
def artifact(compiled: Artifact, tmp_path: Path) -> Path:
    """A copy that a test may spoil."""
    return Path(shutil.copytree(compiled.folder, tmp_path / "model"))


@pytest.fixture
def data(tmp_path: Path) -> Path:
    path = tmp_path / "texts.txt"
    path.write_text("".join(f"{text}\n" for text in TEXTS), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def stranger(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of the same shape whose answers are others."""
    return save_tiny_bert(tmp_path_factory.mktemp("stranger"), seed=1)


def run(capfd, *arguments: object) -> tuple[int, str, str]:
    status = main(["validate", *map(str, arguments)])
    out, err = capfd.readouterr()
    return status, out, err


def certificates(folder: Path) -> tuple[Certificate, ...]:
    return open_artifact(folder).manifest.certificates


def change_manifest(folder: Path, change: Callable[[Manifest], Manifest]) -> None:
    manifest = Manifest.from_json((folder / MANIFEST).read_text())
    (folder / MANIFEST).write_text(change(manifest).to_json())


def change_weights(folder: Path, change: Callable[[np.ndarray], np.ndarray]) -> None:
    """Alter the weights and have the manifest agree, so that only their answers can tell."""
    weights = np.fromfile(folder / WEIGHTS, dtype=np.float32)
    change(weights).astype(np.float32).tofile(folder / WEIGHTS)
    change_manifest(folder, lambda manifest: replace(manifest, files=record_files(folder)))


def torch_alone(checkpoint: Path, texts: Sequence[str | tuple[str, str]]) -> np.ndarray:
    """Logits by transformers, one row at a time. Shape: (row, label)."""
    import torch
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    model = AutoModelForSequenceClassification.from_pretrained(checkpoint).eval()
    parts = [(text,) if isinstance(text, str) else text for text in texts]
    with torch.inference_mode():
        rows = [model(**tokenizer(*part, return_tensors="pt")).logits[0].numpy() for part in parts]
    return np.stack(rows).astype(np.float64)


def lengths_of(texts: Sequence[str]) -> np.ndarray:
    return np.array([len(text.split()) + 2 for text in texts])


# properties


@settings(deadline=None, max_examples=40)
@given(
    sizes=st.lists(st.integers(0, 14), min_size=1, max_size=40),
    lengths=st.lists(st.integers(3, 12), min_size=1, max_size=3, unique=True),
    batch_sizes=st.lists(st.integers(1, 5), min_size=1, max_size=2, unique=True),
    windows=st.tuples(st.integers(1, 7), st.integers(8, 50)),
    errors=st.lists(st.sampled_from([0.0, 0.25, 300.0]), min_size=1, max_size=5),
)
def test_the_figures_are_those_of_all_rows_at_once_whatever_the_window(
    tmp_path_factory: pytest.TempPathFactory, sizes, lengths, batch_sizes, windows, errors
) -> None:
    folder = tmp_path_factory.mktemp("fake")
    artifact = fake_artifact(folder / "model", make_ladder(lengths, batch_sizes=batch_sizes))
    texts = [text_of(size, start) for start, size in enumerate(sizes)]
    (folder / "texts.txt").write_text("".join(f"{text}\n" for text in texts))
    rows = Encoder(tiny_tokenizer().to_str(), inputs=["input_ids"])(texts).columns["input_ids"]
    exact = {text: np.array([sum(ids), len(ids)], dtype=np.float32) for text, ids in zip(texts, rows, strict=True)}
    moved = {text: exact[text] + [0, errors[row % len(errors)]] for row, text in enumerate(texts)}
    fitting = [text for text in texts if len(text.split()) + 2 <= max(lengths)]
    if not fitting:
        return

    def answer(asked: Sequence[object]) -> np.ndarray:
        return np.stack([moved[text] for text in asked]).astype(np.float32)

    found = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(room, "choose_reference", lambda *_: ("torch", answer))
        for window in windows:
            file = open_texts(folder / "texts.txt")
            evidence = text_evidence(artifact, file, window=window, report=lambda line: None)
            assert (evidence.too_long, len(evidence.expected)) == (len(texts) - len(fitting), len(fitting))
            figures = certify(artifact.manifest, evidence, {"variant": FakeSession})
            found.append([replace(one, batch_s=None) for one in figures])
    assert found[0] == found[1]
    for bucket, got in zip(artifact.manifest.ladder, found[0], strict=True):
        held = [text for text in fitting if len(text.split()) + 2 <= bucket.length]
        deltas = sorted(float(np.abs(moved[text] - exact[text]).max()) for text in held)
        flips = sum(moved[text].argmax() != exact[text].argmax() for text in held)
        assert (got.bucket, got.n, got.label_flips) == (bucket.name, len(held), flips)
        assert got.max_abs_delta == (deltas[-1] if deltas else 0)
        assert sum(delta <= got.p99_abs_delta for delta in deltas) >= 0.99 * len(deltas)
        assert sum(delta < got.p99_abs_delta for delta in deltas) < max(1, 0.99 * len(deltas))


# oracles


def test_the_figures_are_what_torch_and_torch_differ_by(capfd, tiny_bert, stranger, artifact, data) -> None:
    """Against another checkpoint the differences are large, and torch alone says how large."""
    status, out, err = run(capfd, artifact, "--data", data, "--checkpoint", stranger, "--json")
    fitting = [text for text in TEXTS if len(text.split()) + 2 <= max(LENGTHS)]
    ours, theirs = torch_alone(tiny_bert, fitting), torch_alone(stranger, fitting)
    found = json.loads(out)
    assert (status, found["passed"], found["rows"], found["too_long"]) == (1, False, len(fitting), 6)
    assert f"reference: torch without padding, {stranger}" in err
    for got in found["certificates"]:
        held = lengths_of(fitting) <= int(got["bucket"].split("_s")[1])
        deltas = np.sort(np.abs(ours - theirs).max(axis=1)[held])
        flips = int((ours.argmax(axis=1) != theirs.argmax(axis=1))[held].sum())
        assert flips > 0
        assert (got["n"], got["label_flips"], got["passed"]) == (held.sum(), flips, False)
        assert got["max_abs_delta"] == pytest.approx(deltas[-1], abs=1e-4)
        assert got["p99_abs_delta"] == pytest.approx(deltas[int(np.ceil(0.99 * held.sum())) - 1], abs=1e-4)
        assert got["allowed"] == pytest.approx(1e-4 * max(1, np.abs(theirs).max()))


def test_every_bucket_is_certified_against_the_checkpoint_it_was_compiled_from(capfd, artifact, data) -> None:
    status, out, err = run(capfd, artifact, "--data", data)
    assert (status, out.count("ok, allowed"), out.count("texts.txt")) == (0, 4, 4)
    assert "which the artifact was compiled from" in err
    assert "skipped 6 rows longer than the largest bucket, 32 tokens, and 0 without a token" in err
    stored = certificates(artifact)
    assert [found.bucket for found in stored] == ["b1_s8", "b4_s8", "b1_s32", "b4_s32"]
    assert {(found.reference, found.data, found.precision) for found in stored} == {("torch", "texts.txt", "float32")}
    held = [int((lengths_of(TEXTS) <= length).sum()) for length in LENGTHS]
    assert [found.n for found in stored] == [held[0], held[0], held[1], held[1]]
    assert all(found.passed and 0 < found.max_abs_delta < 1e-4 for found in stored)


def test_pairs_are_compared_as_pairs(capfd, tiny_bert, stranger, artifact, tmp_path: Path) -> None:
    pairs = [(text_of(n, n), text_of(2 * n, 50)) for n in range(1, 6)]
    with (tmp_path / "pairs.csv").open("w", newline="") as file:
        csv.writer(file).writerows([("a", "b"), *pairs])
    columns = ["--column", "a", "--pair-column", "b"]
    _, out, _ = run(capfd, artifact, "--data", tmp_path / "pairs.csv", *columns, "--checkpoint", stranger, "--json")
    last = json.loads(out)["certificates"][-1]
    deltas = np.abs(torch_alone(tiny_bert, pairs) - torch_alone(stranger, pairs))
    assert (last["n"], last["max_abs_delta"]) == (5, pytest.approx(deltas.max(), abs=1e-4))


# tables


@pytest.mark.parametrize(
    ("n", "expected"),
    [(1, 1), (2, 2), (99, 99), (100, 99), (101, 100), (200, 198), (201, 199)],
)
def test_99_of_100_values_do_not_exceed_the_p99(n: int, expected: int) -> None:
    assert nearest_rank(np.arange(1, n + 1, dtype=np.float64), 99) == expected


@pytest.mark.parametrize(("outliers", "p99"), [(1, 0.5), (2, 0.5), (3, 9.0)])
def test_two_rows_of_200_are_beyond_the_p99_and_three_are_not(tmp_path: Path, monkeypatch, outliers, p99) -> None:
    artifact = fake_artifact(tmp_path / "model", make_ladder([4], batch_sizes=[8]))
    (tmp_path / "x.txt").write_text("w0\n" * 200)  # tokens 1, 4, 2
    deltas = iter([0.5] * 100 + [9.0] * outliers + [0.5] * (100 - outliers))
    shifted = lambda texts: np.array([[7 + next(deltas), 3] for _ in texts])  # noqa: E731
    monkeypatch.setattr(room, "choose_reference", lambda *_: ("torch", shifted))
    evidence = text_evidence(artifact, open_texts(tmp_path / "x.txt"), report=lambda line: None)
    (found,) = certify(artifact.manifest, evidence, {"variant": FakeSession})
    assert (found.n, found.max_abs_delta, found.p99_abs_delta) == (200, 9.0, p99)


@pytest.mark.parametrize(
    ("name", "content", "arguments", "message"),
    [
        pytest.param(
            "x.csv", "id,n\n1,2\n", [], "x.csv: no column is called .* 2 of the columns id, n hold", id="none"
        ),
        pytest.param("x.csv", "id,text\n1,a\n", ["--column", "txt"], "no column 'txt'; it has id, text", id="misspelt"),
        pytest.param("x.jsonl", '{"text": "a"}\n{"text": 3}\n', [], "line 2: column 'text' holds 3", id="no text"),
        pytest.param(
            "x.jsonl", '{"text": "a"}\n{"txt": "b"}\n', [], "line 2: no column 'text'; .* txt", id="one lacks"
        ),
        pytest.param("x.jsonl", '{"text": "\\ud800"}\n', [], "line 1: a lone surrogate", id="surrogate"),
        pytest.param("x.jsonl", "not json\n", [], "has no row that can be read", id="damaged"),
        pytest.param("x.txt", "", [], "has no row that can be read", id="empty"),
        pytest.param("x.txt", f"{text_of(60)}\n", [], "no row to compare: 1 rows, 1 of them longer", id="all too long"),
        pytest.param("x.dat", "a", [], "x.dat has none of the suffixes", id="kind unknown"),
    ],
)
def test_data_without_usable_texts_is_refused_before_anything_runs(
    capfd, artifact: Path, tmp_path: Path, name, content, arguments, message
) -> None:
    (tmp_path / name).write_text(content)
    status, out, err = run(capfd, artifact, "--data", tmp_path / name, *arguments)
    assert (status, out, certificates(artifact)) == (1, "", ())
    with pytest.raises(DataError, match=message):
        raise DataError(err)
    assert "reference" not in err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        pytest.param(["--checkpoint", "x"], "--checkpoint needs --data", id="checkpoint"),
        pytest.param(["--pair-column", "x"], "--pair-column needs --data", id="column"),
        pytest.param(["--atol", "-1"], "'-1' is not a number of at least 0", id="negative"),
        pytest.param(["--atol", "nan"], "'nan' is not a number of at least 0", id="nan"),
        pytest.param(["--atol", "small"], "'small' is not a number of at least 0", id="word"),
    ],
)
def test_a_wrong_command_ends_with_2(capfd, artifact: Path, arguments, message: str) -> None:
    with pytest.raises(SystemExit, match="2"):
        main(["validate", str(artifact), *arguments])
    assert message in capfd.readouterr().err


# failures are told, and kept


def test_altered_weights_are_caught_by_probes_and_by_texts(capfd, artifact: Path, data: Path) -> None:
    change_weights(artifact, lambda weights: weights * 1.05)
    for arguments, with_data in (([], "probes"), (["--data", data], "texts.txt")):
        status, _, err = run(capfd, artifact, *arguments)
        assert (status, err.count("FAILED: bucket ")) == (1, 4)
        assert f"bucket b4_s32 (float32) does not give the torch answer on {with_data}: a logit differs by up" in err
    assert [found.passed for found in certificates(artifact)] == [False] * 8
    assert main(["inspect", str(artifact)]) == 0
    assert capfd.readouterr().out.count("FAILED") == 8


def test_logits_that_are_not_finite_name_the_bucket_and_the_row(capfd, artifact: Path, data: Path) -> None:
    change_weights(artifact, lambda weights: weights * np.nan)
    status, out, err = run(capfd, artifact, "--data", data)
    assert (status, out, certificates(artifact)) == (1, "", ())
    assert "bucket b1_s8 returns logits that are not finite, line 1; " in err
    status, out, err = run(capfd, artifact)
    assert (status, out, "bucket b1_s8 returns logits that are not finite, probe 0; " in err) == (1, "", True)


def test_no_difference_at_all_is_asked_for_by_atol_0(capfd, artifact: Path, data: Path) -> None:
    status, out, err = run(capfd, artifact, "--data", data, "--atol", "0", "--json")
    assert (status, json.loads(out)["passed"], json.loads(out)["stored"]) == (1, False, True)
    assert "allowed is 0; 0 of " in err
    assert all(found.allowed == 0 and not found.passed for found in certificates(artifact))
    status, _, _ = run(capfd, artifact, "--data", data)
    assert (status, [found.passed for found in certificates(artifact)]) == (0, [True] * 4)


def test_a_model_known_to_leak_is_judged_only_on_request(capfd, artifact: Path, stranger: Path, data: Path) -> None:
    change_manifest(artifact, lambda manifest: replace(manifest, padding_leak=0.5))
    arguments = [artifact, "--data", data, "--checkpoint", stranger]
    status, out, _ = run(capfd, *arguments)
    assert (status, out.count("not judged")) == (0, 4)
    assert all(found.allowed is None and found.label_flips for found in certificates(artifact))
    status, out, _ = run(capfd, *arguments, "--atol", "0.1")
    assert (status, out.count("FAILED")) == (1, 4)


# references


def test_without_the_checkpoint_the_bucket_in_use_is_the_reference(capfd, artifact: Path, data: Path) -> None:
    change_manifest(artifact, lambda manifest: replace(manifest, source={**manifest.source, "name": "gone/away"}))
    status, out, err = run(capfd, artifact, "--data", data, "--limit", "5")
    assert (status, out.count("bucket  ")) == (0, 4)
    assert "reference: the bucket that each text would otherwise use, because torch cannot run: 'gone/away' is" in err
    assert [(found.reference, found.n) for found in certificates(artifact)] == [("bucket", n) for n in (3, 3, 5, 5)]


def test_without_torch_the_bucket_in_use_is_the_reference(capfd, artifact: Path, data: Path, monkeypatch) -> None:
    def no_torch(job: object) -> None:
        raise DependencyError("needs torch, which is not installed")

    monkeypatch.setattr(room, "TorchEngine", no_torch)
    status, _, err = run(capfd, artifact, "--data", data, "--limit", "3")
    assert (status, "because torch cannot run: needs torch, which is not installed" in err) == (0, True)


def test_a_checkpoint_that_is_named_must_do(capfd, artifact: Path, data: Path, tmp_path: Path) -> None:
    status, out, err = run(capfd, artifact, "--data", data, "--checkpoint", tmp_path / "nowhere")
    assert (status, out, "is not a folder" in err) == (1, "", True)
    three = save_tiny_bert(tmp_path / "three", num_labels=3)
    status, out, err = run(capfd, artifact, "--data", data, "--checkpoint", three)
    assert (status, out, f"{three} answers with 3 logits, the artifact has 2 labels" in err) == (1, "", True)


def test_a_reference_that_is_not_finite_is_no_reference(compiled: Artifact, data: Path, monkeypatch) -> None:
    answers = lambda texts: np.full((len(texts), 2), np.inf, dtype=np.float32)  # noqa: E731
    monkeypatch.setattr(room, "choose_reference", lambda *_: ("torch", answers))
    with pytest.raises(ModelError, match="the reference, torch, returns logits that are not finite, line 1;"):
        text_evidence(compiled, open_texts(data), report=lambda line: None)


# the manifest


def test_probes_are_certified_without_data_and_inspect_shows_it(capfd, artifact: Path) -> None:
    before = {path.name: path.read_bytes() for path in artifact.iterdir() if path.name != MANIFEST}
    status, out, _ = run(capfd, artifact)
    assert (status, out.count("probes"), out.count("ok, allowed")) == (0, 4, 4)
    assert main(["inspect", str(artifact)]) == 0
    assert out in capfd.readouterr().out
    assert main(["inspect", str(artifact), "--json"]) == 0
    shown = json.loads(capfd.readouterr().out)["certificates"]
    assert [found["bucket"] for found in shown] == ["b1_s8", "b4_s8", "b1_s32", "b4_s32"]
    assert {(found["data"], found["reference"]) for found in shown} == {("probes", "torch")}
    assert {path.name: path.read_bytes() for path in artifact.iterdir() if path.name != MANIFEST} == before


def test_a_new_certificate_takes_the_place_of_the_one_like_it(artifact: Path, compiled: Artifact) -> None:
    opened = open_artifact(artifact)
    old = Certificate(
        bucket="b1_s8",
        precision="float32",
        reference="torch",
        data="a.csv",
        n=1,
        max_abs_delta=0.5,
        p99_abs_delta=0.5,
        label_flips=0,
        allowed=None,
    )
    others = [
        replace(old, data="b.csv"),
        replace(old, data_sha256="0f"),  # another file of the same name
        replace(old, reference="bucket"),
        replace(old, checkpoint="another"),
        replace(old, precision="int8"),
    ]
    store(opened, [old])
    for other in others:
        store(opened, [other])
    new = replace(old, n=2)
    assert store(opened, [new]).certificates == certificates(artifact) == (*others, new)
    assert replace(open_artifact(artifact).manifest, certificates=()) == compiled.manifest


def test_a_folder_that_cannot_be_written_keeps_its_manifest(capfd, artifact: Path, monkeypatch) -> None:
    before = (artifact / MANIFEST).read_bytes(), sorted(path.name for path in artifact.iterdir())

    def refuse(*_: object) -> None:
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    monkeypatch.setattr(os, "replace", refuse)
    status, out, err = run(capfd, artifact, "--json")
    assert (status, json.loads(out)["stored"], len(json.loads(out)["certificates"])) == (0, False, 4)
    assert f"the certificates are not stored, {artifact} keeps its old manifest: [Errno 30] Read-only" in err
    assert ((artifact / MANIFEST).read_bytes(), sorted(path.name for path in artifact.iterdir())) == before


@pytest.mark.skipif(os.geteuid() == 0, reason="nothing is read-only to root")
def test_a_read_only_folder_keeps_its_manifest(capfd, artifact: Path) -> None:
    before = (artifact / MANIFEST).read_bytes()
    artifact.chmod(0o555)
    try:
        status, out, err = run(capfd, artifact)
    finally:
        artifact.chmod(0o755)
    assert (status, "b4_s32" in out, "keeps its old manifest" in err) == (0, True, True)
    assert (artifact / MANIFEST).read_bytes() == before


def test_a_linked_manifest_is_replaced_and_what_it_links_to_is_not(artifact: Path, tmp_path: Path) -> None:
    """As in the Hub's cache, where every file is a link to a blob."""
    (artifact / MANIFEST).rename(tmp_path / "blob")
    (artifact / MANIFEST).symlink_to(tmp_path / "blob")
    before = (tmp_path / "blob").read_bytes()
    assert main(["validate", str(artifact)]) == 0
    assert ((tmp_path / "blob").read_bytes(), len(certificates(artifact))) == (before, 4)


def test_another_artifact_in_the_same_folder_gets_no_certificate(artifact: Path) -> None:
    opened = open_artifact(artifact)
    change_manifest(artifact, lambda manifest: replace(manifest, labels=("other", "names")))
    with pytest.raises(ArtifactError, match="became another artifact while it was checked"):
        store(opened, [])


def test_other_buckets_do_not_inherit_certificates(artifact: Path) -> None:
    assert main(["validate", str(artifact)]) == 0
    other = compile_model(Source(name=str(artifact)), CompileOptions(buckets=[16], batch_sizes=[1]))
    assert (len(certificates(artifact)), other.manifest.certificates) == (4, ())


# rows


def test_rows_without_a_token_are_counted_and_left_out(tmp_path: Path, monkeypatch) -> None:
    folder = fake_artifact(tmp_path / "model", make_ladder([4], batch_sizes=[2])).folder
    bare = json.loads(tiny_tokenizer().to_str()) | {"post_processor": None}
    (folder / "tokenizer.json").write_text(json.dumps(bare))
    change_manifest(folder, lambda manifest: replace(manifest, files=record_files(folder)))
    (tmp_path / "x.txt").write_text("w1 w2\n\nw3\nw1 w2 w3 w4 w5\n")
    monkeypatch.setattr(room, "choose_reference", lambda *_: ("torch", lambda texts: np.ones((len(texts), 2))))
    evidence = text_evidence(open_artifact(folder), open_texts(tmp_path / "x.txt"), report=lambda line: None)
    assert (evidence.empty, evidence.too_long) == (1, 1)
    assert [row.where for row in evidence.rows()] == ["line 1", "line 3"]


def test_rows_share_a_batch_only_with_as_many_counted_tokens(tmp_path: Path, monkeypatch) -> None:
    artifact = fake_artifact(tmp_path / "model", make_ladder([16], batch_sizes=[2]))
    signature = replace(artifact.manifest.signature, counted_id=4)  # w0
    (tmp_path / "x.txt").write_text("w0 w1\nw0 w0\nw0 w2\nw3 w0\nw0 w4 w0\n")
    monkeypatch.setattr(room, "choose_reference", lambda *_: ("torch", lambda texts: np.ones((len(texts), 2))))
    evidence = text_evidence(artifact, open_texts(tmp_path / "x.txt"), report=lambda line: None)
    counts = []

    class Counting(FakeSession):
        def run(self, arrays):
            counts.append((arrays["input_ids"] == 4).sum(axis=1).tolist())
            return super().run(arrays)

    certify(replace(artifact.manifest, signature=signature), evidence, {"variant": Counting})
    assert counts == [[1, 1], [2, 2], [1, 1]]


def test_the_graph_that_runs_by_default_is_checked_too(capfd, artifact: Path, data: Path) -> None:
    """The variants are right, the graph that was chosen to run behind all buckets is not."""
    model = onnx_ir.load(artifact / GRAPH)
    head = model.graph.initializers["classifier.weight"]
    head.const_value = onnx_ir.tensor(head.const_value.numpy() + 1, name=head.name)
    save_rewritten(model, artifact / GRAPH, artifact / "model_ort_fusions.onnx")
    fusion = FusionChoice(provider=CPU, chosen="ort_fusions", buckets={}, relative={})
    change_manifest(artifact, lambda manifest: replace(manifest, fusion=fusion, files=record_files(artifact)))
    status, out, _ = run(capfd, artifact, "--data", data)
    assert (status, out.count("FAILED")) == (1, 4)
    assert all(one.max_abs_delta > 0.1 for one in certificates(artifact))


def test_a_file_that_grows_meanwhile_is_refused(compiled: Artifact, data: Path) -> None:
    texts = open_texts(data)
    with data.open("a") as file:
        file.write("w1\n")
    with pytest.raises(DataError, match=r"texts\.txt was changed while it was read"):
        text_evidence(compiled, texts, report=lambda line: None)


def test_a_bucket_that_holds_no_row_says_so(capfd, artifact: Path, tmp_path: Path) -> None:
    (tmp_path / "x.txt").write_text(f"{text_of(20)}\n")
    status, out, _ = run(capfd, artifact, "--data", tmp_path / "x.txt")
    assert (status, out.count("no rows"), out.count("ok, allowed")) == (0, 2, 2)


def test_a_bucket_with_other_labels_than_the_reference_is_refused(compiled: Artifact) -> None:
    opens = {"variant": variants(compiled)}
    probes = probe_evidence(compiled)
    wider = Evidence(rows=probes.rows, expected=np.ones((len(probes.expected), 3)), reference="torch", data="probes")
    with pytest.raises(ModelError, match="bucket b1_s8 returns 2 logits, the reference 3"):
        certify(compiled.manifest, wider, opens)
