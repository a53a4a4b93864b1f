"""GLUE: its tasks as data, its texts and labels, and the evaluation of a bucketed model on them."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np

from hf_bucket.compile import from_recipe
from hf_bucket.data import read_records, text_of
from hf_bucket.encode import Text
from hf_bucket.errors import DataError, missing_part
from hf_bucket.evaluate import EvalReport, EvalRequest, figures, installed_versions, measure, this_machine
from hf_bucket.labels import align_labels, read_label_names
from hf_bucket.metrics import LABELLED, Logits, Numbers, score
from hf_bucket.recipe import Recipe
from hf_bucket.source import local_path
from hf_bucket.systems import Job, Start, start_worker

HUB_DATASET = "nyu-mll/glue"
CALIBRATION_ROWS = 10_000  # of a train split: QQP and MNLI have 40 times as many, which would plan the same ladder


@dataclass(frozen=True, slots=True, kw_only=True)
class GlueTask:
    """One task of GLUE, in the words of the Hub's ``nyu-mll/glue``.

    Attributes:
        columns: the column of the text and, for pairs, of the text pair.
        labels: label names in the data set's order; empty for a regression.
        splits: names of the splits. GLUE keeps the labels of ``test`` to itself, except MRPC's.
    """

    name: str
    columns: tuple[str, ...]
    labels: tuple[str, ...]
    splits: tuple[str, ...] = ("train", "validation", "test")


GLUE_TASKS = (
    GlueTask(name="cola", columns=("sentence",), labels=("unacceptable", "acceptable")),
    GlueTask(name="sst2", columns=("sentence",), labels=("negative", "positive")),
    GlueTask(name="mrpc", columns=("sentence1", "sentence2"), labels=("not_equivalent", "equivalent")),
    GlueTask(name="qqp", columns=("question1", "question2"), labels=("not_duplicate", "duplicate")),
    GlueTask(name="stsb", columns=("sentence1", "sentence2"), labels=()),
    GlueTask(
        name="mnli",
        columns=("premise", "hypothesis"),
        labels=("entailment", "neutral", "contradiction"),
        splits=("train", "validation_matched", "validation_mismatched", "test_matched", "test_mismatched"),
    ),
    GlueTask(name="qnli", columns=("question", "sentence"), labels=("entailment", "not_entailment")),
    GlueTask(name="rte", columns=("sentence1", "sentence2"), labels=("entailment", "not_entailment")),
    GlueTask(name="wnli", columns=("sentence1", "sentence2"), labels=("not_entailment", "entailment")),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class TaskData:
    """One split of one task; ``texts[row]`` belongs to ``labels[row]``.

    Attributes:
        texts: a string per row, or a pair where the task has two columns.
        labels: label indices in the data set's order (int64), or for a regression numbers (float64). Shape: (row,).
    """

    task: GlueTask
    split: str
    texts: list[Text]
    labels: Numbers


def evaluate(
    request: EvalRequest,
    *,
    start: Start = start_worker,
    say: Callable[[str], None] = lambda line: None,
) -> EvalReport:
    """Measure torch, alone and in sorted batches, transformers' pipeline and the bucketed model on a GLUE task.

    Args:
        start: starts one system and waits until it has loaded; by default in a process of its own.
        say: receives one line per step.

    Raises:
        BucketError: data, label names or a model that cannot be used, or a system that failed.
    """
    names = read_label_names(request.model, request.revision)
    if request.data is not None:
        parts = [load_labelled(request, names)]
        task = parts[0].task
    else:
        task = get_glue_task(request.task)
        parts = _load_parts(task, request)
    for part in parts:
        score(task.name, part.labels, part.labels)  # what cannot be scored fails here, before the long work
    order = align_labels(names, task.labels, request.label_order if request.data is None else task.labels)
    calibration = _calibration(task, request, parts)
    measured = measure(_job(request, parts, calibration), rounds=request.rounds, start=start, say=say)
    return EvalReport(
        task=task.name,
        split=_split_names(parts),
        n=len(_all_texts(parts)),
        model=request.model,
        revision=request.revision,
        labels=tuple(task.labels[index] for index in order) if task.labels else (),
        calibration="the recipe's" if request.calibration is not None else _split_names(calibration) or None,
        ladder=measured.ladder,
        max_length=measured.max_length,
        rounds=request.rounds,
        pipeline_batch_size=request.pipeline_batch_size,
        command=request.command,
        versions=installed_versions(),
        machine=this_machine(),
        quantize=request.quantize,
        systems=tuple(
            figures(measured, system, _score(parts, order, measured.logits(system))) for system in measured.passes
        ),
    )


def request_of(recipe: Recipe) -> dict[str, Any]:
    """Return what a recipe says of an evaluation, as fields of ``EvalRequest``; without a section, only of the model.

    Raises:
        DataError: the calibration data cannot be read.
    """
    source, compiling = from_recipe(recipe)
    fields: dict[str, Any] = {
        "model": source.name,
        "revision": source.revision,
        "buckets": compiling.buckets,
        "batch_sizes": compiling.batch_sizes,
        "n_buckets": compiling.n_buckets,
        "calibration": compiling.calibration,
        "mode": recipe.mode,
        "provider": recipe.provider,
    }
    check = recipe.evaluate
    if check is not None:
        fields.update(task=check.glue, split=check.split, data_dir=check.data_dir, rounds=check.rounds)
        fields["label_order"] = check.label_order
    return {name: value for name, value in fields.items() if value is not None}


def get_glue_task(name: str) -> GlueTask:
    """Return the task called ``name``.

    Raises:
        DataError: no such task.
    """
    for task in GLUE_TASKS:
        if task.name == name:
            return task
    raise DataError(f"task {name!r} is not in GLUE; use one of {', '.join(task.name for task in GLUE_TASKS)}")


def expand_split(task: GlueTask, split: str) -> tuple[str, ...]:
    """Return the splits that ``split`` stands for: those joined by ``+``, and both halves of MNLI's ``validation``."""
    expanded: list[str] = []
    for part in split.split("+"):
        halves = [name for name in task.splits if name.startswith(f"{part}_")]
        expanded.extend(halves or [part])
    return tuple(dict.fromkeys(expanded))


