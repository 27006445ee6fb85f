"""This module explains why no plan fits: it finds the least budget that is enough, or the rules that contradict each other."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace

import numpy as np

from edgemoe.base.errors import BudgetError, ConflictError, EdgemoeError, UnsolvedError
from edgemoe.base.units import format_bytes
from edgemoe.ir import Costs
from edgemoe.ir.memory import peak
from edgemoe.plan.hardness import strictest_form
from edgemoe.plan.staging import largest_staging
from edgemoe.plan.task import Task, make_task, memory_beside_weights
from edgemoe.rules import Rule, apply_rules, describe_rule, rule_name
from edgemoe.solvers.effort import SECONDS, Effort, deadline
from edgemoe.solvers.program import Program
from edgemoe.solvers.search import solve

EVERYTHING = 2**60  # bytes that no model has


def least_budget(costs: Costs, rules: Sequence[Rule] = ()) -> int | None:
    """Bytes of the smallest process of any plan that keeps the rules; None when no plan keeps them."""
    constraints = apply_rules(costs, rules)
    return least_of_task(make_task(costs, constraints, Effort(until=deadline(SECONDS))))


def least_of_task(task: Task) -> int | None:
    """Least bytes of any plan, from programs with bytes as costs; larger weights may be worth it if their staging copy is smaller."""
    parts = memory_beside_weights(task.costs, task.constraints)
    effort = Effort(gap=1e-9, until=deadline(SECONDS))

    def least(limit: int | None) -> tuple[int, int] | None:
        """Bytes of the smallest weights whose staging copies are no larger than the limit, and of their largest copy."""
        compiled = task.programs(0, limit)
        found = solve(lambda i: _bytes_as_costs(compiled(i).program), len(task.allowed), effort)
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
    priced = program.with_costs(program.size.astype(np.float64), float(program.fixed))
    return replace(priced, size=np.zeros_like(program.size), fixed=0, room=1)


def explain_infeasible(task: Task, budget: int, rules: Sequence[Rule]) -> BudgetError:
    """The error for the user, which names the least budget that is enough, or the rules that contradict each other."""
    costs = task.costs
    try:
        least = least_of_task(task)
    except UnsolvedError:
        message = f"no plan of {costs.model_name} fits {format_bytes(budget)} with these rules, and the least budget was not found in time"
        return BudgetError(message, hint="ask for more --memory, or loosen a rule")
    if least is not None and budget < least:
        with_rules = "" if not rules else f" and the rules {', '.join(rule_name(r) for r in rules)}"
        free = least_budget(costs) if rules else None
        told = f" (without rules {format_bytes(free)})" if free is not None and free < least else ""
        wanted = f"{format_bytes(budget)}{with_rules}"
        message = f"no plan of {costs.model_name} fits {wanted}: the least is {format_bytes(least)} ({least} bytes){told}"
        return BudgetError(message, hint=f"ask for --memory {least}B or more, or a smaller --context")
    if least is not None:
        raise EdgemoeError(
            f"solver {task.effort.solver} says that no plan fits {format_bytes(budget)}, but one of {least} bytes does",
            hint="please report this",
        )
    conflict = minimal_conflict(costs, rules)
    form = strictest_form(costs, conflict, conflict[0], EVERYTHING) if conflict else ""
    return ConflictError(
        f"no plan keeps these rules together, at any size: {'; '.join(describe_rule(r) for r in conflict)}",
        hint=f"loosen one of them: the strictest form of {rule_name(conflict[0])} that a plan keeps is {form}"
        if form
        else "drop or loosen one of them",
    )


def minimal_conflict(costs: Costs, rules: Sequence[Rule]) -> list[Rule]:
    """A smallest set of rules that no plan keeps together; without any one of them a plan exists (deletion filter; Chinneck 1991)."""
    needed = list(rules)
    for rule in list(rules):
        without = [r for r in needed if r is not rule]
        with suppress(UnsolvedError):  # then the rule stays in the set
            if least_budget(costs, without) is None:
                needed = without
    return needed
