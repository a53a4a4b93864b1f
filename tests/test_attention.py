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
from onnx_ir.convenience import get_const_tensor

import hf_bucket
from hf_bucket.artifact import GRAPH
from hf_bucket.attention import straighten
from hf_bucket.compile import CompileOptions, compile_model
from hf_bucket.graph import load_graph, shapes_by_size, straighten_saved
from hf_bucket.source import Source
from hf_bucket.surgery import SIZES, Shapes

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


def straightened(model: onnx.ModelProto, shapes: Shapes | None = None) -> tuple[onnx.ModelProto, int]:
    """The model after ``straighten``, and the count of changes but for those that ``copying`` has."""
    changed = ir.serde.deserialize_model(model)
    changes = straighten(changed, shapes or {size: shapes_at(model, *size) for size in SIZES})
    return ir.serde.serialize_model(changed), changes - len(copying(changed))


def copying(model: ir.Model) -> dict[str, list[int]]:
    """The Reshapes of a graph that copy sizes from what they reshape, by their outputs, and their constant shapes."""
    found = {}
    for node in model.graph:
        shape = get_const_tensor(node.inputs[1]) if node.op_type == "Reshape" else None
        if shape is not None and "allowzero" not in node.attributes and 0 in shape.numpy():
            found[str(node.outputs[0].name)] = shape.numpy().tolist()
    return found


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
    assert before - after == Counter(Transpose=1, Reshape=2, Slice=4, Shape=2, Concat=5, Mul=1)
    assert after - before == Counter(Squeeze=1)
    changed = straightened(parsed(ATTENTION))[0].graph.node
    (keys,) = (node for node in changed if list(node.attribute and node.attribute[0].ints) == [0, 2, 3, 1])
    assert list(keys.input) == ["ks"]
    (scores,) = (node for node in changed if node.op_type == "MatMul" and node.output == ["scores"])
    assert scores.input[1] == keys.output[0]
    last = [node.op_type for node in changed if node.op_type != "Constant"][-4:]
    assert last == ["Transpose", "Reshape", "Where", "Reshape"]


def test_heads_are_split_and_joined_by_constant_shapes() -> None:
    model = parsed(ATTENTION)
    changed = ir.serde.deserialize_model(straightened(model)[0])
    heads = [0, 0, -1, 4]
    assert copying(changed) == {"qs": heads, "ks": heads, "vs": heads, "joined": [0, 0, -1], "y": [0, 0, -1]}
    assert not copying(ir.serde.deserialize_model(model))


# Rows of tokens, and a Reshape in place of STEP.
RESHAPED = """
<ir_version: 9, opset_import: ["" : 20]>
reshaped (float[batch, length] ids) => (float[?, ?, ?] y)
<float[8] row, float[8, 8] w>
{
    sizes = Shape (ids)
    at0 = Constant <value_ints = [0]> ()
    at1 = Constant <value_ints = [1]> ()
    at2 = Constant <value_ints = [2]> ()
    at4 = Constant <value_ints = [4]> ()
    at8 = Constant <value_ints = [8]> ()
    any = Constant <value_ints = [-1]> ()
    column = Unsqueeze (ids, any)
    x = Mul (column, row)
    rows = Slice (sizes, at0, at1)
    tokens = Slice (sizes, at1, at2)
    both = Mul (rows, tokens)
    STEP
    y = Neg (z)
}
"""
BLOCKS = """
    missing = Neg (tokens)
    more = Mod (missing, at8)
    none = Constant <value_ints = [0, 0, 0, 0]> ()
    pads = Concat <axis = 0> (none, more, at0)
    whole = Pad (x, pads)
    shape = Concat <axis = 0> (rows, any, at8, at8)
    blocks = Reshape (whole, shape)
    z = ReduceMax <keepdims = 0> (blocks, at2)
"""


