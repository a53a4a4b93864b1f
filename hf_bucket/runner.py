"""The main path: texts to tokens to buckets to logits, and the padding taken off again."""

from __future__ import annotations

import os
import time
import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import numpy as np

from hf_bucket.artifact import Artifact, open_artifact
from hf_bucket.assign import Assignment, Cost, assign, cells_cost
from hf_bucket.batch import Array, Features, PaddedBatch, Row, pad, pool, unpad
from hf_bucket.costs import Clock, Costs
from hf_bucket.encode import Encoder, Text, Truncation, Windows, check_texts
from hf_bucket.engines import Engines
from hf_bucket.errors import ArtifactError, BucketWarning, InputError, TooLongError, too_long
from hf_bucket.ladder import Bucket, Ladder
from hf_bucket.overflow import Overflow, OverflowLike, Side, make_overflow
from hf_bucket.preflight import Trial, check_memory_bytes, room
from hf_bucket.probes import sample_batch
from hf_bucket.session_ort import Dynamic, Engine, EngineOptions, Mode, open_dynamic, open_sessions
from hf_bucket.stats import Counts
from hf_bucket.tasks import Signature

MEASURE_S = 4.0  # what the doors, and joint plans, spend on measuring, once per ladder and machine


@dataclass(frozen=True, slots=True, kw_only=True)
class RunOptions:
    """How a runner behaves.

    Attributes:
        engine: how its sessions are made.
        overflow: what happens to an input longer than the largest bucket: see ``overflow.Overflow``.
        warmup: run every bucket once, smallest first, when the sessions for a few batches are opened.
        measure_s: seconds that may be spent on measuring, once for a ladder on this machine: half on which provider and
            mode are faster, where they are ``"auto"``, half on what every bucket costs. A provider takes six runs of
            three lengths, for many texts and for one, however long. 0 measures nothing: provider and mode are those
            known of this machine, or the CPU provider and ``"shared"``, and costs are numbers of cells.
        memory_bytes: that the ladder may take, or it is refused; None is what the machine has.
    """

    engine: EngineOptions = field(default_factory=EngineOptions)
    overflow: OverflowLike = "error"
    warmup: bool = True
    measure_s: float = 0.0
    memory_bytes: int | None = None

    def __post_init__(self) -> None:
        make_overflow(self.overflow)
        check_memory_bytes(self.memory_bytes)
        if not isinstance(self.measure_s, (int, float)) or not 0 <= self.measure_s < float("inf"):
            raise InputError(f"measure_s must be a number of seconds of at least 0, got {self.measure_s!r}")


