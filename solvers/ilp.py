"""The integer program in PuLP: every kept count is bounded by the Lagrangian, those that could still win are solved exactly.

For a kept count c, with options O_u of unit u:

    variables    x[u, f] in {0, 1}                                    unit u is stored in format f
    minimise     sum_u sum_f scale * cost[c, u, f] * x[u, f]          scaled so that the best known plan costs 10^4 ...
    subject to   sum_f x[u, f] = 1                        for each u
                 sum_u sum_f size[c, u, f] / room * x[u, f] <= 1      ... and bytes so that the room is 1:
                                                                      solvers go wrong on coefficients near their tolerances
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np

from edgemoe.errors import MachineError
from edgemoe.solvers.lagrange import Relaxed, fill, relax_count
from edgemoe.solvers.program import Program, Solution

SCALE = 1e4


def solve(program: Program, gap: float, *, engine: str = "highs") -> Solution | None:
    """The best plan over all kept counts, with proof; None when nothing fits.

    Args:
        program: the numbers.
        gap: relative distance to the optimum at which to stop.
        engine: "highs" or "cbc".

    Raises:
        MachineError: the engine is not installed.
    """
    relaxed = [relax_count(program, c) for c in range(len(program.drop))]
    known: dict[int, Relaxed] = {c: r for c, r in enumerate(relaxed) if r is not None}
    if not known:
        return None
    best_count = min(known, key=lambda c: (known[c].cost, c))
    best = known[best_count].cost
    bounds = {c: r.bound for c, r in known.items()}
    costs = {c: r.cost for c, r in known.items()}
    picks = {c: r.picks for c, r in known.items()}
    for c in sorted(known, key=lambda c: (bounds[c], c)):
        if bounds[c] >= best - gap * abs(best):
            break  # sorted by bound: no later count can win either
        solved = solve_count(program, c, known[c], gap, engine)
        bounds[c] = max(bounds[c], solved.bound)
        if solved.cost < costs[c]:
            costs[c], picks[c] = solved.cost, solved.picks
        if costs[c] < best:
            best, best_count = costs[c], c
    bound = min(bounds.values())
    return Solution(
        count_index=best_count,
        picks=picks[best_count],
        cost=best,
        bound=min(bound, best),
        proven=bound >= best - gap * abs(best),
        per_count=tuple((bounds.get(c), costs.get(c)) for c in range(len(relaxed))),
    )


def solve_count(program: Program, c: int, start: Relaxed, gap: float, engine: str) -> Relaxed:
    """One kept count by PuLP; never worse than the start, and its bound is the solver's own."""
    import pulp

    room = program.room - int(program.fixed[c])
    variable_part = max(start.cost - float(program.drop[c]), 1e-30)
    scale = SCALE / variable_part
    problem = pulp.LpProblem("formats", pulp.LpMinimize)
    options = [program.options(c, u) for u in range(len(start.picks))]
    x = [[problem.add_variable(f"x_{u}_{f}", cat="Binary") for f in offered] for u, offered in enumerate(options)]
    terms = [(x[u][i], u, f) for u, offered in enumerate(options) for i, f in enumerate(offered)]
    problem += pulp.LpAffineExpression([(v, float(program.cost[c, u, f]) * scale) for v, u, f in terms])
    problem += pulp.LpAffineExpression([(v, int(program.size[c, u, f]) / room) for v, u, f in terms]) <= 1, "bytes"
    for u, choices in enumerate(x):
        problem += pulp.lpSum(choices) == 1, f"one_format_{u}"
    with _silence():
        status = problem.solve(_engine(engine, gap))
    if problem.sol_status not in (pulp.LpSolutionOptimal, pulp.LpSolutionIntegerFeasible) or status != pulp.LpStatusOptimal:
        return start
    picks = np.array([offered[int(np.argmax([v.value() or 0.0 for v in choices]))] for offered, choices in zip(options, x, strict=True)])
    if program.evaluate(c, picks)[1] > program.room:  # within the solver's tolerance, not within the budget
        return start
    picks = fill(program, c, picks)
    cost = program.evaluate(c, picks)[0]
    bound = float(program.drop[c]) + _dual_bound(problem, scale, variable_part, gap)
    return Relaxed(bound, cost, picks) if cost < start.cost else Relaxed(bound, start.cost, start.picks)


@contextmanager
def _silence() -> Iterator[None]:
    """Keep the solver's banner off stdout, which is for results."""
    sys.stdout.flush()
    saved, null = os.dup(1), os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(null, 1)
        yield
    finally:
        os.dup2(saved, 1)
        os.close(saved)
        os.close(null)


def _engine(name: str, gap: float) -> Any:
    import pulp

    if name == "highs":
        engine = pulp.HiGHS(msg=False, threads=1, gapRel=gap / 4, gapAbs=0.0, random_seed=0)
    elif name == "cbc":
        engine = pulp.COIN_CMD(msg=False, threads=1, gapRel=gap / 4)
    else:
        raise MachineError(f"solver {name!r} is not known", hint="use highs or cbc")
    if not engine.available():
        raise MachineError(f"the solver {name} is not installed", hint="pip install highspy" if name == "highs" else "install cbc")
    return engine


def _dual_bound(problem: Any, scale: float, variable_part: float, gap: float) -> float:
    """The solver's proven bound in nats: HiGHS tells it, of others the asked gap is known."""
    info = getattr(getattr(problem, "solverModel", None), "getInfo", None)
    if info is not None:
        return float(info().mip_dual_bound) / scale
    return float(problem.objective.value()) / scale * (1 - gap / 4)


def replay(program: Program, solution: Solution) -> list[str]:
    """What a plan breaks when its numbers are added up afresh; empty when it keeps every promise."""
    cost, size = program.evaluate(solution.count_index, solution.picks)
    broken = []
    if size > program.room:
        broken.append(f"takes {size} bytes of {program.room}")
    if not np.isfinite(cost) or abs(cost - solution.cost) > 1e-9 * max(abs(cost), 1e-12):
        broken.append(f"costs {cost} nats, not {solution.cost}")
    if solution.bound > solution.cost * (1 + 1e-12) + 1e-15:
        broken.append(f"bound {solution.bound} lies above its cost {solution.cost}")
    return broken
