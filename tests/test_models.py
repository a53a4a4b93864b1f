"""The model class against plain torch: the same logits, types and habits, whatever shape each row ran in."""

from __future__ import annotations

import copy
import json
import multiprocessing
import pickle
import random
import warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import text_of
from hypothesis import given, settings
from hypothesis import strategies as st
from optimum.modeling_base import OptimizedModel
from transformers import AutoModelForSequenceClassification, AutoTokenizer
from transformers.modeling_outputs import SequenceClassifierOutput

import hf_bucket
from hf_bucket import BucketedModelForSequenceClassification
from hf_bucket.errors import (
    ArtifactError,
    BucketWarning,
    InputError,
    InputTypeError,
    ModelError,
    ProviderError,
    TooLongError,
)

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")


@pytest.fixture(scope="module")
def tokenizer(tiny_bert: Path):
    return AutoTokenizer.from_pretrained(tiny_bert)


@pytest.fixture(scope="module")
def reference(tiny_bert: Path):
    return AutoModelForSequenceClassification.from_pretrained(tiny_bert, dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def loaded(tiny_bert: Path) -> BucketedModelForSequenceClassification:
    return BucketedModelForSequenceClassification.from_pretrained(tiny_bert, buckets=[16, 32, 64], batch_sizes=[1, 4])


@pytest.fixture
def model(loaded) -> BucketedModelForSequenceClassification:
    return copy.deepcopy(loaded)


def assert_logits_equal_torch(got: object, texts: list, reference, tokenizer) -> None:
    """Every row equals torch on that text alone, unpadded, within 1e-4, and has the same label."""
    for row, text in zip(np.asarray(got), texts, strict=True):
        with torch.inference_mode():
            expected = reference(**tokenizer(text, return_tensors="pt")).logits[0].numpy()
        assert np.abs(row - expected).max() <= 1e-4, text
        assert row.argmax() == expected.argmax()


@given(lengths=st.lists(st.integers(0, 62), min_size=1, max_size=9), side=st.sampled_from(["left", "right"]))
@settings(max_examples=25, deadline=None)
def test_a_padded_batch_gets_torchs_unpadded_answer_row_by_row(loaded, reference, tokenizer, lengths, side) -> None:
    texts = [text_of(n, start=n) for n in lengths]
    batch = tokenizer(texts, padding=True, return_tensors="pt", padding_side=side)
    assert_logits_equal_torch(loaded(**batch).logits, texts, reference, tokenizer)


def test_a_batch_of_mixed_lengths_is_routed_row_by_row_not_by_its_longest(model, tokenizer) -> None:
    model(**tokenizer([text_of(2), text_of(20), text_of(60), text_of(3)], padding=True, return_tensors="pt"))
    rows = {name: figures["rows"] for name, figures in model.stats()["buckets"].items() if figures["rows"]}
    assert rows == {"b1_s16": 2, "b1_s32": 1, "b1_s64": 1}


def test_the_seed_example_two_sentences_cropped_at_random_go_where_the_rule_says(tiny_bert: Path) -> None:
    """Two sentences, each cropped at random between 8 and 64 tokens, buckets of 32 and 64."""
    model = BucketedModelForSequenceClassification.from_pretrained(tiny_bert, buckets=[32, 64], batch_sizes=[1, 4])
    crop = random.Random(0)
    lengths = [(crop.randint(8, 64), crop.randint(8, 64)) for _ in range(40)]
    for first, second in lengths:
        before = model.stats()["buckets"]
        longest = max(first, second)
        ids = torch.full((2, longest), 3)
        mask = torch.zeros((2, longest), dtype=torch.int64)
        for row, length in enumerate((first, second)):
            ids[row, :length], mask[row, :length] = 7, 1
        model(input_ids=ids, attention_mask=mask)
        after = model.stats()["buckets"]
        gained = {name: after[name]["rows"] - before[name]["rows"] for name in after}
        for bucket, fits in ((32, lambda n: n <= 32), (64, lambda n: n > 32)):
            assert gained[f"b1_s{bucket}"] + gained[f"b4_s{bucket}"] == sum(map(fits, (first, second)))


def test_torch_in_gives_torch_out_and_numpy_in_numpy_out(loaded, tokenizer) -> None:
    for kind, expected in (("pt", torch.Tensor), ("np", np.ndarray)):
        logits = loaded(**tokenizer(["w1"], return_tensors=kind)).logits
        assert isinstance(logits, expected)
        assert logits.shape == (1, 2)
        assert "float32" in str(logits.dtype)


def test_outputs_unpack_as_in_transformers(loaded, tokenizer, reference) -> None:
    batch = tokenizer(["w1", "w2"], return_tensors="pt")
    output = loaded(**batch)
    assert isinstance(output, SequenceClassifierOutput)
    assert list(output.keys()) == list(reference(**batch).keys()) == ["logits"]
    (logits,) = loaded(**batch, return_dict=False)
    assert torch.equal(logits, output.logits)
    assert torch.equal(output[0], output["logits"])


def test_missing_inputs_are_synthesised_and_surplus_ones_dropped(loaded, tokenizer, reference) -> None:
    batch = tokenizer([text_of(5)], return_tensors="pt")
    whole = loaded(**batch).logits
    assert torch.equal(loaded(input_ids=batch["input_ids"]).logits, whole)
    assert torch.equal(loaded(**batch, special_tokens_mask=batch["input_ids"], use_cache=False).logits, whole)


@pytest.mark.parametrize("name", ["labels", "position_ids", "inputs_embeds", "output_attentions"])
def test_an_argument_that_would_change_the_answer_is_refused(loaded, tokenizer, name: str) -> None:
    batch = tokenizer(["w1"], return_tensors="pt")
    with pytest.raises(InputError, match=f"{name} cannot be used: the compiled graph takes"):
        loaded(**batch, **{name: torch.ones(1, 3)})


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        ({}, "input_ids is missing"),
        ({"input_ids": [1, 2]}, r"shape \(2,\) of int64; expected whole numbers of shape \(rows, length\)"),
        ({"input_ids": np.ones((1, 2), np.float32)}, "of float32; expected whole numbers"),
        (
            {"input_ids": [[1, 2]], "attention_mask": [[1]]},
            r"attention_mask has shape \(1, 1\), input_ids has \(1, 2\)",
        ),
        ({"input_ids": [[1, 2], [1, 2]], "attention_mask": [[1, 1], [0, 0]]}, "input 1 has no real token"),
        ({"input_ids": [[1, 94]]}, "input 0 has token id 94, this model's vocabulary is 0 to 93"),
    ],
    ids=["none", "one axis", "floats", "shapes", "no token", "vocabulary"],
)
def test_bad_arrays_are_refused_with_what_was_expected(loaded, inputs: dict, message: str) -> None:
    with pytest.raises(InputError, match=message):
        loaded(**{name: np.asarray(value) for name, value in inputs.items()})


