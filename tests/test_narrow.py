"""Only the token that the head reads is computed where others no longer matter, and no number changes by it."""

from __future__ import annotations

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from graphs import parsed, run
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_bucket.narrow import narrow

# One layer of a transformer, read at one token: two heads of width 4, features of width 8.
LAYER = """
<ir_version: 9, opset_import: ["" : 20]>
layer (float[batch, length, 8] x, float[batch, 1, 1, length] mask) => (float[batch, 8] y)
<float[8, 8] wq, float[8, 8] wk, float[8, 8] wv, float[8, 8] wo, float[8] bias, float[8] scale>
{
    split = Constant <value_ints = [0, -1, 2, 4]> ()
    join = Constant <value_ints = [0, -1, 8]> ()
    q = MatMul (x, wq)
    k = MatMul (x, wk)
    v = MatMul (x, wv)
    qs = Reshape (q, split)
    ks = Reshape (k, split)
    vs = Reshape (v, split)
    qt = Transpose <perm = [0, 2, 1, 3]> (qs)
    kt = Transpose <perm = [0, 2, 3, 1]> (ks)
    vt = Transpose <perm = [0, 2, 1, 3]> (vs)
    scores = MatMul (qt, kt)
    masked = Add (scores, mask)
    shares = Softmax <axis = -1> (masked)
    context = MatMul (shares, vt)
    together = Transpose <perm = [0, 2, 1, 3]> (context)
    joined = Reshape (together, join)
    out = MatMul (joined, wo)
    biased = Add (out, bias)
    residual = Add (biased, x)
    normal = LayerNormalization <axis = -1> (residual, scale, bias)
    active = Gelu (normal)
    CHOOSE
}
"""
COMPUTED = LAYER  # as torch's exporter writes shapes; it knows them better than onnx, which does not tell rows apart
for constant, as_exported in {
    "split = Constant <value_ints = [0, -1, 2, 4]> ()": "split = Concat <axis = 0> (leading, any, four)",
    "join = Constant <value_ints = [0, -1, 8]> ()": "join = Concat <axis = 0> (leading, any)",
}.items():
    assert constant in COMPUTED
    COMPUTED = COMPUTED.replace(constant, as_exported)
COMPUTED = COMPUTED.replace("Reshape (", "Reshape <allowzero = 1> (").replace(
    "{\n",
    """{
    leading = Shape <end = 2> (x)
    any = Constant <value_ints = [-1]> ()
    four = Constant <value_ints = [4]> ()
""",
)
NORMAL = "normal = LayerNormalization <axis = -1> (residual, scale, bias)"
FIRST = "zero = Constant <value_int = 0> ()\n    y = Gather <axis = 1> (active, zero)"
LAST = "last = Constant <value_int = -1> ()\n    y = Gather <axis = 1> (active, last)"
SLICED = """start = Constant <value_ints = [0]> ()
    end = Constant <value_ints = [1]> ()
    axis = Constant <value_ints = [1]> ()
    first = Slice (active, start, end, axis)
    y = Squeeze (first, axis)"""
SECOND = "one = Constant <value_int = 1> ()\n    y = Gather <axis = 1> (active, one)"
MEAN = "axis = Constant <value_ints = [1]> ()\n    y = ReduceMean <keepdims = 0> (active, axis)"


def graph(text: str, shapes: str | None = None) -> onnx.ModelProto:
    """The model of a text, its weights random, its values with the shapes that it, or another one, tells."""
    model = parsed(text)
    model.graph.value_info.extend(
        onnx.shape_inference.infer_shapes(parsed(shapes or text), data_prop=True).graph.value_info
    )
    return model


def narrowed(model: onnx.ModelProto) -> tuple[onnx.ModelProto, int]:
    """The model after ``narrow``, without the shapes that no longer hold, and the count of smaller products."""
    changed = ir.serde.deserialize_model(model)
    moved = narrow(changed)
    for node in changed.graph:
        for output in node.outputs:
            if not output.is_graph_output():
                output.shape = None
    return ir.serde.serialize_model(changed), moved


def inputs_of(batch: int, length: int) -> dict[str, np.ndarray]:
    generator = np.random.default_rng(batch * 100 + length)
    mask = np.where(generator.random((batch, 1, 1, length)) < 0.3, -1e9, 0.0)
    mask[:, :, :, [0, -1]] = 0.0
    return {
        "x": generator.normal(size=(batch, length, 8)).astype(np.float32),
        "mask": mask.astype(np.float32),
    }


