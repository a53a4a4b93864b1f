"""Linear layers take a list of tokens, whatever stands around them, and no number changes by it."""

from __future__ import annotations

from collections import Counter

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from graphs import parsed, run, shapes_at
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_bucket.flatten import flatten
from hf_bucket.surgery import SIZES

# One layer of a transformer as torch's exporter writes it: two heads of width 4, features of width 8, inside 16.
LAYER = """
<ir_version: 9, opset_import: ["" : 20]>
layer (float[batch, length, 8] x, float[1, length, 8] places) => (float[batch, length, 8] y)
<float[8, 8] wq, float[8, 8] wk, float[8, 8] wv, float[8, 8] wo, float[8, 16] wi, float[16, 8] wu,
 float[8] bq, float[8] bk, float[8] bo, float[16] bi, float[8] scale,
 float[8, 1] w1>
{
    sizes = Shape (x)
    at0 = Constant <value_ints = [0]> ()
    at1 = Constant <value_ints = [1]> ()
    at2 = Constant <value_ints = [2]> ()
    at4 = Constant <value_ints = [4]> ()
    any = Constant <value_ints = [-1]> ()
    leading = Slice (sizes, at0, at2)
    split = Concat <axis = 0> (leading, any, at4)
    join = Concat <axis = 0> (leading, any)
    double = Add (x, x)
    placed = Add (double, places)
    q = MatMul (placed, wq)
    k = MatMul (placed, wk)
    v = MatMul (placed, wv)
    qb = Add (q, bq)
    kb = Add (bk, k)
    qs = Reshape <allowzero = 1> (qb, split)
    ks = Reshape <allowzero = 1> (kb, split)
    vs = Reshape <allowzero = 1> (v, split)
    qt = Transpose <perm = [0, 2, 1, 3]> (qs)
    kt = Transpose <perm = [0, 2, 1, 3]> (ks)
    vt = Transpose <perm = [0, 2, 1, 3]> (vs)
    kk = Transpose <perm = [0, 1, 3, 2]> (kt)
    scores = MatMul (qt, kk)
    shares = Softmax <axis = -1> (scores)
    context = MatMul (shares, vt)
    together = Transpose <perm = [0, 2, 1, 3]> (context)
    joined = Reshape <allowzero = 1> (together, join)
    out = MatMul (joined, wo)
    biased = Add (out, bo)
    residual = Add (biased, placed)
    normal = LayerNormalization <axis = -1> (residual, scale, bo)
    inner = MatMul (normal, wi)
    innerb = Add (inner, bi)
    active = Gelu (innerb)
    outer = MatMul (active, wu)
    last = Add (outer, normal)
    end = Identity (last)
    y = Identity (end)
}
"""
END = "end = Identity (last)"


def flattened(model: onnx.ModelProto) -> tuple[onnx.ModelProto, int]:
    """The model after ``flatten``, and the count of linear layers on lists."""
    changed = ir.serde.deserialize_model(model)
    layers = flatten(changed, {size: shapes_at(model, *size) for size in SIZES})
    return ir.serde.serialize_model(changed), layers


def answer(model: onnx.ModelProto, rows: int, tokens: int) -> np.ndarray:
    generator = np.random.default_rng(rows * 100 + tokens)
    inputs = {"x": generator.normal(size=(rows, tokens, 8)), "places": generator.normal(size=(1, tokens, 8))}
    wanted = {value.name for value in model.graph.input}
    return run(model, {name: array.astype(np.float32) for name, array in inputs.items() if name in wanted})


def assert_same(text: str, layers: int, *, rows: int = 3, tokens: int = 4) -> onnx.ModelProto:
    """Flatten a model, compare what it returns with what it returned, and return it."""
    model = parsed(text)
    changed, found = flattened(model)
    assert found == layers
    np.testing.assert_allclose(answer(changed, rows, tokens), answer(model, rows, tokens), atol=1e-5, rtol=1e-5)
    return changed


