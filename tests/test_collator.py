"""Rows leave the collator at a bucket's shape with nothing real changed; the sampler deals every row out once."""

from __future__ import annotations

import copy
import itertools
import pickle
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from torch.utils.data import DataLoader
from transformers import BatchEncoding, DataCollatorWithPadding, PreTrainedTokenizerFast

from hf_bucket.collator import BucketBatchSampler, DataCollatorWithBucketing
from hf_bucket.errors import BucketWarning, InputError, InputTypeError, LadderError, ModelError, TooLongError
from hf_bucket.ladder import make_ladder

SPECIAL = {"<unk>": 0, "<s>": 1, "</s>": 2, "<pad>": 3}
WORDS = [f"w{at}" for at in range(20)]
PAD, PAD_TYPE = 3, 4
LAYOUTS = {
    "bert": processors.TemplateProcessing(
        single="<s> $A </s>", pair="<s> $A </s> $B:1 </s>:1", special_tokens=[("<s>", 1), ("</s>", 2)]
    ),
    "roberta": processors.RobertaProcessing(("</s>", 2), ("<s>", 1)),
    "xlnet": processors.TemplateProcessing(single="$A </s> <s>:2", special_tokens=[("<s>", 1), ("</s>", 2)]),
    "gpt": None,
}


def make_tokenizer(layout: str = "bert", **options: Any) -> PreTrainedTokenizerFast:
    """A tokenizer of whole words whose padding is nowhere 0."""
    vocabulary = SPECIAL | {word: len(SPECIAL) + at for at, word in enumerate(WORDS)}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    if LAYOUTS[layout] is not None:
        backend.post_processor = LAYOUTS[layout]
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token="<pad>",
        unk_token="<unk>",
        cls_token="<s>",
        sep_token="</s>",
        model_input_names=["input_ids", "token_type_ids", "attention_mask"],
        **options,
    )
    tokenizer._pad_token_type_id = PAD_TYPE  # as transformers' own XLNetTokenizer sets it
    return tokenizer


TOKENIZERS = {side: make_tokenizer(padding_side=side) for side in ("right", "left")}
quick = settings(max_examples=50, deadline=None)
sides = st.sampled_from(["right", "left"])
texts = st.lists(st.sampled_from([*WORDS, "<pad>", "unseen"]), max_size=10).map(" ".join)


def text_of(length: int) -> str:
    """A text that becomes ``length`` tokens, special tokens included."""
    return " ".join(WORDS[at % len(WORDS)] for at in range(length - 2))


def encode(*lengths: int, side: str = "right") -> list[dict[str, Any]]:
    return [dict(TOKENIZERS[side](text_of(length))) for length in lengths]


# The collator: properties.


@quick
@given(st.lists(texts, min_size=1, max_size=5), sides, st.sampled_from(["list", "numpy", "torch", "encoding"]))
def test_real_tokens_stay_and_every_other_cell_is_padding(batch_texts: list[str], side: str, kind: str) -> None:
    tokenizer = TOKENIZERS[side]
    plain = [dict(tokenizer(text, return_special_tokens_mask=True)) for text in batch_texts]
    as_kind = {"list": dict, "encoding": BatchEncoding, "numpy": _as_numpy, "torch": _as_torch}[kind]
    batch = DataCollatorWithBucketing(tokenizer, [4, 8, 12], return_tensors="np")([as_kind(row) for row in plain])
    pads = {"input_ids": PAD, "token_type_ids": PAD_TYPE, "attention_mask": 0, "special_tokens_mask": 1}
    assert batch.keys() == pads.keys()
    longest = max(len(row["input_ids"]) for row in plain)
    for key, pad in pads.items():
        assert batch[key].shape == (len(plain), next(size for size in (4, 8, 12) if size >= longest))
        for row, cells in zip(plain, batch[key].tolist(), strict=True):
            filler = [pad] * (len(cells) - len(row[key]))
            assert cells == (row[key] + filler if side == "right" else filler + row[key])


def _as_numpy(row: dict[str, list[int]]) -> dict[str, Any]:
    return {key: np.asarray(value) for key, value in row.items()}


