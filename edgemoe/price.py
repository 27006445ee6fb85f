"""Model, Stats, target -> Costs: nats and bytes of every choice, drop and quantize on one scale (docs/pricing.md).

For every unit:  cost(format) = slope * error(format).  The error is what the target's own quantizer does to sampled rows, as a mean
squared error of the output on tokens that were really seen; the slope is KL of the unit's rounding probe over the error of that rounding.
For dropping:  cost(set) = slope * loss(set),  the loss from the layer's menu, the slope from dropping probes at a few kept counts.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from edgemoe.checkpoint import read_tensor
from edgemoe.errors import ModelError
from edgemoe.flips import additive_part, fit_flips, routers_behind
from edgemoe.ir import PROJECTIONS, Costs, Model, Probe, Stats, Tensor, Unit
from edgemoe.memory import peak
from edgemoe.menus import Menu, Replay, build_menu, make_replay, offered_counts, set_loss
from edgemoe.rounding import EXPERT_BITS, WHOLE_BITS, round_to_nearest
from edgemoe.scores import importance_of
from edgemoe.targets import Target

REVISION = 2  # raised when the same statistics give other prices, so that no older ones are opened
SAMPLE_WEIGHTS = 2**18  # of each stack or matrix that are really rounded, per format
LEAST_ROWS = 4  # per expert
TOKENS_PER_EXPERT = 128
TRUSTED_KL = 0.2  # nats; above, the second-order picture has ended (docs/pricing.md, 5)
REPAIRED = 0.5  # what drops cost after repair, of before: 0.39 to 0.70, middle 0.47 (benchmarks/results/repair.md)
Errors = dict[str, float]  # format, or "probe" / "whole6" / "whole4" for the reference roundings -> mean squared error
Progress = Callable[[int, int], None]


class _Table:
    """Costs, bytes and staging copies of every unit [C, U, F], filled unit by unit."""

    def __init__(self, model: Model, target: Target, units: list[Unit], counts: tuple[int, ...]) -> None:
        self.model, self.target, self.counts = model, target, counts
        self.cost = np.full((len(counts), len(units), len(target.OFFERED)), np.inf)
        self.size = np.zeros(self.cost.shape, np.int64)
        self.staging = np.zeros(self.cost.shape, np.int64)

    def fill(self, u: int, unit: Unit, by_format: dict[str, NDArray[np.float64]]) -> None:
        """Enter one unit for every kept count and format; costs are [C], or [1] where the count does not matter."""
        cols = _first_tensor(self.model, unit).shape[1]
        for f, name in enumerate(self.target.OFFERED):
            if name not in by_format:
                continue
            self.cost[:, u, f] = by_format[name]
            for c, count in enumerate(self.counts):
                self.size[c, u, f] = self.target.unit_size(unit, cols, name, kept_weights(self.model, unit, count))
                self.staging[c, u, f] = self.target.unit_staging(int(self.size[c, u, f]), name, unit.role)


def kept_weights(model: Model, unit: Unit, count: int) -> int:
    """Weights of a unit when `count` experts stay."""
    return unit.n_weights * count // model.n_experts if unit.role.endswith("_exps") else unit.n_weights


@dataclass(frozen=True, slots=True)
class _Layer:
    """One MoE layer, priced: expert errors [E] by projection and format, the menu, and what its probes say."""

    menu: Menu
    drops: list[tuple[float, NDArray[np.float64]]]  # loss and KL [D] of each dropping probe
    errors: dict[str, dict[str, NDArray[np.float64]]]  # role -> format -> [E] mean squared output error per use
    slope: dict[str, float]  # role -> nats per error


def price_choices(model: Model, stats: Stats, target: Target, context: int, progress: Progress | None = None) -> Costs:
    """Price every choice.

    Args:
        model: from `inspect_model`.
        stats: from `collect_stats`.
        target: whose formats and bytes count.
        context: tokens of context that the process must have memory for.
        progress: called with (layers done, all layers).

    Raises:
        ModelError: the statistics were imported, not measured.
    """
    if not stats.probes:
        raise ModelError(f"{stats.folder}: holds no probes: it was made from an imatrix", hint="price with --imatrix, or calibrate")
    units = target.list_units(model)
    counts = offered_counts(model.n_experts, model.top_k)
    table = _Table(model, target, units, counts)
    domains = len(stats.domains)
    drop = np.zeros((domains, len(counts), model.n_layers))
    expert_drop, usage = (np.zeros((domains, model.n_layers, model.n_experts)) for _ in range(2))
    kept = np.ones((len(counts), model.n_layers, model.n_experts), bool)
    whole = {bits: np.zeros(len(units)) for bits in WHOLE_BITS}  # what each unit's rounding in the whole-model probes would cost alone
    layers: dict[int, _Layer] = {}
    probes = {(p.role, p.layer): p for p in stats.probes if p.kind == "round"}
    if progress:
        progress(0, model.n_layers)
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        for layer in range(-1, model.n_layers):
            importance = importance_of(model, stats, layer)
            priced = _price_layer(model, stats, target, layer, importance, pool, probes) if layer >= 0 else None
            if priced is not None:
                kept[:, layer], layers[layer] = priced.menu.kept, priced
                usage[:, layer] = _shares(stats.arrays(layer)["gate_norm"])
            for u, unit in enumerate(units):
                if unit.layer != layer:
                    continue
                if priced is not None and unit.role in priced.errors:
                    by_format = {f: _stack_costs(priced, unit.role, e) for f, e in priced.errors[unit.role].items()}
                else:
                    by_format = _price_matrix(model, stats, target, unit, importance, probes[unit.role, unit.layer], pool)
                for bits in whole:
                    whole[bits][u] = float(by_format[f"whole{bits}"][-1])
                table.fill(u, unit, by_format)
            if progress:
                progress(layer + 1, model.n_layers)
    probed = np.array([probe_kl(stats, probes[u.role, u.layer]) for u in units])
    trusted = [(whole[p.bits], probe_kl(stats, p)) for p in stats.probes if p.kind == "all" and 0 < probe_kl(stats, p) < TRUSTED_KL]
    kappa, kappa_sum = fit_flips(units, model.n_layers, probed, trusted)
    for u, unit in enumerate(units):
        behind = float(routers_behind(unit.role, unit.layer, model.n_layers).mean())
        table.cost[:, u] *= additive_part(probed[u], kappa * behind) / max(probed[u], 1e-300)
    for layer, priced in layers.items():
        behind = float(routers_behind("", layer, model.n_layers).mean())
        drop[:, :, layer], expert_drop[:, layer] = _drop_costs(stats, layer, priced, kappa * behind)
    return Costs(
        model=model.fingerprint,
        model_name=model.name,
        stats=stats.key,
        form="stacks",
        target=target.__name__.rpartition(".")[2],  # type: ignore[attr-defined]
        formats=target.OFFERED,
        units=tuple(units),
        counts=counts,
        n_experts=model.n_experts,
        top_k=model.top_k,
        kappa=kappa_sum,
        memory={"context": context, **target.memory_parts(model, context)},
        cold=stats.cold,
        domains=tuple(d.name for d in stats.domains),
        domain_weights=tuple(float(w) for w in stats.weights),
        cost=table.cost,
        size=table.size,
        staging=table.staging,
        fixed_size=np.array([target.fixed_size(model, n) for n in counts]),
        factor=np.stack([_domain_factor(stats, probes[unit.role, unit.layer]) for unit in units], axis=1),
        kept=kept,
        drop_cost=drop,
        expert_drop=expert_drop,
        drop_curve=np.zeros((model.n_layers, model.n_experts + 1)),
        usage=usage,
    )


def discount_drops(costs: Costs) -> Costs:
    """The same prices for a build that repairs: a set costs less the more experts are gone, a single expert half.

    factor = 0.3 + 0.38 kept / E: what benchmarks/repair.py measured on the bundled models at 3/4, 1/2 and 1/4 of the experts, .70 .49 .39
    and .48 .46 .41 (benchmarks/results/repair.md); the line is their fit.
    """
    factor = np.array([0.3 + 0.38 * count / costs.n_experts for count in costs.counts])
    return replace(
        costs,
        repair=True,
        drop_cost=costs.drop_cost * factor[:, None],
        expert_drop=costs.expert_drop * REPAIRED,
        drop_curve=costs.drop_curve * REPAIRED,
    )


def _domain_factor(stats: Stats, probe: Probe) -> NDArray[np.float64]:
    """How much more the probed tensor's rounding costs in each domain than on average [D]."""
    mean = probe_kl(stats, probe)
    factor: NDArray[np.float64] = np.array(probe.kl) / mean if mean > 0 else np.ones(len(probe.kl))
    return factor


