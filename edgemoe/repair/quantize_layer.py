"""This module packs the matrices of one layer in the plan's formats, each on the inputs that earlier rounding leaves it.

Every matrix is rounded with feedback (`quantize/gptq.py`).  The error is weighed by the Hessian of its inputs in the rounded stream, and by
the Hessian of the loss's gradients with respect to its outputs.  The order is embedding, then in each layer attention, gate and up, and
down, which is first refitted to the residual that rounding the others left.  Guard tokens decide for each matrix whether feedback is better
than the target's stock quantizer (docs/pricing.md, 12).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial, reduce
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

import edgemoe.quantize.kernels  # noqa: F401 - grids load it when they round; a build without numba should fail now, not after hours
from edgemoe.base.threads import count_cores, open_threads
from edgemoe.base.types import F32, F64
from edgemoe.ir import PROJECTIONS, Model, Plan, Stats
from edgemoe.quantize.gptq import Hessian, descend_outputs, factor_hessian, mix_hessians, shrink_hessian
from edgemoe.quantize.importance import importance_of
from edgemoe.repair.align import PairSums
from edgemoe.repair.experts import Experts, Tokens, fill_residual, one_thread, refit_down
from edgemoe.repair.router_gram import add_flips
from edgemoe.stream.gradients import load_gradients
from edgemoe.stream.passes import map_ordered
from edgemoe.targets import Target

BLOCK = 4096  # tokens of one piece of work
MOMENTS = 6  # square float64 matrices that an expert holds while it is packed
MOMENT_BYTES = 2**30  # bytes of these matrices, over all experts that are packed at the same time
FLIPS = 1.0  # the largest weight of flips: above it, the rest of the error costs more than the saved flips (docs/decisions/0012-outputs.md)
ROWS = 256  # rows of a matrix that are rounded together; the number is fixed, so that bytes do not depend on the number of cores
Gram = F64  # [C, C]
PackedRows = tuple[NDArray[np.uint8], F32]  # packed rows, and what they decode to
Packed = dict[str, NDArray[np.generic]]  # "role.expert" -> packed rows [rows, bytes], or what stays unrounded [rows, cols]


@dataclass(frozen=True, slots=True, kw_only=True)
class QuantizePlan:
    """What rounding needs beside the stream."""

    model: Model
    stats: Stats
    target: Target
    formats: Mapping[tuple[str, int, int], str]  # by (role, layer, expert); expert -1 for a matrix or a whole stack
    gradients: Path  # folder that `collect_gradients` left, of the same tokens
    flips: float = 0.0  # cost of the routing choices that an error flips, over the cost that the gradients give

    def format_of(self, role: str, layer: int, expert: int = -1) -> str:
        """The format of one matrix."""
        return self.formats[role, layer, expert if (role, layer, expert) in self.formats else -1]


def plan_quantization(model: Model, stats: Stats, plan: Plan, target: Target, gradients: Path) -> QuantizePlan:
    """The QuantizePlan of a plan: its formats, and the weight of flips from its prediction."""
    units = target.list_units(model)
    formats: dict[tuple[str, int, int], str] = {}
    for unit in units:
        for role in [f"ffn_{p}_exps" for p in PROJECTIONS] if unit.expert >= 0 else [unit.role]:
            if unit.name in plan.formats:
                formats[role, unit.layer, unit.expert] = plan.formats[unit.name]
    q = float(stats.weights @ np.array([plan.domain_q.get(d.name, 0.0) for d in stats.domains]))
    flips = min(max(plan.predicted_kl - q, 0.0) / (2 * q), FLIPS) if q > 0 else 0.0  # KL = q + kappa sqrt(q), its slope less one
    return QuantizePlan(model=model, stats=stats, target=target, formats=formats, gradients=gradients, flips=flips)


# ----------------------------------------------------------------------------------------------------------------- a matrix
@dataclass(frozen=True, slots=True, kw_only=True)
class ErrorMetric:
    """What an error of a matrix costs: tr G D H D', with H of its inputs and G of the gradients with respect to its outputs."""

    inputs: Hessian  # H [C, C] over the tokens that are fitted to
    guard: Gram  # H over those that decide
    outputs: Gram | None = None  # G [R, R]; None stands for the identity: every output counts the same

    def loss(self, delta: F32) -> float:
        """The cost of an error [R, C] on the guard tokens, in some unit."""
        weighted = delta if self.outputs is None else self.outputs.astype(np.float32) @ delta
        return float(((weighted @ self.guard.astype(np.float32)) * delta).sum(dtype=np.float64))


