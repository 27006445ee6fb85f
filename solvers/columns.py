"""Column generation: whole-layer plans as columns, the PuLP master picks one for each layer.

Everything that couples the experts of a layer is inside a column, so the master is small whatever the number of experts.  The linear master
gives prices; `lagrange.minimise` finds the cheapest layer plan at these prices exactly; new plans join until none is cheaper: then the
master's value is the bound of all of them (Dantzig & Wolfe 1960).  The integer master then picks among the columns found, and some around.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from edgemoe.solvers.engine import run
from edgemoe.solvers.ilp import Items, build, expected_cost, join, prices_of, solve_items, unit_items
from edgemoe.solvers.lagrange import Prices, Relaxed, minimise
from edgemoe.solvers.program import DROP, Picks, Program

ROUNDS = 80
CLOSE = 1e-6  # relative distance of master and bound at which generation stops
AROUND = (0.5, 0.7, 0.85, 0.95, 0.99, 1.01, 1.05, 1.2, 1.5, 2.0)  # byte prices, times the best, that fill the pool at the end
FIRST = (1e-3, 0.1, 0.5, 1.0, 2.0, 10.0, 1e3)  # ... and at the beginning


class Pool:
    """Layer plans of every block, each once."""

    def __init__(self, program: Program) -> None:
        assert program.blocks is not None
        self.program = program
        self.n, self.width = program.blocks.n, program.blocks.size
        self.columns: list[tuple[int, Picks]] = []
        self.seen: set[tuple[int, bytes]] = set()

    def add(self, picks: Picks) -> int:
        """Add the layer plans of a choice; returns how many were new."""
        fresh = 0
        for b in range(self.n):
            mine = picks[b * self.width : (b + 1) * self.width].astype(np.int16)
            key = b, mine.tobytes()
            if key not in self.seen:
                self.seen.add(key)
                self.columns.append((b, mine.astype(np.int64)))
                fresh += 1
        return fresh

    def items(self) -> Items:
        """The columns as items, one set for each block."""
        program, blocks = self.program, self.program.blocks
        assert blocks is not None
        where = [np.arange(b * self.width, (b + 1) * self.width) for b, _ in self.columns]
        gone = [int((p == DROP).sum()) for _, p in self.columns]
        curve = np.array([blocks.curve[b, k] for (b, _), k in zip(self.columns, gone, strict=True)])
        cost = np.stack([program.cost[:, w, p].sum(axis=1) for w, (_, p) in zip(where, self.columns, strict=True)], axis=1)
        size = np.array([program.size[w, p].sum() for w, (_, p) in zip(where, self.columns, strict=True)], np.float64)
        rows = np.array([[r.coef[w, p].sum() for w, (_, p) in zip(where, self.columns, strict=True)] for r in program.rows])
        return Items(
            owner=np.array([b for b, _ in self.columns]),
            units=where,
            picks=[p for _, p in self.columns],
            cost=cost + curve,
            size=size,
            rows=rows.reshape(len(program.rows), len(self.columns)),
            n_sets=self.n,
        )


def free_units(program: Program) -> NDArray[np.int64]:
    """Units outside blocks."""
    return np.arange(program.n_experts, program.cost.shape[1])


def all_items(program: Program, pool: Pool | None) -> Items:
    """Columns of the blocks and options of the other units; without a pool the options of every unit."""
    if pool is None:
        return unit_items(program, np.arange(program.cost.shape[1]))
    free = free_units(program)
    return join(pool.items(), unit_items(program, free)) if len(free) else pool.items()


def generate(program: Program, known: Relaxed, engine: str) -> tuple[Relaxed, Pool | None, bool]:
    """Bound and prices of the linear relaxation with all rows; the pool of columns; and whether rules and budget can hold together."""
    pool = Pool(program) if program.blocks else None
    scale = known.prices.byte or 1e-18
    if pool is not None:
        for factor in FIRST:
            pool.add(
                minimise(program, Prices(byte=scale * factor, rows=np.zeros(len(program.rows)), objectives=known.prices.objectives))[1]
            )
        if known.picks is not None:
            pool.add(known.picks)
    bound, prices, feasible = known.bound, known.prices, True
    expected = expected_cost(program, known)
    for _ in range(ROUNDS):
        model = build(program, all_items(program, pool), expected, elastic=True)
        if not run(model.problem, engine, mip=False).solved:
            return Relaxed(bound=bound, cost=known.cost, picks=known.picks, prices=prices), pool, False
        broken = sum(float(z.varValue or 0.0) for z in model.elastic)
        found = prices_of(program, model)
        value, picks = minimise(program, found)
        if value > bound:
            bound, prices = value, found
        master = float(model.problem.objective.value()) / model.scale + (float(program.constant[0]) if len(program.cost) == 1 else 0.0)
        feasible = broken < 1e-7
        if pool is None or pool.add(picks) == 0 or (feasible and master - value <= CLOSE * abs(master)):
            break
    return Relaxed(bound=bound, cost=known.cost, picks=known.picks, prices=prices), pool, feasible


def solve_columns(program: Program, known: Relaxed, pool: Pool, engine: str, gap: float, seconds: float | None = None) -> Relaxed:
    """The best choice among the generated layer plans and some around them."""
    for factor in AROUND:
        near = Prices(byte=known.prices.byte * factor, rows=known.prices.rows, objectives=known.prices.objectives)
        pool.add(minimise(program, near)[1])
        near = Prices(byte=known.prices.byte, rows=known.prices.rows * factor, objectives=known.prices.objectives)
        if program.rows:
            pool.add(minimise(program, near)[1])
    found = solve_items(program, all_items(program, pool), known, engine, gap, exact=False, seconds=seconds)
    return found or known
