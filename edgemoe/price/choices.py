"""This module prices every choice of a plan in nats and bytes, and collects the prices into Costs (docs/pricing.md).

experts.py and matrices.py price the choices of one layer or matrix.  This module joins them into one price list, in the form in which the
target stores experts.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np

from edgemoe.base.errors import ModelError, UsageError
from edgemoe.base.progress import Progress
from edgemoe.base.threads import open_threads
from edgemoe.base.types import F64
from edgemoe.ir import PROJECTIONS, Costs, Model, Probe, Stats, Unit
from edgemoe.ir.memory import peak
from edgemoe.model.routing.flips import additive_part, fit_flips, routers_behind
from edgemoe.model.routing.kept_sets import kept_groups, offered_counts
from edgemoe.price.experts import Layer, price_layer
from edgemoe.price.matrices import ByCause, ErrorsByFormat, price_matrix, probe_kl
from edgemoe.quantize.importance import importance_of
from edgemoe.quantize.reference import WHOLE_BITS
from edgemoe.targets import Target, count_bytes, settle

ROUNDINGS = ("feedback", "stock")
TRUSTED_KL = 0.2  # nats, above which KL is no longer of second order in the change (docs/pricing.md, 5)
# Factor for a single expert's drop.  Repair multiplied the KL of whole kept sets by 0.39 to 0.70, median 0.47
# (benchmarks/results/repair.md).
REPAIRED = 0.5
FED_BACK = 0.55  # cost of rounding with feedback in the refitted stream over that of stock rounding (docs/pricing.md, 12)
FED_BACK_PLAIN = 0.65  # the same without gradients: 0.45 and 0.73 on the bundled models in Q3_K, where gradients gave 0.37 and 0.63
SHRINK = 0.01  # share of the layer's mean use that is added to every expert's use in every domain, so that no factor is 0
Probes = Mapping[tuple[str, int], Probe]
# By role and layer, of a stack or matrix: its part in the KL of a whole-model probe, or its additive factor (`_split_flips`).
Parts = dict[tuple[str, int], float]


def price_choices(model: Model, stats: Stats, target: Target, context: int, progress: Progress | None = None) -> Costs:
    """Price every choice.

    Args:
        model: from `inspect_model`.
        stats: from `collect_stats`.
        target: its formats and bytes are priced, and experts are stored in its form.
        context: tokens of context that the process must have memory for.
        progress: called with (layers done, all layers).

    Raises:
        ModelError: the statistics were imported, not measured; or no format can hold a tensor.
        UsageError: the statistics show that the target cannot have the settings that it was asked for.
    """
    if not stats.probes:
        raise ModelError(f"{stats.folder}: holds no probes: it was made from an imatrix", hint="price with --imatrix, or calibrate")
    target = settle(target, model, stats)
    units = target.list_units(model)
    counts = (model.n_experts,) if target.form == "experts" else offered_counts(model.n_experts, model.router)
    sizes = count_bytes(model, target, units, counts)
    cost, input_cost, factor = np.full(sizes.size.shape, np.inf), np.zeros(sizes.size.shape), np.ones((len(stats.domains), len(units)))
    probes = {(p.role, p.layer): p for p in stats.probes if p.kind == "round"}
    layers, matrices, whole = _price_probes(model, stats, target, units, probes, progress)
    kappa, kappa_sum, additive_factors = _split_flips(model, stats, probes, whole)
    use = {layer: _use(stats, layer) for layer in layers}
    for u, unit in enumerate(units):
        factor[:, u] = _domain_factor(stats, unit, probes, use.get(unit.layer))
        scale, nats = _scale_and_nats(u, unit, layers, matrices, additive_factors)
        for f in np.flatnonzero(sizes.offered[u]):
            from_inputs = nats.inputs[target.offered[f]] * scale
            if np.isfinite(both := nats.weights[target.offered[f]] * scale + from_inputs).all():  # else no such file would run
                input_cost[:, u, f], cost[:, u, f] = from_inputs, both
    _settle_own_types(model, target, units, cost, input_cost)
    return Costs(
        model=model.fingerprint,
        model_name=model.name,
        stats=stats.key,
        form=target.form,
        target=target.name,
        formats=target.offered,
        units=tuple(units),
        counts=counts,
        n_experts=model.n_experts,
        top_k=model.top_k,
        kappa=kappa_sum,
        memory={"context": context, **target.memory_parts(model, context)},
        cold=stats.cold,
        domains=tuple(d.name for d in stats.domains),
        domain_weights=tuple(float(w) for w in stats.weights),
        cost=cost,
        input_cost=input_cost,
        size=sizes.size,
        extra=sizes.extra,
        staging=sizes.staging,
        fixed_size=np.array(target.fixed_sizes(model, counts)),
        factor=factor,
        n_groups=kept_groups(model.router),
        **_price_drops(model, stats, target, layers, counts, kappa),
    )


def _settle_own_types(model: Model, target: Target, units: list[Unit], cost: F64, input_cost: F64) -> None:
    """Let a tensor of a GGUF cost nothing in the type that it has: its bytes are copied, and the original ran with them.

    Raises:
        ModelError: no format can hold a tensor.
    """
    for u, unit in enumerate(units):
        own = model.get(unit.role, unit.layer, 0 if unit.is_stack else -1).dtype if model.architecture else ""
        if own in target.offered:
            cost[:, u, target.offered.index(own)] = input_cost[:, u, target.offered.index(own)] = 0.0
    for lost in np.flatnonzero(~np.isfinite(cost).any(axis=(0, 2))).tolist():
        raise ModelError(f"{model.folder}: no format can hold the weights of {units[lost].name}", hint="is the checkpoint damaged?")


def _scale_and_nats(
    u: int, unit: Unit, layers: Mapping[int, Layer], matrices: Mapping[int, ByCause[ErrorsByFormat]], additive_factors: Parts
) -> tuple[float, ByCause[Any]]:
    """The factor that a unit's nats still need, and the nats by format; experts come with their additive factors in the nats."""
    if u in matrices:
        return additive_factors[unit.role, unit.layer], matrices[u]
    layer = layers[unit.layer]
    return 1.0, layer.price(unit, {role: additive_factors[role, unit.layer] for role in layer.slope})


