"""This module solves large programs by column generation: columns are plans of whole layers, and a PuLP master picks one for each layer.

All constraints between the experts of a layer are inside a column, so the size of the master does not depend on the number of experts.  The
linear master gives prices, and `lagrange.minimise` finds the exactly cheapest layer plan at these prices.  New plans join until none is
cheaper; then the master's value bounds all plans (Dantzig & Wolfe 1960).  The integer master then picks among the columns found, and among
some columns near them.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from edgemoe.base.types import F64
from edgemoe.solvers.effort import Effort
from edgemoe.solvers.engine import run
from edgemoe.solvers.ilp import Items, LinearModel, build, join, prices_of, solve_items, unit_items
from edgemoe.solvers.lagrange import Relaxed, absorb, minimise
from edgemoe.solvers.program import DROP, Picks, Prices, Program

ROUNDS = 80
EXCEEDED = 1e-6  # of scaled rows, the tolerance of the solvers
CLOSE = 1e-6  # relative distance of master and bound at which generation stops
AROUND = (0.5, 0.7, 0.85, 0.95, 0.99, 1.01, 1.05, 1.2, 1.5, 2.0)  # multiples of the best byte price, whose plans join at the end
NEARBY = 2000  # options near the relaxation's, among which single experts and tensors are chosen if objectives compete
FIRST = (1e-3, 0.1, 0.5, 0.8, 0.9, 1.0, 1.1, 1.2, 2.0, 10.0, 1e3)  # multiples of a known byte price, whose plans are the first columns
TOGETHER = 8  # units outside blocks that share one set of columns in the linear master


class ColumnPool:
    """Plans of every layer, and of every group of TOGETHER other units, each stored once."""

    def __init__(self, program: Program) -> None:
        assert program.blocks is not None
        blocks, free = program.blocks, free_units(program)
        self.sets = [np.arange(b * blocks.size, (b + 1) * blocks.size) for b in range(blocks.n)]
        self.n_blocks = blocks.n
        self.sets += [free[i : i + TOGETHER] for i in range(0, len(free), TOGETHER)]
        self.columns: list[tuple[int, Picks]] = []
        self.seen: set[tuple[int, bytes]] = set()

    def add(self, picks: Picks) -> int:
        """Add the parts of a choice, and return how many of them were new."""
        fresh = 0
        for s, units in enumerate(self.sets):
            mine = picks[units].astype(np.int16)
            key = s, mine.tobytes()
            if key not in self.seen:
                self.seen.add(key)
                self.columns.append((s, mine.astype(np.int64)))
                fresh += 1
        return fresh

    def items(self, program: Program, *, blocks_only: bool = False) -> Items:
        """The columns as items, at a program's costs."""
        blocks = program.blocks
        assert blocks is not None
        chosen = [(s, p) for s, p in self.columns if not blocks_only or s < self.n_blocks]
        where = [self.sets[s] for s, _ in chosen]
        curve = np.array([blocks.curve[s, int((p == DROP).sum())] if s < self.n_blocks else 0.0 for s, p in chosen])
        cost = np.stack([program.cost[:, w, p].sum(axis=1) for w, (_, p) in zip(where, chosen, strict=True)], axis=1)
        size = np.array([program.size[w, p].sum() for w, (_, p) in zip(where, chosen, strict=True)], np.float64)
        rows = np.array([[r.coef[w, p].sum() for w, (_, p) in zip(where, chosen, strict=True)] for r in program.rows])
        return Items(
            owner=np.array([s for s, _ in chosen]),
            units=where,
            picks=[p for _, p in chosen],
            cost=cost + curve,
            size=size,
            rows=rows.reshape(len(program.rows), len(chosen)),
            n_sets=self.n_blocks if blocks_only else len(self.sets),
        )


def free_units(program: Program) -> NDArray[np.int64]:
    """Units outside blocks."""
    return np.arange(program.n_experts, program.cost.shape[1])


def all_items(program: Program, pool: ColumnPool | None, known: Relaxed | None = None) -> Items:
    """Columns of the blocks and options of the other units; without a pool the options of every unit."""
    if pool is None:
        return unit_items(program, np.arange(program.cost.shape[1]), known)
    free, layers = free_units(program), pool.items(program, blocks_only=True)
    return join(layers, unit_items(program, free, known)) if len(free) else layers


def generate(program: Program, known: Relaxed, effort: Effort) -> tuple[Relaxed, ColumnPool | None, bool]:
    """Bound and prices of the linear relaxation with all rows; the pool of columns; and False if budget and rules cannot hold together.

    A failure of the solver leaves the known values as they are, because only a proof shows that there is no choice.
    """
    if program.blocks is None:
        return _relax_items(program, known, effort)
    pool = ColumnPool(program)
    for factor in FIRST:
        start = Prices(byte=(known.prices.byte or 1e-18) * factor, rows=np.zeros(len(program.rows)), objectives=known.prices.objectives)
        pool.add(minimise(program, start)[1])
    if known.picks is not None:
        pool.add(known.picks)
    elif not _reach_feasible(program, pool, effort):
        return known, pool, False
    bound, prices, expected = known.bound, known.prices, known.cost if np.isfinite(known.cost) else known.bound
    close = max(CLOSE, effort.gap / 10)
    for _ in range(ROUNDS):
        model = build(program, pool.items(program), expected)
        if not run(model.problem, effort, mip=False).solved:
            break
        found = prices_of(program, model)
        expected = master = _master_value(program, model)
        fresh = 0
        for asked in (found, _between(prices, found)):  # duals oscillate; half way to the best so far is often better (Wentges 1997)
            value, picks = minimise(program, asked)
            fresh += pool.add(picks)
            if value > bound:
                bound, prices = value, asked
        if fresh == 0 or master - bound <= close * abs(master) or effort.is_over:
            break
    return Relaxed(bound=min(bound, known.cost), cost=known.cost, picks=known.picks, prices=prices), pool, True