def load_task(task: str, split: str, *, data_dir: Path | None = None, limit: int | None = None) -> TaskData:
    """Return one labelled split.

    Args:
        data_dir: folder with ``<task>/<split>.parquet`` or ``<split>.parquet`` (or .csv, .jsonl); None asks the Hub.
        limit: rows to return at most, from the first.

    Raises:
        DataError: an unknown task, a missing file, split or column, a split without labels, or a bad value.
        DependencyError: datasets is not installed.
    """
    row = get_glue_task(task)
    if data_dir is None:
        columns, source = _read_hub(row, split, limit), f"{HUB_DATASET} {task} {split}"
    else:
        path = _find_file(data_dir, task, split)
        if path is None:
            raise _no_file(data_dir, task, split)
        columns, source = _read_file(path, limit), str(path)
    missing = [name for name in (*row.columns, "label") if name not in columns]
    if missing:
        raise DataError(
            f"{source} has no column {missing[0]!r}; it has {', '.join(columns)}, and {task} needs "
            f"{', '.join((*row.columns, 'label'))}"
        )
    if not columns["label"]:
        raise DataError(f"{source} has no rows; give a split with at least one")
    labels = _labels(columns["label"], row, source)
    return TaskData(task=row, split=split, texts=_texts(columns, row, source), labels=labels)


