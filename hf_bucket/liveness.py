"""How much memory a graph of fixed shapes computes in: the most that its tensors take at any one moment."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import onnx_ir as ir

# Their output is their input under another shape: engines copy nothing.
_VIEWS = {"Reshape", "Squeeze", "Unsqueeze", "Flatten", "Identity"}


def activation_bytes(graph: ir.Graph) -> int | None:
    """Return the peak of what a graph's tensors take while its nodes run in their order; weights are not counted.

    A tensor is there from the node that makes it to the last that reads it; inputs and outputs of the graph are there
    from their making to the end. A node with graphs inside takes, beside its own tensors, what the largest takes.

    Returns:
        Bytes, or None where the size of a tensor is not known: it depends on what the graph is given.
    """
    nodes = list(graph)
    buffers = _buffers(graph)
    sizes = {buffer: _size(buffer) for buffer in buffers.values()}
    inner = [_inner_peak(node) for node in nodes]
    if None in sizes.values() or None in inner:
        return None
    freed = _freed_after(nodes, graph, buffers)
    now = peak = sum(sizes[value] or 0 for value in graph.inputs if value in sizes)
    for node, own, gone in zip(nodes, inner, freed, strict=True):
        now += sum(sizes[value] or 0 for value in node.outputs if buffers.get(value) is value)
        peak = max(peak, now + (own or 0))
        now -= sum(sizes[buffer] or 0 for buffer in gone)
    return peak


def _buffers(graph: ir.Graph) -> dict[ir.Value, ir.Value]:
    """Return which tensor owns the memory, for every tensor but weights and views of weights."""
    weights = set(graph.initializers.values())
    found = {value: value for value in graph.inputs if value not in weights}
    for node in graph:
        view = node.op_type in _VIEWS and node.domain == ""
        for value in node.outputs:
            if view and node.inputs[0] is not None:
                if node.inputs[0] in found:  # else a view of weights
                    found[value] = found[node.inputs[0]]
            elif node.op_type != "Constant" and value.name:  # an output without a name is not made
                found[value] = value
    return found


def _freed_after(nodes: list[ir.Node], graph: ir.Graph, buffers: dict[ir.Value, ir.Value]) -> list[set[ir.Value]]:
    """Return for every node what is not needed any more once it has run."""
    last: dict[ir.Value, int] = {}
    for place, node in enumerate(nodes):
        for value in [*node.outputs, *_read(node)]:
            if value in buffers:
                last[buffers[value]] = place
    kept = {buffers[value] for value in [*graph.inputs, *graph.outputs] if value in buffers}
    freed: list[set[ir.Value]] = [set() for _ in nodes]
    for buffer, place in last.items():
        if buffer not in kept:
            freed[place].add(buffer)
    return freed


def _graphs(node: ir.Node) -> Iterator[ir.Graph]:
    for attribute in node.attributes.values():
        if attribute.type.name == "GRAPH":
            yield attribute.as_graph()
        elif attribute.type.name == "GRAPHS":
            yield from attribute.as_graphs()


def _read(node: ir.Node) -> Iterator[ir.Value]:
    """Yield what a node reads, in the graphs inside it too."""
    yield from (value for value in node.inputs if value is not None)
    for graph in _graphs(node):
        yield from graph.outputs
        for inside in graph:
            yield from _read(inside)


def _inner_peak(node: ir.Node) -> int | None:
    peaks = [activation_bytes(graph) for graph in _graphs(node)]
    return None if None in peaks else max((peak or 0 for peak in peaks), default=0)


def _size(value: ir.Value) -> int | None:
    """Return the bytes of a tensor; None where shape or type are not known, or a type has no size."""
    dims = None if value.shape is None else [dim if isinstance(dim, int) else None for dim in value.shape]
    if dims is None or value.dtype is None or value.dtype.name in ("UNDEFINED", "STRING"):
        return None
    known = [dim for dim in dims if dim is not None]
    return math.ceil(math.prod(known) * value.dtype.itemsize) if len(known) == len(dims) else None
