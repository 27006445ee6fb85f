"""This module gives llama.cpp the verbs of `stream.layers.LayerStream`: embed, run a layer, let a recorder see it.

A model's roles are llama.cpp's names of tensors, so the matrix of a role is found in the graph by the name of its weight.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from edgemoe.base.errors import ModelError
from edgemoe.base.threads import open_threads
from edgemoe.base.types import F32
from edgemoe.ir import Model, tensor_name
from edgemoe.ir.model import is_stack
from edgemoe.quantize.reference import round_to_nearest
from edgemoe.stream.engine.graph import Graph
from edgemoe.stream.engine.places import Experts, find_experts, hide_experts
from edgemoe.stream.engine.session import Seen, Session, Watch
from edgemoe.stream.layers import Recorder, current_recorder


class EngineStream:
    """A GGUF whose layers llama.cpp computes one at a time, in float32 as far as its weights are; a loaded layer is its number.

    One pass runs at a time, whatever thread asks for it, and llama.cpp shares it out among its own threads.
    """

    name = "llama.cpp"
    device = torch.device("cpu")

    def __init__(self, model: Model, path: Path, *, windows: int, length: int, threads: int) -> None:
        """Open the file with room for so many windows of so many tokens at a time.

        Raises:
            MachineError: llama-cpp-python is missing, or its ggml is another.
            ModelError: llama.cpp does not load the file.
        """
        self.model = model
        self.session = Session(path, windows=windows, length=length, threads=threads)
        self._largest = np.zeros((windows, length), np.int64)  # tokens of a pass that begins behind the embedding
        self._kept: dict[int, NDArray[np.int64]] = {}
        self._lock = threading.Lock()
        graph = self.session.graph(self._largest)
        self.width = math.prod(graph.nodes[self._one_value(graph, graph.entries[graph.layers[0]])].shape) // self._largest.size

    def embedding(self) -> F32:
        """The embedding [vocab, hidden]."""
        return self.session.weight("token_embd.weight")

    def embed(self, tokens: NDArray[np.int64], table: F32 | None = None) -> torch.Tensor:
        """First states [windows, length, hidden], from the file's embedding or another table."""
        with self._lock, self.session.pointed({} if table is None else {"token_embd.weight": table}):
            graph = self.session.graph(tokens)
            return self._state(tokens.shape, self.session.live_values(tokens, graph.entries[graph.layers[0]]))

    def load_layer(self, layer: int) -> int:
        """The layer's number; the file is mapped."""
        return layer

    def unload_layer(self, layer: int) -> None:
        """Nothing, for the file is mapped."""

    def run_layer(self, layer: int, states: torch.Tensor) -> torch.Tensor:
        """States [windows, length, hidden] after a layer; the recorder of this thread sees it."""
        with self._lock:
            tokens = self._tokens_of(states)
            graph = self.session.graph(tokens)
            start = graph.entries[layer]
            values = {self._one_value(graph, start): states.reshape(-1, states.shape[-1]).numpy()}
            watch = self._watch_layer(graph, layer)
            return self._state(tokens.shape, self.session.live_values(tokens, graph.exits(layer), after=start, values=values, also=watch))

    def values(self, layer: int, role: str) -> F32:
        """The weights of a role in a layer."""
        return self.session.weight(self._name(role, layer))

    def _name(self, role: str, layer: int) -> str:
        """The name of a tensor in the file."""
        if not self.model.architecture:
            return tensor_name(role, layer)
        return self.model.get(role, layer, 0 if is_stack(role) else -1).name

    @contextmanager
    def rounded(self, layer: int, bits: Mapping[str, int]) -> Iterator[None]:
        """Let the weights of these roles be rounded to so many bits while the context lasts."""
        changed = {}
        for role, n in bits.items():
            changed[self._name(role, layer)] = values = self.values(layer, role)
            parts = values if values.ndim == 3 else values[None]

            def round_part(index: int, parts: F32 = parts, n: int = n) -> None:
                parts[index] = round_to_nearest(parts[index], n)

            with open_threads() as pool:
                list(pool.map(round_part, range(len(parts))))
        with self.session.pointed(changed):
            yield

    @contextmanager
    def only(self, layer: int, kept: NDArray[np.int64]) -> Iterator[None]:
        """Let the router choose among these experts alone while the context lasts."""
        self._kept[layer] = kept
        try:
            yield
        finally:
            del self._kept[layer]

    def candidate_outputs(self, layer: int, x: F32, chosen: NDArray[np.int64]) -> torch.Tensor:
        """Outputs [n, K, hidden] of chosen experts [n, K] for inputs [n, hidden], whatever an expert computes.

        A pass begins at the experts with our inputs and our choice, as many experts at a time as the router picks.
        """
        with self._lock:
            tokens = self._largest[: -(-len(x) // self._largest.shape[1])]  # no more windows than the inputs fill
            graph = self.session.graph(tokens)
            places = find_experts(graph)[layer]
            first = min(places.stacks.values())
            inputs, picks = (graph.root(source) for source in graph.nodes[first].sources[1:3] if isinstance(source, int))
            k, room = graph.nodes[first].shape[1], tokens.size
            found = np.zeros((*chosen.shape, graph.nodes[places.outputs].shape[-1]), np.float32)

            def run(rows: slice, slots: slice) -> None:
                part, experts = x[rows], chosen[rows, slots]
                given = np.zeros(graph.nodes[inputs].shape, np.float32)
                given[: len(part)] = part
                ids = np.zeros(graph.nodes[picks].shape, np.int32)
                ids[: len(part), : experts.shape[1]] = experts

                def take(seen: Seen) -> None:
                    found[rows, slots] = seen.values()[: len(part), : experts.shape[1]]

                watch = {places.outputs: take}
                self.session.run(tokens, after=first - 1, values={inputs: given, picks: ids}, until=places.outputs, watch=watch)

            for start in range(0, len(x), room):
                for slot in range(0, chosen.shape[1], k):
                    run(slice(start, start + room), slice(slot, slot + k))
        return torch.from_numpy(found)

    def normed(self, states: torch.Tensor) -> torch.Tensor:
        """What the output matrix reads [windows, length, hidden], from the states after the last layer."""
        found: list[NDArray[np.float32]] = []
        with self._lock:
            tokens = self._tokens_of(states)
            graph = self.session.graph(tokens)
            at = max(number for number, node in enumerate(graph.nodes) if self._output in node.weights)
            self.session.run(tokens, until=at, watch={at: lambda seen: found.append(seen.source(1))}, **self._at_head(graph, states))
        return torch.from_numpy(found[0].reshape(*states.shape[:2], -1))

    def logits(self, states: torch.Tensor, output: torch.Tensor | None = None) -> torch.Tensor:
        """Logits [windows, length, vocab] from the states after the last layer, with the file's output matrix or another."""
        with self._lock, self.session.pointed({} if output is None else {self._output: output.numpy()}):
            tokens = self._tokens_of(states)
            found = self.session.run(tokens, **self._at_head(self.session.graph(tokens), states))
        assert found is not None  # nothing behind the head was skipped
        return torch.from_numpy(found.reshape(*states.shape[:2], -1))

    @property
    def _output(self) -> str:
        return "token_embd.weight" if self.model.is_tied else "output.weight"

    def _tokens_of(self, states: torch.Tensor) -> NDArray[np.int64]:
        """Tokens in the shape of states, for a pass that reads none of them."""
        return self._largest[: len(states), : states.shape[1]]

    def _at_head(self, graph: Graph, states: torch.Tensor) -> dict[str, Any]:
        """Where a pass through the head alone begins, and with which values."""
        values = {self._one_value(graph, graph.head): states.reshape(-1, states.shape[-1]).numpy()}
        return {"after": graph.head, "values": values}

    def output(self) -> torch.Tensor:
        """The output matrix [vocab, hidden]."""
        return torch.from_numpy(self.session.weight(self._output))

    def head(self) -> tuple[torch.Tensor, torch.Tensor, float]:
        """Weights of the last norm [hidden] and of the output matrix [vocab, hidden], and the norm's epsilon."""
        return torch.from_numpy(self.session.weight("output_norm.weight")), self.output(), self.model.norm_eps

    def close(self) -> None:
        """Give the memory back."""
        self.session.close()

    def _one_value(self, graph: Graph, at: int) -> int:
        """The node whose values are all that a layer reads.

        Raises:
            ModelError: the layer reads more than the residual stream.
        """
        live = graph.live(at)
        if len(live) != 1:
            names = ", ".join(graph.nodes[number].name for number in live)
            raise ModelError(f"{self.model.name}: a layer reads more than the stream before it: {names}")
        return live[0]

    def _state(self, shape: tuple[int, ...], values: dict[int, NDArray[np.float32]]) -> torch.Tensor:
        (value,) = values.values()
        return torch.from_numpy(value.reshape(*shape, -1))

    def _watch_layer(self, graph: Graph, layer: int) -> dict[int, Watch]:
        """What fills the recorder of this thread while a layer runs, and hides the experts that are gone."""
        recorder, watch = current_recorder(), dict[int, Watch]()
        if recorder is not None:
            products = self._products(graph)
            for step in self.model.steps(layer):
                if plain := self.model.plain_roles(layer, step):
                    watch[products[self._name(plain[0], layer)]] = _input_of(recorder, step.reads)
            if layer in self.model.moe_layers:
                watch |= watch_experts(find_experts(graph)[layer], recorder)
        if layer in self._kept:
            gone = np.setdiff1d(np.arange(self.model.n_experts), self._kept[layer])
            watch |= hide_experts(graph, {layer: gone.tolist()})
        return watch

    def _products(self, graph: Graph) -> dict[str, int]:
        """The product with each matrix, by the matrix's name."""
        return {name: number for number, node in enumerate(graph.nodes) if node.op == "MUL_MAT" for name in node.weights}


def _input_of(recorder: Recorder, activation: str) -> Watch:
    def see(seen: Seen) -> None:
        x = seen.source(1)
        recorder.inputs[activation] = torch.from_numpy(x.reshape(-1, x.shape[-1]))

    return see


def watch_experts(places: Experts, recorder: Recorder) -> dict[int, Watch]:
    """What gives the recorder the router's logits and, once the gates are known, each expert's tokens.

    Raises:
        ModelError: the gates are multiplied into the experts' inputs.
    """
    if places.weighted < 0:
        raise ModelError("experts whose gates are multiplied into their inputs (llama4) cannot be watched yet")
    held: dict[str, NDArray[np.float32]] = {}
    chosen: list[NDArray[np.int32]] = []

    def see_router(seen: Seen) -> None:
        recorder.logits = torch.from_numpy(seen.values())

    def see_input(seen: Seen) -> None:
        x = seen.source(1)
        held["x"] = x.reshape(-1, x.shape[-1])
        chosen[:] = [seen.source(2)]
        recorder.moe_input = torch.from_numpy(held["x"])

    def see_down(seen: Seen) -> None:
        held["h"] = seen.source(1)
        if places.outputs == places.stacks["down"]:
            see_outputs(seen)

    def see_outputs(seen: Seen) -> None:
        held["f"] = seen.values()

    def see_weighted(seen: Seen) -> None:
        gates = seen.source(1)[..., 0]
        tell_experts(recorder, chosen[0], gates, held["x"], held["h"], held["f"])

    first = min(places.stacks.values())
    watch: dict[int, Watch] = {places.router: see_router, first: see_input, places.outputs: see_outputs}
    return watch | {places.stacks["down"]: see_down, places.weighted: see_weighted}


def tell_experts(
    recorder: Recorder,
    chosen: NDArray[np.int32],
    gates: NDArray[np.float32],
    x: NDArray[np.float32],
    h: NDArray[np.float32],
    f: NDArray[np.float32],
) -> None:
    """Give the recorder every expert's tokens, and the sum of the experts' outputs.

    Args:
        recorder: filled.
        chosen: experts [tokens, k].
        gates: [tokens, k].
        x: inputs [tokens, hidden].
        h: between up and down [tokens, k, neurons].
        f: outputs [tokens, k, hidden].
    """
    recorder.moe_output = torch.from_numpy((f * gates[..., None]).sum(1))
    tell: Callable[..., None] | None = recorder.on_expert
    for expert in np.unique(chosen) if tell else ():
        token, slot = np.nonzero(chosen == expert)
        parts = (token, x[token], h[token, slot], f[token, slot], gates[token, slot])
        tell(int(expert), *map(torch.from_numpy, parts))  # type: ignore[misc]
