"""From text to tokens, without any state that one thread could change under another."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TypeAlias

from tokenizers import Encoding, Tokenizer

from hf_bucket.batch import Features
from hf_bucket.errors import ArtifactError, InputError, InputTypeError, TooLongError
from hf_bucket.overflow import Side, Strategy
from hf_bucket.source import Source, locate_tokenizer

Text: TypeAlias = str | tuple[str, str]
Ids: TypeAlias = list[int]


@dataclass(frozen=True, slots=True, kw_only=True)
class Truncation:
    """How a text of too many tokens is cut, in the terms of transformers' tokenizers.

    Attributes:
        max_length: tokens that stay, special tokens included.
        strategy: which text of a pair loses tokens; a single text counts as the first.
        side: where they are lost.
    """

    max_length: int
    strategy: Strategy = "longest_first"
    side: Side = "right"


@dataclass(frozen=True, slots=True, kw_only=True)
class Windows:
    """How a text of too many tokens is seen through several windows.

    Attributes:
        max_length: tokens of a window at most, special tokens included.
        stride: tokens that neighbouring windows share.
        strategy: which text of a pair the windows move over; the other one is whole in all of them.
    """

    max_length: int
    stride: int
    strategy: Strategy = "longest_first"


@dataclass(frozen=True, slots=True)
class _Frame:
    """The special tokens before, between and after one text or two, with their types, and the types of the texts."""

    ids: tuple[Ids, ...]
    types: tuple[Ids, ...]
    text_types: tuple[int, ...]

    @property
    def size(self) -> int:
        return sum(map(len, self.ids))

    def around(self, parts: Sequence[Ids]) -> tuple[Ids, Ids]:
        """Return ids and types of a whole row."""
        ids, types = [*self.ids[0]], [*self.types[0]]
        for number, part in enumerate(parts):
            ids += [*part, *self.ids[number + 1]]
            types += [*[self.text_types[number]] * len(part), *self.types[number + 1]]
        return ids, types


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
            word = self._word()
            pair = self._tokenizer.encode(word, word)
            self._frames = _frame(self._tokenizer.encode(word), 1), _frame(pair, 2)
            # without offsets, which nobody reads; but not every tokenizer tells the two texts of a pair apart then
            fast = self._tokenizer.encode_batch_fast([(word, word)])[0]
            same = (fast.ids, fast.type_ids) == (pair.ids, pair.type_ids)
            self._encode_batch = self._tokenizer.encode_batch_fast if same else self._tokenizer.encode_batch
        except Exception as error:  # the library raises bare Exception
            raise ArtifactError(f"tokenizer.json cannot be read ({error}); compile the model again") from error
        self._inputs = tuple(inputs)

    def _word(self) -> str:
        """Return a text that this tokenizer makes at least one ordinary token of."""
        known = self._tokenizer.get_vocab()
        for word in ("a", "1", *sorted(known, key=known.__getitem__)):
            if self._tokenizer.encode(word, add_special_tokens=False).ids:
                return word
        raise ValueError("it makes no token of any word it knows")

    @property
    def min_length(self) -> int:
        """Tokens of an empty text: its special tokens, and at least 1."""
        return max(1, self._tokenizer.num_special_tokens_to_add(False))

    @property
    def suffix_length(self) -> int:
        """Special tokens after a single text, such as BERT's one ``[SEP]``."""
        return len(self._frames[0].ids[1])

    @property
    def frame(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Ids of the special tokens before and after a single text."""
        before, after = self._frames[0].ids
        return tuple(before), tuple(after)

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

    def __call__(
        self, texts: Sequence[Text], *, truncation: Truncation | None = None, windows: Windows | None = None
    ) -> Features:
        """Return the tokens of every text.

        Args:
            texts: texts or pairs, as ``check_texts`` returns them.
            truncation: cut texts of more tokens; None leaves every text whole.
            windows: make several rows of texts that have more tokens even so; ``owners`` tells whose they are.

        Raises:
            InputError: a text holds a lone surrogate, which has no UTF-8 form.
            TooLongError: ``truncation`` may not cut enough off a pair, or the windows have no room for it.
        """
        columns: dict[str, list[Ids]] = {name: [] for name in self._inputs}
        truncated: list[int] = []
        owners: list[int] = []
        typed = "token_type_ids" in columns
        for row, encoding in enumerate(self._encode(texts)):
            rows = [(encoding.ids, encoding.type_ids if typed else [])]
            if truncation is not None and len(encoding) > truncation.max_length:
                rows = [self._cut(texts[row], truncation, row)]
                truncated.append(row)
            if windows is not None and len(rows[0][0]) > windows.max_length:
                rows = self._windows(texts[row], windows, row)
            for ids, types in rows:
                values = {"input_ids": ids, "attention_mask": [1] * len(ids), "token_type_ids": types}
                for name, column in columns.items():
                    column.append(values[name])
                owners.append(row)
        lengths = tuple(len(ids) for ids in columns[self._inputs[0]])
        windowed = tuple(owners) if len(owners) != len(texts) else None
        return Features(lengths=lengths, columns=columns, truncated=tuple(truncated), owners=windowed)

    def _encode(self, texts: Sequence[Text]) -> list[Encoding]:
        try:
            return list(self._encode_batch(list(texts)))
        except TypeError as error:
            for row, text in enumerate(texts):
                for part in (text,) if isinstance(text, str) else text:
                    _check_unicode(part, row, error)
            raise

    def places(
        self,
        ids: Iterable[int],
        types: Iterable[int] | None,
        *,
        truncation: Truncation | None = None,
        windows: Windows | None = None,
        row: int = 0,
    ) -> list[list[int]]:
        """Return which tokens of a row every row made of it keeps: what ``__call__`` would have made of its texts.

        Args:
            ids: tokens of one text or of a pair; of a pair if the special tokens between two texts are in it just once.
            types: the row's token types; None where it has none.
            truncation: cut the row, if that is not None.
            windows: else see it through these.
            row: its number in messages.

        Raises:
            TooLongError: as ``__call__``.
        """
        parts, specials = self._split([*map(int, ids)], types)
        if truncation is not None:
            kept = [_cut_parts(parts, sum(map(len, specials)), truncation, row)]
        elif windows is not None:
            kept = _window_parts(parts, sum(map(len, specials)), windows, row)
        else:
            kept = [parts]
        return [
            [place for pair in itertools.zip_longest(specials, one, fillvalue=()) for some in pair for place in some]
            for one in kept
        ]

    def _split(self, ids: Ids, types: Iterable[int] | None) -> tuple[list[Ids], list[Ids]]:
        """Return the places of the ordinary tokens of each text of a row, and of the special ones around them."""
        frame, n = self._frames[1], len(ids)
        before, between, after = map(len, frame.ids)
        first, second = frame.text_types
        single = types is not None and first != second and second not in [*map(int, types)]
        found = [
            at for at in range(before, n - after - between + 1) if between and ids[at : at + between] == frame.ids[1]
        ]
        if len(found) == 1 and not single:
            at = found[0]
            specials = [[*range(before)], [*range(at, at + between)], [*range(n - after, n)]]
            return [[*range(before, at)], [*range(at + between, n - after)]], specials
        before, after = map(len, self._frames[0].ids)
        return [[*range(before, n - after)]], [[*range(before)], [*range(n - after, n)]]

    def _cut(self, text: Text, truncation: Truncation, row: int) -> tuple[Ids, Ids]:
        """Return ids and types cut to at most ``truncation.max_length`` tokens, the special tokens whole."""
        parts, frame = self._parts(text)
        return frame.around(_cut_parts(parts, frame.size, truncation, row))

    def _windows(self, text: Text, windows: Windows, row: int) -> list[tuple[Ids, Ids]]:
        """Return ids and types of every window, from the beginning; the last one may be shorter."""
        parts, frame = self._parts(text)
        return [frame.around(one) for one in _window_parts(parts, frame.size, windows, row)]

    def _parts(self, text: Text) -> tuple[list[Ids], _Frame]:
        """Return the ordinary tokens of a text, or of both of a pair, and what goes around them."""
        if isinstance(text, str):
            return [self._tokenizer.encode(text, add_special_tokens=False).ids], self._frames[0]
        first = self._tokenizer.encode(text[0], add_special_tokens=False).ids
        second = self._tokenizer.encode("", text[1], add_special_tokens=False).ids  # as the second of a pair
        return [first, second], self._frames[1]


def _frame(encoding: Encoding, n_texts: int) -> _Frame:
    """Return the frame of an encoding in which every text has at least one token."""
    owners = encoding.sequence_ids
    firsts = [owners.index(number) for number in range(n_texts)]
    ends = [len(owners) - owners[::-1].index(number) for number in range(n_texts)]
    gaps = [slice(start, end) for start, end in zip([0, *ends], [*firsts, len(owners)], strict=True)]
    return _Frame(
        tuple(encoding.ids[gap] for gap in gaps),
        tuple(encoding.type_ids[gap] for gap in gaps),
        tuple(encoding.type_ids[first] for first in firsts),
    )


def cut(ids: Sequence[int], size: int, side: Side) -> list[int]:
    """Return ``size`` of the tokens: the first, the last, or as many from both ends, the odd one from the beginning."""
    if len(ids) <= size:
        return [*ids]
    head = {"right": size, "left": 0, "head+tail": size - size // 2}[side]
    return [*ids[:head], *ids[len(ids) - (size - head) :]]


def _cut_parts(parts: Sequence[Ids], special: int, truncation: Truncation, row: int) -> list[Ids]:
    """Return what stays of each text so that, with ``special`` tokens more, they have ``truncation.max_length``."""
    sizes = _cut_sizes([len(part) for part in parts], truncation.max_length - special, truncation, row)
    return [cut(part, size, truncation.side) for part, size in zip(parts, sizes, strict=True)]


def _window_parts(parts: Sequence[Ids], special: int, windows: Windows, row: int) -> list[list[Ids]]:
    """Return what every window shows of each text, from the beginning; the last one may be shorter."""
    sizes = [len(part) for part in parts]
    moving = {"only_first": 0, "only_second": len(parts) - 1}.get(windows.strategy, sizes.index(max(sizes)))
    still = sum(sizes) - sizes[moving]
    room = windows.max_length - special - still
    if room <= windows.stride:
        other = f", {still} of them for its other text, which is in every window" if still else ""
        advice = "use a smaller stride or a longer bucket" if room > 0 else "use a longer bucket"
        raise TooLongError(
            f"input {row} needs {special + still} tokens of every window for special tokens{other}: of "
            f"{windows.max_length} that leaves {max(room, 0)}, no more than the stride of {windows.stride}; {advice}"
        )
    starts = range(0, max(1, sizes[moving] - windows.stride), room - windows.stride)
    return [[part[at : at + room] if which == moving else part for which, part in enumerate(parts)] for at in starts]


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
        texts: each a string, a pair ``(text, text_pair)``, or a dict with ``text`` and optionally ``text_pair``. One
            string or dict alone is one text.

    Raises:
        InputTypeError: anything else; the message names its position.
    """
    if isinstance(texts, (str, dict)):
        texts = [texts]
    if not hasattr(texts, "__iter__") or isinstance(texts, bytes):
        raise InputTypeError(f"texts is {_kind(texts)}; expected a list of texts: each a string, a pair or a dict")
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
        f'input {row} cannot be cut to {truncation.max_length} tokens by "{truncation.strategy}" (its texts have '
        f'{" + ".join(map(str, sizes))} tokens); use "longest_first"'
    )