class Runner:
    """Runs an artifact. Many threads may call one; it survives pickling and forking by opening its sessions again.

    Args:
        artifact: what to run.
        options: how.
        tokenizer_json: content of a ``tokenizer.json`` to use instead of the artifact's.
        cost: what one run of a bucket costs, for choosing among them; None is measured, as ``options`` say.
        engine: makes the sessions.
        dynamic: makes sessions of any shape, for ``overflow="dynamic"``.
    """

    def __init__(
        self,
        artifact: Artifact,
        options: RunOptions | None = None,
        *,
        tokenizer_json: str | None = None,
        cost: Cost | None = None,
        engine: Engine = open_sessions,
        dynamic: Dynamic = open_dynamic,
    ) -> None:
        self.artifact = artifact
        self._tokenizer_json = tokenizer_json
        self.options = RunOptions() if options is None else options
        self._cost = cost
        self._alone: dict[tuple[int, bool], Bucket] = {}  # of a row alone: by length, and whether costs are known
        self._overflow = make_overflow(self.options.overflow)
        self._make, self._dynamic = engine, dynamic
        self._encoder: Encoder | None = None
        self._counts = Counts()
        trial = Trial(
            budget_s=self.options.measure_s / 2,
            available=room(self.options.memory_bytes),
            engine=engine,
            batches=self._sample,
        )
        self._engines = Engines(
            artifact,
            self.options.engine,
            trial,
            batches=self._sample,
            make=engine,
            dynamic=dynamic,
            warmup=self.options.warmup,
        )
        self._warn_of_neighbours()
        self._engines.open()
        if cost is None and self.options.measure_s:
            self._engines.use(self.measure(self.options.measure_s / 2, again=False))
            self._engines.of_batches()  # what single requests run on, now that it is known

    def __call__(self, texts: Iterable[object]) -> list[Row]:
        """Return ``{"logits": array of shape (labels,)}`` for every text, in their order.

        Args:
            texts: each a string, a pair ``(text, text_pair)``, or a dict with ``text`` and optionally ``text_pair``.
                One string or dict alone is one text.

        Raises:
            InputTypeError: something else than text.
            TooLongError: a text fits no bucket and may not be cut.
        """
        return self.run(self.encode(check_texts(texts)))

    def run(self, features: Features) -> list[Row]:
        """Return the outputs of every row of ``features``, padding gone, in their order.

        Rows that are windows of one text are pooled into one. A row longer than the largest bucket, which only
        ``overflow="dynamic"`` lets through, runs alone at its exact length.
        """
        assignments = self._assign(features)
        workers, sessions = self._engines.of_batches(len(assignments))

        def run_one(assignment: Assignment) -> tuple[PaddedBatch, dict[int, Row]]:
            batch = pad(features, assignment, self.signature)
            session = sessions.get(batch.bucket) or self._engines.of_shape(batch.bucket)
            outputs = session.run(batch.arrays)
            self._check_labels(outputs)
            _check_finite(batch, outputs, features)
            return replace(batch, arrays={}), unpad(batch, outputs, self.signature)

        # the dearest first, so that no worker is left with one when the others have done
        done = workers.map(run_one, sorted(assignments, key=lambda one: -one.bucket.cells))
        self._counts.add([batch for batch, _ in done], features)
        results = {row: outputs for _, rows in done for row, outputs in rows.items()}
        return pool([results[row] for row in range(len(features))], features)

    def encode(
        self,
        texts: Sequence[Text],
        *,
        truncation: Truncation | None = None,
        overflow: OverflowLike | None = None,
        first_row: int = 0,
    ) -> Features:
        """Return the tokens of every text, none longer than the largest bucket unless ``overflow`` is ``"dynamic"``.

        Args:
            texts: as ``check_texts`` returns them.
            truncation: cut texts as the caller asked to, whatever the buckets.
            overflow: in place of ``options.overflow``.
            first_row: number of the first text in messages.

        Raises:
            TooLongError: a text fits no bucket and may not be cut.
        """
        largest, chosen = self.ladder.max_length, self._overflow if overflow is None else make_overflow(overflow)
        asked = truncation
        ours, windows = self._fitting(chosen)
        if ours is not None and (asked is None or asked.max_length > largest):
            truncation = ours if asked is None else replace(asked, max_length=largest)
        try:
            features = replace(self.encoder(texts, truncation=truncation, windows=windows), pool=chosen.pool)
        except TooLongError:  # it may not be cut as far as it would have to be
            self._counts.refuse()
            raise
        self._check_lengths(features.lengths, first_row, exact=chosen.policy == "dynamic")
        if truncation is not asked:
            self._warn_once(features.truncated, first_row)
        return features

    def fit(self, features: Features) -> Features:
        """Return token rows of the caller's, each at most as long as the largest bucket, or any with ``"dynamic"``.

        Rows that are too long are cut, or seen through windows, as their texts would be: see ``Encoder.places``.

        Raises:
            TooLongError: a row fits no bucket and may not be cut.
            InputError: a token id is outside the model's vocabulary.
        """
        self._check_ids(features)
        largest = self.ladder.max_length
        chosen = self._overflow
        too_many = tuple(row for row, length in enumerate(features.lengths) if length > largest)
        if not too_many or chosen.policy in ("error", "dynamic"):
            self._check_lengths(features.lengths, 0, exact=chosen.policy == "dynamic")
            return features
        truncation, windows = self._fitting(chosen)
        types = features.columns.get("token_type_ids")
        try:
            pieces = [
                self.encoder.places(
                    ids, None if types is None else types[row], truncation=truncation, windows=windows, row=row
                )
                if len(ids) > largest
                else [[*range(len(ids))]]
                for row, ids in enumerate(features.columns["input_ids"])
            ]
        except TooLongError:  # it may not be cut as far as it would have to be
            self._counts.refuse()
            raise
        if chosen.policy == "truncate":
            self._warn_once(too_many, 0)
        places = [(row, keep) for row, kept in enumerate(pieces) for keep in kept]
        return Features(
            lengths=tuple(len(keep) for _, keep in places),
            columns={
                name: [np.asarray(column[row])[keep] for row, keep in places]
                for name, column in features.columns.items()
            },
            truncated=too_many if chosen.policy == "truncate" else (),
            owners=tuple(row for row, _ in places) if len(places) > len(pieces) else None,
            pool=chosen.pool,
        )

    def _fitting(self, chosen: Overflow) -> tuple[Truncation | None, Windows | None]:
        """Return how a policy makes rows fit the largest bucket."""
        largest = self.ladder.max_length
        if chosen.policy == "truncate":
            side = chosen.side or self.side
            return Truncation(max_length=largest, strategy=chosen.strategy, side=side), None
        if chosen.policy == "window":
            stride = largest // 8 if chosen.stride is None else chosen.stride
            return None, Windows(max_length=largest, stride=stride, strategy=chosen.strategy)
        return None, None

    @property
    def ladder(self) -> Ladder:
        """The buckets this runner has."""
        return self.artifact.manifest.ladder

    @property
    def signature(self) -> Signature:
        """What the graph takes and returns."""
        return self.artifact.manifest.signature

    @property
    def max_length(self) -> int | None:
        """The model's true maximum in tokens, whatever the ladder; None where it has no limit."""
        return self.artifact.manifest.max_length

    @property
    def encoder(self) -> Encoder:
        """The tokenizer, read when it is first needed."""
        if self._encoder is None:
            content = self._tokenizer_json or self.artifact.tokenizer_json()
            self._encoder = Encoder(content, inputs=self.signature.input_names)
        return self._encoder

    @cached_property
    def side(self) -> Side:
        """Where the tokenizer cuts unless told otherwise."""
        return self.artifact.truncation_side()

    def stats(self) -> dict[str, Any]:
        """Return what was run so far.

        ``real_tokens`` are tokens of inputs, ``padded_tokens`` the padding computed with them, ``waste`` the share of
        padding in all computed cells, ``truncated`` the rows that were cut, ``windows`` the rows that showed a part of
        a longer text. ``buckets`` has the same per bucket, with ``batches`` run, for every bucket of the ladder, and
        ``dynamic`` for rows that ran at their exact length. ``refused`` counts calls that raised ``TooLongError``.
        """
        return self._counts.report(self.ladder)

    def measure(self, budget_s: float, *, again: bool = True, clock: Clock = time.perf_counter) -> Costs:
        """Return what a run of every bucket costs here, and keep it in this machine's cache.

        Most of the time goes to runs as many batches at once have them, the rest to runs of one batch on every core.

        Args:
            budget_s: seconds to spend, about; buckets that go over it are predicted.
            again: measure every bucket; False measures, once for a ladder, those that the cache has no costs of.
        """
        return self._engines.measure(budget_s, again=again, clock=clock)

    def close(self) -> None:
        """Release the sessions and end the worker threads; a later call opens them again."""
        self._engines.close()

    def __getstate__(self) -> dict[str, Any]:
        return {
            "folder": self.artifact.folder,
            "options": self.options,
            "tokenizer_json": self._tokenizer_json,
            "cost": self._cost,
            "engine": self._make,
            "dynamic": self._dynamic,
        }

    def __setstate__(self, state: dict[str, Any]) -> None:
        artifact, options = open_artifact(state.pop("folder")), state.pop("options")
        Runner.__init__(self, artifact, options, **state)

    def _assign(self, features: Features) -> list[Assignment]:
        """Return the batches of a request; which bucket takes a row alone is worked out once for every length."""
        known = self._cost or self._engines.cost()
        kinds, cost, promote = self._kinds(features), known or cells_cost, known is not None
        if len(features) != 1 or features.lengths[0] > self.ladder.max_length:
            return assign(features.lengths, self.ladder, cost, exact=True, kinds=kinds, promote=promote)
        (length,) = features.lengths
        if (length, promote) not in self._alone:
            self._alone[length, promote] = assign([length], self.ladder, cost, promote=promote)[0].bucket
        return [Assignment(bucket=self._alone[length, promote], rows=(0,))]

    def _sample(self, bucket: Bucket) -> Mapping[str, Array]:
        return sample_batch(self.encoder, bucket, self.signature, self.artifact.manifest.vocab_size)

    def _check_lengths(self, lengths: Sequence[int], first_row: int, *, exact: bool = False) -> None:
        largest, maximum = self.ladder.max_length, self.max_length
        for row, length in enumerate(lengths, first_row):
            if length > largest and (not exact or (maximum is not None and length > maximum)):
                self._counts.refuse()
                raise too_long(length, largest, maximum=maximum, row=row)

    def _check_labels(self, outputs: Mapping[str, Array]) -> None:
        labels = len(self.artifact.manifest.labels)
        for spec in self.signature.outputs:
            found = [n for n, axis in zip(outputs[spec.name].shape, spec.axes, strict=False) if axis == "label"]
            if found not in ([], [labels]):
                raise ArtifactError(
                    f"{self.artifact.folder} names {labels} labels, its graph returns {found[0]} {spec.name}; compile "
                    f"the model again"
                )

    def _check_ids(self, features: Features) -> None:
        size = self.artifact.manifest.vocab_size
        for row, ids in enumerate(features.columns["input_ids"]):
            low, high = int(np.min(ids)), int(np.max(ids))
            if low < 0 or (size is not None and high >= size):
                raise InputError(
                    f"input {row} has token id {low if low < 0 else high}, this model's vocabulary is 0 to "
                    f"{'' if size is None else size - 1}; use the tokenizer that came with the model"
                )

    def _kinds(self, features: Features) -> list[int] | None:
        """Return how many of the token that the head looks for every row has; None for a head that looks for none."""
        wanted = self.signature.counted_id
        if wanted is None:
            return None
        counts = [int(np.count_nonzero(np.asarray(ids) == wanted)) for ids in features.columns["input_ids"]]
        if 0 in counts:
            raise InputError(
                f"input {counts.index(0)} has no token {wanted}, the end of sequence that this model's head reads; use "
                f"the tokenizer that came with the model"
            )
        return counts

    def _warn_of_neighbours(self) -> None:
        leak = self.artifact.manifest.padding_leak
        if leak is not None:
            warnings.warn(
                f"padding changes what {self.artifact.manifest.source.get('name', 'this model')} answers: in torch "
                f"itself a logit moved by {leak:.2g}, and its answers depend on the bucket; it was compiled with "
                f"allow_padding_leak",
                BucketWarning,
                stacklevel=3,
            )
        made = self.artifact.manifest.quantization
        if made is not None and made.scheme == "int8-dynamic":
            warnings.warn(
                "this model is int8-dynamic, whose scales come from each batch: a text's logits change with the texts "
                'beside it; quantize="int8" fixes the scales',
                BucketWarning,
                stacklevel=3,
            )

    def _warn_once(self, truncated: Sequence[int], first_row: int) -> None:
        if truncated and self._counts.first_truncation():
            warnings.warn(
                f"input {first_row + truncated[0]} was cut to the largest bucket, {self.ladder.max_length} tokens; "
                f'later cuts are counted in stats()["truncated"] without a warning',
                BucketWarning,
                stacklevel=4,
            )


