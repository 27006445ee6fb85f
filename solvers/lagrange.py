"""Lagrangian relaxation: a valid lower bound and a good feasible choice in milliseconds.

With prices for bytes (lam), rows (pi) and weights of the objectives (w), every unit picks alone the option of least reduced cost
r = w . cost + lam size + pi . coef, and every block drops those experts where that saves most.  Whatever the prices (>= 0, w summing to 1),
the sum of these minima less lam room and pi . limit is a lower bound (Everett 1963).  Without rows the best lam is found by bisection.
"""

from __future__ import annotations

import heapq
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from edgemoe.solvers.program import DROP, Blocks, Picks, Prices, Program

STEPS = 100
CLOSE = 1e-9  # relative width of the price interval at which bisection stops
Array = NDArray[np.float64]


@dataclass(frozen=True, slots=True, kw_only=True)
class Relaxed:
    """Bound, and the best feasible choice known (None: none found) with its cost."""

    bound: float
    cost: float
    picks: Picks | None
    prices: Prices


def plain_prices(program: Program, byte: float) -> Prices:
    """Prices of a program whose rows are ignored and whose objectives count alike."""
    return Prices(byte=byte, rows=np.zeros(len(program.rows)), objectives=np.full(len(program.cost), 1 / len(program.cost)))


def mix_objectives(program: Program, weights: Array) -> Array:
    """Costs [U, O] under a weighted mean of the objectives; inf where an option is not offered, whatever the weights."""
    if len(program.cost) == 1:
        only: Array = program.cost[0]
        return only
    offered = np.isfinite(program.cost[0])
    return np.where(offered, np.tensordot(weights, np.where(offered, program.cost, 0.0), axes=1), np.inf)


def minimise(program: Program, prices: Prices) -> tuple[float, Picks]:
    """The relaxation's value (a lower bound in nats; -inf if the prices are no good for the soft variables) and its choice."""
    reduced = mix_objectives(program, prices.objectives) + prices.byte * program.size
    for price, row in zip(prices.rows, program.rows, strict=True):
        if price:
            reduced = reduced + price * row.coef
    value = float(prices.objectives @ program.constant) - prices.byte * (program.room - program.fixed)
    value -= float(sum(p * row.limit for p, row in zip(prices.rows, program.rows, strict=True)))
    for s, soft in enumerate(program.soft):
        slope = soft.price + float(sum(p * row.soft[s] for p, row in zip(prices.rows, program.rows, strict=True)))
        value += slope * soft.low if slope >= -1e-12 * soft.price else slope * soft.high
    n = program.n_experts
    picks = reduced.argmin(axis=1)
    value += float(reduced[np.arange(n, len(picks)), picks[n:]].sum())
    if program.blocks:
        least, picks[:n] = _minimise_blocks(program.blocks, reduced[:n])
        value += least
    return value, picks


def _minimise_blocks(blocks: Blocks, reduced: Array) -> tuple[float, Picks]:
    """Each block's cheapest choice, exactly: drop in the order of what dropping saves, as many as pays."""
    r = reduced.reshape(blocks.n, blocks.size, -1)
    best = 1 + r[:, :, 1:].argmin(axis=2)
    keep = np.take_along_axis(r, best[:, :, None], axis=2)[:, :, 0]
    drop = r[:, :, DROP]
    with np.errstate(invalid="ignore"):
        saves = np.where(np.isinf(drop), np.inf, np.where(np.isinf(keep), -np.inf, drop - keep))  # by keeping
    if blocks.group_least > 0:
        saves = _hold_groups(blocks, saves)
    order = np.argsort(saves, axis=1, kind="stable")
    ordered = np.take_along_axis(saves, order, axis=1)
    base = np.where(np.isinf(keep), drop, keep).sum(axis=1)
    totals = np.concatenate([np.zeros((blocks.n, 1)), np.where(np.isfinite(ordered), ordered, 0.0).cumsum(axis=1)], axis=1) + blocks.curve
    gone = np.arange(blocks.size + 1)
    fewest = np.maximum(blocks.size - blocks.most, (ordered == -np.inf).sum(axis=1))
    most = np.minimum(blocks.size - blocks.least, (ordered < np.inf).sum(axis=1))
    totals[(gone < fewest[:, None]) | (gone > most[:, None])] = np.inf
    chosen = totals.argmin(axis=1)
    totals[np.isnan(saves).any(axis=1)] = np.inf
    value = float((base + totals[np.arange(blocks.n), chosen]).sum())
    rank = np.argsort(order, axis=1, kind="stable")
    return value, np.where(rank < chosen[:, None], DROP, best).ravel()


def _hold_groups(blocks: Blocks, saves: Array) -> Array:
    """Make undroppable what each routing group must keep: its members that are worth most (greedy is exact on a partition matroid)."""
    held = saves.copy()
    for g in np.unique(blocks.group):
        members = np.flatnonzero(blocks.group == g)
        worst = np.argsort(saves[:, members], axis=1, kind="stable")[:, max(len(members) - blocks.group_least, 0) :]
        np.put_along_axis(held, members[worst], np.inf, axis=1)
    short = ((held == np.inf) & (saves == -np.inf)).any(axis=1)  # a group must keep what has to go: there is no choice
    held[short] = np.nan
    return held


