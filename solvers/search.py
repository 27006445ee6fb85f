"""The whole search: every kept count is bounded by the Lagrangian, those that could still win are solved by PuLP.

A program with few binaries is solved unit by unit, a large one by columns; a plain one whose Lagrangian choice is within the asked gap of
its bound is proven already.  With rules, the prices found for one kept count bound all others at once.
"""

from __future__ import annotations

import time
from dataclasses import replace

import numpy as np

from edgemoe.errors import UsageError
from edgemoe.solvers.columns import all_items, generate, solve_columns
from edgemoe.solvers.engine import ENGINES
from edgemoe.solvers.ilp import solve_items
from edgemoe.solvers.lagrange import Relaxed, minimise, relax
from edgemoe.solvers.program import Program, Programs, Solution

MONOLITH = 20_000  # binaries up to which a program with blocks is solved unit by unit
SOLVERS = (*ENGINES, "lagrange", "exhaustive")


def solve(
    programs: Programs,
    n_counts: int,
    gap: float,
    *,
    solver: str = "highs",
    seconds: float | None = None,
    cutoff: float = np.inf,
) -> Solution | None:
    """The best choice over all kept counts; None when nothing fits budget and rules.

    Args:
        programs: the program of each kept count, by its place.
        n_counts: how many kept counts there are.
        gap: relative distance to the optimum at which to stop.
        solver: highs, cbc, lagrange (the relaxation's answer, no integer program) or exhaustive.
        seconds: wall-clock limit; the best choice so far is returned with its proven gap.
        cutoff: nats; choices that cost more are of no interest, None says that there is no better one (by more than the gap).

    Raises:
        UsageError: the solver cannot honour a rule, or is not known.
    """
    if solver not in SOLVERS:
        raise UsageError(f"solver {solver!r} is not known", hint=f"known: {', '.join(SOLVERS)}")
    if solver == "exhaustive":
        from edgemoe.solvers import exhaustive

        return exhaustive.solve(programs, n_counts)
    until = None if seconds is None else time.monotonic() + seconds
    known: dict[int, Relaxed] = {}
    for c in range(n_counts):
        program = programs(c)
        if solver == "lagrange" and not program.is_plain:
            name = program.rows[0].name if program.rows else "at most so many formats" if program.max_formats else "objective: worst"
            raise UsageError(f"solver lagrange cannot honour the rule {name!r}", hint="use --solver highs")
        relaxed = relax(program)
        if relaxed is not None:
            known[c] = relaxed
    if solver != "lagrange":
        _close_gaps(programs, known, gap, solver, until, cutoff)
    found = _conclude(known, n_counts, gap)
    return found if found is not None and found.cost < cutoff else None


def _conclude(known: dict[int, Relaxed], n_counts: int, gap: float) -> Solution | None:
    solved = {c: r for c, r in known.items() if r.picks is not None}
    if not solved:
        return None
    best = min(solved, key=lambda c: (solved[c].cost, c))
    picks, cost, bound = solved[best].picks, solved[best].cost, min(r.bound for r in known.values())
    assert picks is not None
    return Solution(
        count_index=best,
        picks=picks,
        cost=cost,
        bound=min(bound, cost),
        proven=bound >= cost - gap * abs(cost),
        price=solved[best].prices.byte,
        per_count=tuple(
            (r.bound, r.cost if np.isfinite(r.cost) else None) if (r := known.get(c)) else (None, None) for c in range(n_counts)
        ),
    )


def _told(relaxed: Relaxed | None) -> tuple[float | None, float | None]:
    """Bound and best cost of a kept count, None for what is not known."""
    return (None, None) if relaxed is None else (relaxed.bound, relaxed.cost if np.isfinite(relaxed.cost) else None)


def _close_gaps(programs: Programs, known: dict[int, Relaxed], gap: float, engine: str, until: float | None, cutoff: float) -> None:
    """Solve kept counts, lowest bound first, until no other can win; `known` is updated in place."""
    done: set[int] = set()
    while len(done) < len(known):
        c = min((c for c in known if c not in done), key=lambda c: (known[c].bound, c))
        best = min(cutoff, *(r.cost for r in known.values()))
        if known[c].bound >= best - gap * abs(best) or (until is not None and time.monotonic() > until):
            return  # sorted by bound: no later count can win either
        done.add(c)
        program = programs(c)
        if not program.is_plain:
            known[c], feasible = _bound_with_rules(programs, known, c, engine)
            if not feasible:
                known.pop(c)
                done.discard(c)
                continue
            if known[c].bound >= best - gap * abs(best):
                continue
        left = None if until is None else max(1.0, until - time.monotonic())
        found = solve_program(program, known[c], engine, gap, left)
        if found is None:
            known.pop(c)
            done.discard(c)
        else:
            known[c] = found


def _bound_with_rules(programs: Programs, known: dict[int, Relaxed], c: int, engine: str) -> tuple[Relaxed, bool]:
    """Bound one kept count with all rules; its prices then bound the others."""
    program = programs(c)
    relaxed, _, feasible = generate(program, known[c], engine)
    if feasible:
        for other in known:
            if other != c and known[other].bound < relaxed.bound:
                candidate = programs(other)
                if len(candidate.rows) == len(program.rows):
                    known[other] = replace(known[other], bound=max(known[other].bound, minimise(candidate, relaxed.prices)[0]))
    return relaxed, feasible


def solve_program(program: Program, known: Relaxed, engine: str, gap: float, seconds: float | None) -> Relaxed | None:
    """One program by PuLP, unit by unit or by columns; None when the rules cannot hold."""
    if program.is_plain and known.bound >= known.cost - gap * abs(known.cost):
        return known
    binaries = int(np.isfinite(program.cost[0]).sum())
    if program.blocks is None or binaries <= MONOLITH:
        return solve_items(program, all_items(program, None), known, engine, gap, exact=True, seconds=seconds)
    known, pool, feasible = generate(program, known, engine)
    if pool is None or not feasible:
        return None
    return solve_columns(program, known, pool, engine, gap, seconds)
