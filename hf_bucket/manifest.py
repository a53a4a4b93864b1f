"""The manifest: what ``bucket_config.json`` says about an artifact, and a reader that trusts nothing in it."""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, TypeVar, cast, get_args

from hf_bucket.errors import ArtifactError, LadderError
from hf_bucket.ladder import Bucket, Ladder
from hf_bucket.tasks import AXES, InputSpec, OutputSpec, PaddingSide, Signature

SCHEMA_VERSION = 3
MANIFEST = "bucket_config.json"

T = TypeVar("T")


@dataclass(frozen=True, slots=True, kw_only=True)
class FileRecord:
    """What a file must be: ``size`` in bytes and ``sha256`` in hexadecimal."""

    size: int
    sha256: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Validation:
    """How one bucket compared with the reference when it was made.

    Attributes:
        bucket: the bucket's name.
        max_abs_delta: largest difference of a logit.
        label_flips: rows whose best label differed.
        n: rows compared.
        reference: ``"torch"``, unpadded and one row at a time; or ``"onnx"``, the source graph at the exact length.
    """

    bucket: str
    max_abs_delta: float
    label_flips: int
    n: int
    reference: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Certificate:
    """How one bucket compared with the reference on rows of the user's, or on the probes.

    Attributes:
        bucket: the bucket's name.
        precision: dtype of the weights that ran.
        reference: ``"torch"``, unpadded and one row at a time; ``"onnx"``, the source graph at the exact length; or
            ``"bucket"``, the one that each text would otherwise use.
        data: name of the data file without its folder, or ``"probes"``.
        data_sha256: of the data file; None for the probes.
        checkpoint: name of the checkpoint that torch ran, if another was asked for than the artifact's own.
        n: rows compared: all that the bucket holds.
        max_abs_delta: largest difference of a logit.
        p99_abs_delta: 99 of 100 rows differ by no more than this in any logit; exact, by nearest rank.
        label_flips: rows whose largest logit was another label's.
        allowed: largest difference that passes, and no flip does; None where the figures are not judged.
        accuracy: share of the rows whose largest logit is their own label's; None where labels are not known.
        reference_accuracy: the same of the reference.
        batch_s: median seconds of a batch of the bucket, padding and un-padding it included.
    """

    bucket: str
    precision: str
    reference: str
    data: str
    n: int
    max_abs_delta: float
    p99_abs_delta: float
    label_flips: int
    allowed: float | None
    data_sha256: str | None = None
    checkpoint: str | None = None
    accuracy: float | None = None
    reference_accuracy: float | None = None
    batch_s: float | None = None

    @property
    def passed(self) -> bool:
        """Whether the bucket kept the promise on these rows; what is not judged has not failed."""
        return self.allowed is None or (self.max_abs_delta <= self.allowed and self.label_flips == 0)


