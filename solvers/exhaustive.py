"""This module tries every plan of a small program, and is the oracle of the other solvers."""

from __future__ import annotations

import itertools

import numpy as np

from edgemoe.base.errors import UsageError
from edgemoe.solvers.program import Prices, Program, Programs, Solution

MAX_PLANS = 2_000_000


def solve(programs: Programs, n_counts: int) -> Solution | None:
    """The best of all plans, or None if no plan fits.

    Raises:
        UsageError: more than two million plans.
    """
    best: tuple[float, int, tuple[int, ...]] | None = None
    per_count: list[tuple[float | None, float | None]] = []
    for c in range(n_counts):
        program = programs(c)
        options = [np.flatnonzero(np.isfinite(program.cost[:, u]).all(axis=0)).tolist() for u in range(program.cost.shape[1])]
        if np.prod([float(len(o)) for o in options]) * n_counts > MAX_PLANS:
            raise UsageError("there are too many plans to try each", hint="use --solver highs")
        least = _best_of(program, options)
        per_count.append((least[0], least[0]) if least else (None, None))
        if least and (best is None or least[0] < best[0]):
            best = (least[0], c, least[1])
    if best is None:
        return None
    cost, c, picks = best
    return Solution(
        count_index=c,
        picks=np.array(picks, np.int64),
        cost=cost,
        bound=cost,
        proven=True,
        prices=Prices(byte=0.0, rows=np.zeros(0), objectives=np.zeros(0)),
        per_count=tuple(per_count),
    )


def _best_of(program: Program, options: list[list[int]]) -> tuple[float, tuple[int, ...]] | None:
    best: tuple[float, tuple[int, ...]] | None = None
    for choice in itertools.product(*options):
        picks = np.array(choice, np.int64)
        if program.evaluate(picks)[1] <= program.room and not program.broken(picks):
            cost = program.objective(picks)
            if best is None or cost < best[0]:
                best = (cost, choice)
    return best