def _shares(sums: NDArray[np.generic]) -> NDArray[np.float64]:
    """Rows scaled to sum to 1."""
    values = sums.astype(np.float64)
    shares: NDArray[np.float64] = values / np.maximum(values.sum(axis=1, keepdims=True), 1e-300)
    return shares


def _first_tensor(model: Model, unit: Unit) -> Tensor:
    return next(t for t in model.tensors if t.role == unit.role and t.layer == unit.layer)


def probe_kl(stats: Stats, probe: Probe) -> float:
    """A probe's KL, mean over domains by weight."""
    return float(stats.weights @ np.array(probe.kl))


# ----------------------------------------------------------------------------------------------------------------- layers
def _price_layer(
    model: Model,
    stats: Stats,
    target: Target,
    layer: int,
    importance: dict[tuple[str, int], NDArray[np.float32]],
    pool: ThreadPoolExecutor,
    probes: dict[tuple[str, int], Probe],
) -> _Layer:
    arrays = stats.arrays(layer)
    replay = make_replay(arrays, stats.weights, model.top_k, renormalize=model.renormalize)
    menu = build_menu(replay, offered_counts(model.n_experts, model.top_k))
    x = arrays["replay_x"].astype(np.float32)
    tensors = model.of_layer(layer)
    jobs = [
        pool.submit(_expert_errors, model, target, {p: tensors[f"ffn_{p}_exps", e] for p in PROJECTIONS}, x, replay, importance)
        for e in range(model.n_experts)
    ]
    found = [job.result() for job in jobs]
    errors = {role: {f: np.array([e[role][f] for e in found]) for f in found[0][role]} for role in found[0]}
    slope = {}
    for role, by_format in errors.items():
        error = float(menu.gate_sq[-1] @ by_format["probe"])
        slope[role] = probe_kl(stats, probes[role, layer]) / max(error, 1e-30)
    return _Layer(menu, dropped_points(stats, layer, replay, model.n_experts), errors, slope)