def _as_torch(row: dict[str, list[int]]) -> dict[str, Any]:
    return {key: torch.tensor(value) for key, value in row.items()}


@quick
@given(st.lists(texts, min_size=1, max_size=5), sides)
def test_padding_that_a_row_brings_along_changes_nothing(batch_texts: list[str], side: str) -> None:
    collator = DataCollatorWithBucketing(TOKENIZERS[side], [4, 8, 12], return_tensors="np")
    bare = collator([dict(TOKENIZERS[side](text)) for text in batch_texts])
    for padded_on in ("right", "left"):
        padded = [TOKENIZERS[padded_on](text, padding="max_length", max_length=40) for text in batch_texts]
        again = collator(padded)
        assert {key: value.tolist() for key, value in again.items()} == {k: v.tolist() for k, v in bare.items()}


# The collator: transformers as the oracle.


@quick
@given(st.lists(texts, min_size=1, max_size=5), sides, st.sampled_from(["label", "label_ids", "labels"]))
def test_a_batch_is_transformers_batch_with_more_padding(batch_texts: list[str], side: str, name: str) -> None:
    features = [dict(TOKENIZERS[side](text)) | {name: at} for at, text in enumerate(batch_texts)]
    expected = DataCollatorWithPadding(TOKENIZERS[side])(copy.deepcopy(features))
    batch = DataCollatorWithBucketing(TOKENIZERS[side], [6, 12])(features)
    assert isinstance(batch, BatchEncoding)
    assert batch.keys() == expected.keys()
    longest = expected["input_ids"].shape[1]
    for key, value in expected.items():
        got = (
            batch[key] if key == "labels" else batch[key][:, :longest] if side == "right" else batch[key][:, -longest:]
        )
        torch.testing.assert_close(got, value)


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("layout", list(LAYOUTS))
@pytest.mark.filterwarnings("ignore:input 0 has:hf_bucket.errors.BucketWarning")
def test_a_truncated_row_is_what_the_tokenizer_would_have_truncated(layout: str, side: str) -> None:
    tokenizer = make_tokenizer(layout, truncation_side=side)
    collator = DataCollatorWithBucketing(tokenizer, [4, 6], overflow="truncate", return_tensors="np")
    for words in range(1, 12):
        text = " ".join(WORDS[:words])
        [ids] = collator([tokenizer(text)])["input_ids"].tolist()
        expected = tokenizer(text, truncation=True, max_length=6)["input_ids"]
        assert ids[: len(expected)] == expected
        assert set(ids[len(expected) :]) <= {PAD}


# The collator: overflow.


def test_a_row_longer_than_every_bucket_is_named_in_the_error() -> None:
    collator = DataCollatorWithBucketing(TOKENIZERS["right"], [4, 8])
    with pytest.raises(TooLongError, match=r"input 2 has 9 tokens but the largest bucket holds 8"):
        collator(encode(4, 8, 9))


def test_every_per_token_key_of_a_truncated_row_is_cut_at_the_same_tokens() -> None:
    tokenizer = TOKENIZERS["right"]
    collator = DataCollatorWithBucketing(tokenizer, 6, overflow="truncate", return_tensors="np")
    row = tokenizer(text_of(5), text_of(6), return_special_tokens_mask=True)  # 10 tokens: <s> 3 </s> 4 </s>
    with pytest.warns(BucketWarning, match=r"input 0 has 10 tokens and was cut to 6"):
        batch = collator([row | {"labels": [1] * 10}])
    for key in ("input_ids", "token_type_ids", "special_tokens_mask", "attention_mask"):
        assert batch[key].tolist() == [row[key][:5] + row[key][-1:]]
    assert batch["labels"].shape == (1, 10)


def test_truncated_rows_are_counted_and_warned_about_once() -> None:
    collator = DataCollatorWithBucketing(TOKENIZERS["right"], 6, overflow="truncate")
    with pytest.warns(BucketWarning, match=r"input 1 has 7 tokens and was cut to 6") as caught:
        collator(encode(6, 7, 9))
    collator(encode(8))
    assert collator.truncated == 3
    assert [warning.filename for warning in caught] == [__file__]


