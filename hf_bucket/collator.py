"""Batches for training and evaluation at bucket shapes: rows of one bucket together, padded to that bucket's length."""

from __future__ import annotations

import operator
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
from tokenizers import Tokenizer
from tokenizers.models import WordLevel

from hf_bucket.errors import BucketWarning, InputError, InputTypeError, LadderError, ModelError, too_long
from hf_bucket.ladder import Ladder, make_ladder

if TYPE_CHECKING:
    from transformers import BatchEncoding, PreTrainedTokenizerFast

# The outputs of a tokenizer that hold one value per token, and what a padding token holds: a number, or the
# tokenizer's attribute that knows it (as in transformers' PreTrainedTokenizerBase._pad). Every other key is stacked.
PER_TOKEN: Mapping[str, int | str] = {
    "input_ids": "pad_token_id",
    "attention_mask": 0,
    "token_type_ids": "pad_token_type_id",
    "special_tokens_mask": 1,
}
LABEL_NAMES = ("label", "label_ids", "labels")  # all become "labels", as in transformers' DataCollatorWithPadding
OVERFLOWS = ("error", "truncate")

IntArray = npt.NDArray[np.int64]
Row = dict[str, npt.NDArray[Any]]


class DataCollatorWithBucketing:
    """Pad the rows of a batch to the smallest bucket length that holds the longest of them.

    The tokenizer is read once, when the collator is made, and not kept. The workers of a DataLoader have a copy of the
    collator each: there ``truncated`` stays what it was in the main process, and each worker warns for itself.

    Attributes:
        ladder: the buckets; only their lengths matter here, a batch keeps the number of rows it has.
        truncated: rows cut so far.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerFast,
        buckets: int | Sequence[object] | Ladder,
        *,
        overflow: str = "error",
        return_tensors: str = "pt",
    ) -> None:
        """Read the pad rules from ``tokenizer``.

        Args:
            buckets: a ladder, or anything that ``make_ladder`` takes.
            overflow: what becomes of a row longer than the largest bucket: ``"error"``, or ``"truncate"``: cut as the
                tokenizer would cut a single text, special tokens kept; counted, and warned about once.
            return_tensors: ``"pt"``: a BatchEncoding of torch tensors; ``"np"``: a dict of arrays, without torch.

        Raises:
            LadderError: ``buckets`` are no ladder, or a truncated row would hold special tokens only.
            ModelError: the tokenizer has no pad token or, for ``"truncate"``, is not a fast tokenizer.
            InputError: another argument is none of the values above.
        """
        self.ladder = make_ladder(buckets)
        self.truncated = 0
        self._overflow = _one_of(overflow, OVERFLOWS, "overflow")
        self._return_tensors = _one_of(return_tensors, ("pt", "np"), "return_tensors")
        self._pads = {key: _pad_value(tokenizer, pad) for key, pad in PER_TOKEN.items()}
        self._left_padded = tokenizer.padding_side == "left"
        if overflow == "truncate":
            self._kept = _columns_kept(tokenizer, self.ladder.max_length)

    def __call__(self, features: Sequence[Mapping[str, Any]]) -> dict[str, npt.NDArray[Any]] | BatchEncoding:
        """Return the batch of ``features``, in their order; neither they nor their values are changed.

        Padding that a row already has (attention mask 0 on a pad token, at either end) is taken off first: it is no
        part of its length. A missing ``attention_mask`` is made of ones.

        Args:
            features: one mapping per row, as ``tokenizer(text)`` gives it: lists, arrays or tensors, *Shape:* (tokens,)
                for the keys of ``PER_TOKEN``; any other key holds the same shape in every row.

        Returns:
            The keys of ``PER_TOKEN``, *Shape:* (rows, bucket length), and every other key as it is, stacked, *Shape:*
            (rows, ...), with ``label`` or ``label_ids`` as ``labels``. Whole numbers are int64, fractions float32.

        Raises:
            TooLongError: a row is longer than the largest bucket and ``overflow="error"``.
            InputError: no row, or a row that is empty, ragged, without ``input_ids``, or has other keys than the first.
            InputTypeError: ``features`` are not mappings, or a value is not numbers.
        """
        if isinstance(features, Mapping):
            raise InputTypeError("features is one mapping, expected a list of them: one per row, not one per batch")
        rows: list[Row] = []
        for row, feature in enumerate(features):
            values = _without_padding(_read_row(feature, row), row, self._pads["input_ids"])
            rows.append(self._fit(values, row))
        _check_same_keys(rows)
        length = self.ladder.choose(max(row["input_ids"].size for row in rows)).length
        batch = {key: self._join(key, [row[key] for row in rows], length) for key in rows[0]}
        if self._return_tensors == "np":
            return batch
        import torch
        from transformers import BatchEncoding

        return BatchEncoding({key: torch.from_numpy(array) for key, array in batch.items()})

    def _fit(self, values: Row, row: int) -> Row:
        """Return ``values``, cut if they are longer than the largest bucket and may be."""
        length, largest = values["input_ids"].size, self.ladder.max_length
        if length <= largest:
            return values
        if self._overflow == "error":
            raise too_long(length, largest, maximum=None, row=row)
        if not self.truncated:
            message = f"input {row} has {length} tokens and was cut to {largest}; .truncated counts all cut inputs"
            warnings.warn(message, BucketWarning, stacklevel=3)
        self.truncated += 1
        return {key: value[self._kept] if key in PER_TOKEN else value for key, value in values.items()}

    def _join(self, key: str, values: list[npt.NDArray[Any]], length: int) -> npt.NDArray[Any]:
        """Return one array of all rows; *Shape:* (rows, length) for a key of ``PER_TOKEN``."""
        if key not in PER_TOKEN:
            return _stack(key, values)
        joined = np.full((len(values), length), self._pads[key], dtype=np.int64)
        for cells, value in zip(joined, values, strict=True):
            start = length - value.size if self._left_padded else 0
            cells[start : start + value.size] = value
        return joined


def _read_row(feature: Mapping[str, Any], row: int) -> Row:
    """Return the arrays of one row under their final names, ``attention_mask`` included."""
    if not isinstance(feature, Mapping):
        raise InputTypeError(f"input {row} is a {type(feature).__name__}, expected a mapping such as tokenizer(text)")
    if "input_ids" not in feature:
        raise InputError(f"input {row} has no input_ids, only {list(feature)}; pass what tokenizer(text) returns")
    labels = [key for key in LABEL_NAMES if key in feature]
    if len(labels) > 1:
        raise InputError(f"input {row} has labels under {' and '.join(labels)}; keep one of them")
    values = {"labels" if key in labels else key: _as_array(value, key, row) for key, value in feature.items()}
    length = values["input_ids"].size
    values.setdefault("attention_mask", np.ones(length, dtype=np.int64))
    return {key: _as_tokens(value, key, row, length) if key in PER_TOKEN else value for key, value in values.items()}


def _as_array(value: object, key: str, row: int) -> npt.NDArray[Any]:
    """Return ``value`` as an array of numbers, whose memory may be the caller's."""
    try:
        array = np.asarray(value)
    except (TypeError, ValueError, RuntimeError) as error:
        raise InputError(f"{key} of input {row} is no array: {error}; give numbers of one shape") from error
    if array.dtype.kind not in "iufb":
        got = f"{type(value).__name__} {value!r:.40}"
        raise InputTypeError(f"{key} of input {row} holds {got}, expected numbers; remove that column")
    return array