def _between(one: Prices, two: Prices) -> Prices:
    rows = two.rows if len(one.rows) != len(two.rows) else (one.rows + two.rows) / 2
    return Prices(byte=(one.byte + two.byte) / 2, rows=rows, objectives=(one.objectives + two.objectives) / 2)


def _relax_items(program: Program, known: Relaxed, effort: Effort) -> tuple[Relaxed, ColumnPool | None, bool]:
    """As `generate`, for a program without blocks: all options are items, so one linear program is enough."""
    expected = known.cost if np.isfinite(known.cost) else known.bound
    model = build(program, all_items(program, None), expected)
    outcome = run(model.problem, effort, mip=False)
    if not outcome.solved:
        return known, None, not outcome.infeasible
    prices = prices_of(program, model)
    value = minimise(program, prices)[0]
    if value <= known.bound:
        return known, None, True
    return Relaxed(bound=min(value, known.cost), cost=known.cost, picks=known.picks, prices=prices), None, True


def _master_value(program: Program, model: LinearModel) -> float:
    constant = float(program.constant[0]) if len(program.cost) == 1 else 0.0
    return float(model.problem.objective.value()) / model.scale + constant


def _reach_feasible(program: Program, pool: ColumnPool, effort: Effort) -> bool:
    """Add layer plans until some mixture of them keeps budget and rules; return False if none can.

    This generation has no costs and minimises by how much rows are exceeded.  If even the cheapest choice costs more than zero at some
    prices, no choice keeps the rows (Farkas).
    """
    free = program.with_costs(np.zeros(program.size.shape), 0.0)
    for _ in range(ROUNDS):
        model = build(free, pool.items(free), 1.0, elastic=True)
        if not run(model.problem, effort, mip=False).solved:
            return True  # nothing is proven
        if sum(float(z.varValue or 0.0) for z in model.elastic) <= EXCEEDED:
            return True
        prices = prices_of(free, model, scale=1.0)
        value, picks = minimise(free, prices)
        if value > EXCEEDED:
            return False
        if pool.add(picks) == 0 or effort.is_over:
            return True
    return True


def solve_columns(program: Program, known: Relaxed, pool: ColumnPool, effort: Effort) -> Relaxed | None:
    """The best choice among the generated layer plans and some near them; if no combination of these fits, among all plans.

    The result is None if it is proven that there is no choice.
    """
    if len(program.cost) > 1:
        found = solve_items(program, nearby_items(program, known.prices, NEARBY), known, effort, exact=False)
        if found is not None and found.picks is not None:
            return found
    for factor in AROUND:
        near = Prices(byte=known.prices.byte * factor, rows=known.prices.rows, objectives=known.prices.objectives)
        pool.add(minimise(program, near)[1])
        near = Prices(byte=known.prices.byte, rows=known.prices.rows * factor, objectives=known.prices.objectives)
        if program.rows:
            pool.add(minimise(program, near)[1])
    found = solve_items(program, all_items(program, pool, known), known, effort, exact=False)
    if found is not None and found.picks is not None:
        return found
    return solve_items(program, all_items(program, None, known), known, effort, exact=True)


# ------------------------------------------------------------------------------------------- options near the relaxation's
def nearby_items(program: Program, prices: Prices, most: int) -> Items:
    """The relaxation's picks and the `most` options nearest to them, as a set for every unit.

    At the prices of the relaxation, an option's distance is its reduced cost in nats less that of the relaxation's pick.  The best choice
    among the nearest options is near-best, and the relaxation's bound says how near.  Single experts can change places this way, which
    whole-layer columns cannot express and programs with several objectives need.
    """
    distance = _distances(program, prices)
    others = np.sort(distance[np.isfinite(distance) & (distance > 0)])
    near = distance <= (others[min(most, len(others)) - 1] if len(others) else 0.0)
    cost = np.where(near[None], program.cost, np.inf)
    return unit_items(replace(program, cost=cost), np.arange(cost.shape[1]))


def _distances(program: Program, prices: Prices) -> F64:
    """Distance of each option from the relaxation's pick [U, O]; dropping and keeping are compared across an expert's layer."""
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
        flip = np.abs(saves - edge[:, None])  # the price change with which an expert changes from dropped to kept, or back
        flip[~np.isfinite(saves)] = np.inf
        flip = flip.ravel()
        distance[:n, DROP] = np.where(gone.ravel(), 0.0, flip)
        with np.errstate(invalid="ignore"):
            dearer = least[:n, DROP + 1 :] - keep[:, None]
        distance[:n, DROP + 1 :] = np.where(np.isfinite(dearer), dearer, np.inf) + np.where(gone.ravel(), flip, 0.0)[:, None]
        distance[:n][~np.isfinite(least[:n])] = np.inf
    return distance