def quantize_matrix(
    target: Target,
    weights: F32,
    kind: str,
    importance: F32 | None,
    metric: ErrorMetric | None,
    pool: ThreadPoolExecutor,
) -> PackedRows:
    """Pack a matrix by the stock quantizer or by feedback, whichever has the smaller error on the guard tokens.

    Args:
        target: whose formats.
        weights: [R, C].
        kind: the format.
        importance: of the columns, for the stock quantizer.
        metric: for feedback; None leaves it out.
        pool: rows are shared out over its threads.

    Returns:
        Packed rows, and what they decode to [R, C].
    """
    blocks = [np.ascontiguousarray(weights[i : i + ROWS]) for i in range(0, len(weights), ROWS)]

    def pack(hessian: Hessian | None) -> PackedRows:
        packed = np.concatenate(list(pool.map(lambda rows: target.pack_rows(rows, kind, importance, hessian), blocks)))
        return packed, target.unpack_rows(packed, kind, weights.shape[1])

    stock = pack(None)
    if metric is None or not target.feeds_back(kind):
        return stock
    ours = pack(metric.inputs)
    if metric.outputs is not None:
        packed, values = ours
        outputs = factor_hessian(metric.outputs).h
        descend_outputs(
            weights, packed, values, metric.inputs, outputs, lambda rows, q, slope: target.descend_rows(rows, kind, q, metric.inputs, slope)
        )
        ours = packed, target.unpack_rows(packed, kind, weights.shape[1])
    return min((stock, ours), key=lambda found: metric.loss(found[1] - weights))


# ---------------------------------------------------------------------------------------------------------------- the experts
def quantize_experts(
    quantize_plan: QuantizePlan, layer: int, tokens: Tokens, experts: Experts, residual: F32, kept: Sequence[int], routers: Gram
) -> tuple[Packed, float]:
    """Pack a layer's survivors, set their weights to the decoded values, and update the residual.

    Gate and up are packed first; then W_down is refitted to them in closed form and packed.  `routers` [H, H] is the RouterGram of the
    layers behind this one.

    Returns:
        The packed matrices, and the guard tokens' weighted mean square residual at the end.
    """
    importance = importance_of(quantize_plan.model, quantize_plan.stats, layer)
    packed = Packed()

    def store(n: int, projections: Sequence[str], layer_gram: Gram | None) -> Packed:
        metrics = expert_metrics(tokens, experts, n, hidden=len(projections) == 1, layer_gram=layer_gram)
        if layer_gram is None and metrics[0].outputs is not None:
            metrics = [replace(metrics[0], outputs=add_flips(metrics[0].outputs, routers, quantize_plan.flips))]
        found = Packed()
        for projection, metric in zip(projections, metrics, strict=True):
            stack, role = getattr(experts, projection), f"ffn_{projection}_exps"
            kind = quantize_plan.format_of(role, layer, kept[n])
            rows, columns = stack[n].cpu().numpy(), importance[role, kept[n]]
            found[f"{role}.{kept[n]}"], values = quantize_matrix(quantize_plan.target, rows, kind, columns, metric, pool)
            stack[n].copy_(torch.from_numpy(values))
        return found

    with open_threads() as pool, one_thread(), ThreadPoolExecutor(_at_once(experts)) as outer:
        for found in outer.map(partial(store, projections=PROJECTIONS[:2], layer_gram=sum_grams(tokens, experts)), range(len(kept))):
            packed.update(found)
        fill_residual(tokens, experts, residual)
        refit_down(tokens, experts, residual)
        for found in outer.map(partial(store, projections=PROJECTIONS[2:], layer_gram=None), range(len(kept))):
            packed.update(found)
    return packed, fill_residual(tokens, experts, residual)[1]


