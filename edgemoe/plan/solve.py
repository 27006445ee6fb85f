"""This module solves the programs of all kept counts for a budget and rules, and checks the finished Plan on its own numbers.

A budget limits the whole process, so the search includes the copies made while loading (staging) and the bytes in a second pool.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from edgemoe.base.errors import EdgemoeError, UsageError
from edgemoe.ir import Costs, CountBound, Plan, RuleUse
from edgemoe.plan.evaluate import describe_choice
from edgemoe.plan.infeasible import explain_infeasible
from edgemoe.plan.program import Compiled, Near
from edgemoe.plan.staging import solve_with_staging
from edgemoe.plan.task import Task, make_task, memory_beside_weights
from edgemoe.rules import Rule, apply_rules, rule_name
from edgemoe.rules.constraints import Constraints, held_by_gpu, vram_room
from edgemoe.rules.linear import Linear
from edgemoe.solvers.program import Solution
from edgemoe.solvers.search import SOLVERS

DEFAULT_GAP = 1e-4
OBJECTIVES = ("mean", "worst")
NEAR_NATS = 1e-5  # share of the total nats that each difference from the `near` plan costs (planner experiments: 1e-6 to 1e-4)
__all__ = ["DEFAULT_GAP", "OBJECTIVES", "SOLVERS", "solve_plan", "sweep_sizes"]


def solve_plan(
    costs: Costs,
    budget: int,
    *,
    rules: Sequence[Rule] = (),
    objective: str = "mean",
    solver: str = "highs",
    gap: float = DEFAULT_GAP,
    seconds: float | None = None,
    near: Plan | None = None,
    costs_hash: str = "",
) -> Plan:
    """The plan with least predicted KL whose process never holds more than `budget` bytes.

    Args:
        costs: the price list; its memory parts say what the process needs beside the weights.
        budget: bytes of the process at its peak (with the rule Vram: of main memory).
        rules: that the plan must keep: records (rules/records.py), expressions (rules/recipe.py), or functions of a Problem.
        objective: least mean over the calibration domains by weight, or least cost of the "worst" domain.
        solver: highs, cbc, lagrange (near-best in milliseconds, with its bound) or exhaustive.
        gap: relative distance to the optimum that is good enough.
        seconds: wall-clock limit, after which the best plan so far is returned with its proven gap (a running solve may take longer).
        near: a plan to stay close to where this costs (nearly) nothing.
        costs_hash: recorded as the plan's origin.

    Raises:
        BudgetError: no plan fits; the message names the least budget, and rules that contradict each other.
        UsageError: the solver or the objective is unknown, or a rule is of no known kind.
    """
    if objective not in OBJECTIVES:
        raise UsageError(f"objective {objective!r} is not known", hint=f"known: {', '.join(OBJECTIVES)}")
    constraints = apply_rules(costs, rules)
    task = make_task(costs, constraints, objective, _near(costs, near), solver, gap, seconds)
    found = solve_with_staging(task, budget)
    if found is None:
        raise explain_infeasible(task, budget, rules)
    solution, compiled = found if task.near is None else _price_without_near(task, budget, *found)
    broken = compiled.program.broken(solution.picks)
    if broken:
        raise EdgemoeError(f"the plan of solver {solver} does not hold: {'; '.join(broken)}")
    plan = _as_plan(task, budget, solution, compiled, costs_hash, rules)
    _check(task, plan, budget)
    return plan


def _near(costs: Costs, plan: Plan | None) -> Near | None:
    if plan is None:
        return None
    if plan.model != costs.model:
        raise UsageError("the plan to stay near to was made for another checkpoint")
    return Near(plan=plan, nats=NEAR_NATS * max(plan.q, 1e-9))


def _price_without_near(task: Task, budget: int, solution: Solution, compiled: Compiled) -> tuple[Solution, Compiled]:
    """The same choice at its own price, bounded by the best plan of all; the nats of staying near are no part of the promise."""
    free = replace(task, near=None, made={})
    best = solve_with_staging(free, budget)
    if best is None:
        raise EdgemoeError("there is a plan near the earlier one, but none without it", hint="please report this")
    own = free.programs(compiled.program.room)(solution.count_index)
    cost = own.program.objective(solution.picks)
    bounded = replace(solution, cost=cost, bound=min(cost, best[0].bound), per_count=best[0].per_count)
    return replace(bounded, proven=bounded.gap <= task.gap), own


# ---------------------------------------------------------------------------------------------------------------- staging


# ---------------------------------------------------------------------------------------------------------------- results
def _as_plan(task: Task, budget: int, solution: Solution, compiled: Compiled, costs_hash: str, rules: Sequence[Rule]) -> Plan:
    costs, constraints = task.costs, task.constraints
    formats, in_vram = compiled.formats(solution.picks), compiled.in_vram(solution.picks)
    kept, beside = compiled.kept(costs, solution.picks), memory_beside_weights(costs, constraints)
    plan = describe_choice(costs, budget, kept, formats, solver=task.solver, in_vram=in_vram, beside=beside)
    memory = dict(plan.memory)
    if constraints.vram is not None:
        memory["vram"] = _bytes_on_gpu(costs, plan) + costs.memory["kv"] + costs.memory["compute"]
    plan = replace(
        plan,
        costs=costs_hash or costs.stats,
        objective=task.objective,
        memory=memory,
        bound=solution.bound,
        gap=solution.gap,
        proven=solution.proven,
        price=solution.price,
        counts=tuple(CountBound(count=costs.counts[task.allowed[i]], bound=b, cost=cost) for i, (b, cost) in enumerate(solution.per_count)),
    )
    return replace(plan, rules=_rule_uses(task, plan, rules))


def _bytes_on_gpu(costs: Costs, plan: Plan) -> int:
    """Bytes of weights that GPU memory holds."""
    twice = [unit.name for unit, held in zip(costs.units, held_by_gpu(costs), strict=True) if held]
    return sum(plan.sizes[name] for name in (*plan.vram, *twice))


def _rule_uses(task: Task, plan: Plan, rules: Sequence[Rule]) -> tuple[RuleUse, ...]:
    """Every rule with the room that it leaves: the distance of its expression from its limit (None if it has no limit)."""
    left = {b.name: -b.expression.value(task.costs, plan) for b in reversed(task.constraints.bounds) if not b.expression.soft}
    if task.constraints.vram is not None:
        left[task.constraints.vram.name] = vram_room(task.costs, task.constraints.vram) - _bytes_on_gpu(task.costs, plan)
    return tuple(RuleUse(name=rule_name(r), slack=left.get(rule_name(r))) for r in rules)


def _check(task: Task, plan: Plan, budget: int) -> None:
    """Check every promise of a finished plan on its own numbers: bytes, counts, pins, ties and every linear rule.

    Raises:
        EdgemoeError: the solver's answer breaks a promise, and is therefore not returned.
    """
    costs, constraints = task.costs, task.constraints
    problems = []
    if plan.memory["peak"] > budget:
        problems.append(f"peak {plan.memory['peak']} of {budget} bytes")
    for bound in constraints.bounds:
        value, scale = bound.expression.value(costs, plan), _scale(bound.expression, plan)
        if not bound.expression.soft and value > 1e-8 * scale:
            problems.append(f"{bound.name} is exceeded by {value:.10g}")
    kept = np.zeros(constraints.pinned.shape, bool)
    for row, experts in enumerate(plan.kept):
        kept[row, list(experts)] = True
    if (kept & (constraints.pinned < 0)).any() or (~kept & (constraints.pinned > 0)).any():
        problems.append("an expert that was pinned is not where it should be")
    for u, unit in enumerate(costs.units):
        if unit.name in plan.formats and not constraints.offered[u, costs.formats.index(plan.formats[unit.name])]:
            problems.append(f"{unit.name} is stored as {plan.formats[unit.name]}")
    for tie in constraints.ties:
        if len({plan.formats[costs.units[u].name] for u in tie}) > 1:
            problems.append(f"{costs.units[tie[0]].name} and others are not stored alike")
    if constraints.max_formats and len(set(plan.formats.values())) > constraints.max_formats:
        problems.append(f"{len(set(plan.formats.values()))} formats")
    if problems:
        raise EdgemoeError(f"the plan does not hold: {'; '.join(problems)}", hint="please report this")


def _scale(expression: Linear, plan: Plan) -> float:
    """The largest possible size of a rule's sums, for the rounding of floats; the programs themselves keep their own numbers exactly."""
    sizes = float(np.abs(expression.size).max() + np.abs(expression.active).max()) * plan.file_size
    counts = float(np.abs(expression.keep).sum() + np.abs(expression.use).sum())
    return max(abs(expression.constant), sizes, counts, 1e-300)


# ------------------------------------------------------------------------------------------------------------- infeasible


# ------------------------------------------------------------------------------------------------------------------ sweep
def sweep_sizes(costs: Costs, sizes: Sequence[int]) -> tuple[dict[str, float], ...]:
    """File size and predicted KL of a near-best plan for each of these sizes, which are bytes of weights in the process.

    The plans come from the Lagrangian relaxation, and lie within a fraction of a per cent of the best.
    """
    found = []
    task = make_task(costs, Constraints(costs), "mean", None, "lagrange", DEFAULT_GAP, None)
    for size in sizes:
        best = task.solve(size, DEFAULT_GAP)
        if best is not None:
            solution, compiled = best
            formats = compiled.formats(solution.picks)
            stored = np.flatnonzero(formats >= 0)
            beyond = int(costs.extra[compiled.c, stored, formats[stored]].sum())
            found.append({"file_size": float(size - beyond), "predicted_kl": costs.predict_kl(solution.cost)})
    return tuple(found)