@dataclass(frozen=True, slots=True, kw_only=True)
class Try:
    """One way of quantising, compared with float on texts that were held out.

    Attributes:
        kept: layers left in float, by the name of their node.
        label_flips: texts that are answered otherwise: see ``quantize.changed``.
        max_abs_delta: largest difference of a logit.
        good: whether so few labels changed that nothing else was tried.
    """

    kept: tuple[str, ...]
    label_flips: int
    max_abs_delta: float
    good: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Quantization:
    """How a graph's products were made int8, and what that changed.

    Attributes:
        scheme: ``"int8"``, or ``"int8-dynamic"``, whose answers depend on what shares a batch.
        calibrated: texts that the scales were taken from.
        held_out: other texts that the tries were judged by: of them the best was chosen.
        layers: products with fixed weights in the graph.
        kept: those of them that were left in float.
        tries: what was tried, in order.
        weights_bytes, float_weights_bytes: size of the weights' file, and of the one in float.
        speed: per bucket measured, seconds of a run in float over seconds in int8, on the machine that compiled.
    """

    scheme: str
    calibrated: int
    held_out: int
    layers: int
    kept: tuple[str, ...]
    tries: tuple[Try, ...]
    weights_bytes: int
    float_weights_bytes: int
    speed: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class FusionChoice:
    """What is made of the graph before onnxruntime runs it, in the names of ``fusions.FUSIONS``, and what decided.

    Attributes:
        provider: that it was measured with; others run the graph as it is.
        chosen: what is best on the whole: for the graph behind all buckets, and for buckets that are not below.
        buckets: per bucket measured, what its own graph runs with in ``mode="static"``.
        relative: per bucket measured and way, seconds of a run over those of onnxruntime's own.
    """

    provider: str
    chosen: str
    buckets: Mapping[str, str]
    relative: Mapping[str, Mapping[str, float]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Manifest:
    """Everything about an artifact that running it needs; written as ``bucket_config.json``.

    Attributes:
        max_length: the model's true maximum in tokens; None where it has no limit.
        vocab_size: token ids the embedding holds; None where unknown.
        labels: label names in the order of the logits.
        problem_type: as in transformers' config; None where the config has none.
        source: where the model came from, by name and revision, and how the graph was made.
        padding_leak: how far torch's own logits moved when a row was padded, for a model that was compiled in spite of
            it; None for all others, whose answer does not depend on padding.
        memory: bytes that one run of a bucket computes in, by the bucket's name: the most that its tensors take at
            once, weights not counted. A bucket is missing where that depends on what it is given.
        certificates: what ``hf-bucket validate`` found since, failures too.
        quantization: how the weights became int8; None where they did not.
        fusion: what is made of the graph before it runs; None where runs were too short to tell what helps.
    """

    task: str
    ladder: Ladder
    signature: Signature
    max_length: int | None
    vocab_size: int | None
    labels: tuple[str, ...]
    problem_type: str | None
    source: Mapping[str, str]
    versions: Mapping[str, str]
    validation: tuple[Validation, ...]
    files: Mapping[str, FileRecord]
    padding_leak: float | None = None
    memory: Mapping[str, int] = field(default_factory=dict)
    certificates: tuple[Certificate, ...] = ()
    quantization: Quantization | None = None
    fusion: FusionChoice | None = None

    def to_json(self) -> str:
        """Return the text of ``bucket_config.json``."""
        data: dict[str, Any] = {"schema_version": SCHEMA_VERSION, "task": self.task}
        data["ladder"] = [{"batch_size": b.batch_size, "extent": list(b.extent)} for b in self.ladder]
        data["signature"] = {
            "inputs": [asdict(spec) for spec in self.signature.inputs],
            "outputs": [asdict(spec) for spec in self.signature.outputs],
            "padding_side": self.signature.padding_side,
            "counted_id": self.signature.counted_id,
        }
        for name in ("max_length", "vocab_size", "problem_type", "padding_leak"):
            data[name] = getattr(self, name)
        data["labels"] = list(self.labels)
        data["source"], data["versions"] = dict(self.source), dict(self.versions)
        data["validation"] = [asdict(validation) for validation in self.validation]
        data["memory"] = dict(self.memory)
        data["certificates"] = [asdict(certificate) for certificate in self.certificates]
        data["quantization"] = None if self.quantization is None else asdict(self.quantization)
        data["fusion"] = None if self.fusion is None else asdict(self.fusion)
        data["files"] = {name: asdict(record) for name, record in sorted(self.files.items())}
        return json.dumps({**data, "sha256": _digest(data)}, indent=2) + "\n"

    @classmethod
    def from_json(cls, text: str) -> Manifest:
        """Return the manifest written in ``text``.

        Raises:
            ArtifactError: not JSON, from a newer version, altered, or a value that is missing or has the wrong type.
        """
        try:
            raw = json.loads(text)
            digest = _digest(raw) if isinstance(raw, dict) else ""
        except (ValueError, RecursionError) as error:
            raise ArtifactError(f"{MANIFEST} is not valid JSON ({error}); compile the model again") from error
        data = _Reader(_typed(raw, dict, "the manifest"), "")
        version = data.take("schema_version", int)
        if version != SCHEMA_VERSION:
            raise ArtifactError(
                f"{MANIFEST} has schema_version {version}, this hf_bucket reads {SCHEMA_VERSION}; "
                f"{'upgrade hf_bucket' if version > SCHEMA_VERSION else 'compile the model again'}"
            )
        signature = data.inside("signature")
        found = cls(
            task=data.take("task", str),
            ladder=_read_ladder(data),
            signature=Signature(
                inputs=tuple(_read_input(entry) for entry in signature.each("inputs")),
                outputs=tuple(_read_output(entry) for entry in signature.each("outputs")),
                padding_side=_read_side(signature),
                counted_id=signature.optional("counted_id", int),
            ),
            max_length=data.optional("max_length", int),
            vocab_size=data.optional("vocab_size", int),
            labels=tuple(data.listed("labels", str)),
            problem_type=data.optional("problem_type", str),
            padding_leak=data.optional("padding_leak", float),
            source=data.table("source", str),
            versions=data.table("versions", str),
            validation=tuple(_read_validation(entry) for entry in data.each("validation")),
            memory=_read_memory(data),
            certificates=tuple(_read_certificate(entry) for entry in data.each("certificates")),
            quantization=_read_quantization(data),
            fusion=_read_fusion(data),
            files={
                _file_name(name): FileRecord(size=entry.take("size", int), sha256=entry.take("sha256", str))
                for name, entry in data.members("files")
            },
        )
        if "sha256" in raw and data.take("sha256", str) != digest:
            raise ArtifactError(
                f"{MANIFEST} was altered: its content has another sha256 than it says; compile the model again, or, if "
                f"you changed it on purpose, remove its key sha256"
            )
        return found


def _digest(data: Mapping[str, Any]) -> str:
    """Return the sha256 of everything in a manifest but this very figure, however it is laid out."""
    content = {key: value for key, value in data.items() if key != "sha256"}
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


@dataclass(frozen=True, slots=True)
class _Reader:
    """Reads typed values out of a JSON object; every error names the key."""

    data: Mapping[str, Any]
    where: str

    def take(self, key: str, kind: type[T]) -> T:
        if key not in self.data:
            raise ArtifactError(f"{MANIFEST} lacks {self.where}{key}; compile the model again")
        return _typed(self.data[key], kind, self.where + key)

    def optional(self, key: str, kind: type[T]) -> T | None:
        return None if key in self.data and self.data[key] is None else self.take(key, kind)

    def inside(self, key: str) -> _Reader:
        return _Reader(self.take(key, dict), f"{self.where}{key}.")

    def listed(self, key: str, kind: type[T]) -> list[T]:
        items = self.take(key, list)
        return [_typed(item, kind, f"{self.where}{key}[{index}]") for index, item in enumerate(items)]

    def each(self, key: str) -> list[_Reader]:
        return [_Reader(item, f"{self.where}{key}[{index}].") for index, item in enumerate(self.listed(key, dict))]

    def table(self, key: str, kind: type[T]) -> dict[str, T]:
        return {name: _typed(value, kind, f"{self.where}{key}.{name}") for name, value in self.take(key, dict).items()}

    def members(self, key: str) -> list[tuple[str, _Reader]]:
        return [(name, _Reader(item, f"{self.where}{key}.{name}.")) for name, item in self.table(key, dict).items()]


def _typed(value: Any, kind: type[T], where: str) -> T:
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        with contextlib.suppress(OverflowError):  # what no float can hold is refused below
            value = float(value)
    finite = not isinstance(value, float) or math.isfinite(value)
    if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool) or not finite:
        got = type(value).__name__ if finite else str(value)
        raise ArtifactError(f"{MANIFEST} has {got} at {where}, expected {kind.__name__}; compile the model again")
    return value


