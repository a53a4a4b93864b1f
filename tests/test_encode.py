"""Texts become the tokens that transformers gives, from any number of threads, and nothing else passes for a text."""

from __future__ import annotations

import enum
import json
import logging
import random
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
from conftest import CLS, PAD, SEP, UNK, WORDS, text_of, tiny_tokenizer
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, processors

from hf_bucket.encode import Encoder, Text, Truncation, check_text, check_texts
from hf_bucket.errors import ArtifactError, InputError, InputTypeError, TooLongError

COLUMNS = ("input_ids", "attention_mask", "token_type_ids")
STRATEGIES = ("longest_first", "only_first", "only_second")

words = st.sampled_from([*WORDS[:8], "unknown", "W1", SEP])
texts = st.lists(words, max_size=12).map(" ".join)
texts_or_pairs = texts | st.tuples(texts, texts)


def unframed_tokenizer() -> Tokenizer:
    """The tiny tokenizer without special tokens around a text."""
    settings_ = json.loads(tiny_tokenizer().to_str())
    return Tokenizer.from_str(json.dumps({**settings_, "post_processor": None}))


def roberta_tokenizer() -> Tokenizer:
    """The tiny tokenizer with RoBERTa's frame: two separators between the texts of a pair, all types 0."""
    tokenizer = tiny_tokenizer()
    tokenizer.post_processor = processors.RobertaProcessing((SEP, 2), (CLS, 1))
    return tokenizer


TOKENIZERS = {"bert": tiny_tokenizer(), "roberta": roberta_tokenizer(), "unframed": unframed_tokenizer()}
TOKENIZERS["bytes"] = unframed_tokenizer()  # without offsets, its pairs have no types
TOKENIZERS["bytes"].post_processor = processors.ByteLevel(trim_offsets=False)
ENCODERS = {name: Encoder(tokenizer.to_str(), inputs=COLUMNS) for name, tokenizer in TOKENIZERS.items()}
ENCODER = ENCODERS["bert"]


@pytest.fixture(scope="module")
def references() -> dict[str, Any]:
    """The same tokenizers in transformers' hands."""
    from transformers import PreTrainedTokenizerFast

    logging.getLogger("transformers").setLevel(logging.CRITICAL)  # it logs an error where it cannot cut enough
    special = {"pad_token": PAD, "unk_token": UNK, "cls_token": CLS, "sep_token": SEP}
    return {
        name: PreTrainedTokenizerFast(tokenizer_object=tokenizer, model_input_names=list(COLUMNS), **special)
        for name, tokenizer in TOKENIZERS.items()
    }


def rows_of(encoder: Encoder, given_: Sequence[Text], truncation: Truncation | None = None) -> list[dict[str, Any]]:
    features = encoder(given_, truncation=truncation)
    return [{name: list(features.columns[name][row]) for name in features.columns} for row in range(len(features))]


def reference_row(reference: Any, parts: Sequence[str], **options: Any) -> dict[str, list[int]]:
    # as a batch: outside one, transformers takes an empty second text for none
    encoded = reference(*([part] for part in parts), **options)
    return {name: list(encoded[name][0]) for name in COLUMNS}


# properties


@settings(deadline=None, max_examples=40)
@given(st.lists(texts_or_pairs, max_size=6), st.none() | st.integers(3, 20))
def test_a_text_gets_the_same_tokens_whatever_its_neighbours(given_: list[Text], max_length: int | None) -> None:
    truncation = None if max_length is None else Truncation(max_length=max_length)
    alone = [row for text in given_ for row in rows_of(ENCODER, [text], truncation)]
    assert rows_of(ENCODER, given_, truncation) == alone


@settings(deadline=None, max_examples=40)
@given(st.lists(texts_or_pairs, max_size=6), st.integers(3, 20))
def test_only_texts_that_are_too_long_are_cut_and_all_of_those_are_reported(
    given_: list[Text], max_length: int
) -> None:
    whole, cut = ENCODER(given_), ENCODER(given_, truncation=Truncation(max_length=max_length))
    assert whole.truncated == ()
    assert cut.truncated == tuple(row for row, length in enumerate(whole.lengths) if length > max_length)
    assert cut.lengths == tuple(min(length, max_length) for length in whole.lengths)
    assert whole.lengths == tuple(ENCODER.lengths(given_)) == tuple(map(len, whole.columns["input_ids"]))


# oracles


