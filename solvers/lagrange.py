"""This module solves the Lagrangian relaxation, which gives a valid lower bound and a good feasible choice in milliseconds.

With prices for bytes (lam) and rows (pi) and weights of the objectives (w), every unit picks alone the option of least reduced cost
r = w . cost + lam size + pi . coef, and every block drops the experts whose drop saves most.  For any prices (>= 0, w summing to 1), the
sum of these minima less lam room and pi . limit is a lower bound (Everett 1963).  For programs without rows, `relax` finds the best lam.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from edgemoe.base.types import F64
from edgemoe.solvers.program import DROP, Blocks, Picks, Prices, Program

STEPS = 200
NEAR = 4.0  # if the ends of the price interval have a smaller ratio, their lines are crossed; if a larger one, the interval is halved
CLOSE = 1e-13  # relative distance to the crossing of two lines that counts as rounding


@dataclass(frozen=True, slots=True, kw_only=True)
class Relaxed:
    """A bound, and the best known feasible choice with its cost (None if none was found)."""

    bound: float
    cost: float
    picks: Picks | None
    prices: Prices


def plain_prices(program: Program, byte: float) -> Prices:
    """Prices of a program whose rows are ignored and whose objectives count alike."""
    return Prices(byte=byte, rows=np.zeros(len(program.rows)), objectives=np.full(len(program.cost), 1 / len(program.cost)))


def mix_objectives(program: Program, weights: F64) -> F64:
    """Costs [U, O] under a weighted mean of the objectives; an option that is not offered stays at inf, also under a weight of 0."""
    if len(program.cost) == 1:
        only: F64 = program.cost[0]
        return only
    offered = np.isfinite(program.cost[0])
    return np.where(offered, np.tensordot(weights, np.where(offered, program.cost, 0.0), axes=1), np.inf)


def minimise(program: Program, prices: Prices) -> tuple[float, Picks]:
    """The relaxation's value (a lower bound in nats; -inf if the prices are too high for the soft variables) and its choice."""
    plain = program if program.is_plain else absorb(program, prices)
    reduced = plain.cost[0] + prices.byte * program.size
    value = float(plain.constant[0]) - prices.byte * (program.room - program.fixed)
    n = program.n_experts
    picks = reduced.argmin(axis=1)
    value += float(reduced[np.arange(n, len(picks)), picks[n:]].sum())
    if program.blocks:
        least, picks[:n] = _minimise_blocks(program.blocks, reduced[:n])
        value += least
    return value, picks


def absorb(program: Program, prices: Prices) -> Program:
    """The program with its rules in the costs, at these prices, and one objective; its bounds also bound the original program."""
    cost, limits, slopes = mix_objectives(program, prices.objectives), 0.0, np.array([s.price for s in program.soft])
    for price, row in zip(prices.rows, program.rows, strict=True):
        cost, limits, slopes = cost + price * row.coef, limits + price * row.limit, slopes + price * row.soft
    limits -= sum(
        slope * (soft.low if slope >= -1e-12 * soft.price else soft.high) for slope, soft in zip(slopes, program.soft, strict=True)
    )
    constant = np.array([float(prices.objectives @ program.constant) - limits])
    return replace(program, cost=cost[None], constant=constant, rows=(), soft=(), max_formats=0)


def _minimise_blocks(blocks: Blocks, reduced: F64) -> tuple[float, Picks]:
    """Each block's exactly cheapest choice: drop experts in the order of the nats that a drop saves, as long as it saves any."""
    r = reduced.reshape(blocks.n, blocks.size, -1)
    best = 1 + r[:, :, 1:].argmin(axis=2)
    keep = np.take_along_axis(r, best[:, :, None], axis=2)[:, :, 0]
    drop = r[:, :, DROP]
    with np.errstate(invalid="ignore"):
        saves = np.where(np.isinf(drop), np.inf, np.where(np.isinf(keep), -np.inf, drop - keep))  # nats saved by keeping
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
    rank = np.empty_like(order)
    np.put_along_axis(rank, order, gone[None, :-1], axis=1)
    return value, np.where(rank < chosen[:, None], DROP, best).ravel()


def _hold_groups(blocks: Blocks, saves: F64) -> F64:
    """Forbid to drop the experts that each routing group must keep, its most valuable ones (greedy is exact on a partition matroid)."""
    held = saves.copy()
    for g in np.unique(blocks.group):
        members = np.flatnonzero(blocks.group == g)
        worst = np.argsort(saves[:, members], axis=1, kind="stable")[:, max(len(members) - blocks.group_least, 0) :]
        np.put_along_axis(held, members[worst], np.inf, axis=1)
    short = ((held == np.inf) & (saves == -np.inf)).any(axis=1)  # if a group must keep an expert that has to be dropped, there is no choice
    held[short] = np.nan
    return held


@dataclass(frozen=True, slots=True)
class _End:
    """An end of the interval of byte prices: its cheapest choice, with nats (mean objective) and bytes."""

    price: float
    value: float  # of the relaxation
    picks: Picks
    cost: float
    size: int


def _at(program: Program, price: float) -> _End:
    value, picks = minimise(program, plain_prices(program, price))
    cost, size = program.evaluate(picks)
    return _End(price, value, picks, float(cost.mean()), size)


