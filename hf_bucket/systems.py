"""Systems that turn texts into logits: torch without padding and in sorted batches, transformers' pipeline, buckets.

Each runs in a process of its own, so that its memory is its own.
"""

from __future__ import annotations

import importlib
import multiprocessing
import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, Protocol, TypeAlias, TypeVar

import numpy as np

from hf_bucket.encode import Text
from hf_bucket.errors import BucketError, ModelError, missing_part
from hf_bucket.metrics import Logits, padded_waste

REFERENCE = "torch"
BUCKETED = "hf_bucket"

_STOP_S = 10.0
_WARM_UP = 16  # texts; the bucketed model warms itself up while it loads

Reply = TypeVar("Reply")


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """What every system is given.

    Attributes:
        max_length: the model's true maximum in tokens; None where it has none.
        pipeline_batch_size: rows per batch of transformers' pipeline and of sorted torch.
        options: what ``BucketedModelForSequenceClassification.from_pretrained`` takes besides the model.
    """

    model: str
    texts: Sequence[Text]
    revision: str | None = None
    max_length: int | None = None
    pipeline_batch_size: int = 32
    options: Mapping[str, object] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class Loaded:
    """What a system says once it has loaded.

    Attributes:
        max_length: the model's true maximum in tokens; None where it has none.
        ladder: names of the buckets; empty for a system without.
        memory_bytes: resident set after loading.
    """

    max_length: int | None
    ladder: tuple[str, ...]
    memory_bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Pass:
    """One pass of one system over all texts.

    Attributes:
        logits: in the model's label order. Shape: (row, label).
        seconds: from texts to logits.
        peak_bytes: largest resident set the process has had so far.
        waste: share of the computed cells that were padding.
        truncated: rows that were cut.
    """

    logits: Logits
    seconds: float
    peak_bytes: int
    waste: float
    truncated: int


class Engine(Protocol):
    """A loaded system, inside its own process."""

    @property
    def max_length(self) -> int | None:
        """The model's true maximum in tokens; None where it has none."""

    @property
    def ladder(self) -> tuple[str, ...]:
        """Names of the buckets; empty for a system without."""

    def run(self, texts: Sequence[Text]) -> Logits:
        """Return the logits of every text, in order. Shape: (row, label)."""

    def padding(self, texts: Sequence[Text]) -> tuple[float, int]:
        """Return the waste and the truncated rows of the last pass, which was over ``texts``."""


class Worker(Protocol):
    """A system as the parent sees it."""

    @property
    def loaded(self) -> Loaded:
        """What it said once it had loaded."""

    def run(self) -> Pass:
        """Make one pass over the job's texts."""


Start: TypeAlias = Callable[[str, Job], AbstractContextManager[Worker]]


@contextmanager
def start_worker(
    system: str, job: Job, *, engines: Mapping[str, Callable[[Job], Engine]] | None = None
) -> Iterator[Worker]:
    """Start a system in a fresh process, and end the process on leaving.

    Args:
        engines: what loads each system, by name; ``ENGINES`` unless told otherwise.

    Raises:
        BucketError: what the process raised, or that it ended without a word.
    """
    context = multiprocessing.get_context("spawn")  # a forked process would inherit this one's memory
    ours, theirs = context.Pipe()
    process = context.Process(target=_process, args=(theirs, (engines or ENGINES)[system], job))
    process.start()
    theirs.close()
    try:
        yield _ProcessWorker(ours, system)
    finally:
        ours.close()  # the worker takes this as the end
        process.join(_STOP_S)
        if process.is_alive():
            process.terminate()
            process.join()


class _ProcessWorker:
    """The parent's end of the pipe to a worker process."""

    def __init__(self, connection: Connection, system: str) -> None:
        self._connection = connection
        self._system = system
        self.loaded = self._receive(Loaded)

    def run(self) -> Pass:
        """Make one pass over the job's texts."""
        return self._receive(Pass, "run")

    def _receive(self, kind: type[Reply], *requests: str) -> Reply:
        try:
            for request in requests:
                self._connection.send(request)
            reply = self._connection.recv()
        except (EOFError, ConnectionError) as error:
            raise ModelError(f"the {self._system} process ended without an answer; its last words are above") from error
        if isinstance(reply, BucketError):
            raise reply
        if not isinstance(reply, kind):
            raise TypeError(f"the {self._system} process sent a {type(reply).__name__}, expected {kind.__name__}")
        return reply


def _process(connection: Connection, open_engine: Callable[[Job], Engine], job: Job) -> None:
    """Body of a worker process."""
    os.dup2(2, 1)  # exporters and engines print; the parent's stdout may be JSON
    serve(connection, open_engine, job)


