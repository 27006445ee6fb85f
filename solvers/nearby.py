"""The options that can matter once prices are known -> an integer program of a bounded size.

At the prices of the relaxation every option has a distance: by how much it is dearer, in reduced nats, than what the relaxation picks.  The
nearest options are kept, so the answer is near-best and the relaxation's bound says how near.  Single experts change places this way, which
whole-layer columns cannot express: several objectives need that.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from edgemoe.base.types import F64
from edgemoe.solvers.ilp import Items, unit_items
from edgemoe.solvers.lagrange import absorb, minimise
from edgemoe.solvers.program import DROP, Prices, Program


def nearby_items(program: Program, prices: Prices, most: int) -> Items:
    """What the relaxation picks and the `most` options nearest to it, a set for every unit."""
    distance = _distances(program, prices)
    others = np.sort(distance[np.isfinite(distance) & (distance > 0)])
    near = distance <= (others[min(most, len(others)) - 1] if len(others) else 0.0)
    cost = np.where(near[None], program.cost, np.inf)
    return unit_items(replace(program, cost=cost), np.arange(cost.shape[1]))


def _distances(program: Program, prices: Prices) -> F64:
    """By how much each option is dearer than the relaxation's own [U, O]; dropping and keeping are compared across an expert's layer."""
    plain = program if program.is_plain else absorb(program, prices)
    reduced = plain.cost[0] + prices.byte * program.size
    picks = minimise(program, prices)[1]
    n = program.n_experts
    least = np.where(np.isfinite(reduced), reduced, np.inf)
    distance: F64 = np.full(least.shape, np.inf)
    distance[n:] = least[n:] - least[n:].min(axis=1, keepdims=True)
    if program.blocks:
        b, size = program.blocks.n, program.blocks.size
        keep = least[:n, DROP + 1 :].min(axis=1)
        with np.errstate(invalid="ignore"):
            saves = np.where(np.isinf(least[:n, DROP]), np.inf, np.where(np.isinf(keep), -np.inf, least[:n, DROP] - keep)).reshape(b, size)
        gone = (picks[:n] == DROP).reshape(b, size)
        last = np.where(gone, saves, -np.inf).max(axis=1)
        first = np.where(gone, np.inf, saves).min(axis=1)
        edge = np.where(np.isfinite(last) & np.isfinite(first), (last + first) / 2, np.where(np.isfinite(first), first, last))
        flip = np.abs(saves - edge[:, None])  # what it takes to change an expert's fate
        flip[~np.isfinite(saves)] = np.inf
        flip = flip.ravel()
        distance[:n, DROP] = np.where(gone.ravel(), 0.0, flip)
        with np.errstate(invalid="ignore"):
            dearer = least[:n, DROP + 1 :] - keep[:, None]
        distance[:n, DROP + 1 :] = np.where(np.isfinite(dearer), dearer, np.inf) + np.where(gone.ravel(), flip, 0.0)[:, None]
        distance[:n][~np.isfinite(least[:n])] = np.inf
    return distance
