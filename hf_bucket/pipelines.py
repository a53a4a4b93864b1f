"""``pipeline("text-classification", ...)``: transformers' pipeline, over the main path."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Sized
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from itertools import islice
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hf_bucket.batch import Features
from hf_bucket.compile import CompileOptions, compile_model, say
from hf_bucket.encode import Text, Truncation, check_text
from hf_bucket.errors import InputError, InputTypeError, ModelError, ProviderError
from hf_bucket.export import Dtype
from hf_bucket.ladder import Ladder
from hf_bucket.overflow import OverflowLike, Strategy, make_overflow
from hf_bucket.quantize import Scheme
from hf_bucket.runner import MEASURE_S, Runner, RunOptions
from hf_bucket.session_ort import EngineOptions, Mode
from hf_bucket.source import DEFAULT_MODEL, Source
from hf_bucket.tasks import get_task

Logits = NDArray[np.float32]


def _softmax(logits: Logits) -> Logits:
    exponents = np.exp(logits - logits.max(axis=-1, keepdims=True))
    result: Logits = exponents / exponents.sum(axis=-1, keepdims=True)
    return result


def _sigmoid(logits: Logits) -> Logits:
    return np.float32(1.0) / (np.float32(1.0) + np.exp(-logits))


FUNCTIONS: Mapping[str, Callable[[Logits], Logits]] = {
    "softmax": _softmax,
    "sigmoid": _sigmoid,
    "none": lambda logits: logits,
}

_STRATEGIES: Mapping[object, Strategy] = {
    True: "longest_first",
    "longest_first": "longest_first",
    "only_first": "only_first",
    "only_second": "only_second",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class CallOptions:
    """How texts become labels; the arguments of transformers' pipeline under their names.

    Attributes:
        top_k: labels per text, best first; None gives all; ``""`` gives the best one alone, not in a list.
        function_to_apply: ``"softmax"``, ``"sigmoid"``, ``"none"``; ``"default"`` follows the model's problem type.
        truncation: True or a strategy cuts texts to ``max_length``, False forbids it; None leaves it to ``overflow``.
        max_length: in tokens; None is the model's maximum.
    """

    top_k: int | str | None = ""
    function_to_apply: str = "default"
    truncation: bool | str | None = None
    max_length: int | None = None

    def __post_init__(self) -> None:
        if self.top_k not in ("", None) and (not isinstance(self.top_k, int) or self.top_k < 1):
            raise InputError(f"top_k must be a number of at least 1, or None for all labels; got {self.top_k!r}")
        if self.function_to_apply not in ("default", *FUNCTIONS):
            known = ", ".join(("default", *FUNCTIONS))
            raise InputError(f"function_to_apply must be one of {known}; got {self.function_to_apply!r}")
        if self.truncation not in (None, False, "do_not_truncate", *_STRATEGIES):
            known = ", ".join(map(str, _STRATEGIES))
            raise InputError(f"truncation must be one of {known}, False; got {self.truncation!r}")
        if self.max_length is not None and (not isinstance(self.max_length, int) or self.max_length < 1):
            raise InputError(f"max_length must be a number of tokens of at least 1, got {self.max_length!r}")


class TextClassificationPipeline:
    """Classifies texts; results have the type, keys and order of transformers' pipeline of the same name.

    Args:
        runner: runs the model.
        defaults: options of calls that do not say otherwise.
        overflow: what happens to a text longer than the largest bucket.
        window: texts of a stream that are read ahead: half of them run while the other half is tokenised.
    """

    task = "text-classification"

    def __init__(
        self, runner: Runner, defaults: CallOptions, *, overflow: OverflowLike = "truncate", window: int = 1024
    ) -> None:
        if window < 1:
            raise InputError(f"window must be a number of texts of at least 1, got {window!r}")
        self.runner = runner
        self._defaults = defaults
        self._overflow = make_overflow(overflow)
        self._window = window

    def __call__(
        self,
        inputs: Any,
        *,
        top_k: int | str | None = "",
        function_to_apply: str | None = None,
        truncation: bool | str | None = None,
        max_length: int | None = None,
        padding: object = None,
        batch_size: int | None = None,
        num_workers: int | None = None,
    ) -> Any:
        """Return the labels of one text, of a list, or of a stream.

        Args:
            inputs: a string, a dict with ``text`` and ``text_pair``, a list of these; or a generator, data set,
                ``KeyDataset`` or column of these, which is read lazily and answered by an iterator.
            top_k, function_to_apply, truncation, max_length: see ``CallOptions``.
            padding, batch_size, num_workers: accepted for the sake of code written for transformers; the ladder
                decides instead of them.

        Returns:
            ``{"label": str, "score": float}`` per text, or a list of these when ``top_k`` is given.

        Raises:
            InputTypeError: something else than text; the message names its position.
            TooLongError: a text fits no bucket and may not be cut.
        """
        given: dict[str, Any] = {} if top_k == "" else {"top_k": top_k}
        others = {"function_to_apply": function_to_apply, "truncation": truncation, "max_length": max_length}
        given.update({name: value for name, value in others.items() if value is not None})
        options = replace(self._defaults, **given) if given else self._defaults
        if isinstance(inputs, (str, Mapping)):
            text = check_text(dict(inputs) if isinstance(inputs, Mapping) else inputs, 0)
            result = self._classify([text], options, 0)[0]
            # transformers wraps the result of a single string, but not of a dict, unless this call sets top_k
            return [result] if isinstance(inputs, str) and top_k == "" else result
        if isinstance(inputs, list):
            return list(self._stream(inputs, options))
        if inputs is None or isinstance(inputs, (bytes, int, float, tuple)) or not _is_iterable(inputs):
            raise InputTypeError(
                f"inputs is a {type(inputs).__name__}; expected a string, a dict with text and text_pair, a list of "
                f"these, a generator or a data set"
            )
        return Stream(self._stream(_items(inputs), options), len(inputs) if isinstance(inputs, Sized) else None)

    @property
    def ladder(self) -> Ladder:
        """The buckets of the model."""
        return self.runner.ladder

    def stats(self) -> dict[str, Any]:
        """Return what was run so far: see ``Runner.stats``."""
        return self.runner.stats()

    def close(self) -> None:
        """Release the sessions' memory; a later call opens them again."""
        self.runner.close()

    def _stream(self, items: Iterable[object], options: CallOptions) -> Iterator[Any]:
        """Yield results in order; the next texts are tokenised while those before them run.

        At most ``window`` texts are read ahead, unless they are all there; an error comes after the results before it.
        """
        iterator, row = iter(items), 0
        size = self._window if isinstance(items, list) else max(1, self._window // 2)
        ready: Callable[[], Features] | None = None
        while True:
            texts: list[Text] = []
            try:
                for item in islice(iterator, size):
                    texts.append(check_text(item, row + len(texts)))
            except Exception:
                if ready is not None:
                    yield from self._run(ready(), options)
                yield from self._run(self._encode(texts, options, row), options)
                raise
            following: Callable[[], Features] = partial(self._encode, texts, options, row)
            if ready is not None:
                following = _begun(following) if texts else following
                yield from self._run(ready(), options)
            if not texts:
                return
            row += len(texts)
            ready = following

    def _classify(self, texts: Sequence[Text], options: CallOptions, first_row: int) -> list[Any]:
        return self._run(self._encode(texts, options, first_row), options)

    def _encode(self, texts: Sequence[Text], options: CallOptions, first_row: int) -> Features:
        truncation = self._truncation(options)
        refuse = options.truncation in (False, "do_not_truncate")
        overflow = make_overflow("error") if refuse else self._overflow
        return self.runner.encode(texts, truncation=truncation, overflow=overflow, first_row=first_row)

    def _run(self, features: Features, options: CallOptions) -> list[Any]:
        rows = self.runner.run(features)
        if not rows:
            return []
        logits = np.array([row["logits"] for row in rows], dtype=np.float32)
        return self._labels(FUNCTIONS[self._function(options)](logits), options)

    def _truncation(self, options: CallOptions) -> Truncation | None:
        if options.truncation not in _STRATEGIES or not options.truncation:
            return None
        limit = options.max_length or self.runner.max_length or self.ladder.max_length
        return Truncation(max_length=limit, strategy=_STRATEGIES[options.truncation], side=self.runner.side)

    def _function(self, options: CallOptions) -> str:
        if options.function_to_apply != "default":
            return options.function_to_apply
        manifest = self.runner.artifact.manifest
        if manifest.problem_type == "regression":
            return "none"
        if manifest.problem_type == "multi_label_classification" or len(manifest.labels) == 1:
            return "sigmoid"
        return "softmax"

    def _labels(self, scores: NDArray[Any], options: CallOptions) -> list[Any]:
        """Return what is answered for every row. Shape of ``scores``: (row, label)."""
        names = self.runner.artifact.manifest.labels
        if options.top_k == "":
            rows = zip(scores.argmax(axis=1).tolist(), scores.tolist(), strict=True)
            return [{"label": names[index], "score": row[index]} for index, row in rows]
        order = np.argsort(-scores, axis=1, kind="stable")[:, : options.top_k if options.top_k else None]
        best = np.take_along_axis(scores, order, axis=1).tolist()
        return [
            [{"label": names[index], "score": score} for index, score in zip(*row, strict=True)]
            for row in zip(order.tolist(), best, strict=True)
        ]


def _begun(call: Callable[[], Features]) -> Callable[[], Features]:
    """Start a call in a thread of its own, which ends with it; return what waits for the result."""
    executor = ThreadPoolExecutor(1, thread_name_prefix="hf_bucket-tokens")
    future = executor.submit(call)
    executor.shutdown(wait=False)
    return future.result


class Stream:
    """Results of a stream, in order, computed as they are asked for; has a length if the inputs had one."""

    def __init__(self, results: Iterator[Any], length: int | None) -> None:
        self._results = results
        self._length = length

    def __iter__(self) -> Iterator[Any]:
        return self

    def __next__(self) -> Any:
        return next(self._results)

    def __len__(self) -> int:
        if self._length is None:
            raise TypeError("this stream has no length: its inputs have none")
        return self._length


def _is_iterable(value: object) -> bool:
    return hasattr(value, "__iter__") or hasattr(value, "__getitem__")


def _items(inputs: Any) -> Iterator[object]:
    """Return the items of a stream; a torch data set may know its length but not where to stop."""
    if hasattr(inputs, "__iter__"):
        yield from inputs
    else:
        yield from (inputs[index] for index in range(len(inputs)))


def pipeline(
    task: str = "text-classification",
    model: Any = None,
    tokenizer: Any = None,
    *,
    buckets: int | str | Sequence[object] | None = None,
    batch_sizes: Sequence[int] | str | None = None,
    calibration_dataset: Iterable[object] | None = None,
    n_buckets: int = 8,
    mode: Mode = "shared",
    provider: str = "auto",
    provider_options: Mapping[str, str] | None = None,
    threads: int = 0,
    workers: int = 0,
    overflow: OverflowLike = "truncate",
    warmup: bool = True,
    measure_s: float = MEASURE_S,
    memory_bytes: int | None = None,
    window: int = 1024,
    export: bool | None = None,
    dtype: Dtype = "float32",
    allow_padding_leak: bool = False,
    quantize: Scheme | None = None,
    revision: str | None = None,
    subfolder: str = "",
    token: str | bool | None = None,
    cache_dir: str | os.PathLike[str] | None = None,
    local_files_only: bool = False,
    trust_remote_code: bool = False,
    device: object = None,
    batch_size: int | None = None,
    num_workers: int | None = None,
    top_k: int | str | None = "",
    function_to_apply: str | None = None,
    truncation: bool | str | None = None,
    max_length: int | None = None,
) -> TextClassificationPipeline:
    """Return a drop-in for transformers' pipeline of the same name that runs on bucketed shapes.

    Args:
        task: ``"text-classification"`` or ``"sentiment-analysis"``.
        model: Hub id, local folder, artifact folder, or a model that ``from_pretrained`` returned. None is the small
            sentiment classifier that comes with the package; a line on standard error says so.
        tokenizer: a fast tokenizer to use instead of the one that came with the model.
        overflow: ``"truncate"`` (the default, counted in ``stats()`` and warned about once), ``"error"``, ``"window"``
            or ``"dynamic"``, with options as ``overflow.Overflow`` has them: ``"truncate:head+tail"``.
        window: texts of a stream that are read ahead: half of them run while the other half is tokenised.
        device: None, -1 or ``"cpu"``; other places are a matter of ``provider``.
        batch_size, num_workers: accepted for the sake of code written for transformers; the ladder decides instead.
        top_k, function_to_apply, truncation, max_length: defaults for every call; see ``CallOptions``.

    All other arguments are those of ``BucketedModelForSequenceClassification.from_pretrained``.

    Raises:
        BucketError: see ``hf_bucket.errors``; the message says what to do.
    """
    row = get_task(task)
    if device not in (None, -1, "cpu") and str(device) != "cpu":
        raise ProviderError(f"device {device!r} cannot be used; leave it out and choose provider= instead")
    defaults = CallOptions(
        top_k=top_k, function_to_apply=function_to_apply or "default", truncation=truncation, max_length=max_length
    )
    if model is None:
        model = DEFAULT_MODEL
        say("no model given: using the default, a small English sentiment classifier")
    if isinstance(model, (str, os.PathLike)):
        source = Source(
            name=os.fspath(model),
            revision=revision,
            subfolder=subfolder,
            token=token,
            cache_dir=None if cache_dir is None else os.fspath(cache_dir),
            local_files_only=local_files_only,
            trust_remote_code=trust_remote_code,
        )
        engine = EngineOptions(
            mode=mode, provider=provider, provider_options=provider_options or {}, threads=threads, workers=workers
        )
        compiling = CompileOptions(
            engine=engine,
            buckets=buckets,
            batch_sizes=batch_sizes,
            n_buckets=n_buckets,
            calibration=calibration_dataset,
            dtype=dtype,
            export=export,
            allow_padding_leak=allow_padding_leak,
            quantize=quantize,
        )
        options = RunOptions(
            engine=engine, overflow=overflow, warmup=warmup, measure_s=measure_s, memory_bytes=memory_bytes
        )
        artifact = compile_model(source, compiling, task=row.name)
        runner = Runner(artifact, options, tokenizer_json=_tokenizer_json(tokenizer))
    elif isinstance(getattr(model, "runner", model), Runner):
        if buckets is not None or calibration_dataset is not None or quantize is not None:
            raise ModelError(
                "buckets and quantize cannot be chosen for a model that is loaded already; pass its name or folder"
            )
        runner = getattr(model, "runner", model)
        if tokenizer is not None:
            runner = Runner(runner.artifact, runner.options, tokenizer_json=_tokenizer_json(tokenizer))
    else:
        raise ModelError(f"model is {model!r}; expected a Hub id, a folder, or a model from from_pretrained")
    return TextClassificationPipeline(runner, defaults, overflow=overflow, window=window)


def _tokenizer_json(tokenizer: Any) -> str | None:
    """Return what a tokenizer object or a folder with ``tokenizer.json`` holds; None for None."""
    if tokenizer is None:
        return None
    if isinstance(tokenizer, (str, os.PathLike)):
        path = os.path.join(os.fspath(tokenizer), "tokenizer.json")
        if not os.path.isfile(path):
            raise ModelError(f"{path} does not exist; pass a tokenizer object, or a folder with a tokenizer.json")
        with open(path, encoding="utf-8") as file:
            return file.read()
    if not hasattr(tokenizer, "backend_tokenizer"):
        raise ModelError(f"{type(tokenizer).__name__} is not a fast tokenizer; use one that has a tokenizer.json")
    return str(tokenizer.backend_tokenizer.to_str())
