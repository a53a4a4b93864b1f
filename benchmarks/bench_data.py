"""What the benchmark runs on: texts with their lengths, and the checkpoints' sizes."""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import cycle
from pathlib import Path
from typing import TypeAlias

from tokenizers import Tokenizer

Text: TypeAlias = str | tuple[str, str]

FLAT_LENGTH = 64  # tokens of every text of the flat control
CALIBRATION = 2000  # texts of the train split
PAD_TO = 128  # where every text is padded alike and none is longer


@dataclass(frozen=True, slots=True, kw_only=True)
class DataSet:
    """Texts to classify.

    Attributes:
        texts: as they are, not cut.
        calibration: texts of the train split.
    """

    name: str
    texts: tuple[Text, ...]
    calibration: tuple[Text, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Sizes:
    """A BERT-like model in numbers."""

    layers: int
    hidden: int
    intermediate: int
    labels: int

    @classmethod
    def of(cls, model: Path) -> Sizes:
        """Read them from a checkpoint's ``config.json``."""
        config = json.loads((model / "config.json").read_text(encoding="utf-8"))
        return cls(
            layers=config["num_hidden_layers"],
            hidden=config["hidden_size"],
            intermediate=config["intermediate_size"],
            labels=len(config.get("id2label") or (0, 1)),
        )

    def flops(self, lengths: Iterable[int]) -> int:
        """Return the floating-point operations that rows of these lengths need without any padding.

        Two per weight of a linear layer and token; ``4 * length * hidden`` per layer and token for the two products of
        attention; the pooler and the classifier once per row. Normalisation, softmax and activations are left out.
        """
        per_token = 2 * self.layers * (4 * self.hidden**2 + 2 * self.hidden * self.intermediate)
        per_row = 2 * (self.hidden**2 + self.hidden * self.labels)
        return sum(n * (per_token + 4 * self.layers * n * self.hidden) + per_row for n in lengths)


def open_tokenizer(model: Path) -> Tokenizer:
    """Return a checkpoint's tokenizer without the truncation and padding it was saved with."""
    tokenizer = Tokenizer.from_file(str(model / "tokenizer.json"))
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer


def lengths_of(tokenizer: Tokenizer, texts: Sequence[Text], *, max_length: int) -> list[int]:
    """Return the tokens of every text after truncation."""
    return [min(len(one.ids), max_length) for one in tokenizer.encode_batch(list(texts))]


def flat_texts(words: Sequence[str], n: int, *, length: int, tokenizer: Tokenizer) -> tuple[str, ...]:
    """Return ``n`` texts of exactly ``length`` tokens, cut from ``words`` in their order, again and again.

    A word that would make a text too long is left out.

    Raises:
        ValueError: the words cannot make a text that long: none, or a tokenizer that joins neighbouring words.
    """
    special = len(tokenizer.encode("").ids)
    sizes = [len(one.ids) - special for one in tokenizer.encode_batch(list(words))]
    supply = cycle([(word, size) for word, size in zip(words, sizes, strict=True) if size > 0])
    texts = []
    for _ in range(n):
        chosen = _fill(supply, length - special, limit=length * len(words))
        text = " ".join(chosen)
        if len(tokenizer.encode(text).ids) != length:
            raise ValueError(f"{len(chosen)} words made {len(tokenizer.encode(text).ids)} tokens, expected {length}")
        texts.append(text)
    return tuple(texts)


def _fill(supply: Iterator[tuple[str, int]], room: int, *, limit: int) -> list[str]:
    """Return words of ``room`` tokens together, or of fewer after ``limit`` tries."""
    chosen = []
    for _, (word, size) in zip(range(limit), supply, strict=False):
        if size <= room:
            chosen.append(word)
            room -= size
        if not room:
            break
    return chosen


def _rows(path: Path, columns: Sequence[str]) -> list[Text]:
    """Return the texts of a parquet file, or its pairs of texts."""
    import pyarrow.parquet

    table = pyarrow.parquet.read_table(path, columns=list(columns)).to_pydict()
    return list(zip(*table.values(), strict=True)) if len(columns) > 1 else list(table[columns[0]])


def _sample(texts: Sequence[Text], n: int) -> tuple[Text, ...]:
    """Return at most ``n`` of the texts, always the same."""
    return tuple(texts) if len(texts) <= n else tuple(random.Random(0).sample(list(texts), n))


def _mrpc(folder: Path, limit: int | None, tokenizer: Tokenizer) -> DataSet:
    pair = ("sentence1", "sentence2")
    validation, train = (
        _rows(folder / "glue" / "mrpc" / f"{split}.parquet", pair) for split in ("validation", "train")
    )
    calibration = _sample(train, CALIBRATION)
    return DataSet(name="mrpc", texts=tuple(validation[:limit]), calibration=calibration)


def _sst2(folder: Path, limit: int | None, tokenizer: Tokenizer) -> DataSet:
    validation, train = (
        _rows(folder / "glue" / "sst2" / f"{split}.parquet", ["sentence"]) for split in ("validation", "train")
    )
    calibration = _sample(train, CALIBRATION)
    return DataSet(name="sst2", texts=tuple(validation[:limit]), calibration=calibration)


def _longtail(folder: Path, limit: int | None, tokenizer: Tokenizer) -> DataSet:
    test, train = (_rows(folder / "longtail" / f"{split}.parquet", ["text"]) for split in ("test", "train"))
    calibration = _sample(train, CALIBRATION)
    return DataSet(name="longtail", texts=tuple(test[:limit]), calibration=calibration)


def _flat(folder: Path, limit: int | None, tokenizer: Tokenizer) -> DataSet:
    """As many texts as SST-2's validation has, all of one length: here sorting and bucketing can win nothing."""
    made = []
    for split in ("validation", "train"):
        sentences = _rows(folder / "glue" / "sst2" / f"{split}.parquet", ["sentence"])[:20_000]
        words = [word for sentence in sentences for word in str(sentence).split()]
        n = min(len(sentences), CALIBRATION)
        n = min(n, limit) if split == "validation" and limit else n
        made.append(flat_texts(words, n, length=FLAT_LENGTH, tokenizer=tokenizer))
    return DataSet(name="flat", texts=made[0], calibration=made[1])


DATA_SETS: Mapping[str, Callable[[Path, int | None, Tokenizer], DataSet]] = {
    "mrpc": _mrpc,
    "sst2": _sst2,
    "longtail": _longtail,
    "flat": _flat,
}
CHECKPOINT_OF: Mapping[str, str] = {
    "mrpc": "minilm-mrpc",
    "sst2": "minilm-sst2",
    "longtail": "minilm-sst2",
    "flat": "minilm-sst2",
}