@settings(deadline=None, max_examples=150)
@given(
    kind=st.sampled_from(sorted(TOKENIZERS)),
    text=texts_or_pairs,
    max_length=st.integers(0, 14),
    strategy=st.sampled_from(STRATEGIES),
    side=st.sampled_from(["left", "right"]),
)
def test_a_text_is_cut_as_transformers_cuts_it(
    references: dict[str, Any], kind: str, text: Text, max_length: int, strategy: Any, side: Any
) -> None:
    reference, encoder = references[kind], ENCODERS[kind]
    parts = [text] if isinstance(text, str) else list(text)
    specials = reference.num_special_tokens_to_add(len(parts) == 2)
    truncation = Truncation(max_length=max(max_length, specials), strategy=strategy, side=side)
    reference.truncation_side = side
    n_tokens = [len(part.split()) for part in parts]
    cut = STRATEGIES.index(strategy) - 1
    if cut >= 0 and sum(n_tokens) > truncation.max_length - specials == sum(n_tokens) - sum(n_tokens[cut : cut + 1]):
        # to leave nothing of the named text, tokenizers refuses or cuts the other one too: see it as given empty
        parts[cut] = ""
        expected = reference_row(reference, parts)
    else:
        assume(cut < 0 or truncation.max_length > specials)  # there tokenizers would empty both texts
        try:
            expected = reference_row(reference, parts, truncation=strategy, max_length=truncation.max_length)
        except Exception as error:  # noqa: BLE001  (tokenizers raises no other)
            expected = None
            assert "Truncation error" in str(error)  # noqa: PT017
    if expected and len(expected["input_ids"]) <= truncation.max_length:
        assert rows_of(encoder, [text], truncation) == [expected]
    else:
        with pytest.raises(TooLongError, match=f"input 0 cannot be cut to {truncation.max_length} tokens"):
            encoder([text], truncation=truncation)


@settings(deadline=None, max_examples=40)
@given(kind=st.sampled_from(sorted(TOKENIZERS)), given_=st.lists(texts_or_pairs, min_size=1, max_size=5))
def test_whole_texts_get_the_tokens_of_transformers(references: dict[str, Any], kind: str, given_: list[Text]) -> None:
    parts = [[text] if isinstance(text, str) else text for text in given_]
    assert rows_of(ENCODERS[kind], given_) == [reference_row(references[kind], part) for part in parts]


@pytest.fixture
def restless_threads() -> Iterator[None]:
    """Threads that take turns thousands of times more often than usual."""
    usual = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    yield
    sys.setswitchinterval(usual)


