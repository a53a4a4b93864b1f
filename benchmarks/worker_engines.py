"""What a worker can load: one engine per kind of system, strings in, labels out.

It needs Python 3.10 and imports the packages of its own system only when that is loaded.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """What a system is given.

    Attributes:
        engine: a key of ``ENGINES``.
        model: folder of the checkpoint.
        prepared: folder for what was exported from it.
        data: JSON file with ``texts`` and ``calibration``, each a list of strings or of pairs of strings.
        max_length: tokens that a text is cut to.
        full_length: tokens that a system pads to that pads everything alike.
        threads: cores that this process may use.
        options: of the engine.
    """

    engine: str
    model: str
    prepared: str
    data: str
    max_length: int
    full_length: int
    threads: int
    options: Mapping[str, Any] = field(default_factory=dict)


class Engine(Protocol):
    """A loaded system."""

    def labels(self, texts: Sequence[Any]) -> list[str]:
        """Return the label of every text: what is timed."""

    def logits(self, texts: Sequence[Any]) -> tuple[Any, int | None]:
        """Return the logits of every text, shape (row, label), and the cells computed, or None if it cannot say."""


def columns(texts: Sequence[Any]) -> tuple[list[str], ...]:
    """Return texts as a tokenizer takes them: one list, or for pairs two."""
    return (list(texts),) if isinstance(texts[0], str) else tuple([text[part] for text in texts] for part in (0, 1))


@contextmanager
def counted(model: Any) -> Iterator[list[int]]:
    """Lend a list that receives the cells of every ``model.forward`` while the context lasts."""
    cells: list[int] = []
    forward = model.forward

    def counting(*args: Any, **kwargs: Any) -> Any:
        ids = kwargs.get("input_ids", args[0] if args else None)
        cells.append(1 if ids is None else int(ids.shape[0] * ids.shape[1]))
        return forward(*args, **kwargs)

    model.forward = counting
    try:
        yield cells
    finally:
        model.forward = forward


class Batches:
    """Texts in batches of ``batch_size``, through a function from padded inputs to logits.

    Options: ``sort`` by length, ``pad`` to the ``"longest"`` row of a batch or ``"all"`` rows to one length.
    """

    def __init__(self, job: Job, labels: Mapping[int, str], forward: Callable[[dict[str, Any]], Any]) -> None:
        self._tokenizer = tokenizer(job)
        self._job = job
        self._labels = labels
        self._forward = forward
        self._batch_size = int(job.options.get("batch_size", 32))

    def labels(self, texts: Sequence[Any]) -> list[str]:
        """Return the label of every text, by softmax and the largest probability."""
        import numpy as np

        logits, _ = self.logits(texts)
        exponents = np.exp(logits - logits.max(axis=1, keepdims=True))
        probabilities = exponents / exponents.sum(axis=1, keepdims=True)
        return [self._labels[int(index)] for index in probabilities.argmax(axis=1)]

    def logits(self, texts: Sequence[Any]) -> tuple[Any, int | None]:
        """Return the logits in the texts' order, and the cells computed."""
        import numpy as np

        encoded = self._tokenizer(*columns(texts), truncation=True, max_length=self._job.max_length)
        lengths = [len(ids) for ids in encoded["input_ids"]]
        order = list(range(len(texts)))
        if self._job.options.get("sort", True):
            order.sort(key=lengths.__getitem__)
        logits, cells = np.zeros((len(texts), len(self._labels)), dtype=np.float32), 0
        for start in range(0, len(order), self._batch_size):
            rows = order[start : start + self._batch_size]
            longest = max(lengths[row] for row in rows)
            width = self._job.full_length if self._job.options.get("pad") == "all" else longest
            logits[rows] = self._forward(self._padded(encoded, rows, width))
            cells += len(rows) * width
        return logits, cells

    def _padded(self, encoded: Mapping[str, Any], rows: Sequence[int], width: int) -> dict[str, Any]:
        """Return the inputs of some rows as int64 tensors. Shape of each: (row, token)."""
        import numpy as np
        import torch

        fillers = {"input_ids": self._tokenizer.pad_token_id, "token_type_ids": self._tokenizer.pad_token_type_id}
        batch = {}
        for name, column in encoded.items():
            array = np.full((len(rows), width), fillers.get(name, 0), dtype=np.int64)
            for place, row in enumerate(rows):
                array[place, : len(column[row])] = column[row]
            batch[name] = torch.from_numpy(array)
        return batch