def _read_ladder(data: _Reader) -> Ladder:
    buckets = [(entry.take("batch_size", int), tuple(entry.listed("extent", int))) for entry in data.each("ladder")]
    try:
        return Ladder(tuple(Bucket(batch_size=batch, extent=extent) for batch, extent in buckets))
    except LadderError as error:
        raise ArtifactError(f"{MANIFEST} has no usable ladder: {error}; compile the model again") from error


def _read_axes(entry: _Reader) -> tuple[str, ...]:
    axes = tuple(entry.listed("axes", str))
    unknown = [axis for axis in axes if axis not in AXES]
    if unknown:
        raise ArtifactError(f"{MANIFEST} names an unknown axis {unknown[0]!r} at {entry.where}axes; known: {AXES}")
    return axes


def _read_side(entry: _Reader) -> PaddingSide:
    side = entry.take("padding_side", str)
    if side not in get_args(PaddingSide):
        raise ArtifactError(f"{MANIFEST} has {side!r} at {entry.where}padding_side; known: {get_args(PaddingSide)}")
    return cast(PaddingSide, side)


_DTYPES = ("int64", "int32", "float32", "float16", "bool")


def _read_dtype(entry: _Reader) -> str:
    dtype = entry.take("dtype", str)
    if dtype not in _DTYPES:
        raise ArtifactError(f"{MANIFEST} has dtype {dtype!r} at {entry.where}dtype; known: {_DTYPES}")
    return dtype


