"""This module refits and packs every matrix outside the routed experts: the embedding, a loaded layer's matrices, the output matrix.

The embedding is packed without a refit.  The layer belongs to the changed stream, which carries all earlier rounding.  Matrices that read a
norm, routers and experts included, are multiplied by a map that takes the output of the norm in the changed stream to its output in the
original stream; routers stay unrounded, and experts are packed later.  Matrices that write the stream are refitted to the difference
between the original stream after this part (attention or feed-forward) and the changed stream before it.  W_down of a shared expert is
refitted to the output of the original's shared expert (docs/pricing.md, 12).
"""

from __future__ import annotations

from functools import partial
from typing import Any

import numpy as np
import torch

from edgemoe.base.storage import array_file, load_arrays, save_arrays
from edgemoe.base.types import F32
from edgemoe.ir import is_stack
from edgemoe.model.checkpoint import read_tensor
from edgemoe.repair.align import PairSums, refit_matrix
from edgemoe.repair.output_map import HeadInputs, descend_map
from edgemoe.repair.quantize_layer import Packed, quantize_matrices
from edgemoe.repair.router_gram import add_flips
from edgemoe.repair.two_streams import Pair, TwoStreams
from edgemoe.repair.vocabulary import GROUPS, gradient_sums, group_metrics, group_rows, masses, quantize_rows_by_group
from edgemoe.stream.adapter import weights_of
from edgemoe.stream.layers import Recorder, apply_norm, recording
from edgemoe.stream.passes import map_ordered
from edgemoe.stream.states import States


def quantize_steps(streams: TwoStreams, module: Any, layer: int, following: States, attended: States, shared: States | None) -> Packed:
    """Refit and quantize the matrices of the layer that belong to no routed expert, step by step, on the inputs of the changed stream.

    Each step holds the matrices that read one activation; the module's docstring says what each is refitted to.

    Args:
        streams: the original and the changed model.
        module: the loaded layer of the changed model.
        layer: its number.
        following: states of the original after the layer.
        attended: states of the original after the layer's attention.
        shared: output of the original's shared expert; None if the layer has none.
    """
    assert streams.quantize_plan is not None
    model, packed = streams.changed.model, Packed()
    before, original = streams.states("changed", layer), streams.states("original", layer)
    wanted = {"attn_norm": original, "attn_mix": attended, "ffn_norm": attended}
    wanted |= {"dense_hidden": following, **({"shared_hidden": shared} if shared else {})}
    for step in model.steps(layer):
        plain = {role: weights_of(module, role) for role in model.plain_roles(layer, step)}
        target = wanted.get(step.reads)
        if target is None:
            continue  # only experts read this activation, and they come last
        if step.reads.endswith("norm"):
            sums = streams.sums(before, target, partial(_pair_norms, streams, module, step.reads))
            readers = {role: weights_of(module, role) for role in step.roles}
            fold_map(read_map(sums), *readers.values())
            packed |= {
                f"{role}.-1": view.cpu().numpy().reshape(model.get(role, layer).shape).copy()
                for role, view in readers.items()
                if role not in plain and not is_stack(role)
            }
            routers = None
        else:
            sums = streams.sums(before, target, partial(_pair_outputs, streams, module, step.reads))
            for view in plain.values():
                view.copy_(torch.from_numpy(refit_matrix(view.cpu().numpy(), *sums)))
            routers = streams.routers.from_layer(layer if step.reads == "attn_mix" else layer + 1)
        if plain:
            packed |= quantize_matrices(streams.quantize_plan, plain, layer, sums, routers)
    before.close()
    original.close()
    return packed


def _attend(streams: TwoStreams, module: Any, states: torch.Tensor) -> tuple[torch.Tensor, Recorder]:
    """The changed stream after a layer's attention, and the Recorder with the inputs of its matrices."""
    with recording(Recorder(attention_only=True)) as seen:
        return streams.changed.run_layer(module, states), seen


def _pair_norms(streams: TwoStreams, module: Any, activation: str, changed: torch.Tensor, original: torch.Tensor) -> Pair:
    """Outputs of a norm in both streams; attn_norm reads the layer's input, and ffn_norm reads the stream after attention."""
    if activation == "ffn_norm":
        changed = _attend(streams, module, changed)[0]
    return normed(changed, original, weights_of(module, activation), streams.model.norm_eps)