@settings(deadline=None, max_examples=30)
@given(st.integers(1, 4), st.integers(1, 9), st.sampled_from([FIRST, LAST, SLICED]), st.sampled_from([LAYER, COMPUTED]))
def test_no_number_changes(batch: int, length: int, choose: str, layer: str) -> None:
    model = graph(layer.replace("CHOOSE", choose), LAYER.replace("CHOOSE", choose))
    less, moved = narrowed(model)
    inputs = inputs_of(batch, length)
    assert moved == 4, "queries, scores, context and output"
    np.testing.assert_allclose(run(less, inputs), run(model, inputs), atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("layer", [LAYER, COMPUTED], ids=["constant shapes", "computed shapes"])
@pytest.mark.parametrize("choose", [FIRST, LAST, SLICED], ids=["first", "last", "sliced"])
def test_what_is_computed_holds_one_token(choose: str, layer: str) -> None:
    less, _ = narrowed(graph(layer.replace("CHOOSE", choose), LAYER.replace("CHOOSE", choose)))
    for value, size in zip(less.graph.input[0].type.tensor_type.shape.dim[:2], (3, 5), strict=True):
        value.ClearField("dim_param")
        value.dim_value = size
    mask = less.graph.input[1].type.tensor_type.shape.dim
    mask[0].dim_value, mask[3].dim_value = 3, 5
    shapes = {
        value.name: [dim.dim_value for dim in value.type.tensor_type.shape.dim]
        for value in onnx.shape_inference.infer_shapes(less, data_prop=True).graph.value_info
    }
    assert shapes["k"] == shapes["v"] == [3, 5, 8], "every token is attended to"
    assert shapes["q"] == shapes["out"] == shapes["normal"] == [3, 1, 8]
    assert shapes["scores"] == [3, 2, 1, 5]


@pytest.mark.parametrize("choose", [SECOND, MEAN], ids=["another token", "all tokens"])
def test_a_head_that_reads_otherwise_is_left_alone(choose: str) -> None:
    model = graph(LAYER.replace("CHOOSE", choose))
    less, moved = narrowed(model)
    assert moved == 0
    assert [node.op_type for node in less.graph.node] == [node.op_type for node in model.graph.node]


@pytest.mark.parametrize(
    ("line", "why"),
    [
        pytest.param("normal = Softmax <axis = 1> (residual)", "it weighs tokens against each other", id="softmax"),
        pytest.param("normal = LayerNormalization <axis = 1> (residual, whole)", "it normalises over them", id="norm"),
        pytest.param("normal = CumSum (residual, one)", "nobody said that it treats tokens one by one", id="unknown"),
    ],
)
def test_a_step_that_mixes_tokens_gets_them_all(line: str, why: str) -> None:
    text = LAYER.replace("CHOOSE", FIRST).replace(
        "normal = LayerNormalization <axis = -1> (residual, scale, bias)", line
    )
    one = "one = Constant <value_int = 1> ()\n    residual ="
    text = text.replace("residual =", one, 1).replace("float[8] scale>", "float[8] scale, float[5, 8] whole>")
    model = graph(text)
    less, moved = narrowed(model)
    assert moved == 0, why
    inputs = inputs_of(2, 5)
    np.testing.assert_allclose(run(less, inputs), run(model, inputs), atol=1e-6, rtol=1e-5)


def test_a_value_that_others_read_whole_stays_whole() -> None:
    text = LAYER.replace("CHOOSE", f"{FIRST}\n    z = ReduceMax <keepdims = 0> (biased)").replace(
        "(float[batch, 8] y)", "(float[batch, 8] y, float z)"
    )
    model = graph(text)
    less, moved = narrowed(model)
    assert moved == 0, "the output of every product is in the maximum"
    inputs = inputs_of(2, 4)
    np.testing.assert_allclose(run(less, inputs), run(model, inputs), atol=1e-6, rtol=1e-5)


def test_a_reshape_that_joins_rows_and_tokens_is_not_passed() -> None:
    flat = """flat = Constant <value_ints = [-1, 8]> ()
    tokens = Reshape (residual, flat)
    product = MatMul (tokens, wo)
    size = Shape (residual)
    normal = Reshape (product, size)"""
    text = LAYER.replace("CHOOSE", FIRST).replace(NORMAL, flat)
    model = graph(text)
    less, moved = narrowed(model)
    assert moved == 0
    inputs = inputs_of(3, 4)
    np.testing.assert_allclose(run(less, inputs), run(model, inputs), atol=1e-6, rtol=1e-5)


def test_a_reshape_that_makes_two_tokens_of_one_is_not_passed() -> None:
    halves = """half = Constant <value_ints = [0, -1, 4]> ()
    halves = Reshape (active, half)
    zero = Constant <value_int = 0> ()
    y = Gather <axis = 1> (halves, zero)"""
    model = graph(LAYER.replace("CHOOSE", halves).replace("(float[batch, 8] y)", "(float[batch, 4] y)"))
    less, moved = narrowed(model)
    assert moved == 0
    inputs = inputs_of(3, 4)
    np.testing.assert_allclose(run(less, inputs), run(model, inputs), atol=1e-6, rtol=1e-5)


def test_values_without_shapes_are_left_alone() -> None:
    assert narrowed(parsed(LAYER.replace("CHOOSE", FIRST)))[1] == 0