class Pipeline:
    """transformers' pipeline over any model it takes, in batches of ``batch_size`` in arrival order."""

    def __init__(self, job: Job, model: Any) -> None:
        import transformers

        self._model = model
        self._options = {
            "batch_size": int(job.options["batch_size"]),
            "truncation": True,
            "max_length": job.max_length,
        }
        self._pipeline = transformers.pipeline("text-classification", model=model, tokenizer=tokenizer(job))

    def labels(self, texts: Sequence[Any]) -> list[str]:
        """Return the label of every text."""
        return [answer["label"] for answer in self._pipeline(as_inputs(texts), **self._options)]

    def logits(self, texts: Sequence[Any]) -> tuple[Any, int | None]:
        """Return the logits, and the cells computed."""
        with counted(self._model) as cells:
            answers = self._pipeline(as_inputs(texts), function_to_apply="none", top_k=None, **self._options)
        return as_logits(answers, self._model.config.label2id), sum(cells)


class CrossEncoder:
    """sentence-transformers' CrossEncoder with one of its backends; it sorts by length itself."""

    def __init__(self, job: Job) -> None:
        self._encoder = cross_encoder(job, exported=job.options["backend"] != "torch")
        self._labels = labels_of(job)
        self._batch_size = int(job.options.get("batch_size", 32))

    def labels(self, texts: Sequence[Any]) -> list[str]:
        """Return the label of every pair."""
        return [self._labels[int(index)] for index in self._predict(texts, apply_softmax=True).argmax(axis=1)]

    def logits(self, texts: Sequence[Any]) -> tuple[Any, int | None]:
        """Return the logits, and the cells computed."""
        inner = next(module.auto_model for module in self._encoder.modules() if hasattr(module, "auto_model"))
        with counted(inner) as cells:
            return self._predict(texts, apply_softmax=False), sum(cells) or None

    def _predict(self, texts: Sequence[Any], *, apply_softmax: bool) -> Any:
        if isinstance(texts[0], str):
            raise TypeError("CrossEncoder.predict scores pairs of texts; these are single texts")
        return self._encoder.predict(
            [tuple(text) for text in texts],
            batch_size=self._batch_size,
            apply_softmax=apply_softmax,
            show_progress_bar=False,
        )


class Bucketed:
    """hf_bucket's pipeline; the options are its keywords."""

    def __init__(self, job: Job, calibration: Sequence[Any]) -> None:
        import hf_bucket

        options = dict(job.options)
        if options.get("buckets") == "auto":
            options["calibration_dataset"] = as_inputs(calibration)
        self._pipeline = hf_bucket.pipeline(
            model=job.model, truncation=True, max_length=job.max_length, local_files_only=True, **options
        )
        self._label_ids = {label: index for index, label in labels_of(job).items()}

    def labels(self, texts: Sequence[Any]) -> list[str]:
        """Return the label of every text."""
        return [answer["label"] for answer in self._pipeline(as_inputs(texts))]

    def logits(self, texts: Sequence[Any]) -> tuple[Any, int | None]:
        """Return the logits, and the cells computed."""
        before = self._cells()
        answers = self._pipeline(as_inputs(texts), function_to_apply="none", top_k=None)
        return as_logits(answers, self._label_ids), self._cells() - before

    def _cells(self) -> int:
        stats = self._pipeline.stats()
        return int(stats["real_tokens"] + stats["padded_tokens"])


