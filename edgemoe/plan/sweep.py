"""This module makes a plan for each of many budgets: the Pareto curve of KL against bytes, as table, CSV and a page with a slider.

A larger budget never gets a worse plan: if a solver (within its gap) finds no better one, the plan of the budget below is taken.
"""

from __future__ import annotations

import base64
import csv
import io
import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from importlib.resources import files
from typing import Any

import numpy as np

from edgemoe.base.errors import BudgetError, UnsolvedError, UsageError
from edgemoe.base.progress import Progress
from edgemoe.base.units import format_bytes, parse_bytes
from edgemoe.ir import Costs, Plan, counts_text
from edgemoe.plan.infeasible import least_budget
from edgemoe.plan.solve import DEFAULT_GAP, solve_plan
from edgemoe.rules import Rule

MAX_BUDGETS = 1000
_GONE = 255  # number that marks a dropped expert in the page's data, in the experts form
FILES = ("sweep.csv", "sweep.html")
COLUMNS = ("budget", "file_size", "peak", "kept", "predicted_kl", "cost", "bound", "gap", "proven", "carried_over")


@dataclass(frozen=True, slots=True, kw_only=True)
class Point:
    """One budget and its plan (None if no plan fits); `carried_over` says that the plan is that of the budget below."""

    budget: int
    plan: Plan | None
    carried_over: bool = False


def parse_budgets(text: str) -> list[int]:
    """Budgets "LOW:HIGH:STEP", both ends included.

    Raises:
        UsageError: the text is no such range.
    """
    parts = text.split(":")
    if len(parts) != 3:
        raise UsageError(f"the sweep {text!r} is not LOW:HIGH:STEP", hint="write it like 64GB:192GB:8GB")
    low, high, step = (parse_bytes(p) for p in parts)
    if low > high or (high - low) // step >= MAX_BUDGETS:
        if low > high:
            raise UsageError(f"the sweep {text!r} ends below where it begins", hint="write LOW:HIGH:STEP")
        raise UsageError(f"the sweep {text!r} has more than {MAX_BUDGETS} budgets", hint="a larger step")
    return list(range(low, high + 1, step))


def objective_of(plan: Plan) -> float:
    """The objective that the plan minimises, in nats, without the prices of soft rules."""
    return max(plan.domain_q.values(), default=plan.q) if plan.objective == "worst" else plan.q


def sweep_budgets(
    costs: Costs,
    budgets: Sequence[int],
    *,
    rules: Sequence[Rule] = (),
    objective: str = "mean",
    solver: str = "highs",
    gap: float = DEFAULT_GAP,
    costs_hash: str = "",
    progress: Progress = lambda done, total: None,
) -> tuple[Point, ...]:
    """A plan for each budget, from the least up; the arguments are those of `solve_plan`.

    Raises:
        UsageError: a rule is of no known kind.
    """
    points: list[Point] = []
    best: Plan | None = None
    for number, budget in enumerate(sorted(budgets)):
        try:
            plan = solve_plan(costs, budget, rules=rules, objective=objective, solver=solver, gap=gap)
            plan = replace(plan, costs=costs_hash or plan.costs)
        except BudgetError:
            points.append(Point(budget=budget, plan=None))
        except UnsolvedError:  # the plan of a smaller budget fits here too
            carried = None if best is None else replace(best, budget=budget, proven=False)
            points.append(Point(budget=budget, plan=carried, carried_over=carried is not None))
        else:
            worse = best is not None and objective_of(best) < objective_of(plan)
            if worse and best is not None:
                bound = min(plan.bound, objective_of(best))
                left = max(0.0, 1 - bound / max(objective_of(best), 1e-300))
                plan = replace(best, budget=budget, bound=bound, gap=left, proven=plan.proven and left <= gap, price=plan.price)
            points.append(Point(budget=budget, plan=plan, carried_over=worse))
            best = plan
        progress(number + 1, len(budgets))
    return tuple(points)


def rows_of(points: Sequence[Point]) -> list[tuple[Any, ...]]:
    """The sweep as rows of COLUMNS."""
    found: list[tuple[Any, ...]] = []
    for p in points:
        if p.plan is None:
            found.append((p.budget, *("",) * (len(COLUMNS) - 1)))
            continue
        plan = p.plan
        numbers = (plan.file_size, plan.memory["peak"], counts_text(plan), f"{plan.predicted_kl:.8g}", f"{plan.q:.8g}")
        found.append((p.budget, *numbers, f"{plan.bound:.8g}", f"{plan.gap:.2e}", plan.proven, p.carried_over))
    return found


