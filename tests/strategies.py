"""What properties of several modules are tried on: texts of every kind, requests, ladders, batches and manifests."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator
from typing import Any

import numpy as np
from hypothesis import strategies as st

from hf_bucket.batch import Features
from hf_bucket.ladder import Ladder, make_ladder
from hf_bucket.tasks import InputSpec, OutputSpec, Signature

# texts

_BLANKS = " \t\n\r\x0b\x0c\x1c\x85\xa0\u1680\u2003\u2028\u2029\u3000"
_INVISIBLE = "\u00ad\u200b\u200c\u200d\u2060\ufe0f\ufeff\ufffc\ufffd\uffff\U000e0001"
_RIGHT_TO_LEFT = "אבגשלוםمرحباكيف؟٣\u064b\u0651\u200e\u200f\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2069\ufdfa 1a"
_MARKS = "ae\u0300\u0301\u0308\u0323\u0345\u034f\u20dd\u0489\u1ab0"
_EMOJI = [
    "😀",
    "👍🏽",
    "👨‍👩‍👧‍👦",
    "🏴‍☠️",
    "🏳️‍🌈",
    "🇩🇪",
    "🇩",
    "1️⃣",
    "❤️",
    "\U0001f3f4\U000e0067\U000e0062\U000e0073\U000e0063\U000e0074\U000e007f",  # Scotland, spelled in tags
    "\u200d",
    "\ufe0f",
    "🏽",
]
_SPECIAL = ["[CLS]", "[SEP]", "[PAD]", "[UNK]", "[MASK]", "##s", "<s>", "</s>", "[cls]"]
_WORDS = ["a", "film", "Dull,", "endless", "DELIGHT", "w1", "w89", "it's", "naïve", "電影", "x" * 120, "1e9", "..."]


def _joined(parts: st.SearchStrategy[str], *, by: str = "", most: int = 12) -> st.SearchStrategy[str]:
    return st.lists(parts, max_size=most).map(by.join)


KINDS: dict[str, st.SearchStrategy[str]] = {
    "empty": st.just(""),
    "blanks": st.text(_BLANKS, min_size=1, max_size=20),
    "invisible": st.text(_INVISIBLE, min_size=1, max_size=20),
    "controls": st.text(st.characters(categories=["Cc"]), min_size=1, max_size=20),
    "right to left": st.text(_RIGHT_TO_LEFT, min_size=1, max_size=20),
    "emoji": _joined(st.sampled_from(_EMOJI)),
    "marks": st.text(_MARKS, max_size=30),
    "special tokens": _joined(st.sampled_from(_SPECIAL), by=" "),
    "words": _joined(st.sampled_from(_WORDS), by=" ", most=40),
    "anything": st.text(st.characters(exclude_categories=["Cs"]), max_size=30),
}
unicode_texts = st.one_of(*KINDS.values()) | st.lists(st.one_of(*KINDS.values()), max_size=4).map("".join)
surrogate_texts = st.builds("{}{}{}".format, unicode_texts, st.characters(categories=["Cs"]), unicode_texts)

MILLION = 1_000_000
LONG_UNITS = {
    "blanks": " ",
    "one word": "a",
    "words": "good film ",
    "controls": "\x00\x1b",
    "right to left": "שלום ",
    "emoji": "👨‍👩‍👧‍👦",
    "marks": "a\u0301\u0323",
    "special tokens": "[SEP]",
}


def million_characters(kind: str) -> str:
    """A text of a million characters of one of ``LONG_UNITS``."""
    unit = LONG_UNITS[kind]
    return (unit * (MILLION // len(unit) + 1))[:MILLION]


# requests


def requests(texts: st.SearchStrategy[str], *, most: int = 8) -> st.SearchStrategy[list[object]]:
    """Lists of what a door takes: texts, pairs, and dicts of both."""
    entries = (
        texts
        | st.tuples(texts, texts)
        | st.fixed_dictionaries({"text": texts})
        | st.fixed_dictionaries({"text": texts, "text_pair": texts | st.none()})
    )
    return st.lists(entries, max_size=most)


# ladders

_junk = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-3, 40)
    | st.integers()
    | st.floats()
    | st.text(max_size=4)
    | st.binary(max_size=4)
    | st.integers(-3, 40).map(np.int32)
    | st.lists(st.integers(-3, 40), max_size=4).map(np.array),
    lambda inner: st.lists(inner, max_size=4) | st.tuples(inner, inner) | st.dictionaries(st.text(max_size=2), inner),
    max_leaves=8,
)
anything_for_buckets = _junk | st.lists(st.integers(-1, 40), max_size=5) | st.sampled_from(["auto", "pow2"])
anything_for_batch_sizes = st.none() | st.lists(st.integers(-1, 9), max_size=4) | _junk


def ladders(*, shortest: int = 1, longest: int = 64) -> st.SearchStrategy[Ladder]:
    """Ladders of up to eight buckets, whose lengths need not share their batch sizes."""
    pairs = st.tuples(st.integers(1, 6), st.integers(shortest, longest))
    return st.lists(pairs, min_size=1, max_size=8, unique=True).map(make_ladder)


# batches

_INPUTS = tuple(
    InputSpec(name=name, dtype=dtype, axes=("row", "token"), pad_id=pad_id)
    for name, dtype, pad_id in [
        ("input_ids", "int64", 3),
        ("attention_mask", "int64", 0),
        ("token_type_ids", "int32", 9),
    ]
)
_ECHO = tuple(OutputSpec(name=spec.name, dtype=spec.dtype, axes=spec.axes) for spec in _INPUTS)


@st.composite
def batches(draw: st.DrawFn) -> tuple[Features, Ladder, Signature]:
    """A request as tokens, a ladder that holds it, and a signature whose outputs are its inputs.

    Every number of a request is another one, so that a token in the wrong place shows.
    """
    ladder = draw(ladders(longest=24))
    lengths = tuple(draw(st.lists(st.integers(1, ladder.max_length), max_size=20)))
    ids = [[1000 * row + place + 10 for place in range(length)] for row, length in enumerate(lengths)]
    columns = {"input_ids": ids, "attention_mask": [[1] * n for n in lengths], "token_type_ids": ids}
    side = draw(st.sampled_from(["left", "right"]))
    return (
        Features(lengths=lengths, columns=columns),
        ladder,
        Signature(inputs=_INPUTS, outputs=_ECHO, padding_side=side),
    )


@st.composite
def arrays(draw: st.DrawFn) -> dict[str, Any]:
    """Arguments of a model's ``forward``: arrays that fit each other, and arrays that fit nothing."""
    rows, length = draw(st.integers(0, 4)), draw(st.integers(0, 20))
    dtypes = st.sampled_from(["int64"] * 6 + ["int32", "uint8", "bool", "float32", "uint64", "object", "U2"])

    def array(low: int, high: int) -> Any:
        other = st.tuples(st.integers(0, 4), st.integers(0, 20)) | st.lists(st.integers(0, 3), max_size=3).map(tuple)
        shape = draw(other) if draw(st.integers(0, 4)) == 0 else (rows, length)
        numbers = st.lists(st.integers(low, high), min_size=int(np.prod(shape)), max_size=int(np.prod(shape)))
        dtype = draw(dtypes)
        return np.array(draw(numbers)).astype("int64" if dtype == "uint64" else dtype).reshape(shape).astype(dtype)

    low, high = draw(st.sampled_from([(4, 93), (4, 93), (-2, 120)]))
    given = {"input_ids": array(low, high)}
    for name in ("attention_mask", "token_type_ids"):
        if draw(st.booleans()):
            given[name] = array(0, 1)
    return given


