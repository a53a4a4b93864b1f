"""Our pipeline against transformers' own: the same types, keys, order, and scores to 1e-4."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from conftest import fake_artifact, fake_engine, save_tiny_bert, text_of
from transformers.pipelines.pt_utils import KeyDataset

import hf_bucket
from hf_bucket.errors import BucketWarning, InputError, InputTypeError, ModelError, ProviderError, TooLongError
from hf_bucket.ladder import make_ladder
from hf_bucket.pipelines import CallOptions, TextClassificationPipeline
from hf_bucket.runner import Runner
from hf_bucket.session import FakeSession

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")

PAIR = {"text": text_of(4), "text_pair": text_of(7)}
TEXTS = [text_of(n, start=n) for n in (3, 40, 0, 12, 61)]


@pytest.fixture(scope="module")
def theirs(tiny_bert: Path):
    model = transformers.AutoModelForSequenceClassification.from_pretrained(tiny_bert, dtype=torch.float32)
    return transformers.pipeline("text-classification", model=model, tokenizer=str(tiny_bert), device="cpu")


@pytest.fixture(scope="module")
def ours(tiny_bert: Path) -> TextClassificationPipeline:
    return hf_bucket.pipeline("sentiment-analysis", model=tiny_bert, buckets=[16, 32, 64], batch_sizes=[1, 4])


def assert_same(got: object, expected: object) -> None:
    """Same types, keys, labels and order; scores to 1e-4."""
    if isinstance(expected, dict):
        assert type(got) is dict
        assert list(got) == list(expected)
        assert got["label"] == expected["label"]
        assert type(got["score"]) is float
        assert got["score"] == pytest.approx(expected["score"], abs=1e-4)
    else:
        assert type(got) is type(expected) is list
        assert len(got) == len(expected)
        for mine, yours in zip(got, expected, strict=True):
            assert_same(mine, yours)


@pytest.mark.parametrize(
    "inputs",
    [TEXTS[0], [TEXTS[0]], TEXTS, PAIR, [PAIR], [PAIR, TEXTS[1], {"text": TEXTS[3]}], ""],
    ids=["str", "list of one", "list", "dict", "list of dict", "mixed list", "empty text"],
)
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"top_k": 1},
        {"top_k": 2},
        {"top_k": None},
        {"top_k": 99},
        {"function_to_apply": "none"},
        {"function_to_apply": "sigmoid", "top_k": None},
        {"function_to_apply": "softmax"},
        {"truncation": True, "max_length": 8},
        {"truncation": "longest_first", "max_length": 9, "padding": True},
        {"batch_size": 3},
    ],
    ids=str,
)
def test_every_call_returns_what_transformers_returns(ours, theirs, inputs, options) -> None:
    assert_same(ours(inputs, **options), theirs(inputs, **options))


@pytest.mark.parametrize(
    "options",
    [{"top_k": None}, {"top_k": 1}, {"function_to_apply": "none"}, {"truncation": True, "max_length": 6}],
    ids=str,
)
@pytest.mark.parametrize("inputs", [TEXTS[3], TEXTS, PAIR], ids=["str", "list", "dict"])
def test_defaults_given_to_the_constructor_hold_for_every_call(tiny_bert, ours, theirs, inputs, options) -> None:
    mine = hf_bucket.pipeline(model=ours.runner, **options)
    yours = transformers.pipeline("text-classification", model=theirs.model, tokenizer=theirs.tokenizer, **options)
    assert_same(mine(inputs), yours(inputs))


def test_of_labels_with_one_score_the_first_is_best(tmp_path: Path) -> None:
    ladder = make_ladder([8], batch_sizes=[2])

    class Tied(FakeSession):
        def run(self, arrays):
            return {"logits": np.zeros((2, 2), dtype=np.float32)}

    runner = Runner(
        fake_artifact(tmp_path, ladder), engine=lambda artifact, options: {b: Tied(b) for b in artifact.manifest.ladder}
    )
    pipe = TextClassificationPipeline(runner, CallOptions(function_to_apply="softmax"))
    first = {"label": runner.artifact.manifest.labels[0], "score": 0.5}
    assert pipe(["w1", "w2"]) == [first, first]
    assert pipe(["w1", "w2"], top_k=1) == [[first], [first]]


@pytest.mark.parametrize("problem", ["regression", "multi_label_classification", "one label"])
def test_the_function_applied_follows_the_problem_type(tmp_path: Path, problem: str) -> None:
    settings = {"num_labels": 1} if problem == "one label" else {"num_labels": 3, "problem_type": problem}
    folder = save_tiny_bert(tmp_path, **settings)
    mine = hf_bucket.pipeline(model=folder, buckets=[16], batch_sizes=[1])
    yours = transformers.pipeline("text-classification", model=str(folder), dtype=torch.float32)
    for options in ({}, {"top_k": None}):
        assert_same(mine(text_of(5), **options), yours(text_of(5), **options))


def test_generators_are_answered_by_an_iterator_in_order(ours, theirs) -> None:
    results = ours(text for text in TEXTS)
    assert isinstance(results, Iterator)
    assert_same(list(results), list(theirs(text for text in TEXTS)))


def test_data_sets_columns_and_key_datasets_are_streams_with_a_length(ours, theirs) -> None:
    datasets = pytest.importorskip("datasets")
    table = datasets.Dataset.from_dict({"sentence": TEXTS, "idx": list(range(len(TEXTS)))})
    expected = theirs(TEXTS)
    for inputs in (
        KeyDataset(table, "sentence"),
        table["sentence"],
        table.select_columns("sentence").rename_column("sentence", "text"),
    ):
        results = ours(inputs)
        assert len(results) == len(TEXTS)
        assert_same(list(results), expected)


def test_a_data_set_with_other_columns_names_them(ours) -> None:
    datasets = pytest.importorskip("datasets")
    table = datasets.Dataset.from_dict({"sentence": ["w1"], "label": [0]})
    with pytest.raises(InputTypeError, match=r"input 0 is a dict with keys \['sentence', 'label'\]; expected \"text\""):
        list(ours(table))


@pytest.fixture
def fake(tmp_path: Path) -> TextClassificationPipeline:
    runner = Runner(fake_artifact(tmp_path, make_ladder([8, 16, 32], batch_sizes=[1, 4])), engine=fake_engine)
    return TextClassificationPipeline(runner, CallOptions(top_k=None), window=10)


def test_a_stream_is_read_at_most_one_window_ahead(fake) -> None:
    read: list[int] = []

    def source() -> Iterator[str]:
        for number in range(35):
            read.append(number)
            yield text_of(number % 20)

    results = fake(source())
    assert read == []
    for number in range(35):
        answer = next(results)
        count = next(entry["score"] for entry in answer if entry["label"] == "count")
        assert count == number % 20 + 2
        assert len(read) <= min(35, number + 10)
    with pytest.raises(StopIteration):
        next(results)


@pytest.mark.parametrize("as_list", [False, True], ids=["stream", "list"])
def test_the_next_texts_are_tokenised_while_those_before_them_run(
    fake, monkeypatch: pytest.MonkeyPatch, as_list: bool
) -> None:
    encode, run = fake.runner.encode, fake.runner.run
    begun = [threading.Event() for _ in range(5)]

    def encoding(texts: list[str], **options: object) -> object:
        begun[options["first_row"] // 10 if as_list else options["first_row"] // 5].set()  # type: ignore[operator]
        return encode(texts, **options)

    runs = iter(range(4))

    def running(features: object) -> object:
        number = next(runs)
        assert number == 3 or begun[number + 1].wait(60), "the next texts wait until these have run"
        return run(features)

    monkeypatch.setattr(fake.runner, "encode", encoding)
    monkeypatch.setattr(fake.runner, "run", running)
    texts = [text_of(number % 20) for number in range(40 if as_list else 20)]
    answers = fake(texts if as_list else iter(texts))
    counts = [entry["score"] for answer in answers for entry in answer if entry["label"] == "count"]
    assert counts == [number % 20 + 2 for number in range(len(texts))]


def test_a_stream_that_stands_still_keeps_no_thread(fake) -> None:
    results = fake(iter([text_of(1)] * 40))
    next(results)
    for thread in threading.enumerate():
        if thread.name.startswith("hf_bucket-tokens"):
            thread.join(60)
            assert not thread.is_alive(), "it waits for the next texts"
    assert len(list(results)) == 39


def test_a_stream_that_fails_yields_what_came_before(fake) -> None:
    def source() -> Iterator[str]:
        yield from [text_of(1)] * 13
        raise RuntimeError("the disk went away")

    results = fake(source())
    assert len([next(results) for _ in range(13)]) == 13
    with pytest.raises(RuntimeError, match="the disk went away"):
        next(results)


def test_a_bad_item_in_a_stream_is_named_by_its_place_in_the_stream(fake) -> None:
    results = fake(iter([text_of(1)] * 12 + [None]))
    got = [next(results) for _ in range(12)]
    assert len(got) == 12
    with pytest.raises(InputTypeError, match="input 12 is None"):
        next(results)


def test_a_long_item_in_a_stream_is_named_by_its_place_in_the_stream(fake) -> None:
    with pytest.raises(TooLongError, match="input 11 has 42 tokens"):
        list(fake(iter([text_of(1)] * 11 + [text_of(40)]), truncation=False))


def test_empty_inputs_give_empty_results(ours) -> None:
    assert ours([]) == []
    assert list(ours(iter([]))) == []


def test_longer_texts_are_cut_warned_about_once_and_counted(fake) -> None:
    with pytest.warns(BucketWarning, match="input 1 was cut to the largest bucket, 32 tokens"):
        fake([text_of(1), text_of(40)])
    fake([text_of(50)])
    assert fake.stats()["truncated"] == 2


def test_truncation_that_the_caller_asked_for_is_no_warning(fake) -> None:
    fake([text_of(20)], truncation=True, max_length=8)
    assert fake.stats()["truncated"] == 1


@pytest.mark.parametrize("bad", [None, b"w1", 3, ("w1", "w2"), 2.5], ids=repr)
def test_inputs_that_are_no_text_are_refused(fake, bad: object) -> None:
    with pytest.raises(InputTypeError, match=r"inputs is a|input 0"):
        fake(bad)


@pytest.mark.parametrize("bad", [["w1", None], ["w1", ["w1", "w2"]], [{"texts": "w1"}], [{"text": 3}]], ids=repr)
def test_items_that_are_no_text_are_named(fake, bad: list) -> None:
    with pytest.raises(InputTypeError, match=f"input {len(bad) - 1} "):
        fake(bad)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"top_k": 0}, "top_k must be a number of at least 1"),
        ({"top_k": "all"}, "top_k must be a number"),
        ({"function_to_apply": "relu"}, "function_to_apply must be one of default, softmax, sigmoid, none; got 'relu'"),
        ({"truncation": "middle"}, "truncation must be one of True, longest_first"),
        ({"max_length": 0}, "max_length must be a number of tokens"),
    ],
    ids=str,
)
def test_unknown_options_list_the_known_ones(fake, options: dict, message: str) -> None:
    with pytest.raises(InputError, match=message):
        fake("w1", **options)


def test_an_error_leaves_the_pipeline_usable(fake) -> None:
    with pytest.raises(InputTypeError, match="input 0 is None"):
        fake([None])
    assert len(fake(["w1"])) == 1


def test_threads_share_one_pipeline(ours) -> None:
    alone = [ours(text) for text in TEXTS * 8]
    with ThreadPoolExecutor(16) as pool:
        together = list(pool.map(ours, TEXTS * 8))
    assert_same(together, alone)


def test_transformers_own_pipeline_takes_the_model_as_it_is(ours, theirs, tiny_bert: Path) -> None:
    model = hf_bucket.BucketedModelForSequenceClassification(ours.runner, theirs.model.config)
    wrapped = transformers.pipeline("text-classification", model=model, tokenizer=theirs.tokenizer)
    for inputs in (TEXTS[0], TEXTS, PAIR):
        assert_same(wrapped(inputs), theirs(inputs))
    assert_same(wrapped(TEXTS, batch_size=4), theirs(TEXTS))


def test_another_tokenizer_is_used_instead_of_the_models_own(ours, theirs, tiny_bert: Path) -> None:
    for tokenizer in (theirs.tokenizer, tiny_bert):
        assert_same(hf_bucket.pipeline(model=ours.runner, tokenizer=tokenizer)(TEXTS), theirs(TEXTS))


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"task": "translation", "model": "x"}, ModelError, "task 'translation' is not supported; use one of"),
        ({"model": 3}, ModelError, "model is 3; expected a Hub id, a folder, or a model"),
        ({"model": "./nowhere"}, ModelError, "'./nowhere' is not a folder"),
        ({"model": "x", "device": "cuda:0"}, ProviderError, "device 'cuda:0' cannot be used"),
        ({"model": "x", "overflow": "drop"}, InputError, "overflow must be"),
        ({"model": "x", "dtype": "int8"}, ModelError, "dtype must be one of"),
    ],
    ids=["task", "model", "folder", "device", "overflow", "dtype"],
)
def test_wrong_arguments_are_refused_with_the_accepted_ones(arguments, error, message: str) -> None:
    with pytest.raises(error, match=message):
        hf_bucket.pipeline(**arguments)


def test_buckets_cannot_be_changed_for_a_loaded_model(ours) -> None:
    with pytest.raises(ModelError, match="buckets and quantize cannot be chosen for a model that is loaded already"):
        hf_bucket.pipeline(model=ours.runner, buckets=[8])
