"""Less graph: an attention with nothing around its two products that they do not need.

As torch's exporter writes it, keys are turned by a Transpose between two Reshapes, queries and keys are each multiplied
by the root of one scale, and rows without any token to look at are set to zero right before heads are joined. Each of
these keeps engines from making one step of the whole. Here keys are turned by one Transpose, and the scale is applied
once, to the first matrix: numbers change by rounding only. Zeros are left out where every token of some masks, padding
too, has one to look at, since requests without a real token are refused; elsewhere zeros are set once heads are joined.

Heads are split and joined by Reshapes whose rows and tokens are computed from the inputs, once for all. Here they are
copied from what is reshaped: then the shape is a constant, and OpenVINO need not stop to read it whenever a length
differs from the one before.

Which axes are heads and tokens is not guessed: it is read off the shapes for two sizes of input.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from hf_bucket.surgery import Shapes, constant, has_inner_graphs, insert_behind, reshape_to, shapes_of

if TYPE_CHECKING:
    import onnx_ir as ir

    from hf_bucket.batch import Array

_SWAP = [0, 2, 1, 3]  # tokens and heads
_OPSET = 13
_LARGE_SCORE = 1e4  # larger than any score of an attention
_ROUNDED = 2.0**-7  # how far a product of two factors may be off, in the least exact type there is, bfloat16


def straighten(model: ir.Model, shapes: Shapes, masks: Array | None = None) -> int:
    """Leave out what attentions do not need; return how many changes were made.

    A graph with branches or loops stays as it is: their bodies may read any value by its name. So does one of an opset
    in which Squeeze takes no axes as an input.

    Args:
        shapes: of the graph's values, for each of ``SIZES``. Without those that it is about, an axis stays where it is.
        masks: rows of an ``attention_mask``, of one real token and of more: zeros that they do not call for are left
            out. None leaves none out.
    """
    from onnx_ir.passes.common import RemoveUnusedNodesPass

    if has_inner_graphs(model) or model.opset_imports.get("", 0) < _OPSET:
        return 0
    own = [node for node in model.graph if not node.domain and len(node.outputs) == 1]
    changes = sum(_copy_sizes(node, shapes) for node in own)  # first: what the others make has no known shape
    changes += 0 if masks is None else _leave_out_zeros(model, own, shapes, masks)
    changes += sum(_turn_once(node, shapes) + _scale_once(node) + _set_zeros_last(model, node, shapes) for node in own)
    RemoveUnusedNodesPass()(model)
    return changes


def _copy_sizes(node: ir.Node, shapes: Shapes) -> bool:
    """Let a Reshape to ``[rows, tokens, constants]`` copy rows and tokens from what it reshapes."""
    joined = _made_by(node.inputs[1], "Concat") if node.op_type == "Reshape" else None
    source = node.inputs[0] if joined is not None else None
    if joined is None or source is None:
        return False
    constants = _last_constants(joined)
    before, after = shapes_of(source, shapes), shapes_of(node.outputs[0], shapes)
    copied = len(after[0]) - len(constants)
    leading = [shape[:copied] for shape in before]
    known = copied > 0 and all(len(shape) == copied for shape in leading)
    if not known or leading != [shape[:copied] for shape in after] or 0 in constants:
        return False
    if any(one == other for one, other in zip(*leading, strict=True)):  # neither rows nor tokens
        return False
    reshape_to(node, [*[0] * copied, *constants])
    return True


def _last_constants(joined: ir.Node) -> list[int]:
    """Return the numbers that a Concat of sizes ends with, whatever is computed before them."""
    from onnx_ir.convenience import get_const_tensor

    numbers: list[int] = []
    for part in reversed(joined.inputs):
        tensor = None if part is None else get_const_tensor(part)
        if tensor is None:
            break
        numbers = [*tensor.numpy().tolist(), *numbers]
    return numbers


def _turn_once(node: ir.Node, shapes: Shapes) -> bool:
    """Replace ``(a, b, c, d)`` -> ``(a * b, c, d)`` -> ``(a * b, d, c)`` -> ``(a, b, d, c)`` by one Transpose."""
    import onnx_ir

    turn = _made_by(node.inputs[0], "Transpose") if node.op_type == "Reshape" else None
    merge = _made_by(turn.inputs[0], "Reshape") if turn is not None and _order(turn) == [0, 2, 1] else None
    source = None if merge is None else merge.inputs[0]
    if merge is None or source is None or node.outputs[0].is_graph_output():
        return False
    found = (shapes_of(value, shapes) for value in (source, merge.outputs[0], node.outputs[0]))
    if not all(_merges_heads(*sizes) for sizes in zip(*found, strict=True)):
        return False
    order, before = [0, 1, 3, 2], _made_by(source, "Transpose")
    if before is not None and _order(before) == _SWAP:  # two of them are one
        source, order = before.inputs[0], [0, 2, 3, 1]
    once = onnx_ir.node("Transpose", [source], {"perm": order})
    node.prepend(once)
    node.outputs[0].replace_all_uses_with(once.outputs[0])
    return True


def _merges_heads(source: tuple[int, ...], merged: tuple[int, ...], result: tuple[int, ...]) -> bool:
    if len(source) != 4:
        return False
    rows, heads, tokens, width = source
    return merged == (rows * heads, tokens, width) and result == (rows, heads, width, tokens)


def _scale_once(node: ir.Node) -> bool:
    """Let a product of two scaled matrices scale the first by both."""
    import onnx_ir

    if node.op_type != "MatMul":
        return False
    left, right = (_made_by(value, "Mul") for value in node.inputs)
    if left is None or right is None or not _is_used_once(left) or not _is_used_once(right):
        return False
    factors = _number(left.inputs[1]), _number(right.inputs[1])
    if factors[0] is None or factors[1] is None:
        return False
    exact = float(factors[0]) * float(factors[1])
    with np.errstate(over="ignore"):
        both = np.asarray(exact).astype(factors[0].dtype)
    if not abs(float(both) - exact) <= _ROUNDED * abs(exact):  # too large for the type, or too small, or not a number
        return False
    factor = onnx_ir.node("Constant", [], {"value": onnx_ir.tensor(both)})
    left.prepend(factor)
    left.replace_input_with(1, factor.outputs[0])
    node.replace_input_with(1, right.inputs[0])
    return True


def _leave_out_zeros(model: ir.Model, nodes: Sequence[ir.Node], shapes: Shapes, masks: Array) -> int:
    """Leave out every choice between a number and an attention that never is the number; return how many.

    What is added to its scores has to be finite, and after it is added too, which in half precision the least number is
    not: then the attention is a number whatever is masked, and a token without any to look at, as there may be in
    padding longer than that of ``masks``, hands nothing on to others.
    """
    costs = {node: cost for node in nodes if (cost := _cost_of_tokens(node, shapes)) is not None}
    asked = {value for node, cost in costs.items() for value in (node.inputs[0], cost)}
    found = {value: None if value is None else _of_masks(model, value, masks) for value in asked}
    left_out = 0
    for node, cost in costs.items():
        chosen, added, context = found[node.inputs[0]], found[cost], node.inputs[2]
        if chosen is None or added is None or context is None:
            continue
        with np.errstate(over="ignore"):
            finite = np.isfinite(added - _LARGE_SCORE).all()
        if finite and not chosen.any():
            node.outputs[0].replace_all_uses_with(context)
            left_out += 1
    return left_out


def _cost_of_tokens(node: ir.Node, shapes: Shapes) -> ir.Value | None:
    """Return what is added to the scores of the attention that a node chooses, unless it takes a number instead."""
    if node.op_type != "Where" or _number(node.inputs[1]) is None or node.outputs[0].is_graph_output():
        return None
    context = _made_by(node.inputs[2], "MatMul")
    shares = None if context is None else _made_by(context.inputs[0], "Softmax")
    scores = None if shares is None else _made_by(shares.inputs[0], "Add")
    if context is None or scores is None or _made_by(scores.inputs[0], "MatMul") is None:
        return None
    before, after = shapes_of(context.outputs[0], shapes), shapes_of(node.outputs[0], shapes)
    return scores.inputs[1] if before == after and () not in before else None  # else it may give the attention rows


def _of_masks(model: ir.Model, value: ir.Value, masks: Array) -> np.ndarray[Any, Any] | None:
    """Return what a value is for an ``attention_mask``; None where other inputs, but for their shape, decide it too.

    Nor is it computed from weights that lie in a file, or by operators that are not ONNX's own.
    """
    import onnx_ir
    from onnx.reference import ReferenceEvaluator

    if value.producer() is None:
        return None
    graph = onnx_ir.convenience.extract(model.graph, model.graph.inputs, [value])
    inputs = [one for one in graph.inputs if one.uses()]
    read = {one.name for one in inputs if any(use.node.op_type != "Shape" for use in one.uses())}
    in_file = any(isinstance(one.const_value, onnx_ir.ExternalTensor) for one in graph.initializers.values())
    own = all(not node.domain for node in graph)
    if in_file or not own or not read <= {"attention_mask"}:
        return None
    proto = onnx_ir.serde.serialize_model(onnx_ir.Model(graph, ir_version=model.ir_version))
    with np.errstate(all="ignore"):  # what is infinite, or no number, is for the caller to judge
        (found,) = ReferenceEvaluator(proto).run(None, {str(one.name): masks for one in inputs})
    return np.asarray(found)


def _set_zeros_last(model: ir.Model, node: ir.Node, shapes: Shapes) -> bool:
    """Move a choice between a number and ``(row, head, token, width)`` behind where heads are joined."""
    import onnx_ir

    if node.op_type != "Where" or _number(node.inputs[1]) is None or len(node.inputs) != 3:
        return False
    turn = _only_user(node, "Transpose")
    join = _only_user(turn, "Reshape") if turn is not None and _order(turn) == _SWAP else None
    if turn is None or join is None or join.outputs[0].is_graph_output():
        return False
    condition, _, context = node.inputs
    joined, result = join.outputs[0], node.outputs[0]
    if condition is None or context is None or shapes_of(context, shapes) != shapes_of(result, shapes):
        return False
    found = (shapes_of(value, shapes) for value in (condition, result, joined))
    if not all(_chooses_tokens(*sizes) for sizes in zip(*found, strict=True)):
        return False
    axes = constant([1])
    without_heads = onnx_ir.node("Squeeze", [condition, axes.outputs[0]])
    insert_behind(model, condition, [axes, without_heads])
    chosen = onnx_ir.node("Where", [without_heads.outputs[0], node.inputs[1], joined])
    joined.replace_all_uses_with(chosen.outputs[0])
    chosen.replace_input_with(2, joined)
    join.append(chosen)
    turn.replace_input_with(0, context)
    return True


def _chooses_tokens(condition: tuple[int, ...], result: tuple[int, ...], joined: tuple[int, ...]) -> bool:
    if len(condition) != 4 or len(result) != 4:
        return False
    rows, heads, tokens, width = result
    return condition[1] == condition[3] == 1 and joined == (rows, tokens, heads * width)


def _made_by(value: ir.Value | None, operator: str) -> ir.Node | None:
    """Return the node that makes a value, if it is such an operator of ONNX's own."""
    node = None if value is None else value.producer()
    return node if node is not None and node.op_type == operator and not node.domain else None


def _only_user(node: ir.Node, operator: str) -> ir.Node | None:
    """Return the one node that uses the output of another, if it is such an operator."""
    users = [use.node for use in node.outputs[0].uses()]
    return users[0] if _is_used_once(node) and users[0].op_type == operator and not users[0].domain else None


def _is_used_once(node: ir.Node) -> bool:
    return len(node.outputs[0].uses()) == 1 and not node.outputs[0].is_graph_output()


def _order(transpose: ir.Node) -> list[int]:
    return [*transpose.attributes.get_ints("perm", ())]


def _number(value: ir.Value | None) -> np.floating[Any] | None:
    """Return the number that a constant without axes, or of one axis, holds; None for any other value."""
    from onnx_ir.convenience import get_const_tensor

    tensor = None if value is None else get_const_tensor(value)
    if tensor is None or tensor.size != 1 or len(tensor.shape) > 1 or not tensor.dtype.is_floating_point():
        return None
    number: np.floating[Any] = tensor.numpy().reshape(-1)[0]
    return number
