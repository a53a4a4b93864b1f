"""Whatever comes in, what comes out is the right answer or an error of ours; nothing else is raised, nothing hangs."""

from __future__ import annotations

import time
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import fake_artifact, fake_engine
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from strategies import (
    LONG_UNITS,
    anything_for_batch_sizes,
    anything_for_buckets,
    arrays,
    batches,
    ladders,
    manifest_texts,
    million_characters,
    requests,
    surrogate_texts,
    unicode_texts,
)
from tokenizers import Tokenizer

import hf_bucket
from hf_bucket.artifact import Artifact, open_artifact
from hf_bucket.assign import assign
from hf_bucket.batch import Features, pad, unpad
from hf_bucket.errors import ArtifactError, BucketError, InputError, LadderError, TooLongError
from hf_bucket.ladder import LONGEST, Bucket, Ladder, make_ladder
from hf_bucket.manifest import MANIFEST, Manifest
from hf_bucket.planner import resolve_ladder
from hf_bucket.runner import Runner, RunOptions
from hf_bucket.session import FakeSession
from hf_bucket.tasks import Signature

DEFAULT = Path(hf_bucket.__file__).parent / "default"
TOKENIZER_JSON = (DEFAULT / "tokenizer.json").read_text(encoding="utf-8")
TOKENIZER = Tokenizer.from_str(TOKENIZER_JSON)
POLICIES = ["error", "truncate", "dynamic"]
A_MINUTE_S = 60  # of CPU time, for what takes seconds: quadratic work on a million characters would take hours

pytestmark = pytest.mark.filterwarnings("ignore::hf_bucket.errors.BucketWarning")
in_one_folder = [HealthCheck.function_scoped_fixture, HealthCheck.too_slow]


