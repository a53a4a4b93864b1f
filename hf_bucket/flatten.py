"""Less graph: linear layers take one list of all tokens instead of rows of tokens.

On ``(row, token, feature)`` a linear layer is a product of matrices and then a sum; on ``(token, feature)`` onnxruntime
makes one Gemm of the two, and the bias takes no pass over the memory of its own.

Which values are rows of tokens is not guessed from operators: it is read off the shapes for two sizes of input.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from typing import TYPE_CHECKING

from hf_bucket.surgery import ELEMENTWISE, SIZES, Shapes, constant, has_inner_graphs, insert_behind, shapes_of

if TYPE_CHECKING:
    import onnx_ir as ir

Axes = tuple[bool, int]  # of rows of tokens: whether each has all its tokens or one, and the features of a token


def flatten(model: ir.Model, shapes: Shapes) -> int:
    """Let linear layers, and what treats tokens one by one after them, take lists of tokens; return how many layers do.

    A graph with branches or loops stays as it is: their bodies may read any value by its name.

    Args:
        shapes: of the graph's values, for each of ``SIZES``. A value that is missing stays as it is.
    """
    from onnx_ir.passes.common import RemoveUnusedNodesPass

    if has_inner_graphs(model):
        return 0
    lists = _Lists(model, shapes)
    layers = 0
    for node in list(model.graph):
        if lists.suit(node):
            lists.give(node)
            layers += node.op_type == "MatMul"
        else:
            lists.spare(node)
    RemoveUnusedNodesPass()(model)
    return layers


class _Lists:
    """The values of a graph that became lists of tokens, and the Reshapes between them and all others."""

    def __init__(self, model: ir.Model, shapes: Shapes) -> None:
        self._model, self._shapes = model, shapes
        self._lists: dict[ir.Value, Axes] = {}  # with what they were
        self._list_of: dict[ir.Value, ir.Value] = {}  # by a value that is rows
        self._rows_of: dict[ir.Value, ir.Value] = {}  # by a value that is a list
        self._sizes: dict[tuple[int, ...], ir.Value] = {}  # of rows, by what comes after rows and tokens

    def suit(self, node: ir.Node) -> bool:
        """Return whether a node can compute a list: a linear layer, or what treats tokens one by one after one."""
        axes = self._axes(node.outputs[0]) if len(node.outputs) == 1 and not node.domain else None
        if axes is None or node.outputs[0].is_graph_output():
            return False
        if node.op_type == "MatMul":
            return self._axes(node.inputs[0]) is not None and _constant_rank(node.inputs[1]) == 2
        by_token = node.op_type == "LayerNormalization" and node.attributes.get_int("axis", -1) == -1
        if not by_token and node.op_type not in ELEMENTWISE:
            return False
        inputs = [value for value in node.inputs if value is not None]
        lists = any(value in self._lists for value in inputs)
        return lists and all(self._alike(axes, value) or _constant_rank(value) in (0, 1) for value in inputs)

    def give(self, node: ir.Node) -> None:
        """Let a node that suits compute a list from lists."""
        if (made := self._axes(node.outputs[0])) is not None:
            self._lists[node.outputs[0]] = made
        for place, value in enumerate(node.inputs):
            axes = self._axes(value)
            if value is None or axes is None or value in self._lists:
                continue
            if value not in self._list_of:
                maker = value.producer()
                remade = maker is not None and maker.op_type == "Reshape"  # then what that was made of will do
                source = maker.inputs[0] if maker is not None and remade else value
                self._list_of[value] = self._reshape(source, [-1, axes[1]], behind=value)
            node.replace_input_with(place, self._list_of[value])

    def spare(self, node: ir.Node) -> None:
        """Let a node have rows where it had them; a Reshape that need not copy their sizes has the list."""
        for place, value in enumerate(node.inputs):
            if value is None or value not in self._lists or self._keep_list(node, self._lists[value][1]):
                continue
            if value not in self._rows_of:
                several, features = self._lists[value]
                sizes = self._sizes_of_rows((features,)) if several else [-1, 1, features]
                self._rows_of[value] = self._reshape(value, sizes, behind=value)
            node.replace_input_with(place, self._rows_of[value])

    def _keep_list(self, node: ir.Node, features: int) -> bool:
        """Let a Reshape keep the list if it can make the same of it, and return whether it does."""
        if node.op_type != "Reshape" or node.domain:
            return False
        if node.attributes.get_int("allowzero", False):
            return True
        after = _sizes_after(node.inputs[1], features)
        if not after:
            return False
        node.replace_input_with(1, self._sizes_of_rows(after))
        return True

    def _alike(self, axes: Axes, value: ir.Value) -> bool:
        """Return whether a value holds as many tokens as another of these axes."""
        found = self._axes(value)
        return found is not None and found[0] == axes[0]

    def _axes(self, value: ir.Value | None) -> Axes | None:
        """Return the axes of rows of tokens; None for any other value."""
        if value is None:
            return None
        shapes = shapes_of(value, self._shapes)
        for several in (True, False):
            leading = [(rows, tokens if several else 1) for rows, tokens in SIZES]
            if [shape[:2] for shape in shapes] == leading and shapes[0][2:] == shapes[1][2:] and len(shapes[0]) == 3:
                return several, shapes[0][2]
        return None

    def _sizes_of_rows(self, after: tuple[int, ...]) -> ir.Value:
        """Return the value ``[rows, -1, *after]``, which is made from the graph's first input."""
        import onnx_ir

        if after not in self._sizes:
            first, rest = constant([0]), constant([-1, *after])
            shape = onnx_ir.node("Shape", [self._model.graph.inputs[0]])
            rows = onnx_ir.node("Gather", [shape.outputs[0], first.outputs[0]])
            whole = onnx_ir.node("Concat", [rows.outputs[0], rest.outputs[0]], {"axis": 0})
            self._model.graph.insert_before(self._model.graph[0], [first, rest, shape, rows, whole])
            self._sizes[after] = whole.outputs[0]
        return self._sizes[after]

    def _reshape(self, source: ir.Value | None, sizes: Sequence[int] | ir.Value, *, behind: ir.Value) -> ir.Value:
        """Return a value of other sizes; it is made right behind the one that it stands for."""
        import onnx_ir

        new = [] if isinstance(sizes, onnx_ir.Value) else [constant(sizes)]
        wanted = sizes if isinstance(sizes, onnx_ir.Value) else new[0].outputs[0]
        new.append(onnx_ir.node("Reshape", [source, wanted]))
        insert_behind(self._model, behind, new)
        return new[-1].outputs[0]


def _sizes_after(sizes: ir.Value | None, features: int) -> tuple[int, ...]:
    """Return what a Reshape to a constant ``[0, 0, ...]``, which copies rows and tokens, makes of a token's features.

    () for any other sizes.
    """
    from onnx_ir.convenience import get_const_tensor

    tensor = None if sizes is None else get_const_tensor(sizes)
    numbers = [] if tensor is None else tensor.numpy().tolist()
    after = numbers[2:]
    if numbers[:2] != [0, 0] or 0 in after:
        return ()
    rest = features // abs(prod(after))
    return tuple(rest if size == -1 else size for size in after)


def _constant_rank(value: ir.Value | None) -> int | None:
    """Return the number of axes of a weight or another constant; None for what is computed."""
    from onnx_ir.convenience import get_const_tensor

    tensor = None if value is None else get_const_tensor(value)
    return None if tensor is None else len(tensor.shape)
