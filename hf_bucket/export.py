"""From a checkpoint to a graph with free dimensions; the only room that knows torch.onnx."""

from __future__ import annotations

import contextlib
import io
import logging
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from hf_bucket.artifact import GRAPH
from hf_bucket.encode import Encoder
from hf_bucket.errors import ExportError, ModelError, PaddingLeakError, missing_part
from hf_bucket.facts import Facts, check_vocabulary
from hf_bucket.families import counted_id, family_of, text_part, true_max_length
from hf_bucket.graph import adopt, save_graph
from hf_bucket.probes import ATOL, Probe, probe_rows, tolerance
from hf_bucket.tasks import PaddingSide, Signature, Task

Dtype = Literal["float32", "float16"]

_SHORT = 64  # tokens; longer probes are not padded for the comparison of torch with torch, which would take long
_TRACE_SHAPE = (3, 11)  # no size is 1 or equal to another, so that no dimension is mistaken for a constant


@dataclass(frozen=True, slots=True, kw_only=True)
class Checkpoint:
    """A checkpoint's config and tokenizer, read by transformers; its weights are still on disk."""

    folder: Path
    config: Any
    tokenizer: Any
    encoder: Encoder
    facts: Facts
    trust_remote_code: bool

    def save(self, folder: Path) -> None:
        """Write config and tokenizer as transformers does."""
        self.config.save_pretrained(folder)
        self.tokenizer.save_pretrained(folder)


def read_checkpoint(folder: Path, task: Task, *, trust_remote_code: bool) -> Checkpoint:
    """Return a checkpoint's config and tokenizer.

    Raises:
        ModelError: the tokenizer is slow, lacks a pad token, or knows more ids than the model embeds.
        DependencyError: transformers is not installed.
    """
    try:
        from transformers import AutoConfig, AutoTokenizer
    except ImportError as error:
        raise missing_part(error.name or "transformers", "export", "compiling a checkpoint") from error
    try:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code)
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=trust_remote_code)
    except (OSError, ValueError) as error:
        raise ModelError(f"{folder} holds no config and tokenizer that transformers can load: {error}") from error
    if not getattr(tokenizer, "is_fast", False):
        raise ModelError(
            f"{type(tokenizer).__name__} is not a fast tokenizer; save the model with one that has a tokenizer.json"
        )
    if tokenizer.pad_token_id is None:
        raise ModelError(
            "the tokenizer has no pad token, so no bucket can be filled up; set one that the model was trained with, "
            "e.g. tokenizer.pad_token = tokenizer.eos_token, and save the tokenizer again"
        )
    names = [name for name in task.pad_ids if name in tokenizer.model_input_names]
    encoder = Encoder(tokenizer.backend_tokenizer.to_str(), inputs=names)
    written = config.to_dict()
    facts = Facts(
        max_length=true_max_length(written),
        vocab_size=_whole(text_part(written).get("vocab_size")),
        labels=tuple(str(config.id2label[index]) for index in sorted(config.id2label)),
        problem_type=config.problem_type,
        pad_ids={name: _pad_id(task.pad_ids[name], tokenizer) for name in names},
        padding_side=family_of(written).padding_side,
        counted_id=counted_id(written),
    )
    check_vocabulary(encoder, facts)
    return Checkpoint(
        folder=folder,
        config=config,
        tokenizer=tokenizer,
        encoder=encoder,
        facts=facts,
        trust_remote_code=trust_remote_code,
    )


def _whole(value: object) -> int | None:
    return value if isinstance(value, int) else None


def _pad_id(rule: int | str, tokenizer: Any) -> int:
    return rule if isinstance(rule, int) else int(getattr(tokenizer, rule))


@dataclass(frozen=True, slots=True, kw_only=True)
class Exported:
    """What an export left in its folder, beside ``model.onnx`` and its weights; ``padding_leak`` as in ``Manifest``."""

    signature: Signature
    probes: tuple[Probe, ...]
    padding_leak: float | None = None


