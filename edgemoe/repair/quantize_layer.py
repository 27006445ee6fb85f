"""This module packs the matrices of one layer in the plan's formats, each on the inputs that the changed stream brings it.

Every matrix is packed by the target's stock quantizer, and a second time with feedback (`quantize/gptq.py`) if the format allows it.  Guard
tokens decide which of the two is kept.  A tied embedding is packed by the stock quantizer alone.  Feedback weighs errors by the Hessian of
the matrix's inputs, and by the Hessian of the loss's gradients with respect to its outputs.

The embedding is packed first.  In each layer attention follows, then gate and up of the routed experts, then their down.  The output matrix
is packed at last.  `quantize_steps.py` refits matrices before it calls this module.  Only W_down of the routed experts is refitted here, to
the residual that rounding gate and up left (docs/pricing.md, 12).
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

TOKENS_AT_ONCE = 4096  # tokens of one piece of work
GRAMS = 6  # square float64 matrices that an expert holds while it is packed
GRAM_BYTES = 2**30  # bytes of these matrices, over all experts that are packed at the same time
# The largest flip_weight: above it, the rest of the error costs more than the saved flips (docs/decisions/0012-outputs.md).
MOST_FLIP_WEIGHT = 1.0
ROWS = 256  # rows of a matrix that are rounded together; the number is fixed, so that bytes do not depend on the number of cores
Gram = F64  # [C, C] sum of x x' over tokens, with weights; `Hessian` is such a sum, damped and factored
PackedAndDecoded = tuple[NDArray[np.uint8], F32]  # packed rows [R, bytes], and what they decode to [R, C]
Packed = dict[str, NDArray[np.generic]]  # "role.expert" -> packed rows [rows, bytes], or what stays unrounded [rows, cols]


@dataclass(frozen=True, slots=True, kw_only=True)
class QuantizePlan:
    """What rounding needs beside the stream: formats and the weight of flips from a Plan, and model, statistics, target and gradients."""

    model: Model
    stats: Stats
    target: Target
    formats: Mapping[tuple[str, int, int], str]  # by (role, layer, expert); expert -1 for a matrix or a whole stack
    gradients: Path  # folder that `collect_gradients` left, of the same tokens
    flip_weight: float = 0.0  # cost of the routing choices that an error flips, over the cost that the gradients give

    def format_of(self, role: str, layer: int, expert: int = -1) -> str:
        """The format of one matrix."""
        return self.formats[role, layer, expert if (role, layer, expert) in self.formats else -1]


def plan_quantization(model: Model, stats: Stats, plan: Plan, target: Target, gradients: Path) -> QuantizePlan:
    """The QuantizePlan of a Plan: its formats, and the weight of flips from its prediction."""
    units = target.list_units(model)
    formats: dict[tuple[str, int, int], str] = {}
    for unit in units:
        for role in [f"ffn_{p}_exps" for p in PROJECTIONS] if unit.expert >= 0 else [unit.role]:
            if unit.name in plan.formats:
                formats[role, unit.layer, unit.expert] = plan.formats[unit.name]
    q = float(stats.weights @ np.array([plan.domain_q.get(d.name, 0.0) for d in stats.domains]))
    # With KL = q + kappa sqrt(q), the derivative is 1 + kappa / (2 sqrt(q)).  The 1 is in the gradients; the weight is the rest,
    # (KL - q) / (2 q).
    flip_weight = min(max(plan.predicted_kl - q, 0.0) / (2 * q), MOST_FLIP_WEIGHT) if q > 0 else 0.0
    return QuantizePlan(model=model, stats=stats, target=target, formats=formats, gradients=gradients, flip_weight=flip_weight)


# ----------------------------------------------------------------------------------------------------------------- a matrix
@dataclass(frozen=True, slots=True, kw_only=True)
class ErrorMetric:
    """What storing a matrix W as Q costs: tr G D H D', with the error D = Q - W [R, C].

    H [C, C] holds the second moments of the matrix's inputs.  G [R, R] holds those of the loss's gradients with respect to its outputs.
    """

    inputs: Hessian  # H over the tokens that are fitted to
    guard: Gram  # H over the guard tokens
    outputs: Gram | None = None  # G; None stands for the identity: every output counts the same

    def guard_error(self, delta: F32) -> float:
        """The cost of an error D on the guard tokens, in some unit."""
        weighted = delta if self.outputs is None else self.outputs.astype(np.float32) @ delta
        return float(((weighted @ self.guard.astype(np.float32)) * delta).sum(dtype=np.float64))


def quantize_matrix(
    target: Target,
    weights: F32,
    kind: str,
    importance: F32 | None,
    metric: ErrorMetric | None,
    pool: ThreadPoolExecutor,
) -> PackedAndDecoded:
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
    pieces = [np.ascontiguousarray(weights[i : i + ROWS]) for i in range(0, len(weights), ROWS)]

    def pack(hessian: Hessian | None) -> PackedAndDecoded:
        packed = np.concatenate(list(pool.map(lambda rows: target.pack_rows(rows, kind, importance, hessian), pieces)))
        return packed, target.unpack_rows(packed, kind, weights.shape[1])

    stock = pack(None)
    if metric is None or not target.feeds_back(kind):
        return stock
    fed_back = pack(metric.inputs)
    if metric.outputs is not None:
        packed, values = fed_back
        outputs = factor_hessian(metric.outputs).h  # for the damping alone; its factor is not used
        descend_outputs(
            weights, packed, values, metric.inputs, outputs, lambda rows, q, slope: target.descend_rows(rows, kind, q, metric.inputs, slope)
        )
        fed_back = packed, target.unpack_rows(packed, kind, weights.shape[1])
    return min((stock, fed_back), key=lambda found: metric.guard_error(found[1] - weights))


# ---------------------------------------------------------------------------------------------------------------- the experts
def quantize_experts(
    quantize_plan: QuantizePlan, layer: int, tokens: Tokens, experts: Experts, residual: F32, kept: Sequence[int], routers: Gram | None
) -> tuple[Packed, float]:
    """Pack a layer's survivors, set their weights to the decoded values, and update the residual.

    Gate and up are packed first.  Then W_down is refitted in closed form to the residual that they leave, and packed.  `routers` [H, H] is
    the sum of R'R over the routers of all later layers (`RouterGram.from_layer`); it counts with gradients alone.

    Returns:
        The packed matrices, and the guard tokens' weighted mean square residual at the end.
    """
    importance = importance_of(quantize_plan.model, quantize_plan.stats, layer)
    packed = Packed()

    def pack_projections(n: int, projections: Sequence[str], layer_gram: Gram | None) -> Packed:
        down = "down" in projections
        metrics = expert_metrics(tokens, experts, n, hidden=down, layer_gram=layer_gram)
        if (
            down and metrics[0].outputs is not None and routers is not None
        ):  # only W_down writes to the stream, and errors of the stream flip choices of routers
            metrics = [replace(metrics[0], outputs=add_flips(metrics[0].outputs, routers, quantize_plan.flip_weight))]
        found = Packed()
        for projection, metric in zip(projections, metrics, strict=True):
            stack, role = getattr(experts, projection), f"ffn_{projection}_exps"
            kind = quantize_plan.format_of(role, layer, kept[n])
            rows, columns = stack[n].cpu().numpy(), importance[role, kept[n]]
            found[f"{role}.{kept[n]}"], values = quantize_matrix(quantize_plan.target, rows, kind, columns, metric, pool)
            stack[n].copy_(torch.from_numpy(values))
        return found

    with open_threads() as pool, one_thread(), ThreadPoolExecutor(_at_once(experts)) as per_expert:
        gate_and_up = partial(pack_projections, projections=PROJECTIONS[:2], layer_gram=sum_grams(tokens, experts))
        for found in per_expert.map(gate_and_up, range(len(kept))):
            packed.update(found)
        fill_residual(tokens, experts, residual)
        refit_down(tokens, experts, residual)
        for found in per_expert.map(partial(pack_projections, projections=PROJECTIONS[2:], layer_gram=None), range(len(kept))):
            packed.update(found)
    return packed, fill_residual(tokens, experts, residual)[1]


def _at_once(experts: Experts) -> int:
    """How many experts to pack at the same time: the Hessians of all of them would be larger than the layer."""
    return min(count_cores(), max(1, GRAM_BYTES // (GRAMS * 8 * max(experts.down.shape[1:]) ** 2)))


def expert_metrics(tokens: Tokens, experts: Experts, n: int, *, hidden: bool, layer_gram: Gram | None = None) -> list[ErrorMetric]:
    """The metrics of a survivor's gate and up, or of its down (`hidden`).

    H counts each token by its squared gradient.  G counts tokens alike for gate and up; for down it counts each token by the square of its
    hidden activations.  The gradients hold the token's weight and its gate already.  Without gradients, H counts each token by its weight
    and squared gate, and there is no G.

    Args:
        tokens: what the layer's experts see, with gradients.
        experts: the survivors.
        n: position of the survivor.
        hidden: the metric of W_down, whose inputs are the hidden activations.
        layer_gram: H of all survivors' inputs (`sum_grams`), which is mixed in for survivors that few tokens choose.
    """
    rows, slots = np.nonzero(tokens.chosen == n)
    _, n_outputs, n_inputs = experts.down.shape if hidden else experts.up.shape
    if tokens.gradients is None:
        return _plain_metrics(tokens, experts, n, hidden=hidden, layer_gram=layer_gram)

    def sums(piece: slice) -> list[Gram]:
        x, out_gradients, guard = _inputs_and_gradients(tokens, experts, rows[piece], slots[piece])
        h, *inner = experts.hidden_gradients(n, x, out_gradients)
        if hidden:
            output = [_gram(out_gradients, h.square().sum(dim=1) * ~guard)]
            return [_gram(h, out_gradients.square().sum(dim=1) * side) for side in (~guard, guard)] + output
        weights = sum(g.square().sum(dim=1) for g in inner)
        return [_gram(x, weights * side) for side in (~guard, guard)] + [_gram(g, ~guard) for g in inner]

    empty = [np.zeros((n_inputs, n_inputs))] * 2 + [np.zeros((n_outputs, n_outputs))] * (1 if hidden else 2)
    fitted, guard, *outputs = _add_pieces(sums, len(rows), experts, empty)
    n_fitted = int((~tokens.guard[rows]).sum())
    inputs = factor_hessian(mix_hessians(fitted, n_fitted, layer_gram))
    return [ErrorMetric(inputs=inputs, guard=guard, outputs=shrink_hessian(one, n_fitted)) for one in outputs]


def _plain_metrics(tokens: Tokens, experts: Experts, n: int, *, hidden: bool, layer_gram: Gram | None) -> list[ErrorMetric]:
    """`expert_metrics` without gradients."""
    rows, slots = np.nonzero(tokens.chosen == n)
    cols = experts.down.shape[2 if hidden else 1]

    def sums(piece: slice) -> list[Gram]:
        x, weights, guard = _inputs_and_weights(tokens, rows[piece], slots[piece])
        values = experts.hidden(n, x) if hidden else x
        return [_gram(values, weights * side) for side in (~guard, guard)]

    fitted, guard = _add_pieces(sums, len(rows), experts, [np.zeros((cols, cols))] * 2)
    inputs = factor_hessian(mix_hessians(fitted, int((~tokens.guard[rows]).sum()), layer_gram))
    return [ErrorMetric(inputs=inputs, guard=guard)] * (1 if hidden else 2)


def _inputs_and_weights(tokens: Tokens, rows: NDArray[np.int64], slots: NDArray[np.int64]) -> tuple[torch.Tensor, ...]:
    """Inputs of an expert [n, H], the tokens' weights times their squared gates [n], and which of these are guard tokens."""
    weights = tokens.weights[rows] * tokens.gates[rows, slots] ** 2
    return torch.from_numpy(np.asarray(tokens.x[rows])), torch.from_numpy(weights), torch.from_numpy(tokens.guard[rows])


