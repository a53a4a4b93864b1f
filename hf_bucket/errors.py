"""Every error hf_bucket raises on purpose; each message says what was got, what was expected and what to do next.

    BucketError
    +-- LadderError       (ValueError)    buckets that are empty, doubled, unreachable or beyond the model's maximum
    +-- TooLongError      (ValueError)    an input longer than the largest bucket
    +-- InputError        (ValueError)    an input no model could take
    |   +-- InputTypeError (TypeError)    ... because it is not text, or not the right kind of array
    +-- ModelError        (ValueError)    a checkpoint without the head, the tokenizer or the pad token that is needed
    +-- ExportError       (RuntimeError)  a model that could not be exported, or whose graph differs from torch
    |   +-- PaddingLeakError              ... because its own answer changes when a row is padded
    +-- ArtifactError     (OSError)       an artifact that is missing, damaged, altered or from a newer version
    +-- ProviderError     (ValueError)    an execution provider that is unknown or not installed
    +-- DataError         (ValueError)    a data set without the column, split or label names that are needed
    +-- RecipeError       (ValueError)    a recipe with an unknown key, a wrong type or an impossible value
    +-- DependencyError   (ImportError)   an optional part that is not installed

BucketWarning (UserWarning) is the category of every warning.
"""

from __future__ import annotations


class BucketError(Exception):
    """Base of every error raised on purpose."""


class LadderError(BucketError, ValueError):
    """The buckets asked for cannot be a ladder for this model."""


class TooLongError(BucketError, ValueError):
    """An input is longer than the largest bucket."""


class InputError(BucketError, ValueError):
    """An input cannot be run."""


class InputTypeError(InputError, TypeError):
    """An input has the wrong type."""


class ModelError(BucketError, ValueError):
    """A checkpoint cannot be used for this task."""


class ExportError(BucketError, RuntimeError):
    """A model could not be turned into a graph that gives the same answer."""


class PaddingLeakError(ExportError):
    """A model's own answer changes when a row is padded."""


class ArtifactError(BucketError, OSError):
    """An artifact is missing, damaged, altered or written by a newer version."""


class ProviderError(BucketError, ValueError):
    """An execution provider, device or engine option is not available."""


class DataError(BucketError, ValueError):
    """A data set lacks what was asked of it."""


class RecipeError(BucketError, ValueError):
    """A recipe cannot be followed; the message names file, line and key."""


class DependencyError(BucketError, ImportError):
    """An optional part is not installed."""


class BucketWarning(UserWarning):
    """Something the user should know once; the result is still right."""


def missing_part(package: str, extra: str, purpose: str) -> DependencyError:
    """Return the error that names the command which installs ``package`` through ``extra``."""
    return DependencyError(f'{purpose} needs {package}, which is not installed; run: pip install "hf-bucket[{extra}]"')


def too_long(length: int, largest: int, *, maximum: int | None, row: int | None = None) -> TooLongError:
    """Return the error for an input of ``length`` tokens.

    Args:
        largest: tokens the largest bucket holds.
        maximum: tokens the model itself can hold; None where it has no limit.
        row: position of the input in the request, when there is more than one.
    """
    who = "an input" if row is None else f"input {row}"
    got = f"{who} has {length} tokens but the largest bucket holds {largest}"
    if maximum is not None and length > maximum:
        return TooLongError(f'{got} and this model\'s maximum is {maximum}; pass overflow="truncate" or shorten it')
    limit = "" if maximum is None else f" (this model's maximum is {maximum})"
    return TooLongError(f'{got}; pass overflow="truncate", or add a bucket of length >= {length}{limit}')


def not_finite(bucket: str, where: str = "") -> ModelError:
    """Return the error for logits that are infinite or not numbers.

    Args:
        bucket: name of the bucket that returned them.
        where: the input they belong to, such as ``", line 7"``.
    """
    return ModelError(
        f"bucket {bucket} returns logits that are not finite{where}; the model's weights are damaged, or its numbers "
        f"leave the range of its precision: compile it again from a checkpoint that works, in float32"
    )