def test_padding_of_the_caller_is_not_counted_as_length_when_truncating() -> None:
    collator = DataCollatorWithBucketing(TOKENIZERS["right"], 6, overflow="truncate")
    batch = collator([TOKENIZERS["right"](text_of(6), padding="max_length", max_length=30)])
    assert collator.truncated == 0
    assert batch["input_ids"][0, -1] == SPECIAL["</s>"]


def test_a_bucket_of_special_tokens_only_cannot_truncate() -> None:
    with pytest.raises(LadderError, match=r"holds 2 tokens, but this tokenizer adds 2 .* length > 2"):
        DataCollatorWithBucketing(TOKENIZERS["right"], 2, overflow="truncate")
    assert DataCollatorWithBucketing(TOKENIZERS["right"], 3, overflow="truncate").ladder.max_length == 3


# The collator: labels and other keys.

LABELS = {
    "int": (1, torch.int64),
    "float": (0.5, torch.float32),
    "numpy float64": (np.float64(0.5), torch.float32),
    "numpy int8": (np.int8(1), torch.int64),
    "tensor": (torch.tensor(1), torch.int64),
    "bool": (True, torch.bool),
    "multi-label of ints": ([0, 1, 1], torch.int64),
    "multi-label of floats": ([0.0, 1.0], torch.float32),
    "as many labels as tokens": ([0.0, 1.0, 1.0, 0.0], torch.float32),
    "as many labels as the bucket has cells": ([1.0] * 8, torch.float32),
}


@pytest.mark.parametrize(("label", "dtype"), LABELS.values(), ids=LABELS.keys())
@pytest.mark.parametrize("name", ["label", "label_ids", "labels"])
def test_labels_are_stacked_and_never_padded(name: str, label: object, dtype: torch.dtype) -> None:
    features = [row | {name: label} for row in encode(4, 4)]
    labels = DataCollatorWithBucketing(TOKENIZERS["right"], 8)(features)["labels"]
    assert labels.dtype == dtype
    assert labels.tolist() == [torch.as_tensor(label).tolist()] * 2


def test_whole_and_fractional_labels_in_one_batch_become_float32() -> None:
    features = [row | {"label": label} for row, label in zip(encode(4, 4), [1, 0.5], strict=True)]
    assert DataCollatorWithBucketing(TOKENIZERS["right"], 8)(features)["labels"].dtype == torch.float32


def test_a_missing_attention_mask_covers_the_real_tokens_even_where_one_is_the_pad_token() -> None:
    collator = DataCollatorWithBucketing(TOKENIZERS["right"], 6, return_tensors="np")
    batch = collator([{"input_ids": [1, PAD, PAD]}, {"input_ids": [1, 5, 6, 2]}])
    assert batch["attention_mask"].tolist() == [[1, 1, 1, 0, 0, 0], [1, 1, 1, 1, 0, 0]]


def test_what_the_caller_passed_is_left_alone() -> None:
    features = [_as_numpy(row) | {"label": np.int64(1)} for row in encode(5, 9)]
    before = copy.deepcopy(features)
    tokenizer = make_tokenizer()
    backend_before = tokenizer.backend_tokenizer.to_str()
    batch = DataCollatorWithBucketing(tokenizer, [12], overflow="truncate")(features)
    batch["input_ids"].fill_(-1)
    assert [row.keys() for row in features] == [row.keys() for row in before]
    assert all(np.array_equal(row[key], old[key]) for row, old in zip(features, before, strict=True) for key in row)
    assert tokenizer.backend_tokenizer.to_str() == backend_before


def test_a_pickled_collator_gives_the_same_batch() -> None:
    collator = DataCollatorWithBucketing(TOKENIZERS["left"], [(2, 4), (8, 8)], overflow="truncate")
    again = pickle.loads(pickle.dumps(collator))(encode(5, 3))
    for key, value in collator(encode(5, 3)).items():
        torch.testing.assert_close(again[key], value)