def _price_probes(
    model: Model, stats: Stats, target: Target, units: list[Unit], probes: Probes, progress: Progress | None
) -> tuple[dict[int, Layer], dict[int, ByCause[ErrorsByFormat]], dict[int, Parts]]:
    """Price everything as if the KL of probes grew with the error alone, that is without flips.

    Returns:
        The MoE layers by number; for every other unit, by its index, the nats of each format; and for each whole-model probe, by its bits,
        the part of each stack or matrix.
    """
    layers: dict[int, Layer] = {}
    matrices: dict[int, ByCause[ErrorsByFormat]] = {}
    whole: dict[int, Parts] = {bits: {} for bits in WHOLE_BITS}
    if progress:
        progress(0, model.n_layers)
    with open_threads() as pool:
        for layer in range(-1, model.n_layers):
            experts = [unit for unit in units if unit.layer == layer and (unit.is_stack or unit.expert >= 0)]
            if experts:
                layers[layer] = price_layer(model, stats, target, layer, experts, probes, pool)
                for bits, parts in whole.items():
                    parts.update({(role, layer): layers[layer].whole(role, bits) for role in layers[layer].slope})
            importance = importance_of(model, stats, layer)
            for u, unit in enumerate(units):
                if unit.layer == layer and unit.expert < 0 and not unit.is_stack:
                    matrices[u] = price_matrix(model, stats, target, unit, importance, probes[unit.role, layer], pool)
                    for bits, parts in whole.items():
                        parts[unit.role, layer] = matrices[u].weights[f"whole{bits}"]
            if progress:
                progress(layer + 1, model.n_layers)
    return layers, matrices, whole