def serve(connection: Connection, open_engine: Callable[[Job], Engine], job: Job) -> None:
    """Load, say so, then make one pass per message until the other end hangs up.

    A ``BucketError`` is sent instead of an answer, and ends the serving.
    """
    try:
        engine = open_engine(job)
        connection.send(loaded(engine))
        while connection.recv():
            connection.send(run_pass(engine, job.texts, clock=time.perf_counter))
    except BucketError as error:
        connection.send(error)
    except (EOFError, KeyboardInterrupt):
        connection.close()


def loaded(engine: Engine) -> Loaded:
    """Return what there is to say about an engine that has just loaded."""
    return Loaded(max_length=engine.max_length, ladder=engine.ladder, memory_bytes=resident_bytes()[0])


def run_pass(engine: Engine, texts: Sequence[Text], *, clock: Callable[[], float]) -> Pass:
    """Make one pass. Only ``engine.run`` is timed; ``clock`` returns seconds."""
    start = clock()
    logits = engine.run(texts)
    seconds = clock() - start
    peak_bytes = resident_bytes()[1]  # before padding(), which tokenises once more
    waste, truncated = engine.padding(texts)
    return Pass(logits=logits, seconds=seconds, peak_bytes=peak_bytes, waste=waste, truncated=truncated)


def resident_bytes() -> tuple[int, int]:
    """Return the resident set of this process, now and at its peak.

    Linux carries ``ru_maxrss`` over exec, so that it starts at the parent's size; VmHWM does not (proc(5)). Elsewhere
    only the peak is known, and stands for both.
    """
    status = Path("/proc/self/status")
    if status.exists():
        kilobytes = dict(line.split(":", 1) for line in status.read_text().splitlines())
        now, peak = (int(kilobytes[name].split()[0]) for name in ("VmRSS", "VmHWM"))
        return now * 1024, peak * 1024
    resource: Any = importlib.import_module("resource")  # absent on Windows
    peak = int(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss) * (1 if sys.platform == "darwin" else 1024)
    return peak, peak


class _Checkpoint:
    """A torch model in float32 and its tokenizer.

    Raises:
        ModelError: transformers cannot load it.
        DependencyError: torch or transformers is not installed.
    """

    def __init__(self, job: Job) -> None:
        transformers = import_part("transformers")
        transformers.logging.set_verbosity_error()
        transformers.logging.disable_progress_bar()
        options: dict[str, Any] = {"revision": job.revision} if job.revision else {}
        try:
            self.tokenizer = transformers.AutoTokenizer.from_pretrained(job.model, **options)
            options["dtype"] = import_part("torch").float32
            auto_class = transformers.AutoModelForSequenceClassification
            self.model = auto_class.from_pretrained(job.model, **options).eval()
        except (OSError, ValueError) as error:
            raise ModelError(f"transformers cannot load {job.model}: {str(error).splitlines()[0]}") from error
        self.max_length = job.max_length
        self.cut = {} if job.max_length is None else {"truncation": True, "max_length": job.max_length}

    def lengths(self, texts: Sequence[Text]) -> tuple[list[int], int]:
        """Return the tokens of every text after truncation, and how many were cut."""
        whole = [len(self.tokenizer(*_columns(text))["input_ids"][0]) for text in texts]
        if self.max_length is None:
            return whole, 0
        return [min(n, self.max_length) for n in whole], sum(n > self.max_length for n in whole)


class TorchEngine:
    """torch, one row at a time, without padding: the reference."""

    ladder: tuple[str, ...] = ()

    def __init__(self, job: Job) -> None:
        self._checkpoint = _Checkpoint(job)
        self.max_length = job.max_length
        self.run(job.texts[:_WARM_UP])

    def run(self, texts: Sequence[Text]) -> Logits:
        """Return the logits of every text. Shape: (row, label)."""
        torch = import_part("torch")
        tokenizer, model, cut = self._checkpoint.tokenizer, self._checkpoint.model, self._checkpoint.cut
        with torch.inference_mode():
            rows = [model(**tokenizer(*_columns(text), return_tensors="pt", **cut)).logits[0].numpy() for text in texts]
        return np.stack(rows)

    def padding(self, texts: Sequence[Text]) -> tuple[float, int]:
        """Return no waste, and the rows longer than the model's maximum."""
        return 0.0, self._checkpoint.lengths(texts)[1]


