"""This module searches over the largest copy that loading makes, because a plan must also fit while it loads."""

from __future__ import annotations

import heapq
from dataclasses import replace

import numpy as np

from edgemoe.base.types import F64
from edgemoe.ir import Costs
from edgemoe.ir.memory import room_for_weights
from edgemoe.plan.program import Compiled
from edgemoe.plan.task import ROUGH, Task, memory_beside_weights
from edgemoe.solvers.lagrange import absorb, relax
from edgemoe.solvers.program import Solution


def solve_with_staging(task: Task, budget: int) -> tuple[Solution, Compiled] | None:
    """Solve without staging copies first; only if the plan does not fit while it loads, search over the largest allowed copy."""
    parts = memory_beside_weights(task.costs, task.constraints)
    for gap in (max(task.effort.gap, ROUGH), task.effort.gap) if task.costs.staging.any() else (task.effort.gap,):
        found = task.solve(room_for_weights(budget, parts, 0), gap)
        if found is None:
            return None
        solution, compiled = found
        size = compiled.program.evaluate(solution.picks)[1]
        if size > room_for_weights(budget, parts, largest_staging(task.costs, compiled, solution)):
            return _branch_on_staging(task, budget, solution)
    return found


def _branch_on_staging(task: Task, budget: int, free: Solution) -> tuple[Solution, Compiled] | None:
    """Branch and bound over the largest staging copy that the plan may need.

    A plan whose largest copy lies between two limits has at most the room that the lower limit leaves, and uses only formats up to the
    upper limit.  The relaxed program with both of these properties therefore bounds the whole interval.  Intervals are split, lowest bound
    first, down to single limits, which are solved exactly.  `free` is the answer without staging, whose bounds hold here too.
    """
    limits, rooms = _staging_limits(task, budget)

    def bound(low: int, high: int, outer: F64) -> F64:
        """Bounds of the kept counts in an interval, from those of an interval around it; only the least bound is exact, and it decides."""
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
    proven = np.inf  # least bound of the intervals that were solved or cut off
    while heap:
        least, low, high = heapq.heappop(heap)
        if least == np.inf or (best is not None and (task.effort.is_over or least >= best[0].cost * (1 - task.effort.gap))):
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
    return replace(bounded, proven=bounded.gap <= task.effort.gap * (1 + 1e-6)), best[1]


def _staging_limits(task: Task, budget: int) -> tuple[list[int], list[int]]:
    """Possible sizes of the largest staging copy, rising, and the room for weights with each; of sizes with the same room the largest."""
    parts = memory_beside_weights(task.costs, task.constraints)
    largest = {room_for_weights(budget, parts, limit): limit for limit in np.unique(task.costs.staging).tolist()}
    return list(largest.values()), list(largest)


def largest_staging(costs: Costs, compiled: Compiled, solution: Solution) -> int:
    """Bytes of the largest copy that loading this choice makes in main memory."""
    formats, vram = compiled.formats(solution.picks), compiled.in_vram(solution.picks)
    rows = np.flatnonzero((formats >= 0) & ~vram)
    return int(costs.staging[compiled.count_place, rows, formats[rows]].max(initial=0))