def sum_grams(tokens: Tokens, experts: Experts) -> Gram:
    """H of the inputs of gate and up over all survivors, weighted as in `expert_metrics`, over the fitted tokens."""
    total = np.zeros((experts.down.shape[1],) * 2)
    for n in range(len(experts)):
        rows, slots = np.nonzero(tokens.chosen == n)

        def sums(piece: slice, n: int = n, rows: NDArray[np.int64] = rows, slots: NDArray[np.int64] = slots) -> list[Gram]:
            if tokens.gradients is None:
                x, weights, guard = _inputs_and_weights(tokens, rows[piece], slots[piece])
                return [_gram(x, weights * ~guard)]
            x, out_gradients, guard = _inputs_and_gradients(tokens, experts, rows[piece], slots[piece])
            _, *inner = experts.hidden_gradients(n, x, out_gradients)
            return [_gram(x, sum(g.square().sum(dim=1) for g in inner) * ~guard)]

        total = _add_pieces(sums, len(rows), experts, [total])[0]
    return total


def _inputs_and_gradients(tokens: Tokens, experts: Experts, rows: NDArray[np.int64], slots: NDArray[np.int64]) -> tuple[torch.Tensor, ...]:
    """Inputs of an expert and gradients for its outputs on some tokens, both [n, H], and which of these are guard tokens."""
    assert tokens.gradients is not None
    out_gradients = np.asarray(tokens.gradients[rows]) * tokens.gates[rows, slots][:, None]
    parts = (np.asarray(tokens.x[rows]), out_gradients, tokens.guard[rows])
    return tuple(torch.from_numpy(part).to(experts.down.device) for part in parts)


