"""int8: calibrated on the user's texts, the same answer whatever is beside a text, and what it changed is told."""

from __future__ import annotations

import json
import re
import shutil
import warnings
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
from conftest import text_of
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_bucket.artifact import GRAPH, Artifact, record_files
from hf_bucket.batch import Features
from hf_bucket.certificate import certify, variants
from hf_bucket.cli import main
from hf_bucket.compile import CompileOptions, compile_model
from hf_bucket.describe import describe_changes
from hf_bucket.encode import Encoder
from hf_bucket.errors import BucketWarning, DataError, ModelError
from hf_bucket.evidence import open_texts, text_evidence
from hf_bucket.ladder import make_ladder
from hf_bucket.manifest import MANIFEST, FusionChoice, Try
from hf_bucket.quantize import (
    CALIBRATED,
    HELD_OUT,
    NEEDED,
    SCHEMES,
    _best,
    _until_good,
    calibrate,
    calibration,
    changed,
    quantize,
)
from hf_bucket.runner import Runner
from hf_bucket.session_ort import CPU
from hf_bucket.source import Source

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")

BUCKETS = [8, 24]
CALIBRATION = [text_of(length % 20 + 1, length * 7) for length in range(120)]
TEXTS = [text_of(length, length * 11) for length in (1, 5, 6, 13, 20, 3, 2, 22)]


@pytest.fixture(scope="module")
def compiled(tiny_bert: Path) -> dict[str, Artifact]:
    """The tiny model by scheme; ``float`` is what the others were made of."""
    source, plain = Source(name=str(tiny_bert)), {"buckets": BUCKETS, "batch_sizes": [1, 4]}
    made = {"float": compile_model(source, CompileOptions(**plain))}
    for scheme in SCHEMES:
        options = CompileOptions(**plain, quantize=scheme, calibration=CALIBRATION)
        made[scheme] = compile_model(source, options)
    return made


def logits(artifact: Artifact, texts: list[str]) -> np.ndarray:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", BucketWarning)
        runner = Runner(artifact)
        found = np.stack([row["logits"] for row in runner(texts)])
        runner.close()
        return found


# what is promised


def test_a_texts_answer_does_not_depend_on_bucket_or_neighbours(compiled: dict[str, Artifact]) -> None:
    alone = np.concatenate([logits(compiled["int8"], [text]) for text in TEXTS])
    np.testing.assert_allclose(logits(compiled["int8"], TEXTS), alone, atol=1e-5)
    np.testing.assert_allclose(logits(compiled["int8"], TEXTS[::-1])[::-1], alone, atol=1e-5)


def test_a_text_in_int8_dynamic_does_and_loading_it_says_so(compiled: dict[str, Artifact]) -> None:
    with pytest.warns(BucketWarning, match="int8-dynamic, whose scales come from each batch: a text's logits change"):
        Runner(compiled["int8-dynamic"])
    alone = np.concatenate([logits(compiled["int8-dynamic"], [text]) for text in TEXTS])
    assert np.abs(logits(compiled["int8-dynamic"], TEXTS) - alone).max() > 1e-4


@pytest.mark.parametrize("scheme", SCHEMES)
def test_the_answers_are_near_those_of_float_and_the_weights_smaller(
    compiled: dict[str, Artifact], scheme: str
) -> None:
    exact, got = logits(compiled["float"], TEXTS), logits(compiled[scheme], TEXTS)
    spread = np.abs(exact - exact.mean(axis=0)).max()
    assert 0 < np.abs(got - exact).max() < spread / 4
    made = compiled[scheme].manifest.quantization
    assert made is not None
    assert made.weights_bytes < made.float_weights_bytes
    assert compiled[scheme].manifest.source["dtype"] == scheme


