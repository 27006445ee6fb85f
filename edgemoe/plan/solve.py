"""Costs, a budget, rules -> Plan: programs of all kept counts, solved and proven; the plan is then checked on its own numbers.

Budgets are of the process, so what loading copies (staging) and what a second pool holds are part of the search.
"""

from __future__ import annotations

import heapq
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
from numpy.typing import NDArray

from edgemoe.base.errors import BudgetError, ConflictError, EdgemoeError, UsageError
from edgemoe.base.units import format_bytes
from edgemoe.ir import Costs, CountBound, Plan, RuleUse
from edgemoe.ir.memory import peak, room_for_weights
from edgemoe.plan.evaluate import describe_choice
from edgemoe.plan.program import Compiled, Near, compile_program
from edgemoe.rules import Rule, apply_rules, describe_rule, rule_name
from edgemoe.rules.constraints import Draft, held_by_gpu, vram_room
from edgemoe.rules.linear import Linear
from edgemoe.solvers.lagrange import absorb, relax
from edgemoe.solvers.program import Program, Solution
from edgemoe.solvers.search import SOLVERS, search, solve

DEFAULT_GAP = 1e-4
OBJECTIVES = ("mean", "worst")
NEAR_NATS = 1e-5  # of the total, for each decision that differs from the plan to stay near to (planner experiments: 1e-6 to 1e-4)
ROUGH = 0.01  # gap of a first answer that only tells whether staging copies matter
MOST_PROGRAMS = 2**28  # bytes of programs that are kept between their uses
__all__ = ["DEFAULT_GAP", "OBJECTIVES", "SOLVERS", "least_budget", "solve_plan", "sweep_sizes"]