def dropped_points(stats: Stats, layer: int, replay: Replay, n_experts: int) -> list[tuple[float, NDArray[np.float64]]]:
    """Loss, and KL by domain [D], of each probe that dropped experts in this layer, by rising loss."""
    points = []
    for probe in stats.probes:
        if probe.kind == "drop" and probe.layer == layer:
            kept = np.zeros(n_experts, bool)
            kept[list(probe.kept)] = True
            points.append((set_loss(replay, kept)[0], np.array(probe.kl)))
    return sorted((p for p in points if p[0] > 0), key=lambda p: p[0])


def price_losses(
    points: list[tuple[float, NDArray[np.float64]]], weights: NDArray[np.float64], losses: NDArray[np.float64], kappa: float
) -> NDArray[np.float64]:
    """Nats by domain of kept sets of a layer with these losses [D, ...]: loss times a slope that is interpolated between the probed losses.

    `kappa` as in `additive_part`.
    """
    known = [loss for loss, _ in points]
    means = [float(weights @ kl) for _, kl in points]
    shares = [float(additive_part(mean, kappa)) / max(mean, 1e-300) for mean in means]
    slopes = np.array([kl / loss * share for (loss, kl), share in zip(points, shares, strict=True)])  # [probes, D]
    return np.stack([np.interp(losses, known, slope) * losses for slope in slopes.T])


