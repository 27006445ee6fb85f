"""This module explains why no plan fits: it finds the least budget that is enough, or the rules that contradict each other."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from edgemoe.base.errors import BudgetError, ConflictError, EdgemoeError
from edgemoe.base.units import format_bytes
from edgemoe.ir import Costs
from edgemoe.ir.memory import peak
from edgemoe.plan.staging import largest_staging
from edgemoe.plan.task import Task, make_task, memory_beside_weights
from edgemoe.rules import Rule, apply_rules, describe_rule, rule_name
from edgemoe.solvers.program import Program
from edgemoe.solvers.search import solve


def least_budget(costs: Costs, rules: Sequence[Rule] = ()) -> int | None:
    """Bytes of the smallest process of any plan that keeps the rules; None when no plan keeps them."""
    constraints = apply_rules(costs, rules)
    return least_of_task(make_task(costs, constraints, "mean", None, "highs", 1e-6, None))


def least_of_task(task: Task) -> int | None:
    """Least bytes of any plan, from programs with bytes as costs; larger weights may be worth it if their staging copy is smaller."""
    parts = memory_beside_weights(task.costs, task.constraints)

    def least(limit: int | None) -> tuple[int, int] | None:
        """Bytes of the smallest weights whose staging copies are no larger than the limit, and of their largest copy."""
        compiled = task.programs(0, limit)
        found = solve(lambda i: _bytes_as_costs(compiled(i).program), len(task.allowed), 1e-9, solver="highs")
        return None if found is None else (round(found.cost), largest_staging(task.costs, compiled(found.count_index), found))

    first = least(None)
    if first is None:
        return None
    best = peak({**parts, "weights": first[0], "staging": first[1]})
    for limit in np.unique(task.costs.staging).tolist():
        if limit >= first[1] or peak({**parts, "weights": first[0], "staging": limit}) >= best:
            break
        found = least(limit)
        if found is not None:
            best = min(best, peak({**parts, "weights": found[0], "staging": found[1]}))
    return best


def _bytes_as_costs(program: Program) -> Program:
    """The program with bytes as costs, so that its cheapest choice is the smallest."""
    cost = np.where(np.isfinite(program.cost).all(axis=0), program.size.astype(np.float64), np.inf)[None]
    blocks = None if program.blocks is None else replace(program.blocks, curve=np.zeros_like(program.blocks.curve))
    soft = tuple(replace(s, price=0.0) for s in program.soft)
    no_size, constant = np.zeros_like(program.size), np.array([float(program.fixed)])
    return replace(program, cost=cost, size=no_size, constant=constant, fixed=0, room=1, blocks=blocks, soft=soft)


def explain_infeasible(task: Task, budget: int, rules: Sequence[Rule]) -> BudgetError:
    """The error for the user, which names the least budget that is enough, or the rules that contradict each other."""
    costs = task.costs
    least = least_of_task(task)
    if least is not None and budget < least:
        with_rules = "" if not rules else f" and the rules {', '.join(rule_name(r) for r in rules)}"
        free = least_budget(costs) if rules else None
        told = f" (without rules {format_bytes(free)})" if free is not None and free < least else ""
        wanted = f"{format_bytes(budget)}{with_rules}"
        message = f"no plan of {costs.model_name} fits {wanted}: the least is {format_bytes(least)} ({least} bytes){told}"
        return BudgetError(message, hint=f"ask for --memory {least}B or more, or a smaller --context")
    if least is not None:
        raise EdgemoeError(
            f"solver {task.solver} says that no plan fits {format_bytes(budget)}, but one of {least} bytes does", hint="please report this"
        )
    conflict = minimal_conflict(costs, rules)
    return ConflictError(
        f"no plan keeps these rules together, at any size: {'; '.join(describe_rule(r) for r in conflict)}",
        hint="drop or loosen one of them",
    )


def minimal_conflict(costs: Costs, rules: Sequence[Rule]) -> list[Rule]:
    """A smallest set of rules that no plan keeps together; without any one of them a plan exists (deletion filter; Chinneck 1991)."""
    needed = list(rules)
    for rule in list(rules):
        without = [r for r in needed if r is not rule]
        if least_budget(costs, without) is None:
            needed = without
    return needed