@pytest.mark.usefixtures("restless_threads")
def test_eight_threads_get_what_one_thread_gets() -> None:
    generator = random.Random(0)
    calls = []
    for _ in range(2000):
        n_words = [generator.randrange(60) for _ in range(generator.randrange(4))]
        batch: list[Text] = [text_of(n) if n % 2 else (text_of(n), text_of(n // 2)) for n in n_words]
        cut = Truncation(max_length=generator.randrange(3, 60), side=generator.choice(["left", "right"]))
        calls.append((batch, generator.choice([None, cut])))
    expected = [ENCODER(batch, truncation=truncation) for batch, truncation in calls]
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(lambda call: ENCODER(call[0], truncation=call[1]), calls))
    assert found == expected
    assert any(features.truncated for features in expected)


@pytest.mark.parametrize("side", ["left", "right"])
def test_real_pairs_are_encoded_and_cut_as_auto_tokenizer_does(assets: Path, side: Any) -> None:
    from pyarrow.parquet import read_table
    from transformers import AutoTokenizer

    folder = assets / "models" / "minilm-mrpc"
    reference = AutoTokenizer.from_pretrained(folder, truncation_side=side)
    encoder = Encoder((folder / "tokenizer.json").read_text(encoding="utf-8"), inputs=COLUMNS)
    table = read_table(assets / "data" / "glue" / "mrpc" / "validation.parquet").slice(0, 200)
    pairs = list(zip(table["sentence1"].to_pylist(), table["sentence2"].to_pylist(), strict=True))
    for max_length in (None, 48):
        options = {} if max_length is None else {"truncation": "longest_first", "max_length": max_length}
        expected = reference([a for a, _ in pairs], [b for _, b in pairs], **options)
        features = encoder(pairs, truncation=max_length and Truncation(max_length=max_length, side=side))
        assert {name: list(features.columns[name]) for name in COLUMNS} == {name: expected[name] for name in COLUMNS}
        assert bool(features.truncated) == (max_length is not None)


# tables


@pytest.mark.parametrize(
    ("text", "strategy", "side", "max_length", "tokens"),
    [
        pytest.param("w0 w1 w2", "longest_first", "right", 4, "[CLS] w0 w1 [SEP]", id="the end goes"),
        pytest.param("w0 w1 w2", "longest_first", "left", 4, "[CLS] w1 w2 [SEP]", id="the beginning goes"),
        pytest.param("w0 w1 w2", "only_first", "right", 2, "[CLS] [SEP]", id="nothing but special tokens"),
        pytest.param(("w0 w1", "w2 w3"), "longest_first", "right", 6, "[CLS] w0 [SEP] w2 w3 [SEP]", id="a tie"),
        pytest.param(("w0 w1 w2", "w3"), "longest_first", "right", 5, "[CLS] w0 [SEP] w3 [SEP]", id="the longer"),
        pytest.param(("w0 w1", "w2 w3"), "only_first", "right", 6, "[CLS] w0 [SEP] w2 w3 [SEP]", id="the first"),
        pytest.param(("w0 w1", "w2 w3"), "only_second", "left", 6, "[CLS] w0 w1 [SEP] w3 [SEP]", id="the second"),
        pytest.param(("w0", "w1"), "longest_first", "right", 3, "[CLS] [SEP] [SEP]", id="both gone"),
        pytest.param(("w0", "w1"), "only_first", "right", 4, "[CLS] [SEP] w1 [SEP]", id="all of the first"),
    ],
)
def test_the_named_text_loses_the_named_end(text: Text, strategy: Any, side: Any, max_length: int, tokens: str) -> None:
    features = ENCODER([text], truncation=Truncation(max_length=max_length, strategy=strategy, side=side))
    assert [TOKENIZERS["bert"].id_to_token(number) for number in features.columns["input_ids"][0]] == tokens.split()
    assert features.truncated == (0,)


@pytest.mark.parametrize(
    ("text", "strategy", "max_length", "message"),
    [
        pytest.param(("w0", "w1 w2"), "only_first", 4, r'"only_first" \(its texts have 1 \+ 2 tokens\)', id="first"),
        pytest.param(("w0 w1", "w2"), "only_second", 4, r'"only_second" \(its texts have 2 \+ 1', id="second"),
        pytest.param("w0 w1", "only_second", 3, r'"only_second" \(its texts have 2 tokens', id="no second text"),
        pytest.param(("w0", "w1"), "only_first", 3, r"1 \+ 1 tokens", id="only special tokens of a pair left"),
        pytest.param("w0", "longest_first", 1, "2 special tokens alone are more", id="below the special tokens"),
        pytest.param(("w0", "w1"), "only_first", 2, "3 special tokens alone are more", id="below those of a pair"),
    ],
)
def test_a_text_that_may_not_be_cut_enough_is_too_long(
    text: Text, strategy: Any, max_length: int, message: str
) -> None:
    truncation = Truncation(max_length=max_length, strategy=strategy)
    with pytest.raises(TooLongError, match=f"input 0 cannot be cut to {max_length} tokens.*{message}"):
        ENCODER([text], truncation=truncation)


class _Shout(str):
    """A string whose ``str()`` is not its content."""

    def __str__(self) -> str:
        return super().__str__().upper()


class _Colour(str, enum.Enum):
    RED = "red"


class _Pair(NamedTuple):
    text: str
    text_pair: str


@pytest.mark.parametrize(
    ("given_", "expected"),
    [
        pytest.param([], [], id="nothing"),
        pytest.param(["a"], ["a"], id="a text"),
        pytest.param([""], [""], id="an empty text"),
        pytest.param([("a", "b")], [("a", "b")], id="a pair"),
        pytest.param([("", "")], [("", "")], id="a pair of empty texts"),
        pytest.param([_Pair("a", "b")], [("a", "b")], id="a named pair"),
        pytest.param([{"text": "a"}], ["a"], id="a dict"),
        pytest.param([{"text": "a", "text_pair": "b"}], [("a", "b")], id="a dict of two"),
        pytest.param([{"text": "a", "text_pair": None}], ["a"], id="a dict whose second text is None"),
        pytest.param([{"text": "a", "text_pair": ""}], [("a", "")], id="a dict whose second text is empty"),
        pytest.param([np.str_("a")], ["a"], id="a numpy string"),
        pytest.param([_Shout("a")], ["a"], id="a string whose str() differs"),
        pytest.param([_Colour.RED], ["red"], id="a string enum"),
        pytest.param([(_Colour.RED, _Shout("b"))], [("red", "b")], id="a pair of such"),
        pytest.param(np.array(["a", "b"]), ["a", "b"], id="an array of strings"),
        pytest.param((text for text in "ab"), ["a", "b"], id="a generator"),
        pytest.param(["a", ("b", "c")], ["a", ("b", "c")], id="texts and pairs mixed"),
    ],
)
def test_texts_become_plain_strings_and_pairs_of_them(given_: Any, expected: list[Text]) -> None:
    found = check_texts(given_)
    assert found == expected
    parts = [part for text in found for part in (text if isinstance(text, tuple) else (text,))]
    assert all(type(text) in (str, tuple) for text in found)
    assert all(type(part) is str for part in parts)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        pytest.param(None, "is None", id="None"),
        pytest.param(b"a", "is a bytes", id="bytes"),
        pytest.param(1, "is a int", id="int"),
        pytest.param(float("nan"), "is a float", id="a missing value in a column"),
        pytest.param(True, "is a bool", id="bool"),
        pytest.param(["a"], "is a list", id="list"),
        pytest.param(["a", "b"], "is a list", id="list of two"),
        pytest.param([["a", "b"]], "is a list", id="nested list"),
        pytest.param({"a", "b"}, "is a set", id="set"),
        pytest.param(np.array(["a", "b"]), "is a ndarray", id="array"),
        pytest.param((), "is a tuple", id="empty tuple"),
        pytest.param(("a",), "is a tuple", id="tuple of one"),
        pytest.param(("a", "b", "c"), "is a tuple", id="tuple of three"),
        pytest.param(("a", None), "holds None where a text belongs", id="second is None"),
        pytest.param((None, "a"), "holds None where a text belongs", id="first is None"),
        pytest.param(("a", b"b"), "holds a bytes where a text belongs", id="second is bytes"),
        pytest.param((("a", "b"), "c"), "holds a tuple where a text belongs", id="nested pair"),
        pytest.param({}, r"is a dict with keys \[\]", id="empty dict"),
        pytest.param({"sentence": "a"}, r"is a dict with keys \['sentence'\]", id="another key"),
        pytest.param({"text_pair": "a"}, r"is a dict with keys \['text_pair'\]", id="only the second key"),
        pytest.param({"text": "a", "label": 1}, r"is a dict with keys \['text', 'label'\]", id="one key too many"),
        pytest.param({"text": None}, "holds None where a text belongs", id="text is None"),
        pytest.param({"text": ["a"]}, "holds a list where a text belongs", id="text is a list"),
        pytest.param({"text": "a", "text_pair": 1}, "holds a int where a text belongs", id="pair is a number"),
    ],
)
def test_anything_else_is_refused_with_its_position(wrong: object, message: str) -> None:
    with pytest.raises(InputTypeError, match=rf"^input 2 {message}.*expected"):
        check_texts(["a", ("b", "c"), wrong])
    with pytest.raises(TypeError, match=rf"^input 7 {message}"):
        check_text(wrong, 7)