def _add_pieces(sums: Callable[[slice], list[Gram]], n: int, experts: Experts, start: list[Gram]) -> list[Gram]:
    """Sums over n tokens, a piece at a time."""
    pieces = [slice(i, i + TOKENS_AT_ONCE) for i in range(0, n, TOKENS_AT_ONCE)]
    parts = map_ordered(sums, pieces, device=experts.down.device)
    return reduce(lambda a, b: [x + y for x, y in zip(a, b, strict=True)], parts, start)


def _gram(x: torch.Tensor, weights: torch.Tensor) -> Gram:
    """sum_t w_t x_t x_t'."""
    return ((x * weights[:, None]).T @ x).double().cpu().numpy()


# ------------------------------------------------------------------------------------------------------------- other matrices
def quantize_matrices(
    quantize_plan: QuantizePlan, weights: Mapping[str, torch.Tensor], layer: int, sums: tuple[PairSums, PairSums], routers: Gram | None
) -> Packed:
    """Pack matrices of a loaded layer that read the same activation; the layer then computes with the decoded values.

    Args:
        quantize_plan: the formats.
        weights: parameters of the layer by role, changed in place.
        layer: its number.
        sums: of the inputs, over fitted and over guard tokens.
        routers: for matrices that write the stream, the sum of R'R over the routers behind them [H, H] (`RouterGram.from_layer`); None for
            other matrices.
    """
    importance, packed = importance_of(quantize_plan.model, quantize_plan.stats, layer), Packed()
    gradients, guard = load_gradients(quantize_plan.gradients, layer), sums[1].gram
    inputs = factor_hessian(sums[0].gram)
    with open_threads() as pool:
        for role, view in weights.items():
            rows, kind = view.cpu().numpy(), quantize_plan.format_of(role, layer)
            outputs = gradients[role] if routers is None else add_flips(gradients[role], routers, quantize_plan.flip_weight)
            metric = ErrorMetric(inputs=inputs, guard=guard, outputs=outputs)
            found, values = quantize_matrix(quantize_plan.target, rows, kind, importance[role, -1], metric, pool)
            packed[f"{role}.-1"] = found
            view.copy_(torch.from_numpy(values))
    return packed
