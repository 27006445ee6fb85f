"""This module packs the matrices of a GGUF's layer with feedback, on the inputs that the rounded stream brings them.

Matrices that read the same values come in the order of llama.cpp's graph.  They are multiplied by the map that takes what the rounded
stream brings to what the original reads, and a matrix that writes the stream is refitted to the original's stream behind it (align.py).
What is missing against `reconstruct.py` are gradients: errors of all outputs count alike (docs/decisions/0020-gguf-sources.md).
"""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
from numpy.typing import NDArray

from edgemoe.base.threads import count_cores, open_threads
from edgemoe.base.types import F32, F64
from edgemoe.ir import is_stack
from edgemoe.model.checkpoint import read_tensor
from edgemoe.quantize.gptq import factor_hessian, mix_hessians
from edgemoe.repair.align import PairSums, refit_matrix
from edgemoe.repair.engine_layers import EngineLayer
from edgemoe.repair.experts import Experts, Tokens, fill_residual, refit_experts
from edgemoe.repair.quantize_layer import GRAM_BYTES, ErrorMetric, Packed, quantize_experts, quantize_matrix
from edgemoe.repair.two_streams import TwoStreams
from edgemoe.stream.engine.rounding import RoundingStream
from edgemoe.stream.layers import Recorder, recording
from edgemoe.stream.passes import map_ordered

DOWN = "ffn_down_exps"
GRAMS = 3  # square float64 matrices that an expert holds while it is packed


def pack_layer(streams: TwoStreams, layer: int, kept: Sequence[int], *, epochs: int) -> None:
    """Pack every matrix of a layer that the plan stores otherwise than the file has it; all layers before it are done.

    Args:
        streams: the two streams, both of llama.cpp.
        layer: its number.
        kept: experts that stay; none where the layer has no experts.
        epochs: of descent, where experts were dropped and their formula is known; -1 leaves repair out.
    """
    assert isinstance(streams.original, RoundingStream)
    work, packed = EngineLayer(streams, layer, kept), Packed()
    for activation, roles in streams.original.groups(layer):
        if not is_stack(roles[0]):
            packed |= pack_plain(work, activation, roles)
        elif not streams.model.expert.can_refit:
            packed |= pack_stacks(work, roles)
        elif DOWN not in roles and changes_experts(work):  # down is packed with them
            packed |= pack_silu(work, epochs)
    work.finish(packed)


def map_of(sums: tuple[PairSums, PairSums]) -> F32:
    """The map [C, C] from what the rounded stream brings to what the original reads."""
    return refit_matrix(np.eye(len(sums[0].gram), dtype=np.float32), *sums)


def pack_plain(work: EngineLayer, activation: str, roles: Sequence[str]) -> Packed:
    """Pack the matrices that read an activation."""
    wanted = [role for role in roles if not work.stays(role)]
    if not wanted:
        return {}
    writes = len(roles) == 1 and work.stream.writes(work.layer, roles[0])
    sums = work.pairs_of_output(activation, roles[0]) if writes else work.pairs(activation, roles[0])
    align = None if writes else map_of(sums)
    metric, packed = ErrorMetric(inputs=factor_hessian(sums[0].gram), guard=sums[1].gram), Packed()
    with open_threads() as pool:
        for role in wanted:
            values = work.stream.values(work.layer, role)
            rows = refit_matrix(values, *sums) if align is None else values @ align
            kind = work.plan.format_of(role, work.layer)
            packed[f"{role}.-1"], work.changed[role] = quantize_matrix(
                work.plan.target, rows, kind, work.importance[role, -1], metric, pool
            )
    return packed


def changes_experts(work: EngineLayer) -> bool:
    """Whether experts go, or are stored otherwise than the file has them."""
    stays = all(work.stays(f"ffn_{part}_exps") for part in ("gate", "up", "down"))
    return not stays or len(work.kept) < work.plan.model.n_experts