def _price_drops(
    model: Model, stats: Stats, target: Target, layers: Mapping[int, Layer], counts: tuple[int, ...], kappa: float
) -> dict[str, Any]:
    """The fields of Costs that say what dropping costs, and what repair and feedback can do about it."""
    drops = _no_drops(model, len(stats.domains), counts) | {"gradients": not model.architecture, "can_refit": model.expert.can_refit}
    for row, layer in enumerate(model.moe_layers):
        reach = float(routers_behind("", layer, model.moe_layers).mean())
        _enter_drops(drops, row, layers[layer], stats.arrays(layer)["gate_norm"], stats.weights, target, kappa * reach)
    return drops


def _no_drops(model: Model, domains: int, counts: tuple[int, ...]) -> dict[str, Any]:
    """The fields of Costs that say what dropping costs, filled as if drops were free: every expert is kept and costs are zero."""
    layers, experts = len(model.moe_layers), model.n_experts
    return {
        "kept": np.ones((len(counts), layers, experts), bool),
        "drop_cost": np.zeros((domains, len(counts), layers)),
        "expert_drop": np.zeros((domains, layers, experts)),
        "drop_curve": np.zeros((layers, experts + 1)),
        "usage": np.zeros((domains, layers, experts)),
    }


def _enter_drops(drops: dict[str, Any], row: int, priced: Layer, gate_norm: F64, weights: F64, target: Target, kappa: float) -> None:
    """Enter the drops of one layer: the menu if layers share a count, else the curve.

    The curve is what the greedy path costs beyond the sum of its experts' own prices.  Prices of single experts and their usage are entered
    in both forms.
    """
    found = priced.price_drops(weights, kappa)
    drops["expert_drop"][:, row] = found.experts
    drops["usage"][:, row] = _shares(gate_norm)
    if target.form == "experts":
        drops["drop_curve"][row] = weights @ found.curve
    else:
        drops["drop_cost"][:, :, row], drops["kept"][:, row] = found.menu, priced.menu.kept


def discount_drops(costs: Costs) -> Costs:
    """The price list of a build that repairs: the cost of a set is multiplied by 0.3 + 0.38 kept / E, that of a single expert by half.

    The line is a fit to the factors that benchmarks/repair.py measured: .70 .49 .39 on tiny-moe (12, 8, 4 of 16 experts), .48 .46 .41 on
    tiny-moe-b (5, 4, 2 of 7).  The curve takes up the difference between the two factors, so that in the experts form too, the cost of a
    set of the greedy path is multiplied by the factor of its kept count.
    """
    factor = np.array([0.3 + 0.38 * count / costs.n_experts for count in costs.counts])
    every = 0.3 + 0.38 * np.arange(costs.n_experts, -1, -1) / costs.n_experts  # when 0, 1, .. experts are gone
    singles = np.cumsum(np.sort(np.tensordot(costs.weights, costs.expert_drop, axes=1), axis=1), axis=1)
    singles = np.concatenate([np.zeros((len(singles), 1)), singles], axis=1)
    return replace(
        costs,
        repair=True,
        drop_cost=costs.drop_cost * factor[:, None],
        expert_drop=costs.expert_drop * REPAIRED,
        drop_curve=every * costs.drop_curve + (every - REPAIRED) * singles if costs.form == "experts" else costs.drop_curve * REPAIRED,
    )


def discount(costs: Costs, *, repair: bool, rounding: str) -> Costs:
    """Turn measured prices into the prices of a build that repairs, or rounds with feedback.

    Raises:
        UsageError: `rounding` is not known.
    """
    check_rounding(rounding)
    if repair and costs.can_refit:
        costs = discount_drops(costs)
    if rounding == "feedback":  # feedback does not lower the cost of rounded inputs
        factor = FED_BACK if costs.gradients else FED_BACK_PLAIN
        costs = replace(costs, cost=costs.cost * factor + costs.input_cost * (1 - factor))
    return costs


def check_rounding(name: str) -> None:
    """Refuse an unknown way of rounding before hours of work.

    Raises:
        UsageError: the way is not known; the message names the known ones.
    """
    if name not in ROUNDINGS:
        raise UsageError(f"rounding {name!r} is not known", hint=f"known: {', '.join(ROUNDINGS)}")