def as_inputs(texts: Sequence[Any]) -> list[Any]:
    """Return texts as pipelines take them: strings, or for pairs dicts."""
    return [text if isinstance(text, str) else {"text": text[0], "text_pair": text[1]} for text in texts]


def as_logits(answers: Any, label_ids: Mapping[str, int]) -> Any:
    """Return what a pipeline answered without softmax as an array. Shape: (row, label)."""
    import numpy as np

    logits = np.zeros((len(answers), len(label_ids)), dtype=np.float32)
    for row, answer in enumerate(answers):
        for entry in answer:
            logits[row, label_ids[entry["label"]]] = entry["score"]
    return logits


def labels_of(job: Job) -> dict[int, str]:
    """Return the labels that the checkpoint's config names, by index."""
    config = json.loads((Path(job.model) / "config.json").read_text(encoding="utf-8"))
    names = config.get("id2label") or {str(index): f"LABEL_{index}" for index in range(2)}
    return {int(index): str(name) for index, name in names.items()}


def tokenizer(job: Job) -> Any:
    """Return the checkpoint's tokenizer."""
    import transformers

    return transformers.AutoTokenizer.from_pretrained(job.model)


def checkpoint(job: Job) -> Any:
    """Return the checkpoint in torch, float32 whatever it is stored in."""
    import torch
    import transformers

    torch.set_num_threads(job.threads)
    auto_class = transformers.AutoModelForSequenceClassification
    return auto_class.from_pretrained(job.model, dtype=torch.float32).eval()


def session_options(job: Job) -> Any:
    """Return onnxruntime's defaults but for the threads: one per core that may be used, not per core of the machine."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = job.threads
    return options


def openvino_config(job: Job) -> dict[str, str]:
    """Return OpenVINO's settings: one request at a time on all cores, in float32."""
    threads = str(job.threads)
    return {"PERFORMANCE_HINT": "LATENCY", "INFERENCE_PRECISION_HINT": "f32", "INFERENCE_NUM_THREADS": threads}


def load_torch(job: Job) -> Engine:
    """torch in batches, eager or with ``compile``."""
    import torch

    model = checkpoint(job)
    compiled = torch.compile(model, dynamic=True) if job.options.get("compile") else model

    def forward(batch: dict[str, Any]) -> Any:
        with torch.inference_mode():
            return compiled(**batch).logits.numpy()

    return Batches(job, labels_of(job), forward)


def load_pipeline(job: Job) -> Engine:
    """transformers' pipeline over torch."""
    return Pipeline(job, checkpoint(job))


def prepare_exported(job: Job, folder: Path) -> None:
    """Export with transformers' own exporter for ``format``, lengths and batch free."""
    import torch
    from transformers import exporters

    sample = tokenizer(job)(["a first text", "a second, longer text"], padding=True, return_tensors="pt")
    if job.options["format"] == "onnx":
        exporter: Any = exporters.OnnxExporter()
        config: Any = exporters.OnnxConfig(dynamic=True, ort_fusions=job.options.get("ort_fusions"))
    else:
        exporter, config = exporters.OpenVINOExporter(), exporters.OpenVINOConfig(dynamic=True)
    with torch.inference_mode():
        exporter.export(checkpoint(job), dict(sample), config).save_pretrained(folder)


def load_exported(job: Job) -> Engine:
    """transformers' ExportedModel in batches."""
    import torch
    from transformers.exporters import ExportedModel

    torch.set_num_threads(job.threads)
    onnx = job.options["format"] == "onnx"
    settings = {"session_options": session_options(job)} if onnx else {"config": openvino_config(job)}
    model = ExportedModel.from_pretrained(job.prepared).to("cpu", **settings)
    return Batches(job, labels_of(job), lambda batch: model(**batch).logits.numpy())


