"""This module prices one MoE layer from its statistics and weights: kept sets, and each tensor in each format (docs/pricing.md, 3 and 4).

The error of a format is a mean squared error of the output on tokens that calibration saw.  The target's own quantizer rounds sampled rows,
and the inputs are rounded as its kernels round them.  A slope turns the error into nats: the KL of the rounding probe over the error of the
probe's rounding.
"""

from __future__ import annotations

from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from edgemoe.base.types import F32, F64
from edgemoe.ir import PROJECTIONS, Model, Probe, Stats, Tensor, Unit
from edgemoe.model.checkpoint import read_tensor
from edgemoe.model.routing.flips import additive_part
from edgemoe.model.routing.kept_sets import (
    SHRINK_TOKENS,
    Menu,
    Replay,
    build_menu,
    make_replay,
    offered_counts,
    original_gates,
    set_loss,
    soft_gates,
)
from edgemoe.price.matrices import (
    LEAST_ROWS,
    SAMPLE_WEIGHTS,
    ByCause,
    ErrorsByFormat,
    Importance,
    draw_normal,
    formats_too_small,
    probe_kl,
    round_sampled,
    sample_rows,
)
from edgemoe.quantize.importance import importance_of
from edgemoe.quantize.reference import EXPERT_BITS, round_to_int8
from edgemoe.targets import Target

LEAST_ROWS_ALONE = 32  # rows of an expert that is stored, and so priced, on its own: prices then scatter by 7 % (docs/pricing.md, 11)
TOKENS_PER_EXPERT = 128
RISE = 0.01  # by which prices of drops rise along a path beyond the measured ones: enough to order equal prices, too little to matter


@dataclass(frozen=True, slots=True, kw_only=True)
class Layer:
    """One priced MoE layer (D domains, C kept counts, E experts, G experts that the greedy path dropped)."""

    menu: Menu
    drops: list[tuple[float, F64]]  # loss and KL [D] of each dropping probe, by rising loss
    energy: F64  # [E] sum of g^2 |f|^2 over the routed tokens
    use: F64  # [E] mean g^2, by tokens' sensitivity where experts are priced one by one
    errors: ByCause[dict[str, dict[str, F64]]]  # role -> format -> [E] mean squared output error per use
    slope: dict[str, float]  # role -> nats per error
    stored: dict[tuple[str, int], tuple[str, ...]]  # formats of each unit of experts, by role and expert

    def whole(self, role: str, bits: int) -> float:
        """Nats of a stack's part in the probe of the whole model at these bits, if nats grew with the error alone."""
        return self.slope[role] * float(self.use @ self.errors.weights[role][f"whole{bits}"])

    def price(self, unit: Unit, additive_factors: Mapping[str, float]) -> ByCause[dict[str, F64]]:
        """Nats of a stack for each kept count [C], or of a single expert with all of its matrices [1], by format.

        `additive_factors`, by role, turn prices that grow with the error alone into prices that add up (`_split_flips` in choices.py).
        """
        slope = {role: value * additive_factors[role] for role, value in self.slope.items()}
        formats = self.stored[unit.role, unit.expert]

        @np.errstate(invalid="ignore")  # infinity times no use
        def nats(errors: dict[str, dict[str, F64]]) -> dict[str, F64]:
            if unit.expert < 0:
                return {f: slope[unit.role] * (self.menu.gate_sq @ errors[unit.role][f]) for f in formats}
            use = float(self.use[unit.expert])
            return {f: np.array([sum(slope[r] * use * e[f][unit.expert] for r, e in errors.items())]) for f in formats}

        return ByCause(weights=nats(self.errors.weights), inputs=nats(self.errors.inputs))

    def price_drops(self, weights: F64, kappa: float) -> Drops:
        """Price the menu's sets, those of the greedy path, and single experts.

        An expert's own price is the cost of its step on the greedy path.  It is at least the dearest price before it on the path, and rises
        a little, so that the path's order is kept.  Experts that the path never dropped cost as much as the last dropped one, or more in
        proportion to their energy.  `weights` are those of the domains [D]; `kappa` is as in `price_losses`.
        """
        menu, n = self.menu, self.menu.kept.shape[1]
        path = price_losses(self.drops, weights, menu.path, kappa)
        steps = np.maximum.accumulate(np.maximum(np.diff(path, axis=1), 0.0), axis=1)  # no step is cheaper than an earlier one
        steps = steps * np.linspace(1.0, 1.0 + RISE, steps.shape[1])
        experts = np.tile((1.0 + RISE) * steps.max(axis=1, initial=0.0)[:, None], (1, n))
        experts *= np.maximum(self.energy / max(float(self.energy[menu.order].max(initial=0.0)), 1e-300), 1.0)
        experts[:, menu.order] = steps
        curve = path - np.concatenate([np.zeros((len(weights), 1)), np.cumsum(steps, axis=1)], axis=1)
        curve = np.concatenate([curve, np.repeat(curve[:, -1:], n + 1 - curve.shape[1], axis=1)], axis=1)  # fewer than top-k never stay
        return Drops(menu=price_losses(self.drops, weights, menu.loss, kappa), experts=experts, curve=curve)


