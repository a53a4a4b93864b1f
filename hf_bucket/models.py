"""Models in the shape transformers users know, over the main path."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import huggingface_hub
import numpy as np
import torch
from optimum.modeling_base import OptimizedModel
from transformers import AutoConfig, AutoModelForSequenceClassification
from transformers.modeling_outputs import SequenceClassifierOutput

from hf_bucket.artifact import Artifact, copy_artifact
from hf_bucket.batch import Features
from hf_bucket.compile import CompileOptions, compile_model
from hf_bucket.errors import InputError, InputTypeError, ModelError, ProviderError
from hf_bucket.export import Dtype
from hf_bucket.ladder import Ladder
from hf_bucket.manifest import MANIFEST
from hf_bucket.overflow import OverflowLike
from hf_bucket.quantize import Scheme
from hf_bucket.runner import MEASURE_S, Runner, RunOptions
from hf_bucket.session_ort import EngineOptions, Mode
from hf_bucket.source import Source

# Arguments of ``forward`` that change nothing about the logits; anything else a graph does not take is an error.
_HARMLESS = {
    "token_type_ids",
    "special_tokens_mask",
    "offset_mapping",
    "overflow_to_sample_mapping",
    "num_truncated_tokens",
    "use_cache",
    "length",
}


class BucketedModelForSequenceClassification(OptimizedModel):  # type: ignore[misc]  # optimum has no types
    """A sequence classifier that runs every row in the smallest compiled shape that holds it.

    Made by ``from_pretrained``. Many threads may call one; it survives pickling and forking. It is also accepted by
    ``transformers.pipeline("text-classification", model=..., tokenizer=...)``.

    Args:
        runner: runs the artifact.
        config: the transformers configuration.
        preprocessors: tokenizers saved along with the model.
    """

    auto_model_class: ClassVar[Any] = AutoModelForSequenceClassification
    task: ClassVar[str] = "text-classification"
    main_input_name = "input_ids"
    base_model_prefix = "bucketed_model"

    def __init__(self, runner: Runner, config: Any, preprocessors: list[Any] | None = None) -> None:
        super().__init__(model=None, config=config, preprocessors=preprocessors)
        self.runner = runner

    @classmethod
    def from_pretrained(
        cls,
        model_id: str | os.PathLike[str],
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
        overflow: OverflowLike = "error",
        warmup: bool = True,
        measure_s: float = MEASURE_S,
        memory_bytes: int | None = None,
        export: bool | None = None,
        dtype: Dtype = "float32",
        allow_padding_leak: bool = False,
        quantize: Scheme | None = None,
        verbose: bool = False,
        revision: str | None = None,
        subfolder: str = "",
        token: str | bool | None = None,
        cache_dir: str | os.PathLike[str] | None = None,
        local_files_only: bool = False,
        trust_remote_code: bool = False,
    ) -> BucketedModelForSequenceClassification:
        """Return a model from a checkpoint (compiled once, then cached), an ONNX export, or an artifact.

        Args:
            model_id: Hub id or local folder.
            buckets: lengths in tokens (``[64, 128]``), ``(batch_size, length)`` pairs, ``"auto"`` or ``"pow2"``. None
                is an artifact's own ladder, and ``"auto"`` for anything else.
            batch_sizes: combined with every length; None is ``[1, 8]``. ``"auto"``, with ``buckets="auto"`` and
                ``calibration_dataset``, chooses them and the lengths jointly by what runs cost on this machine.
            calibration_dataset: texts, dicts with ``text`` and ``text_pair``, or token counts that ``"auto"`` fits the
                ladder to.
            n_buckets: lengths that ``"auto"`` may use; with automatic batch sizes, buckets in all.
            mode: ``"shared"`` runs every bucket on one graph; ``"static"`` gives each a graph of fixed shapes;
                ``"auto"`` measures which is faster, the first time on this machine, and takes static if it fits.
            provider: onnxruntime execution provider by name, or ``"openvino"``; ``"auto"`` is the CPU's, or another
                that is installed, for many texts, for one or for both, where it was measured to save a twentieth of the
                time.
            provider_options: passed to the provider as they are.
            threads: threads one run may use; 0 means every core this process may use for a request of a few batches,
                and one for each of many batches that run at once.
            workers: batches of one request that run at once; 0 means as many as the cores allow.
            overflow: for an input longer than the largest bucket ``"error"``, ``"truncate"``, ``"window"`` or
                ``"dynamic"``, with options as ``overflow.Overflow`` has them: ``"window:max,stride=32"``.
            warmup: run every bucket once before returning, smallest first.
            measure_s: seconds that the first loading of these buckets on this machine may spend on measuring what they
                cost.
            memory_bytes: that the ladder may take, or it is refused; None is what the machine has.
            export: True insists on the checkpoint, False on an existing ONNX graph; None takes what is there.
            dtype: of the exported weights.
            allow_padding_leak: compile a model even though padding changes its own answer in torch; by how much is
                recorded in the manifest.
            quantize: ``"int8"`` calibrates eight-bit products on ``calibration_dataset``; the answers of
                ``"int8-dynamic"`` depend on what shares a batch. See ``quantize``.
            verbose: let the exporters talk.
            revision: branch, tag or commit on the Hub.
            subfolder: folder inside the repository that holds the model.
            token: Hub token.
            cache_dir: root of the Hub cache.
            local_files_only: never ask the network.
            trust_remote_code: run model code that comes with the repository.

        Raises:
            BucketError: see ``hf_bucket.errors``; the message says what to do.
        """
        source = Source(
            name=os.fspath(model_id),
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
            allow_padding_leak=allow_padding_leak,
            quantize=quantize,
            export=export,
            verbose=verbose,
        )
        running = RunOptions(
            engine=engine, overflow=overflow, warmup=warmup, measure_s=measure_s, memory_bytes=memory_bytes
        )
        return cls.from_artifact(compile_model(source, compiling, task=cls.task), running)

    @classmethod
    def from_artifact(cls, artifact: Artifact, options: RunOptions) -> BucketedModelForSequenceClassification:
        """Return a model that runs an artifact.

        Raises:
            ModelError: the artifact was made for another task.
        """
        if artifact.manifest.task != cls.task:
            raise ModelError(
                f"{artifact.folder} was compiled for {artifact.manifest.task}, {cls.__name__} needs {cls.task}"
            )
        return cls(Runner(artifact, options), AutoConfig.from_pretrained(artifact.folder))

    def forward(
        self,
        input_ids: Any = None,
        attention_mask: Any = None,
        token_type_ids: Any = None,
        *,
        return_dict: bool | None = None,
        **surplus: Any,
    ) -> SequenceClassifierOutput | tuple[Any, ...]:
        """Return the logits of every row; each row runs in the smallest bucket that holds its own tokens.

        Args:
            input_ids: shape ``(rows, length)``, a torch tensor or numpy array of whole numbers.
            attention_mask: same shape, 1 for tokens and 0 for padding; None means that every token is real.
            token_type_ids: same shape; dropped if the model takes none, zeros if it needs some and none are given.
            return_dict: False returns a tuple.
            surplus: what tokenizers return beside these and no model needs.

        Returns:
            ``logits`` of shape ``(rows, labels)`` in float32: torch if ``input_ids`` is a tensor, numpy otherwise.

        Raises:
            InputError: shapes that differ, a row without tokens, ids outside the vocabulary, or an argument that would
                change the answer and cannot be honoured.
            TooLongError: a row fits no bucket and may not be cut.
        """
        if input_ids is None:
            raise InputError("input_ids is missing; call model(**tokenizer(texts, padding=True, return_tensors='pt'))")
        for name, value in surplus.items():
            if name not in _HARMLESS and value is not None and value is not False:
                raise InputError(
                    f"{name} cannot be used: the compiled graph takes {list(self.runner.signature.input_names)}"
                )
        ids = _as_rows(input_ids, "input_ids")
        given = {"attention_mask": attention_mask, "token_type_ids": token_type_ids}
        columns = {name: _as_rows(value, name) for name, value in given.items() if value is not None}
        rows = self.runner.run(self.runner.fit(unpadded(ids, columns, self.runner.signature.input_names)))
        n_labels = len(self.runner.artifact.manifest.labels)
        stacked = np.stack([row["logits"] for row in rows]) if rows else np.zeros((0, n_labels), np.float32)
        logits = torch.from_numpy(stacked).to(input_ids.device) if isinstance(input_ids, torch.Tensor) else stacked
        if return_dict is False or (return_dict is None and not self.config.return_dict):
            return (logits,)
        return SequenceClassifierOutput(logits=logits)

    @property
    def ladder(self) -> Ladder:
        """The buckets this model has."""
        return self.runner.ladder

    def stats(self) -> dict[str, Any]:
        """Return what was run so far: see ``Runner.stats``."""
        return self.runner.stats()

    def close(self) -> None:
        """Release the sessions' memory; a later call opens them again."""
        self.runner.close()

    @property
    def device(self) -> torch.device:
        """Where tensors are expected: always the CPU."""
        return torch.device("cpu")

    @property
    def dtype(self) -> torch.dtype:
        """Of the logits."""
        return torch.float32

    def to(self, *args: Any, **kwargs: Any) -> BucketedModelForSequenceClassification:
        """Return the model itself; it runs where its provider runs.

        Raises:
            ProviderError: another device or dtype is asked for.
        """
        for value in (*args, *kwargs.values()):
            if isinstance(value, torch.dtype) and value is not torch.float32:
                raise ProviderError(f"a compiled model cannot become {value}; compile it with dtype= instead")
            if isinstance(value, (str, int, torch.device)) and torch.device(value).type != "cpu":
                raise ProviderError(f"a compiled model cannot move to {value}; choose provider= when loading it")
        return self

    def eval(self) -> BucketedModelForSequenceClassification:
        """Return the model itself; it cannot be trained."""
        return self

    def train(self, mode: bool = True) -> BucketedModelForSequenceClassification:
        """Return the model itself.

        Raises:
            ModelError: ``mode`` is True.
        """
        if mode:
            raise ModelError("a compiled model cannot be trained; train the checkpoint and compile it again")
        return self

    def can_generate(self) -> bool:
        """Return False: classifiers do not."""
        return False

    def save_pretrained(
        self, save_directory: str | os.PathLike[str], push_to_hub: bool = False, **kwargs: Any
    ) -> str | None:
        """Write the artifact into a folder; what else lies there is kept.

        Args:
            push_to_hub: also upload it, under the folder's name unless ``repo_id`` is given.
            kwargs: arguments of ``push_to_hub``.
        """
        saved = copy_artifact(self.runner.artifact, Path(save_directory))
        if not push_to_hub:
            return None
        return self.push_to_hub(kwargs.pop("repo_id", saved.folder.resolve().name), **kwargs)

    def _save_pretrained(self, save_directory: str | os.PathLike[str]) -> None:
        copy_artifact(self.runner.artifact, Path(save_directory))

    def push_to_hub(
        self,
        repo_id: str,
        *,
        private: bool | None = None,
        token: str | bool | None = None,
        revision: str | None = None,
        commit_message: str = "Upload bucketed model",
    ) -> str:
        """Upload the artifact to a Hub repository, made if need be, and return the address of the commit."""
        api = huggingface_hub.HfApi(token=token)
        repo = api.create_repo(repo_id, private=private, exist_ok=True)
        artifact = self.runner.artifact
        commit = api.upload_folder(
            repo_id=repo.repo_id,
            folder_path=artifact.folder,
            allow_patterns=[*artifact.manifest.files, MANIFEST],
            revision=revision,
            commit_message=commit_message,
        )
        return str(commit)