def load_labelled(request: EvalRequest, names: Mapping[int, str]) -> TaskData:
    """Return the rows of a data file of the user's, whose labels are the model's own, by name or by index.

    Raises:
        DataError: a malformed row, a missing column, or a label that the model does not have.
    """
    path, column, pair = Path(str(request.data)), request.column, request.pair_column
    labels = tuple(names[index] for index in sorted(names))
    known: dict[object, int] = {name: index for index, name in enumerate(labels)}
    known.update({index: index for index in range(len(labels))})
    texts: list[Text] = []
    found: list[int] = []
    for record in read_records(path):
        if record.error is not None:
            raise DataError(f"{path}:{record.line}: {record.error}")
        if request.label_column not in record.fields:
            raise DataError(f"{path} has no column {request.label_column!r}; it has {', '.join(record.fields)}")
        label = record.fields[request.label_column]
        if label not in known:
            raise DataError(f"{path}:{record.line}: label {label!r} is not one of the model's: {', '.join(labels)}")
        texts.append(text_of(record, column, pair))
        found.append(known[label])
        if len(texts) == request.limit:
            break
    if not texts:
        raise DataError(f"{path} has no rows; give a file with at least one")
    columns = (column,) if pair is None else (column, pair)
    task = GlueTask(name=LABELLED, columns=columns, labels=labels, splits=(path.name,))
    return TaskData(task=task, split=path.name, texts=texts, labels=np.asarray(found, dtype=np.int64))


def _load_parts(task: GlueTask, request: EvalRequest) -> list[TaskData]:
    splits = expand_split(task, request.split)
    return [load_task(task.name, split, data_dir=request.data_dir, limit=request.limit) for split in splits]


def _calibration(task: GlueTask, request: EvalRequest, parts: Sequence[TaskData]) -> tuple[TaskData, ...]:
    """Return the data to plan a ladder from, or int8: the train split where there is one; empty when none is needed."""
    if (request.buckets != "auto" and request.quantize is None) or request.calibration is not None:
        return ()
    if request.data is not None:
        return tuple(parts)
    if request.data_dir is None or _find_file(request.data_dir, task.name, "train") is not None:
        return (load_task(task.name, "train", data_dir=request.data_dir, limit=CALIBRATION_ROWS),)
    return tuple(parts)


def _job(request: EvalRequest, parts: Sequence[TaskData], calibration: Sequence[TaskData]) -> Job:
    names = ("buckets", "batch_sizes", "n_buckets", "mode", "provider", "revision", "quantize")
    options = {name: getattr(request, name) for name in names if getattr(request, name) is not None}
    if request.calibration is not None:
        options["calibration_dataset"] = request.calibration
    elif calibration:
        texts = _all_texts(calibration)
        options["calibration_dataset"] = [
            text if isinstance(text, str) else {"text": text[0], "text_pair": text[1]} for text in texts
        ]
    return Job(
        model=str(local_path(request.model)) if local_path(request.model).is_dir() else request.model,
        texts=_all_texts(parts),
        revision=request.revision,
        pipeline_batch_size=request.pipeline_batch_size,
        options=options,
    )


def _all_texts(parts: Sequence[TaskData]) -> list[Text]:
    return [text for part in parts for text in part.texts]


def _split_names(parts: Sequence[TaskData]) -> str:
    return "+".join(part.split for part in parts)


def _score(parts: Sequence[TaskData], order: Sequence[int], logits: Logits) -> dict[str, float]:
    """Return the official metrics, of several splits each under ``<metric>_<split>``."""
    metrics: dict[str, float] = {}
    start = 0
    for part in parts:
        own = logits[start : start + len(part.texts)]
        start += len(part.texts)
        predictions = np.asarray(order)[own.argmax(axis=1)] if part.task.labels else own[:, 0].astype(np.float64)
        for name, value in score(part.task.name, predictions, part.labels).items():
            metrics[name if len(parts) == 1 else f"{name}_{part.split}"] = value
    return metrics


def _read_hub(task: GlueTask, split: str, limit: int | None) -> dict[str, list[Any]]:
    """Return the columns of a split on the Hub, or in the Hub's cache when offline."""
    if split not in task.splits:
        raise DataError(f"{HUB_DATASET} {task.name} has no split {split!r}; it has {', '.join(task.splits)}")
    try:
        dataset = _import_datasets("datasets").load_dataset(HUB_DATASET, task.name, split=split)
    except (OSError, ValueError) as error:
        raise DataError(
            f"{HUB_DATASET} {task.name} {split} cannot be had from the Hub ({error}); check the network, or give a "
            f"data_dir with {task.name}/{split}.parquet"
        ) from error
    names = getattr(dataset.features.get("label"), "names", None)
    if names is not None and tuple(names) != task.labels:
        raise DataError(f"{HUB_DATASET} {task.name} now labels {', '.join(names)}; expected {', '.join(task.labels)}")
    return dict(dataset[:limit])