def write_csv(points: Sequence[Point]) -> str:
    """The sweep as CSV, sizes in bytes and costs in nats per token."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(COLUMNS)
    writer.writerows(rows_of(points))
    return out.getvalue()


def render_sweep(costs: Costs, points: Sequence[Point]) -> str:
    """A page that shows the plan at each budget, as one HTML file that loads nothing from the network.

    Raises:
        BudgetError: no budget has a plan.
    """
    from jinja2 import Environment, StrictUndefined

    solved = [p for p in points if p.plan is not None]
    if not solved:
        least = least_budget(costs)
        told = "" if least is None else f": the least is {format_bytes(least)} ({least} bytes)"
        raise BudgetError(f"no plan of {costs.model_name} fits any of these budgets{told}")
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    template = environment.from_string(files("edgemoe.plan").joinpath("sweep.html.j2").read_text(encoding="utf-8"))
    bits = _bits(costs)
    order = sorted(bits, key=lambda f: bits[f])
    data = {
        "formats": order,
        "bits": bits,
        "layers": costs.expert_layers,
        "experts": costs.n_experts,
        "plans": [_plan_data(costs, order, p.budget, p.plan) for p in solved if p.plan is not None],
    }
    # inside a script element only "<" could end it; JSON never needs it bare
    script = json.dumps(data, separators=(",", ":")).replace("<", "\\u003c")
    page = template.render(name=costs.model_name, origin=costs.origin, drawn=costs.drawn, data=script, low=format_bytes(solved[0].budget))
    return page.encode("utf-8", "replace").decode("utf-8")


def _bits(costs: Costs) -> dict[str, float]:
    """Bits per weight of each format, of the first unit that offers it."""
    found: dict[str, float] = {}
    for f, name in enumerate(costs.formats):
        units = np.flatnonzero(np.isfinite(costs.cost[-1, :, f]))
        if len(units):
            u = int(units[np.argmax(costs.size[-1, units, f])])
            found[name] = round(8 * int(costs.size[-1, u, f]) / costs.units[u].n_weights, 3)
    return found


def _plan_data(costs: Costs, order: Sequence[str], budget: int, plan: Plan) -> dict[str, Any]:
    """The page's data of one plan; `order` numbers the formats of single experts."""
    roles: dict[str, dict[str, int]] = {}
    stacks: dict[int, dict[str, str]] = {}
    rows = {layer: row for row, layer in enumerate(costs.expert_layers)}
    alone = np.full((costs.n_layers, costs.n_experts), _GONE, np.uint8)
    for unit in costs.units:
        if unit.name in plan.formats:
            group = "experts" if unit.is_stack or unit.expert >= 0 else "attention" if unit.role.startswith("attn") else unit.role
            formats = roles.setdefault(group, {})
            formats[plan.formats[unit.name]] = formats.get(plan.formats[unit.name], 0) + plan.sizes[unit.name]
            if unit.is_stack:
                stacks.setdefault(unit.layer, {})[unit.role.split("_")[1]] = plan.formats[unit.name]
            if unit.expert >= 0:
                alone[rows[unit.layer], unit.expert] = order.index(plan.formats[unit.name])
    mask = np.zeros((costs.n_layers, costs.n_experts), bool)
    for row, kept in enumerate(plan.kept):
        mask[row, list(range(len(kept)) if costs.drawn else kept)] = True
    if costs.drawn:
        alone.sort(axis=1)  # in no order of experts
    return {
        "budget": budget,
        "budget_text": format_bytes(budget),
        "size": plan.file_size,
        "size_text": format_bytes(plan.file_size),
        "peak_text": format_bytes(plan.memory["peak"]),
        "kl": plan.predicted_kl,
        "count": counts_text(plan),
        "domains": plan.domain_q,
        "gap": plan.gap,
        "proven": plan.proven,
        "roles": roles,
        "stacks": [stacks.get(layer, {}) for layer in costs.expert_layers],
        "kept": base64.b64encode(np.packbits(mask, axis=1).tobytes()).decode(),
        "alone": base64.b64encode(alone.tobytes()).decode() if costs.form == "experts" else "",
    }
