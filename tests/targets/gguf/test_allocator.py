"""The allocator of llama.cpp's graphs: tensors that are alive together never share a place."""

from __future__ import annotations

import itertools

from hypothesis import given, settings
from hypothesis import strategies as st

from edgemoe.targets.gguf.allocator import OUTSIDE, Graph, Node, inplace, op, view
from edgemoe.targets.gguf.allocator import given as given_node


@st.composite
def graphs(draw: st.DrawFn) -> list[Node]:
    """Random graphs of results, results in place and views."""
    nodes = [given_node((draw(st.integers(1, 40)),))]
    for _ in range(draw(st.integers(1, 30))):
        source = nodes[draw(st.integers(0, len(nodes) - 1))]
        other = nodes[draw(st.integers(0, len(nodes) - 1))]
        make = draw(st.sampled_from(["op", "inplace", "view"]))
        if make == "op":
            nodes.append(op((draw(st.integers(1, 40)),), source, other, OUTSIDE))
        else:
            nodes.append(inplace(source.shape, source, other) if make == "inplace" else view(source, source.shape))
    return nodes


@given(graphs())
@settings(max_examples=200, deadline=None)
def test_tensors_that_are_alive_together_never_share_a_place(nodes: list[Node]) -> None:
    graph = Graph()
    for node in nodes:
        graph.expand(node)
    size = graph.lay_out()
    order = {id(node): number for number, node in enumerate(graph.nodes)}
    last = {id(n.root): order.get(id(n.root), -1) for n in graph.nodes}
    for node in graph.nodes:
        for source in node.sources:
            last[id(source.root)] = max(last.get(id(source.root), -1), order[id(node)])
    placed = [node for node in (*graph.inputs, *graph.nodes) if node.place >= 0]
    assert all(node.place + node.size <= size for node in placed)
    for one, two in itertools.combinations(placed, 2):
        born = {id(n): order.get(id(n), -1) for n in (one, two)}
        first, second = sorted((one, two), key=lambda n: born[id(n)])
        together = last[id(first)] > born[id(second)] or (first not in second.sources and last[id(first)] == born[id(second)] >= 0)
        if together:
            assert one.place + one.size <= two.place or two.place + two.size <= one.place
