"""The manifest comes back as it was written; whatever else is in the file is refused with a message that names it."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_bucket.errors import ArtifactError
from hf_bucket.ladder import make_ladder
from hf_bucket.manifest import (
    MANIFEST,
    SCHEMA_VERSION,
    Certificate,
    FileRecord,
    FusionChoice,
    Manifest,
    Quantization,
    Try,
    Validation,
)
from hf_bucket.tasks import AXES, InputSpec, OutputSpec, Signature

Path = tuple[str | int, ...]

MANIFEST_OF_ALL_PARTS = Manifest(
    task="text-classification",
    ladder=make_ladder([8, 16], batch_sizes=[1, 4]),
    signature=Signature(
        inputs=(
            InputSpec(name="input_ids", dtype="int64", axes=("row", "token"), pad_id=3),
            InputSpec(name="attention_mask", dtype="int64", axes=("row", "token"), pad_id=0),
        ),
        outputs=(OutputSpec(name="logits", dtype="float32", axes=("row", "label")),),
        padding_side="left",
        counted_id=2,
    ),
    padding_leak=0.5,
    memory={"b1_s8": 4096, "b4_s16": 70000},
    max_length=64,
    vocab_size=94,
    labels=("no", "yes"),
    problem_type="single_label_classification",
    source={"name": "org/model", "revision": ""},
    versions={"onnxruntime": "1.31.1"},
    validation=(Validation(bucket="b1_s8", max_abs_delta=1e-6, label_flips=0, n=2, reference="torch"),),
    certificates=(
        Certificate(
            bucket="b4_s16",
            precision="float32",
            reference="torch",
            data="texts.csv",
            n=120,
            max_abs_delta=2e-6,
            p99_abs_delta=1e-6,
            label_flips=1,
            allowed=1e-4,
            data_sha256="0f",
            checkpoint="org/model",
            accuracy=0.75,
            reference_accuracy=0.5,
            batch_s=0.25,
        ),
    ),
    quantization=Quantization(
        scheme="int8",
        calibrated=8,
        held_out=4,
        layers=12,
        kept=("node_3",),
        tries=(
            Try(kept=(), label_flips=2, max_abs_delta=0.5, good=False),
            Try(kept=("node_3",), label_flips=0, max_abs_delta=0.25, good=True),
        ),
        weights_bytes=100,
        float_weights_bytes=400,
        speed={"b4_s16": 2.5},
    ),
    fusion=FusionChoice(
        provider="CPUExecutionProvider",
        chosen="none",
        buckets={"b4_s16": "onnxruntime"},
        relative={"b4_s16": {"onnxruntime": 1.0, "none": 1.25}},
    ),
    files={"model.onnx": FileRecord(size=12, sha256="0" * 64), "config.json": FileRecord(size=0, sha256="1" * 64)},
)

texts = st.text(st.characters(exclude_categories=["Cs"]), max_size=8)
axes = st.lists(st.sampled_from(AXES), max_size=3).map(tuple)
dtypes = st.sampled_from(["int64", "int32", "float32", "float16", "bool"])
counts = st.integers(0, 2**63)
file_names = texts.filter(lambda name: name not in ("", ".", "..") and not set(name) & set("/\\:\0"))
manifests = st.builds(
    Manifest,
    task=texts,
    ladder=st.lists(st.tuples(st.integers(1, 9), st.integers(1, 99)), min_size=1, max_size=5, unique=True).map(
        make_ladder
    ),
    signature=st.builds(
        Signature,
        inputs=st.lists(
            st.builds(InputSpec, name=texts, dtype=dtypes, axes=axes, pad_id=st.integers(-(2**31), 2**31 - 1)),
            max_size=3,
        ).map(tuple),
        outputs=st.lists(st.builds(OutputSpec, name=texts, dtype=dtypes, axes=axes), max_size=2).map(tuple),
        padding_side=st.sampled_from(["left", "right"]),
        counted_id=st.none() | counts,
    ),
    padding_leak=st.none() | st.floats(0, allow_infinity=False),
    memory=st.dictionaries(texts, st.integers(0, 2**63 - 1), max_size=3),
    max_length=st.none() | counts,
    vocab_size=st.none() | counts,
    labels=st.lists(texts, max_size=3).map(tuple),
    problem_type=st.none() | texts,
    source=st.dictionaries(texts, texts, max_size=3),
    versions=st.dictionaries(texts, texts, max_size=3),
    validation=st.lists(
        st.builds(
            Validation,
            bucket=texts,
            max_abs_delta=st.floats(0, allow_infinity=False),
            label_flips=counts,
            n=counts,
            reference=texts,
        ),
        max_size=2,
    ).map(tuple),
    certificates=st.lists(
        st.builds(
            Certificate,
            bucket=texts,
            precision=texts,
            reference=texts,
            data=texts,
            n=counts,
            max_abs_delta=st.floats(0, allow_infinity=False),
            p99_abs_delta=st.floats(0, allow_infinity=False),
            label_flips=counts,
            allowed=st.none() | st.floats(0, allow_infinity=False),
            data_sha256=st.none() | st.text(max_size=4),
            checkpoint=st.none() | st.text(max_size=4),
            accuracy=st.none() | st.floats(0, 1),
            reference_accuracy=st.none() | st.floats(0, 1),
            batch_s=st.none() | st.floats(0, allow_infinity=False),
        ),
        max_size=2,
    ).map(tuple),
    quantization=st.none()
    | st.builds(
        Quantization,
        scheme=texts,
        calibrated=counts,
        held_out=counts,
        layers=counts,
        kept=st.lists(texts, max_size=2).map(tuple),
        tries=st.lists(
            st.builds(
                Try,
                kept=st.lists(texts, max_size=2).map(tuple),
                label_flips=counts,
                max_abs_delta=st.floats(0, allow_infinity=False),
                good=st.booleans(),
            ),
            min_size=1,
            max_size=2,
        ).map(tuple),
        weights_bytes=counts,
        float_weights_bytes=st.integers(1, 2**63),
        speed=st.dictionaries(texts, st.floats(0, allow_infinity=False), max_size=2),
    ),
    fusion=st.none()
    | st.builds(
        FusionChoice,
        provider=texts,
        chosen=texts,
        buckets=st.dictionaries(texts, texts, max_size=2),
        relative=st.dictionaries(
            texts, st.fixed_dictionaries({name: st.floats(0, allow_infinity=False) for name in ("a", "b")}), max_size=2
        ),
    ),
    files=st.dictionaries(file_names, st.builds(FileRecord, size=counts, sha256=texts), max_size=3),
)
json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=4),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=5,
)


def data() -> dict[str, Any]:
    """A manifest that holds at least one of everything, as parsed JSON, without the digest that guards it."""
    return {key: value for key, value in written().items() if key != "sha256"}


def written() -> dict[str, Any]:
    return json.loads(MANIFEST_OF_ALL_PARTS.to_json())


def read(value: object) -> Manifest:
    return Manifest.from_json(json.dumps(value))


def walk(value: Any, path: Path = ()) -> Iterator[tuple[Path, Any]]:
    """Every value inside a JSON value with the keys that lead to it."""
    children = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, child in children:
        yield (*path, key), child
        yield from walk(child, (*path, key))


def holder_of(root: Any, path: Path) -> Any:
    for key in path[:-1]:
        root = root[key]
    return root


def replaced(path: Path, value: object) -> dict[str, Any]:
    changed = data()
    holder_of(changed, path)[path[-1]] = value
    return changed


def spelled(path: Path) -> str:
    return ".".join(map(str, path))


VALUES = dict(walk(data()))
FREE_TABLES = {
    ("source",),
    ("versions",),
    ("files",),
    ("memory",),
    ("quantization", "speed"),
    ("fusion", "buckets"),
    ("fusion", "relative"),
    ("fusion", "relative", "b4_s16"),
}  # their keys are names, not part of the schema
KEYS = [path for path in VALUES if isinstance(path[-1], str) and path[:-1] not in FREE_TABLES]
NULLABLE = {
    ("max_length",),
    ("vocab_size",),
    ("problem_type",),
    ("padding_leak",),
    ("signature", "counted_id"),
    ("certificates", 0, "allowed"),
    ("certificates", 0, "data_sha256"),
    ("certificates", 0, "checkpoint"),
    ("certificates", 0, "accuracy"),
    ("certificates", 0, "reference_accuracy"),
    ("certificates", 0, "batch_s"),
    ("quantization",),
    ("fusion",),
}
SAMPLES = (None, True, False, 7, 0.5, "text", [], {})


def fits(sample: Any, value: Any, path: Path) -> bool:
    """Whether ``sample`` has a type that may stand at ``path``, where ``value`` is."""
    if sample is None:
        return path in NULLABLE
    return type(sample) is type(value) or (isinstance(value, float) and type(sample) is int)


# properties


@settings(deadline=None, max_examples=30)
@given(manifests)
def test_a_manifest_comes_back_as_it_was_written(manifest: Manifest) -> None:
    assert Manifest.from_json(manifest.to_json()) == manifest


@settings(deadline=None, max_examples=30)
@given(manifests)
def test_writing_again_gives_the_same_text(manifest: Manifest) -> None:
    assert Manifest.from_json(manifest.to_json()).to_json() == manifest.to_json()


@settings(deadline=None, max_examples=150)
@given(st.sampled_from(list(VALUES)), json_values)
def test_whatever_stands_at_any_place_is_read_or_refused_on_purpose(path: Path, value: object) -> None:
    try:
        manifest = read(replaced(path, value))
    except ArtifactError:
        return
    assert Manifest.from_json(manifest.to_json()) == manifest


@settings(deadline=None, max_examples=40)
@given(st.integers(0, len(MANIFEST_OF_ALL_PARTS.to_json()) - 3))
def test_a_manifest_cut_anywhere_is_refused(length: int) -> None:
    with pytest.raises(ArtifactError, match=f"{MANIFEST} is not valid JSON"):
        Manifest.from_json(MANIFEST_OF_ALL_PARTS.to_json()[:length])


# tables


@pytest.mark.parametrize("path", KEYS, ids=spelled)
def test_a_missing_key_is_named(path: Path) -> None:
    changed = data()
    del holder_of(changed, path)[path[-1]]
    with pytest.raises(ArtifactError, match=rf"{MANIFEST} lacks .*{path[-1]}; compile the model again"):
        read(changed)


@pytest.mark.parametrize("path", VALUES, ids=spelled)
def test_a_value_of_any_other_type_is_named_and_a_bool_is_no_number(path: Path) -> None:
    where = path[0] + "".join(f"[{key}]" if isinstance(key, int) else f".{key}" for key in path[1:])
    for sample in SAMPLES:
        if not fits(sample, VALUES[path], path):
            with pytest.raises(ArtifactError, match=re.escape(f" at {where}, expected ")):
                read(replaced(path, sample))


@pytest.mark.parametrize("key", ["ladder", "signature.inputs", "labels", "validation", "certificates"])
def test_an_item_of_the_wrong_type_is_refused(key: str) -> None:
    path = (*key.split("."), 0)
    for item in (None, 1.5, ["x"], True):
        with pytest.raises(ArtifactError, match=rf"at {key}\[0\], expected (dict|str)"):
            read(replaced(path, item))


@pytest.mark.parametrize(
    "content",
    [
        pytest.param("", id="empty"),
        pytest.param("{", id="open"),
        pytest.param("{} {}", id="two values"),
        pytest.param("[" * 100_000, id="nested too deep"),
        pytest.param("9" * 5_000, id="a number too long"),
    ],
)
def test_what_is_no_json_is_refused(content: str) -> None:
    with pytest.raises(ArtifactError, match=f"{MANIFEST} is not valid JSON"):
        Manifest.from_json(content)


@pytest.mark.parametrize("content", ["null", "[]", "3", '"text"', "true"])
def test_a_manifest_is_an_object(content: str) -> None:
    with pytest.raises(ArtifactError, match=r"at the manifest, expected dict"):
        Manifest.from_json(content)


@pytest.mark.parametrize(
    ("version", "advice"),
    [
        pytest.param(SCHEMA_VERSION + 1, "upgrade hf_bucket", id="next"),
        pytest.param(99, "upgrade hf_bucket", id="far future"),
        pytest.param(0, "compile the model again", id="past"),
        pytest.param(-1, "compile the model again", id="negative"),
    ],
)
def test_another_schema_version_says_what_to_do(version: int, advice: str) -> None:
    with pytest.raises(
        ArtifactError, match=rf"schema_version {version}, this hf_bucket reads {SCHEMA_VERSION}; {advice}"
    ):
        read({"schema_version": version})


@pytest.mark.parametrize(
    "name",
    [
        "../x",
        "..",
        ".",
        "",
        "/etc/passwd",
        "a/b",
        "a\\b",
        "..\\x",
        "C:x",
        "a\0",
        "\0",
        "\ud800",
    ],
    ids=ascii,
)
def test_a_file_name_that_could_lead_elsewhere_is_refused(name: str) -> None:
    changed = data()
    changed["files"][name] = changed["files"].pop("model.onnx")
    with pytest.raises(ArtifactError, match="not a plain file name; do not trust it"):
        read(changed)


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        pytest.param(
            ("signature", "inputs", 0, "axes", 1), "length", "unknown axis 'length' at signature.inputs", id="axis"
        ),
        pytest.param(("signature", "outputs", 0, "axes", 0), "", "unknown axis '' at signature.outputs", id="no axis"),
        pytest.param(("signature", "inputs", 1, "dtype"), "object", "dtype 'object' at signature.inputs", id="dtype"),
        pytest.param(("signature", "outputs", 0, "dtype"), "complex64", "dtype 'complex64' at sig", id="output dtype"),
        pytest.param(("memory", "b1_s8"), -1, "has -1 at memory.b1_s8, expected at least 0", id="negative memory"),
        pytest.param(("validation", 0, "max_abs_delta"), float("nan"), "has nan at validation", id="NaN"),
        pytest.param(("validation", 0, "max_abs_delta"), float("inf"), "has inf at validation", id="infinity"),
        pytest.param(("validation", 0, "max_abs_delta"), 10**400, "at validation.0..max_abs_delta", id="huge number"),
    ],
)
def test_a_value_out_of_its_range_is_named(path: Path, value: object, message: str) -> None:
    with pytest.raises(ArtifactError, match=message):
        read(replaced(path, value))


@pytest.mark.parametrize(
    ("ladder", "message"),
    [
        pytest.param([], "buckets is empty", id="no bucket"),
        pytest.param([{"batch_size": 1, "extent": [8]}] * 2, "more than once", id="a bucket twice"),
        pytest.param([{"batch_size": 0, "extent": [8]}], "batch size must be", id="batch of none"),
        pytest.param([{"batch_size": 1, "extent": [-8]}], "length must be", id="negative length"),
        pytest.param([{"batch_size": 1, "extent": []}], "needs an extent", id="no extent"),
        pytest.param(
            [{"batch_size": 1, "extent": [8]}, {"batch_size": 1, "extent": [8, 8]}],
            "different kinds",
            id="mixed extents",
        ),
    ],
)
def test_buckets_that_are_no_ladder_are_refused(ladder: list[object], message: str) -> None:
    with pytest.raises(ArtifactError, match=message):
        read(replaced(("ladder",), ladder))


# examples


def test_the_order_of_buckets_in_the_file_does_not_matter() -> None:
    changed = data()
    changed["ladder"].reverse()
    assert read(changed) == MANIFEST_OF_ALL_PARTS


def test_a_whole_number_is_a_fraction_too() -> None:
    delta = read(replaced(("validation", 0, "max_abs_delta"), 0)).validation[0].max_abs_delta
    assert delta == 0.0
    assert isinstance(delta, float)


@pytest.mark.parametrize(
    ("max_abs_delta", "label_flips", "allowed", "passed"),
    [
        pytest.param(1e-4, 0, 1e-4, True, id="just allowed"),
        pytest.param(1.1e-4, 0, 1e-4, False, id="too far"),
        pytest.param(0.0, 1, 1e-4, False, id="a flip"),
        pytest.param(9.0, 9, None, True, id="not judged"),
    ],
)
def test_a_certificate_passes_within_what_is_allowed_and_without_a_flip(
    max_abs_delta: float, label_flips: int, allowed: float | None, passed: bool
) -> None:
    certificate = MANIFEST_OF_ALL_PARTS.certificates[0]
    figures = {"max_abs_delta": max_abs_delta, "label_flips": label_flips, "allowed": allowed}
    assert replace(certificate, **figures).passed is passed


def test_keys_that_are_not_known_are_left_alone() -> None:
    assert read({**data(), "comment": "by hand"}) == MANIFEST_OF_ALL_PARTS


def test_a_pad_id_no_dtype_holds_is_refused() -> None:
    changed = data()
    changed["signature"]["inputs"][0]["pad_id"] = 2**40
    with pytest.raises(ArtifactError, match=r"1099511627776 at signature\.inputs\[0\]\.pad_id, expected a number"):
        read(changed)


@pytest.mark.parametrize(
    ("key", "value"),
    [("labels", ["other", "names"]), ("problem_type", None), ("task", "x"), ("versions", {}), ("sha256", "0" * 64)],
)
def test_a_manifest_that_was_altered_is_refused_unless_its_digest_is_taken_out(key: str, value: object) -> None:
    with pytest.raises(ArtifactError, match=r"was altered.*remove its key sha256"):
        read({**written(), key: value})


def test_the_layout_of_a_manifest_is_not_guarded() -> None:
    turned = dict(reversed(written().items()))
    assert Manifest.from_json(json.dumps(turned, indent=4)) == MANIFEST_OF_ALL_PARTS


def test_a_manifest_may_be_changed_by_hand_once_its_digest_is_taken_out() -> None:
    assert read({**data(), "labels": ["yes", "no"]}).labels == ("yes", "no")


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        pytest.param(("quantization", "tries"), [], "a quantization without tries", id="no try"),
        pytest.param(("quantization", "float_weights_bytes"), 0, "or made of nothing", id="no weights"),
        pytest.param(("fusion", "relative", "b4_s16"), {}, "not timed alike", id="no way timed"),
        pytest.param(("fusion", "relative", "b1_s8"), {"none": 1.0}, "not timed alike", id="another way timed"),
        pytest.param(("memory", "b1_s8"), 10**400, "expected at least 0, and 63 bits", id="endless memory"),
    ],
)
def test_figures_that_nothing_could_be_told_of_are_refused(path: Path, value: object, message: str) -> None:
    with pytest.raises(ArtifactError, match=message):
        read(replaced(path, value))