@pytest.mark.parametrize(
    ("step", "copied"),
    [
        pytest.param("s = Concat <axis = 0> (rows, tokens, at8)\n z = Reshape (x, s)", [0, 0, 8], id="all sizes"),
        pytest.param("s = Concat <axis = 0> (rows, any, at4)\n z = Reshape (x, s)", [0, -1, 4], id="rows"),
        pytest.param(BLOCKS, [0, -1, 8, 8], id="as many blocks as tokens fill, which is one for each of SIZES"),
        pytest.param("s = Concat <axis = 0> (tokens, rows, at8)\n z = Reshape (x, s)", None, id="the other way round"),
        pytest.param("s = Concat <axis = 0> (both, at2, at4)\n z = Reshape (x, s)", None, id="another size"),
        pytest.param("s = Concat <axis = 0> (any, at2, at4)\n z = Reshape (x, s)", None, id="none computed"),
        pytest.param("s = Concat <axis = 0> (rows, tokens, at0)\n z = Reshape (x, s)", None, id="a zero of its own"),
        pytest.param(
            "t = Transpose <perm = [0, 2, 1]> (x)\n each = MatMul (t, x)\n one = ReduceMax <keepdims = 0> (each, at0)\n"
            " n = Mul (at2, at4)\n s = Concat <axis = 0> (n, any, at4)\n z = Reshape (one, s)",
            None,
            id="no rows",
        ),
        pytest.param(
            "s = Concat <axis = 0> (rows, tokens, at8)\n t = Mul (s, at1)\n z = Reshape (x, t)",
            None,
            id="not joined last",
        ),
    ],
)
def test_a_shape_is_constant_where_its_sizes_are_those_of_the_input(
    step: str, copied: list[int] | None, tmp_path: Path
) -> None:
    model = parsed(RESHAPED.replace("STEP", step))
    onnx.save(model, tmp_path / GRAPH)
    changed, changes = straightened(model, shapes_by_size(tmp_path / GRAPH))
    assert changes == 0
    assert [*copying(ir.serde.deserialize_model(changed)).values()] == ([] if copied is None else [copied])
    for rows, tokens in (3, 4), (1, 1), (2, 20):
        inputs = {"ids": np.random.default_rng(0).normal(size=(rows, tokens)).astype(np.float32)}
        np.testing.assert_array_equal(run(changed, inputs), run(model, inputs))


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
    changed = ir.serde.deserialize_model(model)
    assert straighten(changed, {SIZES[0]: shapes_at(model, *SIZES[0]), SIZES[1]: {}}) == 1, "one size tells nothing"


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
    changed, changes = straightened(model, known)
    assert changes == 2
    (ours,) = (node for node in changed.graph.node if node.domain == "ours")
    assert list(ours.input) == ["qm", "kx"]


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
    assert straightened(model, {size: shapes_at(parsed(ATTENTION), *size) for size in SIZES})[1] == changes


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


# What is asked whether zeros are ever set: rows of one token and of more, and a full one.
MASKS = np.arange(6) < np.array([[1], [2], [6]])


def renamed(text: str) -> str:
    return text.replace(" mask", " attention_mask").replace("(mask", "(attention_mask")


def without_zeros(text: str, masks: np.ndarray | None = MASKS) -> tuple[onnx.ModelProto, onnx.ModelProto, int]:
    """A model whose mask is named as transformers does, the same after ``straighten``, and its choices of zeros."""
    model = parsed(renamed(text))
    changed = ir.serde.deserialize_model(model)
    straighten(changed, {size: shapes_at(model, *size) for size in SIZES}, masks)
    return model, ir.serde.serialize_model(changed), sum(node.op_type == "Where" for node in changed.graph)


def padded(model: onnx.ModelProto, lengths: tuple[int, ...], tokens: int = 6) -> np.ndarray:
    x = np.random.default_rng(0).normal(size=(len(lengths), tokens, 8)).astype(np.float32)
    return run(model, {"x": x, "attention_mask": np.arange(tokens) < np.array(lengths)[:, None]})


def test_zeros_that_no_row_with_a_token_gets_are_left_out() -> None:
    model, changed, left = without_zeros(ATTENTION)
    assert left == 0
    np.testing.assert_allclose(padded(changed, (1, 3, 6)), padded(model, (1, 3, 6)), atol=1e-4, rtol=1e-5)
    assert not {"Where", "ReduceSum", "Equal"} & {node.op_type for node in changed.graph.node}
    assert np.isfinite(padded(changed, (0, 3))).all()


