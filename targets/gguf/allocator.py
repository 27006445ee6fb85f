"""This module replays ggml's graph allocator without ggml: the shapes of a graph's tensors give the bytes of its buffer.

llama.cpp reserves its compute buffer by laying the graph's intermediate tensors out in the order of execution.  Each goes into the smallest
hole that is large enough, or in the place of an operand that is no longer needed.  No closed formula gives the size for every shape,
because tensors of one size may or may not fit holes of another.  But the rules are short (ggml/src/ggml-alloc.c of llama.cpp 0c1e570).
"""

from __future__ import annotations

import math
from collections.abc import Sequence

ALIGNMENT = 32  # TENSOR_ALIGNMENT, ggml-impl.h
_ENDLESS = 1 << 62


class Node:
    """A tensor of the graph: an operation's result, a view of another, an input, or a tensor outside the buffer (weights, caches)."""

    __slots__ = ("children", "inplace", "item", "kind", "offset", "output", "place", "root", "shape", "sources", "unused", "views")

    def __init__(self, kind: str, shape: Sequence[int], sources: Sequence[Node], *, item: int = 4, inplace: bool = False) -> None:
        self.kind = kind  # op, view, strided (a view with holes), input, outside
        self.shape = tuple(shape)
        self.sources = tuple(sources)
        self.item = item
        self.inplace = inplace
        self.root: Node = sources[0].root if kind in ("view", "strided") else self
        self.output = False  # stays to the end
        self.unused = False  # has a place, but nothing is written there
        self.children = self.views = 0
        self.offset = -1  # in the buffer, -1: not in it, or not any more
        self.place = -1  # where it was put

    @property
    def size(self) -> int:
        """Bytes of the tensor in the buffer."""
        return -(-math.prod(self.shape) * self.item // ALIGNMENT) * ALIGNMENT


def op(shape: Sequence[int], *sources: Node, item: int = 4) -> Node:
    """A result that needs a place of its own."""
    return Node("op", shape, sources, item=item)


def inplace(shape: Sequence[int], *sources: Node) -> Node:
    """A result that may take the place of an operand (ggml_op_can_inplace)."""
    return Node("op", shape, sources, inplace=True)


def view(source: Node, shape: Sequence[int], *, strided: bool = False) -> Node:
    """A view of a tensor; a `strided` view has holes or another order, so that nothing can be written over it."""
    return Node("strided" if strided else "view", shape, (source,), item=source.item)


def given(shape: Sequence[int], item: int = 4) -> Node:
    """An input, which has its place before anything is computed."""
    return Node("input", shape, (), item=item)


OUTSIDE = Node("outside", (), ())  # weights and caches have buffers of their own


class Graph:
    """Nodes in the order in which they are computed."""

    def __init__(self) -> None:
        self.nodes: list[Node] = []
        self.inputs: list[Node] = []
        self._seen: set[int] = set()

    def expand(self, node: Node) -> Node:
        """Add a node after everything that it needs (ggml_build_forward_expand)."""
        stack = [(node, 0)]
        while stack:
            node_, next_source = stack.pop()
            if next_source == 0:
                if id(node_) in self._seen or node_.kind == "outside":
                    continue
                self._seen.add(id(node_))
            if next_source < len(node_.sources):
                stack += [(node_, next_source + 1), (node_.sources[next_source], 0)]
            else:
                (self.inputs if node_.kind == "input" else self.nodes).append(node_)
        return node

    def lay_out(self) -> int:
        """Give every result its place, and return the bytes of the buffer (ggml_gallocr_reserve)."""
        space = _Space()
        for node in self.inputs:
            node.offset = node.place = space.take(node.size)
        for node in self.nodes:
            if node.kind in ("view", "strided"):
                node.root.views += 1
            for source in node.sources:
                source.children += 1
        for node in self.nodes:
            if node.kind == "op":
                _place(node, space)
            for source in node.sources:
                _release(source, space)
        return space.top

    def touched(self, smaller: Graph) -> int:
        """Bytes that are written if a smaller batch runs in the places of this one, with the same nodes, some of which have fewer rows."""
        pairs = zip([*self.inputs, *self.nodes], [*smaller.inputs, *smaller.nodes], strict=True)
        end = total = 0
        for place, size in sorted((mine.place, its.size) for mine, its in pairs if mine.place >= 0 and not its.unused):
            total += max(0, place + size - max(end, place))
            end = max(end, place + size)
        return total


class _Space:
    """Free holes as [offset, size], in order; the last one has no end."""

    def __init__(self) -> None:
        self.holes = [[0, _ENDLESS]]
        self.top = 0

    def take(self, size: int) -> int:
        """Offset of the smallest hole that is large enough; of equal holes, the last one (ggml_dyn_tallocr_alloc)."""
        fits = [hole for hole in self.holes[:-1] if hole[1] >= size]
        smallest = min((hole[1] for hole in fits), default=0)
        hole = [h for h in fits if h[1] == smallest][-1] if fits else self.holes[-1]
        offset = hole[0]
        hole[0] += size
        hole[1] -= size
        if hole[1] == 0:
            self.holes.remove(hole)
        self.top = max(self.top, offset + size)
        return offset

    def give(self, offset: int, size: int) -> None:
        """Make a hole, merged with its neighbours."""
        self.holes.append([offset, size])
        self.holes.sort()
        merged = [self.holes[0]]
        for hole in self.holes[1:]:
            if merged[-1][0] + merged[-1][1] == hole[0]:
                merged[-1][1] += hole[1]
            else:
                merged.append(hole)
        self.holes = merged


def _place(node: Node, space: _Space) -> None:
    """Give a result its place: that of an operand that no other node needs, or a hole (ggml_gallocr_allocate_node)."""
    for parent in node.sources if node.inplace else ():  # a view is never "allocated", so nothing takes the place of its source
        reusable = parent.offset >= 0 and not parent.output and parent.children == 1 and not parent.views
        if reusable and parent.shape == node.shape and parent.item == node.item:
            node.offset = node.place = parent.offset
            parent.offset = -1
            return
    node.offset = node.place = space.take(node.size)


def _release(source: Node, space: _Space) -> None:
    """Note that one use of an operand is over; the last use frees its place."""
    source.children -= 1
    if source.children or source.views:
        return
    root = source.root
    if source is not root:
        root.views -= 1
    if root.views == 0 and root.children == 0 and root.offset >= 0 and not root.output:
        space.give(root.offset, root.size)
        root.offset = -1
