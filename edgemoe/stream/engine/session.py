"""This module runs llama.cpp with its evaluation callback: it records graphs, skips nodes, puts values in place, and lets others be seen.

A node whose COMPUTE flag is cleared is passed over by every backend.  So a pass may begin after any node, with the values that are live
there, and one layer costs its own share of a forward pass.  What was skipped is exact: the same operations run on the same values.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgemoe.base.threads import open_threads
from edgemoe.stream.engine.graph import Graph, Leaf, Node
from edgemoe.stream.engine.layout import COMPUTE, Ggml, struct_at
from edgemoe.stream.engine.runtime import Runtime

F32_BYTES = 4
_RUN, _SKIP, _SEE, _PUT = range(4)


@dataclass(frozen=True)
class Seen:
    """A node that has just been computed: its values, and those of its sources."""

    ggml: Ggml
    pointer: int

    def values(self) -> NDArray[Any]:
        """The node's values, copied."""
        return self.ggml.read(self.pointer)

    def source(self, number: int) -> NDArray[Any]:
        """The values of a source, copied."""
        return self.ggml.read(struct_at(self.pointer).src[number])

    def replace(self, values: NDArray[Any]) -> None:
        """Let all later nodes read other values."""
        self.ggml.write(self.pointer, values)


Watch = Callable[[Seen], None]