def export(
    checkpoint: Checkpoint, task: Task, folder: Path, *, dtype: Dtype, verbose: bool, allow_padding_leak: bool = False
) -> Exported:
    """Write ``model.onnx`` with free dimensions, config and tokenizer into ``folder``.

    Args:
        dtype: of the weights; a half-precision checkpoint becomes float32 unless asked otherwise.
        verbose: let the exporters talk.
        allow_padding_leak: go on with a model whose own answer changes when a row is padded.

    Raises:
        ModelError: the checkpoint has no weights for this task's head.
        PaddingLeakError: the model's own answer changes when a row is padded.
        ExportError: the model cannot be exported.
    """
    with quiet(verbose):
        model = _load_model(checkpoint, task, dtype)
        facts, names = checkpoint.facts, _accepted(model, checkpoint.facts.pad_ids)
        rows = probe_rows(checkpoint.encoder, facts.max_length, facts.vocab_size)
        probes = tuple(Probe(input_ids=row, logits=_torch_logits(model, [row], names, facts)[0]) for row in rows)
        leak = _padding_leak(model, probes, names, facts, ATOL[dtype])
        if leak is not None and not allow_padding_leak:
            raise PaddingLeakError(
                f"padding changes what {type(model).__name__} answers: in torch itself a logit moves by {leak:.2g} "
                f"when short rows are padded (n={len(probes)}); run it without padding, in transformers, "
                f"or accept other answers with allow_padding_leak=True"
            )
        graph = _trace(model, names, checkpoint)
        pad_ids = {name: facts.pad_ids[name] for name in names}
        signature = adopt(graph, task, pad_ids, padding_side=facts.padding_side, counted_id=facts.counted_id)
        missing = [name for name in names if name not in signature.input_names]
        if "attention_mask" in missing or "input_ids" in missing:
            raise ExportError(f"the exported graph does not take {missing}, so padding could not be told from tokens")
        save_graph(graph, folder / GRAPH)
        checkpoint.save(folder)
    return Exported(signature=signature, probes=probes, padding_leak=leak)


def _load_model(checkpoint: Checkpoint, task: Task, dtype: Dtype) -> Any:
    try:
        import torch
        from optimum.exporters.tasks import TasksManager
        from safetensors import SafetensorError
    except ImportError as error:
        raise missing_part(error.name or "torch", "export", "exporting a checkpoint") from error
    auto_class = TasksManager.get_model_class_for_task(task.name, framework="pt")
    try:
        model, info = auto_class.from_pretrained(
            checkpoint.folder,
            dtype=getattr(torch, dtype),
            trust_remote_code=checkpoint.trust_remote_code,
            output_loading_info=True,
        )
    except ImportError as error:  # of a package that this architecture alone needs
        reason = " ".join(str(error).split())
        raise ModelError(f"transformers cannot build {type(checkpoint.config).__name__} here: {reason}") from error
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise ModelError(f"{checkpoint.folder} cannot be loaded for {task.name}: {error}") from error
    missing = sorted(info["missing_keys"])
    if missing:
        raise ModelError(
            f"{checkpoint.folder} has no weights for {', '.join(missing[:4])}: it was not trained for {task.name} "
            f"(its architecture is {checkpoint.config.architectures}); use a {task.head} checkpoint"
        )
    for config in (model.config, model.config.get_text_config()):
        if getattr(config, "pad_token_id", None) is None:
            config.pad_token_id = checkpoint.tokenizer.pad_token_id
    return model.eval()


def _accepted(model: Any, pad_ids: Mapping[str, int]) -> list[str]:
    """Return the inputs that both the tokenizer makes and the model's ``forward`` takes."""
    import inspect

    parameters = inspect.signature(model.forward).parameters
    return [name for name in pad_ids if name in parameters]


def _inputs(rows: Sequence[Sequence[int]], names: Sequence[str], facts: Facts, longest: int = 0) -> dict[str, Any]:
    """Return padded int64 tensors of shape ``(rows, length of the longest row, or longest)`` for the named inputs."""
    import torch

    longest = max(longest, *map(len, rows))
    values = {
        "input_ids": [_filled(row, longest, facts.pad_ids["input_ids"], facts.padding_side) for row in rows],
        "attention_mask": [_filled([1] * len(row), longest, 0, facts.padding_side) for row in rows],
        "token_type_ids": [[0] * longest for _ in rows],
    }
    return {name: torch.tensor(values[name], dtype=torch.int64) for name in names}