def _as_tokens(array: npt.NDArray[Any], key: str, row: int, length: int) -> IntArray:
    """Return ``array`` as int64; *Shape:* (length,)."""
    if not length:
        raise InputError(f"input {row} has no tokens; a row needs at least one")
    if array.shape != (length,):
        raise InputError(f"{key} of input {row} has shape {array.shape}, expected ({length},): one value per token")
    if array.dtype.kind == "f":
        raise InputTypeError(f"{key} of input {row} holds fractions, expected whole numbers")
    return array.astype(np.int64, copy=False)


def _without_padding(values: Row, row: int, pad_id: int) -> Row:
    """Return ``values`` without the padding tokens at either end of the row."""
    padding = (values["attention_mask"] == 0) & (values["input_ids"] == pad_id)
    real = np.flatnonzero(~padding)
    if not real.size:
        raise InputError(f"input {row} has {padding.size} tokens and all of them are padding; a row needs a real one")
    ends = slice(real[0], real[-1] + 1)
    return {key: value[ends] if key in PER_TOKEN else value for key, value in values.items()}


def _check_same_keys(rows: Sequence[Row]) -> None:
    if not rows:
        raise InputError("features is empty; a batch needs at least one row")
    for row, values in enumerate(rows):
        if values.keys() != rows[0].keys():
            raise InputError(f"input {row} has the keys {sorted(values)}, but input 0 has {sorted(rows[0])}")


def _stack(key: str, values: Sequence[npt.NDArray[Any]]) -> npt.NDArray[Any]:
    """Return ``values`` as one array; *Shape:* (rows, ...)."""
    for row, value in enumerate(values):
        if value.shape != values[0].shape:
            raise InputError(
                f"{key} of input {row} has shape {value.shape}, but input 0 has {values[0].shape}; give it one shape "
                f"in all rows (only {', '.join(PER_TOKEN)} are padded)"
            )
    stacked = np.stack(values)
    kept = {"i": np.int64, "u": np.int64, "f": np.float32}.get(stacked.dtype.kind, stacked.dtype)
    return stacked.astype(kept, copy=False)