def test_wrong_kinds_of_arrays_are_type_errors_too(loaded) -> None:
    with pytest.raises(TypeError, match="expected whole numbers"):
        loaded(input_ids=np.ones((1, 2)))
    assert issubclass(InputTypeError, TypeError)


def test_no_rows_give_no_logits(loaded) -> None:
    assert loaded(input_ids=np.zeros((0, 5), np.int64)).logits.shape == (0, 2)


def test_nothing_the_caller_passed_in_is_changed(loaded, tokenizer) -> None:
    batch = tokenizer([text_of(3), text_of(30)], padding=True, return_tensors="np")
    before = {name: value.copy() for name, value in batch.items()}
    loaded(**batch)
    assert all((batch[name] == before[name]).all() for name in before)


def test_a_row_that_fits_no_bucket_is_an_error_and_truncation_an_option(tiny_bert: Path, tokenizer) -> None:
    strict = BucketedModelForSequenceClassification.from_pretrained(tiny_bert, buckets=[16], batch_sizes=[1])
    long = tokenizer([text_of(20)], return_tensors="pt")
    with pytest.raises(TooLongError, match="input 0 has 22 tokens but the largest bucket holds 16"):
        strict(**long)
    cut = tokenizer([text_of(20)], truncation=True, max_length=16, return_tensors="pt")
    lenient = BucketedModelForSequenceClassification.from_pretrained(
        tiny_bert, buckets=[16], batch_sizes=[1], overflow="truncate"
    )
    with pytest.warns(BucketWarning, match="input 0 was cut"):
        assert torch.equal(lenient(**long).logits, strict(**cut).logits)
    assert lenient.stats()["truncated"] == 1


def test_it_is_an_optimum_model_with_transformers_habits(loaded, tiny_bert: Path) -> None:
    assert isinstance(loaded, OptimizedModel)
    assert loaded.config.model_type == "bert"
    assert loaded.device == torch.device("cpu")
    assert loaded.dtype is torch.float32
    assert loaded.main_input_name == "input_ids"
    assert loaded.eval() is loaded
    assert loaded.to("cpu") is loaded.to(torch.device("cpu"), dtype=torch.float32) is loaded
    assert loaded.train(False) is loaded
    assert not loaded.can_generate()
    assert loaded.ladder.lengths == (16, 32, 64)


def test_what_a_compiled_model_cannot_do_is_an_error(loaded) -> None:
    with pytest.raises(ProviderError, match="cannot move to cuda; choose provider="):
        loaded.to("cuda")
    with pytest.raises(ProviderError, match=r"cannot become torch\.float16"):
        loaded.to(torch.float16)
    with pytest.raises(ModelError, match="cannot be trained"):
        loaded.train()


def test_a_saved_model_loads_as_the_same_model(loaded, tokenizer, tmp_path: Path) -> None:
    batch = tokenizer([text_of(9)], return_tensors="pt")
    (tmp_path / "saved").mkdir()
    (tmp_path / "saved" / "README.md").write_text("kept", encoding="utf-8")
    loaded.save_pretrained(tmp_path / "saved")
    again = BucketedModelForSequenceClassification.from_pretrained(tmp_path / "saved")
    assert again.ladder == loaded.ladder
    assert torch.equal(again(**batch).logits, loaded(**batch).logits)
    assert (tmp_path / "saved" / "README.md").read_text(encoding="utf-8") == "kept"
    assert AutoTokenizer.from_pretrained(tmp_path / "saved")("w1")["input_ids"] == [1, 5, 2]
    assert hf_bucket.load(tmp_path / "saved")(["w1"])[0]["logits"].shape == (2,)
    weights = tmp_path / "saved" / "model.onnx.data"
    assert weights.stat().st_nlink == 1, "changing the saved file must not reach the cache"


