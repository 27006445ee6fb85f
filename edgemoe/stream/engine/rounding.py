"""This module adds to `EngineStream` what rounding needs: partial passes, the order of matrices, and layers that compute with others."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch

from edgemoe.base.threads import count_cores
from edgemoe.base.types import F32
from edgemoe.ir import Model, is_stack
from edgemoe.model.gguf_model import first_file
from edgemoe.stream.engine.graph import Graph
from edgemoe.stream.engine.places import find_experts
from edgemoe.stream.engine.stream import EngineStream


class RoundingStream(EngineStream):
    """A GGUF's layers whose matrices can be replaced, in the order in which llama.cpp computes with them."""

    def run_until(self, layer: int, states: torch.Tensor, role: str, *, added: bool = False) -> F32 | None:
        """Let the recorder of this thread see a layer up to the product with a matrix; for a stack, up to the experts' outputs.

        With `added`, the pass goes on to the stream to which the product is added, and returns it [tokens, hidden].
        """
        found: list[F32] = []
        with self._lock:
            tokens = self._tokens_of(states)
            graph = self.session.graph(tokens)
            start = graph.entries[layer]
            values = {self._one_value(graph, start): states.reshape(-1, states.shape[-1]).numpy()}
            end = find_experts(graph)[layer].weighted if is_stack(role) else self._products(graph)[self._name(role, layer)]
            watch = {number: see for number, see in self._watch_layer(graph, layer).items() if number <= end}
            if added and (addition := self._addition(graph, layer, role)) is not None:
                end = addition
                watch[end] = lambda seen: found.append(seen.values())
            self.session.run(tokens, after=start, values=values, until=end, watch=watch)
        return found[0].reshape(tokens.size, -1) if found else None

    def writes(self, layer: int, role: str) -> bool:
        """Whether the product with a matrix is added to the states before the layer, as it is."""
        return self._addition(self.session.graph(self._largest), layer, role) is not None

    def _addition(self, graph: Graph, layer: int, role: str) -> int | None:
        """The node that adds a product to the states before the layer."""
        product, entry = self._products(graph)[self._name(role, layer)], self._one_value(graph, graph.entries[layer])
        readers = [number for number, node in enumerate(graph.nodes) if product in node.sources]
        if len(readers) != 1 or graph.nodes[readers[0]].op != "ADD":
            return None
        others = [graph.root(source) for source in graph.nodes[readers[0]].sources if isinstance(source, int) and source != product]
        return readers[0] if others == [entry] else None

    def routes_by(self, layer: int) -> bool:
        """Whether the router reads what the experts read, and is stored in float32."""
        graph = self.session.graph(self._largest)
        places, router = find_experts(graph)[layer], self.model.get("ffn_gate_inp", layer)
        number = self._products(graph)[router.name]
        stack, own = (graph.nodes[n].sources[1] for n in (min(places.stacks.values()), number))
        return router.dtype == "F32" and isinstance(stack, int) and isinstance(own, int) and graph.root(stack) == graph.root(own)

    def groups(self, layer: int) -> list[tuple[str, tuple[str, ...]]]:
        """Activations of a layer, and the matrices that read them, in the order of computation."""
        graph = self.session.graph(self._largest)
        products, found = self._products(graph), dict[int, tuple[str, tuple[str, ...]]]()
        for step in self.model.steps(layer):
            if plain := self.model.plain_roles(layer, step):
                found[min(products[self._name(role, layer)] for role in plain)] = (step.reads, plain)
        if layer in self.model.moe_layers:
            stacks = find_experts(graph)[layer].stacks
            roles = {f"ffn_{part}_exps": number for part, number in stacks.items()}
            first = tuple(role for role in roles if role != "ffn_down_exps")
            found |= {min(roles[role] for role in first): ("experts", first), roles["ffn_down_exps"]: ("hidden", ("ffn_down_exps",))}
        return [found[number] for number in sorted(found)]

    @contextmanager
    def replaced(self, layer: int, weights: Mapping[str, F32]) -> Iterator[None]:
        """Let matrices or stacks of a layer have other values, by role, while the context lasts."""
        with self.session.pointed({self._name(role, layer): values for role, values in weights.items()}):
            yield


def open_engine(model: Model, *, windows: int, length: int) -> RoundingStream:
    """The stream of a GGUF's own Model, with as many threads as there are cores.

    Raises:
        MachineError: llama-cpp-python is missing, or its ggml is another.
        ModelError: llama.cpp does not load the file.
    """
    return RoundingStream(model, first_file(model), windows=windows, length=length, threads=count_cores())
