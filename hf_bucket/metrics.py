"""The official GLUE metrics, and how far two systems' logits lie apart."""

from __future__ import annotations

import importlib
import warnings
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from hf_bucket.errors import DataError, missing_part

Numbers: TypeAlias = NDArray[np.int64] | NDArray[np.float64]
Logits: TypeAlias = NDArray[np.float32]

LABELLED = "labelled"  # in place of a GLUE task: a data file of the user's

# Wang et al. 2018, "GLUE: A Multi-Task Benchmark", table 1. MNLI is scored per split, matched and mismatched.
OFFICIAL_METRICS: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {
        "cola": ("matthews",),
        "sst2": ("accuracy",),
        "mrpc": ("accuracy", "f1"),
        "qqp": ("accuracy", "f1"),
        "stsb": ("pearson", "spearman"),
        "mnli": ("accuracy",),
        "qnli": ("accuracy",),
        "rte": ("accuracy",),
        "wnli": ("accuracy",),
        LABELLED: ("accuracy",),
    }
)


def score(task: str, predictions: Numbers, labels: Numbers) -> dict[str, float]:
    """Return the official metrics of a GLUE task by name.

    Args:
        predictions: a label index per row, or for stsb a number of any scale. Shape: (row,).
        labels: what the data set says, in the same terms. Shape: (row,).

    Every metric is in [-1, 1]. F1 counts label 1 as positive; it is 0 when nothing is positive, and Matthews'
    correlation is 0 when one side holds a single label, as scikit-learn defines them.

    Raises:
        DataError: an unknown task, no rows, unequal counts, numbers that are not finite, or a Pearson or Spearman
            correlation with values that are all alike.
        DependencyError: scikit-learn or scipy is not installed.
    """
    if task not in OFFICIAL_METRICS:
        raise DataError(f"task {task!r} is not in GLUE; use one of {', '.join(OFFICIAL_METRICS)}")
    if len(predictions) != len(labels):
        raise DataError(f"got {len(predictions)} predictions for {len(labels)} labels; give one per row")
    if len(labels) == 0:
        raise DataError(f"{task} has no rows to score; give at least one")
    for name, values in (("prediction", predictions), ("label", labels)):
        if not np.isfinite(values).all():
            raise DataError(f"the {name} of row {int(np.argmin(np.isfinite(values)))} is not a finite number")
    return {name: float(_METRICS[name](predictions, labels)) for name in OFFICIAL_METRICS[task]}


def flipped_rows(logits: Logits, reference: Logits) -> list[int]:
    """Return the rows that choose another label than in ``reference``, ascending. Shape of both: (row, label)."""
    return [int(row) for row in np.flatnonzero(logits.argmax(axis=1) != reference.argmax(axis=1))]


def max_delta(logits: Logits, reference: Logits) -> float:
    """Return the largest absolute difference between two sets of logits. Shape of both: (row, label), not empty."""
    return float(np.abs(logits.astype(np.float64) - reference.astype(np.float64)).max())


def padded_waste(lengths: Sequence[int], batch_size: int) -> float:
    """Return the waste of batches in arrival order, each padded to its longest row.

    Args:
        lengths: tokens of every row, at least one row, each of at least one token.
        batch_size: rows per batch; the last batch holds what is left, without padding rows.
    """
    batches = [lengths[start : start + batch_size] for start in range(0, len(lengths), batch_size)]
    return 1.0 - sum(lengths) / sum(len(batch) * max(batch) for batch in batches)


def _accuracy(predictions: Numbers, labels: Numbers) -> float:
    return float(_sklearn().accuracy_score(labels, predictions))


def _f1(predictions: Numbers, labels: Numbers) -> float:
    return float(_sklearn().f1_score(labels, predictions, zero_division=0.0))


def _matthews(predictions: Numbers, labels: Numbers) -> float:
    matthews = _sklearn().matthews_corrcoef
    # scikit-learn returns this 0 too, but warns on the way when both sides hold one and the same label
    return 0.0 if _constant(predictions) or _constant(labels) else float(matthews(labels, predictions))


def _pearson(predictions: Numbers, labels: Numbers) -> float:
    return _correlation("pearson", _scipy().pearsonr, predictions, labels)


def _spearman(predictions: Numbers, labels: Numbers) -> float:
    return _correlation("spearman", _scipy().spearmanr, predictions, labels)


def _correlation(name: str, function: Callable[..., Any], predictions: Numbers, labels: Numbers) -> float:
    """Return a correlation coefficient, or say which side makes it undefined."""
    for side, values in (("predictions", predictions), ("labels", labels)):
        if _constant(values):
            raise DataError(
                f"{name} is undefined: all {len(values)} {side} are {values[0]:g}; it needs at least two different "
                f"{side}, so evaluate more rows or check the model"
            )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # nearly constant values still have a coefficient
        coefficient = float(function(predictions.astype(np.float64), labels.astype(np.float64)).statistic)
    if not np.isfinite(coefficient):
        raise DataError(f"{name} is undefined: the values lie too close together to tell apart; evaluate more rows")
    return coefficient


def _constant(values: Numbers) -> bool:
    return bool((values == values[0]).all())


def _sklearn() -> Any:
    return _import("sklearn.metrics", "scikit-learn")


def _scipy() -> Any:
    return _import("scipy.stats", "scipy")


def _import(module: str, package: str) -> Any:
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        raise missing_part(package, "eval", "scoring a GLUE task") from error


_METRICS: Mapping[str, Callable[[Numbers, Numbers], float]] = MappingProxyType(
    {"accuracy": _accuracy, "f1": _f1, "matthews": _matthews, "pearson": _pearson, "spearman": _spearman}
)