def _check_finite(batch: PaddedBatch, outputs: Mapping[str, Array], features: Features) -> None:
    """Raise an InputError if a real row of any output holds a number that is none."""
    for name, array in outputs.items():
        if not np.isfinite(array[: len(batch.rows)]).all():
            place = int(np.argmin([np.isfinite(row).all() for row in array[: len(batch.rows)]]))
            row = batch.rows[place]
            row = row if features.owners is None else features.owners[row]
            raise InputError(
                f"input {row} got {name} that are not finite from bucket {batch.bucket.name}; look whether torch gives "
                f"numbers for it, and compile in float32 if it does"
            )


def load(
    artifact_dir: str | os.PathLike[str],
    *,
    mode: Mode = "shared",
    provider: str = "auto",
    provider_options: Mapping[str, str] | None = None,
    threads: int = 0,
    workers: int = 0,
    overflow: OverflowLike = "error",
    warmup: bool = True,
    measure_s: float = MEASURE_S,
    memory_bytes: int | None = None,
) -> Runner:
    """Return a runner for the artifact in a folder; torch is never imported.

    Args:
        artifact_dir: folder that ``save_pretrained`` or the compiler wrote.
        mode: ``"shared"`` holds the weights once; ``"static"`` runs every bucket on a graph of fixed shapes;
            ``"auto"`` measures which is faster, the first time on this machine, and takes static if it fits.
        provider: onnxruntime execution provider by name, or ``"openvino"``; ``"auto"`` is the CPU's, or another that is
            installed, for many texts, for one or for both, where it was measured to save a twentieth of the time.
        provider_options: passed to the provider as they are.
        threads, workers: threads one run may use, and batches that run at once: see ``session_ort.EngineOptions``.
        overflow: what happens to texts longer than the largest bucket: see ``overflow.Overflow``.
        warmup: run every bucket once before returning, smallest first.
        measure_s: seconds that the first loading of these buckets on this machine may spend on measuring what they
            cost.
        memory_bytes: that the ladder may take, or it is refused; None is what the machine has.

    Raises:
        LadderError: the ladder does not fit the memory.
        ArtifactError: the artifact is missing, damaged, altered or from a newer version.
        ProviderError: the provider is not installed.
    """
    engine = EngineOptions(
        mode=mode, provider=provider, provider_options=provider_options or {}, threads=threads, workers=workers
    )
    options = RunOptions(
        engine=engine, overflow=overflow, warmup=warmup, measure_s=measure_s, memory_bytes=memory_bytes
    )
    return Runner(open_artifact(artifact_dir), options)