def operators(model: onnx.ModelProto) -> Counter[str]:
    return Counter(node.op_type for node in model.graph.node)


@settings(deadline=None, max_examples=25)
@given(st.integers(1, 8), st.integers(1, 9))
def test_no_number_changes(rows: int, tokens: int) -> None:
    assert_same(LAYER, 6, rows=rows, tokens=tokens)


def test_layers_run_on_lists() -> None:
    shapes = shapes_at(assert_same(LAYER, 6), 3, 5)
    for name in ("q", "qb", "kb", "v", "out", "biased", "residual", "normal", "last"):
        assert shapes[name] == (15, 8), name
    assert shapes["active"] == (15, 16)
    assert shapes["double"] == shapes["placed"] == (3, 5, 8), "nothing before the first layer is touched"
    assert shapes["scores"] == (3, 2, 5, 5)


def test_nothing_goes_from_lists_to_rows_and_back() -> None:
    found = operators(assert_same(LAYER, 6))
    # the list of the input, one split each for queries, keys and values, one that joins heads, and rows for the output
    assert found["Reshape"] == 6


@pytest.mark.parametrize("heads", [2, -1])
def test_a_split_that_copies_rows_and_tokens_takes_the_list(heads: int) -> None:
    shapes = {
        "split = Concat <axis = 0> (leading, any, at4)": f"split = Constant <value_ints = [0, 0, {heads}, 4]> ()",
        "join = Concat <axis = 0> (leading, any)": "join = Constant <value_ints = [0, 0, -1]> ()",
        "<allowzero = 1> ": "",
    }
    text = LAYER
    for line, instead in shapes.items():
        assert line in text
        text = text.replace(line, instead)
    changed = assert_same(text, 6)
    found = operators(changed)
    assert (found["Reshape"], found["Concat"]) == (6, 2), "as many as where nothing is copied"
    assert shapes_at(changed, 3, 5)["qs"] == (3, 5, 2, 4)


def test_what_leaves_the_graph_keeps_its_rows() -> None:
    changed = assert_same(LAYER.replace("y = Identity (end)", "y = Add (end, bo)"), 6)
    assert shapes_at(changed, 3, 5)["y"] == (3, 5, 8)


