"""This module makes a Plan from Costs, a budget and rules, with a proven bound.

It bounds one program for each kept count, and solves those that could still win.  The finished plan is then checked against budget and
rules, from the bytes and formats that it lists.

A budget limits the memory of the whole process.  Therefore the search also counts the copies that loading makes (staging) and what lies in
GPU memory instead of main memory.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from edgemoe.base.errors import EdgemoeError, UnsolvedError, UsageError
from edgemoe.base.progress import GapProgress
from edgemoe.ir import Costs, CountBound, Plan, RuleUse
from edgemoe.plan.evaluate import describe_choice
from edgemoe.plan.hardness import describe_hardness, explain_unsolved
from edgemoe.plan.infeasible import explain_infeasible
from edgemoe.plan.program import Compiled, Near
from edgemoe.plan.staging import solve_with_staging
from edgemoe.plan.task import Task, make_task, memory_beside_weights
from edgemoe.rules import Rule, apply_rules, rule_name
from edgemoe.rules.constraints import Constraints, held_by_gpu, vram_room
from edgemoe.rules.linear import Linear
from edgemoe.solvers.effort import SECONDS, Effort, deadline
from edgemoe.solvers.program import Solution
from edgemoe.solvers.search import SOLVERS

DEFAULT_GAP = 1e-4
OBJECTIVES = ("mean", "worst")
NEAR_NATS = 1e-5  # share of the earlier plan's nats that is charged for each decision that differs from that plan (1e-6 to 1e-4 were tried)
__all__ = ["DEFAULT_GAP", "OBJECTIVES", "SOLVERS", "solve_plan", "sweep_sizes"]


def solve_plan(
    costs: Costs,
    budget: int,
    *,
    rules: Sequence[Rule] = (),
    objective: str = "mean",
    solver: str = "highs",
    gap: float = DEFAULT_GAP,
    seconds: float | None = SECONDS,
    near: Plan | None = None,
    watch: GapProgress = lambda gap: None,
) -> Plan:
    """Find the plan with the least predicted KL among those whose process never holds more than `budget` bytes.

    Args:
        costs: the price list; its memory parts say what the process needs beside the weights.
        budget: bytes of the process at its peak; with the rule Vram, bytes of main memory alone.
        rules: conditions on the plan: records (rules/records.py), expressions (rules/recipe.py), or functions of a Problem
            (rules/functions.py).
        objective: what is made least: "mean", the mean over the calibration domains by weight, or "worst", the cost of the domain that
            loses most.
        solver: highs, cbc, lagrange (near-best in milliseconds, with its bound) or exhaustive.
        gap: relative distance to the optimum that is good enough.
        seconds: wall-clock limit; None: no limit.  After it the best plan so far is returned with its proven gap, and a line says which
            rule made the search hard.
        near: an earlier plan.  Its decisions are kept wherever keeping them costs (nearly) no nats.
        watch: told the gap that the engine has proven of the program at hand, a few times a second.

    Raises:
        BudgetError: no plan fits; the message names the least budget, and rules that contradict each other.  UnsolvedError: none was
            found in time.
        UsageError: the solver or the objective is unknown, or a rule is of no known kind.
    """
    if objective not in OBJECTIVES:
        raise UsageError(f"objective {objective!r} is not known", hint=f"known: {', '.join(OBJECTIVES)}")
    constraints = apply_rules(costs, rules)
    effort = Effort(solver=solver, gap=gap, until=deadline(seconds), watch=watch)
    task = make_task(costs, constraints, effort, objective, _near(costs, near))
    try:
        found = solve_with_staging(task, budget)
    except UnsolvedError as error:
        raise explain_unsolved(task, budget, rules, seconds) from error
    if found is None:
        raise explain_infeasible(task, budget, rules)
    solution, compiled = found if task.near is None else _price_without_near(task, budget, *found)
    if not solution.proven and effort.is_over:
        logging.getLogger("edgemoe").warning("%s", describe_hardness(task, budget, rules, solution.gap, seconds))
    broken = compiled.program.broken(solution.picks)
    if broken:
        raise EdgemoeError(f"the plan of solver {solver} does not hold: {'; '.join(broken)}")
    plan = _as_plan(task, budget, solution, compiled, rules)
    _check(task, plan, budget)
    return plan


def _near(costs: Costs, plan: Plan | None) -> Near | None:
    if plan is None:
        return None
    if plan.model != costs.model:
        raise UsageError("the plan to stay near to was made for another checkpoint")
    return Near(plan=plan, nats=NEAR_NATS * max(plan.q, 1e-9))


def _price_without_near(task: Task, budget: int, solution: Solution, compiled: Compiled) -> tuple[Solution, Compiled]:
    """Price a choice that was found with `near` again, without the nats of differing from the earlier plan.

    A plan promises real nats only.  The bound comes from solving without `near`.
    """
    free = replace(task, near=None, made={})
    best = solve_with_staging(free, budget)
    if best is None:
        raise EdgemoeError("there is a plan near the earlier one, but none without it", hint="please report this")
    own = free.programs(compiled.program.room)(solution.count_index)
    cost = own.program.objective(solution.picks)
    bounded = replace(solution, cost=cost, bound=min(cost, best[0].bound), per_count=best[0].per_count)
    return replace(bounded, proven=bounded.gap <= task.effort.gap), own


# ---------------------------------------------------------------------------------------------------------------- results
def _as_plan(task: Task, budget: int, solution: Solution, compiled: Compiled, rules: Sequence[Rule]) -> Plan:
    costs, constraints = task.costs, task.constraints
    formats, in_vram = compiled.formats(solution.picks), compiled.in_vram(solution.picks)
    kept, beside = compiled.kept(costs, solution.picks), memory_beside_weights(costs, constraints)
    plan = describe_choice(costs, budget, kept, formats, solver=task.effort.solver, in_vram=in_vram, beside=beside)
    memory = dict(plan.memory)
    if constraints.vram is not None:
        memory["vram"] = _bytes_on_gpu(costs, plan) + costs.memory["kv"] + costs.memory["compute"]
    plan = replace(
        plan,
        costs=costs.stats,
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
    """Count the bytes of weights in GPU memory: the units placed there, and a tied embedding, which both memories hold."""
    twice = [unit.name for unit, held in zip(costs.units, held_by_gpu(costs), strict=True) if held]
    return sum(plan.sizes[name] for name in (*plan.vram, *twice))


def _rule_uses(task: Task, plan: Plan, rules: Sequence[Rule]) -> tuple[RuleUse, ...]:
    """List every rule with its slack, the distance of its expression from its limit.  None: the rule has no limit, such as a pin."""
    left = {b.name: -b.expression.value(task.costs, plan) for b in reversed(task.constraints.bounds) if not b.expression.soft}
    if task.constraints.vram is not None:
        left[task.constraints.vram.name] = vram_room(task.costs, task.constraints.vram) - _bytes_on_gpu(task.costs, plan)
    return tuple(RuleUse(name=rule_name(r), slack=left.get(rule_name(r))) for r in rules)


def _check(task: Task, plan: Plan, budget: int) -> None:
    """Check a finished plan against budget, pins, offered formats, ties and every linear rule, from the numbers in the plan.

    Raises:
        EdgemoeError: the plan breaks one of these.
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
    """Bound how large the terms of a rule can be: `_check` allows 1e-8 of this for the rounding of floats."""
    sizes = float(np.abs(expression.size).max() + np.abs(expression.active).max()) * plan.file_size
    counts = float(np.abs(expression.keep).sum() + np.abs(expression.use).sum())
    return max(abs(expression.constant), sizes, counts, 1e-300)


# ------------------------------------------------------------------------------------------------------------------ sweep
def sweep_sizes(costs: Costs, sizes: Sequence[int]) -> tuple[dict[str, float], ...]:
    """For each size, find a near-best plan whose weights take at most so many bytes of the process.

    The result holds the largest file that this limit allows the plan, and its predicted KL.  Sizes that no plan fits are left out.  The
    solver is "lagrange", whose proven gaps in benchmarks/results/planner.md are at most 0.021 %.
    """
    found = []
    task = make_task(costs, Constraints(costs), Effort(solver="lagrange", gap=DEFAULT_GAP))
    for size in sizes:
        best = task.solve(size, DEFAULT_GAP)
        if best is not None:
            solution, compiled = best
            formats = compiled.formats(solution.picks)
            stored = np.flatnonzero(formats >= 0)
            beyond = int(costs.extra[compiled.count_place, stored, formats[stored]].sum())
            found.append({"file_size": float(size - beyond), "predicted_kl": costs.predict_kl(solution.cost)})
    return tuple(found)