def _pair_outputs(streams: TwoStreams, module: Any, activation: str, changed: torch.Tensor, original: torch.Tensor) -> Pair:
    """Inputs, in the changed stream, of a matrix that writes the stream, and the outputs that the matrix should give."""
    device = streams.changed.device
    if activation == "attn_mix":
        seen, start = _attend(streams, module, changed)[1], changed
    else:
        with recording(Recorder(skip_experts=True)) as seen:
            streams.changed.run_layer(module, changed)
        start = _attend(streams, module, changed)[0] if activation == "dense_hidden" else torch.zeros(())
    x = seen.inputs[activation].view(*changed.shape[:2], -1)
    return x, original.to(device) - start.to(device)


def quantize_embedding(
    streams: TwoStreams,
) -> F32:
    """Pack the embedding, leave it on disk, and return the decoded table, from which the changed stream starts."""
    assert streams.quantize_plan is not None
    weights = read_tensor(streams.model.folder, streams.model.get("token_embd"))
    group, gradients = group_rows(weights), streams.read_gradients(-1)
    assert gradients is not None
    metrics = None  # a tied embedding is the output matrix too, and its errors as an output matrix would not count below
    if not streams.model.is_tied:
        of_token = group[np.concatenate([w[:n] for w, n in zip(streams.windows.tokens, streams.windows.lengths, strict=True)])]
        seen = np.bincount(of_token[~streams.guard], minlength=GROUPS)
        sums, routers = gradient_sums(of_token, gradients, streams.guard), streams.routers.from_layer(0)
        fitted, guard = ([add_flips(one[side], routers, streams.quantize_plan.flip_weight) for one in sums] for side in (0, 1))
        metrics = group_metrics(list(zip(fitted, guard, strict=True)), seen.tolist())
    packed, values = quantize_rows_by_group(streams.quantize_plan, "token_embd", weights, group, metrics)
    save_arrays(streams.work / array_file(-1), {"token_embd.-1": packed})
    return values


def quantize_output(
    streams: TwoStreams,
) -> None:
    """Refit the output matrix and pack it, on the last states of the changed stream; a tied embedding was packed already."""
    if streams.quantize_plan and not streams.model.is_tied:
        before, original = (streams.states(name, streams.model.n_layers) for name in ("changed", "original"))
        norm, output, eps = streams.original.head()
        sums = streams.sums(before, original, lambda x, y: normed(x, y, norm, eps))

        def read(window: int) -> HeadInputs:
            index, n = np.array([window]), int(streams.windows.lengths[window])
            x, y = normed(before.read(index)[0, :n], original.read(index)[0, :n], norm, eps)
            return HeadInputs(x, y, torch.from_numpy(streams.each[streams.rows(index)]).to(output.device))

        fitted, guard = np.flatnonzero(~streams.guard_windows).tolist(), np.flatnonzero(streams.guard_windows).tolist()
        group = group_rows(output.cpu().numpy())
        windows = range(len(streams.windows.lengths))
        mass = np.concatenate(list(map_ordered(lambda w: masses(read(w).original, output, group), windows, device=output.device)))
        fold_map(descend_map(read_map(sums).to(output.device), output, read, fitted, guard), output)
        own = [streams.sums(before, original, lambda x, y: normed(x, y, norm, eps), mass[:, i]) for i in range(GROUPS)]
        share = mass[~streams.guard].sum(axis=0) / max(mass[~streams.guard].sum(), 1e-30)
        seen = share * int((~streams.guard).sum())
        metrics = group_metrics([(fitted.gram, guard.gram) for fitted, guard in own], seen.tolist())
        packed = quantize_rows_by_group(streams.quantize_plan, "output", output.cpu().numpy(), group, metrics)[0]
        save_arrays(streams.work / array_file(-1), {**load_arrays(streams.work / array_file(-1)), "output.-1": packed})
        before.close()
        original.close()


def normed(changed: torch.Tensor, original: torch.Tensor, norm: torch.Tensor, eps: float) -> Pair:
    """Both streams' states after a norm."""
    return apply_norm(changed, norm, eps), apply_norm(original, norm, eps)


def read_map(sums: tuple[PairSums, PairSums]) -> torch.Tensor:
    """The map [H, H] from the normed states of the changed stream to those of the original stream."""
    return torch.from_numpy(refit_matrix(np.eye(len(sums[0].gram), dtype=np.float32), *sums))


def fold_map(read_map: torch.Tensor, *matrices: torch.Tensor) -> None:
    """Multiply matrices [.., H] by a map in place, so that they read through it."""
    for matrix in matrices:
        matrix.copy_(matrix @ read_map.to(matrix.device))