def _at_once(experts: Experts) -> int:
    """How many experts to pack at the same time: the Hessians of all of them would be larger than the layer."""
    return min(count_cores(), max(1, MOMENT_BYTES // (MOMENTS * 8 * max(experts.down.shape[1:]) ** 2)))


def expert_metrics(tokens: Tokens, experts: Experts, n: int, *, hidden: bool, layer_gram: Gram | None = None) -> list[ErrorMetric]:
    """The metrics of a survivor's gate and up, or of its down (`hidden`); H weighs inputs by the squared gradient, G all gradients alike.

    Args:
        tokens: what the layer's experts see, with gradients.
        experts: the survivors.
        n: position of the survivor.
        hidden: the metric of W_down, whose inputs are the hidden activations.
        layer_gram: Hessian of all survivors' inputs, which is mixed in for survivors that few tokens choose.
    """
    rows, slots = np.nonzero(tokens.chosen == n)
    _, outer, size = experts.down.shape if hidden else experts.up.shape

    def sums(block: slice) -> list[Gram]:
        x, given, guard = _seen(tokens, experts, rows[block], slots[block])
        h, *inner = experts.hidden_gradients(n, x, given)
        if hidden:
            output = [_gram(given, h.square().sum(dim=1) * ~guard)]
            return [_gram(h, given.square().sum(dim=1) * side) for side in (~guard, guard)] + output
        weights = sum(g.square().sum(dim=1) for g in inner)
        return [_gram(x, weights * side) for side in (~guard, guard)] + [_gram(g, ~guard) for g in inner]

    empty = [np.zeros((size, size))] * 2 + [np.zeros((outer, outer))] * (1 if hidden else 2)
    fitted, guard, *outputs = _add_blocks(sums, len(rows), experts, empty)
    seen = int((~tokens.guard[rows]).sum())
    inputs = factor_hessian(mix_hessians(fitted, seen, layer_gram))
    return [ErrorMetric(inputs=inputs, guard=guard, outputs=shrink_hessian(one, seen)) for one in outputs]


def sum_grams(tokens: Tokens, experts: Experts) -> Gram:
    """Hessian of the inputs of gate and up of all survivors, weighted as in `expert_metrics`, over the fitted tokens."""
    total = np.zeros((experts.down.shape[1],) * 2)
    for n in range(len(experts)):
        rows, slots = np.nonzero(tokens.chosen == n)

        def sums(block: slice, n: int = n, rows: NDArray[np.int64] = rows, slots: NDArray[np.int64] = slots) -> list[Gram]:
            x, given, guard = _seen(tokens, experts, rows[block], slots[block])
            _, *inner = experts.hidden_gradients(n, x, given)
            return [_gram(x, sum(g.square().sum(dim=1) for g in inner) * ~guard)]

        total = _add_blocks(sums, len(rows), experts, [total])[0]
    return total


def _seen(tokens: Tokens, experts: Experts, rows: NDArray[np.int64], slots: NDArray[np.int64]) -> tuple[torch.Tensor, ...]:
    """Inputs of an expert and gradients for its outputs on some tokens, both [n, H], and which of these are guard tokens."""
    assert tokens.gradients is not None
    given = np.asarray(tokens.gradients[rows]) * tokens.gates[rows, slots][:, None]
    seen = (np.asarray(tokens.x[rows]), given, tokens.guard[rows])
    return tuple(torch.from_numpy(part).to(experts.down.device) for part in seen)


def _add_blocks(sums: Callable[[slice], list[Gram]], n: int, experts: Experts, start: list[Gram]) -> list[Gram]:
    """Sums over n tokens, a block at a time."""
    parts = map_ordered(sums, [slice(i, i + BLOCK) for i in range(0, n, BLOCK)], device=experts.down.device)
    return reduce(lambda a, b: [x + y for x, y in zip(a, b, strict=True)], parts, start)


def _gram(x: torch.Tensor, weights: torch.Tensor) -> Gram:
    """sum_t w_t x_t x_t'."""
    return ((x * weights[:, None]).T @ x).double().cpu().numpy()


# ------------------------------------------------------------------------------------------------------------- other matrices
def quantize_matrices(
    quantize_plan: QuantizePlan, weights: Mapping[str, torch.Tensor], layer: int, sums: tuple[PairSums, PairSums], routers: Gram | None
) -> Packed:
    """Quantize matrices of a loaded layer that read the same activation; the layer then computes with the decoded values.

    Args:
        quantize_plan: the formats.
        weights: parameters of the layer by role, changed in place.
        layer: its number.
        sums: of the inputs, over fitted and over guard tokens.
        routers: for matrices that write the stream, the sum over the routers that read it [H, H] (RouterGram); None for other matrices.
    """
    importance, packed = importance_of(quantize_plan.model, quantize_plan.stats, layer), Packed()
    gradients, guard = load_gradients(quantize_plan.gradients, layer), sums[1].gram
    inputs = factor_hessian(sums[0].gram)
    with open_threads() as pool:
        for role, view in weights.items():
            rows, kind = view.cpu().numpy(), quantize_plan.format_of(role, layer)
            outputs = gradients[role] if routers is None else add_flips(gradients[role], routers, quantize_plan.flips)
            metric = ErrorMetric(inputs=inputs, guard=guard, outputs=outputs)
            found, values = quantize_matrix(quantize_plan.target, rows, kind, importance[role, -1], metric, pool)
            packed[f"{role}.-1"] = found
            view.copy_(torch.from_numpy(values))
    return packed