def test_numpy_batches_need_neither_torch_nor_transformers() -> None:
    script = """
import sys, types
from hf_bucket.collator import BucketBatchSampler, DataCollatorWithBucketing
tokenizer = types.SimpleNamespace(pad_token_id=3, pad_token_type_id=0, padding_side="right")
batch = DataCollatorWithBucketing(tokenizer, 4, return_tensors="np")([{"input_ids": [7, 8]}])
assert batch["input_ids"].tolist() == [[7, 8, 3, 3]], batch
assert list(BucketBatchSampler([2, 1], 4)) == [[0, 1]]
print(sorted({"torch", "transformers"} & set(sys.modules)))
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"


# The collator: what it refuses.

GOOD = {"input_ids": [1, 5, 2], "attention_mask": [1, 1, 1]}
BAD_FEATURES = {
    "no rows": ([], InputError, r"features is empty"),
    "a batch instead of rows": (BatchEncoding({"input_ids": [[1, 2]]}), InputTypeError, r"one per row, not one per b"),
    "a text": ([GOOD, "text"], InputTypeError, r"input 1 is a str, expected a mapping"),
    "no input_ids": ([GOOD, {"text": "a"}], InputError, r"input 1 has no input_ids, only \['text'\]"),
    "no tokens": ([GOOD, {"input_ids": []}], InputError, r"input 1 has no tokens"),
    "only padding": ([{"input_ids": [PAD], "attention_mask": [0]}], InputError, r"input 0 has 1 tokens and all .* pad"),
    "two axes": ([{"input_ids": [[1, 2]]}], InputError, r"input_ids of input 0 has shape \(1, 2\), expected \(2,\)"),
    "ragged": ([{"input_ids": [[1], [1, 2]]}], InputError, r"input_ids of input 0 is no array"),
    "mask too short": (
        [GOOD | {"attention_mask": [1]}],
        InputError,
        r"attention_mask of input 0 has shape \(1,\), exp",
    ),
    "fractions": ([{"input_ids": [1.5]}], InputTypeError, r"input_ids of input 0 holds fractions"),
    "strings": ([GOOD | {"text": "a"}], InputTypeError, r"text of input 0 holds str 'a', expected numbers"),
    "None": ([GOOD | {"label": None}], InputTypeError, r"label of input 0 holds NoneType None"),
    "another key": ([GOOD, GOOD | {"idx": 1}], InputError, r"input 1 has the keys .*'idx'.*, but input 0"),
    "two labels": ([GOOD | {"label": 1, "labels": 1}], InputError, r"input 0 has labels under label and labels"),
    "ragged labels": ([GOOD | {"x": [1]}, GOOD | {"x": [1, 2]}], InputError, r"x of input 1 has shape \(2,\), but inp"),
}


@pytest.mark.parametrize(("features", "error", "message"), BAD_FEATURES.values(), ids=BAD_FEATURES.keys())
def test_a_bad_row_is_refused_by_its_number(features: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        DataCollatorWithBucketing(TOKENIZERS["right"], 8)(features)


def test_a_tokenizer_without_a_pad_token_is_refused() -> None:
    tokenizer = make_tokenizer()
    tokenizer.pad_token = None
    with pytest.raises(ModelError, match=r"no pad_token_id, so rows cannot be padded; set tokenizer\.pad_token"):
        DataCollatorWithBucketing(tokenizer, 8)


def test_truncating_needs_a_fast_tokenizer() -> None:
    slow = SimpleNamespace(pad_token_id=3, pad_token_type_id=0, padding_side="right", truncation_side="right")
    with pytest.raises(ModelError, match=r'overflow="truncate" needs a fast tokenizer, got SimpleNamespace'):
        DataCollatorWithBucketing(slow, 8, overflow="truncate")


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ({"overflow": "cut"}, r"overflow must be 'error' or 'truncate', got 'cut'"),
        ({"return_tensors": "tf"}, r"return_tensors must be 'pt' or 'np', got 'tf'"),
    ],
    ids=["overflow", "return_tensors"],
)
def test_an_unknown_option_is_refused(argument: dict[str, str], message: str) -> None:
    with pytest.raises(InputError, match=message):
        DataCollatorWithBucketing(TOKENIZERS["right"], 8, **argument)


# The sampler: properties.

LENGTHS = (4, 9, 16)
row_lengths = st.lists(st.integers(1, 16), max_size=60)
counts = st.integers(1, 5)
flags = st.booleans()


def deal(lengths: Sequence[int], ranks: int, epoch: int = 0, **options: Any) -> list[list[list[int]]]:
    """Every rank's batches; their number is checked on the way."""
    samplers = [BucketBatchSampler(lengths, LENGTHS, num_replicas=ranks, rank=rank, **options) for rank in range(ranks)]
    for sampler in samplers:
        sampler.set_epoch(epoch)
    dealt = [list(sampler) for sampler in samplers]
    assert [len(sampler) for sampler in samplers] == [len(batches) for batches in dealt]
    return dealt