def least_size(program: Program) -> float:
    """Bytes of the smallest choice when rows are ignored; inf when nothing is allowed."""
    cost = np.where(np.isfinite(program.cost).all(axis=0), 0.0, np.inf)[None]
    blocks = program.blocks
    if blocks:
        blocks = replace(blocks, curve=np.zeros_like(blocks.curve))
    bare = Program(cost=cost, size=program.size, constant=np.zeros(1), fixed=program.fixed, room=0, blocks=blocks)
    return minimise(bare, plain_prices(bare, 1.0))[0]


def relax(program: Program) -> Relaxed | None:
    """Bound and choice by bisection over the price of a byte; None when even the smallest choice does not fit.

    Rows are ignored, so with rows only the bound is valid; the choice is returned only where it keeps them.
    """
    if least_size(program) > program.room:
        return None
    plain = _only_the_budget(program)
    finite = plain.cost[np.isfinite(plain.cost)]
    top = float(np.abs(finite).max()) + (float(np.abs(plain.blocks.curve).max()) if plain.blocks else 0.0)
    low, high = 1e-18 * max(top, 1e-300) / max(program.room, 1), 16 * max(top, 1e-300)  # a byte dearer than everything

    def at(price: float) -> tuple[float, Picks]:
        return minimise(plain, plain_prices(plain, price))

    free, picks = at(0.0)[0], at(low)[1]
    if plain.evaluate(picks)[1] <= program.room:
        return _relaxed(program, free, picks, plain_prices(program, 0.0))
    bound, best, best_price = free, None, 0.0
    for _ in range(STEPS):
        price = float(np.sqrt(low * high))
        value, picks = at(price)
        if value > bound:
            bound, best_price = value, price
        if plain.evaluate(picks)[1] <= program.room:
            high, best = price, picks
        else:
            low = price
        if high / low < 1 + CLOSE:
            break
    if best is None:
        best = at(high)[1]
    return _relaxed(program, bound, best, plain_prices(program, best_price))


def _only_the_budget(program: Program) -> Program:
    """The program with the mean of its objectives for its one objective, and without rows: a relaxation."""
    if program.is_plain:
        return program
    weights = plain_prices(program, 0.0).objectives
    mean = np.array([float(weights @ program.constant)])
    return replace(program, cost=mix_objectives(program, weights)[None], constant=mean, rows=(), soft=(), max_formats=0)


def _relaxed(program: Program, bound: float, picks: Picks, prices: Prices) -> Relaxed:
    if program.evaluate(picks)[1] <= program.room and not program.broken(picks):
        picks = fill(program, picks)
        cost = program.objective(picks)
        return Relaxed(bound=min(bound, cost), cost=cost, picks=picks, prices=prices)
    return Relaxed(bound=bound, cost=np.inf, picks=None, prices=prices)


def fill(program: Program, picks: Picks) -> Picks:
    """Spend the bytes that are left on a feasible choice: best improvement per byte first, whatever fits and keeps the rules.

    Experts that were dropped stay dropped; with several objectives their mean must fall, and the worst must not rise.
    """
    picks = picks.copy()
    every = np.arange(len(picks))
    cost = mix_objectives(program, np.full(len(program.cost), 1 / len(program.cost)))
    left = program.room - program.evaluate(picks)[1]
    slack = np.array([row.limit - float(row.coef[every, picks].sum()) for row in program.rows])
    open_units = np.ones(len(picks), bool)
    open_units[: program.n_experts] = picks[: program.n_experts] != DROP
    now = cost[every, picks]
    extra = program.size - program.size[every, picks][:, None]
    gain = now[:, None] - np.where(np.isfinite(cost), cost, np.inf)
    better = (gain > 0) & (extra <= left) & open_units[:, None]
    better[: program.n_experts, DROP] = False
    if program.max_formats and program.format_of is not None:
        better &= np.isin(program.format_of, program.format_of[every, picks])
    heap = [(-gain[u, o] / max(int(extra[u, o]), 1), int(u), int(o)) for u, o in zip(*np.nonzero(better), strict=True)]
    heapq.heapify(heap)
    while heap:
        _, u, o = heapq.heappop(heap)
        more = int(program.size[u, o] - program.size[u, picks[u]])
        if more > left or cost[u, o] >= cost[u, picks[u]]:
            continue
        if len(program.cost) > 1 and (program.cost[:, u, o] > program.cost[:, u, picks[u]]).any():
            continue
        change = np.array([row.coef[u, o] - row.coef[u, picks[u]] for row in program.rows])
        if ((change > 0) & (change > slack)).any():
            continue
        picks[u], left = o, left - more
        slack = slack - change if len(change) else slack
    return picks
