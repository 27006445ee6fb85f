"""This module holds the integer program as numbers: it picks one option for every unit.

    minimise    max_k ( constant_k + sum_u cost[k, u, o_u] + sum_b curve[b, gone_b] )           nats; k: objectives, usually one
    subject to  fixed + sum_u size[u, o_u] <= room                                              bytes
                sum_u coef_r[u, o_u] <= limit_r                          for every row r         the users' rules
                least_b <= kept experts of block b <= most_b, and of each routing group g at least group_least
                at most `max_formats` different formats

A unit is a tensor (an expert stack, an expert), an option a format in a memory pool; option 0 of an expert is to drop it.  Experts come
first, in blocks of equal length, one block for each layer: what couples them (kept counts, groups, the curve) stays inside their block.
Without blocks and rows this is a multiple-choice knapsack (Sinha & Zoltners 1979).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from edgemoe.base.types import F64

DROP = 0  # the option "drop it" of a unit in a block
Picks = NDArray[np.int64]  # [U] options


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """A linear rule: the sum of `coef` [U, O] over the picks, plus `soft` times the soft variables, is at most `limit`."""

    name: str
    coef: F64
    limit: float
    soft: F64  # [S]


@dataclass(frozen=True, slots=True, kw_only=True)
class Soft:
    """A continuous variable of a user's soft rule, and its price in nats for each unit of it."""

    name: str
    low: float
    high: float
    price: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Blocks:
    """Experts that share a layer: B blocks of E units each, the first B * E units of the program."""

    n: int
    size: int
    least: NDArray[np.int64]  # [B] kept experts
    most: NDArray[np.int64]  # [B]
    curve: F64  # [B, E + 1] nats when 0, 1, .. experts are dropped, beside their own prices
    group: NDArray[np.int64]  # [E] routing group of each expert
    group_least: int  # least number of kept experts in each group


