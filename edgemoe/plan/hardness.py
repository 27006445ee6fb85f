"""This module says which rule makes a search long, and finds the rule's strictest form: the tightest limit for which a plan was found."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from edgemoe.base.errors import UnsolvedError
from edgemoe.base.units import format_bytes, format_seconds
from edgemoe.ir import Costs
from edgemoe.ir.memory import room_for_weights
from edgemoe.plan.staging import solve_with_staging
from edgemoe.plan.task import Task, make_task, memory_beside_weights
from edgemoe.rules import Rule, apply_rules, rule_name
from edgemoe.solvers.effort import Effort, deadline
from edgemoe.solvers.program import Program
from edgemoe.solvers.search import solve

LOOK = 10.0  # seconds of find_hard_rule, shared equally among the rules, and again of strictest_form
ROUGH = 1e-3  # relative gap at which strictest_form stops


def find_hard_rule(task: Task, budget: int, rules: Sequence[Rule]) -> Rule | None:
    """Return the first rule without which a search is proven within its share of LOOK; a rule that is alone is returned untested.

    Rules that are linear rows (`Constraints.bounds`) are tried before all others.
    """
    if len(rules) == 1:
        return rules[0]
    coupling = {bound.name for bound in task.constraints.bounds}
    for rule in sorted(rules, key=lambda r: rule_name(r) not in coupling):
        others = apply_rules(task.costs, [r for r in rules if r is not rule])
        effort = replace(task.effort, until=deadline(LOOK / len(rules)))
        try:
            found = solve_with_staging(make_task(task.costs, others, effort, task.objective), budget)
        except UnsolvedError:
            continue
        if found is not None and found[0].proven:
            return rule
    return None


def strictest_form(costs: Costs, rules: Sequence[Rule], rule: Rule, budget: int) -> str:
    """Return a rule with the tightest limit for which a plan within the budget and all other rules was found; empty if there is none.

    Every rule is stored as expression <= 0.  The program minimises this expression, and `Bound.tell` writes the value found as a limit in
    the user's form.  The true limit may be tighter: the search stops after LOOK seconds, and the room leaves space for the largest staging
    copy of any unit.  A rule that is no single linear row, or has soft variables, has no such form.
    """
    constraints = apply_rules(costs, rules)
    numbers = [n for n, bound in enumerate(constraints.bounds) if bound.name == rule_name(rule)]
    if len(numbers) != 1 or constraints.bounds[numbers[0]].expression.soft:
        return ""
    task = make_task(costs, constraints, Effort(gap=ROUGH, until=deadline(LOOK)))
    parts, largest = memory_beside_weights(costs, constraints), int(costs.staging.max(initial=0))
    compiled = task.programs(room_for_weights(budget, parts, largest))
    try:
        found = solve(lambda i: _rule_as_costs(compiled(i).program, numbers[0]), len(task.allowed), task.effort)
    except UnsolvedError:
        return ""
    return "" if found is None else constraints.bounds[numbers[0]].tell(found.cost)


def _rule_as_costs(program: Program, number: int) -> Program:
    """Return the program without one rule; its costs are the left side of this rule minus its limit."""
    row, others = program.rows[number], tuple(r for n, r in enumerate(program.rows) if n != number)
    return replace(program.with_costs(row.coef, -row.limit), rows=others)


def describe_hardness(task: Task, budget: int, rules: Sequence[Rule], gap: float, seconds: float | None) -> str:
    """Return the sentence about a plan that was the best one found when time was over."""
    spent = "" if seconds is None else f" after {format_seconds(seconds)}"
    told = f"the best plan costs at most {gap:.2%} less than the one found{spent}" if gap < 1 else f"nothing is proven of the plan{spent}"
    reason, form = _blame(task, budget, rules)
    return f"{told}{reason}{form}; --time-limit gives the solver more time"


def explain_unsolved(task: Task, budget: int, rules: Sequence[Rule], seconds: float | None) -> UnsolvedError:
    """The error of a search that found no plan in its time."""
    spent = "" if seconds is None else f" in {format_seconds(seconds)}"
    reason, form = _blame(task, budget, rules)
    message = (
        f"{task.effort.solver} found{spent} no plan of {format_bytes(budget)} that keeps every rule, and did not prove that there is none"
    )
    return UnsolvedError(message + reason + form, hint="loosen the rule, or give --time-limit more seconds")


def _blame(task: Task, budget: int, rules: Sequence[Rule]) -> tuple[str, str]:
    """The rule that makes the search long, and its strictest form, each as a part of a sentence."""
    rule = find_hard_rule(task, budget, rules) if rules else None
    if rule is None:
        return ("; no search without one of the rules ended soon" if rules else ""), ""
    form = strictest_form(task.costs, rules, rule, budget)
    return f"; the rule {rule_name(rule)} makes it hard", (f": the strictest form that a plan keeps is {form}" if form else "")