@dataclass(frozen=True, slots=True, kw_only=True)
class _Task:
    """Everything that stays the same while budgets and staging limits are tried."""

    costs: Costs
    draft: Draft
    allowed: tuple[int, ...]  # kept counts, by index
    objective: str
    near: Near | None
    solver: str
    gap: float
    until: float | None  # time.monotonic()
    made: dict[int, Compiled] = field(default_factory=dict)  # programs without room, by their place in `allowed`

    @property
    def left(self) -> float | None:
        """Seconds that are left; None: without limit."""
        return None if self.until is None else max(0.5, self.until - time.monotonic())

    def programs(self, room: int, staging: int | None = None) -> Callable[[int], Compiled]:
        """Compiled programs by their place in `allowed`."""

        def program(i: int) -> Compiled:
            if i not in self.made:
                made = compile_program(self.costs, self.draft, self.allowed[i], objective=self.objective, near=self.near)
                self.made[i] = made
                while len(self.made) > 2 and len(self.made) * made.program.cost.nbytes > MOST_PROGRAMS:
                    del self.made[next(iter(self.made))]
            return self.made[i].within(room, staging)

        return program

    def solve(self, room: int, gap: float) -> tuple[Solution, Compiled] | None:
        """The best choice with this room, and the program that it belongs to; None when there is none."""
        compiled = self.programs(room)
        found = solve(lambda i: compiled(i).program, len(self.allowed), gap, solver=self.solver, seconds=self.left)
        return None if found is None else (found, compiled(found.count_index))

    def improve(self, room: int, staging: int, cutoff: float) -> tuple[tuple[Solution, Compiled] | None, float]:
        """The best choice that needs no larger copies and costs less than `cutoff`, if there is one; and a bound of all such choices."""
        compiled = self.programs(room, staging)
        found, bound = search(
            lambda i: compiled(i).program, len(self.allowed), self.gap, solver=self.solver, seconds=self.left, cutoff=cutoff
        )
        return (None if found is None else (found, compiled(found.count_index))), bound


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
        rules: what the plan must keep: records of rules.py, expressions of recipe.py, functions of a Problem.
        objective: least mean over the calibration domains by weight, or least cost of the "worst" domain.
        solver: highs, cbc, lagrange (near-best in milliseconds, with its bound) or exhaustive.
        gap: relative distance to the optimum that is good enough.
        seconds: wall-clock limit; then the best plan so far is returned with its proven gap (a solve under way may take some longer).
        near: stay close to this plan where it costs (nearly) nothing.
        costs_hash: what to record as the plan's origin.

    Raises:
        BudgetError: nothing fits; names the least budget, and rules that conflict.
        UsageError: unknown solver or objective, or a rule that is no rule.
    """
    if objective not in OBJECTIVES:
        raise UsageError(f"objective {objective!r} is not known", hint=f"known: {', '.join(OBJECTIVES)}")
    draft = apply_rules(costs, rules)
    task = _make_task(costs, draft, objective, _near(costs, near), solver, gap, seconds)
    found = _solve_with_staging(task, budget)
    if found is None:
        raise _explain_infeasible(task, budget, rules)
    solution, compiled = found if task.near is None else _price_without_near(task, budget, *found)
    broken = compiled.program.broken(solution.picks)
    if broken:
        raise EdgemoeError(f"the plan of solver {solver} does not hold: {'; '.join(broken)}")
    plan = _as_plan(task, budget, solution, compiled, costs_hash, rules)
    _check(task, plan, budget)
    return plan


def _make_task(costs: Costs, draft: Draft, objective: str, near: Near | None, solver: str, gap: float, seconds: float | None) -> _Task:
    until = None if seconds is None else time.monotonic() + seconds
    allowed = tuple(c for c, yes in draft.counts.items() if yes)
    return _Task(costs=costs, draft=draft, allowed=allowed, objective=objective, near=near, solver=solver, gap=gap, until=until)


def _near(costs: Costs, plan: Plan | None) -> Near | None:
    if plan is None:
        return None
    if plan.model != costs.model:
        raise UsageError("the plan to stay near to was made for another checkpoint")
    return Near(plan=plan, nats=NEAR_NATS * max(plan.q, 1e-9))


def _price_without_near(task: _Task, budget: int, solution: Solution, compiled: Compiled) -> tuple[Solution, Compiled]:
    """The same choice at its own price, bounded by the best plan of all: the nats of staying near are no part of what is promised."""
    free = replace(task, near=None, made={})
    best = _solve_with_staging(free, budget)
    if best is None:
        raise EdgemoeError("there is a plan near the earlier one, but none without it", hint="please report this")
    own = free.programs(compiled.program.room)(solution.count_index)
    cost = own.program.objective(solution.picks)
    bounded = replace(solution, cost=cost, bound=min(cost, best[0].bound), per_count=best[0].per_count)
    return replace(bounded, proven=bounded.gap <= task.gap), own


# ---------------------------------------------------------------------------------------------------------------- staging
def _beside(costs: Costs, draft: Draft) -> dict[str, int]:
    """Memory parts of main memory: with a GPU the cache and the buffers are not there."""
    return costs.memory if draft.vram is None else {**costs.memory, "kv": 0, "compute": 0}


def _solve_with_staging(task: _Task, budget: int) -> tuple[Solution, Compiled] | None:
    """Solve with no thought of staging copies; only if that plan does not fit while it loads, search over the largest copy to allow."""
    parts = _beside(task.costs, task.draft)
    for gap in (max(task.gap, ROUGH), task.gap) if task.costs.staging.any() else (task.gap,):
        found = task.solve(room_for_weights(budget, parts, 0), gap)
        if found is None:
            return None
        solution, compiled = found
        size = compiled.program.evaluate(solution.picks)[1]
        if size > room_for_weights(budget, parts, _largest_staging(task.costs, compiled, solution)):
            return _branch_on_staging(task, budget, solution)
    return found


def _branch_on_staging(task: _Task, budget: int, free: Solution) -> tuple[Solution, Compiled] | None:
    """Branch and bound over the largest staging copy that the plan may need.

    A plan whose largest copy lies between two limits has at most the room that the lower leaves, and uses only formats up to the upper: the
    relaxed program with both bounds the whole interval. Intervals are split, lowest bound first, down to single limits, solved exactly.
    `free` is the answer without thought of staging: its bounds hold here too.
    """
    limits, rooms = _staging_limits(task, budget)

    def bound(low: int, high: int, outer: NDArray[np.float64]) -> NDArray[np.float64]:
        """Bounds of the kept counts in an interval, from those of one around it; exact only for the least, which is what counts."""
        programs = task.programs(rooms[low], limits[high])
        inner = outer.copy()
        for i in np.argsort(outer, kind="stable"):
            if inner.min() < outer[i]:
                break
            program = programs(int(i)).program
            relaxed = relax(program if program.is_plain else absorb(program, free.prices), guess=free.price, filled=False)
            inner[i] = np.inf if relaxed is None else max(outer[i], relaxed.bound)
        return inner

    known = np.array([np.inf if b is None else b for b, _ in free.per_count])
    bounds = {(0, len(limits) - 1): known}
    heap = [(float(known.min()), 0, len(limits) - 1)]
    best: tuple[Solution, Compiled] | None = None
    proven = np.inf  # of what has been solved or cut off
    while heap:
        least, low, high = heapq.heappop(heap)
        late = task.until is not None and time.monotonic() > task.until
        if least == np.inf or (best is not None and (late or least >= best[0].cost * (1 - task.gap))):
            proven = min(proven, least)
            break
        if low < high:
            middle = (low + high) // 2
            for part in ((low, middle), (middle + 1, high)):
                bounds[part] = bound(*part, bounds[low, high])
                heapq.heappush(heap, (float(bounds[part].min()), *part))
            continue
        cutoff = np.inf if best is None else best[0].cost
        found, below = task.improve(rooms[low], limits[low], cutoff)
        proven, best = min(proven, below), found or best
    if best is None:
        return None
    costs = [cost for _, cost in best[0].per_count]
    per_count = tuple((bound, cost) for (bound, _), cost in zip(free.per_count, costs, strict=True))
    bounded = replace(best[0], bound=min(best[0].cost, max(proven, free.bound)), per_count=per_count)
    return replace(bounded, proven=bounded.gap <= task.gap * (1 + 1e-6)), best[1]


def _staging_limits(task: _Task, budget: int) -> tuple[list[int], list[int]]:
    """Sizes that the largest staging copy may have, rising, and the room for weights with it; of those with the same room the largest."""
    parts = _beside(task.costs, task.draft)
    largest = {room_for_weights(budget, parts, limit): limit for limit in np.unique(task.costs.staging).tolist()}
    return list(largest.values()), list(largest)


def _largest_staging(costs: Costs, compiled: Compiled, solution: Solution) -> int:
    formats, vram = compiled.formats(solution.picks), compiled.in_vram(solution.picks)
    rows = np.flatnonzero((formats >= 0) & ~vram)
    return int(costs.staging[compiled.c, rows, formats[rows]].max(initial=0))


# ---------------------------------------------------------------------------------------------------------------- results
def _as_plan(task: _Task, budget: int, solution: Solution, compiled: Compiled, costs_hash: str, rules: Sequence[Rule]) -> Plan:
    costs, draft = task.costs, task.draft
    formats, in_vram = compiled.formats(solution.picks), compiled.in_vram(solution.picks)
    kept, beside = compiled.kept(costs, solution.picks), _beside(costs, draft)
    plan = describe_choice(costs, budget, kept, formats, solver=task.solver, in_vram=in_vram, beside=beside)
    memory = dict(plan.memory)
    if draft.vram is not None:
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


def _rule_uses(task: _Task, plan: Plan, rules: Sequence[Rule]) -> tuple[RuleUse, ...]:
    """Every rule with the room that it leaves: how far its expression is from its limit (None: it is no limit)."""
    left = {b.name: -b.expression.value(task.costs, plan) for b in reversed(task.draft.bounds) if not b.expression.soft}
    if task.draft.vram is not None:
        left[task.draft.vram.name] = vram_room(task.costs, task.draft.vram) - _bytes_on_gpu(task.costs, plan)
    return tuple(RuleUse(name=rule_name(r), slack=left.get(rule_name(r))) for r in rules)


def _check(task: _Task, plan: Plan, budget: int) -> None:
    """Every promise of a finished plan, from its own numbers: bytes, counts, pins, ties and every linear rule.

    Raises:
        EdgemoeError: the solver's answer breaks one; it is not returned.
    """
    costs, draft = task.costs, task.draft
    problems = []
    if plan.memory["peak"] > budget:
        problems.append(f"peak {plan.memory['peak']} of {budget} bytes")
    for bound in draft.bounds:
        value, scale = bound.expression.value(costs, plan), _scale(bound.expression, plan)
        if not bound.expression.soft and value > 1e-8 * scale:
            problems.append(f"{bound.name} is exceeded by {value:.10g}")
    kept = np.zeros(draft.pinned.shape, bool)
    for row, experts in enumerate(plan.kept):
        kept[row, list(experts)] = True
    if (kept & (draft.pinned < 0)).any() or (~kept & (draft.pinned > 0)).any():
        problems.append("an expert that was pinned is not where it should be")
    for u, unit in enumerate(costs.units):
        if unit.name in plan.formats and not draft.offered[u, costs.formats.index(plan.formats[unit.name])]:
            problems.append(f"{unit.name} is stored as {plan.formats[unit.name]}")
    for tie in draft.ties:
        if len({plan.formats[costs.units[u].name] for u in tie}) > 1:
            problems.append(f"{costs.units[tie[0]].name} and others are not stored alike")
    if draft.max_formats and len(set(plan.formats.values())) > draft.max_formats:
        problems.append(f"{len(set(plan.formats.values()))} formats")
    if problems:
        raise EdgemoeError(f"the plan does not hold: {'; '.join(problems)}", hint="please report this")


def _scale(expression: Linear, plan: Plan) -> float:
    """What the sums of a rule can be as large as, for the rounding of floats; the programs were held to their own numbers, exactly."""
    sizes = float(np.abs(expression.size).max() + np.abs(expression.active).max()) * plan.file_size
    counts = float(np.abs(expression.keep).sum() + np.abs(expression.use).sum())
    return max(abs(expression.constant), sizes, counts, 1e-300)


# ------------------------------------------------------------------------------------------------------------- infeasible
def least_budget(costs: Costs, rules: Sequence[Rule] = ()) -> int | None:
    """Bytes of the smallest process of any plan that keeps the rules; None when no plan keeps them."""
    draft = apply_rules(costs, rules)
    return _least_budget(_make_task(costs, draft, "mean", None, "highs", 1e-6, None))


def _least_budget(task: _Task) -> int | None:
    """Least bytes: the same programs with bytes for costs and room without end; smaller staging copies may be worth larger weights."""
    parts = _beside(task.costs, task.draft)

    def least(limit: int | None) -> tuple[int, int] | None:
        """Weights and staging copy of the smallest weights whose copies are no larger than the limit."""
        compiled = task.programs(0, limit)
        found = solve(lambda i: _bytes_as_costs(compiled(i).program), len(task.allowed), 1e-9, solver="highs")
        return None if found is None else (round(found.cost), _largest_staging(task.costs, compiled(found.count_index), found))

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
    """The program whose cheapest choice is the smallest."""
    cost = np.where(np.isfinite(program.cost).all(axis=0), program.size.astype(np.float64), np.inf)[None]
    blocks = None if program.blocks is None else replace(program.blocks, curve=np.zeros_like(program.blocks.curve))
    soft = tuple(replace(s, price=0.0) for s in program.soft)
    no_size, constant = np.zeros_like(program.size), np.array([float(program.fixed)])
    return replace(program, cost=cost, size=no_size, constant=constant, fixed=0, room=1, blocks=blocks, soft=soft)


def _explain_infeasible(task: _Task, budget: int, rules: Sequence[Rule]) -> BudgetError:
    """What to tell the user: the least budget that would do, or the rules that exclude each other."""
    costs = task.costs
    least = _least_budget(task)
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
    """Rules that no plan keeps together though it could keep any of them without one (deletion filter; Chinneck 1991)."""
    needed = list(rules)
    for rule in list(rules):
        without = [r for r in needed if r is not rule]
        if least_budget(costs, without) is None:
            needed = without
    return needed


# ------------------------------------------------------------------------------------------------------------------ sweep
def sweep_sizes(costs: Costs, sizes: Sequence[int]) -> tuple[dict[str, float], ...]:
    """File size and predicted KL of a near-best plan whose weights take so many bytes of the process, for each of these sizes.

    Lagrangian answers: within a fraction of a per cent.
    """
    found = []
    task = _make_task(costs, Draft(costs), "mean", None, "lagrange", DEFAULT_GAP, None)
    for size in sizes:
        best = task.solve(size, DEFAULT_GAP)
        if best is not None:
            solution, compiled = best
            formats = compiled.formats(solution.picks)
            stored = np.flatnonzero(formats >= 0)
            beyond = int(costs.extra[compiled.c, stored, formats[stored]].sum())
            found.append({"file_size": float(size - beyond), "predicted_kl": costs.predict_kl(solution.cost)})
    return tuple(found)
