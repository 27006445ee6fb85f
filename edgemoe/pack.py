"""A layer of the pruned stream, the plan's formats -> its matrices packed, each rounded with the errors before it in view.

Every matrix is rounded with feedback (`feedback.py`) on the second moments of what it receives once all before it are rounded: embedding,
then in each layer attention, gate and up, and down, which is first refitted to what the rounding of the others left.  Tokens set aside
decide for each matrix whether feedback is better than the target's stock quantizer (docs/pricing.md, 12).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from edgemoe.feedback import Moments, factor_moments, mix_moments
from edgemoe.ir import PROJECTIONS, Model, Plan, Stats
from edgemoe.pools import open_pool
from edgemoe.refit import Experts, Tokens, fill_residual, refit_down
from edgemoe.scores import importance_of
from edgemoe.stream import map_ordered
from edgemoe.targets import Target
from edgemoe.translate import Sums

BLOCK = 4096  # tokens of one piece of work
QKV = ("attn_q", "attn_k", "attn_v")
ROWS = 256  # of a matrix, rounded together: a fixed number, so that bytes do not depend on the number of cores
Gram = NDArray[np.float64]  # [C, C]
PackedRows = tuple[NDArray[np.uint8], NDArray[np.float32]]  # packed rows, and what they decode to
Packed = dict[str, NDArray[np.generic]]  # "role.expert" -> packed rows [rows, bytes], or what stays unrounded [rows, cols]


@dataclass(frozen=True, slots=True, kw_only=True)
class Packing:
    """What rounding needs beside the stream."""

    model: Model
    stats: Stats
    target: Target
    formats: Mapping[tuple[str, int, int], str]  # by (role, layer, expert); expert -1 for a matrix or a whole stack

    def format_of(self, role: str, layer: int, expert: int = -1) -> str:
        """The format of one matrix."""
        return self.formats[role, layer, expert if (role, layer, expert) in self.formats else -1]


def plan_packing(model: Model, stats: Stats, plan: Plan, target: Target) -> Packing:
    """What to round with, from what was planned."""
    units = target.list_units(model)
    formats: dict[tuple[str, int, int], str] = {}
    for unit in units:
        for role in [f"ffn_{p}_exps" for p in PROJECTIONS] if unit.expert >= 0 else [unit.role]:
            if unit.name in plan.formats:
                formats[role, unit.layer, unit.expert] = plan.formats[unit.name]
    return Packing(model=model, stats=stats, target=target, formats=formats)


# ----------------------------------------------------------------------------------------------------------------- a matrix
def pack_matrix(
    target: Target,
    weights: NDArray[np.float32],
    kind: str,
    importance: NDArray[np.float32] | None,
    fitted: Gram | None,
    guard: Gram | None,
    pool: ThreadPoolExecutor,
) -> PackedRows:
    """Pack a matrix by the better of the stock quantizer and feedback, as the guard tokens' second moments have it.

    Args:
        target: whose formats.
        weights: [R, C].
        kind: the format.
        importance: of the columns, for the stock quantizer.
        fitted: second moments for feedback; None leaves it out.
        guard: second moments that decide.
        pool: rows are shared out over its threads.

    Returns:
        Packed rows, and what they decode to [R, C].
    """
    blocks = [np.ascontiguousarray(weights[i : i + ROWS]) for i in range(0, len(weights), ROWS)]

    def pack(moments: Moments | None) -> PackedRows:
        packed = np.concatenate(list(pool.map(lambda rows: target.pack_rows(rows, kind, importance, moments), blocks)))
        return packed, target.unpack_rows(packed, kind, weights.shape[1])

    stock = pack(None)
    if fitted is None or guard is None or not target.feeds_back(kind):
        return stock
    ours = pack(factor_moments(fitted))
    return min((stock, ours), key=lambda found: _loss(found[1] - weights, guard))


def _loss(delta: NDArray[np.float32], gram: Gram) -> float:
    return float(((delta @ gram) * delta).sum())


def second_moments(x: torch.Tensor, weights: torch.Tensor, guard: torch.Tensor) -> tuple[Gram, Gram]:
    """sum_t w_t x_t x_t' over the fitted and over the guard tokens."""
    x = x.float()
    fitted, kept_back = ((x * (weights * mask)[:, None]).T @ x for mask in (~guard, guard))
    return fitted.double().cpu().numpy(), kept_back.double().cpu().numpy()