@dataclass(frozen=True, slots=True, kw_only=True)
class Program:
    """The numbers of one program: K objectives, U units, O options; the cost of an option that is not offered is inf."""

    cost: F64  # [K, U, O]
    size: NDArray[np.int64]  # [U, O]
    constant: F64  # [K]
    fixed: int
    room: int
    blocks: Blocks | None = None
    rows: tuple[Row, ...] = ()
    soft: tuple[Soft, ...] = ()
    format_of: NDArray[np.int64] | None = None  # [U, O], for `max_formats`; -1: none
    max_formats: int = 0  # 0: any number

    @property
    def n_experts(self) -> int:
        """Units that are in blocks."""
        return self.blocks.n * self.blocks.size if self.blocks else 0

    @property
    def is_plain(self) -> bool:
        """Whether only the budget couples the units outside blocks."""
        return len(self.cost) == 1 and not self.rows and not self.max_formats

    def with_costs(self, cost: F64, constant: float) -> Program:
        """The same choices at other costs [U, O], without curves and prices of soft rules."""
        blocks = None if self.blocks is None else replace(self.blocks, curve=np.zeros_like(self.blocks.curve))
        return replace(
            self,
            cost=np.where(np.isfinite(self.cost).all(axis=0), cost, np.inf)[None],
            constant=np.array([constant]),
            blocks=blocks,
            soft=tuple(replace(s, price=0.0) for s in self.soft),
        )

    def evaluate(self, picks: Picks) -> tuple[F64, int]:
        """Nats under each objective [K] (without soft variables) and bytes of a complete choice, added up anew."""
        rows = np.arange(len(picks))
        total: F64 = self.constant + self.cost[:, rows, picks].sum(axis=1)
        if self.blocks:
            gone = (picks[: self.n_experts].reshape(self.blocks.n, -1) == DROP).sum(axis=1)
            total = total + self.blocks.curve[np.arange(self.blocks.n), gone].sum()
        return total, self.fixed + int(self.size[rows, picks].sum())

    def soft_values(self, picks: Picks) -> F64:
        """Values [S] of the soft variables for a choice: row by row, the cheapest variable is raised first, until the row holds."""
        values = np.array([v.low for v in self.soft])
        every = np.arange(len(picks))
        for row in self.rows if self.soft else ():
            helpers = np.flatnonzero(row.soft < 0)
            short = float(row.coef[every, picks].sum() + row.soft @ values) - row.limit if len(helpers) else 0.0
            for s in sorted(helpers, key=lambda i: self.soft[i].price / -row.soft[i]):
                step = min(max(short, 0.0) / -row.soft[s], self.soft[s].high - values[s])
                values[s] += step
                short += step * row.soft[s]
        return values

    def objective(self, picks: Picks) -> float:
        """The minimised value: the worst objective plus the price of soft rules."""
        soft = float(self.soft_values(picks) @ [v.price for v in self.soft]) if self.soft else 0.0
        return float(self.evaluate(picks)[0].max()) + soft

    def broken(self, picks: Picks) -> list[str]:
        """The constraints that a choice breaks; empty if the choice is feasible."""
        found = []
        cost, size = self.evaluate(picks)
        every = np.arange(len(picks))
        if not np.isfinite(cost).all():
            found.append("an option that is not offered")
        if size > self.room:
            found.append(f"{size} bytes of {self.room}")
        soft = self.soft_values(picks)
        for row in self.rows:
            value = float(row.coef[every, picks].sum() + (row.soft @ soft if len(soft) else 0.0))
            if value > row.limit + self._rounding(row, picks):
                found.append(f"{row.name}: {value:.10g} > {row.limit:.10g}")
        found += [
            f"{v.name} = {x:.6g} is out of its bounds" for v, x in zip(self.soft, soft, strict=True) if x > v.high * (1 + 1e-9) + 1e-12
        ]
        if self.max_formats and self.format_of is not None:
            used = {int(f) for f in self.format_of[every, picks] if f >= 0}
            if len(used) > self.max_formats:
                found.append(f"{len(used)} formats of {self.max_formats}")
        return found + self._broken_blocks(picks)

    def _rounding(self, row: Row, picks: Picks) -> float:
        """The possible rounding error of float sums, which is zero if all numbers are whole, as bytes and counts are."""
        used = row.coef[np.arange(len(picks)), picks]
        whole = not row.soft.any() and float(row.limit).is_integer() and bool((used == np.rint(used)).all())
        size = float(np.abs(used).sum()) + abs(row.limit)
        return 0.0 if whole and size < 2**53 else 1e-9 * max(size, 1e-300)

    def _broken_blocks(self, picks: Picks) -> list[str]:
        if not self.blocks:
            return []
        kept = picks[: self.n_experts].reshape(self.blocks.n, -1) != DROP
        counts = kept.sum(axis=1)
        found = [f"layer block {b} keeps {counts[b]}" for b in np.flatnonzero((counts < self.blocks.least) | (counts > self.blocks.most))]
        groups = np.stack([kept[:, self.blocks.group == g].sum(axis=1) for g in np.unique(self.blocks.group)], axis=1)
        return found + [f"layer block {b} leaves a group short" for b in np.flatnonzero(groups.min(axis=1) < self.blocks.group_least)]


@dataclass(frozen=True, slots=True, kw_only=True)
class Prices:
    """Multipliers: nats per byte, nats per unit of each row, weight of each objective."""

    byte: float
    rows: F64  # [R]
    objectives: F64  # [K]


@dataclass(frozen=True, slots=True, kw_only=True)
class Solution:
    """A feasible choice, and a proven `bound` that no choice goes below."""

    count_index: int
    picks: Picks
    cost: float
    bound: float
    proven: bool
    prices: Prices  # at which its count was bounded
    per_count: tuple[tuple[float | None, float | None], ...]  # [C] (bound, best cost found)

    @property
    def price(self) -> float:
        """Nats that one more byte saves."""
        return self.prices.byte

    @property
    def gap(self) -> float:
        """Relative distance of the cost to the bound."""
        return max(0.0, self.cost - self.bound) / max(abs(self.cost), 1e-30)


Programs = Callable[[int], Program]
"""The program of a kept count, by its index."""