class Session:
    """A GGUF in llama.cpp whose passes can be watched, cut and fed; windows are sequences of one batch."""

    def __init__(self, path: Path, *, windows: int, length: int, threads: int) -> None:
        """Load the file with room for so many windows of so many tokens at a time.

        Raises:
            MachineError: llama-cpp-python is missing, or its ggml is another.
            ModelError: llama.cpp does not load the file.
        """
        self._graphs: dict[tuple[int, int, bool], Graph] = {}
        self._computes: dict[tuple[int, int, bool], list[bool]] = {}  # whether each node is computed at all
        self._pointers: dict[str, int] = {}  # of weights
        self._recorded: list[int] | None = None
        self._flagged: list[bool] = []
        self._orders: list[int] = []
        self._watches: Mapping[int, Watch] = {}
        self._values: Mapping[int, NDArray[Any]] = {}
        self._asked = self._current = 0
        self._now: list[int] = []  # pointers of the nodes of this pass
        self._error: BaseException | None = None
        self.runtime = Runtime(path, windows, length, threads, self._called)
        self.ggml = self.runtime.ggml

    def close(self) -> None:
        """Give the memory back."""
        self.runtime.close()

    # ---------------------------------------------------------------------------------------------------------------- passes
    def graph(self, windows: NDArray[np.int64], *, logits: bool = True) -> Graph:
        """The graph of so many windows of such a length; it is recorded when a shape comes for the first time."""
        key = (*windows.shape, logits)
        if key not in self._graphs:
            self._recorded = []
            self._pass(windows, logits=logits)
            recorded, self._recorded = self._recorded, None
            self._computes[key] = [bool(struct_at(pointer).flags & COMPUTE) for pointer in recorded]
            self._graphs[key] = self._read_graph(recorded)
        return self._graphs[key]

    def run(
        self,
        windows: NDArray[np.int64],
        *,
        after: int = -1,
        values: Mapping[int, NDArray[Any]] | None = None,
        until: int | None = None,
        watch: Mapping[int, Watch] | None = None,
        logits: bool = True,
    ) -> NDArray[np.float32] | None:
        """One pass over windows, each of which is a sequence.

        Args:
            windows: tokens [windows, length].
            after: skip all nodes up to this one, apart from masks and positions.
            values: of the nodes that are live there (`Graph.live`).
            until: skip all nodes behind this one.
            watch: what to call when a node has been computed, by its number.
            logits: whether every token has logits; else the last alone, and the last layer works on it alone.

        Returns:
            Logits [tokens, vocab], if wanted and not skipped.

        Raises:
            ModelError: llama.cpp fails.
        """
        graph = self.graph(windows, logits=logits)
        end = len(graph.nodes) if until is None else until + 1
        orders = [_RUN] * end + [_SKIP] * (len(graph.nodes) - end)
        for number in range(after + 1):
            orders[number] = _RUN if graph.independent[number] else _SKIP
        for number in watch or {}:
            if orders[number] == _RUN:
                orders[number] = _SEE
        for number in values or {}:
            orders[number] = _PUT
        self._orders, self._watches, self._values, self._asked, self._now = orders, watch or {}, values or {}, 0, []
        self._flagged = self._computes[*windows.shape, logits]
        self._pass(windows, logits=logits)
        return self.runtime.logits(windows.size) if logits and until is None else None

    def live_values(
        self, windows: NDArray[np.int64], at: int, *, also: Mapping[int, Watch] | None = None, **cut: Any
    ) -> dict[int, NDArray[Any]]:
        """The values of the nodes that are live after node `at`, which a pass must be given to begin there.

        `also` is watched on the way, and `cut` goes to `run`.
        """
        graph, found = self.graph(windows), {}

        def take(seen: Seen) -> None:  # each value is read here and not when it is made, because later nodes may overwrite it in place
            if also and at in also:
                also[at](seen)
            found.update({number: self.ggml.read(self._now[number]) for number in graph.live(at)})

        self.run(windows, until=at, watch={**(also or {}), at: take}, **cut)
        return found

    def _pass(self, windows: NDArray[np.int64], *, logits: bool) -> None:
        try:
            self.runtime.decode(windows, logits=logits)
        finally:
            self._orders, error, self._error = [], self._error, None
        if error is not None:
            raise error

    # --------------------------------------------------------------------------------------------------------------- weights
    def weight(self, name: str) -> NDArray[np.float32]:
        """The values of a weight that a recorded graph reads; a stack is decoded in parts, so that little is held beside the result."""
        pointer = self._pointers[name]
        shape = struct_at(pointer).shape
        if len(shape) < 3:
            return self._decode(pointer, 0, shape)
        values = np.empty(shape, np.float32)
        with open_threads() as pool:
            for part, found in enumerate(pool.map(lambda part: self._decode(pointer, part, shape[1:]), range(shape[0]))):
                values[part] = found
        return values

    def _decode(self, pointer: int, part: int, shape: tuple[int, ...]) -> NDArray[np.float32]:
        """The values of one of the equal parts of a weight."""
        import gguf

        tensor = struct_at(pointer)
        size = self.ggml.library.ggml_nbytes(pointer) * math.prod(shape) // math.prod(tensor.shape)
        raw = self.ggml.read_bytes(pointer, part * size, size)
        values = gguf.quants.dequantize(raw.reshape(*shape[:-1], -1) if len(shape) > 1 else raw, gguf.GGMLQuantizationType(tensor.type))
        return values.astype(np.float32, copy=False).reshape(shape)

    @contextmanager
    def pointed(self, weights: Mapping[str, NDArray[np.float32]]) -> Iterator[None]:
        """Let weights have other values while the context lasts: each points to our array instead of the file's bytes.

        Nothing is copied, so the file's own bytes are there again afterwards.  A recorded graph must read the weights.

        Raises:
            ValueError: an array has another shape than the weight.
        """
        f32, before = self.ggml.type_number("f32"), []
        held = {name: np.ascontiguousarray(values, np.float32) for name, values in weights.items()}
        try:
            for name, values in held.items():
                tensor = struct_at(self._pointers[name])
                if values.shape != tensor.shape:
                    raise ValueError(f"{name}: {values.shape} for {tensor.shape}")
                before.append((tensor, tensor.type, tensor.data, list(tensor.nb)))
                tensor.type, tensor.data = f32, values.ctypes.data
                for axis in range(4):
                    tensor.nb[axis] = F32_BYTES * math.prod(tensor.ne[:axis])
            yield
        finally:
            for tensor, kind, data, strides in before:
                tensor.type, tensor.data = kind, data
                for axis, stride in enumerate(strides):
                    tensor.nb[axis] = stride

    # -------------------------------------------------------------------------------------------------------------- callback
    def _called(self, pointer: int, ask: bool, _: Any) -> bool:
        """What llama.cpp calls for every node: first to ask whether it is to be seen, and if so again when it has been computed."""
        try:
            return self._asked_for(pointer) if ask else self._computed(pointer)
        except BaseException as error:  # noqa: BLE001  (ctypes would print and swallow it)
            self._error = error
            return False

    def _asked_for(self, pointer: int) -> bool:
        if self._recorded is not None:
            self._recorded.append(pointer)
            return False
        if not self._orders:
            return False
        self._current, self._asked = self._asked, self._asked + 1
        self._now.append(pointer)
        order, tensor = self._orders[self._current], struct_at(pointer)
        if order in (_SKIP, _PUT):
            tensor.flags &= ~COMPUTE
        elif self._flagged[self._current]:
            tensor.flags |= COMPUTE
        return order >= _SEE

    def _computed(self, pointer: int) -> bool:
        if self._orders[self._current] == _PUT:
            self.ggml.write(pointer, self._values[self._current])
        if self._current in self._watches:
            self._watches[self._current](Seen(self.ggml, pointer))
        return True

    def _read_graph(self, recorded: list[int]) -> Graph:
        numbers, nodes = {pointer: number for number, pointer in enumerate(recorded)}, []
        for pointer in recorded:
            tensor = struct_at(pointer)
            pointers = [source for source in tensor.src if source]
            if tensor.view_src and tensor.view_src not in pointers:
                pointers.append(tensor.view_src)
            sources = tuple(numbers[s] if s in numbers else self._leaf(s) for s in pointers)
            nodes.append(Node(tensor.label, self.ggml.ops[tensor.op], self.ggml.types[tensor.type], tensor.shape, sources))
        return Graph(tuple(nodes))

    def _leaf(self, pointer: int) -> Leaf:
        leaf = Leaf(struct_at(pointer).label, self.ggml.is_weight(pointer))
        if leaf.is_weight:
            self._pointers[leaf.name] = pointer
        return leaf
