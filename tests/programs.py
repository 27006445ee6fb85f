"""Random integer programs and their best choices."""

import numpy as np

from edgemoe.solvers.effort import Effort
from edgemoe.solvers.program import Program, Solution
from edgemoe.solvers.search import solve


def random_programs(seed: int, tightness: float) -> list[Program]:
    """Three counts, four units, five formats: sizes rise with bits, costs fall roughly with them; some formats are not offered."""
    rng = np.random.default_rng(seed)
    counts, units, formats = 3, 4, 5
    bits = np.array([1.5, 2.6, 4.5, 6.5, 16])
    weights = rng.integers(50, 400, units)
    keep = np.linspace(0.5, 1, counts)
    size = np.ceil(keep[:, None, None] * weights[None, :, None] * bits / 8).astype(np.int64)
    cost = keep[:, None, None] * rng.lognormal(0, 1, (1, units, 1)) * 4.0**-bits * rng.lognormal(0, 0.3, (counts, units, formats)) * 1e-3
    offered = rng.random((units, formats)) < 0.85
    offered[:, 2] = True
    cost = np.where(offered[None], cost, np.inf)
    drop = np.sort(rng.lognormal(-6, 1, counts))[::-1].copy()
    drop[-1] = 0
    fixed = [100, 110, 120]
    least = min(fixed[c] + int(np.where(np.isfinite(cost[c]), size[c], 10**9).min(axis=1).sum()) for c in range(counts))
    room = int(least + tightness * (fixed[-1] + size[-1].max(axis=1).sum() - least))
    return [Program(cost=cost[c][None], size=size[c], constant=drop[c : c + 1], fixed=fixed[c], room=room) for c in range(counts)]


def best(programs: list[Program], solver: str, gap: float = 1e-6) -> Solution | None:
    """The best choice over all kept counts."""
    return solve(programs.__getitem__, len(programs), Effort(solver=solver, gap=gap))
