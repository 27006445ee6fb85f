"""This module finds what calibration reads in a layer with experts: router, stacks, expert outputs and gates, in any architecture."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from edgemoe.base.errors import ModelError
from edgemoe.stream.engine.graph import Graph, Leaf
from edgemoe.stream.engine.session import Seen, Watch

_STACK = re.compile(r"blk\.\d+\.ffn_(gate_up|gate|up|down)_exps\.weight")
_SCORES = re.compile(r"ffn_moe_(?:logits|logits_biased|probs_biased)-(\d+)")  # llama.cpp's names of what experts are chosen by
_ROUTER = re.compile(r"blk\.\d+\.ffn_gate_inp\.weight")
_BIAS = re.compile(r"blk\.\d+\.ffn_gate_inp\.bias")


@dataclass(frozen=True, slots=True)
class Experts:
    """Numbers of the nodes of a layer's routed experts.

    `stacks` are products with the stacks of matrices by projection (gate, up, down, or gate_up), whose second source is the input and whose
    third holds the chosen experts.  `outputs` [tokens, k, hidden] are the experts' outputs with their biases.  `weighted` is their product
    with the gates; -1 if the gates are multiplied into the input instead (llama4).
    """

    stacks: dict[str, int]
    router: int  # logits [tokens, experts], with the router's own bias
    outputs: int
    weighted: int


def find_experts(graph: Graph) -> dict[int, Experts]:
    """The places of every layer with experts.

    Raises:
        ModelError: a layer with experts has no router or no down projection.
    """
    readers = _readers(graph)
    stacks: dict[int, dict[str, int]] = {}
    routers: dict[int, int] = {}
    for number, node in enumerate(graph.nodes):
        for weight in node.weights:
            if node.op == "MUL_MAT_ID" and (match := _STACK.match(weight)):
                stacks.setdefault(node.layer, {})[match[1]] = number
            elif node.op == "MUL_MAT" and _ROUTER.match(weight):
                routers[node.layer] = number
    found = {}
    for layer, parts in stacks.items():
        if layer not in routers or "down" not in parts:
            raise ModelError(f"layer {layer} has experts, but no router or no down projection")
        outputs, weighted = _follow(graph, readers, parts["down"], routers[layer])
        found[layer] = Experts(parts, _with_bias(graph, readers, routers[layer]), outputs, weighted)
    return found


def _with_bias(graph: Graph, readers: dict[int, list[int]], router: int) -> int:
    """The node that adds the router's own bias to the logits, if there is one."""
    biased = (n for n in readers.get(router, []) if graph.nodes[n].op == "ADD" and any(map(_BIAS.match, graph.nodes[n].weights)))
    return next(biased, router)


def _readers(graph: Graph) -> dict[int, list[int]]:
    found: dict[int, list[int]] = {}
    for number, node in enumerate(graph.nodes):
        for source in node.sources:
            if isinstance(source, int):
                found.setdefault(source, []).append(number)
    return found


def _follow(graph: Graph, readers: dict[int, list[int]], down: int, router: int) -> tuple[int, int]:
    """The outputs after biases and scales, and their product with the gates."""
    current = down
    while following := readers.get(current):
        node = graph.nodes[following[0]]
        if node.op in ("VIEW", "ADD"):  # the sum over the chosen experts begins
            break
        if node.op == "MUL" and _is_made_of(graph, node.sources[1], router):
            return current, following[0]
        current = following[0]
    return current, -1


def _is_made_of(graph: Graph, source: int | Leaf, router: int) -> bool:
    """Whether values come from the router's logits; rows that are only chosen by them, such as an expert's own scale, do not."""
    if isinstance(source, Leaf) or source < router:
        return False
    node = graph.nodes[source]
    sources = node.sources[:1] if node.op == "GET_ROWS" else node.sources
    return source == router or any(_is_made_of(graph, other, router) for other in sources)


def find_scores(graph: Graph) -> dict[int, list[int]]:
    """The nodes of each layer that hold a score for every expert, and that experts are chosen by or weighed from.

    An expert whose scores are minus infinity there is never chosen and takes no part in any sum, whatever the rule of the router, unless
    groups of experts have fewer than two others.
    """
    found: dict[int, list[int]] = {}
    for number, node in enumerate(graph.nodes):
        if match := _SCORES.fullmatch(node.name):
            found.setdefault(int(match[1]), []).append(number)
    return found


def hide_experts(graph: Graph, gone: Mapping[int, Sequence[int]]) -> dict[int, Watch]:
    """What a pass must watch so that these experts of each layer seem not to be there."""

    def hide(experts: Sequence[int]) -> Watch:
        def change(seen: Seen) -> None:
            scores = seen.values()
            scores[..., list(experts)] = -np.inf
            seen.replace(scores)

        return change

    scores = find_scores(graph)
    return {number: hide(experts) for layer, experts in gone.items() for number in scores[layer]}
