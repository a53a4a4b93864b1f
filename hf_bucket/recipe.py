"""Recipes: YAML files, data only, that say what to compile and how to check it."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from difflib import get_close_matches
from pathlib import Path
from typing import Any, Literal, TypeAlias

from hf_bucket.errors import InputError, LadderError, RecipeError
from hf_bucket.ladder import cross, make_ladder
from hf_bucket.overflow import make_overflow
from hf_bucket.tasks import TASKS, get_task

DEFAULT_MODEL = "default"  # as ``model``: the one that comes with the package

Buckets: TypeAlias = Literal["auto", "pow2"] | tuple[int, ...] | tuple[tuple[int, int], ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Calibration:
    """Texts whose lengths an automatic ladder is planned for.

    Attributes:
        file: a data file; None where ``dataset`` is given, and only there.
        dataset: a data set on the Hub; ``config`` and ``split`` say which part of it.
        column: the column of the text.
        pair_column: the column of the second text of a pair; None for single texts.
    """

    file: Path | None = None
    dataset: str | None = None
    config: str | None = None
    split: str = "train"
    column: str = "text"
    pair_column: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Evaluation:
    """How the compiled model is checked on GLUE.

    Attributes:
        glue: name of the task.
        data_dir: folder of the data; None means the Hub.
        rounds: passes of every system over the data, at least 1.
        label_order: the task's labels in the model's order; None where the model's own names say it.
    """

    glue: str
    split: str = "validation"
    data_dir: Path | None = None
    rounds: int = 3
    label_order: tuple[str, ...] | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Recipe:
    """What to compile and how to check it, as ``read_recipe`` found it; defaults are filled in.

    Attributes:
        path: the file it came from; two recipes that say the same are equal wherever they lie.
        model: Hub id, path (relative to the working directory), or ``DEFAULT_MODEL``.
        buckets: a preset, or lengths or ``(batch_size, length)`` pairs that are known to make a ladder.
        batch_sizes: combined with every length; None is ``ladder.DEFAULT_BATCH_SIZES``, or beside pairs their own.
            ``"auto"`` chooses them and the lengths jointly, and is only there with automatic buckets and a calibration.
        n_buckets: lengths that ``"auto"`` may use; with automatic batch sizes, buckets in all.
        calibration: None where nothing is known of the lengths.
        task: the name in ``tasks.TASKS``, never an alias.
        output: folder for the artifact; None leaves it in the cache.
        evaluate: None where nothing is to be checked.
    """

    path: Path = field(compare=False)
    model: str
    buckets: Buckets = "auto"
    batch_sizes: tuple[int, ...] | Literal["auto"] | None = None
    n_buckets: int = 8
    calibration: Calibration | None = None
    task: str = "text-classification"
    revision: str | None = None
    overflow: str = "error"
    mode: Literal["shared", "static", "auto"] = "shared"
    provider: str = "auto"
    output: Path | None = None
    evaluate: Evaluation | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Key:
    """One key that a mapping of a recipe may have.

    Attributes:
        kind: what it holds; a key of ``_READERS``.
        values: the only texts accepted; empty for any.
        keys: the keys inside, for a ``"section"``.
    """

    name: str
    kind: Literal["text", "texts", "path", "count", "overflow", "batch sizes", "buckets", "section"] = "text"
    required: bool = False
    values: tuple[str, ...] = ()
    keys: tuple[Key, ...] = ()


_TASK_NAMES = tuple(name for task in TASKS for name in (task.name, *task.aliases))
_GLUE_NAMES = ("cola", "sst2", "mrpc", "qqp", "stsb", "mnli", "qnli", "rte", "wnli")  # glue.py is below this room

KEYS = (
    Key(name="model", required=True),
    Key(name="buckets", kind="buckets", values=("auto", "pow2")),
    Key(name="batch_sizes", kind="batch sizes", values=("auto",)),
    Key(name="n_buckets", kind="count"),
    Key(
        name="calibration",
        kind="section",
        keys=(
            Key(name="file", kind="path"),
            Key(name="dataset"),
            Key(name="config"),
            Key(name="split"),
            Key(name="column"),
            Key(name="pair_column"),
        ),
    ),
    Key(name="task", values=_TASK_NAMES),
    Key(name="revision"),
    Key(name="overflow", kind="overflow"),
    Key(name="mode", values=("shared", "static", "auto")),
    Key(name="provider"),
    Key(name="output", kind="path"),
    Key(
        name="evaluate",
        kind="section",
        keys=(
            Key(name="glue", required=True, values=_GLUE_NAMES),
            Key(name="split"),
            Key(name="data_dir", kind="path"),
            Key(name="rounds", kind="count"),
            Key(name="label_order", kind="texts"),
        ),
    ),
)


def read_recipe(path: Path) -> Recipe:
    """Return the recipe in a file.

    Raises:
        RecipeError: the file cannot be read, is no YAML, or says something a recipe cannot; the message begins with
            the file and, where there is one, the line.
    """
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, ValueError) as error:
        raise RecipeError(f"{path} cannot be read ({error}); give a recipe, a YAML file in UTF-8") from error
    root = _compose(path, text)
    if root is None or not _is_a(root, "map"):
        got = "nothing" if root is None else _got(root)
        raise _error(path, root, f"a recipe is a mapping of keys such as model: or buckets:, got {got}")
    found = _read_mapping(path, root, KEYS, "a recipe")
    values = {name: value for name, (value, _) in found.items()}
    places = {name: node for name, (_, node) in found.items()}
    _check_ladder(path, values, places)
    _check_calibration(path, values, places)
    for name, section in (("calibration", Calibration), ("evaluate", Evaluation)):
        if name in values:
            values[name] = section(**values[name])
    if "task" in values:
        values["task"] = get_task(values["task"]).name
    return Recipe(path=path, **values)


def _compose(path: Path, text: str) -> Any:
    """Return the root node of a YAML document, None for an empty one. Nodes are text with places; nothing is built."""
    import yaml  # heavy for a door; comes with huggingface_hub

    loader = None
    try:
        loader = yaml.SafeLoader(text)
        return loader.get_single_node()
    except yaml.reader.ReaderError as error:
        line = text.count("\n", 0, error.position) + 1
        raise RecipeError(f"{path}:{line}: the file is no YAML: character {error.character!r} not allowed") from error
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        why = ", ".join(part for part in (error.context, error.problem) if part)
        raise RecipeError(f"{path}:{mark.line + 1}: the file is no YAML: {why}; mend this line") from error
    except (ValueError, OverflowError, RecursionError) as error:  # escapes beyond Unicode; brackets without end
        line = 1 if loader is None else loader.line + 1
        raise RecipeError(f"{path}:{line}: the file is no YAML that can be read: {error}; mend this line") from error


_TAG = "tag:yaml.org,2002:"
_NAMES = {
    "str": "the text",
    "int": "the number",
    "float": "the number",
    "bool": "the boolean",
    "null": "nothing",
    "seq": "a list",
    "map": "a mapping",
    "timestamp": "the date",
}


def _is_a(node: Any, kind: str) -> bool:
    """Return whether a node is of one of YAML's own kinds, and not of one that only looks like it."""
    shape = {"seq": "sequence", "map": "mapping"}.get(kind, "scalar")
    return bool(node.tag == _TAG + kind and node.id == shape)


