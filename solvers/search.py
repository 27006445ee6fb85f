"""This module runs the whole search: the Lagrangian bounds every kept count, and PuLP solves the counts that could still win.

A program with few binaries is solved unit by unit, and a large one by columns.  A plain program whose Lagrangian choice is within the asked
gap of its bound is proven already.  With rules, the prices found for one kept count bound all others at once.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from edgemoe.base.errors import UnsolvedError, UsageError
from edgemoe.solvers.columns import ColumnPool, all_items, generate, solve_columns
from edgemoe.solvers.effort import Effort
from edgemoe.solvers.engine import ENGINES
from edgemoe.solvers.ilp import solve_items
from edgemoe.solvers.lagrange import Relaxed, absorb, fill, relax
from edgemoe.solvers.program import Program, Programs, Row, Solution

MONOLITH = 20_000  # binaries up to which a program with blocks is solved unit by unit
ROUNDING = 1e-9  # relative, of sums of floats
STRICTER = (1.0, 1.001, 1.003, 1.01, 1.03, 1.1, 1.3)  # multiples of the best prices of rules, at which a choice that keeps them is sought
SOLVERS = (*ENGINES, "lagrange", "exhaustive")


def solve(programs: Programs, n_counts: int, effort: Effort) -> Solution | None:
    """The best choice over all kept counts; None if it is proven that no choice fits budget and rules.

    Args:
        programs: the program of each kept count, by its place.
        n_counts: how many kept counts there are.
        effort: solver, gap and time limit, after which the best choice so far is returned with its proven gap.

    Raises:
        UsageError: the solver cannot honour a rule, or is not known.
        UnsolvedError: the solver found no choice and did not prove that there is none.
    """
    found, bound = search(programs, n_counts, effort)
    if found is None and bound < np.inf:
        raise UnsolvedError(
            f"the solver {effort.solver} found no plan that keeps every rule, and did not prove that there is none",
            hint="give it more time, or rules that leave a little room",
        )
    return found


def search(programs: Programs, n_counts: int, effort: Effort, *, cutoff: float = np.inf) -> tuple[Solution | None, float]:
    """The best choice that costs less than `cutoff`, if one was found, and a bound (nats) that no choice goes below.

    The bound is inf if no choice fits.  Choices within the gap of the cutoff are not sought.
    """
    solver = effort.solver
    if solver not in SOLVERS:
        raise UsageError(f"solver {solver!r} is not known", hint=f"known: {', '.join(SOLVERS)}")
    if solver == "exhaustive":
        from edgemoe.solvers import exhaustive

        best = exhaustive.solve(programs, n_counts)
        return (best if best is not None and best.cost < cutoff else None), (np.inf if best is None else best.cost)
    known: dict[int, Relaxed] = {}
    guess = 0.0
    for c in range(n_counts):
        program = programs(c)
        if solver == "lagrange" and not program.is_plain:
            name = program.rows[0].name if program.rows else "at most so many formats" if program.max_formats else "objective: worst"
            raise UsageError(f"solver lagrange cannot honour the rule {name!r}", hint="use --solver highs")
        if any(never_holds(program, row) for row in program.rows):
            continue
        relaxed = relax(program, guess=guess)
        if relaxed is not None:
            known[c], guess = relaxed, relaxed.prices.byte
    if solver != "lagrange":
        _close_gaps(programs, known, effort, cutoff)
    found = _conclude(known, n_counts, effort.gap)
    bound = min((r.bound for r in known.values()), default=np.inf)
    return (found if found is not None and found.cost < cutoff else None), bound


def never_holds(program: Program, row: Row) -> bool:
    """Whether it is proven that no choice within the bytes keeps this rule, even without the other rules."""
    if row.soft.any():
        return False
    alone = replace(program.with_costs(row.coef, 0.0), rows=(), soft=(), max_formats=0)
    relaxed = relax(alone, filled=False)
    return relaxed is None or relaxed.bound > row.limit + ROUNDING * max(abs(row.limit), abs(relaxed.bound))


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
        prices=solved[best].prices,
        per_count=tuple(
            (r.bound, r.cost if np.isfinite(r.cost) else None) if (r := known.get(c)) else (None, None) for c in range(n_counts)
        ),
    )


def _close_gaps(programs: Programs, known: dict[int, Relaxed], effort: Effort, cutoff: float) -> None:
    """Solve kept counts, lowest bound first, until no other can win; `known` is updated in place."""
    done: set[int] = set()
    gap = effort.gap
    while len(done) < len(known):
        c = min((c for c in known if c not in done), key=lambda c: (known[c].bound, c))
        best = min(cutoff, *(r.cost for r in known.values()))
        if known[c].bound >= best - gap * abs(best) or effort.is_over:
            return  # sorted by bound: no later count can win either
        done.add(c)
        program, pool = programs(c), None
        if not program.is_plain:
            known[c], pool, possible = _bound_with_rules(programs, known, c, effort)
            if not possible:
                known.pop(c)
                done.discard(c)
                continue
            best = min(best, known[c].cost)
            if known[c].bound >= best - gap * abs(best):
                continue
        found = solve_program(program, known[c], effort, pool)
        if found is None:
            known.pop(c)
            done.discard(c)
        else:
            known[c] = found


def _bound_with_rules(programs: Programs, known: dict[int, Relaxed], c: int, effort: Effort) -> tuple[Relaxed, ColumnPool | None, bool]:
    """Bound one kept count with all rules; the prices found then bound the other counts."""
    program = programs(c)
    relaxed, pool, possible = generate(program, known[c], effort)
    if possible:
        relaxed = _round(program, relaxed)
        for other in known:
            if other != c and known[other].bound < relaxed.bound:
                priced = relax(absorb(programs(other), relaxed.prices), guess=relaxed.prices.byte, filled=False)
                if priced is not None and priced.bound > known[other].bound:
                    known[other] = replace(known[other], bound=min(priced.bound, known[other].cost))
    return relaxed, pool, possible


def _round(program: Program, known: Relaxed) -> Relaxed:
    """A choice that also keeps the rules, if somewhat higher prices of the rules lead to one."""
    found = known
    for factor in STRICTER:
        prices = replace(known.prices, rows=known.prices.rows * factor)
        near = relax(absorb(program, prices), guess=known.prices.byte, filled=False)
        if near is not None and near.picks is not None and not program.broken(near.picks):
            picks = fill(program, near.picks)
            if program.objective(picks) < found.cost:
                found = replace(found, picks=picks, cost=program.objective(picks))
    return replace(found, bound=min(found.bound, found.cost))


def solve_program(program: Program, known: Relaxed, effort: Effort, pool: ColumnPool | None = None) -> Relaxed | None:
    """Solve one program by PuLP, unit by unit or by columns; return None if the rules cannot hold."""
    if program.is_plain and known.bound >= known.cost - effort.gap * abs(known.cost):
        return known
    binaries = int(np.isfinite(program.cost[0]).sum())
    if program.blocks is None or binaries <= MONOLITH:
        return solve_items(program, all_items(program, None, known), known, effort, exact=True)
    if pool is None:
        known, pool, possible = generate(program, known, effort)
        if pool is None or not possible:
            return None
    return solve_columns(program, known, pool, effort)
