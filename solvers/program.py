"""The stock-GGUF form of the program: one kept count for all layers, one format for each unit.

    minimise    sum_l drop[c, l] + sum_u cost[c, u, f_u]      over the kept count c and the formats f_u
    subject to  fixed[c] + sum_u size[c, u, f_u] <= room      and f_u offered for u

Costs are nats, sizes bytes.  For a fixed c this is a multiple-choice knapsack (Sinha & Zoltners 1979).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True, slots=True, kw_only=True)
class Program:
    """The numbers of one program: C counts, U units, F formats; cost is inf where a format is not offered."""

    cost: NDArray[np.float64]  # [C, U, F]
    size: NDArray[np.int64]  # [C, U, F]
    drop: NDArray[np.float64]  # [C]
    fixed: NDArray[np.int64]  # [C]
    room: int

    def options(self, c: int, u: int) -> NDArray[np.int64]:
        """Formats of a unit that no other beats in both bytes and nats, by falling size; decided once for all solvers."""
        cost, size = self.cost[c, u], self.size[c, u]
        order = np.lexsort((np.arange(len(cost)), cost, size))
        best, front = np.inf, []
        for f in order:  # by rising size: keep what costs less than everything smaller
            if np.isfinite(cost[f]) and cost[f] < best:
                best = cost[f]
                front.append(int(f))
        return np.array(front[::-1], np.int64)

    def least_size(self, c: int) -> int:
        """Bytes of the smallest plan with this count."""
        offered = np.where(np.isfinite(self.cost[c]), self.size[c], np.iinfo(np.int64).max)
        return int(self.fixed[c] + offered.min(axis=1).sum())

    def evaluate(self, c: int, picks: NDArray[np.int64]) -> tuple[float, int]:
        """Nats and bytes of a complete choice, added up afresh."""
        rows = np.arange(len(picks))
        return float(self.drop[c] + self.cost[c, rows, picks].sum()), int(self.fixed[c] + self.size[c, rows, picks].sum())


@dataclass(frozen=True, slots=True, kw_only=True)
class Solution:
    """A feasible choice and what is proven about it: no choice costs less than `bound`."""

    count_index: int
    picks: NDArray[np.int64]  # [U] formats
    cost: float
    bound: float
    proven: bool
    per_count: tuple[tuple[float | None, float | None], ...]  # [C] (bound, best cost found)

    @property
    def gap(self) -> float:
        """Relative distance of the cost to the bound."""
        return max(0.0, self.cost - self.bound) / max(abs(self.cost), 1e-30)


Solver = Callable[[Program, float], Solution | None]
"""(program, relative gap) -> the best choice, or None when nothing fits."""
