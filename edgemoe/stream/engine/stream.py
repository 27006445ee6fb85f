"""This module gives llama.cpp the verbs of `stream.layers.LayerStream`: embed, run a layer, let a recorder see it.

A model's roles are llama.cpp's names of tensors, so the matrix of a role is found in the graph by the name of its weight.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from edgemoe.base.errors import ModelError
from edgemoe.ir import Model, tensor_name
from edgemoe.stream.engine.graph import Graph
from edgemoe.stream.engine.places import Experts, find_experts
from edgemoe.stream.engine.session import Seen, Session, Watch
from edgemoe.stream.layers import Recorder, current_recorder


class EngineStream:
    """A GGUF whose layers llama.cpp computes one at a time, in float32 as far as its weights are."""

    def __init__(self, model: Model, path: Path, *, windows: int, length: int, threads: int) -> None:
        """Open the file with room for so many windows of so many tokens at a time.

        Raises:
            MachineError: llama-cpp-python is missing, or its ggml is another.
            ModelError: llama.cpp does not load the file.
        """
        self.model = model
        self.session = Session(path, windows=windows, length=length, threads=threads)

    def embed(self, tokens: NDArray[np.int64]) -> torch.Tensor:
        """First states [windows, length, hidden]."""
        graph = self.session.graph(tokens)
        return self._state(graph, tokens.shape, self.session.live_values(tokens, graph.entries[graph.layers[0]]))

    def run_layer(self, layer: int, states: torch.Tensor) -> torch.Tensor:
        """States [windows, length, hidden] after a layer; the recorder of this thread sees it."""
        tokens = np.zeros(states.shape[:2], np.int64)  # the layer begins behind the embedding
        graph = self.session.graph(tokens)
        start, end = graph.entries[layer], graph.exits(layer)
        (entered,) = self._one_value(graph, start)
        recorder = current_recorder()
        watch = {} if recorder is None else self._watch(graph, layer, recorder)
        values = {entered: states.reshape(-1, states.shape[-1]).numpy()}
        return self._state(graph, tokens.shape, self.session.live_values(tokens, end, after=start, values=values, also=watch))

    def close(self) -> None:
        """Give the memory back."""
        self.session.close()

    def _one_value(self, graph: Graph, at: int) -> tuple[int, ...]:
        """The node whose values are all that a layer reads.

        Raises:
            ModelError: the layer reads more than the residual stream.
        """
        live = graph.live(at)
        if len(live) != 1:
            names = ", ".join(graph.nodes[number].name for number in live)
            raise ModelError(f"{self.model.name}: a layer reads more than the stream before it: {names}")
        return live

    def _state(self, graph: Graph, shape: tuple[int, ...], values: dict[int, NDArray[np.float32]]) -> torch.Tensor:
        (value,) = values.values()
        return torch.from_numpy(value.reshape(*shape, -1))

    def _watch(self, graph: Graph, layer: int, recorder: Recorder) -> dict[int, Watch]:
        """What fills the recorder while a layer runs."""
        products = {name: number for number, node in enumerate(graph.nodes) if node.op == "MUL_MAT" for name in node.weights}
        watch: dict[int, Watch] = {}
        for step in self.model.steps(layer):
            plain = self.model.plain_roles(layer, step)
            if plain:
                watch[products[tensor_name(plain[0], layer)]] = _input_of(recorder, step.reads)
        if layer in self.model.moe_layers:
            watch |= _watch_experts(find_experts(graph)[layer], recorder)
        return watch


def _input_of(recorder: Recorder, activation: str) -> Watch:
    def see(seen: Seen) -> None:
        recorder.inputs[activation] = torch.from_numpy(seen.source(1))

    return see


def _watch_experts(places: Experts, recorder: Recorder) -> dict[int, Watch]:
    """What gives the recorder the router's logits and, once the gates are known, each expert's tokens."""
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
