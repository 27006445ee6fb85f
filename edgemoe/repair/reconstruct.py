"""Refit a changed model to the original one, layer by layer, and quantize its matrices on the way (docs/pricing.md, 10, 12 and 15).

Two streams run side by side: that of the original model, and that of the changed model with all earlier layers refitted.  In each layer the
experts that stay are fitted so that the changed stream after the layer equals the original stream.  This also corrects errors of earlier
layers.  New weights lie in the work folder, one file per layer.  After each layer everything is on disk, so a run that was killed goes on
with the next layer and gives the same bytes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from edgemoe.base.progress import Progress
from edgemoe.base.storage import array_file, save_arrays
from edgemoe.base.types import F64
from edgemoe.ir import PROJECTIONS
from edgemoe.model.checkpoint import DTYPES
from edgemoe.repair.experts import Experts, Tokens, fill_residual, refit_experts
from edgemoe.repair.quantize_layer import Packed, quantize_experts
from edgemoe.repair.quantize_steps import quantize_embedding, quantize_steps
from edgemoe.repair.two_streams import TwoStreams
from edgemoe.stream.adapter import only_experts, weights_of
from edgemoe.stream.layers import Recorder, recording
from edgemoe.stream.passes import map_ordered
from edgemoe.stream.states import States

Change = Callable[[int, Tokens, Experts], Experts]  # (layer, tokens that its experts see, its experts) -> the experts to refit


def resume(streams: TwoStreams, progress: Progress | None) -> range:
    """Return the layers still to do; on a fresh start, write the states of both streams before the first layer."""
    start = int(streams.steps.read()["done"])
    if start == 0:
        original, changed = streams.states("original", 0), streams.states("changed", 0)
        table = quantize_embedding(streams) if streams.quantize_plan else None
        for index in streams.windows.chunks():
            original.write(index, streams.original.embed(streams.windows.tokens[index]))
            changed.write(index, streams.original.embed(streams.windows.tokens[index], table))
        original.close()
        changed.close()
    if progress:
        progress(start, streams.model.n_layers)
    return range(start, streams.model.n_layers)


def refit_layer(streams: TwoStreams, layer: int, kept: Sequence[int], *, epochs: int, change: Change | None = None) -> None:
    """Run both streams through a layer, refit its experts, quantize its matrices if asked to, and write weights and states.

    Args:
        streams: the two models.
        layer: its number; all layers before it are done.
        kept: experts that stay; none where the layer has no experts.
        epochs: passes of descent over the tokens, after the closed form, where experts were dropped or changed.  0: W_down alone is
            refitted. -1: this refit is left out; quantizing still refits matrices.
        change: what is done to the experts before they are refitted.
    """
    module = streams.original.load_layer(layer)
    following, attended = streams.states("original", layer + 1), streams.states("attended", layer)
    shared = streams.states("shared", layer) if streams.model.find("ffn_down_shexp", layer) else None
    _run_original(streams, module, layer, following, attended, shared)
    if streams.changed is not streams.original:
        streams.original.unload_layer(layer)
        module = streams.changed.load_layer(layer)
    arrays = quantize_steps(streams, module, layer, following, attended, shared) if streams.quantize_plan else {}
    for states in (attended, shared):
        if states is not None:
            states.close(delete=True)
    if layer in streams.model.moe_layers:
        arrays |= _refit_experts(streams, module, layer, kept, following, epochs=epochs, change=change)
    else:
        _run_dense(streams, module, layer)
    streams.changed.unload_layer(layer)
    following.close()
    save_arrays(streams.work / array_file(layer), arrays)
    streams.steps.note(layer + 1)
    for old in streams.work.glob(f"*-{layer}.bin"):
        old.unlink()


def _refit_experts(
    streams: TwoStreams, module: Any, layer: int, kept: Sequence[int], following: States, *, epochs: int, change: Change | None
) -> Packed:
    """Refit the experts if some were dropped or changed, quantize them if asked to, and write the changed stream after them."""
    tokens = _run_changed(streams, module, layer, np.array(kept), following)
    views = [weights_of(module, f"ffn_{p}_exps") for p in PROJECTIONS]
    gate, up, down = (view[list(kept)] for view in views)
    experts = Experts(gate=gate.clone(), up=up.clone(), down=down.clone())
    del views, gate, up, down
    streams.changed.unload_layer(layer)
    residual = streams.array("residual", streams.model.hidden_size)
    if change is not None:
        experts = change(layer, tokens, experts)
        fill_residual(tokens, experts, residual)
        domains = np.repeat(streams.windows.domain, streams.windows.lengths)
        error = np.bincount(domains, np.square(residual).sum(axis=1, dtype=np.float64), len(streams.weights))
        tokens = replace(tokens, weights=streams.weigh_tokens(error.astype(np.float64)))
    dtype = DTYPES[streams.model.get("ffn_down_exps", layer, 0).dtype]
    if epochs >= 0 and (change is not None or len(kept) < streams.model.n_experts):
        refit_experts(tokens, experts, residual, epochs=epochs, store=lambda e: _round(e, dtype))
    else:
        fill_residual(tokens, experts, residual)
    if streams.quantize_plan:
        arrays = quantize_experts(streams.quantize_plan, layer, tokens, experts, residual, kept, streams.routers.from_layer(layer + 1))[0]
    else:
        arrays = {
            f"ffn_{p}_exps.{expert}": stack[n].cpu().numpy().astype(dtype)
            for p, stack in zip(PROJECTIONS, experts.stacks, strict=True)
            for n, expert in enumerate(kept)
        }
    streams.leave(layer, following, residual)
    return arrays


def _run_original(streams: TwoStreams, module: Any, layer: int, following: States, attended: States, shared: States | None) -> None:
    """Write the original's states after the layer; to quantize matrices, also those after attention and what a shared expert gives."""
    before = streams.states("original", layer)

    def run(index: NDArray[np.int64]) -> None:
        with recording(Recorder(outputs={})) as seen:
            out = streams.original.run_layer(module, before.read(index))
        following.write(index, out)
        if streams.quantize_plan:
            assert seen.ffn_output is not None
            attended.write(index, out - seen.ffn_output.view_as(out))
            if shared is not None and seen.outputs is not None:
                shared.write(index, seen.outputs["ffn_down_shexp"].view_as(out))

    for _ in map_ordered(run, streams.windows.chunks(), device=streams.original.device):
        pass
    before.close()