def prepare_optimum_onnx(job: Job, folder: Path) -> None:
    """Export with optimum-onnx."""
    from optimum.onnxruntime import ORTModelForSequenceClassification

    ORTModelForSequenceClassification.from_pretrained(job.model, export=True).save_pretrained(folder)


def load_optimum_onnx(job: Job) -> Engine:
    """optimum-onnx's model."""
    import torch
    from optimum.onnxruntime import ORTModelForSequenceClassification

    torch.set_num_threads(job.threads)
    return optimum_engine(
        job,
        ORTModelForSequenceClassification.from_pretrained(
            job.prepared, provider="CPUExecutionProvider", session_options=session_options(job)
        ),
    )


def prepare_optimum_intel(job: Job, folder: Path) -> None:
    """Export with optimum-intel, without compressing weights."""
    from optimum.intel import OVModelForSequenceClassification

    model = OVModelForSequenceClassification.from_pretrained(
        job.model, export=True, compile=False, load_in_8bit=False, ov_config=openvino_config(job)
    )
    model.save_pretrained(folder)


def load_optimum_intel(job: Job) -> Engine:
    """optimum-intel's model."""
    import torch
    from optimum.intel import OVModelForSequenceClassification

    torch.set_num_threads(job.threads)
    return optimum_engine(
        job, OVModelForSequenceClassification.from_pretrained(job.prepared, ov_config=openvino_config(job))
    )


def optimum_engine(job: Job, model: Any) -> Engine:
    """A model of optimum's behind transformers' pipeline or in batches, as ``through`` says."""
    if job.options["through"] == "pipeline":
        return Pipeline(job, model)
    return Batches(job, labels_of(job), lambda batch: model(**batch).logits.numpy())


def cross_encoder(job: Job, *, exported: bool) -> Any:
    """Return a CrossEncoder of the checkpoint, or of what was exported from it."""
    import sentence_transformers
    import torch

    torch.set_num_threads(job.threads)
    backend = job.options["backend"]
    model_kwargs: dict[str, Any] = {
        "torch": {"dtype": torch.float32},
        "onnx": {"provider": "CPUExecutionProvider", "session_options": session_options(job)}
        if backend == "onnx"
        else {},
        "openvino": {"ov_config": openvino_config(job)},
    }[backend]
    folder = job.prepared if exported else job.model
    return sentence_transformers.CrossEncoder(
        folder, backend=backend, model_kwargs=model_kwargs, max_length=job.max_length, device="cpu"
    )


def prepare_cross_encoder(job: Job, folder: Path) -> None:
    """Export with sentence-transformers' backend."""
    cross_encoder(job, exported=False).save_pretrained(str(folder))


def load_bucketed(job: Job) -> Engine:
    """hf_bucket."""
    return Bucketed(job, read_data(job)["calibration"])


def prepare_bucketed(job: Job, folder: Path) -> None:
    """Compile into hf_bucket's own cache; the folder stays empty."""
    load_bucketed(job)
    folder.mkdir(parents=True)


ENGINES: Mapping[str, Callable[[Job], Engine]] = {
    "torch": load_torch,
    "pipeline": load_pipeline,
    "exported": load_exported,
    "optimum-onnx": load_optimum_onnx,
    "optimum-intel": load_optimum_intel,
    "cross-encoder": CrossEncoder,
    "hf_bucket": load_bucketed,
}
PREPARES: Mapping[str, Callable[[Job, Path], None]] = {
    "exported": prepare_exported,
    "optimum-onnx": prepare_optimum_onnx,
    "optimum-intel": prepare_optimum_intel,
    "cross-encoder": prepare_cross_encoder,
    "hf_bucket": prepare_bucketed,
}


def read_data(job: Job) -> dict[str, Any]:
    """Return the texts and the calibration texts."""
    return dict(json.loads(Path(job.data).read_text(encoding="utf-8")))
