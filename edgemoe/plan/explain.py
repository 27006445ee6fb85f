"""This module explains a plan: the cost of rules, the gain from more memory, and the reasons for an expert's fate or a tensor's format."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from edgemoe.base.errors import BudgetError, UnsolvedError, UsageError
from edgemoe.base.units import format_bytes
from edgemoe.ir import Costs, Plan
from edgemoe.plan.solve import DEFAULT_GAP, solve_plan
from edgemoe.plan.sweep import objective_of
from edgemoe.rules import Rule, rule_name
from edgemoe.rules.linear import parse_layers, select_units

GIB = 2**30


@dataclass(frozen=True, slots=True, kw_only=True)
class RuleCost:
    """A rule, the nats that the plan would cost less without it, and the room that it leaves (None if it does not limit the plan)."""

    name: str
    nats: float
    slack: float | None


@dataclass(frozen=True, slots=True, kw_only=True)
class More:
    """A larger budget and the nats that it saves, from solving again."""

    bytes: int
    nats: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Option:
    """One format that a tensor could have: bytes, nats, and nats plus bytes at the plan's price, of which the least wins."""

    format: str
    size: int
    nats: float
    paid: float
    chosen: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class ExpertFate:
    """Why one expert stays or goes: its price and its place among its layer's experts, cheapest first."""

    layer: int
    expert: int
    kept: bool
    nats: float
    rank: int
    dearest_dropped: float | None
    cheapest_kept: float
    usage: dict[str, float]  # share of its layer's output, by domain


def price_rules(costs: Costs, plan: Plan, rules: Sequence[Rule], gap: float = DEFAULT_GAP) -> tuple[RuleCost, ...]:
    """Solve again without each rule; a rule without which no plan is found in time has no price."""
    slack = {r.name: r.slack for r in plan.rules}
    found = []
    for rule in rules:
        without = [r for r in rules if r is not rule]
        try:
            other = solve_plan(costs, plan.budget, rules=without, objective=plan.objective, solver=plan.solver, gap=gap)
        except UnsolvedError:
            continue
        name = rule_name(rule)
        found.append(RuleCost(name=name, nats=max(0.0, objective_of(plan) - objective_of(other)), slack=slack.get(name)))
    return tuple(found)


