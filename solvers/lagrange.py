"""Lagrangian bisection: for one kept count, a valid lower bound and a good feasible choice in milliseconds.

For a price lam >= 0 (nats per byte) every unit picks alone the option with least cost + lam * size.  Whatever lam,
sum of these minima - lam * room is a lower bound; the best lam is found by bisection of its logarithm (Everett 1963).
"""

from __future__ import annotations

import heapq
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from edgemoe.solvers.program import Program

STEPS = 80


@dataclass(frozen=True, slots=True)
class Relaxed:
    """Bound and feasible choice of one kept count."""

    bound: float
    cost: float
    picks: NDArray[np.int64]


def relax_count(program: Program, c: int) -> Relaxed | None:
    """Bound and choice for one kept count; None when its smallest plan does not fit."""
    room = program.room - int(program.fixed[c])
    if program.least_size(c) > program.room:
        return None
    cost = program.cost[c]
    size = np.where(np.isfinite(cost), program.size[c], 0).astype(np.float64)
    rows = np.arange(len(cost))
    free = np.lexsort((size, cost), axis=1)[:, 0]  # cheapest in nats, then in bytes
    if size[rows, free].sum() <= room:
        total = float(program.drop[c] + cost[rows, free].sum())
        return Relaxed(total, total, free)
    low, high = 1e-25, 16 * float(cost[np.isfinite(cost)].max()) / max(float(size[size > 0].min()), 1) + 1e-20
    bound, best = -np.inf, None
    for _ in range(STEPS):
        price = np.sqrt(low * high)
        picks = (cost + price * size).argmin(axis=1)
        used = size[rows, picks].sum()
        bound = max(bound, float((cost + price * size)[rows, picks].sum() - price * room))
        if used <= room:
            high, best = price, picks
        else:
            low = price
        if high / low < 1 + 1e-12:
            break
    if best is None:
        best = np.where(np.isfinite(cost), size, np.inf).argmin(axis=1)
    picks = fill(program, c, best)
    return Relaxed(float(program.drop[c]) + bound, program.evaluate(c, picks)[0], picks)


def fill(program: Program, c: int, picks: NDArray[np.int64]) -> NDArray[np.int64]:
    """Spend the bytes that are left: best improvement per byte first, whatever fits."""
    picks = picks.copy()
    left = program.room - program.evaluate(c, picks)[1]
    heap: list[tuple[float, int, int, int]] = []

    def push(u: int) -> None:
        now = picks[u]
        for f in program.options(c, u):
            gain = program.cost[c, u, now] - program.cost[c, u, f]
            extra = int(program.size[c, u, f] - program.size[c, u, now])
            if gain > 0 and extra <= left:
                heapq.heappush(heap, (-gain / max(extra, 1), u, int(f), int(now)))

    for u in range(len(picks)):
        push(u)
    while heap:
        _, u, f, then = heapq.heappop(heap)
        extra = int(program.size[c, u, f] - program.size[c, u, picks[u]])
        if then == picks[u] and extra <= left:
            picks[u] = f
            left -= extra
            push(u)
    return picks
