"""Less graph: where a head reads one token of every row, nothing is computed for the others after they last mattered.

A classifier's head mostly reads the first token of the last layer, or the last. That layer's keys and values need every
token; its queries, its attention and its feed-forward part only the token that is read. Taking that token out before
them instead of after changes no number: every step on the way treats tokens one by one. Of six layers as BERT has them
this leaves out a seventh of the arithmetic, of twelve a fourteenth.
"""

from __future__ import annotations

from collections import defaultdict
from math import prod
from typing import TYPE_CHECKING, Any

import numpy as np

from hf_bucket.surgery import ELEMENTWISE, constant, insert_behind, reshape_to

if TYPE_CHECKING:
    import onnx_ir as ir

_CONTENTS = ("value", "value_int", "value_ints")  # attributes of a Constant that may hold an index
_FIRST, _LAST = 0, -1
_END = np.iinfo(np.int64).max

Use = tuple["ir.Node", int]


def narrow(model: ir.Model) -> int:
    """Move the choice of the token that is read to before whatever treats tokens one by one; return how many products
    of matrices are smaller by it.

    Values need their shapes, as exporters leave them; where one is not known the choice stays behind it.
    """
    moved = 0
    for node in list(model.graph):
        place, source = _chosen_place(node), node.inputs[0] if node.inputs else None
        if place is not None and source is not None:
            moved += _move_up(model, node, source, place)
    return moved


def _chosen_place(node: ir.Node) -> int | None:
    """Return the place in a row, first or last, of the one token that a node takes out of ``(row, token, ...)``."""
    shape = node.inputs[0].shape if node.inputs and node.inputs[0] is not None else None
    if shape is None or len(shape) != 3 or isinstance(shape[1], int):
        return None
    if node.op_type == "Gather":
        axis = node.attributes.get_int("axis", 0)
        index = _constant(node.inputs[1])
        if axis in (1, -2) and index is not None and index.size == 1 and int(index.item()) in (_FIRST, _LAST):
            return int(index.item())
    if node.op_type == "Slice" and len(node.inputs) > 3 and None not in node.inputs:
        bounds = [_constant(value) for value in node.inputs[1:] if value is not None]
        if all(bound is not None and bound.size == 1 for bound in bounds):
            start, end, axis, *step = (int(bound.item()) for bound in bounds if bound is not None)
            if axis in (1, -2) and step in ([], [1]):
                return _FIRST if (start, end) == (0, 1) else _LAST if start == -1 and end >= 2**31 - 1 else None
    return None


def _constant(value: ir.Value | None) -> np.ndarray[Any, Any] | None:
    """Return a small constant's content, wherever it is kept."""
    if value is None:
        return None
    tensor, producer = value.const_value, value.producer()
    if tensor is None and producer is not None and producer.op_type == "Constant":
        attribute = next((producer.attributes[name] for name in _CONTENTS if name in producer.attributes), None)
        return None if attribute is None else np.asarray(getattr(attribute.value, "numpy", lambda: attribute.value)())
    return tensor.numpy() if tensor is not None and tensor.size <= 1 else None


def _move_up(model: ir.Model, chooser: ir.Node, start: ir.Value, place: int) -> int:
    """Let every value above ``chooser`` hold one token if nobody needs the others; return the smaller MatMuls.

    ``wanted`` has, per value and distance of its token axis from the end, the uses that want that one token only. From
    the last node to the first: a node all of whose uses want one token computes just that, and wants it of its inputs;
    any other value gets a Slice for those that do.
    """
    wanted: dict[tuple[ir.Value, int], list[Use]] = defaultdict(list)
    wanted[start, 2].append((chooser, 0))
    above = list(model.graph)
    moved = 0
    for node in reversed(above[: above.index(chooser)]):
        for output in node.outputs:
            for value, axis in [key for key in wanted if key[0] is output]:
                uses = wanted.pop((value, axis))
                alone = len(node.outputs) == 1 and not value.is_graph_output()
                inputs = _narrowed_inputs(node, axis) if alone and len(value.uses()) == len(uses) else None
                if inputs is None:
                    _slice(model, value, axis, place, uses)
                    continue
                moved += node.op_type == "MatMul"
                for slot, input_axis in inputs.items():
                    if (source := node.inputs[slot]) is not None:
                        wanted[source, input_axis].append((node, slot))
    for (value, axis), uses in wanted.items():  # inputs of the graph, and weights
        _slice(model, value, axis, place, uses)
    return moved