@pytest.mark.parametrize(
    ("step", "layers"),
    [
        pytest.param("end = Softmax <axis = 1> (last)", 6, id="tokens weighed against each other"),
        pytest.param("end = Add (last, places)", 6, id="one row for all"),
        pytest.param(
            "zeros = Constant <value_ints = [0, 0, 8]> ()\n end = Reshape (last, zeros)", 6, id="sizes copied"
        ),
        pytest.param(
            "zeros = Constant <value_ints = [0, 0, 2, 4]> ()\n h = Reshape (last, zeros)\n t = Softmax <axis = 1> (h)\n"
            " back = Constant <value_ints = [0, 0, -1]> ()\n end = Reshape (t, back)",
            6,
            id="sizes copied, and features split",
        ),
        pytest.param("zeros = Constant <value_ints = [0, 0, 0]> ()\n end = Reshape (last, zeros)", 6, id="all copied"),
        pytest.param(
            "zeros = Constant <value_ints = [0, -1, 8]> ()\n end = Reshape (last, zeros)", 6, id="rows copied"
        ),
        pytest.param(
            "some = Constant <value_ints = [-1, 2, 4]> ()\n h = Reshape (last, some)\n t = Softmax <axis = 1> (h)\n"
            " end = Reshape (t, sizes)",
            6,
            id="none copied",
        ),
        pytest.param("more = CumSum (last, at1)\n z = MatMul (more, wq)\n end = Neg (z)", 7, id="a layer after it"),
        pytest.param(
            "z = Slice (last, at0, at1, at1)\n o = MatMul (z, wq)\n p = Add (o, bq)\n end = Add (last, p)",
            7,
            id="a token of each",
        ),
        pytest.param("z = MatMul (places, wq)\n p = Add (z, bq)\n end = Add (last, p)", 6, id="a layer on one row"),
        pytest.param("whole = Expand (scale, sizes)\n end = Mul (last, whole)", 6, id="not a constant"),
        pytest.param("few = Expand (scale, at1)\n end = Mul (last, few)", 6, id="computed"),
        pytest.param("end = LayerNormalization <axis = 1> (last, last)", 6, id="norm of rows"),
        pytest.param("end = LayerNormalization <axis = 2> (last, scale)", 6, id="norm counted from the front"),
        pytest.param(
            "at8 = Constant <value_ints = [8]> ()\n few = Slice (last, at0, at8, at1)\n z = MatMul (few, wq)\n"
            " t = Softmax <axis = 1> (z)\n m = ReduceMax (t, at1)\n end = Add (last, m)",
            7,
            id="as many tokens as there are, up to a limit",
        ),
        pytest.param(
            "t = Transpose <perm = [0, 2, 1]> (last)\n square = MatMul (t, last)\n end = MatMul (last, square)",
            6,
            id="weights of each row",
        ),
        pytest.param(
            "t = Transpose <perm = [0, 2, 1]> (last)\n each = MatMul (last, t)\n one = MatMul (last, w1)\n"
            " some = Mul (each, one)\n end = MatMul (some, last)",
            7,
            id="as many features as tokens",
        ),
    ],
)
def test_whatever_does_not_treat_tokens_one_by_one_gets_rows(step: str, layers: int) -> None:
    assert_same(LAYER.replace(END, step), layers, tokens=5)
    assert_same(LAYER.replace(END, step), layers, rows=1, tokens=1)
    assert_same(LAYER.replace(END, step), layers, rows=2, tokens=10)


def test_an_operator_of_another_domain_gets_rows() -> None:
    text = LAYER.replace('["" : 20]', '["" : 20, "ours" : 1]').replace(END, "end = ours.Neg (last)")
    model = parsed(text)
    known = {size: {**shapes_at(model, *size), "end": (*size, 8)} for size in SIZES}
    changed = ir.serde.deserialize_model(model)
    assert flatten(changed, known) == 6
    (ours,) = (node for node in changed.graph if node.domain == "ours")
    assert ours.inputs[0].name != "last"


def test_a_graph_with_branches_is_left_alone() -> None:
    """A branch reads values of the graph around it by their names."""
    branch = "{b = ReduceMean <keepdims = 1> (last, at2)}"
    step = (
        f"yes = Constant <value = bool {{1}}> ()\n end = If (yes) <then_branch = t () => (float[a, b, c] b) {branch}, "
    )
    step += f"else_branch = e () => (float[a, b, c] b) {branch}>"
    assert_same(LAYER.replace(END, step).replace("float[batch, length, 8] y", "float[batch, length, 1] y"), 0)


def test_values_of_unknown_shape_are_left_alone() -> None:
    model = parsed(LAYER)
    changed = ir.serde.deserialize_model(model)
    assert flatten(changed, {size: {} for size in SIZES}) == 0
    after = operators(ir.serde.serialize_model(changed))
    assert operators(model) - after == Counter(Constant=1), "but for one that nobody uses"
    assert not after - operators(model)


def test_one_size_alone_does_not_tell_heads_from_tokens() -> None:
    """Features of as many tokens as one of the sizes has are features all the same."""
    rows, tokens = SIZES[0]
    text = f"""
    <ir_version: 9, opset_import: ["" : 20]>
    heads (float[batch, length, 8] x) => (float[batch, {tokens}, 8] y)
    <float[8, 8] w, float[{tokens}, 8] m>
    {{
        at1 = Constant <value_ints = [1]> ()
        mean = ReduceMean (x, at1)
        several = Add (mean, m)
        z = MatMul (several, w)
        y = Identity (z)
    }}
    """
    assert_same(text, 0, rows=rows, tokens=tokens)
