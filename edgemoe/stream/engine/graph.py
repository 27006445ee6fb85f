"""This module finds the places of a computation graph where it can be cut, from operations and names of weights alone.

A graph is what llama.cpp's evaluation callback was asked about in one decode.  It is pure data, so that it can be looked at without
llama.cpp, and it needs no knowledge of the architecture.
"""

from __future__ import annotations

import functools
import itertools
import re
from dataclasses import dataclass

VIEWS = ("VIEW", "RESHAPE", "PERMUTE", "TRANSPOSE")
_BLOCK = re.compile(r"blk\.(\d+)\.(.+)")


@dataclass(frozen=True, slots=True)
class Leaf:
    """A tensor that no node makes: a weight, an input, or a cache."""

    name: str
    is_weight: bool


@dataclass(frozen=True, slots=True)
class Node:
    """One operation; `shape` is in numpy's order, and `sources` are numbers of nodes, or leaves."""

    name: str
    op: str
    kind: str  # ggml's name of the type of its values
    shape: tuple[int, ...]
    sources: tuple[int | Leaf, ...]

    @property
    def weights(self) -> tuple[str, ...]:
        """Names of the weights that it reads."""
        return tuple(source.name for source in self.sources if isinstance(source, Leaf) and source.is_weight)

    @property
    def layer(self) -> int:
        """The layer whose weights it reads; -1: none."""
        found = [match for name in self.weights if (match := _BLOCK.match(name))]
        return int(found[0][1]) if found else -1


@dataclass(frozen=True)
class Graph:
    """The nodes of one decode, in the order of computation."""

    nodes: tuple[Node, ...]

    @functools.cached_property
    def independent(self) -> tuple[bool, ...]:
        """Whether a node depends on inputs and caches alone, and on no weight: masks and positions, which every pass computes anew."""
        found: list[bool] = []
        for node in self.nodes:
            found.append(all(found[s] if isinstance(s, int) else not s.is_weight for s in node.sources))
        return tuple(found)

    @functools.cached_property
    def last_use(self) -> tuple[int, ...]:
        """The last node that reads each node's values, itself or through views; its own number if none does."""
        last = list(range(len(self.nodes)))
        for number, node in enumerate(self.nodes):
            for source in node.sources:
                if isinstance(source, int):
                    last[source] = max(last[source], number)
        for number in reversed(range(len(self.nodes))):
            if self.nodes[number].op in VIEWS:
                for source in self.nodes[number].sources:
                    if isinstance(source, int):
                        last[source] = max(last[source], last[number])
        return tuple(last)

    def live(self, after: int) -> tuple[int, ...]:
        """Nodes up to `after` whose values are read later, views as what they view, without those that every pass computes anew."""
        return tuple(i for i in range(after + 1) if self._spans[i] > after)

    @functools.cached_property
    def _spans(self) -> tuple[int, ...]:
        """The last use of every node's values; -1 for views, and for what every pass computes anew."""
        return tuple(
            -1 if independent or self.root(i) != i else last
            for i, (last, independent) in enumerate(zip(self.last_use, self.independent, strict=True))
        )

    @functools.cached_property
    def _n_live(self) -> tuple[int, ...]:
        """How many values are live after each node."""
        steps = [0] * (len(self.nodes) + 1)
        for i, end in enumerate(self._spans):
            if end > i:
                steps[i] += 1
                steps[end] -= 1
        return tuple(itertools.accumulate(steps[:-1]))

    def root(self, number: int) -> int:
        """The node whose values a view shows; the node itself if it is no view."""
        node = self.nodes[number]
        while node.op in VIEWS and node.sources and isinstance(node.sources[0], int):
            number = node.sources[0]
            node = self.nodes[number]
        return number

    @functools.cached_property
    def layers(self) -> tuple[int, ...]:
        """Numbers of the layers whose weights are read, in the order of their first nodes."""
        return tuple(dict.fromkeys(node.layer for node in self.nodes if node.layer >= 0))

    @functools.cached_property
    def entries(self) -> dict[int, int]:
        """For each layer, the node after which it begins: of those since the last weight before it, the last with fewest live values."""
        first: dict[int, int] = {}
        for number, node in enumerate(self.nodes):
            if node.layer >= 0:
                first.setdefault(node.layer, number)
        return {layer: self._cut_before(number) for layer, number in first.items() if number > 0}

    @functools.cached_property
    def head(self) -> int:
        """The node after which the head begins, with the last norm: of those after the layers, the first with fewest live values."""
        last = max(number for number, node in enumerate(self.nodes) if node.layer >= 0)
        following = next(number for number in range(last + 1, len(self.nodes)) if self.nodes[number].weights)
        return min(range(last, following), key=lambda i: (self._n_live[i], i))

    def _cut_before(self, number: int) -> int:
        """Of the nodes between the last that reads a weight before `number`, and `number`: the last with fewest live values."""
        start = max((i for i in range(number) if self.nodes[i].weights), default=0)
        return min(range(start, number), key=lambda i: (self._n_live[i], -i))

    def exits(self, layer: int) -> int:
        """The node after which a layer has ended: the next layer's entry, or the head's."""
        later = [self.entries[other] for other in self.layers[self.layers.index(layer) + 1 :]]
        return later[0] if later else self.head