def relax(program: Program, *, guess: float = 0.0, filled: bool = True) -> Relaxed | None:
    """Bound and choice at the best price of a byte; None if even the smallest choice does not fit.

    The relaxation is a concave, piecewise linear function of the price, with one line for each choice.  The next price to try is where the
    lines of a choice that is too large and of one that fits cross.  If no choice lies below the crossing, this price is the best (Fisher
    1981).

    Rows are ignored, so in a program with rows only the bound is valid, and the choice is returned only if it keeps the rows.

    Args:
        program: the numbers.
        guess: a price that may be near the best, of a similar program.
        filled: spend the rest of the room on improving the choice.
    """
    if not np.isfinite(program.constant).all():  # it was absorbed at prices that are too high for a soft variable
        return Relaxed(bound=-np.inf, cost=np.inf, picks=None, prices=plain_prices(program, 0.0))
    whole, program = program, program if program.is_plain else absorb(program, plain_prices(program, 0.0))  # mixed once, not at every price
    top = float(np.abs(np.where(np.isfinite(program.cost), program.cost, 0.0)).max(initial=0.0))
    top += float(np.abs(program.blocks.curve).max()) if program.blocks else 0.0
    least, most = 1e-18 * max(top, 1e-300) / max(program.room, 1), 16 * max(top, 1e-300)  # at `most`, a byte costs more than any choice
    ends = _bracket(program, least, most, guess)
    if ends is None or ends[1].value == np.inf:  # there is no choice at any price, which a guessed price does not show by itself
        return None
    low, high = ends
    if low is None:
        return _relaxed(whole, minimise(program, plain_prices(program, 0.0))[0], high.picks, 0.0, filled=filled)
    best = max(low, high, key=lambda end: end.value)
    for _ in range(STEPS):
        near = high.price < NEAR * low.price and low.size > high.size
        price = (high.cost - low.cost) / (low.size - high.size) if near else float(np.sqrt(low.price * high.price))
        price = min(max(price, low.price), high.price)
        middle = _at(program, price)
        best = max(best, middle, key=lambda end: end.value)
        crossing = low.cost + price * (low.size - program.room)
        if (near and middle.value >= crossing - CLOSE * abs(crossing)) or price in (low.price, high.price):
            break
        low, high = (low, middle) if middle.size <= program.room else (middle, high)
    return _relaxed(whole, best.value, high.picks, best.price, filled=filled)


def _bracket(program: Program, least: float, most: float, guess: float) -> tuple[_End | None, _End] | None:
    """A price at which the choice is too large (None if it fits at every price) and one at which it fits; None if no choice fits."""
    low = high = None
    price, step = guess, 2.0
    while least < price < most and (low is None or high is None):  # from the guess outwards, in growing steps
        end = _at(program, price)
        low, high = (low, end) if end.size <= program.room else (end, high)
        price, step = (price / step if low is None else price * step), step**2
    if high is None:
        high = _at(program, most)
        if high.value == np.inf or high.size > program.room:
            return None
    if low is None:
        low = _at(program, least)
        if low.size <= program.room:
            return None, low
    return low, high


def _relaxed(program: Program, bound: float, picks: Picks, price: float, *, filled: bool) -> Relaxed:
    prices = plain_prices(program, price)
    if program.evaluate(picks)[1] <= program.room and not program.broken(picks):
        picks = fill(program, picks) if filled else picks
        cost = program.objective(picks)
        return Relaxed(bound=min(bound, cost), cost=cost, picks=picks, prices=prices)
    return Relaxed(bound=bound, cost=np.inf, picks=None, prices=prices)


def fill(program: Program, picks: Picks) -> Picks:
    """Spend the bytes that are left on improving a feasible choice: best improvement per byte first, as far as it fits and keeps the rules.

    Dropped experts stay dropped.  With several objectives their mean must fall, and none may rise.
    """
    picks = picks.copy()
    every = np.arange(len(picks))
    cost = mix_objectives(program, np.full(len(program.cost), 1 / len(program.cost)))
    left = program.room - program.evaluate(picks)[1]
    slack = np.array([row.limit - float(row.coef[every, picks].sum()) for row in program.rows])
    better = (cost < cost[every, picks][:, None]) & (program.size <= program.size[every, picks][:, None] + left)
    better[: program.n_experts] &= (picks[: program.n_experts] != DROP)[:, None]
    better[: program.n_experts, DROP] = False
    if program.max_formats and program.format_of is not None:
        better &= np.isin(program.format_of, program.format_of[every, picks])
    unit, option = np.nonzero(better)
    now = picks[unit]
    gain, more = cost[unit, now] - cost[unit, option], program.size[unit, option] - program.size[unit, now]
    change = np.array([row.coef[unit, option] - row.coef[unit, now] for row in program.rows]).reshape(len(slack), len(unit))
    rise = program.cost[:, unit, option] - program.cost[:, unit, now]
    order = np.argsort(-gain / np.maximum(more, 1), kind="stable")
    table = np.concatenate([gain[None], more[None], change, rise])[:, order]  # changes from taking each option
    unit, option = unit[order], option[order]
    while True:
        change, rise = table[2 : 2 + len(slack)], table[2 + len(slack) :]
        fits = (table[0] > 0) & (table[1] <= left) & ((change <= 0) | (change <= slack[:, None])).all(axis=0)
        fits &= (rise <= 0).all(axis=0)
        table, unit, option = table[:, fits], unit[fits], option[fits]
        if not len(unit):
            return picks
        taken = table[:, 0].copy()
        picks[unit[0]], left, slack = option[0], left - int(taken[1]), slack - taken[2 : 2 + len(slack)]
        table[:, unit == unit[0]] -= taken[:, None]