def bucket_of(length: int) -> int:
    return next(size for size in LENGTHS if size >= length)


def cells_of(lengths: Sequence[int], batches: list[list[int]]) -> list[int]:
    return [len(batch) * bucket_of(lengths[batch[0]]) for batch in batches]


def flat(dealt: list[list[list[int]]]) -> Iterator[list[int]]:
    return (batch for batches in dealt for batch in batches)


@quick
@given(row_lengths, counts, counts, flags, st.integers(0, 3))
def test_every_row_comes_once_over_all_ranks(
    lengths: list[int], size: int, ranks: int, shuffle: bool, epoch: int
) -> None:
    dealt = deal(lengths, ranks, epoch, batch_size=size, shuffle=shuffle, seed=7)
    assert Counter(row for batch in flat(dealt) for row in batch) == Counter(range(len(lengths)))
    per_rank = [len(batches) for batches in dealt]
    assert max(per_rank) - min(per_rank) <= 1


@quick
@given(row_lengths, counts, counts, flags, flags)
def test_the_rows_of_a_batch_share_their_bucket(
    lengths: list[int], size: int, ranks: int, shuffle: bool, drop_last: bool
) -> None:
    for batch in flat(deal(lengths, ranks, batch_size=size, shuffle=shuffle, drop_last=drop_last)):
        assert 1 <= len(batch) <= size
        assert len({bucket_of(lengths[row]) for row in batch}) == 1


