"""What attentions do not need is left out of a graph, and no number changes by it."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from graphs import parsed, run, shapes_at
from hypothesis import given, settings
from hypothesis import strategies as st

import hf_bucket
from hf_bucket.artifact import GRAPH
from hf_bucket.attention import straighten
from hf_bucket.compile import CompileOptions, compile_model
from hf_bucket.graph import load_graph, straighten_saved
from hf_bucket.source import Source
from hf_bucket.surgery import SIZES

# An attention as torch's exporter writes it: two heads of width 4; a row whose tokens are all masked gets zeros.
ATTENTION = """
<ir_version: 9, opset_import: ["" : 20]>
attention (float[batch, length, 8] x, bool[batch, length] mask) => (float[batch, length, 8] y)
<float[8, 8] wq, float[8, 8] wk, float[8, 8] wv>
{
    sizes = Shape (x)
    at0 = Constant <value_ints = [0]> ()
    at1 = Constant <value_ints = [1]> ()
    at2 = Constant <value_ints = [2]> ()
    at3 = Constant <value_ints = [3]> ()
    at4 = Constant <value_ints = [4]> ()
    any = Constant <value_ints = [-1]> ()
    middle = Constant <value_ints = [1, 2]> ()
    root = Constant <value = float {0.625}> ()
    other = Constant <value = float {0.75}> ()
    low = Constant <value = float {-10000.0}> ()
    none = Constant <value = float {0.0}> ()
    leading = Slice (sizes, at0, at2)
    split = Concat <axis = 0> (leading, any, at4)
    join = Concat <axis = 0> (leading, any)
    keys = Unsqueeze (mask, middle)
    seen = Cast <to = 1> (keys)
    several = ReduceSum (seen, any)
    blind = Equal (several, none)
    hidden = Not (keys)
    cost = Cast <to = 1> (hidden)
    bias = Mul (cost, low)
    q = MatMul (x, wq)
    k = MatMul (x, wk)
    v = MatMul (x, wv)
    qs = Reshape <allowzero = 1> (q, split)
    ks = Reshape <allowzero = 1> (k, split)
    vs = Reshape <allowzero = 1> (v, split)
    qt = Transpose <perm = [0, 2, 1, 3]> (qs)
    kt = Transpose <perm = [0, 2, 1, 3]> (ks)
    vt = Transpose <perm = [0, 2, 1, 3]> (vs)
    kshape = Shape (kt)
    klong = Slice (kshape, at2, at3)
    kwide = Slice (kshape, at3, at4)
    kfirst = Slice (kshape, at0, at2)
    merged = Concat <axis = 0> (any, klong, kwide)
    turned = Concat <axis = 0> (kfirst, kwide, klong)
    km = Reshape (kt, merged)
    kr = Transpose <perm = [0, 2, 1]> (km)
    kk = Reshape (kr, turned)
    qm = Mul (qt, root)
    kx = Mul (kk, other)
    scores = MatMul (qm, kx)
    biased = Add (scores, bias)
    shares = Softmax <axis = -1> (biased)
    context = MatMul (shares, vt)
    filled = Where (blind, none, context)
    together = Transpose <perm = [0, 2, 1, 3]> (filled)
    joined = Reshape <allowzero = 1> (together, join)
    rows = Concat <axis = 0> (leading, any)
    y = Reshape (joined, rows)
}
"""


def straightened(model: onnx.ModelProto) -> tuple[onnx.ModelProto, int]:
    """The model after ``straighten``, and the count of changes."""
    changed = ir.serde.deserialize_model(model)
    changes = straighten(changed, {size: shapes_at(model, *size) for size in SIZES})
    return ir.serde.serialize_model(changed), changes


def answer(model: onnx.ModelProto, rows: int, tokens: int, features: int = 8, **more: np.ndarray) -> np.ndarray:
    generator = np.random.default_rng(rows * 100 + tokens)
    mask = generator.random((rows, tokens)) < 0.7
    mask[0] = False
    return run(model, {"x": generator.normal(size=(rows, tokens, features)).astype(np.float32), "mask": mask, **more})


def assert_same(text: str, changes: int, *, rows: int = 3, tokens: int = 4, features: int = 8) -> Counter[str]:
    """Straighten a model, compare what it returns with what it returned, and count its operators."""
    model = parsed(text)
    changed, found = straightened(model)
    assert found == changes
    expected = answer(model, rows, tokens, features)
    np.testing.assert_allclose(answer(changed, rows, tokens, features), expected, atol=1e-4, rtol=1e-5)
    return Counter(node.op_type for node in changed.graph.node)


def without(line: str, instead: str = "") -> str:
    assert line in ATTENTION
    return ATTENTION.replace(line, instead)


@settings(deadline=None, max_examples=25)
@given(st.integers(1, 8), st.integers(1, 9))
def test_no_number_changes(rows: int, tokens: int) -> None:
    assert_same(ATTENTION, 3, rows=rows, tokens=tokens)


def test_between_the_products_is_what_they_need() -> None:
    before, after = Counter(node.op_type for node in parsed(ATTENTION).graph.node), assert_same(ATTENTION, 3)
    del before["Constant"], after["Constant"]
    assert before - after == Counter(Transpose=1, Reshape=2, Slice=3, Shape=1, Concat=2, Mul=1)
    assert after - before == Counter(Squeeze=1)
    changed = straightened(parsed(ATTENTION))[0].graph.node
    (keys,) = (node for node in changed if list(node.attribute and node.attribute[0].ints) == [0, 2, 3, 1])
    assert list(keys.input) == ["ks"]
    (scores,) = (node for node in changed if node.op_type == "MatMul" and node.output == ["scores"])
    assert scores.input[1] == keys.output[0]
    assert [node.op_type for node in changed][-5:] == ["Transpose", "Reshape", "Where", "Concat", "Reshape"]


def test_one_scale_is_the_product_of_both() -> None:
    changed = ir.serde.deserialize_model(straightened(parsed(ATTENTION))[0])
    (scaled,) = (node for node in changed.graph if node.op_type == "Mul" and node.inputs[0].name == "qt")
    factor = scaled.inputs[1].producer().attributes["value"].value.numpy()
    assert (factor.dtype, float(factor)) == (np.float32, 0.625 * 0.75)


def test_a_row_without_tokens_gets_its_number() -> None:
    changed, _ = straightened(parsed(without("none, context", "other, context")))
    assert (answer(changed, 2, 3)[0] == 0.75).all()


@pytest.mark.parametrize(
    ("line", "instead", "changes"),
    [
        pytest.param("kr = Transpose <perm = [0, 2, 1]> (km)", "kr = Identity (km)", 2, id="keys not turned"),
        pytest.param(
            "kr = Transpose <perm = [0, 2, 1]> (km)",
            "kr = Transpose <perm = [0, 1, 2]> (km)",
            2,
            id="keys turned in no way",
        ),
        pytest.param(
            "merged = Concat <axis = 0> (any, klong, kwide)",
            "merged = Concat <axis = 0> (any, kwide, klong)",
            2,
            id="keys of another shape",
        ),
        pytest.param(
            "kt = Transpose <perm = [0, 2, 1, 3]> (ks)",
            "kp = Transpose <perm = [0, 2, 1, 3]> (ks)\n kt = Neg (kp)",
            3,
            id="keys changed before they are turned",
        ),
        pytest.param(
            "kt = Transpose <perm = [0, 2, 1, 3]> (ks)",
            "kp = Transpose <perm = [0, 2, 3, 1]> (ks)\n kt = Transpose <perm = [0, 1, 3, 2]> (kp)",
            3,
            id="keys turned before in another way",
        ),
        pytest.param(
            "join = Concat <axis = 0> (leading, any)",
            "at8 = Constant <value_ints = [8]> ()\n join = Concat <axis = 0> (any, at8)",
            2,
            id="heads joined and rows too",
        ),
        pytest.param("kx = Mul (kk, other)", "kx = Mul (kk, kk)", 2, id="no scale"),
        pytest.param("kx = Mul (kk, other)", "kx = Identity (kk)", 2, id="one scale"),
        pytest.param(
            "y = Reshape (joined, rows)",
            "more = ReduceMean <keepdims = 0> (qm)\n y = Add (joined, more)",
            2,
            id="scaled queries that are read elsewhere",
        ),
        pytest.param(
            "y = Reshape (joined, rows)",
            "more = ReduceMean <keepdims = 0> (filled)\n y = Add (joined, more)",
            2,
            id="zeros that are read elsewhere",
        ),
        pytest.param(
            "y = Reshape (joined, rows)",
            "more = ReduceMean <keepdims = 0> (together)\n y = Add (joined, more)",
            2,
            id="heads that are read before they are joined",
        ),
        pytest.param("none, context", "vt, context", 2, id="not one number"),
        pytest.param(
            "several = ReduceSum (seen, any)",
            "every = ReduceSum (seen, any)\n two = Constant <value_ints = [1, 2, 1, 1]> ()\n"
            " several = Expand (every, two)",
            2,
            id="another condition for every head",
        ),
    ],
)
def test_what_is_needed_stays(line: str, instead: str, changes: int) -> None:
    assert_same(without(line, instead), changes)
    assert_same(without(line, instead), changes, rows=1, tokens=1)


def test_a_scale_that_is_the_answer_too_stays() -> None:
    text = without("(float[batch, length, 8] y)", "(float[batch, length, 8] y, float[batch, 2, length, 4] qm)")
    assert straightened(parsed(text))[1] == 2


def test_joined_heads_that_are_the_answer_keep_their_zeros() -> None:
    text = without("y = Reshape (joined, rows)").replace("8] y)", "8] joined)")
    assert_same(text, 2)


def test_a_condition_per_token_is_moved_too() -> None:
    text = without("blind = Equal (several, none)", "each = ReduceMax (scores, any)\n blind = Less (each, none)")
    text = text.replace("blind = Less (each, none)", "first = Slice (each, at0, at1, at1)\n blind = Less (first, none)")
    lines = text.splitlines()
    moved = [line for line in lines if line.strip().startswith(("each =", "first =", "blind ="))]
    rest = [line for line in lines if line not in moved]
    place = next(number for number, line in enumerate(rest) if line.strip().startswith("biased"))
    assert_same("\n".join([*rest[:place], *moved, *rest[place:]]), 3)


def test_values_of_unknown_shape_are_left_alone() -> None:
    model = parsed(ATTENTION)
    changed = ir.serde.deserialize_model(model)
    assert straighten(changed, {size: {} for size in SIZES}) == 1, "scales have no shape"


def test_one_size_alone_does_not_tell_how_keys_are_turned() -> None:
    """Where there are as many tokens as keys are wide, another turn has the same shapes."""
    tokens = SIZES[0][1]
    text = without("merged = Concat <axis = 0> (any, klong, kwide)", "merged = Concat <axis = 0> (any, kwide, klong)")
    text = text.replace("(leading, any, at4)", f"(leading, any, at{tokens})").replace("8", str(2 * tokens))
    assert_same(text, 2, tokens=tokens, features=2 * tokens)
    assert_same(text, 2, tokens=tokens + 1, features=2 * tokens)


@pytest.mark.parametrize(
    ("name", "shape", "changes"),
    [("none", [1, 1, 1, 1], 2), ("root", [1, 1, 1, 1, 1], 2), ("none", [1], 3), ("root", [1], 3)],
)
def test_a_number_with_axes_may_give_results_more_of_them(name: str, shape: list[int], changes: int) -> None:
    model = parsed(ATTENTION)
    (number,) = (node for node in model.graph.node if list(node.output) == [name])
    value = onnx.numpy_helper.to_array(number.attribute[0].t).reshape(shape)
    model.graph.node.remove(number)
    model.graph.initializer.append(onnx.numpy_helper.from_array(value, name))
    if len(shape) > 4:  # what follows takes four axes
        (scaled,) = (node for node in model.graph.node if list(node.output) == ["qm"])
        place = list(model.graph.node).index(scaled)
        scaled.output[0] = "raw"
        model.graph.node.insert(place + 1, onnx.helper.make_node("Squeeze", ["raw", "at0"], ["qm"]))
    assert straightened(model)[1] == changes


def test_what_is_broadcast_by_the_choice_keeps_it() -> None:
    """Of a condition per row and one context for all rows, only the choice has rows."""
    text = without(
        "context = MatMul (shares, vt)", "each = MatMul (shares, vt)\n context = Slice (each, at0, at1, at0)"
    )
    model = parsed(text)
    assert straightened(model)[1] == 2
    np.testing.assert_allclose(answer(straightened(model)[0], 3, 4), answer(model, 3, 4), atol=1e-4)


def test_keys_that_are_the_answer_too_stay() -> None:
    text = without("(float[batch, length, 8] y)", "(float[batch, length, 8] y, float[batch, 2, 4, length] kk)")
    assert straightened(parsed(text))[1] == 2


def test_an_operator_of_another_domain_is_none_of_onnxs() -> None:
    text = without("scores = MatMul (qm, kx)", "scores = ours.MatMul (qm, kx)").replace(
        '"" : 20', '"" : 20, "ours" : 1'
    )
    model = parsed(text)
    known = {size: {**shapes_at(parsed(ATTENTION), *size)} for size in SIZES}
    changed = ir.serde.deserialize_model(model)
    assert straighten(changed, known) == 2
    (ours,) = (node for node in changed.graph if node.domain == "ours")
    assert [value.name for value in ours.inputs] == ["qm", "kx"]


def test_a_graph_older_than_squeezes_with_an_input_is_left_alone() -> None:
    changed = ir.serde.deserialize_model(parsed(ATTENTION))
    changed.opset_imports[""] = 12
    assert straighten(changed, {size: shapes_at(parsed(ATTENTION), *size) for size in SIZES}) == 0


@pytest.mark.parametrize(
    ("root", "other", "changes"),
    [(0.35, 0.35, 3), (300.0, 300.0, 2), (1e-4, 1e-4, 2), (float("nan"), 1.0, 2), (0.0, 1.0, 3)],
)
def test_scales_whose_product_half_precision_cannot_hold_stay(root: float, other: float, changes: int) -> None:
    model = parsed(ATTENTION)
    for node in model.graph.node:
        if node.output[0] in ("root", "other"):
            half = np.array(root if node.output[0] == "root" else other, dtype=np.float16)
            node.attribute[0].t.CopyFrom(onnx.numpy_helper.from_array(half))
    changed = ir.serde.deserialize_model(model)
    assert straighten(changed, {size: shapes_at(parsed(ATTENTION), *size) for size in SIZES}) == changes


def test_products_of_whole_numbers_are_none_of_attentions() -> None:
    model = parsed("""
    <ir_version: 9, opset_import: ["" : 20]>
    whole (int64[batch, length] x, int64[length, batch] z) => (int64[batch, batch] y)
    {
        three = Constant <value = int64 {3}> ()
        five = Constant <value = int64 {5}> ()
        a = Mul (x, three)
        b = Mul (z, five)
        y = MatMul (a, b)
    }
    """)
    assert straightened(model)[1] == 0


def test_a_condition_that_comes_from_outside_is_used_there_too() -> None:
    lines = [line for line in ATTENTION.splitlines() if not line.strip().startswith(("blind =", "several ="))]
    text = "\n".join(lines).replace("bool[batch, length] mask", "bool[batch, length] mask, bool[batch, 1, 1, 1] blind")
    model = parsed(text)
    changed, changes = straightened(model)
    assert changes == 3
    blind = np.array([True, False, True]).reshape(3, 1, 1, 1)
    np.testing.assert_allclose(answer(changed, 3, 4, blind=blind), answer(model, 3, 4, blind=blind), atol=1e-4)


def test_a_graph_with_branches_is_left_alone() -> None:
    branch = "{b = Neg (joined)}"
    step = "yes = Constant <value = bool {1}> ()\n y = If (yes) <then_branch = t () => (float[a, b, c] b) "
    step += f"{branch}, else_branch = e () => (float[a, b, c] b) {branch}>"
    assert_same(without("y = Reshape (joined, rows)", step), 0)


def test_a_compiled_bert_has_no_more_than_it_needs(tiny_bert: Path) -> None:
    options = CompileOptions(buckets=[8, 16], batch_sizes=[1, 3])
    graph = compile_model(Source(name=str(tiny_bert)), options, report=lambda line: None).path(GRAPH)
    operators = Counter(node.op_type for node in load_graph(graph).graph)
    layers = operators["Softmax"]
    assert layers == 2
    assert operators["Transpose"] == operators["Reshape"] == 4 * layers
    assert operators["Where"] == layers


def test_a_graph_that_cannot_be_written_again_stays_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(model: ir.Model, path: Path, **options: object) -> None:
        Path(path).write_bytes(b"half of it")
        raise OSError("No space left on device")

    graph = tmp_path / GRAPH
    graph.write_bytes(parsed(ATTENTION).SerializeToString())
    monkeypatch.setattr(ir, "save", full)
    before = graph.read_bytes()
    with pytest.raises(OSError, match="No space left"):
        straighten_saved(graph)
    assert graph.read_bytes() == before
    assert [*tmp_path.iterdir()] == [graph]


def test_a_graph_that_cannot_be_straightened_is_used_as_it_is(tiny_bert: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(path: Path) -> None:
        raise RuntimeError("no such operator\nand more")

    monkeypatch.setattr(hf_bucket.compile, "straighten_saved", fails)
    said: list[str] = []
    options = CompileOptions(buckets=[8, 16], batch_sizes=[1, 5], dtype="float16")
    made = compile_model(Source(name=str(tiny_bert)), options, report=said.append)
    assert "a graph with less in its attentions is not used on this model: RuntimeError: no such operator" in said
    assert len(hf_bucket.load(made.folder, warmup=False)(["w1 w2"])) == 1