def price_memory(costs: Costs, plan: Plan, rules: Sequence[Rule], gap: float = DEFAULT_GAP) -> tuple[More, ...]:
    """Solve again with one per cent and with one GiB more."""
    found = []
    for extra in (plan.budget // 100, GIB):
        other = solve_plan(costs, plan.budget + extra, rules=rules, objective=plan.objective, solver=plan.solver, gap=gap)
        found.append(More(bytes=extra, nats=max(0.0, objective_of(plan) - objective_of(other))))
    return tuple(found)


def explain_tensor(costs: Costs, plan: Plan, name: str) -> tuple[str, tuple[Option, ...]]:
    """The tensor's full name, and every format that it could have, sorted by nats plus bytes at the plan's price.

    Raises:
        UsageError: no such tensor, or several.
    """
    matching = [u for u, unit in enumerate(costs.units) if name in (unit.name, unit.name.removesuffix(".weight"))]
    found = matching or select_units(costs, [name], None, "--why")
    if len(found) > 1:
        raise UsageError(f"--why {name}: names {len(found)} tensors", hint=f"say which, for instance {costs.units[found[0]].name}")
    u, unit = found[0], costs.units[found[0]]
    c = costs.counts.index(plan.count) if costs.form == "stacks" else 0
    options = [
        Option(
            format=fmt,
            size=int(costs.size[c, u, f]),
            nats=float(costs.cost[c, u, f]),
            paid=float(costs.cost[c, u, f] + plan.price * (costs.size[c, u, f] + costs.extra[c, u, f])),
            chosen=plan.formats.get(unit.name) == fmt,
        )
        for f, fmt in enumerate(costs.formats)
        if np.isfinite(costs.cost[c, u, f])
    ]
    return unit.name, tuple(sorted(options, key=lambda o: (o.paid, o.size)))


def explain_expert(costs: Costs, plan: Plan, layer: int, expert: int) -> ExpertFate:
    """Where an expert stands in its layer.

    Raises:
        UsageError: no such layer or expert, or the prices of experts are drawn.
    """
    if costs.drawn:
        raise UsageError(
            f"--why {layer}:{expert}: these prices say how many experts stay, not which", hint="calibrate the model, then price it"
        )
    row = costs.expert_layers.index(parse_layers([layer], costs.expert_layers, "--why")[0])
    if not 0 <= expert < costs.n_experts:
        raise UsageError(f"--why {layer}:{expert}: experts are 0 to {costs.n_experts - 1}")
    prices = costs.weights @ (costs.expert_drop + costs.inherited)[:, row]
    kept = np.zeros(costs.n_experts, bool)
    kept[list(plan.kept[row])] = True
    gone = prices[~kept]
    return ExpertFate(
        layer=layer,
        expert=expert,
        kept=bool(kept[expert]),
        nats=float(prices[expert]),
        rank=int((prices < prices[expert]).sum()) + 1,
        dearest_dropped=float(gone.max()) if len(gone) else None,
        cheapest_kept=float(prices[kept].min()),
        usage={name: float(costs.usage[d, row, expert]) for d, name in enumerate(costs.domains)},
    )


def describe_why(costs: Costs, plan: Plan, what: str) -> list[str]:
    """The answer to `--why WHAT`: a tensor's name, or LAYER:EXPERT, in words.

    Raises:
        UsageError: neither.
    """
    layer, colon, expert = what.partition(":")
    if colon and layer.isdecimal() and expert.isdecimal():
        fate = explain_expert(costs, plan, int(layer), int(expert))
        usage = ", ".join(f"{share:.1%} {domain}" for domain, share in fate.usage.items())
        lines = [
            f"expert {fate.expert} of layer {fate.layer} {'stays' if fate.kept else 'goes'}: dropping it costs {fate.nats:.3g} nats, "
            f"number {fate.rank} of {costs.n_experts}, cheapest first",
            f"  its share of the layer's output: {usage}",
        ]
        if fate.dearest_dropped is not None:
            lines.append(f"  dearest that goes {fate.dearest_dropped:.3g}, cheapest that stays {fate.cheapest_kept:.3g} nats")
        return lines
    name, options = explain_tensor(costs, plan, what)
    lines = [f"{name}: a byte is worth {plan.price:.3g} nats in this plan"]
    for option in options:
        mark = "  <- chosen" if option.chosen else ""
        lines.append(
            f"  {option.format:8s} {format_bytes(option.size):24s} {option.nats:10.3g} nats, {option.paid:10.3g} with its bytes{mark}"
        )
    return lines


def describe_plan(costs: Costs, plan: Plan, rules: Sequence[Rule], gap: float = DEFAULT_GAP) -> list[str]:
    """The cost of each rule and the gain from more memory, in words; the program is solved again for each."""
    lines = []
    for rule in price_rules(costs, plan, rules, gap):
        binds = "binds" if rule.nats > plan.gap * objective_of(plan) + 1e-12 else "does not bind"
        room = "" if rule.slack is None else f", {rule.slack:.6g} of room left"
        lines.append(f"rule {rule.name} {binds}: without it the plan costs {rule.nats:.4g} nats less{room}")
    try:
        for more in price_memory(costs, plan, rules, gap):
            lines.append(f"{format_bytes(more.bytes)} more memory buys {more.nats:.4g} nats")
    except BudgetError:  # with more memory and the same rules, only a rule that asks for waste can make it infeasible
        lines.append("with more memory these rules cannot be kept")
    except UnsolvedError as error:
        lines.append(f"what more memory buys is not known: {error}")
    lines.append(f"at this budget a megabyte is worth {plan.price * 10**6:.3g} nats")
    return lines
