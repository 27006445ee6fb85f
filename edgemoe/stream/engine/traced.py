"""This module completes the Model of a GGUF by what a few tokens show in llama.cpp: which matrices read the same values, and the rules.

Headers do not say how a router weighs its choice or what an expert computes between its matrices.  Both are seen: a rule of ours counts if
it gives the choice, the gates and the hidden values that llama.cpp computed.  A model that follows no such rule is never planned by one.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgemoe.base.errors import ModelError
from edgemoe.base.threads import count_cores
from edgemoe.base.types import F32
from edgemoe.ir import Model, Tensor
from edgemoe.ir.model import Router, is_stack
from edgemoe.model.checkpoint import read_tensor
from edgemoe.model.gguf_model import first_file
from edgemoe.model.routing.rule import ALONE, choice_scores, open_experts, weigh_scores
from edgemoe.stream.engine.graph import Graph, Leaf
from edgemoe.stream.engine.places import Experts, find_experts
from edgemoe.stream.engine.session import Seen, Session, Watch

TOKENS = 32
WITHIN = 2e-3  # relative: quantized sources round their inputs
SHARED_EXPERTS = ("grovemoe",)  # experts share matrices in groups, so none can go alone
UNKNOWN = "unknown"
PAIRS = 8  # of a token and an expert, whose hidden values are compared


@dataclass(slots=True)
class Sight:
    """What was seen of the experts of one layer (T tokens, k chosen)."""

    layer: int
    logits: F32  # [T, E]
    chosen: NDArray[np.int32]  # [T, k]
    gates: F32  # [T, k]
    x: F32  # [T, inputs]
    h: F32  # [T, k, neurons]


def complete_model(model: Model) -> Model:
    """The Model with the inputs that matrices share, the router's rule and the experts' formula; a checkpoint's Model is complete already.

    Raises:
        MachineError: llama-cpp-python is missing, or its ggml is another.
        ModelError: llama.cpp does not load the file, or a layer reads more than the residual stream.
    """
    if not model.architecture:
        return model
    tokens = (np.arange(TOKENS) * 7 + 3)[None] % model.vocab_size
    session = Session(first_file(model), windows=1, length=tokens.shape[1], threads=count_cores())
    try:
        graph = session.graph(tokens)
        check_cuts(model, graph)
        found = replace(model, tensors=tuple(_with_inputs(model.tensors, graph)))
        _check_stacks(found)
        places = find_experts(graph)
        seen = _look(session, tokens, places, f"{first_file(model)}: {model.architecture}")
        adds = _all_add(session, tokens, places)
        bias = {s.layer: _bias_of(model, s.layer) for s in seen}
    finally:
        session.close()
    router = replace(model.router, scoring=UNKNOWN) if model.architecture in SHARED_EXPERTS else fit_router(model.router, seen, bias)
    silu = all(_is_silu(found, sight, PAIRS if sight is seen[0] else 1) for sight in seen)
    activation = "silu" if silu else UNKNOWN
    return replace(found, router=router, expert=replace(model.expert, adds=adds, activation=activation))


def check_cuts(model: Model, graph: Graph) -> None:
    """Refuse a model whose layers hand on more than one value.

    Raises:
        ModelError: names the values.
    """
    for at in (*graph.entries.values(), graph.head):
        if len(live := graph.live(at)) != 1:
            names = ", ".join(graph.nodes[number].name for number in live)
            raise ModelError(f"{first_file(model)}: {model.architecture} cannot be built yet: its layers hand on several values ({names})")


# ------------------------------------------------------------------------------------------------------------------ inputs
def _with_inputs(tensors: Sequence[Tensor], graph: Graph) -> list[Tensor]:
    """The tensors with the activations that they read, named after their first readers; what is no plain product gets no format."""
    products: dict[str, list[int | Leaf]] = {}
    for node in graph.nodes:
        weight = node.sources[0] if node.sources else None
        if node.op in ("MUL_MAT", "MUL_MAT_ID") and isinstance(weight, Leaf) and weight.is_weight:
            routed = node.op == "MUL_MAT_ID"
            if routed or int(np.prod(node.shape[:-1])) == TOKENS:
                products.setdefault(weight.name, []).append(node.sources[1])
    first: dict[int, str] = {}

    def complete(tensor: Tensor) -> Tensor:
        if not tensor.planned or tensor.layer < 0:
            return tensor
        source = products.get(tensor.name, [None])[0]
        if not isinstance(source, int):
            return replace(tensor, planned=False, reads="")
        return replace(tensor, reads=first.setdefault(graph.root(source), tensor.role))

    return [complete(tensor) for tensor in tensors]


def _check_stacks(model: Model) -> None:
    for tensor in model.tensors:
        if tensor.expert >= 0 and not tensor.planned:
            raise ModelError(f"{Path(model.folder) / tensor.file}: {tensor.name} cannot be stored in other formats ({tensor.dtype})")


# -------------------------------------------------------------------------------------------------------------------- rules
def _look(session: Session, tokens: NDArray[np.int64], places: dict[int, Experts], name: str) -> list[Sight]:
    """One pass, in which the experts of every layer are seen; `name` is for the error."""
    parts: dict[int, dict[str, Any]] = {layer: {} for layer in places}
    watch: dict[int, Watch] = {}

    def keep(layer: int, name: str, take: Any) -> Watch:
        def see(seen: Seen) -> None:
            parts[layer][name] = take(seen)

        return see

    def inputs(seen: Seen) -> tuple[F32, NDArray[np.int32]]:
        x = seen.source(1)
        return x.reshape(-1, x.shape[-1]), seen.source(2)

    for layer, place in places.items():
        if place.weighted < 0:
            raise ModelError(f"{name} cannot be built yet: its gates are multiplied into the inputs of experts")
        watch[place.router] = keep(layer, "logits", lambda seen: seen.values())
        watch[min(place.stacks.values())] = keep(layer, "inputs", inputs)
        watch[place.stacks["down"]] = keep(layer, "h", lambda seen: seen.source(1))
        watch[place.weighted] = keep(layer, "gates", lambda seen: seen.source(1)[..., 0])
    session.run(tokens, watch=watch)
    return [
        Sight(layer, p["logits"], p["inputs"][1].reshape(TOKENS, -1), p["gates"].reshape(TOKENS, -1), p["inputs"][0], p["h"])
        for layer, p in parts.items()
    ]


def _all_add(session: Session, tokens: NDArray[np.int64], places: dict[int, Experts]) -> bool:
    """Whether a change of a weighted output changes the stream after its layer by as much, in every layer; layers run one by one."""
    graph = session.graph(tokens)
    states = session.live_values(tokens, graph.entries[graph.layers[0]])
    for layer in graph.layers:
        run = partial(session.live_values, tokens, graph.exits(layer), after=graph.entries[layer], values=states)
        following = run()
        if layer in places:
            shifts: list[float] = []
            moved = run(also={places[layer].weighted: partial(_shift, shifts)})
            before, after = (next(iter(values.values())).reshape(TOKENS, -1)[0] for values in (following, moved))
            room = 5 * WITHIN * (abs(shifts[0]) + 1e-3 * float(np.abs(before).max()))
            if np.abs(after - before - shifts[0]).max() > room:
                return False
        states = following
    return True


def _shift(shifts: list[float], seen: Seen) -> None:
    """Add to the first token's first output a number that stands out, and note it."""
    values = seen.values()
    shifts.append(float(np.abs(values).max()))
    values[0, 0] += shifts[0]
    seen.replace(values)


