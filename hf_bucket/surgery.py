"""What rooms that change ONNX graphs share: new nodes, where they go, and how values are told apart by their shapes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    import onnx_ir as ir

Size = tuple[int, int]  # rows, and tokens of each
Shapes = Mapping[Size, Mapping[str, tuple[int, ...]]]  # of values by name, for several sizes of input

SIZES: tuple[Size, Size] = ((2, 3), (5, 7))  # small enough for every model, and no number is in both

# Operators that make every element from the elements at its place, with ONNX's broadcasting (onnx.ai/onnx/operators).
ELEMENTWISE = frozenset(
    {"Abs", "Add", "And", "Cast", "Clip", "Div", "Elu", "Equal", "Erf", "Exp", "Gelu", "Greater", "GreaterOrEqual"}
    | {"HardSigmoid", "HardSwish", "Identity", "LeakyRelu", "Less", "LessOrEqual", "Log", "Max", "Min", "Mish", "Mul"}
    | {"Neg", "Not", "Or", "Pow", "Reciprocal", "Relu", "Selu", "Sigmoid", "Softplus", "Softsign", "Sqrt", "Sub"}
    | {"Tanh", "Where"}
)


def has_inner_graphs(model: ir.Model) -> bool:
    """Return whether there are branches or loops, whose bodies may read any value of the graph by its name."""
    return any(node.graph is not model.graph for node in model.graph.all_nodes())


def shapes_of(value: ir.Value, shapes: Shapes) -> list[tuple[int, ...]]:
    """Return the shape of a value for each of ``SIZES``; () where it is not known."""
    return [shapes[size].get(str(value.name), ()) for size in SIZES]


def constant(numbers: Sequence[int]) -> ir.Node:
    """Return a node whose output is these numbers."""
    import onnx_ir

    return onnx_ir.node("Constant", [], {"value": onnx_ir.tensor(np.array(numbers, dtype=np.int64))})


def reshape_to(node: ir.Node, sizes: Sequence[int]) -> None:
    """Let a Reshape make constant sizes, of which a zero is copied from what it reshapes."""
    shape = constant(sizes)
    node.prepend(shape)
    node.replace_input_with(1, shape.outputs[0])
    node.attributes.pop("allowzero", None)  # with it a zero is a size, and not one to copy


def insert_behind(model: ir.Model, value: ir.Value, nodes: Sequence[ir.Node]) -> None:
    """Put nodes right behind the one that makes a value; what nobody makes is there from the beginning."""
    producer = value.producer()
    if producer is None:
        model.graph.insert_before(model.graph[0], nodes)
    else:
        producer.append(nodes)
