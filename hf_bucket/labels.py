"""Label names of a model and of a data set: which is which, by name."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

from huggingface_hub import hf_hub_download

from hf_bucket.errors import DataError, ModelError
from hf_bucket.source import local_path


def align_labels(
    model_names: Mapping[int, str], task_labels: Sequence[str], label_order: Sequence[str] | None = None
) -> tuple[int, ...]:
    """Return the task's label index of each of the model's, so that ``order[model_index] == task_index``.

    Names are the same when they differ only in case, underscores, hyphens and spaces.

    Args:
        model_names: the model's ``id2label``.
        task_labels: names in the data set's order; empty for a regression, which needs a model with one output.
        label_order: the task's names in the model's order, instead of the model's own names.

    Raises:
        DataError: names that say nothing (``LABEL_0``) without a ``label_order``, or that are not the task's.
    """
    names = [model_names[index] for index in sorted(model_names)]
    listed = ", ".join(names)
    expected = len(task_labels) or 1
    if len(names) != expected:
        kind = f"the labels {', '.join(task_labels)}" if task_labels else "one output, for a regression"
        raise DataError(f"the model has {len(names)} outputs ({listed}); this task needs {kind}")
    if not task_labels:
        if label_order is not None:
            raise DataError(f"label_order is {', '.join(label_order)}, but a regression has no labels; drop it")
        return (0,)
    hint = f"list the task's labels ({', '.join(task_labels)}) in the model's order with --label-order"
    if label_order is None and any(_NAMELESS.fullmatch(_normal(name)) for name in names):
        raise DataError(f"the model's label names ({listed}) do not say which label is which; {hint}")
    indices = {_normal(label): index for index, label in enumerate(task_labels)}
    given = [_normal(name) for name in (names if label_order is None else label_order)]
    if sorted(given) != sorted(indices):
        who = f"the model's labels are {listed}" if label_order is None else f"label_order is {', '.join(label_order)}"
        raise DataError(f"{who}, which are not the task's; {hint}")
    return tuple(indices[name] for name in given)


_NAMELESS = re.compile(r"label\d+")


def _normal(name: str) -> str:
    return re.sub(r"[\s_-]+", "", name).casefold()


def read_label_names(model: str, revision: str | None = None) -> dict[int, str]:
    """Return the label names by index from a checkpoint's ``config.json``, without loading anything else.

    Raises:
        ModelError: no such config, or a compiled artifact, which has no torch weights to compare with.
    """
    folder = local_path(model)
    if (folder / "bucket_config.json").exists():
        raise ModelError(f"{model} is a compiled artifact without torch weights; evaluate the checkpoint it came from")
    try:
        path = folder / "config.json" if folder.is_dir() else hf_hub_download(model, "config.json", revision=revision)
        config = json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ModelError(f"cannot read the config.json of {model}: {str(error).splitlines()[0]}") from error
    unnamed = {index: f"LABEL_{index}" for index in range(int(config.get("num_labels", 2)))}  # as transformers has it
    return {int(index): str(name) for index, name in (config.get("id2label") or unnamed).items()}