def _as_rows(value: Any, name: str) -> np.ndarray[Any, np.dtype[np.int64]]:
    """Return an int64 array of shape (rows, length)."""
    try:
        array = value.detach().cpu().numpy() if isinstance(value, torch.Tensor) else np.asarray(value)
    except (TypeError, ValueError, RuntimeError) as error:  # rows of different lengths; a tensor numpy has no form for
        raise InputTypeError(f"{name} cannot be an array ({error}); pass padding=True to the tokenizer") from error
    if array.ndim != 2 or array.dtype.kind not in "iub":
        raise InputTypeError(
            f"{name} has shape {array.shape} of {array.dtype}; expected whole numbers of shape (rows, length), as from "
            f'tokenizer(texts, padding=True, return_tensors="pt")'
        )
    return array.astype(np.int64)


def unpadded(
    ids: np.ndarray[Any, np.dtype[np.int64]],
    columns: Mapping[str, np.ndarray[Any, np.dtype[np.int64]]],
    names: Iterable[str],
) -> Features:
    """Return every row from its first real token to its last, whichever side it was padded on.

    Args:
        ids: shape ``(rows, length)``.
        columns: other inputs by name, of the same shape.
        names: inputs that the graph takes; missing ones are synthesised, surplus ones dropped.

    Raises:
        InputError: shapes differ, or a row has no real token.
    """
    for name, array in columns.items():
        if array.shape != ids.shape:
            raise InputError(f"{name} has shape {array.shape}, input_ids has {ids.shape}; they must be equal")
    if not len(ids):
        return Features(lengths=(), columns={name: [] for name in names})
    defaults = {"attention_mask": np.ones_like(ids), "token_type_ids": np.zeros_like(ids)}
    given = {"input_ids": ids, **defaults, **columns}
    real = given["attention_mask"] != 0
    empty = np.flatnonzero(~real.any(axis=1))
    if empty.size:
        raise InputError(f"input {empty[0]} has no real token (its attention_mask is all 0); drop the row")
    starts = real.argmax(axis=1)
    ends = real.shape[1] - real[:, ::-1].argmax(axis=1)
    spans = [slice(int(start), int(end)) for start, end in zip(starts, ends, strict=True)]
    return Features(
        lengths=tuple(span.stop - span.start for span in spans),
        columns={name: [given[name][row, span] for row, span in enumerate(spans)] for name in names},
    )