@dataclass(frozen=True, slots=True, kw_only=True)
class Drops:
    """What dropping experts of one layer costs, in nats by domain."""

    menu: F64  # [D, C] the menu's sets
    experts: F64  # [D, E] single experts, additive
    curve: F64  # [D, E + 1] what the greedy path costs beyond the sum of its experts' own prices when k are gone


def price_layer(
    model: Model,
    stats: Stats,
    target: Target,
    layer: int,
    units: list[Unit],
    probes: Mapping[tuple[str, int], Probe],
    pool: ThreadPoolExecutor,
) -> Layer:
    """Price one MoE layer: every format of its experts, and every kept set.

    Args:
        model: from `inspect_model`.
        stats: from `collect_stats`.
        target: whose quantizers and kernels count.
        layer: its number.
        units: of experts or their stacks, in this layer.
        probes: the rounding probes by (role, layer).
        pool: shares out the experts.
    """
    arrays = stats.arrays(layer)
    replay = make_replay(arrays, stats.weights, model.router)
    menu = build_menu(replay, offered_counts(model.n_experts, model.router))
    stored = {(u.role, u.expert): target.offered_formats(model, u) for u in units}
    use, weights = menu.gate_sq[-1], soft_gates(replay) ** 2 * replay.shares[:, None]
    if units[0].expert >= 0:  # one by one: which tokens an expert serves tells it from the others
        use, weights = weigh_experts(replay, arrays, stats.weights, stats.arrays(-1)["replay_fisher"].astype(np.float64))
    sample = _Sample(model, target, arrays["replay_x"].astype(np.float32), weights, importance_of(model, stats, layer), stored)
    tensors = model.of_layer(layer)
    if model.expert.activation == "silu":
        jobs = [pool.submit(_expert_errors, sample, {p: tensors[f"ffn_{p}_exps", e] for p in PROJECTIONS}) for e in range(model.n_experts)]
    else:
        roles = [unit.role for unit in units]
        jobs = [pool.submit(_product_errors, sample, {role: tensors[role, e] for role in roles}) for e in range(model.n_experts)]
    found = [job.result() for job in jobs]
    errors = ByCause(weights=_by_role([e.weights for e in found]), inputs=_by_role([e.inputs for e in found]))
    slope = {}
    for role, by_format in errors.weights.items():
        error = float(use @ by_format["probe"])
        slope[role] = probe_kl(stats, probes[role, layer]) / max(error, 1e-30)
    energy = arrays["energy"].astype(np.float64).sum(axis=0)
    drops = dropped_points(stats, layer, replay, model.n_experts)
    return Layer(menu=menu, drops=drops, energy=energy, use=use, errors=errors, slope=slope, stored=stored)


def _by_role(experts: list[dict[str, ErrorsByFormat]]) -> dict[str, dict[str, F64]]:
    """Errors of experts one after the other -> role -> format -> [E]."""
    return {role: {f: np.array([e[role][f] for e in experts]) for f in by_format} for role, by_format in experts[0].items()}


def dropped_points(stats: Stats, layer: int, replay: Replay, n_experts: int) -> list[tuple[float, F64]]:
    """Loss, and KL by domain [D], of each probe that dropped experts in this layer, by rising loss."""
    points = []
    for probe in stats.probes:
        if probe.kind == "drop" and probe.layer == layer:
            kept = np.zeros(n_experts, bool)
            kept[list(probe.kept)] = True
            points.append((set_loss(replay, kept)[0], np.array(probe.kl)))
    return sorted((p for p in points if p[0] > 0), key=lambda p: p[0])


def price_losses(points: list[tuple[float, F64]], weights: F64, losses: F64, kappa: float) -> F64:
    """Nats by domain [D, ...] of kept sets with these losses: the loss times a slope that is interpolated between the probed losses.

    `kappa` is as in `additive_part`.  The result is zero if nothing was probed.
    """
    if not points:
        return np.zeros((len(weights), *losses.shape))
    known = [loss for loss, _ in points]
    means = [float(weights @ kl) for _, kl in points]
    additive_factors = [float(additive_part(mean, kappa)) / max(mean, 1e-300) for mean in means]
    slopes = np.array([kl / loss * factor for (loss, kl), factor in zip(points, additive_factors, strict=True)])  # [probes, D]
    return np.stack([np.interp(losses, known, slope) * losses for slope in slopes.T])


