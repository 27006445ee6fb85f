"""Costs, a budget -> Plan: the integer program of `solvers`, the memory of the process, and a check that shares nothing with the solver."""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from dataclasses import replace
from functools import partial

import numpy as np

from edgemoe.errors import BudgetError, EdgemoeError, UsageError
from edgemoe.ir import Costs, CountBound, Plan
from edgemoe.memory import peak, room_for_weights
from edgemoe.solvers import exhaustive, ilp
from edgemoe.solvers.lagrange import relax_count
from edgemoe.solvers.program import Program, Solution, Solver
from edgemoe.units import format_bytes

SOLVERS: dict[str, Solver] = {"highs": ilp.solve, "cbc": partial(ilp.solve, engine="cbc"), "exhaustive": exhaustive.solve}
DEFAULT_GAP = 1e-4


def solve_plan(costs: Costs, budget: int, *, solver: str = "highs", gap: float = DEFAULT_GAP, costs_hash: str = "") -> Plan:
    """The plan with least predicted KL whose process never holds more than `budget` bytes.

    Args:
        costs: the price list; its memory parts say what the process needs beside the weights.
        budget: bytes of the process at its peak.
        solver: highs, cbc or exhaustive.
        gap: relative distance to the optimum that is good enough.
        costs_hash: what to record as the plan's origin.

    Raises:
        BudgetError: nothing fits; names the least budget.
        UsageError: unknown solver.
    """
    if solver not in SOLVERS:
        raise UsageError(f"solver {solver!r} is not known", hint=f"known: {', '.join(SOLVERS)}")
    solution, program = _solve_with_staging(costs, budget, SOLVERS[solver], gap)
    broken = ilp.replay(program, solution)
    if broken:
        raise EdgemoeError(f"the plan of solver {solver} does not hold: {'; '.join(broken)}")
    return _as_plan(costs, budget, solver, solution, costs_hash)


def least_budget(costs: Costs) -> int:
    """Bytes of the smallest process that any plan of these costs makes."""
    program = _program(costs, 0)
    sizes = [program.least_size(c) for c in range(len(costs.counts))]
    parts = {**costs.memory, "weights": min(sizes), "staging": 0}
    return peak(parts)


def sweep_sizes(costs: Costs, sizes: Sequence[int]) -> tuple[dict[str, float], ...]:
    """Predicted KL of a near-best plan for each file size (Lagrangian answers: within a fraction of a per cent)."""
    found = []
    for size in sizes:
        program = _program(costs, size)
        options = [r for c in range(len(costs.counts)) if (r := relax_count(program, c))]
        if options:
            best = min(r.cost for r in options)
            found.append({"file_size": float(size), "predicted_kl": costs.predict_kl(best)})
    return tuple(found)


def _program(costs: Costs, room: int, staging: int | None = None) -> Program:
    """The program with `room` bytes for the file; formats whose staging copy is larger than `staging` are not offered."""
    cost = costs.cost
    if staging is not None:
        cost = np.where(costs.staging <= staging, cost, np.inf)
    return Program(cost=cost, size=costs.size, drop=costs.drop_cost.sum(axis=1), fixed=costs.fixed_size, room=room)


def _solve_with_staging(costs: Costs, budget: int, solve: Solver, gap: float) -> tuple[Solution, Program]:
    """Solve with no thought of staging copies; only if that plan does not fit while it loads, search over the largest copy to allow."""
    program = _program(costs, room_for_weights(budget, costs.memory, 0))
    solution = solve(program, gap)
    if solution is None:
        least = least_budget(costs)
        raise BudgetError(
            f"no plan of {costs.model_name} fits {format_bytes(budget)}: the least is {format_bytes(least)} ({least} bytes)",
            hint=f"ask for --memory {least}B or more, or a smaller --context",
        )
    size = program.evaluate(solution.count_index, solution.picks)[1]
    if size <= room_for_weights(budget, costs.memory, _largest_staging(costs, solution)):
        return solution, program
    return _branch_on_staging(costs, budget, solve, gap)


def _branch_on_staging(costs: Costs, budget: int, solve: Solver, gap: float) -> tuple[Solution, Program]:
    """Branch and bound over the largest staging copy that the plan may need.

    A plan whose largest copy lies between two limits has at most the room that the lower leaves, and uses only formats up to the upper: the
    relaxed program with both bounds the whole interval. Intervals are split, lowest bound first, down to single limits, solved exactly.
    """
    limits = np.unique(costs.staging).tolist()

    def trial(low: int, high: int) -> Program:
        return _program(costs, room_for_weights(budget, costs.memory, limits[low]), limits[high])

    def bound(low: int, high: int) -> float:
        program = trial(low, high)
        found = [relax_count(program, c) for c in range(len(costs.counts))]
        return min((r.bound for r in found if r is not None), default=np.inf)

    heap = [(bound(0, len(limits) - 1), 0, len(limits) - 1)]
    best: tuple[Solution, Program] | None = None
    proven = np.inf  # of what has been solved or cut off
    while heap:
        least, low, high = heapq.heappop(heap)
        if least == np.inf or (best is not None and least >= best[0].cost * (1 - gap)):
            proven = min(proven, least)
            break
        if low < high:
            middle = (low + high) // 2
            for part in ((low, middle), (middle + 1, high)):
                heapq.heappush(heap, (max(least, bound(*part)), *part))
            continue
        program = trial(low, low)
        found = solve(program, gap)
        if found is not None:
            proven = min(proven, found.bound)
            if best is None or found.cost < best[0].cost:
                best = found, program
    if best is None:
        raise BudgetError(f"no plan of {costs.model_name} fits {format_bytes(budget)} while it loads", hint="ask for a little more memory")
    bounded = replace(best[0], bound=min(best[0].cost, proven))
    return replace(bounded, proven=bounded.gap <= gap), best[1]


def _largest_staging(costs: Costs, solution: Solution) -> int:
    rows = np.arange(len(solution.picks))
    return int(costs.staging[solution.count_index, rows, solution.picks].max())


def _as_plan(costs: Costs, budget: int, solver: str, solution: Solution, costs_hash: str) -> Plan:
    c = solution.count_index
    rows = np.arange(len(solution.picks))
    sizes = costs.size[c, rows, solution.picks]
    file_size = int(costs.fixed_size[c] + sizes.sum())
    memory = {**costs.memory, "weights": file_size, "staging": _largest_staging(costs, solution)}
    context = memory.pop("context")
    return Plan(
        model=costs.model,
        model_name=costs.model_name,
        costs=costs_hash or costs.stats,
        target=costs.target,
        budget=budget,
        context=context,
        solver=solver,
        count=costs.counts[c],
        n_experts=costs.n_experts,
        top_k=costs.top_k,
        kept=tuple(tuple(int(e) for e in np.flatnonzero(costs.kept[c, layer])) for layer in range(costs.kept.shape[1])),
        formats={u.name: costs.formats[f] for u, f in zip(costs.units, solution.picks, strict=True)},
        sizes={u.name: int(s) for u, s in zip(costs.units, sizes, strict=True)},
        file_size=file_size,
        memory={**memory, "peak": peak(memory)},
        q=solution.cost,
        drop_q=float(costs.drop_cost[c].sum()),
        predicted_kl=costs.predict_kl(solution.cost),
        bound=solution.bound,
        gap=solution.gap,
        proven=solution.proven,
        counts=tuple(CountBound(count=n, bound=b, cost=q) for n, (b, q) in zip(costs.counts, solution.per_count, strict=True)),
    )