def _read_file(path: Path, limit: int | None) -> dict[str, list[Any]]:
    """Return the columns of a .parquet, .csv or .jsonl file. pyarrow comes with datasets."""
    try:
        table = _READERS[path.suffix](path)
    except (OSError, ValueError) as error:
        raise DataError(f"{path} cannot be read: {error}") from error
    columns: dict[str, list[Any]] = (table if limit is None else table.slice(0, limit)).to_pydict()
    return columns


def _read_parquet(path: Path) -> Any:
    return _import_datasets("pyarrow.parquet").read_table(path)


def _read_csv(path: Path) -> Any:
    csv = _import_datasets("pyarrow.csv")
    columns = [column for task in GLUE_TASKS for column in task.columns]
    return csv.read_csv(
        path,
        parse_options=csv.ParseOptions(newlines_in_values=True),
        convert_options=csv.ConvertOptions(column_types=dict.fromkeys(columns, "string")),  # a text may be "1" or "NA"
    )


def _read_jsonl(path: Path) -> Any:
    return _import_datasets("pyarrow.json").read_json(path)


_READERS: Mapping[str, Callable[[Path], Any]] = MappingProxyType(
    {".parquet": _read_parquet, ".csv": _read_csv, ".jsonl": _read_jsonl}
)


def _import_datasets(module: str) -> Any:
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        raise missing_part("datasets", "eval", "loading GLUE") from error


def _find_file(data_dir: Path, task: str, split: str) -> Path | None:
    """Return the file of a split: in the task's own folder, or in ``data_dir`` itself."""
    places = [folder / f"{split}{suffix}" for folder in (data_dir / task, data_dir) for suffix in _READERS]
    return next((path for path in places if path.is_file()), None)


def _no_file(data_dir: Path, task: str, split: str) -> DataError:
    if not data_dir.is_dir():
        return DataError(f"{data_dir} is not a folder; expected one with {task}/{split}.parquet (or .csv, .jsonl)")
    places = [path for path in (*data_dir.glob("*"), *data_dir.glob("*/*")) if path.suffix in _READERS]
    found = ", ".join(sorted(path.relative_to(data_dir).as_posix() for path in places)) or "no data file"
    return DataError(f"{data_dir} has no {task}/{split}.parquet (nor .csv, .jsonl); it has {found}")


def _texts(columns: Mapping[str, list[Any]], task: GlueTask, source: str) -> list[Text]:
    for name in task.columns:
        for row, value in enumerate(columns[name]):
            if not isinstance(value, str):
                raise DataError(f"row {row} of column {name!r} in {source} holds {value!r}; expected a text")
    if len(task.columns) == 1:
        return list(columns[task.columns[0]])
    first, second = (columns[name] for name in task.columns)
    return list(zip(first, second, strict=True))


def _labels(values: Sequence[Any], task: GlueTask, source: str) -> Numbers:
    """Return labels as numbers; GLUE marks a row whose label it keeps to itself with -1."""
    unlabelled = sum(value is None or value == -1 for value in values)
    if unlabelled:
        raise DataError(
            f"{source} has no labels ({unlabelled} of {len(values)} rows hold -1 or nothing); evaluate a split that "
            f"has, such as {next(name for name in task.splits if name.startswith('validation'))}"
        )
    expected = f"0 to {len(task.labels) - 1}" if task.labels else "a number"
    for row, value in enumerate(values):
        known = value in range(len(task.labels)) if task.labels else isinstance(value, (int, float))
        if not known:
            raise DataError(f"the label of row {row} in {source} is {value!r}; expected {expected}")
    return np.asarray(values, dtype=np.int64) if task.labels else np.asarray(values, dtype=np.float64)