# ---------------------------------------------------------------------------------------------------------------- experts
@dataclass(frozen=True, slots=True)
class _Sample:
    """What the errors of a layer's experts are measured with."""

    model: Model
    target: Target
    x: F32  # [N, H] inputs of replay tokens
    weights: F64  # [N, E] how much each of them counts for each expert
    importance: Importance
    stored: dict[tuple[str, int], tuple[str, ...]]

    def formats(self, role: str, expert: int) -> tuple[str, ...]:
        """Formats that one projection of an expert may get: its stack's, or its own."""
        return self.stored[role, -1] if (role, -1) in self.stored else self.stored["ffn_exps", expert]


def weigh_experts(replay: Replay, arrays: Mapping[str, NDArray[np.generic]], domains: F64, sensitivity: F64) -> tuple[F64, F64]:
    """Weights of each expert's errors, and of each replay token in them, by the tokens' sensitivity.

    Args:
        replay: of the layer.
        arrays: of Stats, of the layer.
        domains: weight of each domain [D].
        sensitivity: of the replay tokens [N]: KL per squared change (`fisher_of_states`), in any unit.

    Returns:
        Use [E]: mean g^2 over all calibration tokens, times the sensitivity of the expert's replay tokens over that of all tokens.  This
        ratio is shrunk to 1 by SHRINK_TOKENS, because the tokens are few and very unequal.  And weights [N, E] of the tokens; a token that
        did not choose an expert counts by its probability, so that no expert is unseen.
    """
    relative = sensitivity / max(float(replay.shares @ sensitivity), 1e-300)
    gates, share = soft_gates(replay).copy(), domains / np.maximum(arrays["tokens"].astype(np.float64), 1.0)
    own = original_gates(replay)
    np.put_along_axis(gates, replay.candidates, np.where(own > 0, own, np.take_along_axis(gates, replay.candidates, axis=1)), axis=1)
    chosen = np.zeros(gates.shape)
    np.put_along_axis(chosen, replay.candidates, (own > 0).astype(np.float64), axis=1)
    seen = chosen * gates**2 * replay.shares[:, None]
    prior = SHRINK_TOKENS * seen.sum() / max(np.count_nonzero(seen), 1)
    use = share @ arrays["gate_sq"].astype(np.float64) * (relative @ seen + prior) / (seen.sum(axis=0) + prior)
    return use, gates**2 * (replay.shares * relative)[:, None]


