"""Fuzzes texts to results: tokenise, route, pad, run, unpad.

The sessions are fakes whose logits are sums of token ids, the tokenizer is the bundled model's. Any request gets the
sums that the tokenizers library alone gives, in its order, or the error that it deserves.
"""

from __future__ import annotations

import tempfile
import warnings
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import atheris
from drive import ROOT, drive

with atheris.instrument_imports(include=["hf_bucket"]):
    from hf_bucket.errors import InputError, InputTypeError, TooLongError
    from hf_bucket.ladder import make_ladder
    from hf_bucket.runner import Runner, RunOptions
    from hf_bucket.session import FakeSession

import numpy as np
from conftest import fake_artifact, fake_engine
from tokenizers import Tokenizer

LADDERS = ([(1, 1)], [(2, 3)], [(1, 4), (3, 9)], [(1, 16), (4, 16), (2, 64)], [(8, 8), (1, 32)], [(5, 512)])
POLICIES = ("error", "truncate", "dynamic", "window")
# No texts, and therefore refused.
STRANGERS = (
    None,
    3.5,
    b"ab",
    [],
    ["a", "b"],
    ("a",),
    ("a", 1),
    {},
    {"text": None},
    {"text": "a", "x": "b"},
)
TOKENIZER_JSON = (ROOT / "hf_bucket" / "default" / "tokenizer.json").read_text(encoding="utf-8")
TOKENIZER = Tokenizer.from_str(TOKENIZER_JSON)
FOLDER = tempfile.TemporaryDirectory(prefix="fuzz-path-")


def _exact(artifact: object, options: object, sessions: object) -> Callable[..., FakeSession]:
    return FakeSession


@cache
def runner_of(number: int, policy: str) -> Runner:
    """The runner of one ladder and policy."""
    artifact = fake_artifact(Path(FOLDER.name) / str(number), make_ladder(LADDERS[number]), max_length=None)
    options = RunOptions(overflow=policy, warmup=False)
    return Runner(artifact, options, tokenizer_json=TOKENIZER_JSON, engine=fake_engine, dynamic=_exact)


def cut(parts: tuple[str, ...], largest: int) -> list[int]:
    """The ids of a text or pair, the last ordinary token of the longest text taken off until they are few enough.

    Not the library's own truncation: it keeps every combination of what it cut off two texts, in memory.
    """
    rows = [TOKENIZER.encode(part, add_special_tokens=False).ids for part in parts]
    special = TOKENIZER.encode(*("" for _ in parts)).ids
    longest = max(reversed(range(len(rows))), key=lambda number: len(rows[number]))
    while sum(map(len, rows)) + len(special) > largest:
        ties = [number for number, row in enumerate(rows) if len(row) == max(map(len, rows))]
        rows[ties[0] if len(ties) == 1 else 1 - longest].pop()
    return [*special, *(number for row in rows for number in row)]


def run(data: bytes) -> None:
    """Run one request and compare."""
    source = atheris.FuzzedDataProvider(data)
    number, policy = (
        source.ConsumeIntInRange(0, len(LADDERS) - 1),
        POLICIES[source.ConsumeIntInRange(0, len(POLICIES) - 1)],
    )
    request = [_entry(source) for _ in range(source.ConsumeIntInRange(0, 6))]
    runner = runner_of(number, policy)
    largest = runner.ladder.max_length
    before = _uncounted(runner.stats())
    error, expected = _expected(request, largest, policy)
    try:
        rows = runner(request)
    except (InputError, TooLongError) as got:
        long = policy == "window" and type(got) is TooLongError and any(len(ids) > largest for ids in expected)
        assert type(got) is error or (error is None and long), f"{got!r}, expected {error}"
        assert _uncounted(runner.stats()) == before
        return
    assert error is None, f"no {error}"
    assert len(rows) == len(expected)
    for row, ids in zip(rows, expected, strict=True):
        if policy == "window" and len(ids) > largest:
            assert 0 < row["logits"][1] <= largest
        else:
            assert row["logits"].tolist() == [float(np.float32(sum(ids))), len(ids)]
    if policy != "window":
        stats = runner.stats()
        assert stats["rows"] - before["rows"] == len(request)
        assert stats["real_tokens"] - before["real_tokens"] == sum(map(len, expected))


def _uncounted(stats: dict[str, Any]) -> dict[str, Any]:
    """Stats without what an error may count."""
    return {name: value for name, value in stats.items() if name != "refused"}


def _entry(source: Any) -> object:
    text = _text(source)
    makers: list[Callable[[], object]] = [
        lambda: text,
        lambda: text,
        lambda: (text, _text(source)),
        lambda: {"text": text},
        lambda: {"text": text, "text_pair": _text(source)},
        lambda: STRANGERS[source.ConsumeIntInRange(0, len(STRANGERS) - 1)],
    ]
    return makers[source.ConsumeIntInRange(0, len(makers) - 1)]()


def _text(source: Any) -> str:
    kind, size = source.ConsumeIntInRange(0, 3), source.ConsumeIntInRange(0, 40)
    if kind == 0:
        return str(source.ConsumeUnicode(size))
    return str(source.ConsumeUnicodeNoSurrogates(size)) * (source.ConsumeIntInRange(0, 60) if kind == 3 else 1)


def _expected(request: list[Any], largest: int, policy: str) -> tuple[type | None, list[list[int]]]:
    """The error that a request deserves, or the ids of every row, by the tokenizers library alone."""
    if any(entry is stranger for entry in request for stranger in STRANGERS):
        return InputTypeError, []
    texts = [_parts(entry) for entry in request]
    if any("\ud800" <= character <= "\udfff" for parts in texts for part in parts for character in part):
        return InputError, []
    rows = [TOKENIZER.encode(*parts).ids for parts in texts]
    for position, parts in enumerate(texts):
        if len(rows[position]) <= largest or policy in ("dynamic", "window"):
            continue
        if policy == "error" or TOKENIZER.num_special_tokens_to_add(len(parts) == 2) > largest:
            return TooLongError, []
        rows[position] = cut(parts, largest)
    return None, rows


def _parts(entry: Any) -> tuple[str, ...]:
    if isinstance(entry, dict):
        entry = (entry["text"], entry["text_pair"]) if "text_pair" in entry else entry["text"]
    return (entry,) if isinstance(entry, str) else tuple(entry)


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    seeds = {
        f"seed-{size}": bytes((size * 7 + place * 31) % 256 for place in range(size)) for size in (8, 64, 300, 900)
    }
    drive(run, seeds=seeds, words=["film", " ", "[SEP]", "\u200d", "\u05d0", "\U0001f600", "e\u0301"])