FILLED = "filled = Where (blind, none, context)"
SEEN = "keys = Unsqueeze (mask, middle)"
NEAR = """all = Unsqueeze (mask, middle)
    tokens = Slice (sizes, at1, at2)
    many = Squeeze (tokens)
    first = Constant <value = int64 {0}> ()
    step = Constant <value = int64 {1}> ()
    numbers = Range (first, many, step)
    behind = Unsqueeze (numbers, at1)
    apart = Sub (behind, numbers)
    distance = Abs (apart)
    near = Less (distance, at2)
    keys = And (all, near)"""
OTHERS = NEAR.replace("Less (distance, at2)", "Greater (distance, at0)")


HALF = """
    low16 = Cast <to = 10> (low)
    cost16 = Cast <to = 10> (hidden)
    bias16 = Mul (cost16, low16)
    queries16 = Cast <to = 10> (qm)
    keys16 = Cast <to = 10> (kx)
    scores16 = MatMul (queries16, keys16)
    biased16 = Add (scores16, bias16)
    shares16 = Softmax <axis = -1> (biased16)
    values16 = Cast <to = 10> (vt)
    context16 = MatMul (shares16, values16)
    none16 = Constant <value = float16 {0}> ()
    filled16 = Where (blind, none16, context16)
    filled = Cast <to = 1> (filled16)
"""


@pytest.mark.parametrize(("low", "left"), [(-65504.0, 1), (-30000.0, 0)])
def test_in_half_precision_a_score_may_take_the_least_number_to_infinity(low: float, left: int) -> None:
    model, changed, found = without_zeros(without(FILLED, HALF).replace("-10000.0", str(low)))
    assert found == left
    np.testing.assert_allclose(padded(changed, (1, 3, 6)), padded(model, (1, 3, 6)), atol=1e-2)


@pytest.mark.parametrize(
    ("line", "instead"),
    [
        pytest.param(SEEN, NEAR, id="tokens see near ones only: padding has none"),
        pytest.param("bias = Mul (cost, low)", "bias = Log (seen)", id="without zeros no number"),
        pytest.param(
            "biased = Add (scores, bias)",
            "gone = Log (seen)\n left = Add (scores, gone)\n biased = Add (left, bias)",
            id="without zeros no number, whatever is added last",
        ),
        pytest.param(SEEN, OTHERS, id="a token alone sees none"),
        pytest.param(
            "blind = Equal (several, none)",
            "sums = ReduceSum (x, any)\n total = ReduceSum (sums, at1)\n each = Unsqueeze (total, any)\n"
            " four = Mul (each, none)\n never = Add (several, four)\n blind = Equal (never, none)",
            id="asks for more than the mask",
        ),
        pytest.param("biased = Add (scores, bias)", "biased = Add (bias, scores)", id="scores are added to"),
        pytest.param("biased = Add (scores, bias)", "biased = Sub (scores, bias)", id="nothing is added"),
        pytest.param("shares = Softmax <axis = -1> (biased)", "shares = Sigmoid (biased)", id="no shares"),
        pytest.param("context = MatMul (shares, vt)", "c = MatMul (shares, vt)\n context = Neg (c)", id="no attention"),
        pytest.param(FILLED, "filled = Where (blind, vt, context)", id="not one number"),
        pytest.param(
            "blind = Equal (several, none)",
            "other_way = Equal (several, none)\n blind = Not (other_way)",
            id="whenever there is a token",
        ),
    ],
)
def test_zeros_that_may_be_needed_stay(line: str, instead: str) -> None:
    model, changed, left = without_zeros(without(line, instead))
    assert left == 1
    np.testing.assert_allclose(padded(changed, (1, 3, 6)), padded(model, (1, 3, 6)), atol=1e-4, rtol=1e-5)


def test_without_masks_zeros_stay() -> None:
    assert without_zeros(ATTENTION, None)[2] == 1