# manifests

_names = st.text(max_size=4) | st.sampled_from(["task", "ladder", "extent", "axes", "inputs", "files", "pad_id", ".."])
json_values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-2, 70)
    | st.integers()
    | st.just(10**400)
    | st.floats()
    | st.text(max_size=4)
    | st.sampled_from(["row", "token", "label", "int64", "left", "../x", "\ud800", "input_ids"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(_names, inner, max_size=3),
    max_leaves=5,
)


def _places(value: Any) -> Iterator[tuple[Any, Any]]:
    """Every holder inside a JSON value with each of its keys."""
    for key in list(value if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else ()):
        yield value, key
        yield from _places(value[key])


@st.composite
def _edited(draw: st.DrawFn, written: str) -> str:
    """A manifest after one edit, two or four: values replaced, dropped, or copied from elsewhere in it."""
    data = json.loads(written)
    if draw(st.integers(0, 3)):  # a digest that no longer fits would stop every edit at the same place
        data.pop("sha256", None)
    for _ in range(draw(st.sampled_from([1, 1, 1, 2, 4]))):
        places = [(data, key) for key in data] * draw(st.integers(0, 1)) or list(_places(data))
        holder, key = draw(st.sampled_from(places or [(data, "task")]))
        edit = draw(st.sampled_from(["replace", "replace", "drop", "copy", "rename"]))
        if edit == "drop":
            del holder[key]
        elif edit == "rename" and isinstance(holder, dict):
            holder[draw(_names)] = holder.pop(key)
        elif edit == "copy":
            source, place = draw(st.sampled_from(list(_places(data))))
            holder[key] = copy.deepcopy(source[place])
        else:
            holder[key] = draw(json_values)
    return json.dumps(data)


def manifest_texts(written: str) -> st.SearchStrategy[str]:
    """Texts for ``bucket_config.json``: ``written`` after edits or cut, any JSON, any text."""
    cut = st.integers(0, len(written)).map(lambda end: written[:end])
    return _edited(written) | _edited(written) | json_values.map(json.dumps) | st.text(max_size=40) | cut