# ---------------------------------------------------------------------------------------------------------------- the experts
def pack_experts(
    packing: Packing, layer: int, tokens: Tokens, experts: Experts, residual: NDArray[np.float32], kept: Sequence[int]
) -> tuple[Packed, float]:
    """Pack a layer's survivors; their weights become what the packed ones decode to, the residual what that leaves.

    Gate and up first, then W_down is refitted to them in closed form and packed.

    Returns:
        The packed matrices, and the guard tokens' weighted mean square residual at the end.
    """
    importance = importance_of(packing.model, packing.stats, layer)
    packed: Packed = {}
    with open_pool() as pool:

        def store(projections: Sequence[str], *, hidden: bool) -> None:
            grams = (_expert_moments(tokens, experts, n, hidden=False)[0] for n in range(len(kept)))
            layer_gram = None if hidden else np.asarray(sum(grams))
            for n, expert in enumerate(kept):  # one expert's moments at a time: of all they would outgrow the layer
                fitted, guard, seen = _expert_moments(tokens, experts, n, hidden=hidden)
                mixed = mix_moments(fitted, seen, layer_gram)
                for projection in projections:
                    stack, role = getattr(experts, projection), f"ffn_{projection}_exps"
                    kind = packing.format_of(role, layer, expert)
                    rows, columns = stack[n].cpu().numpy(), importance[role, expert]
                    packed[f"{role}.{expert}"], values = pack_matrix(packing.target, rows, kind, columns, mixed, guard, pool)
                    stack[n].copy_(torch.from_numpy(values))

        store(PROJECTIONS[:2], hidden=False)
        fill_residual(tokens, experts, residual)
        refit_down(tokens, experts, residual)
        store(PROJECTIONS[2:], hidden=True)
    return packed, fill_residual(tokens, experts, residual)[1]


def _expert_moments(tokens: Tokens, experts: Experts, n: int, *, hidden: bool) -> tuple[Gram, Gram, int]:
    """Second moments of what a survivor's gate and up (or down) receive, times g^2 lambda: of fitted and guard tokens; how many fitted."""
    device = experts.down.device
    rows, slots = np.nonzero(tokens.chosen == n)

    def sums(block: slice) -> tuple[Gram, Gram]:
        mine = rows[block]
        x = torch.from_numpy(np.asarray(tokens.x[mine])).to(device)
        weights = torch.from_numpy(tokens.weights[mine] * tokens.gates[mine, slots[block]] ** 2).to(device)
        return second_moments(experts.hidden(n, x) if hidden else x, weights, torch.from_numpy(tokens.guard[mine]).to(device))

    size = experts.down.shape[2] if hidden else experts.down.shape[1]
    fitted, guard = np.zeros((size, size)), np.zeros((size, size))
    for first, second in map_ordered(sums, [slice(i, i + BLOCK) for i in range(0, len(rows), BLOCK)], device=device):
        fitted, guard = fitted + first, guard + second
    return fitted, guard, int((~tokens.guard[rows]).sum())


# ------------------------------------------------------------------------------------------------------------- other matrices
def pack_attention(
    packing: Packing, weights: Mapping[str, torch.Tensor], layer: int, roles: Sequence[str], sums: tuple[Sums, Sums]
) -> Packed:
    """Pack some of a loaded layer's matrices; the layer then computes with what the packed ones decode to.

    Args:
        packing: what to pack as.
        weights: the layer's parameters by role.
        layer: its number.
        roles: of the matrices.
        sums: of their inputs, fitted and guard.
    """
    importance, packed = importance_of(packing.model, packing.stats, layer), Packed()
    with open_pool() as pool:
        for role in roles:
            rows, kind = weights[role].cpu().numpy(), packing.format_of(role, layer)
            found, values = pack_matrix(packing.target, rows, kind, importance[role, -1], sums[0].gram, sums[1].gram, pool)
            packed[f"{role}.-1"] = found
            weights[role].copy_(torch.from_numpy(values))
    return packed


def pack_end(packing: Packing, role: str, weights: NDArray[np.float32], sums: tuple[Sums, Sums] | None) -> PackedRows:
    """Pack the output matrix, or the embedding (whose rows are looked up: no sums); also what it decodes to."""
    importance = importance_of(packing.model, packing.stats, -1).get((role, -1))
    grams = [side.gram for side in sums] if sums else [None, None]
    with open_pool() as pool:
        return pack_matrix(packing.target, weights, packing.format_of(role, -1), importance, grams[0], grams[1], pool)