@quick
@given(row_lengths, counts, counts, flags, st.integers(0, 3))
def test_drop_last_leaves_full_batches_evenly_and_says_what_it_dropped(
    lengths: list[int], size: int, ranks: int, shuffle: bool, epoch: int
) -> None:
    dealt = deal(lengths, ranks, epoch, batch_size=size, shuffle=shuffle, drop_last=True)
    rows = Counter(row for batch in flat(dealt) for row in batch)
    assert all(count == 1 for count in rows.values())
    assert {len(batch) for batch in flat(dealt)} <= {size}
    assert len({len(batches) for batches in dealt}) == 1
    sampler = BucketBatchSampler(
        lengths, LENGTHS, batch_size=size, shuffle=shuffle, drop_last=True, num_replicas=ranks, rank=ranks - 1
    )
    sampler.set_epoch(epoch)
    assert sampler.dropped == len(lengths) - len(rows)
    full = sum(count // size for count in Counter(map(bucket_of, lengths)).values())
    assert len(rows) == size * (full - full % ranks)  # no more is dropped than that


@quick
@given(row_lengths, counts, counts, flags)
@example([1, 1, 1, 1, 5, 5, 1, 5], 1, 3, False)  # what is left over must not land on the fuller ranks
def test_ranks_compute_about_the_same_number_of_cells(lengths: list[int], size: int, ranks: int, shuffle: bool) -> None:
    cells = [cells_of(lengths, batches) for batches in deal(lengths, ranks, batch_size=size, shuffle=shuffle)]
    totals = [sum(rank) for rank in cells]
    assert max(totals) - min(totals) <= max((count for rank in cells for count in rank), default=0)


@quick
@given(row_lengths, counts, st.integers(1, 3))
def test_shuffled_ranks_compute_about_the_same_at_each_step(lengths: list[int], size: int, ranks: int) -> None:
    cells = [cells_of(lengths, batches) for batches in deal(lengths, ranks, batch_size=size, shuffle=True)]
    # The steps that all ranks take do not overlap: swapping batches between two of them could not make both more even.
    spans = sorted((min(step), max(step)) for step in zip(*cells, strict=False))
    assert all(high <= low for (_, high), (low, _) in itertools.pairwise(spans))


@quick
@given(row_lengths, counts, st.integers(0, 5))
def test_an_epoch_is_decided_by_seed_and_epoch_alone(lengths: list[int], size: int, epoch: int) -> None:
    first, again = (deal(lengths, 2, epoch, batch_size=size, shuffle=True, seed=3) for _ in range(2))
    assert first == again


@quick
@given(row_lengths, counts, counts)
def test_unshuffled_batches_come_in_the_order_of_their_first_row(lengths: list[int], size: int, ranks: int) -> None:
    for batches in deal(lengths, ranks, batch_size=size):
        assert [batch[0] for batch in batches] == sorted(batch[0] for batch in batches)
        assert all(batch == sorted(batch) for batch in batches)


# The sampler: examples.


def test_shuffling_moves_rows_between_batches_and_batches_between_places() -> None:
    lengths = [3, 9] * 40
    sampler = BucketBatchSampler(lengths, LENGTHS, batch_size=8, shuffle=True, seed=1)
    first = list(sampler)
    sampler.set_epoch(1)
    second = list(sampler)
    assert {frozenset(batch) for batch in first} != {frozenset(batch) for batch in second}
    assert [lengths[batch[0]] for batch in first] != [lengths[batch[0]] for batch in second]
    assert first != list(BucketBatchSampler(lengths, LENGTHS, batch_size=8, shuffle=True, seed=2))
    sampler.set_epoch(0)
    assert list(sampler) == first


def test_shuffling_drops_other_rows_in_every_epoch() -> None:
    rows = [
        frozenset(
            row for batch in flat(deal([3] * 11, 1, epoch, batch_size=5, shuffle=True, drop_last=True)) for row in batch
        )
        for epoch in range(8)
    ]
    assert frozenset.intersection(*rows) < frozenset.union(*rows) == frozenset(range(11))


def test_no_bucket_is_always_the_one_that_ranks_drop_to_be_even() -> None:
    dealt = [deal([3, 9, 16], 2, epoch, batch_size=1, shuffle=True, drop_last=True) for epoch in range(12)]
    dropped = [{0, 1, 2} - {row for batch in flat(epoch) for row in batch} for epoch in dealt]
    assert set.union(*dropped) == {0, 1, 2}


def test_without_a_batch_size_each_length_has_the_largest_of_the_ladder() -> None:
    ladder = make_ladder([(1, 8), (3, 8), (2, 16)])
    batches = list(BucketBatchSampler([8, 16, 1, 16, 5, 16, 2], ladder))
    assert batches == [[0, 2, 4], [1, 3], [5], [6]]


@pytest.mark.parametrize(
    "kind", [list, tuple, np.array, torch.tensor, iter], ids=["list", "tuple", "numpy", "torch", "iter"]
)
def test_lengths_may_be_any_sequence_of_whole_numbers(kind: Any) -> None:
    assert list(BucketBatchSampler(kind([4, 5, 16]), LENGTHS)) == [[0], [1], [2]]


def test_lengths_may_be_a_datasets_column() -> None:
    datasets = pytest.importorskip("datasets")
    column = datasets.Dataset.from_dict({"tokens": [4, 5, 3]})["tokens"]
    assert list(BucketBatchSampler(column, LENGTHS)) == [[0, 2], [1]]


def test_no_rows_make_no_batches() -> None:
    sampler = BucketBatchSampler([], LENGTHS, shuffle=True)
    assert (list(sampler), len(sampler), sampler.dropped) == ([], 0, 0)


def test_a_row_longer_than_every_bucket_is_named_or_put_in_the_largest() -> None:
    with pytest.raises(TooLongError, match=r"input 1 has 17 tokens but the largest bucket holds 16"):
        BucketBatchSampler([3, 17, 18], LENGTHS)
    assert list(BucketBatchSampler([3, 17, 16], LENGTHS, overflow="truncate")) == [[0], [1, 2]]


BAD_SAMPLERS = {
    "batch size": ({"batch_size": 0}, r"batch_size must be a whole number of at least 1, got 0"),
    "fractional batch size": ({"batch_size": 1.5}, r"batch_size must be a whole number of at least 1, got 1\.5"),
    "bool": ({"num_replicas": True}, r"num_replicas must be a whole number of at least 1, got True"),
    "rank": ({"num_replicas": 2, "rank": 2}, r"rank must be less than num_replicas=2, got 2"),
    "seed": ({"seed": -1}, r"seed must be a whole number of at least 0, got -1"),
    "overflow": ({"overflow": "cut"}, r"overflow must be 'error' or 'truncate', got 'cut'"),
    "zero length": ({"lengths": [3, 0]}, r"input 1 has length 0, expected at least 1 token"),
    "fractional lengths": (
        {"lengths": [3.0]},
        r"lengths has shape \(1,\) of float64, expected one whole number per row",
    ),
    "two axes": ({"lengths": [[3]]}, r"lengths has shape \(1, 1\) of int64"),
    "texts": ({"lengths": ["a"]}, r"lengths has shape \(1,\) of <U1"),
}


@pytest.mark.parametrize(("argument", "message"), BAD_SAMPLERS.values(), ids=BAD_SAMPLERS.keys())
def test_a_bad_number_is_refused(argument: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        BucketBatchSampler(**{"lengths": [3], "buckets": LENGTHS} | argument)


def test_a_negative_epoch_is_refused() -> None:
    with pytest.raises(InputError, match=r"epoch must be a whole number of at least 0, got -1"):
        BucketBatchSampler([3], LENGTHS).set_epoch(-1)


# Together.


@pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork:DeprecationWarning")
@pytest.mark.filterwarnings("ignore:This DataLoader will create:UserWarning")
def test_a_loader_with_workers_gives_every_row_at_a_bucket_shape() -> None:
    lengths = [4, 13, 7, 16, 3, 9, 8, 15, 5, 12]
    features = [row | {"label": at} for at, row in enumerate(encode(*lengths))]
    sampler = BucketBatchSampler(lengths, LENGTHS, batch_size=2, shuffle=True)
    collator = DataCollatorWithBucketing(TOKENIZERS["right"], LENGTHS)
    loader = DataLoader(features, batch_sampler=sampler, collate_fn=collator, num_workers=2)
    seen: dict[int, list[int]] = {}
    for batch in loader:
        assert batch["input_ids"].shape[1] in LENGTHS
        for label, ids, mask in zip(batch["labels"], batch["input_ids"], batch["attention_mask"], strict=True):
            assert bucket_of(lengths[label]) == len(ids)
            seen[int(label)] = ids[mask.bool()].tolist()
    assert len(loader) == len(sampler)
    assert seen == {at: row["input_ids"] for at, row in enumerate(features)}


def test_the_trainer_takes_the_collator(tmp_path: Any) -> None:
    pytest.importorskip("accelerate")
    from transformers import BertConfig, BertForSequenceClassification, Trainer, TrainingArguments

    config = BertConfig(
        vocab_size=24, hidden_size=8, num_hidden_layers=1, num_attention_heads=1, intermediate_size=8, type_vocab_size=5
    )
    features = [row | {"label": at % 2} for at, row in enumerate(encode(4, 9, 16, 3))]
    trainer = Trainer(
        BertForSequenceClassification(config),
        TrainingArguments(str(tmp_path), report_to=[], use_cpu=True, disable_tqdm=True, dataloader_pin_memory=False),
        data_collator=DataCollatorWithBucketing(TOKENIZERS["right"], LENGTHS),
    )
    assert trainer.predict(features).label_ids.tolist() == [0, 1, 0, 1]