def _got(node: Any) -> str:
    """Return what a node holds, in the words of a message."""
    kind = node.tag.removeprefix(_TAG)
    if kind not in _NAMES or not _is_a(node, kind):  # the repr of a tagged list follows aliases: no end to it
        return f"a value tagged {node.tag!r:.60}"
    name = _NAMES[kind]
    return f"{name} {node.value!r:.60}" if name.startswith("the ") else name


def _error(path: Path, node: Any, message: str) -> RecipeError:
    line = 1 if node is None else node.start_mark.line + 1
    return RecipeError(f"{path}:{line}: {message}")


def _guess(word: str, known: Sequence[str]) -> str:
    close = get_close_matches(word, known, n=1)
    return f" (did you mean {close[0]}?)" if close else ""


_Found: TypeAlias = dict[str, tuple[Any, Any]]


def _read_mapping(path: Path, node: Any, keys: Sequence[Key], where: str) -> _Found:
    """Return the value of every key that is there, with the node of the key."""
    known = {key.name: key for key in keys}
    found: _Found = {}
    for name_node, value_node in node.value:
        name = name_node.value if name_node.id == "scalar" else None
        if name not in known:
            got = f"{name:.60}" if name else _got(name_node)
            guess = _guess(name, list(known)) if name else ""
            message = f"{got} is not a key of {where}; expected one of {', '.join(known)}{guess}"
            raise _error(path, name_node, message)
        if name in found:
            first = found[name][1].start_mark.line + 1
            raise _error(path, name_node, f"{name} is given twice, first in line {first}; keep one of the two")
        found[name] = _READERS[known[name].kind](path, value_node, known[name]), name_node
    for key in keys:
        if key.required and key.name not in found:
            raise _error(
                path, node, f"{where} needs the key {key.name}; add {key.name}: {' | '.join(key.values) or '<text>'}"
            )
    return found


def _read_section(path: Path, node: Any, key: Key) -> dict[str, Any]:
    if not _is_a(node, "map"):
        names = ", ".join(inner.name for inner in key.keys)
        raise _error(path, node, f"{key.name} must be a mapping with keys of {names}; got {_got(node)}")
    found = _read_mapping(path, node, key.keys, key.name)
    return {name: value for name, (value, _) in found.items()}