class SortedTorchEngine:
    """torch on batches of rows of like length: sorted by length, and padded to the longest of each batch."""

    ladder: tuple[str, ...] = ()

    def __init__(self, job: Job) -> None:
        self._checkpoint = _Checkpoint(job)
        self.max_length = job.max_length
        self._batch_size = job.pipeline_batch_size
        self.run(job.texts[:_WARM_UP])

    def run(self, texts: Sequence[Text]) -> Logits:
        """Return the logits of every text, tokenised once and batched by length. Shape: (row, label)."""
        torch = import_part("torch")
        tokenizer, model, cut = self._checkpoint.tokenizer, self._checkpoint.model, self._checkpoint.cut
        columns = [list(texts)] if isinstance(texts[0], str) else [[text[part] for text in texts] for part in (0, 1)]
        encoded = tokenizer(*columns, **cut)
        order = sorted(range(len(texts)), key=lambda row: len(encoded["input_ids"][row]))
        logits = np.zeros((len(texts), model.config.num_labels), dtype=np.float32)
        with torch.inference_mode():
            for start in range(0, len(order), self._batch_size):
                rows = order[start : start + self._batch_size]
                features = [{name: column[row] for name, column in encoded.items()} for row in rows]
                batch = tokenizer.pad(features, return_tensors="pt")
                logits[rows] = model(**batch).logits.numpy()
        return logits

    def padding(self, texts: Sequence[Text]) -> tuple[float, int]:
        """Return the waste of sorted batches padded to their longest row, and the rows longer than the maximum."""
        lengths, truncated = self._checkpoint.lengths(texts)
        return padded_waste(sorted(lengths), self._batch_size), truncated


class PipelineEngine:
    """transformers' pipeline on the CPU, with batches in arrival order."""

    ladder: tuple[str, ...] = ()

    def __init__(self, job: Job) -> None:
        self._checkpoint = _Checkpoint(job)
        self.max_length = job.max_length
        self._batch_size = job.pipeline_batch_size
        model = self._checkpoint.model
        self._n_labels = model.config.num_labels
        model.config.id2label = {index: str(index) for index in range(self._n_labels)}  # names may be alike
        self._pipeline = import_part("transformers").pipeline(
            "text-classification", model=model, tokenizer=self._checkpoint.tokenizer, device="cpu"
        )
        self.run(job.texts[:_WARM_UP])

    def run(self, texts: Sequence[Text]) -> Logits:
        """Return the logits of every text. Shape: (row, label)."""
        inputs = [text if isinstance(text, str) else {"text": text[0], "text_pair": text[1]} for text in texts]
        options = {"batch_size": self._batch_size, "function_to_apply": "none", "top_k": None}
        logits = np.zeros((len(texts), self._n_labels), dtype=np.float32)
        for row, entries in enumerate(self._pipeline(inputs, **options, **self._checkpoint.cut)):
            for entry in entries:
                logits[row, int(entry["label"])] = entry["score"]
        return logits

    def padding(self, texts: Sequence[Text]) -> tuple[float, int]:
        """Return the waste of batches padded to their longest row, and the rows longer than the model's maximum."""
        lengths, truncated = self._checkpoint.lengths(texts)
        return padded_waste(lengths, self._batch_size), truncated


class BucketEngine:
    """The bucketed model."""

    def __init__(self, job: Job) -> None:
        model_class = importlib.import_module("hf_bucket").BucketedModelForSequenceClassification
        self._model = model_class.from_pretrained(job.model, overflow="truncate", **job.options)
        self._truncated = 0

    @property
    def max_length(self) -> int | None:
        """The model's true maximum in tokens; None where it has none."""
        maximum: int | None = self._model.runner.max_length
        return maximum

    @property
    def ladder(self) -> tuple[str, ...]:
        """Names of the buckets."""
        return tuple(bucket.name for bucket in self._model.ladder)

    def run(self, texts: Sequence[Text]) -> Logits:
        """Return the logits of every text. Shape: (row, label)."""
        before = self._model.stats()["truncated"]
        results = self._model.runner(list(texts))
        self._truncated = self._model.stats()["truncated"] - before
        return np.stack([result["logits"] for result in results])

    def padding(self, texts: Sequence[Text]) -> tuple[float, int]:
        """Return the waste of all passes, which is that of each, and the rows cut in the last."""
        return float(self._model.stats()["waste"]), self._truncated


ENGINES: Mapping[str, Callable[[Job], Engine]] = {
    REFERENCE: TorchEngine,
    "torch-sorted": SortedTorchEngine,
    "transformers": PipelineEngine,
    BUCKETED: BucketEngine,
}


def import_part(module: str) -> Any:
    """Import torch or transformers.

    Raises:
        DependencyError: it is not installed.
    """
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        raise missing_part(module, "eval", "an evaluation") from error


def _columns(text: Text) -> tuple[list[str], ...]:
    """Return a text, or both of a pair, as batches of one: outside a batch, transformers drops an empty second text."""
    return ([text],) if isinstance(text, str) else ([text[0]], [text[1]])
