"""Every plan there is, for programs small enough to be sure: the oracle of the other solvers."""

from __future__ import annotations

import itertools

import numpy as np

from edgemoe.errors import UsageError
from edgemoe.solvers.program import Program, Solution

MAX_PLANS = 2_000_000


def solve(program: Program, gap: float = 0.0) -> Solution | None:
    """The best of all plans; None when nothing fits.

    Raises:
        UsageError: more than two million plans.
    """
    n_counts, n_units, n_formats = program.cost.shape
    if n_counts * n_formats**n_units > MAX_PLANS:
        raise UsageError(f"{n_counts} x {n_formats}^{n_units} plans are too many to try", hint="use --solver highs")
    best: tuple[float, int, tuple[int, ...]] | None = None
    per_count: list[tuple[float | None, float | None]] = []
    for c in range(n_counts):
        least: float | None = None
        for picks in itertools.product(range(n_formats), repeat=n_units):
            cost, size = program.evaluate(c, np.array(picks))
            if size <= program.room and np.isfinite(cost) and (least is None or cost < least):
                least = cost
                if best is None or cost < best[0]:
                    best = (cost, c, picks)
        per_count.append((least, least))
    if best is None:
        return None
    cost, c, picks = best
    return Solution(count_index=c, picks=np.array(picks), cost=cost, bound=cost, proven=True, per_count=tuple(per_count))