@pytest.mark.parametrize(
    ("text", "position"),
    [
        pytest.param("\ud800", 0, id="high half alone"),
        pytest.param("ab\udc80", 2, id="an undecodable byte"),
        pytest.param(("a", "b\udfff"), 1, id="in the second text"),
        pytest.param(("\ud83d", "\ude00"), 0, id="two halves in two texts"),
    ],
)
def test_a_lone_surrogate_is_refused_with_its_row_and_position(text: Text, position: int) -> None:
    message = rf'input 1 has a lone surrogate at position {position}, .*errors="replace"'
    with pytest.raises(InputError, match=message):
        ENCODER(["a", text, "b"])
    with pytest.raises(InputError, match=message):
        ENCODER.lengths(["a", text, "b"])


@pytest.mark.parametrize(
    "content",
    [
        pytest.param("", id="empty"),
        pytest.param("{", id="not JSON"),
        pytest.param("null", id="null"),
        pytest.param("[]", id="a list"),
        pytest.param("3", id="a number"),
        pytest.param("{}", id="no model"),
        pytest.param('{"version": "1.0", "model": {"type": "Nonsense"}}', id="unknown model"),
        pytest.param("[" * 100_000, id="nested too deep"),
        pytest.param(Tokenizer(models.WordLevel({"w0": 0}, unk_token="[UNK]")).to_str(), id="unknown token missing"),
    ],
)
def test_a_bad_tokenizer_is_an_artifact_error(content: str) -> None:
    with pytest.raises(ArtifactError, match=r"tokenizer\.json cannot be read"):
        Encoder(content, inputs=COLUMNS)