def _run_dense(streams: TwoStreams, module: Any, layer: int) -> None:
    """Run the changed stream through a layer without experts, and write its states after the layer."""
    before, after = streams.states("changed", layer), streams.states("changed", layer + 1)
    run = partial(streams.changed.run_layer, module)
    chunks, device = streams.windows.chunks(), streams.changed.device
    for _ in map_ordered(lambda index: after.write(index, run(before.read(index))), chunks, device=device):
        pass
    before.close()
    after.close()


def _run_changed(streams: TwoStreams, module: Any, layer: int, kept: NDArray[np.int64], original: States) -> Tokens:
    """Collect what the survivors receive in the changed stream, and the output with which it would equal the original after the layer."""
    before, k, hidden = streams.states("changed", layer), streams.changed.model.top_k, streams.model.hidden_size
    x, target = streams.array("input", hidden), streams.array("target", hidden)
    gradients = streams.read_gradients(layer)
    chosen, gates = np.zeros((len(x), k), np.int32), np.zeros((len(x), k), np.float32)
    position = {int(expert): n for n, expert in enumerate(kept)}

    def run(index: NDArray[np.int64]) -> F64:
        real = torch.from_numpy(streams.real[index].ravel())
        slots = torch.zeros(len(real), dtype=torch.int64)
        who, how_much = torch.zeros(len(real), k, dtype=torch.int32), torch.zeros(len(real), k)

        def note(expert: int, token: torch.Tensor, _: Any, __: Any, ___: Any, gate: torch.Tensor) -> None:
            token = token.cpu()
            who[token, slots[token]], how_much[token, slots[token]] = position[expert], gate.cpu()
            slots[token] += 1

        with recording(Recorder(on_expert=note)) as seen:
            out = streams.changed.run_layer(module, before.read(index))
        assert seen.moe_input is not None
        assert seen.moe_output is not None
        wanted = original.read(index).to(out.device) - out + seen.moe_output.view_as(out)
        rows = streams.rows(index)
        x[rows] = seen.moe_input.cpu()[real].numpy()
        target[rows] = wanted.flatten(0, 1).cpu()[real].numpy()
        chosen[rows], gates[rows] = who[real].numpy(), how_much[real].numpy()
        error = (wanted - seen.moe_output.view_as(out)).square().sum(-1).cpu().double().numpy() * streams.real[index]
        sums: F64 = np.bincount(streams.windows.domain[index], error.sum(axis=1), len(streams.weights)).astype(np.float64)
        return sums

    with only_experts(module, kept):
        error = sum(map_ordered(run, streams.windows.chunks(), device=streams.changed.device))
    before.close()
    weights = streams.weigh_tokens(np.asarray(error))
    return Tokens(x=x, target=target, chosen=chosen, gates=gates, weights=weights, guard=streams.guard, gradients=gradients)


def _round(experts: Experts, dtype: Any) -> None:
    """Round the experts in place to the checkpoint's own type: repaired weights take no more bytes than original ones."""
    for stack in experts.stacks:
        stack.copy_(torch.from_numpy(stack.cpu().numpy().astype(dtype).astype(np.float32)))