def _pad_value(tokenizer: PreTrainedTokenizerFast, pad: int | str) -> int:
    """Return what a padding token holds: ``pad`` itself, or the tokenizer's attribute of that name."""
    value = getattr(tokenizer, pad, None) if isinstance(pad, str) else pad
    if value is None:
        raise ModelError(f"this tokenizer has no {pad}, so rows cannot be padded; set tokenizer.pad_token first")
    return int(value)


def _columns_kept(tokenizer: PreTrainedTokenizerFast, largest: int) -> IntArray:
    """Return which tokens of a longer row stay; a negative one counts from the row's end. *Shape:* (largest,)."""
    leading, trailing = _special_tokens(tokenizer)
    if largest <= leading + trailing:
        raise LadderError(
            f"the largest bucket holds {largest} tokens, but this tokenizer adds {leading + trailing} to every text; "
            f"add a bucket of length > {leading + trailing}"
        )
    last = trailing if tokenizer.truncation_side == "right" else largest - leading
    return np.concatenate([np.arange(largest - last), np.arange(-last, 0)])


def _special_tokens(tokenizer: PreTrainedTokenizerFast) -> tuple[int, int]:
    """Return how many special tokens the tokenizer puts before and after a single text.

    A one-word tokenizer borrows its post-processor, so that neither its vocabulary nor its settings matter.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if not isinstance(backend, Tokenizer):
        raise ModelError(f'overflow="truncate" needs a fast tokenizer, got {type(tokenizer).__name__}')
    probe = Tokenizer(WordLevel({"x": 0}, unk_token="x"))
    if backend.post_processor is not None:
        probe.post_processor = backend.post_processor
    special = probe.encode("x").special_tokens_mask
    return special.index(0), special[::-1].index(0)


def _one_of(value: str, known: Sequence[str], name: str) -> str:
    if value not in known:
        raise InputError(f"{name} must be {' or '.join(map(repr, known))}, got {value!r}")
    return value


def _whole(value: object, name: str, *, least: int) -> int:
    """Return ``value`` as an int of at least ``least``; numpy integers pass, bools and fractions do not."""
    try:
        number = operator.index(value)  # type: ignore[arg-type]  # anything else raises TypeError, handled here
    except TypeError:
        number = least - 1
    if isinstance(value, bool) or number < least:
        raise InputError(f"{name} must be a whole number of at least {least}, got {value!r}")
    return number


class BucketBatchSampler:
    """Deal rows out in batches that share one bucket length: ``DataLoader(..., batch_sampler=...)``.

    Over all ranks every row comes exactly once per epoch: none is lost, and none doubled as DistributedSampler does to
    make ranks even. The price: some ranks may have one batch more than others. Training that synchronises at every
    batch (DDP) needs ``drop_last=True``: every batch full and every rank the same number of them, as torch's two
    ``drop_last`` do together; ``dropped`` counts the rows left out, with ``shuffle`` other ones in every epoch.

    Ranks compute about the same: their cells differ by at most the largest batch's. With ``shuffle`` they also have
    about as many at each step; without, the batches of a rank come in the order of their first row.

    accelerate's ``prepare`` (transformers' Trainer calls it) deals full batches out to processes itself: on several
    processes give it ``batch_size=..., drop_last=True`` and leave ``num_replicas`` at 1, or rows are lost or doubled.

    Attributes:
        batch_size, drop_last: as given.
        epoch: as set by ``set_epoch``, 0 at first.
    """

    def __init__(
        self,
        lengths: Iterable[int],
        buckets: int | Sequence[object] | Ladder,
        *,
        batch_size: int | None = None,
        shuffle: bool = False,
        seed: int = 0,
        drop_last: bool = False,
        num_replicas: int = 1,
        rank: int = 0,
        overflow: str = "error",
    ) -> None:
        """Put every row in the smallest bucket length that holds it.

        Args:
            lengths: tokens of every row, special tokens included: a list, an array, a datasets column.
            buckets: a ladder, or anything that ``make_ladder`` takes.
            batch_size: rows of a full batch; None means the largest batch size that the ladder has for that length.
            shuffle: other batches in another order in every epoch; every rank needs the same ``seed``.
            drop_last: leave out batches that are not full, and those that would leave the ranks uneven.
            num_replicas: processes that share the rows; ``rank`` is which of them this one is.
            overflow: ``"truncate"`` puts a row longer than the largest bucket in that bucket, for a collator that cuts.

        Raises:
            TooLongError: a row is longer than the largest bucket and ``overflow="error"``.
            LadderError: ``buckets`` are no ladder.
            InputError: a length, or another number, is not a whole number in its range.
        """
        ladder = make_ladder(buckets)
        self.batch_size = None if batch_size is None else _whole(batch_size, "batch_size", least=1)
        self.drop_last = drop_last
        self.epoch = 0
        self._shuffle = shuffle
        self._seed = _whole(seed, "seed", least=0)
        self._num_replicas = _whole(num_replicas, "num_replicas", least=1)
        self._rank = _whole(rank, "rank", least=0)
        if self._rank >= self._num_replicas:
            raise InputError(f"rank must be less than num_replicas={self._num_replicas}, got {self._rank}")
        self._sizes = {n: self.batch_size or ladder.of_length(n)[-1].batch_size for n in ladder.lengths}
        self._lengths = _bucket_lengths(_as_lengths(lengths), ladder, _one_of(overflow, OVERFLOWS, "overflow"))

    def set_epoch(self, epoch: int) -> None:
        """Choose the shuffle of the next ``iter``; call it before every epoch, or all epochs are shuffled alike.

        Raises:
            InputError: ``epoch`` is not a whole number of at least 0.
        """
        self.epoch = _whole(epoch, "epoch", least=0)

    def __len__(self) -> int:
        """Batches of this rank, the same in every epoch."""
        batches = 0
        for length, size in self._sizes.items():
            rows = int(np.count_nonzero(self._lengths == length))
            batches += rows // size if self.drop_last else -(-rows // size)
        steps, rest = divmod(batches, self._num_replicas)
        return steps + (not self.drop_last and self._rank < rest)

    def __iter__(self) -> Iterator[list[int]]:
        """Yield the rows of each batch of this rank."""
        mine = [step[self._rank] for step in self._steps() if self._rank < len(step)]
        if not self._shuffle:
            mine.sort(key=lambda rows: int(rows[0]))
        yield from (rows.tolist() for rows in mine)

    @property
    def dropped(self) -> int:
        """Rows that no rank gets in this epoch; 0 without ``drop_last``."""
        return self._lengths.size - sum(rows.size for step in self._steps() for rows in step)

    def _steps(self) -> list[list[IntArray]]:
        """Return the rows that each rank computes at each step of this epoch; only the last step may lack ranks."""
        random = np.random.default_rng([self._seed, self.epoch]) if self._shuffle else None
        batches, ranks = self._batches(random), self._num_replicas
        whole = len(batches) - len(batches) % ranks
        # Of two ranks the first has no more cells in whole steps, and no fewer in what is left over: neither runs away.
        dealt = sorted(batches[:whole], key=self._cells)
        rest = sorted(batches[whole:], key=self._cells, reverse=True)
        steps = [dealt[start : start + ranks] for start in range(0, whole, ranks)]
        if random is not None:
            random.shuffle(steps)
        return steps if self.drop_last or not rest else [*steps, rest]

    def _cells(self, rows: IntArray) -> int:
        """Return how many cells the batch of ``rows`` computes, padding tokens included."""
        return rows.size * int(self._lengths[rows[0]])

    def _batches(self, random: np.random.Generator | None) -> list[IntArray]:
        """Return the rows of every batch, in random order or in the order of their first row."""
        batches: list[IntArray] = []
        for length, size in self._sizes.items():
            rows = np.flatnonzero(self._lengths == length)
            rows = rows if random is None else random.permutation(rows)
            end = rows.size - rows.size % size if self.drop_last else rows.size
            batches += [rows[start : start + size] for start in range(0, end, size)]
        batches.sort(key=lambda rows: int(rows[0]))
        if random is not None:
            random.shuffle(batches)
        return batches


def _as_lengths(lengths: Iterable[int]) -> IntArray:
    """Return the tokens of every row; *Shape:* (rows,)."""
    array = np.asarray(lengths if isinstance(lengths, np.ndarray) else list(lengths))
    if not array.size:
        return np.empty(0, dtype=np.int64)
    if array.ndim != 1 or array.dtype.kind not in "iu":
        raise InputError(f"lengths has shape {array.shape} of {array.dtype}, expected one whole number per row")
    short = np.flatnonzero(array < 1)
    if short.size:
        raise InputError(f"input {short[0]} has length {array[short[0]]}, expected at least 1 token")
    return array.astype(np.int64)


def _bucket_lengths(lengths: IntArray, ladder: Ladder, overflow: str) -> IntArray:
    """Return the length of every row's bucket; *Shape:* (rows,)."""
    long = np.flatnonzero(lengths > ladder.max_length)
    if long.size and overflow == "error":
        raise too_long(int(lengths[long[0]]), ladder.max_length, maximum=None, row=int(long[0]))
    rungs = np.asarray(ladder.lengths, dtype=np.int64)
    return rungs[np.searchsorted(rungs, np.minimum(lengths, ladder.max_length))]