def pack_stacks(work: EngineLayer, roles: Sequence[str]) -> Packed:
    """Pack the kept experts' matrices of stacks that read the same: all but down, or down."""
    wanted = [role for role in roles if not work.stays(role)]
    if not wanted:
        return {}
    inner = DOWN in roles
    align = None
    if not inner:
        sums = work.pairs("experts", roles[0])
        align = map_of(sums)
    x, chosen, gates = _routed(work, roles[0], inner=inner)
    weights = gates**2 * work.streams.each[:, None]
    layer_gram = None if inner else np.sum([_gram(work, x, weights, chosen, int(e))[0] for e in work.kept], axis=0)
    packed = Packed()
    for role in wanted:
        work.changed[role] = work.stream.values(work.layer, role)
    cols = x.shape[-1]
    at_once = min(count_cores(), max(1, GRAM_BYTES // (GRAMS * 8 * cols**2)))

    def pack(expert: int) -> Packed:
        own, guard, n = _gram(work, x, weights, chosen, expert)
        metric, found = ErrorMetric(inputs=factor_hessian(mix_hessians(own, n, layer_gram)), guard=guard), Packed()
        for role in wanted:
            rows = read_tensor(work.plan.model.folder, work.plan.model.get(role, work.layer, expert))
            rows = rows if align is None else rows @ align
            kind, columns = work.plan.format_of(role, work.layer, expert), work.importance[role, expert]
            found[f"{role}.{expert}"], values = quantize_matrix(work.plan.target, rows, kind, columns, metric, pool)
            work.changed[role][expert] = values
        return found

    with open_threads() as pool, ThreadPoolExecutor(at_once) as per_expert:
        for found in per_expert.map(pack, work.kept.tolist()):
            packed |= found
    return packed


def _routed(work: EngineLayer, role: str, *, inner: bool) -> tuple[F32, NDArray[np.int32], F32]:
    """What the stacks read in the rounded stream [tokens, inputs] or [tokens, k, neurons], and each token's experts and gates."""
    streams, k = work.streams, work.plan.model.top_k
    n = int(streams.first[-1])
    chosen, gates = np.zeros((n, k), np.int32), np.zeros((n, k), np.float32)
    held: dict[str, F32] = {}

    def run(index: NDArray[np.int64]) -> None:
        rows, real = streams.rows(index), streams.real[index].ravel()
        slots = np.zeros(len(real), np.int64)
        who, how_much = np.zeros((len(real), k), np.int32), np.zeros((len(real), k), np.float32)
        inputs: dict[str, F32] = {}

        def note(expert: int, token: torch.Tensor, x: torch.Tensor, h: torch.Tensor, _: torch.Tensor, gate: torch.Tensor) -> None:
            at = token.numpy(), slots[token.numpy()]
            who[at], how_much[at] = expert, gate.numpy()
            value, shape = (h, (len(real), k, h.shape[1])) if inner else (x, (len(real), x.shape[1]))
            inputs.setdefault("", np.zeros(shape, np.float32))[at if inner else at[0]] = value.numpy()
            slots[at[0]] += 1

        with recording(Recorder(on_expert=note)):
            work.stream.run_until(work.layer, work.before.read(index), role)
        found = inputs[""][real]
        work.hold(held, "experts", found[0].size)[rows] = found.reshape(len(found), -1)
        chosen[rows], gates[rows] = who[real], how_much[real]

    with work.rounded():
        for part in (streams.windows.chunks()[:1], streams.windows.chunks()[1:]):
            for _ in map_ordered(run, part, device=work.stream.device):
                pass
    x = held["experts"]
    return (x.reshape(n, k, -1) if inner else x), chosen, gates


def _gram(work: EngineLayer, x: F32, weights: F32, chosen: NDArray[np.int32], expert: int) -> tuple[F64, F64, int]:
    """H of one expert's inputs over fitted and over guard tokens, and the number of fitted ones."""
    token, slot = np.nonzero(chosen == expert)
    values = np.asarray(x[token] if x.ndim == 2 else x[token, slot])
    weight, guard = weights[token, slot], work.streams.guard[token]
    fitted, held_back = ((values.T * (weight * side)) @ values for side in (~guard, guard))
    return fitted.astype(np.float64), held_back.astype(np.float64), int((~guard).sum())


def pack_silu(work: EngineLayer, epochs: int) -> Packed:
    """Refit and pack the kept experts as on the way of transformers: to the output with which the stream would equal the original's."""
    model, packed = work.plan.model, Packed()
    sums = work.pairs("experts", "ffn_up_exps")
    align = map_of(sums)
    if work.stream.routes_by(work.layer):
        router = work.stream.values(work.layer, "ffn_gate_inp") @ align
        work.changed["ffn_gate_inp"] = packed["ffn_gate_inp.-1"] = np.ascontiguousarray(router)
    tokens = _tokens(work)
    gate, up = (torch.from_numpy(_read_stack(work, part) @ align) for part in ("gate", "up"))
    experts = Experts(gate=gate, up=up, down=torch.from_numpy(_read_stack(work, "down")))
    del gate, up
    residual = work.streams.array("residual", work.streams.original.width)
    if epochs >= 0 and len(work.kept) < model.n_experts:
        refit_experts(tokens, experts, residual, epochs=epochs, store=lambda _: None)
    else:
        fill_residual(tokens, experts, residual)
    packed |= quantize_experts(work.plan, work.layer, tokens, experts, residual, work.kept.tolist(), None)[0]
    for part, stack in zip(("gate", "up", "down"), experts.stacks, strict=True):
        values = stack.numpy()
        if len(work.kept) < model.n_experts:
            values = work.stream.values(work.layer, f"ffn_{part}_exps")
            values[work.kept] = stack.numpy()
        work.changed[f"ffn_{part}_exps"] = values
    return packed


def _read_stack(work: EngineLayer, part: str) -> F32:
    """The kept experts' matrices [n, R, C]."""
    model = work.plan.model
    return np.stack([read_tensor(model.folder, model.get(f"ffn_{part}_exps", work.layer, int(e))) for e in work.kept])


def _tokens(work: EngineLayer) -> Tokens:
    """What the kept experts receive in the rounded stream, and what they should give."""
    streams, n = work.streams, int(work.streams.first[-1])
    k, width = work.plan.model.top_k, streams.original.width
    x, target = streams.array("input", width), streams.array("target", width)
    chosen, gates = np.zeros((n, k), np.int32), np.zeros((n, k), np.float32)
    position = np.zeros(work.plan.model.n_experts, np.int32)
    position[work.kept] = np.arange(len(work.kept))
    following = streams.states("original", work.layer + 1)

    def run(index: NDArray[np.int64]) -> F64:
        rows, real = streams.rows(index), streams.real[index].ravel()
        slots = np.zeros(len(real), np.int64)
        who, how_much = np.zeros((len(real), k), np.int32), np.zeros((len(real), k), np.float32)

        def note(expert: int, token: torch.Tensor, _: object, __: object, ___: object, gate: torch.Tensor) -> None:
            at = token.numpy(), slots[token.numpy()]
            who[at], how_much[at] = position[expert], gate.numpy()
            slots[at[0]] += 1

        with recording(Recorder(on_expert=note)) as seen:
            out = work.stream.run_layer(work.layer, work.before.read(index)).flatten(0, 1)
        assert seen.moe_input is not None
        assert seen.moe_output is not None
        wanted = (following.read(index).flatten(0, 1) - out + seen.moe_output).numpy()[real]
        x[rows], target[rows] = seen.moe_input.numpy()[real], wanted
        chosen[rows], gates[rows] = who[real], how_much[real]
        error = np.square(wanted - seen.moe_output.numpy()[real]).sum(axis=1, dtype=np.float64)
        domains = np.repeat(streams.windows.domain[index], streams.windows.lengths[index])
        sums: F64 = np.bincount(domains, error, len(streams.weights)).astype(np.float64)
        return sums

    with work.rounded():
        error = sum(map_ordered(run, streams.windows.chunks(), device=work.stream.device))
    following.close()
    weights = streams.weigh_tokens(np.asarray(error))
    return Tokens(x=x, target=target, chosen=chosen, gates=gates, weights=weights, guard=streams.guard)