def _rank(value: ir.Value | None) -> int | None:
    return None if value is None or value.shape is None else len(value.shape)


def _narrowed_inputs(node: ir.Node, axis: int) -> dict[int, int] | None:
    """Return which inputs a node needs one token of, and along which axis from the end, to compute one token itself.

    None where it cannot. A Reshape is given the shape it then makes.
    """
    ranks = [_rank(value) for value in node.inputs]
    rank = _rank(node.outputs[0])
    if rank is None or rank < axis:
        return None
    if node.op_type in ELEMENTWISE:
        known = [found for value, found in zip(node.inputs, ranks, strict=True) if value is not None]
        if None in known:
            return None
        return {slot: axis for slot, found in enumerate(ranks) if found is not None and _holds(node.inputs[slot], axis)}
    if node.op_type == "MatMul" and axis >= 2 and all(found is not None and found >= 2 for found in ranks):
        return {slot: axis for slot in ([0] if axis == 2 else [0, 1]) if _holds(node.inputs[slot], axis)}
    if node.op_type == "LayerNormalization":
        normalised = node.attributes.get_int("axis", -1) % rank
        small = all(found is None or found < axis for found in ranks[1:])
        return {0: axis} if normalised > rank - axis and small else None
    if node.op_type == "Softmax":
        return {0: axis} if node.attributes.get_int("axis", -1) % rank != rank - axis else None
    if node.op_type == "Transpose":
        order = node.attributes.get_ints("perm") or list(range(rank))[::-1]
        return {0: rank - order[rank - axis]}
    if node.op_type == "Reshape":
        return _narrow_reshape(node, axis)
    return None


def _holds(value: ir.Value | None, axis: int) -> bool:
    """Return whether a value has the token axis, and more than one place along it: what broadcasts there stays."""
    if value is None or value.shape is None or len(value.shape) < axis:
        return False
    size = value.shape[len(value.shape) - axis]
    return not isinstance(size, int) or size != 1


def _narrow_reshape(node: ir.Node, axis: int) -> dict[int, int] | None:
    """Narrow a Reshape that changes only what comes after the token axis, such as heads into features."""
    source, target = node.inputs[0], node.outputs[0]
    if source is None or source.shape is None or target.shape is None:
        return None
    place = len(target.shape) - axis
    before, after = source.shape[:place], source.shape[place + 1 :]
    sizes = [*after, *target.shape[place + 1 :]]
    same = before == target.shape[:place] and "None" not in map(str, before)
    if not same or not all(isinstance(size, int) and size for size in sizes):
        return None
    if prod(sizes[: len(after)]) != prod(sizes[len(after) :]):  # else, of equal sizes in all, the tokens stay too
        return None
    reshape_to(node, [*[0] * place, 1, *(int(str(size)) for size in sizes[len(after) :])])
    return {0: len(source.shape) - place}


def _slice(model: ir.Model, value: ir.Value, axis: int, place: int, uses: list[Use]) -> None:
    """Give ``uses`` one token of a value; along an axis of size 1 that is the value itself."""
    import onnx_ir

    constants = [constant([n]) for n in (place, 1 if place == _FIRST else _END, -axis)]
    chosen = onnx_ir.node("Slice", [value, *(one.outputs[0] for one in constants)])
    insert_behind(model, value, [*constants, chosen])
    for node, slot in uses:
        node.replace_input_with(slot, chosen.outputs[0])