def test_saving_over_a_file_is_refused(loaded, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x", encoding="utf-8")
    with pytest.raises(ArtifactError, match="is a file; choose a folder"):
        loaded.save_pretrained(tmp_path / "file")


def test_pushing_uploads_the_artifact_and_nothing_else(loaded, monkeypatch) -> None:
    calls: dict[str, dict] = {}

    class Api:
        def __init__(self, **kwargs) -> None:
            calls["init"] = kwargs

        def create_repo(self, repo_id, **kwargs):
            calls["create"] = {"repo_id": repo_id, **kwargs}
            return type("Repo", (), {"repo_id": f"someone/{repo_id}"})

        def upload_folder(self, **kwargs):
            calls["upload"] = kwargs
            return "commit"

    monkeypatch.setattr("huggingface_hub.HfApi", Api)
    assert loaded.push_to_hub("mine", private=True, token="secret") == "commit"
    assert calls["create"] == {"repo_id": "mine", "private": True, "exist_ok": True}
    assert calls["upload"]["repo_id"] == "someone/mine"
    names = {path.name for path in loaded.runner.artifact.folder.iterdir()}
    assert set(calls["upload"]["allow_patterns"]) == names


def test_an_artifact_takes_other_buckets_without_the_checkpoint(loaded, tokenizer, reference, tmp_path: Path) -> None:
    loaded.save_pretrained(tmp_path / "saved")
    other = BucketedModelForSequenceClassification.from_pretrained(tmp_path / "saved", buckets=[(2, 24)])
    assert str(other.ladder) == "[b2_s24]"
    text = text_of(12)
    got = other(**tokenizer([text], return_tensors="pt")).logits
    assert_logits_equal_torch(got, [text], reference, tokenizer)


def test_an_artifact_for_another_task_is_refused(loaded, tmp_path: Path) -> None:
    loaded.save_pretrained(tmp_path / "saved")
    manifest = tmp_path / "saved" / "bucket_config.json"
    data = json.loads(manifest.read_text(encoding="utf-8"))
    del data["sha256"]
    manifest.write_text(json.dumps({**data, "task": "fill-mask"}), encoding="utf-8")
    with pytest.raises(ModelError, match="was compiled for fill-mask"):
        BucketedModelForSequenceClassification.from_pretrained(tmp_path / "saved")


def test_a_damaged_artifact_is_refused_by_the_name_of_its_file(loaded, tmp_path: Path) -> None:
    loaded.save_pretrained(tmp_path / "saved")
    weights = tmp_path / "saved" / "model.onnx.data"
    content = bytearray(weights.read_bytes())
    content[1000] ^= 1
    weights.write_bytes(content)
    with pytest.raises(ArtifactError, match=r"model\.onnx\.data was altered"):
        BucketedModelForSequenceClassification.from_pretrained(tmp_path / "saved")


def test_threads_share_one_model(loaded, tokenizer) -> None:
    batches = [tokenizer([text_of(n % 60, n), text_of(n % 13)], padding=True, return_tensors="np") for n in range(60)]
    alone = [loaded(**batch).logits for batch in batches]
    with ThreadPoolExecutor(16) as pool:
        together = list(pool.map(lambda batch: loaded(**batch).logits, batches))
    assert all(np.abs(a - b).max() <= 1e-5 for a, b in zip(alone, together, strict=True))


def test_a_pickled_model_gives_the_same_answer(loaded, tokenizer) -> None:
    batch = tokenizer([text_of(9)], return_tensors="pt")
    assert torch.equal(pickle.loads(pickle.dumps(loaded))(**batch).logits, loaded(**batch).logits)


def _child(model, queue) -> None:
    warnings.simplefilter("error")
    queue.put(model(input_ids=np.array([[1, 5, 2]])).logits.tolist())


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_a_model_works_in_a_child_process_after_use(loaded, method: str) -> None:
    expected = loaded(input_ids=np.array([[1, 5, 2]])).logits.tolist()
    context = multiprocessing.get_context(method)
    queue = context.SimpleQueue()
    child = context.Process(target=_child, args=(loaded, queue))
    child.start()
    assert np.allclose(queue.get(), expected, atol=1e-5)
    child.join()


@pytest.mark.parametrize(
    "ids", [[[1, 5, 2], [1, 2]], torch.ones(1, 3, dtype=torch.bfloat16)], ids=["ragged", "bfloat16"]
)
def test_what_is_no_array_is_refused_with_advice(model, ids) -> None:
    with pytest.raises(InputTypeError, match=r"input_ids cannot be an array .*; pass padding=True to the tokenizer"):
        model(input_ids=ids)