def test_the_manifest_tells_what_was_done_and_what_it_changed(compiled: dict[str, Artifact]) -> None:
    made = compiled["int8"].manifest.quantization
    assert made is not None
    assert (made.scheme, made.layers) == ("int8", 12), "four of attention and two of feed-forward, in two layers"
    assert made.calibrated == 2 * CALIBRATED
    assert made.held_out == 2 * HELD_OUT
    assert made.kept in [one.kept for one in made.tries]
    assert all(0 <= one.label_flips <= made.held_out and one.max_abs_delta > 0 for one in made.tries)
    assert set(made.speed) <= {bucket.name for bucket in compiled["int8"].manifest.ladder}
    assert all(ratio > 0 for ratio in made.speed.values())


def test_what_was_made_of_the_graph_in_float_is_not_taken_for_int8(
    compiled: dict[str, Artifact], tmp_path: Path
) -> None:
    """Else the float graph that a tool rewrote would run, under the name of int8."""
    fused = FusionChoice(provider=CPU, chosen="ort_fusions", buckets={}, relative={})
    folder = Path(shutil.copytree(compiled["float"].folder, tmp_path / "fused"))
    shutil.copyfile(folder / GRAPH, folder / "model_ort_fusions.onnx")
    manifest = replace(compiled["float"].manifest, fusion=fused, files=record_files(folder))
    (folder / MANIFEST).write_text(manifest.to_json())
    options = CompileOptions(quantize="int8", calibration=CALIBRATION[1:])
    made = compile_model(Source(name=str(folder)), options)
    assert made.manifest.fusion is None
    assert "model_ort_fusions.onnx" not in made.manifest.files
    assert np.abs(logits(made, TEXTS) - logits(compiled["float"], TEXTS)).max() > 1e-3


def test_another_ladder_of_an_int8_model_keeps_its_weights(compiled: dict[str, Artifact]) -> None:
    again = compile_model(Source(name=str(compiled["int8"].folder)), CompileOptions(buckets=[24], batch_sizes=[2]))
    assert again.manifest.quantization == compiled["int8"].manifest.quantization
    np.testing.assert_allclose(logits(again, TEXTS), logits(compiled["int8"], TEXTS), atol=1e-5)


def test_the_same_texts_are_calibrated_on_once(compiled: dict[str, Artifact], tiny_bert: Path) -> None:
    options = CompileOptions(buckets=BUCKETS, batch_sizes=[1, 4], quantize="int8", calibration=iter(CALIBRATION))
    said: list[str] = []
    assert compile_model(Source(name=str(tiny_bert)), options, report=said.append).folder == compiled["int8"].folder
    assert said == []


def test_a_planned_ladder_gets_joined_texts_for_the_maximum(tiny_bert: Path) -> None:
    said: list[str] = []
    options = CompileOptions(buckets="auto", n_buckets=2, batch_sizes=[2], quantize="int8", calibration=CALIBRATION)
    made = compile_model(Source(name=str(tiny_bert)), options, report=said.append).manifest
    assert made.ladder.max_length == 64
    assert any("too few calibration texts for length 64: joined ones stand in for them" in line for line in said)
    assert made.quantization is not None
    assert made.quantization.calibrated == CALIBRATED + NEEDED
    assert made.quantization.held_out == HELD_OUT, "none of the joined ones, which are made of those calibrated on"


def test_joined_texts_are_made_of_those_that_are_calibrated_on(compiled: dict[str, Artifact]) -> None:
    artifact, texts = compiled["float"], [f"w{number}" for number in range(30)]
    encoder = Encoder(artifact.tokenizer_json(), inputs=artifact.manifest.signature.input_names)
    found = calibrate(texts, encoder, make_ladder([8, 24]), "int8", planned=True, report=lambda line: None)
    assert found is not None
    ids = [set(row[1:-1]) for row in found.features.columns["input_ids"]]  # without the special tokens
    joined = [row for row in found.chosen if row >= len(texts)]
    calibrated, held_out = (
        set().union(*(ids[row] for row in rows)) for rows in (found.chosen[:CALIBRATED], found.held_out)
    )
    assert len(joined) == NEEDED
    assert all(ids[row] <= calibrated for row in joined)
    assert not held_out & calibrated


# what is chosen