def _bias_of(model: Model, layer: int) -> F32:
    tensor = model.find("exp_probs_b.bias", layer)
    return read_tensor(model.folder, tensor) if tensor else np.zeros(model.n_experts, np.float32)


def fit_router(router: Router, seen: Sequence[Sight], bias: dict[int, F32]) -> Router:
    """The rule that gives the choice and the gates that were seen in every layer; scoring is "unknown" if none does."""
    for scoring in ("softmax", *ALONE):
        for renormalize in (True, False):
            rule = replace(router, scoring=scoring, renormalize=renormalize)
            ratios = [_ratios(rule, sight, bias[sight.layer]) for sight in seen]
            if any(ratio is None for ratio in ratios):
                continue
            every = np.concatenate([ratio.ravel() for ratio in ratios if ratio is not None])
            scale = float(np.median(every))
            if np.isfinite(every).all() and scale > 0 and np.abs(every / scale - 1).max() < WITHIN:
                return replace(rule, scale=1.0 if abs(scale - 1) < WITHIN / 10 else float(f"{scale:.5g}"))
    return replace(router, scoring=UNKNOWN)


def _ratios(rule: Router, sight: Sight, bias: F32) -> NDArray[np.float64] | None:
    """Gates that were seen over the rule's [T, k]; None if the rule chooses other experts."""
    logits = sight.logits.reshape(len(sight.chosen), -1).astype(np.float64)
    choice = np.asarray(choice_scores(rule, logits, bias), np.float64)
    alive = open_experts(rule, choice, np.ones(logits.shape[1], bool))
    best = np.argsort(-np.where(alive, choice, -np.inf), axis=1, kind="stable")[:, : sight.chosen.shape[1]]
    if (np.sort(best, axis=1) != np.sort(sight.chosen, axis=1)).any():
        return None
    gates = np.take_along_axis(weigh_scores(rule, logits), sight.chosen.astype(np.int64), axis=1)
    if rule.renormalize:
        gates /= gates.sum(axis=1, keepdims=True)
    ratios: NDArray[np.float64] = sight.gates / np.maximum(gates, 1e-30)
    return ratios


def _is_silu(model: Model, sight: Sight, pairs: int) -> bool:
    """Whether the hidden values of some pairs are silu(W_gate x) * W_up x, with matrices apart and no biases or scales."""
    roles = {role for role, _ in model.of_layer(sight.layer)}
    stacks = {role for role in roles if is_stack(role.partition(".")[0])}
    if stacks != {"ffn_gate_exps", "ffn_up_exps", "ffn_down_exps"}:
        return False
    for token in range(pairs):
        expert = int(sight.chosen[token, 0])
        a, b = (read_tensor(model.folder, model.get(f"ffn_{part}_exps", sight.layer, expert)) @ sight.x[token] for part in ("gate", "up"))
        expected = a / (1 + np.exp(-a)) * b
        if np.abs(expected - sight.h[token, 0]).max() > 10 * WITHIN * max(float(np.abs(expected).max()), 1e-30):
            return False
    return True
