"""From text to tokens, without any state that one thread could change under another."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal, TypeAlias

from tokenizers import Encoding, Tokenizer

from hf_bucket.batch import Features
from hf_bucket.errors import ArtifactError, InputError, InputTypeError, TooLongError
from hf_bucket.source import Source, locate_tokenizer

Text: TypeAlias = str | tuple[str, str]
Strategy = Literal["longest_first", "only_first", "only_second"]
Side = Literal["left", "right"]

_COLUMNS = {"input_ids": "ids", "attention_mask": "attention_mask", "token_type_ids": "type_ids"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Truncation:
    """How a text of too many tokens is cut, in the terms of transformers' tokenizers.

    Attributes:
        max_length: tokens that stay, special tokens included.
        strategy: which text of a pair loses tokens; a single text counts as the first.
        side: the end that loses them.
    """

    max_length: int
    strategy: Strategy = "longest_first"
    side: Side = "right"


class Encoder:
    """A fast tokenizer used without its padding and truncation, so that many threads may call one.

    Args:
        tokenizer_json: content of a ``tokenizer.json``. The truncation and padding saved in it are dropped.
        inputs: names of the columns to return.

    Raises:
        ArtifactError: the content is no tokenizer.
    """

    def __init__(self, tokenizer_json: str, *, inputs: Sequence[str]) -> None:
        try:
            settings = json.loads(tokenizer_json)
            settings["truncation"] = settings["padding"] = None
            self._tokenizer = Tokenizer.from_str(json.dumps(settings))
            probe = self._tokenizer.encode("a").special_tokens_mask
        except Exception as error:  # the library raises bare Exception
            raise ArtifactError(f"tokenizer.json cannot be read ({error}); compile the model again") from error
        self._inputs = tuple(inputs)
        self._prefix = _leading_ones(probe)
        self._suffix = _leading_ones(probe[::-1])

    @property
    def min_length(self) -> int:
        """Tokens of an empty text: its special tokens, and at least 1."""
        return max(1, self._tokenizer.num_special_tokens_to_add(False))

    @property
    def suffix_length(self) -> int:
        """Special tokens after a single text, such as BERT's one ``[SEP]``."""
        return self._suffix

    @property
    def frame(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Ids of the special tokens before and after a single text."""
        ids = self._tokenizer.encode("a").ids
        return tuple(ids[: self._prefix]), tuple(ids[len(ids) - self._suffix :])

    @property
    def vocabulary_size(self) -> int:
        """One more than the largest token id."""
        return max(self._tokenizer.get_vocab(with_added_tokens=True).values()) + 1

    def token_id(self, token: str) -> int | None:
        """Return the id of one token as it is spelled in the vocabulary; None for an unknown one."""
        number: int | None = self._tokenizer.token_to_id(token)
        return number

    def ordinary_ids(self, vocab_size: int | None) -> list[int]:
        """Return the ids below ``vocab_size`` that are no special tokens, ascending."""
        special = {number for number, token in self._tokenizer.get_added_tokens_decoder().items() if token.special}
        limit = self.vocabulary_size if vocab_size is None else vocab_size
        vocabulary = self._tokenizer.get_vocab(with_added_tokens=True).values()
        return sorted(number for number in vocabulary if number < limit and number not in special)

    def lengths(self, texts: Sequence[Text]) -> list[int]:
        """Return the tokens of every text, special tokens included, before any truncation."""
        return [len(encoding) for encoding in self._encode(texts)]

    def __call__(self, texts: Sequence[Text], *, truncation: Truncation | None = None) -> Features:
        """Return the tokens of every text.

        Args:
            texts: texts or pairs, as ``check_texts`` returns them.
            truncation: cut texts of more tokens; None leaves every text whole.

        Raises:
            InputError: a text holds a lone surrogate, which has no UTF-8 form.
            TooLongError: ``truncation`` may not cut enough off a pair.
        """
        encodings = self._encode(texts)
        truncated: list[int] = []
        if truncation is not None:
            for row, encoding in enumerate(encodings):
                if len(encoding) > truncation.max_length:
                    encodings[row] = self._encode_cut(texts[row], truncation, row)
                    truncated.append(row)
        columns = {name: [getattr(encoding, _COLUMNS[name]) for encoding in encodings] for name in self._inputs}
        lengths = tuple(len(encoding) for encoding in encodings)
        return Features(lengths=lengths, columns=columns, truncated=tuple(truncated))

    def _encode(self, texts: Sequence[Text]) -> list[Encoding]:
        try:
            return list(self._tokenizer.encode_batch(list(texts)))
        except TypeError as error:
            for row, text in enumerate(texts):
                for part in (text,) if isinstance(text, str) else text:
                    _check_unicode(part, row, error)
            raise

    def _encode_cut(self, text: Text, truncation: Truncation, row: int) -> Encoding:
        """Return the encoding cut to at most ``truncation.max_length`` tokens, its special tokens whole."""
        parts = (text,) if isinstance(text, str) else text
        encodings = [self._tokenizer.encode(parts[0], add_special_tokens=False)]
        if len(parts) == 2:  # after an empty first text, so that it gets the types of a second one
            encodings.append(self._tokenizer.encode("", parts[1], add_special_tokens=False))
        budget = truncation.max_length - self._tokenizer.num_special_tokens_to_add(len(parts) == 2)
        sizes = _cut_sizes([len(encoding) for encoding in encodings], budget, truncation, row)
        for encoding, size in zip(encodings, sizes, strict=True):
            encoding.truncate(size, stride=0, direction=truncation.side)
        first, *second = encodings
        return self._tokenizer.post_process(first, second[0] if second else None)


def count_tokens(texts: Iterable[object], source: Source) -> list[int]:
    """Return the tokens of every text by a model's tokenizer, special tokens included.

    Raises:
        InputTypeError: something else than text.
        ModelError: no such model, or it has no ``tokenizer.json``.
    """
    content = locate_tokenizer(source).read_text(encoding="utf-8")
    return Encoder(content, inputs=["input_ids"]).lengths(check_texts(texts))


def check_texts(texts: Iterable[object]) -> list[Text]:
    """Return texts as ``str`` and pairs as ``(str, str)``.

    Args:
        texts: each a string, a pair ``(text, text_pair)``, or a dict with ``text`` and optionally ``text_pair``.

    Raises:
        InputTypeError: anything else; the message names its position.
    """
    return [check_text(text, row) for row, text in enumerate(texts)]


def check_text(text: object, row: int) -> Text:
    """Return one text as ``check_texts`` does; ``row`` is its position in messages."""
    parts: tuple[object, ...]
    if isinstance(text, str):
        return _content(text)
    if isinstance(text, dict):
        surplus = [key for key in text if key not in ("text", "text_pair")]
        if surplus or "text" not in text:
            raise InputTypeError(
                f'input {row} is a dict with keys {list(text)}; expected "text" and optionally "text_pair"'
            )
        parts = (text["text"],) if text.get("text_pair") is None else (text["text"], text["text_pair"])
    elif isinstance(text, tuple) and len(text) == 2:
        parts = text
    else:
        raise InputTypeError(f"input {row} is {_kind(text)}; {_EXPECTED}")
    strings: list[str] = []
    for part in parts:
        if not isinstance(part, str):
            raise InputTypeError(f"input {row} holds {_kind(part)} where a text belongs; {_EXPECTED}")
        strings.append(_content(part))
    first, *second = strings
    return (first, second[0]) if second else first


_EXPECTED = 'expected a string, a pair ("text", "text_pair") or a dict {"text": ..., "text_pair": ...}'


def _content(text: str) -> str:
    """Return the characters of a string of any class; ``str()`` of an enum member would be its name."""
    return str.__str__(text)


def _kind(value: object) -> str:
    return "None" if value is None else f"a {type(value).__name__}"


def _check_unicode(text: str, row: int, error: TypeError) -> None:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as reason:
        raise InputError(
            f"input {row} has a lone surrogate at position {reason.start}, which is no Unicode character; decode the "
            f'source with errors="replace", or drop it'
        ) from error


def _leading_ones(mask: Sequence[int]) -> int:
    return next((index for index, flag in enumerate(mask) if not flag), len(mask))


def _cut_sizes(sizes: Sequence[int], budget: int, truncation: Truncation, row: int) -> list[int]:
    """Return how many tokens of each text stay so that together they are ``budget``.

    ``longest_first`` takes tokens off the longer text until both are equal, then off both in turn; the last odd token
    stays with the longer one (huggingface/tokenizers, ``truncate_encodings``).
    """
    if budget < 0:
        raise TooLongError(
            f"input {row} cannot be cut to {truncation.max_length} tokens: its {truncation.max_length - budget} "
            f"special tokens alone are more; allow at least that many"
        )
    if len(sizes) == 1 and truncation.strategy != "only_second":
        return [budget]
    if len(sizes) == 2 and truncation.strategy == "longest_first":
        short = min(*sizes, budget // 2)
        return [short, budget - short] if sizes[0] <= sizes[1] else [budget - short, short]
    cut = 1 if truncation.strategy == "only_second" else 0
    kept = budget - sum(size for index, size in enumerate(sizes) if index != cut)
    if cut < len(sizes) and kept >= 0:
        return [kept if index == cut else size for index, size in enumerate(sizes)]
    raise TooLongError(
        f'input {row} cannot be cut to {truncation.max_length} tokens by truncation="{truncation.strategy}" '
        f'(its texts have {" + ".join(map(str, sizes))} tokens); use "longest_first"'
    )