@settings(deadline=None)
@given(st.lists(st.integers(1, 30), min_size=1, max_size=200))
def test_every_length_of_the_ladder_has_its_texts_and_none_is_used_twice(lengths: list[int]) -> None:
    ladder = make_ladder([8, 24])
    features = Features(lengths=tuple(lengths), columns={})
    fitting = [sum(n <= 8 for n in lengths), sum(8 < n <= 24 for n in lengths)]
    if min(fitting) < NEEDED:
        where = "1 to 8" if fitting[0] < NEEDED else "9 to 24"
        with pytest.raises(DataError, match=rf"calibration has \d+ texts of {where} tokens, int8 needs at least 4"):
            calibration(features, ladder)
        return
    dealt = calibration(features, ladder)
    assert not set(dealt.chosen) & set(dealt.held_out)
    for which, most in ((dealt.chosen, CALIBRATED), (dealt.held_out, HELD_OUT)):
        for length, count in zip(ladder.lengths, fitting, strict=True):
            got = sum(ladder.choose(lengths[row]).length == length for row in which)
            assert min(count // 2, most) <= got <= most


def tried(*flips: int) -> list[Try]:
    names = [str(number) for number in range(len(flips))]
    return [
        Try(kept=tuple(names[:number]), label_flips=count, max_abs_delta=0.1, good=count == 0)
        for number, count in enumerate(flips)
    ]


@pytest.mark.parametrize(
    ("flips", "chosen", "made"),
    [
        pytest.param((0, 5), 0, 1, id="good at once"),
        pytest.param((9, 0, 4), 1, 2, id="good with one layer in float"),
        pytest.param((9, 8, 7), 0, 3, id="leaving layers in float does not pay"),
        pytest.param((9, 8, 4), 2, 3, id="it halves what changes"),
    ],
)
def test_layers_stay_in_float_only_where_that_pays(flips: tuple[int, ...], chosen: int, made: int) -> None:
    tries = list(_until_good(iter(tried(*flips))))
    assert len(tries) == made
    assert _best(tries) == tries[chosen]


@pytest.mark.parametrize(
    ("exact", "got", "problem", "expected"),
    [
        pytest.param([[1, 2], [3, 1]], [[2, 1], [2, 1]], None, 1, id="the largest"),
        pytest.param([[1, -2], [3, -1]], [[1, 2], [2, -1]], "multi_label_classification", 1, id="several labels"),
        pytest.param([[1, 2], [2, 1]], [[3, 2], [2, 1]], "multi_label_classification", 0, id="all are over zero"),
        pytest.param([[0.0], [10.0]], [[0.4], [10.6]], "regression", 1, id="a tenth of the deviation, which is 5"),
        pytest.param([[0.0], [10.0]], [[0.4], [9.6]], None, 0, id="less"),
        pytest.param([[3.0]], [[9.0]], None, 0, id="one row says nothing of how rows differ"),
    ],
)
def test_what_counts_as_another_answer_is_what_the_model_is_used_for(
    exact: list[list[float]], got: list[list[float]], problem: str | None, expected: int
) -> None:
    assert changed(np.array(exact, dtype=np.float32), np.array(got, dtype=np.float32), problem) == expected


def test_int8_dynamic_is_judged_by_texts_that_share_batches(compiled: dict[str, Artifact], tmp_path: Path) -> None:
    artifact, scheme = compiled["float"], "int8-dynamic"
    names = artifact.manifest.signature.input_names
    encoder = Encoder(artifact.tokenizer_json(), inputs=names)
    dealt = calibrate(CALIBRATION, encoder, artifact.manifest.ladder, scheme, planned=False, report=lambda line: None)
    assert dealt is not None
    made = quantize(artifact, scheme, dealt, tmp_path)
    engines = [onnxruntime.InferenceSession(str(folder / GRAPH)) for folder in (artifact.folder, tmp_path)]
    columns, deltas = dealt.features.columns, []
    for row in dealt.held_out:
        arrays = {name: np.array([columns[name][row]], dtype=np.int64) for name in names}
        exact, alone = (engine.run(["logits"], arrays)[0] for engine in engines)
        deltas.append(np.abs(exact - alone).max())
    assert made.tries[0].max_abs_delta > 0
    assert made.tries[0].max_abs_delta != pytest.approx(max(deltas), rel=1e-4), "that is what texts alone differ by"


def test_int8_that_changes_much_says_so(tiny_bert: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hf_bucket.quantize.changed", lambda *_: 7)
    options = CompileOptions(buckets=[8, 20], batch_sizes=[1], quantize="int8", calibration=CALIBRATION)
    said: list[str] = []
    made = compile_model(Source(name=str(tiny_bert)), options, report=said.append).manifest.quantization
    assert made is not None
    assert (len(made.tries), made.kept) == (4, ())
    (line,) = [line for line in said if "more than one in" in line]
    assert f": 7 of {made.held_out} held-out texts are labelled otherwise, more than one in 200; see hf-bucket" in line


def test_what_one_logit_changes_is_told_without_labels() -> None:
    one = Try(kept=(), label_flips=3, max_abs_delta=0.5, good=False)
    assert describe_changes(one, 40, labels=1).startswith("3 of 40 held-out texts move by more than a tenth of")
    assert describe_changes(one, 40, labels=2) == "3 of 40 held-out texts are labelled otherwise"


# what is refused


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        pytest.param({"quantize": "int4"}, ModelError, "quantize must be None or one of int8, int8-dynamic", id="kind"),
        pytest.param({"quantize": "int8"}, DataError, "takes its scales from your own texts; give some", id="no texts"),
        pytest.param(
            {"quantize": "int8", "calibration": [3, 4], "buckets": [8]}, DataError, "has token counts", id="lengths"
        ),
        pytest.param(
            {"quantize": "int8", "calibration": CALIBRATION, "dtype": "float16"}, ModelError, "float32", id="half"
        ),
        pytest.param(
            {"quantize": "int8", "calibration": CALIBRATION, "buckets": [8, 24, 64]},
            DataError,
            r"calibration has 0 texts of 25 to 64 tokens, int8 needs at least 4 .* or drop length 64",
            id="a length without texts",
        ),
        pytest.param(
            {"quantize": "int8", "calibration": ["w1 w2"], "buckets": [8]},
            DataError,
            "calibration has 1 texts of 1 to 8 tokens",
            id="too few texts",
        ),
    ],
)
def test_what_cannot_be_calibrated_is_refused(
    tiny_bert: Path, options: dict[str, object], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        compile_model(Source(name=str(tiny_bert)), CompileOptions(**options))  # type: ignore[arg-type]


@pytest.mark.parametrize("calibration", [[3, 4], ["w1 w2"], None], ids=["lengths", "few texts", "none"])
def test_int8_dynamic_takes_what_texts_there_are(tiny_bert: Path, calibration: list[object] | None) -> None:
    options = CompileOptions(buckets=[8, 16], batch_sizes=[1], quantize="int8-dynamic", calibration=calibration)
    made = compile_model(Source(name=str(tiny_bert)), options).manifest.quantization
    assert made is not None
    assert (made.scheme, made.calibrated) == ("int8-dynamic", 0)


def test_an_artifacts_own_length_without_texts_is_refused_since_nobody_planned_it(
    compiled: dict[str, Artifact],
) -> None:
    source = Source(name=str(compiled["float"].folder))
    with pytest.raises(DataError, match="calibration has 0 texts of 9 to 24 tokens"):
        compile_model(source, CompileOptions(quantize="int8", calibration=["w1 w2", "w3", "w4 w5", "w6"] * 2))


def test_models_with_other_labels_are_other_models_in_the_cache(tiny_bert: Path, tmp_path: Path) -> None:
    renamed = Path(shutil.copytree(tiny_bert, tmp_path / "renamed"))
    config = json.loads((renamed / "config.json").read_text())
    config |= {"id2label": {"0": "dull", "1": "fine"}, "label2id": {"dull": 0, "fine": 1}}
    (renamed / "config.json").write_text(json.dumps(config))
    options = CompileOptions(buckets=[8], batch_sizes=[1], quantize="int8-dynamic")
    labels = [compile_model(Source(name=str(folder)), options).manifest.labels for folder in (tiny_bert, renamed)]
    assert labels == [("LABEL_0", "LABEL_1"), ("dull", "fine")]


def test_labels_of_a_csv_may_be_indices(compiled: dict[str, Artifact], tmp_path: Path) -> None:
    (tmp_path / "labelled.csv").write_text("text,label\nw1,0\nw2 w3,1\n")
    texts = open_texts(tmp_path / "labelled.csv", label_column="label")
    assert texts.labels(("LABEL_0", "LABEL_1")) == [0, 1]
    assert texts.labels(("1", "0")) == [1, 0], "names come first"


def test_int8_without_texts_is_refused_before_any_file_is_written(
    compiled: dict[str, Artifact], tmp_path: Path
) -> None:
    with pytest.raises(DataError, match='"int8" takes its scales from texts, got none'):
        quantize(compiled["float"], "int8", None, tmp_path)
    assert not list(tmp_path.iterdir())


def test_int8_of_int8_is_refused(compiled: dict[str, Artifact]) -> None:
    options = CompileOptions(quantize="int8-dynamic")
    with pytest.raises(ModelError, match="is int8 already; give the checkpoint, or leave out quantize"):
        compile_model(Source(name=str(compiled["int8"].folder)), options)


# the command line


@pytest.fixture
def files(tmp_path: Path) -> Path:
    (tmp_path / "texts.txt").write_text("".join(f"{text}\n" for text in CALIBRATION))
    rows = [f'{{"text": "{text}", "label": "LABEL_{number % 2}"}}\n' for number, text in enumerate(TEXTS)]
    (tmp_path / "labelled.jsonl").write_text("".join(rows))
    return tmp_path


def test_compile_inspect_and_validate_tell_what_int8_changes(capfd, tiny_bert: Path, files: Path) -> None:
    model = str(files / "model")
    arguments = ["--buckets", "8,24", "--batch-sizes", "1,4", "--quantize", "int8", "--output", model]
    assert main(["compile", str(tiny_bert), *arguments, "--calibration", str(files / "texts.txt")]) == 0
    shown = capfd.readouterr().out
    assert re.search(r"int8 +\d+ of 12 products in eight bits, weights 0\.0 MB \(46% of float32\)", shown)
    assert "held-out texts are labelled otherwise" in shown
    data = ["--data", str(files / "labelled.jsonl"), "--label-column", "label"]
    assert main(["validate", model, *data]) == 0
    table = capfd.readouterr().out.splitlines()
    assert "accuracy" in table[0]
    assert "reference's" in table[0]
    assert len([line for line in table if " int8 " in line and "not judged" in line]) == 4


def test_the_accuracy_of_a_certificate_is_that_of_its_rows(capfd, compiled: dict[str, Artifact], files: Path) -> None:
    texts = open_texts(files / "labelled.jsonl", label_column="label")
    evidence = text_evidence(compiled["float"], texts, report=lambda line: None)
    opens = {"variant": variants(compiled["float"])}
    found = {one.bucket: one for one in certify(compiled["float"].manifest, evidence, opens)}
    best, own = logits(compiled["float"], TEXTS).argmax(axis=1), np.arange(len(TEXTS)) % 2
    assert found["b4_s24"].accuracy == found["b4_s24"].reference_accuracy == (best == own).mean()
    short = [number for number, text in enumerate(TEXTS) if len(text.split()) + 2 <= 8]
    assert found["b1_s8"].accuracy == (best == own)[short].mean()


def test_a_label_that_the_model_has_not_is_named_with_its_line(
    capfd, compiled: dict[str, Artifact], files: Path
) -> None:
    (files / "labelled.jsonl").write_text('{"text": "w1", "label": "LABEL_1"}\n{"text": "w2", "label": "bad"}\n')
    data = ["--data", str(files / "labelled.jsonl"), "--label-column", "label"]
    assert main(["validate", str(compiled["float"].folder), *data]) == 1
    assert "line 2: label is 'bad', expected one of LABEL_0, LABEL_1, or its index" in capfd.readouterr().err