def _drop_costs(stats: Stats, layer: int, priced: _Layer, kappa: float) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Nats by domain of each kept set in the menu [D, C], and the additive price of each expert [D, E].

    An expert's own price is what its step on the greedy path adds; those that never went cost as much as the dearest that did, or more by
    their energy.
    """
    menu, domains, n_experts = priced.menu, len(stats.domains), priced.menu.kept.shape[1]
    if not priced.drops:
        return np.zeros((domains, len(menu.counts))), np.zeros((domains, n_experts))
    path = price_losses(priced.drops, stats.weights, menu.path, kappa)
    steps = np.maximum.accumulate(np.maximum(np.diff(path, axis=1), 0.0), axis=1)  # none cheaper than those that went before it
    experts = np.tile(steps.max(axis=1, initial=0.0)[:, None], (1, n_experts))
    energy = stats.arrays(layer)["energy"].sum(axis=0)
    experts *= np.maximum(energy / max(float(energy[menu.order].max(initial=0.0)), 1e-300), 1.0)
    experts[:, menu.order] = steps
    return price_losses(priced.drops, stats.weights, menu.loss, kappa), experts


def _stack_costs(layer: _Layer, role: str, error: NDArray[np.float64]) -> NDArray[np.float64]:
    """Nats of storing a projection's stack with these errors per use [E], for each kept count [C]."""
    costs: NDArray[np.float64] = layer.slope[role] * (layer.menu.gate_sq @ error)
    return costs