@pytest.mark.parametrize(
    ("kind", "frame", "min_length"),
    [
        pytest.param("bert", ((1,), (2,)), 2, id="framed"),
        pytest.param("roberta", ((1,), (2,)), 2, id="two separators only between texts"),
        pytest.param("unframed", ((), ()), 1, id="no special tokens"),
    ],
)
def test_an_encoder_knows_its_special_tokens(kind: str, frame: tuple[tuple[int, ...], ...], min_length: int) -> None:
    assert ENCODERS[kind].frame == frame
    assert ENCODERS[kind].suffix_length == len(frame[1])
    assert ENCODERS[kind].min_length == min_length


@pytest.mark.parametrize(
    ("vocab_size", "expected"),
    [
        pytest.param(None, range(4, 94), id="no limit"),
        pytest.param(94, range(4, 94), id="all of them"),
        pytest.param(93, range(4, 93), id="one less"),
        pytest.param(5, [4], id="one left"),
        pytest.param(4, [], id="special tokens only"),
    ],
)
def test_ordinary_ids_are_below_the_limit_and_not_special(vocab_size: int | None, expected: Sequence[int]) -> None:
    assert ENCODER.ordinary_ids(vocab_size) == list(expected)


# examples


def test_saved_truncation_and_padding_are_dropped() -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.enable_truncation(max_length=4)
    tokenizer.enable_padding(length=16, pad_id=3, pad_token=PAD)
    encoder = Encoder(tokenizer.to_str(), inputs=COLUMNS)
    assert encoder([text_of(10), ""]).lengths == (12, 2)
    assert rows_of(encoder, [text_of(10)]) == rows_of(ENCODER, [text_of(10)])


def test_the_row_that_may_not_be_cut_is_named() -> None:
    with pytest.raises(TooLongError, match=r"^input 2 cannot be cut to 4 tokens"):
        ENCODER(["w0", "w0 w1 w2", ("w0", "w1 w2")], truncation=Truncation(max_length=4, strategy="only_first"))


@pytest.mark.parametrize(
    ("kind", "types"),
    [
        pytest.param("bert", [0, 0, 0, 1, 1], id="framed"),
        pytest.param("unframed", [0, 0, 1, 1, 1], id="no special tokens"),
        pytest.param("roberta", [0, 0, 0, 0, 0], id="one type for both texts"),
    ],
)
def test_a_second_text_keeps_its_types_when_it_is_cut(kind: str, types: list[int]) -> None:
    features = ENCODERS[kind]([("w0 w1", text_of(9))], truncation=Truncation(max_length=5))
    assert features.columns["token_type_ids"] == [types]


def test_only_the_wanted_columns_are_returned() -> None:
    features = Encoder(tiny_tokenizer().to_str(), inputs=["attention_mask", "input_ids"])(["w0"])
    assert features.columns == {"attention_mask": [[1, 1, 1]], "input_ids": [[1, 4, 2]]}


def test_an_empty_list_has_no_rows_and_an_empty_text_has_only_special_tokens() -> None:
    assert len(ENCODER([])) == 0
    assert ENCODER.lengths([]) == []
    assert rows_of(ENCODER, [""])[0]["input_ids"] == [1, 2]
    assert rows_of(ENCODER, [("", "")])[0]["token_type_ids"] == [0, 0, 1]


def test_an_encoder_knows_its_vocabulary() -> None:
    assert ENCODER.vocabulary_size == 4 + len(WORDS)
    assert ENCODER.token_id(PAD) == 3
    assert ENCODER.token_id("w89") == 93
    assert ENCODER.token_id("w90") is None


def test_a_gap_in_the_vocabulary_counts_towards_its_size() -> None:
    tokenizer = Tokenizer(models.WordLevel({"[UNK]": 0, "w0": 7}, unk_token="[UNK]"))
    encoder = Encoder(tokenizer.to_str(), inputs=COLUMNS)
    assert encoder.vocabulary_size == 8
    assert encoder.ordinary_ids(None) == [0, 7]
