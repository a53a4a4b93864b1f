"""The most that a graph's tensors take at once, against counting what is alive at every step."""

from __future__ import annotations

import math

import onnx_ir
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_bucket.liveness import activation_bytes

SIZES = {"float": 4, "int64": 8, "bool": 1, "float16": 2}


def graph_of(text: str) -> onnx_ir.Graph:
    """A graph from ONNX text, in which every tensor has the shape that the text gives it."""
    return onnx_ir.from_onnx_text(f'<ir_version: 10, opset_import: ["": 20]>\n{text}').graph


@st.composite
def graphs(draw: st.DrawFn) -> tuple[str, list[tuple[str, list[str], bool]], dict[str, int], list[str], list[str]]:
    """A graph as text, and what it consists of: nodes (output, inputs, is a view), sizes, inputs, outputs."""
    types = st.tuples(st.sampled_from(sorted(SIZES)), st.lists(st.integers(1, 5), max_size=3).map(tuple))
    inputs = [f"in{number}" for number in range(draw(st.integers(1, 3)))]
    named = {name: draw(types) for name in inputs}
    nodes: list[tuple[str, list[str], bool]] = []
    for number in range(draw(st.integers(1, 10))):
        read = draw(st.lists(st.sampled_from([*named, "weight"]), min_size=1, max_size=3))
        name, view = f"t{number}", draw(st.booleans())
        named[name] = named.get(read[0], ("float", (5, 5))) if view else draw(types)
        nodes.append((name, read[:1] if view else read, view))
    outputs = draw(st.lists(st.sampled_from([name for name, _, _ in nodes]), min_size=1, max_size=2, unique=True))

    def spelled(name: str) -> str:
        kind, dims = named[name]
        return f"{kind}[{','.join(map(str, dims))}] {name}" if dims else f"{kind} {name}"

    lines = [f"{name} = {'Identity' if view else 'Whatever'}({', '.join(read)})" for name, read, view in nodes]
    made = ", ".join(spelled(name) for name, _, _ in nodes if name not in outputs)
    text = (
        f"g ({', '.join(map(spelled, inputs))}) => ({', '.join(map(spelled, outputs))})\n"
        f"<float[5,5] weight = {{{','.join(['0'] * 25)}}}{', ' + made if made else ''}>\n{{ {' '.join(lines)} }}"
    )
    sizes = {name: SIZES[kind] * math.prod(dims) for name, (kind, dims) in named.items()}
    return text, nodes, sizes, inputs, outputs


def alive_at(step: int, nodes: list[tuple[str, list[str], bool]], inputs: list[str], outputs: list[str]) -> set[str]:
    """What holds memory while a node runs: by name of whoever the memory was first made for."""
    owner = {name: name for name in inputs} | {"weight": ""}
    for name, read, view in nodes:
        owner[name] = owner[read[0]] if view else name
    made = {*inputs, *(name for name, _, _ in nodes[: step + 1])}
    wanted = {*inputs, *outputs, nodes[step][0], *(name for _, read, _ in nodes[step:] for name in read)}
    return {owner[name] for name in wanted & made} - {""}


@settings(deadline=None, max_examples=200)
@given(graphs())
def test_the_peak_is_that_of_the_step_at_which_most_is_alive(made: tuple) -> None:
    text, nodes, sizes, inputs, outputs = made
    steps = [alive_at(step, nodes, inputs, outputs) for step in range(len(nodes))]
    assert activation_bytes(graph_of(text)) == max(sum(sizes[name] for name in alive) for alive in steps)


@pytest.mark.parametrize(
    ("body", "peak"),
    [
        pytest.param("y = Neg(x)", 80, id="in and out"),
        pytest.param("a = Neg(x) b = Neg(a) y = Neg(b)", 120, id="a chain lets go"),
        pytest.param("a = Neg(x) b = Neg(a) y = Add(a, b)", 160, id="a branch holds on"),
        pytest.param("a = Identity(x) b = Identity(a) y = Neg(b)", 80, id="views are free"),
        pytest.param("a = Neg(x) b = Identity(a) c = Neg(x) y = Add(b, c)", 160, id="a view holds what it shows"),
        pytest.param("a = Neg(w) y = Add(x, a)", 120, id="weights are not counted"),
        pytest.param("a = Identity(w) y = Add(x, a)", 80, id="nor are views of weights"),
        pytest.param("a = Constant <value = float[10] {0,0,0,0,0,0,0,0,0,0}> () y = Add(x, a)", 80, id="nor constants"),
        pytest.param("a = Neg(x) y = Neg(x)", 80, id="what nobody reads is gone after its node"),
    ],
)
def test_a_peak_by_hand(body: str, peak: int) -> None:
    tensors = "float[10] w = {1,2,3,4,5,6,7,8,9,0}, float[10] a, float[10] b, float[10] c"
    assert activation_bytes(graph_of(f"g (float[10] x) => (float[10] y) <{tensors}> {{ {body} }}")) == peak


def test_a_graph_within_a_node_counts_while_the_node_runs_and_keeps_what_it_reads() -> None:
    then = "g1 () => (float[10] p) <float[10] q> { q = Neg(a) p = Neg(q) }"
    other = "g2 () => (float[10] r) { r = Neg(a) }"
    text = (
        f"g (float[10] x, bool c) => (float[10] y) <float[10] a, float[10] b>\n"
        f"{{ a = Neg(x) b = Neg(x) y = If(c) <then_branch = {then}, else_branch = {other}> }}"
    )
    x, c, a, y, p_and_q = 40, 1, 40, 40, 80
    assert activation_bytes(graph_of(text)) == x + c + a + y + p_and_q


@pytest.mark.parametrize("shape", ["[N]", "[2,N]", ""])
def test_a_tensor_of_unknown_size_makes_the_peak_unknown(shape: str) -> None:
    tensors = f"<float{shape} a>" if shape else ""
    assert activation_bytes(graph_of(f"g (float[2] x) => (float[2] y) {tensors} {{ a = Neg(x) y = Abs(a) }}")) is None
