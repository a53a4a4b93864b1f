"""Run transformers classifiers at the right shape: compile once for a few lengths, give every text the smallest."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from hf_bucket import errors as errors  # hf_bucket.errors.BucketError, without another import

if TYPE_CHECKING:
    from hf_bucket.collator import BucketBatchSampler, DataCollatorWithBucketing
    from hf_bucket.ladder import Bucket, Ladder
    from hf_bucket.models import BucketedModelForSequenceClassification
    from hf_bucket.pipelines import pipeline
    from hf_bucket.planner import Plan, plan
    from hf_bucket.runner import load

__version__ = "0.1.0"

# Loaded when first asked for, so that ``import hf_bucket`` stays light and ``load`` never imports torch.
_ROOMS = {
    "Bucket": "ladder",
    "BucketBatchSampler": "collator",
    "BucketedModelForSequenceClassification": "models",
    "DataCollatorWithBucketing": "collator",
    "Ladder": "ladder",
    "Plan": "planner",
    "load": "runner",
    "pipeline": "pipelines",
    "plan": "planner",
}

__all__ = [
    "Bucket",
    "BucketBatchSampler",
    "BucketedModelForSequenceClassification",
    "DataCollatorWithBucketing",
    "Ladder",
    "Plan",
    "load",
    "pipeline",
    "plan",
]


def __getattr__(name: str) -> Any:
    if name not in _ROOMS:
        raise AttributeError(f"module 'hf_bucket' has no attribute {name!r}; it has {', '.join(__all__)}")
    value = getattr(importlib.import_module(f"hf_bucket.{_ROOMS[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
