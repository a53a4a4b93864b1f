"""What happens to a text that is longer than every bucket: each policy against an oracle."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from conftest import WORDS, fake_artifact, fake_engine, text_of, tiny_tokenizer
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer

from hf_bucket.encode import Encoder, Truncation, Windows, cut
from hf_bucket.errors import BucketWarning, InputError, TooLongError
from hf_bucket.ladder import Bucket, Ladder, make_ladder
from hf_bucket.overflow import Overflow, make_overflow
from hf_bucket.pipelines import CallOptions, TextClassificationPipeline
from hf_bucket.runner import Runner, RunOptions
from hf_bucket.session import FakeSession

COLUMNS = ["input_ids", "attention_mask", "token_type_ids"]
ENCODER = Encoder(tiny_tokenizer().to_str(), inputs=COLUMNS)
CLS, SEP = 1, 2


@pytest.fixture
def make_runner(tmp_path: Path) -> Callable[[str | Overflow], Runner]:
    artifact = fake_artifact(tmp_path / "fake", make_ladder([8, 16], batch_sizes=[1, 4]), max_length=64)

    def make(overflow: str | Overflow) -> Runner:
        return Runner(
            artifact,
            RunOptions(overflow=overflow),
            engine=fake_engine,
            dynamic=lambda artifact, options, sessions: FakeSession,
        )

    return make


def ids_of(text: str) -> list[int]:
    return [4 + WORDS.index(word) for word in text.split()]


def answer(ids: list[int]) -> list[float]:
    """What a fake session says of one unpadded row."""
    return [float(sum(ids)), float(len(ids))]


def logits(runner: Runner, texts: list) -> list[list[float]]:
    return [[float(value) for value in row["logits"]] for row in runner(texts)]


# --- spelling ---


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("error", Overflow()),
        ("truncate", Overflow(policy="truncate")),
        ("truncate:left", Overflow(policy="truncate", side="left")),
        ("truncate:head+tail,only_second", Overflow(policy="truncate", side="head+tail", strategy="only_second")),
        ("window:max,stride=32", Overflow(policy="window", pool="max", stride=32)),
        ("window:only_first,stride=0,first", Overflow(policy="window", strategy="only_first", stride=0, pool="first")),
        ("dynamic", Overflow(policy="dynamic")),
    ],
    ids=str,
)
def test_a_policy_is_spelled_in_one_string_and_back(text: str, expected: Overflow) -> None:
    assert make_overflow(text) == expected
    assert make_overflow(str(expected)) == expected


@given(
    st.one_of(
        st.builds(Overflow, policy=st.sampled_from(["error", "dynamic"])),
        st.builds(
            Overflow,
            policy=st.just("truncate"),
            side=st.sampled_from([None, "left", "right", "head+tail"]),
            strategy=st.sampled_from(["longest_first", "only_first", "only_second"]),
        ),
        st.builds(
            Overflow,
            policy=st.just("window"),
            stride=st.none() | st.integers(0, 600),
            strategy=st.sampled_from(["longest_first", "only_first", "only_second"]),
            pool=st.sampled_from(["mean", "max", "first"]),
        ),
    )
)
def test_every_policy_can_be_spelled(policy: Overflow) -> None:
    assert make_overflow(str(policy)) == policy


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("cut", "must be one of error, truncate, window, dynamic, got 'cut'; write \"error\""),
        ("truncate:middle", "no option 'middle'; write"),
        ("truncate:max", 'pool has no meaning with "truncate"'),
        ("window:left", 'side has no meaning with "window"'),
        ("error:left", 'side has no meaning with "error"'),
        ("window:mean,max", "says pool twice"),
        ("window:stride=-1", "stride must be a number of tokens of at least 0, got '-1'"),
        ("window:stride", "no option 'stride'"),
        (None, "overflow is None; write"),
    ],
    ids=str,
)
def test_what_is_no_policy_is_told_what_there_is(text: str | None, message: str) -> None:
    with pytest.raises(InputError, match=message.replace("+", r"\+")):
        make_overflow(text)


# --- error and dynamic ---


def test_error_names_the_row_and_counts_it(make_runner) -> None:
    runner = make_runner("error")
    with pytest.raises(TooLongError, match="input 1 has 17 tokens but the largest bucket holds 16"):
        runner(["w1", text_of(15)])
    assert runner.stats()["refused"] == 1
    assert logits(runner, ["w1"]) == [answer([CLS, *ids_of("w1"), SEP])]


def test_dynamic_runs_the_exact_length_up_to_the_models_maximum(make_runner) -> None:
    runner = make_runner("dynamic")
    texts = [text_of(30), "w1", text_of(62), text_of(14)]
    assert logits(runner, texts) == [answer([CLS, *ids_of(text), SEP]) for text in texts]
    stats = runner.stats()
    assert (stats["rows"], stats["dynamic"]["rows"], stats["dynamic"]["real_tokens"]) == (4, 2, 32 + 64)
    assert stats["dynamic"]["waste"] == 0.0
    with pytest.raises(TooLongError, match=r"input 0 has 65 tokens .* this model's maximum is 64"):
        runner([text_of(63)])


# --- truncate ---


@pytest.mark.parametrize(
    ("policy", "kept"),
    [
        ("truncate", [*range(14)]),
        ("truncate:right", [*range(14)]),
        ("truncate:left", [*range(16, 30)]),
        ("truncate:head+tail", [*range(7), *range(23, 30)]),
    ],
)
def test_truncation_keeps_the_special_tokens_and_the_side_asked_for(make_runner, policy: str, kept: list[int]) -> None:
    runner, ids = make_runner(policy), ids_of(text_of(30))
    with pytest.warns(BucketWarning, match="input 1 was cut to the largest bucket, 16 tokens"):
        found = logits(runner, ["w1", text_of(30)])
    assert found[1] == answer([CLS, *(ids[place] for place in kept), SEP])
    stats = runner.stats()
    assert (stats["truncated"], stats["buckets"]["b1_s16"]["truncated"]) == (1, 1)
    assert stats["buckets"]["b1_s8"]["truncated"] == 0


@pytest.mark.parametrize(
    ("policy", "first", "second"),
    [("truncate", 7, 6), ("truncate:only_first", 3, 10), ("truncate:left,only_first", 3, 10)],
)
def test_pairs_lose_tokens_where_they_are_asked_to(make_runner, policy: str, first: int, second: int) -> None:
    runner, pair = make_runner(policy), (text_of(20), text_of(10, start=40))
    side = "left" if "left" in policy else "right"
    with pytest.warns(BucketWarning):
        found = logits(runner, [pair])
    parts = [cut(ids_of(text), size, side) for text, size in zip(pair, (first, second), strict=True)]
    assert found == [answer([CLS, *parts[0], SEP, *parts[1], SEP])]


def test_a_pair_whose_other_text_is_too_long_is_refused(make_runner) -> None:
    runner = make_runner("truncate:only_second")
    with pytest.raises(TooLongError, match=r'by "only_second" .* use "longest_first"'):
        runner([(text_of(20), text_of(10))])
    assert runner.stats()["refused"] == 1


@settings(deadline=None)
@given(
    first=st.integers(0, 40),
    second=st.none() | st.integers(0, 40),
    size=st.integers(3, 30),
    side=st.sampled_from(["left", "right"]),
)
def test_a_cut_text_is_what_the_tokenizer_itself_would_cut(first: int, second: int | None, size: int, side) -> None:
    theirs: Tokenizer = tiny_tokenizer()
    theirs.enable_truncation(max_length=size, stride=0, strategy="longest_first", direction=side)
    text = text_of(first) if second is None else (text_of(first), text_of(second, start=40))
    expected = theirs.encode(text) if second is None else theirs.encode(*text)
    found = ENCODER([text], truncation=Truncation(max_length=size, side=side)).columns
    assert found["input_ids"][0] == expected.ids
    assert found["token_type_ids"][0] == expected.type_ids
    assert found["attention_mask"][0] == expected.attention_mask


# --- windows ---


def windows_by_hand(ids: list[int], room: int, stride: int) -> list[list[int]]:
    """The oracle: take a window, step on, until the end has been seen."""
    found, at = [], 0
    while True:
        found.append(ids[at : at + room])
        if at + room >= len(ids):
            return found
        at += room - stride


@settings(deadline=None)
@given(n_words=st.integers(15, 90), stride=st.integers(0, 13))
def test_windows_show_every_token_with_special_tokens_around_each(n_words: int, stride: int) -> None:
    text = text_of(n_words)
    features = ENCODER(["w1", text, "w2"], windows=Windows(max_length=16, stride=stride))
    expected = [[CLS, *part, SEP] for part in windows_by_hand(ids_of(text), 14, stride)]
    assert list(features.columns["input_ids"][1:-1]) == expected
    assert features.owners == ((0, *[1] * len(expected), 2) if len(expected) > 1 else None)
    assert {token for row in expected for token in row[1:-1]} == set(ids_of(text))


def test_windows_of_a_pair_move_over_one_text_and_keep_the_other(make_runner) -> None:
    long, short = text_of(20), text_of(4, start=40)
    features = ENCODER([(short, long)], windows=Windows(max_length=16, stride=3))
    expected = [[CLS, *ids_of(short), SEP, *part, SEP] for part in windows_by_hand(ids_of(long), 9, 3)]
    assert list(features.columns["input_ids"]) == expected
    assert list(features.columns["token_type_ids"][0]) == [0] * 6 + [1] * 10
    moved = ENCODER([(long, short)], windows=Windows(max_length=16, stride=3, strategy="longest_first"))
    assert moved.columns["input_ids"][0][10:] == [SEP, *ids_of(short), SEP]
    with pytest.raises(TooLongError, match=r"20 of them for its other text.* leaves 0, .*; use a longer bucket$"):
        ENCODER([(long, short)], windows=Windows(max_length=16, stride=3, strategy="only_second"))


@pytest.mark.parametrize(
    ("pool", "reduce"), [("mean", np.mean), ("max", np.max), ("first", lambda rows, axis: rows[0])]
)
def test_the_logits_of_windows_are_pooled(make_runner, pool: str, reduce) -> None:
    runner, text = make_runner(f"window:stride=4,{pool}"), text_of(40)
    rows = [answer([CLS, *part, SEP]) for part in windows_by_hand(ids_of(text), 14, 4)]
    found = logits(runner, ["w1", text, "w2"])
    assert found[0] == answer([CLS, *ids_of("w1"), SEP])
    assert found[1] == pytest.approx(reduce(np.array(rows), axis=0).tolist())
    assert found[2] == answer([CLS, *ids_of("w2"), SEP])
    stats = runner.stats()
    assert (stats["windows"], stats["rows"], stats["truncated"]) == (len(rows), len(rows) + 2, 0)
    assert sum(figures["windows"] for figures in stats["buckets"].values()) == len(rows)


def test_a_stride_without_progress_is_refused(make_runner) -> None:
    with pytest.raises(TooLongError, match="no more than the stride of 14; use a smaller stride"):
        make_runner("window:stride=14")([text_of(20)])


PAIRS = [("", text_of(30)), (text_of(30), ""), (text_of(20), text_of(25)), (text_of(5), text_of(40)), text_of(30), "w1"]


@settings(deadline=None, max_examples=300)
@given(
    texts=st.lists(st.sampled_from(PAIRS), min_size=1, max_size=3),
    policy=st.sampled_from(
        [
            "truncate",
            "truncate:left",
            "truncate:head+tail,only_first",
            "truncate:only_second",
            "window:stride=2",
            "window:only_first,stride=0",
        ]
    ),
    typed=st.booleans(),
)
def test_rows_of_tokens_are_cut_as_their_texts_would_be(texts: list, policy: str, typed: bool) -> None:
    """Also without token types, when only the special tokens tell where the second text begins."""
    chosen = make_overflow(policy)
    truncation = windows = None
    if chosen.policy == "truncate":
        truncation = Truncation(max_length=16, strategy=chosen.strategy, side=chosen.side or "right")
    else:
        windows = Windows(max_length=16, stride=chosen.stride or 0, strategy=chosen.strategy)
    for text in texts:
        columns = ENCODER([text]).columns
        (ids,), (types,) = columns["input_ids"], columns["token_type_ids"]
        if len(ids) <= 16:
            continue
        try:
            expected = ENCODER([text], truncation=truncation, windows=windows).columns["input_ids"]
        except TooLongError as error:
            with pytest.raises(TooLongError, match=re.escape(str(error))):
                ENCODER.places(ids, types if typed else None, truncation=truncation, windows=windows)
            continue
        found = ENCODER.places(ids, types if typed else None, truncation=truncation, windows=windows)
        assert [[ids[place] for place in keep] for keep in found] == [*expected]


# --- every door ---


@pytest.mark.parametrize("policy", ["truncate:left", "truncate:head+tail", "window:stride=4", "dynamic"])
def test_rows_of_tokens_are_treated_like_single_texts(make_runner, policy: str) -> None:
    texts = ["w1", text_of(40), text_of(14)]
    runner = make_runner(policy)
    features = runner.encoder(texts)
    if policy.startswith("truncate"):
        with pytest.warns(BucketWarning):
            fitted, expected = runner.fit(features), logits(make_runner(policy), texts)
    else:
        fitted, expected = runner.fit(features), logits(make_runner(policy), texts)
    assert [row["logits"].tolist() for row in runner.run(fitted)] == [pytest.approx(row) for row in expected]


def test_the_pipeline_takes_every_policy(make_runner) -> None:
    for policy in ("window:max", "dynamic", Overflow(policy="window", pool="first")):
        classify = TextClassificationPipeline(make_runner("error"), CallOptions(), overflow=policy)
        assert len(classify(["w1", text_of(40)], top_k=None)) == 2
        with pytest.raises(TooLongError):
            classify([text_of(40)], truncation=False)


def test_a_real_graph_gives_torchs_answer_at_a_length_outside_the_ladder(tiny_bert: Path) -> None:
    import torch
    from transformers import AutoModelForSequenceClassification

    from hf_bucket import BucketedModelForSequenceClassification

    model = AutoModelForSequenceClassification.from_pretrained(tiny_bert, dtype=torch.float32).eval()
    ids = ENCODER([text_of(50)]).columns["input_ids"]
    with torch.inference_mode():
        expected = model(input_ids=torch.tensor(ids)).logits.numpy()
    for mode in ("shared", "static"):
        bucketed = BucketedModelForSequenceClassification.from_pretrained(
            tiny_bert, buckets=[8, 16], mode=mode, overflow="dynamic"
        )
        found = bucketed(input_ids=np.array(ids), attention_mask=np.ones((1, 52), dtype=np.int64)).logits
        assert np.abs(found - expected).max() < 1e-5
        assert bucketed.stats()["dynamic"]["rows"] == 1
        bucketed.runner.close()
        assert len(bucketed.runner([text_of(50)])) == 1


def test_shapes_outside_the_ladder_are_told_apart() -> None:
    ladder = Ladder((Bucket(batch_size=1, extent=(8,)),))
    assert Bucket(batch_size=1, extent=(9,)) not in ladder.buckets