def _domain_factor(stats: Stats, unit: Unit, probes: Probes, use: F64 | None) -> F64:
    """Cost of a unit's rounding in each domain, divided by its mean over domains [D].

    It comes from the probe's KL in the domain, and for an expert also from the expert's use in the domain.
    """
    if unit.expert < 0 or use is None:
        return _over_mean(np.array(probes[unit.role, unit.layer].kl), stats)
    kl = np.sum([probes[f"ffn_{p}_exps", unit.layer].kl for p in PROJECTIONS], axis=0)
    return _over_mean(kl * use[:, unit.expert], stats)


def _use(stats: Stats, layer: int) -> F64:
    """Mean squared gate of each expert in each domain, divided by its weighted mean over domains [D, E]."""
    arrays = stats.arrays(layer)
    use = arrays["gate_sq"] / np.maximum(arrays["tokens"].astype(np.float64)[:, None], 1.0)
    use = use + SHRINK * use.mean(axis=1, keepdims=True)
    relative: F64 = use / np.maximum(stats.weights @ use, 1e-300)
    return relative


def _over_mean(values: F64, stats: Stats) -> F64:
    """Values by domain divided by their weighted mean; ones if the mean is zero."""
    mean = float(stats.weights @ values)
    found: F64 = values / mean if mean > 0 else np.ones(len(values))
    return found


def _shares(sums: F64) -> F64:
    """Rows scaled to sum to 1."""
    values = sums.astype(np.float64)
    shares: F64 = values / np.maximum(values.sum(axis=1, keepdims=True), 1e-300)
    return shares


def _split_flips(model: Model, stats: Stats, probes: Probes, whole: Mapping[int, Parts]) -> tuple[float, float, Parts]:
    """Kappa of flips, kappa of a sum of prices, and each tensor's additive factor.

    The additive factor is the price that belongs to the KL of the tensor's probe (`additive_part`), divided by this KL.  It is no share: it
    takes out the flips of the probe and puts in those of a typical plan, so it can exceed 1.
    """
    keys = list(whole[WHOLE_BITS[0]])
    every = [probes[key] for key in keys]
    probed = np.array([probe_kl(stats, probe) for probe in every])
    trusted = [
        (np.array([whole[p.bits][key] for key in keys]), probe_kl(stats, p))
        for p in stats.probes
        if p.kind == "all" and 0 < probe_kl(stats, p) < TRUSTED_KL
    ]
    kappa, kappa_sum = fit_flips(every, model.moe_layers, probed, trusted)
    reach = np.array([routers_behind(p.role, p.layer, model.moe_layers).mean() for p in every])
    additive_factors = additive_part(probed, kappa * reach) / np.maximum(probed, 1e-300)
    return kappa, kappa_sum, dict(zip(keys, additive_factors.tolist(), strict=True))


def least_process(model: Model, target: Target, context: int) -> int:
    """Least bytes of any plan's process, from shapes alone: top-k experts are kept and every unit has its smallest format."""
    count = model.n_experts if target.form == "experts" else model.top_k
    units = target.list_units(model)
    sizes = count_bytes(model, target, units, (count,))
    least = np.where(sizes.offered, (sizes.size + sizes.extra)[0], np.iinfo(np.int64).max).min(axis=1)
    experts: dict[int, list[int]] = {}
    for unit, size in zip(units, least.tolist(), strict=True):
        if unit.expert >= 0:
            experts.setdefault(unit.layer, []).append(size)
    total = sum(size for unit, size in zip(units, least.tolist(), strict=True) if unit.expert < 0)
    total += sum(sum(sorted(one)[: model.top_k]) for one in experts.values())
    # Any plan stores these units.  A unit must be copied while it loads only if all its formats are repacked; units are copied in turn.
    others = np.array([unit.expert < 0 for unit in units])
    copied = np.where(sizes.offered, sizes.staging[0], np.iinfo(np.int64).max).min(axis=1)[others].max(initial=0)
    return peak({**target.memory_parts(model, context), "weights": target.fixed_sizes(model, (count,))[0] + total, "staging": int(copied)})