def test_a_condition_that_is_an_input_says_nothing_of_zeros() -> None:
    lines = [line for line in ATTENTION.splitlines() if not line.strip().startswith(("blind =", "several ="))]
    text = "\n".join(lines).replace("bool[batch, length] mask", "bool[batch, length] mask, bool[batch, 1, 1, 1] blind")
    assert without_zeros(text)[2] == 1


def test_what_is_broadcast_by_the_choice_of_zeros_keeps_it() -> None:
    """Of a condition per row and an attention for all rows, only the choice has rows."""
    text = without("context = MatMul (shares, vt)", "v0 = Slice (vt, at0, at1, at0)\n context = MatMul (s0, v0)")
    text = text.replace(
        "shares = Softmax <axis = -1> (biased)",
        "b0 = Slice (scores, at0, at1, at0)\n c0 = Slice (bias, at0, at1, at0)\n sum0 = Add (b0, c0)\n"
        " s0 = Softmax <axis = -1> (sum0)",
    )
    model, changed, left = without_zeros(text)
    assert left == 1
    np.testing.assert_allclose(padded(changed, (1, 3, 6)), padded(model, (1, 3, 6)), atol=1e-4, rtol=1e-5)


def test_zeros_of_unknown_shape_stay() -> None:
    changed = ir.serde.deserialize_model(parsed(renamed(ATTENTION)))
    straighten(changed, {size: {} for size in SIZES}, MASKS)
    assert "Where" in {node.op_type for node in changed.graph}


def test_a_condition_by_an_operator_of_another_domain_says_nothing_of_zeros() -> None:
    text = without("blind = Equal (several, none)", "blind = ours.Equal (several, none)")
    text = text.replace('"" : 20', '"" : 20, "ours" : 1')
    changed = ir.serde.deserialize_model(parsed(renamed(text)))
    straighten(changed, {size: shapes_at(parsed(ATTENTION), *size) for size in SIZES}, MASKS)
    assert "Where" in {node.op_type for node in changed.graph}


def test_zeros_that_are_the_answer_stay() -> None:
    text = without("(float[batch, length, 8] y)", "(float[batch, length, 8] y, float[batch, 2, length, 4] filled)")
    assert without_zeros(text)[2] == 1


def test_weights_in_a_file_are_not_read_to_ask(tmp_path: Path) -> None:
    """As of T5, whose positions are weights."""
    text = without("blind = Equal (several, none)", "w0 = ReduceMin <keepdims = 0> (wq)\n blind = Less (several, w0)")
    assert without_zeros(text)[2] == 0, "where weights are in the graph"
    model = without_zeros(text, None)[0]
    ir.save(ir.serde.deserialize_model(model), tmp_path / GRAPH, external_data="weights", size_threshold_bytes=0)
    changed = load_graph(tmp_path / GRAPH)
    straighten(changed, {size: shapes_at(model, *size) for size in SIZES}, MASKS)
    assert sum(node.op_type == "Where" for node in changed.graph) == 1


def test_a_compiled_bert_has_no_more_than_it_needs(tiny_bert: Path) -> None:
    options = CompileOptions(buckets=[8, 16], batch_sizes=[1, 3])
    graph = compile_model(Source(name=str(tiny_bert)), options, report=lambda line: None).path(GRAPH)
    operators = Counter(node.op_type for node in load_graph(graph).graph)
    layers = operators["Softmax"]
    assert layers == 2
    assert operators["Transpose"] == operators["Reshape"] == 4 * layers
    assert operators["Where"] == 0, "every token looks at one as soon as there is one"
    assert len(copying(load_graph(graph))) == 4 * layers


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
    def fails(path: Path, masks: np.ndarray) -> None:
        raise RuntimeError("no such operator\nand more")

    monkeypatch.setattr(hf_bucket.compile, "straighten_saved", fails)
    said: list[str] = []
    options = CompileOptions(buckets=[8, 16], batch_sizes=[1, 5], dtype="float16")
    made = compile_model(Source(name=str(tiny_bert)), options, report=said.append)
    assert "a graph with less in its attentions is not used on this model: RuntimeError: no such operator" in said
    assert len(hf_bucket.load(made.folder, warmup=False)(["w1 w2"])) == 1