def _expert_errors(
    model: Model,
    target: Target,
    tensors: dict[str, Tensor],
    x: NDArray[np.float32],
    replay: Replay,
    importance: dict[tuple[str, int], NDArray[np.float32]],
) -> dict[str, Errors]:
    """Mean squared output error per use of one expert, by projection and format, on tokens drawn by the square of their gate.

    With h = silu(W_gate x) * (W_up x) and f = W_down h, an error dh_j of a hidden channel adds dh_j^2 |w_j|^2, w_j a column of W_down;
    errors of different rows are independent, so sampled rows stand for all.
    """
    expert = tensors["gate"].expert
    tokens, weight = _draw_tokens(replay.probs[:, expert] ** 2 * replay.weights)
    inputs = x[tokens].astype(np.float32)
    gate, up, down = (read_tensor(model.folder, tensors[p]) for p in PROJECTIONS)
    a, b = inputs @ gate.T, inputs @ up.T
    h = _silu(a) * b
    column = (down**2).sum(axis=0)
    per_expert = SAMPLE_WEIGHTS // model.n_experts
    result: dict[str, Errors] = {}
    for projection, matrix in (("gate", gate), ("up", up), ("down", down)):
        role = f"ffn_{projection}_exps"
        rows = sample_rows(matrix.shape[0], max(LEAST_ROWS, per_expert // matrix.shape[1]))
        scale = matrix.shape[0] / len(rows)
        part = matrix[rows]
        result[role] = {}
        for name, rounded in _roundings(target, part, importance[role, expert], EXPERT_BITS):
            delta = rounded - part
            if projection == "gate":
                squares = ((_silu(a[:, rows] + inputs @ delta.T) - _silu(a[:, rows])) * b[:, rows]) ** 2 @ column[rows]
            elif projection == "up":
                squares = (_silu(a[:, rows]) * (inputs @ delta.T)) ** 2 @ column[rows]
            else:
                squares = ((h @ delta.T) ** 2).sum(axis=1)
            result[role][name] = float(weight @ squares) * scale
    return result


def _draw_tokens(weight: NDArray[np.float64]) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """At most TOKENS_PER_EXPERT tokens and their weights, summing to 1: drawn evenly from the running sum, the heaviest first.

    Not the heaviest alone: the importance matrix was made for these, and rounding errs most on the others.
    """
    order = np.argsort(-weight, kind="stable")
    running = np.cumsum(weight[order])
    if running[-1] <= 0:
        return order[:1], np.ones(1)
    wanted = (np.arange(TOKENS_PER_EXPERT) + 0.5) / TOKENS_PER_EXPERT * running[-1]
    places, times = np.unique(np.minimum(np.searchsorted(running, wanted), len(order) - 1), return_counts=True)
    return order[places], times / TOKENS_PER_EXPERT


def _silu(x: NDArray[np.float32]) -> NDArray[np.float32]:
    result: NDArray[np.float32] = x / (1 + np.exp(-np.clip(x, -80, 80)))
    return result


def sample_rows(n: int, wanted: int) -> NDArray[np.int64]:
    """Row numbers, evenly spread, the same every time."""
    return np.unique(np.linspace(0, n - 1, min(n, wanted)).round().astype(np.int64))


def _roundings(
    target: Target, rows: NDArray[np.float32], importance: NDArray[np.float32] | None, probe_bits: int
) -> list[tuple[str, NDArray[np.float32]]]:
    """These rows in every offered format, and in the probes' reference roundings."""
    found = [(name, target.round_rows(rows, name, importance)) for name in target.offered_formats(rows.shape[1])]
    whole = [(f"whole{bits}", round_to_nearest(rows, bits)) for bits in WHOLE_BITS]
    return [*found, ("probe", round_to_nearest(rows, probe_bits)), *whole]


# --------------------------------------------------------------------------------------------------------------- matrices
def _price_matrix(
    model: Model,
    stats: Stats,
    target: Target,
    unit: Unit,
    importance: dict[tuple[str, int], NDArray[np.float32]],
    probe: Probe,
    pool: ThreadPoolExecutor,
) -> dict[str, NDArray[np.float64]]:
    """Nats of storing one matrix in each format: its input-weighted squared error, scaled by its probe."""
    matrix = read_tensor(model.folder, _first_tensor(model, unit))
    columns = importance.get((unit.role, -1))
    if unit.role == "token_embd" and columns is None:  # rows count as often as their token is read
        seen = (stats.weights[:, None] * stats.arrays(-1)["token_count"]).sum(axis=0)
        rows = np.argsort(-seen, kind="stable")[: max(LEAST_ROWS, 4 * SAMPLE_WEIGHTS // matrix.shape[1])]
        per_row = seen[rows].astype(np.float64)
    else:
        rows = sample_rows(matrix.shape[0], max(LEAST_ROWS, SAMPLE_WEIGHTS // matrix.shape[1]))
        per_row = np.ones(len(rows))
    weights = np.ones(matrix.shape[1]) if columns is None else columns.astype(np.float64)
    part = matrix[rows]

    def rounded_errors(index: NDArray[np.int64]) -> Errors:
        found = _roundings(target, part[index], columns, probe.bits)
        return {name: float(per_row[index] @ ((r - part[index]).astype(np.float64) ** 2 @ weights)) for name, r in found}

    blocks = [np.arange(i, min(i + 128, len(rows))) for i in range(0, len(rows), 128)]
    errors: Errors = {}
    for found in pool.map(rounded_errors, blocks):
        errors = {name: errors.get(name, 0.0) + value for name, value in found.items()}
    slope = probe_kl(stats, probe) / max(errors["probe"], 1e-30)
    return {name: np.array([slope * error]) for name, error in errors.items()}


def least_process(model: Model, target: Target, context: int) -> int:
    """Bytes of the smallest process that any plan makes, from shapes alone: top-k experts kept, every unit in its smallest format."""
    total = target.fixed_size(model, model.top_k)
    for unit in target.list_units(model):
        cols = _first_tensor(model, unit).shape[1]
        n = kept_weights(model, unit, model.top_k)
        total += min(target.unit_size(unit, cols, name, n) for name in target.offered_formats(cols))
    return peak({**target.memory_parts(model, context), "weights": total, "staging": 0})