def _read_input(entry: _Reader) -> InputSpec:
    name, pad_id = entry.take("name", str), entry.take("pad_id", int)
    if not -(2**31) <= pad_id < 2**31:
        raise ArtifactError(
            f"{MANIFEST} has {pad_id} at {entry.where}pad_id, expected a number of 32 bits; do not trust it"
        )
    return InputSpec(name=name, dtype=_read_dtype(entry), axes=_read_axes(entry), pad_id=pad_id)


def _read_output(entry: _Reader) -> OutputSpec:
    return OutputSpec(name=entry.take("name", str), dtype=_read_dtype(entry), axes=_read_axes(entry))


def _read_validation(entry: _Reader) -> Validation:
    return Validation(
        bucket=entry.take("bucket", str),
        max_abs_delta=entry.take("max_abs_delta", float),
        label_flips=entry.take("label_flips", int),
        n=entry.take("n", int),
        reference=entry.take("reference", str),
    )


def _read_memory(data: _Reader) -> dict[str, int]:
    memory = data.table("memory", int)
    for name, value in memory.items():
        if not 0 <= value < 2**63:
            raise ArtifactError(
                f"{MANIFEST} has {value} at memory.{name}, expected at least 0, and 63 bits; do not trust it"
            )
    return memory


def _read_certificate(entry: _Reader) -> Certificate:
    return Certificate(
        bucket=entry.take("bucket", str),
        precision=entry.take("precision", str),
        reference=entry.take("reference", str),
        data=entry.take("data", str),
        n=entry.take("n", int),
        max_abs_delta=entry.take("max_abs_delta", float),
        p99_abs_delta=entry.take("p99_abs_delta", float),
        label_flips=entry.take("label_flips", int),
        allowed=entry.optional("allowed", float),
        data_sha256=entry.optional("data_sha256", str),
        checkpoint=entry.optional("checkpoint", str),
        accuracy=entry.optional("accuracy", float),
        reference_accuracy=entry.optional("reference_accuracy", float),
        batch_s=entry.optional("batch_s", float),
    )


def _read_quantization(data: _Reader) -> Quantization | None:
    if data.optional("quantization", dict) is None:
        return None
    entry = data.inside("quantization")
    if not entry.listed("tries", dict) or entry.take("float_weights_bytes", int) < 1:
        raise ArtifactError(f"{MANIFEST} has a quantization without tries, or made of nothing; do not trust it")
    return Quantization(
        scheme=entry.take("scheme", str),
        calibrated=entry.take("calibrated", int),
        held_out=entry.take("held_out", int),
        layers=entry.take("layers", int),
        kept=tuple(entry.listed("kept", str)),
        tries=tuple(
            Try(
                kept=tuple(one.listed("kept", str)),
                label_flips=one.take("label_flips", int),
                max_abs_delta=one.take("max_abs_delta", float),
                good=one.take("good", bool),
            )
            for one in entry.each("tries")
        ),
        weights_bytes=entry.take("weights_bytes", int),
        float_weights_bytes=entry.take("float_weights_bytes", int),
        speed=entry.table("speed", float),
    )


def _read_fusion(data: _Reader) -> FusionChoice | None:
    if data.optional("fusion", dict) is None:
        return None
    entry = data.inside("fusion")
    relative = entry.inside("relative")
    ways = {tuple(sorted(relative.table(bucket, float))) for bucket in relative.data}
    if len(ways) > 1 or () in ways:
        raise ArtifactError(f"{MANIFEST} has a fusion whose buckets were not timed alike; do not trust it")
    return FusionChoice(
        provider=entry.take("provider", str),
        chosen=entry.take("chosen", str),
        buckets=entry.table("buckets", str),
        relative={bucket: relative.table(bucket, float) for bucket in relative.data},
    )


def _file_name(name: str) -> str:
    """Return ``name`` if it can only mean a file directly inside the artifact."""
    unsafe = any(character in "/\\:\0" or "\ud800" <= character <= "\udfff" for character in name)
    if not name or name in (".", "..") or unsafe:
        raise ArtifactError(f"{MANIFEST} lists a file {name!r}, which is not a plain file name; do not trust it")
    return name