def _filled(row: Sequence[int], length: int, value: int, side: PaddingSide) -> list[int]:
    filler = [value] * (length - len(row))
    return [*filler, *row] if side == "left" else [*row, *filler]


Logits = tuple[tuple[float, ...], ...]


def _torch_logits(
    model: Any, rows: Sequence[Sequence[int]], names: Sequence[str], facts: Facts, longest: int = 0
) -> Logits:
    """Return torch's answers for rows in one batch, padded to its longest or to ``longest`` tokens."""
    import torch

    inputs = _inputs(rows, names, facts, longest)
    try:
        with torch.inference_mode():
            logits = model(**inputs).logits
    except (RuntimeError, IndexError, ValueError) as error:
        raise ExportError(
            f"torch itself fails on {len(rows)} rows of {inputs['input_ids'].shape[1]} tokens with "
            f"{type(model).__name__}: {_first_line(error)}; this model cannot be compared, so it cannot be bucketed"
        ) from error
    return tuple(tuple(float(value) for value in row) for row in logits.float())


def _padding_leak(model: Any, probes: Sequence[Probe], names: Sequence[str], facts: Facts, atol: float) -> float | None:
    """Return how far padding moves torch's own logits; None when that is no further than rounding may.

    All short rows go together, padded to the longest of them; the shortest two also as far as any probe goes.
    """
    import numpy as np

    short = [probe for probe in probes if len(probe.input_ids) <= _SHORT]
    groups = [(short, 0), (short[:2], max(len(probe.input_ids) for probe in probes))]
    worst = 0.0
    for group, longest in groups:
        if not group:
            continue
        padded = np.array(_torch_logits(model, [probe.input_ids for probe in group], names, facts, longest))
        alone = np.array([probe.logits for probe in group])
        delta = float(np.abs(padded - alone).max(initial=0.0))
        worst = max(worst, delta if not delta <= tolerance(alone, atol) else 0.0)
    return worst or None


def _trace(model: Any, names: Sequence[str], checkpoint: Checkpoint) -> Any:
    import torch
    from transformers.exporters.exporter_onnx import OnnxConfig, OnnxExporter

    rows, columns = _TRACE_SHAPE
    filler = probe_rows(checkpoint.encoder, columns, checkpoint.facts.vocab_size, lengths=[*[columns] * (rows - 1), 8])
    inputs = _inputs(filler, names, checkpoint.facts)
    free = {name: {0: torch.export.Dim.DYNAMIC, 1: torch.export.Dim.DYNAMIC} for name in names}
    try:
        return OnnxExporter().export(model, inputs, config=OnnxConfig(dynamic_shapes=free)).program
    except Exception as error:  # torch.export, torch.onnx and onnxscript each raise their own
        raise ExportError(
            f"{type(model).__name__} cannot be exported with free dimensions: {type(error).__name__}: "
            f"{_first_line(error)}; run it in transformers, or bring a graph of your own (docs/extending.md)"
        ) from error


def _first_line(error: Exception) -> str:
    return next(iter(str(error).strip().splitlines()), "")


@contextlib.contextmanager
def quiet(verbose: bool) -> Iterator[None]:
    """Keep the exporters' prints, progress bars, log lines and warnings from the user, unless ``verbose``."""
    if verbose:
        yield
        return
    previous = logging.root.manager.disable
    logging.disable(logging.ERROR)
    bars = _stop_bars()
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(previous)
        bars()


def _stop_bars() -> Callable[[], None]:
    """Stop transformers' progress bars and return what starts them again; without transformers there are none."""
    try:
        from transformers.utils import logging as transformers_logging
    except ImportError:
        return lambda: None
    if not transformers_logging.is_progress_bar_enabled():
        return lambda: None
    transformers_logging.disable_progress_bar()
    enable: Callable[[], None] = transformers_logging.enable_progress_bar
    return enable