@pytest.fixture(scope="module")
def artifact(tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    return fake_artifact(tmp_path_factory.mktemp("fuzz"), make_ladder([8, 16, 32], batch_sizes=[1, 4]), max_length=None)


def runner_of(artifact: Artifact, ladder: Ladder, overflow: str) -> Runner:
    """A runner whose sessions sum token ids, with the bundled model's tokenizer."""
    changed = replace(artifact, manifest=replace(artifact.manifest, ladder=ladder))
    options = RunOptions(overflow=overflow, warmup=False)
    return Runner(changed, options, tokenizer_json=TOKENIZER_JSON, engine=fake_engine, dynamic=lambda *_: FakeSession)


def parts_of(entry: Any) -> tuple[str, ...]:
    """One text or two, as a caller may write them."""
    if isinstance(entry, dict):
        entry = (entry["text"], entry.get("text_pair"))
    return (entry,) if isinstance(entry, str) else tuple(part for part in entry if part is not None)


def ids_of(entry: Any, max_length: int | None = None) -> list[int]:
    """What the tokenizers library itself gives, cut by itself."""
    tokenizer = TOKENIZER
    if max_length is not None:
        tokenizer = Tokenizer.from_str(TOKENIZER_JSON)
        tokenizer.enable_truncation(max_length)
    return tokenizer.encode(*parts_of(entry)).ids


def answer_of(ids: list[int]) -> tuple[float, int]:
    return float(np.float32(sum(ids))), len(ids)


# texts, through the whole path


@settings(deadline=None, max_examples=120, suppress_health_check=in_one_folder)
@given(request_=requests(unicode_texts), ladder=ladders(longest=20), overflow=st.sampled_from(POLICIES))
def test_any_request_gets_the_sums_of_its_own_tokens_or_a_bucket_error(artifact, request_, ladder, overflow) -> None:
    runner = runner_of(artifact, ladder, overflow)
    largest = ladder.max_length
    whole = [ids_of(entry) for entry in request_]
    long = [row for row, ids in enumerate(whole) if len(ids) > largest]
    frames = [TOKENIZER.num_special_tokens_to_add(len(parts_of(entry)) == 2) for entry in request_]
    cut = overflow == "truncate"
    if long and (overflow == "error" or (cut and any(frames[row] > largest for row in long))):
        with pytest.raises(TooLongError, match=r"input \d+ (has|cannot be cut to) \d+ tokens"):
            runner(request_)
        assert runner.stats()["rows"] == runner.stats()["truncated"] == 0
        return
    fitting = [ids_of(entry, largest) if cut and row in long else whole[row] for row, entry in enumerate(request_)]
    rows = runner(request_)
    assert [(float(row["logits"][0]), int(row["logits"][1])) for row in rows] == [answer_of(ids) for ids in fitting]
    stats = runner.stats()
    assert (stats["rows"], stats["truncated"]) == (len(request_), len(long) * cut)
    assert stats["dynamic"]["rows"] == len(long) * (overflow == "dynamic")
    assert stats["real_tokens"] == sum(map(len, fitting))
    for bucket in ladder:
        figures = stats["buckets"][bucket.name]
        assert figures["real_tokens"] + figures["padded_tokens"] == figures["batches"] * bucket.cells
    for name in ("rows", "real_tokens", "padded_tokens"):
        assert stats[name] == sum(part[name] for part in [*stats["buckets"].values(), stats["dynamic"]])


@settings(deadline=None, max_examples=40, suppress_health_check=in_one_folder)
@given(good=requests(unicode_texts, most=4), bad=surrogate_texts, row=st.integers(0, 4), in_pair=st.booleans())
def test_a_lone_surrogate_is_refused_by_row_and_leaves_no_trace(artifact, good, bad, row, in_pair) -> None:
    runner = runner_of(artifact, make_ladder(512), "truncate")
    row = min(row, len(good))
    request = [*good[:row], ("a", bad) if in_pair else bad, *good[row:]]
    with pytest.raises(InputError, match=f"input {row} has a lone surrogate at position"):
        runner(request)
    assert runner.stats()["rows"] == 0
    assert len(runner(good)) == len(good)


@pytest.mark.parametrize("kind", LONG_UNITS)
def test_a_million_characters_are_counted_or_cut_within_a_minute(artifact: Artifact, kind: str) -> None:
    text = million_characters(kind)
    ids = ids_of(text)
    cut = ids if len(ids) <= 64 else [*ids[:63], ids[-1]]
    start = time.process_time()
    (row,) = runner_of(artifact, make_ladder(64), "truncate")([text])
    assert tuple(row["logits"]) == answer_of(cut)
    if cut is not ids:
        with pytest.raises(TooLongError, match=f"input 0 has {len(ids)} tokens but the largest bucket holds 64"):
            runner_of(artifact, make_ladder(64), "error")([text])
    assert time.process_time() - start < A_MINUTE_S


def test_a_pair_of_long_texts_is_cut_without_keeping_what_was_cut_off(artifact: Artifact) -> None:
    """The library's truncation keeps every combination of the pieces of both texts: here 70 million."""
    start = time.process_time()
    (row,) = runner_of(artifact, make_ladder(8), "truncate")([("good " * 20_000, "film " * 20_000)])
    good, film = ids_of("good")[1:-1], ids_of("film")[1:-1]
    assert tuple(row["logits"]) == answer_of([*ids_of(("", "")), *good * 2, *film * 3])
    assert time.process_time() - start < A_MINUTE_S


# the bundled model against torch


@pytest.fixture(scope="module")
def compiled() -> Runner:
    pytest.importorskip("torch")
    from hf_bucket import BucketedModelForSequenceClassification as Model

    return Model.from_pretrained(DEFAULT, buckets=[(1, 8), (3, 24), (2, 64)], threads=1, overflow="truncate").runner


@pytest.fixture(scope="module")
def unpadded() -> Any:
    """The logits of one row of token ids and their types, by torch, alone and unpadded."""
    torch = pytest.importorskip("torch")
    from transformers import AutoModelForSequenceClassification

    model = AutoModelForSequenceClassification.from_pretrained(DEFAULT, dtype=torch.float32).eval()

    def run(entry: Any) -> np.ndarray:
        tokenizer = Tokenizer.from_str(TOKENIZER_JSON)
        tokenizer.enable_truncation(64)
        encoding = tokenizer.encode(*parts_of(entry))
        ids, types = torch.tensor([encoding.ids]), torch.tensor([encoding.type_ids])
        with torch.inference_mode():
            return model(input_ids=ids, token_type_ids=types).logits[0].numpy()

    return run


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
@settings(deadline=None, max_examples=30, suppress_health_check=in_one_folder)
@given(request_=requests(unicode_texts, most=5))
def test_the_bundled_model_gives_torchs_unpadded_logits_for_any_text(compiled, unpadded, request_) -> None:
    rows = compiled(request_)
    assert len(rows) == len(request_)
    for row, entry in zip(rows, request_, strict=True):
        np.testing.assert_allclose(row["logits"], unpadded(entry), atol=1e-4, rtol=0)


# arrays


@pytest.fixture(scope="module")
def model(artifact: Artifact) -> Any:
    pytest.importorskip("torch")
    from transformers import BertConfig

    from hf_bucket import BucketedModelForSequenceClassification as Model

    return Model(Runner(artifact, RunOptions(warmup=False), engine=fake_engine), BertConfig())


@settings(deadline=None, max_examples=150, suppress_health_check=in_one_folder)
@given(given_=arrays())
def test_any_arrays_get_the_sums_of_their_real_tokens_or_a_bucket_error(model, given_: dict[str, Any]) -> None:
    try:
        logits = model(**given_).logits
    except BucketError:
        return
    ids = given_["input_ids"].astype(np.int64)
    mask = given_.get("attention_mask", np.ones_like(ids)) != 0
    expected = [[float((row * real).sum()), float(real.sum())] for row, real in zip(ids, mask, strict=True)]
    assert logits.tolist() == expected


# ladders


@settings(deadline=None, max_examples=60)
@given(ladder=ladders())
def test_every_length_that_fits_has_exactly_one_best_bucket(ladder: Ladder) -> None:
    for length in range(1, ladder.max_length + 1):
        holding = [bucket for bucket in ladder if bucket.length >= length]
        smallest = min((bucket.length, bucket.batch_size) for bucket in holding)
        best = [bucket for bucket in holding if (bucket.length, bucket.batch_size) == smallest]
        assert best == [ladder.choose(length)]
        (alone,) = assign([length], ladder)
        assert alone.bucket.length >= length
    with pytest.raises(TooLongError, match=f"has {ladder.max_length + 1} tokens"):
        ladder.choose(ladder.max_length + 1)


@settings(deadline=None, max_examples=200)
@given(buckets=anything_for_buckets, batch_sizes=anything_for_batch_sizes, most=st.none() | st.integers(1, 64))
def test_whatever_is_asked_for_is_a_ladder_of_the_model_or_a_ladder_error(buckets, batch_sizes, most) -> None:
    try:
        ladder = resolve_ladder(buckets, batch_sizes=batch_sizes, min_length=2, max_length=most)
    except LadderError:
        return
    assert all(2 <= bucket.length <= (most or LONGEST) and bucket.batch_size >= 1 for bucket in ladder)
    assert make_ladder([(bucket.batch_size, bucket.length) for bucket in ladder]) == ladder


@pytest.mark.parametrize("length", [LONGEST + 1, 10**30], ids=["one over", "no limit"])
def test_a_length_no_memory_holds_is_no_bucket(length: int) -> None:
    with pytest.raises(LadderError, match=f"at most 1,048,576, got {length}; drop the bucket"):
        Bucket(batch_size=1, extent=(length,))
    assert Bucket(batch_size=1, extent=(LONGEST,)).length == LONGEST


# batches


@settings(deadline=None, max_examples=100)
@given(batch=batches())
def test_any_batch_comes_back_as_it_went_in(batch: tuple[Features, Ladder, Signature]) -> None:
    features, ladder, signature = batch
    results: dict[int, Any] = {}
    rows_run: Counter[int] = Counter()
    for assignment in assign(features.lengths, ladder):
        padded = pad(features, assignment, signature)
        assert all(array.shape == (padded.bucket.batch_size, padded.bucket.length) for array in padded.arrays.values())
        rows_run.update(padded.rows)
        results.update(unpad(padded, padded.arrays, signature))
    assert rows_run == Counter(range(len(features)))
    for name, column in features.columns.items():
        assert [results[row][name].tolist() for row in range(len(features))] == list(column)


# manifests


@settings(deadline=None, max_examples=300, suppress_health_check=in_one_folder)
@given(data=st.data())
def test_any_manifest_is_read_and_written_back_equal_or_refused(artifact: Artifact, data: st.DataObject) -> None:
    text = data.draw(manifest_texts(artifact.manifest.to_json()))
    try:
        manifest = Manifest.from_json(text)
    except ArtifactError:
        return
    again = Manifest.from_json(manifest.to_json())
    assert again == manifest
    assert again.to_json() == manifest.to_json()


@settings(deadline=None, max_examples=100, suppress_health_check=in_one_folder)
@given(data=st.data())
def test_any_bytes_in_place_of_a_manifest_open_or_are_refused(tmp_path: Path, artifact: Artifact, data) -> None:
    texts = manifest_texts(artifact.manifest.to_json()).map(lambda text: text.encode("utf-8", "surrogatepass"))
    (tmp_path / MANIFEST).write_bytes(data.draw(st.binary(max_size=40) | texts))
    try:
        opened = open_artifact(tmp_path)
    except ArtifactError:
        return
    assert opened.manifest.files == {}  # none of the files that were listed is there