@np.errstate(over="ignore", invalid="ignore")  # a format that cannot hold a weight gives infinity, and is then not offered
def _expert_errors(sample: _Sample, tensors: dict[str, Tensor]) -> ByCause[dict[str, ErrorsByFormat]]:
    """Mean squared output error per use of one expert, by projection and format, on tokens drawn by how much they count.

    With h = silu(W_gate x) * (W_up x) and f = W_down h, an error dh_j of a hidden channel adds dh_j^2 |w_j|^2, w_j a column of W_down.
    Errors of different rows are independent, so sampled rows stand for all.  Rounded inputs give all rows the same errors, so their part is
    computed on all rows.
    """
    expert = tensors["gate"].expert
    tokens, weight = _draw_tokens(sample.weights[:, expert])
    inputs = sample.x[tokens]
    matrices = {p: read_tensor(sample.model.folder, tensors[p]) for p in PROJECTIONS}
    a, b = inputs @ matrices["gate"].T, inputs @ matrices["up"].T
    h = _silu(a) * b
    column = (matrices["down"] ** 2).sum(axis=0)
    alone = ("ffn_exps", expert) in sample.stored
    result: dict[str, ErrorsByFormat] = {}
    from_inputs: dict[str, ErrorsByFormat] = {}
    for projection, matrix in matrices.items():
        role = f"ffn_{projection}_exps"
        wanted = max(LEAST_ROWS_ALONE if alone else LEAST_ROWS, SAMPLE_WEIGHTS // sample.model.n_experts // matrix.shape[1])
        rows = sample_rows(matrix.shape[0], wanted)
        scale, part, result[role] = matrix.shape[0] / len(rows), matrix[rows], {}
        for name, rounded in round_sampled(
            sample.target, part, sample.formats(role, expert), sample.importance.get((role, expert)), EXPERT_BITS
        ):
            delta = rounded - part
            if projection == "gate":
                squares = ((_silu(a[:, rows] + inputs @ delta.T) - _silu(a[:, rows])) * b[:, rows]) ** 2 @ column[rows]
            elif projection == "up":
                squares = (_silu(a[:, rows]) * (inputs @ delta.T)) ** 2 @ column[rows]
            else:
                squares = ((h @ delta.T) ** 2).sum(axis=1)
            result[role][name] = float(weight @ squares) * scale
        formats, columns = sample.formats(role, expert), sample.importance.get((role, expert))
        result[role] |= dict.fromkeys(formats_too_small(sample.target, matrix, formats, columns), np.inf)
        blocks = {name: sample.target.input_block(name, role) for name in sample.formats(role, expert)}
        by_block = {block: float(weight @ _input_squares(block, projection, inputs, (a, b, h), matrices)) for block in {*blocks.values()}}
        from_inputs[role] = {name: by_block[block] for name, block in blocks.items()}
    return ByCause(weights=result, inputs=from_inputs)


@np.errstate(over="ignore", invalid="ignore")  # a format that cannot hold a weight gives infinity, and is then not offered
def _product_errors(sample: _Sample, tensors: dict[str, Tensor]) -> ByCause[dict[str, ErrorsByFormat]]:
    """Mean squared errors per use of the products with one expert's matrices, by role and format.

    They need the second moments of the inputs alone, and no formula of the expert: whatever follows a product is taken as linear.
    """
    result: dict[str, ErrorsByFormat] = {}
    from_inputs: dict[str, ErrorsByFormat] = {}
    for role, tensor in tensors.items():
        matrix, columns = read_tensor(sample.model.folder, tensor), sample.importance[role, tensor.expert]
        rows = sample_rows(matrix.shape[0], max(LEAST_ROWS, SAMPLE_WEIGHTS // sample.model.n_experts // matrix.shape[1]))
        scale, part, formats = matrix.shape[0] / len(rows), matrix[rows], sample.formats(role, tensor.expert)
        rounded = round_sampled(sample.target, part, formats, columns, EXPERT_BITS)
        result[role] = {name: scale * float(((r - part).astype(np.float64) ** 2 @ columns).sum()) for name, r in rounded}
        result[role] |= dict.fromkeys(formats_too_small(sample.target, matrix, formats, columns), np.inf)
        x = draw_normal(columns)
        blocks = {name: sample.target.input_block(name, role) for name in formats}
        by_block = {
            block: scale * float((((round_to_int8(x, block) - x) @ part.T) ** 2).sum(axis=1).mean()) if block else 0.0
            for block in {*blocks.values()}
        }
        from_inputs[role] = {name: by_block[block] for name, block in blocks.items()}
    return ByCause(weights=result, inputs=from_inputs)


def _draw_tokens(weight: F64) -> tuple[NDArray[np.int64], F64]:
    """At most TOKENS_PER_EXPERT tokens and their weights, summing to 1: drawn evenly from the running sum, the heaviest first.

    The heaviest tokens alone would not do: the importance matrix was made for them, and rounding has larger errors on the others.
    """
    order = np.argsort(-weight, kind="stable")
    running = np.cumsum(weight[order])
    if running[-1] <= 0:
        return order[:1], np.ones(1)
    wanted = (np.arange(TOKENS_PER_EXPERT) + 0.5) / TOKENS_PER_EXPERT * running[-1]
    places, times = np.unique(np.minimum(np.searchsorted(running, wanted), len(order) - 1), return_counts=True)
    return order[places], times / TOKENS_PER_EXPERT


def _input_squares(
    block: int,
    projection: str,
    x: F32,
    hidden: tuple[F32, F32, F32],
    matrices: Mapping[str, F32],
) -> F32:
    """Squared output error of each token [N] from a projection's inputs, rounded to int8 by blocks of this size (0: not rounded)."""
    if not block:
        return np.zeros(len(x), np.float32)
    a, b, h = hidden
    rounded = round_to_int8(h if projection == "down" else x, block)
    if projection == "gate":
        delta = (_silu(rounded @ matrices["gate"].T) - _silu(a)) * b
    elif projection == "up":
        delta = _silu(a) * (rounded @ matrices["up"].T - b)
    else:
        delta = rounded - h
    squares: F32 = ((delta @ matrices["down"].T) ** 2).sum(axis=1)
    return squares


def _silu(x: F32) -> F32:
    result: F32 = x / (1 + np.exp(-np.clip(x, -80, 80)))
    return result