def _read_text(path: Path, node: Any, key: Key) -> str:
    expected = f"one of {', '.join(key.values)}" if key.values else "text"
    if not _is_a(node, "str") or not node.value.strip():
        quotes = "; put it in quotes" if node.id == "scalar" and node.value and not key.values else ""
        raise _error(path, node, f"{key.name} must be {expected}, got {_got(node)}{quotes or '; or leave the key out'}")
    text = str(node.value)
    if bad := re.search("[\0\ud800-\udfff]", text):  # YAML has neither, but escapes for both
        raise _error(path, node, f"{key.name} holds {bad[0]!r}, which no name or path can; write what is meant")
    if key.values and text not in key.values:
        raise _error(path, node, f"{key.name} must be {expected}, got {text!r:.60}{_guess(text, key.values)}")
    return text


def _read_texts(path: Path, node: Any, key: Key) -> tuple[str, ...]:
    if not _is_a(node, "seq") or not node.value:
        raise _error(path, node, f"{key.name} must be a list of texts such as [negative, positive], got {_got(node)}")
    return tuple(_read_text(path, item, key) for item in node.value)


def _read_overflow(path: Path, node: Any, key: Key) -> str:
    text = _read_text(path, node, key)
    try:
        return str(make_overflow(text))
    except InputError as error:
        raise _error(path, node, str(error)) from error


def _read_path(path: Path, node: Any, key: Key) -> Path:
    text = _read_text(path, node, key)
    try:
        return Path(text).expanduser()
    except RuntimeError as error:  # ~ of a user who does not exist
        raise _error(path, node, f"{key.name} must be a path, got {text!r:.60}: {error}") from error


def _read_number(path: Path, node: Any, key: Key, expected: str) -> int:
    if not _is_a(node, "int") or not re.fullmatch(r"[+-]?(0|[1-9][0-9]{0,17})", node.value):
        raise _error(path, node, f"{key.name} must be {expected}, got {_got(node)}")
    return int(node.value)


def _read_count(path: Path, node: Any, key: Key) -> int:
    expected = "a whole number of at least 1"
    count = _read_number(path, node, key, expected)
    if count < 1:
        raise _error(path, node, f"{key.name} must be {expected}, got {count}")
    return count


def _read_batch_sizes(path: Path, node: Any, key: Key) -> tuple[int, ...] | str:
    expected = "a list of whole numbers, or auto, such as [1, 8]"
    if _is_a(node, "str") and node.value in key.values:
        return str(node.value)
    if not _is_a(node, "seq"):
        raise _error(path, node, f"{key.name} must be {expected}, got {_got(node)}")
    return tuple(_read_number(path, item, key, expected) for item in node.value)


def _read_buckets(path: Path, node: Any, key: Key) -> object:
    expected = "auto, pow2, a length, a list of lengths, or a list of [batch, length] pairs"
    if _is_a(node, "str"):
        if node.value not in key.values:
            guess = _guess(node.value, key.values)
            raise _error(path, node, f"{key.name} must be {expected}; got {_got(node)}{guess}")
        return str(node.value)
    if not _is_a(node, "seq"):
        return (_read_number(path, node, key, expected),)
    return tuple(
        tuple(_read_number(path, size, key, expected) for size in item.value)
        if _is_a(item, "seq")
        else _read_number(path, item, key, expected)
        for item in node.value
    )


_READERS: Mapping[str, Callable[[Path, Any, Key], Any]] = {
    "text": _read_text,
    "texts": _read_texts,
    "path": _read_path,
    "overflow": _read_overflow,
    "count": _read_count,
    "batch sizes": _read_batch_sizes,
    "buckets": _read_buckets,
    "section": _read_section,
}


def _check_ladder(path: Path, values: Mapping[str, Any], places: Mapping[str, Any]) -> None:
    """Make the ladder once, so that an impossible one is found before any model is loaded."""
    buckets, sizes = values.get("buckets", "auto"), values.get("batch_sizes")
    culprit = "batch_sizes"
    try:
        if sizes == "auto":
            if buckets != "auto" or "calibration" not in values:
                raise LadderError(
                    "auto is for buckets: auto with a calibration; add both, or give a list such as [1, 8]"
                )
        elif sizes is not None:
            cross([1], sizes)
        if not isinstance(buckets, str):
            culprit = "buckets"
            make_ladder(buckets, batch_sizes=sizes)
    except LadderError as error:
        raise _error(path, places[culprit], f"{culprit}: {error}") from error
    if "n_buckets" in values and buckets != "auto":
        message = "n_buckets is for buckets: auto and these buckets are given otherwise; drop one of the two"
        raise _error(path, places["n_buckets"], message)


def _check_calibration(path: Path, values: Mapping[str, Any], places: Mapping[str, Any]) -> None:
    given = values.get("calibration")
    if given is None:
        return
    if ("file" in given) == ("dataset" in given):
        got = "both" if "file" in given else "neither"
        raise _error(path, places["calibration"], f"calibration needs either file or dataset, got {got}")
    for name in ("config", "split"):
        if name in given and "file" in given:
            message = f"calibration: {name} is a part of a dataset and has no meaning beside file; drop it"
            raise _error(path, places["calibration"], message)
