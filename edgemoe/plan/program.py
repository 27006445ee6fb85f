"""This module compiles Costs, constraints and a kept count into one program (solvers/program.py), and reads its answer back.

options      0 drops an expert; then come all formats in main memory, and with a second pool all formats in GPU memory
units        first the experts of every layer if they are chosen one by one, then all units that get a format; tied units are one
objectives   the mean over domains, or the sum of costs of each domain
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgemoe.base.errors import UsageError
from edgemoe.base.types import F64
from edgemoe.ir import Costs, Plan
from edgemoe.rules.constraints import Bound, Constraints, held_by_gpu, vram_room
from edgemoe.rules.linear import active_rates
from edgemoe.solvers.lagrange import minimise, plain_prices
from edgemoe.solvers.program import DROP, Blocks, Picks, Program, Row, Soft

SELECT = 1  # option "keep" of an expert whose format is its stack's
FOREVER_CPU = ("token_embd",)  # llama.cpp looks rows of the embedding up on the CPU, even if the layers are on a GPU
Bytes = NDArray[np.int64]


@dataclass(frozen=True, slots=True, kw_only=True)
class Compiled:
    """A program, and the methods that read its picks."""

    program: Program
    count_place: int  # place of the kept count in costs.counts; `Solution.count_index` is its place among the allowed counts
    staging: NDArray[np.int64]  # [P, O] bytes of the copy that loading needs, for the P units of the program
    kept_set: NDArray[np.bool_]  # [L, E] kept experts; without meaning if the program picks the experts
    units: NDArray[np.int64]  # [U] for each unit of the costs, its unit in the program
    n_formats: int
    picks_experts: bool  # whether the program decides which experts stay

    def formats(self, picks: Picks) -> NDArray[np.int64]:
        """Format of every unit of the costs [U]; -1: dropped."""
        option = picks[self.units]
        return np.where(option == DROP, -1, (option - 1) % self.n_formats)

    def in_vram(self, picks: Picks) -> NDArray[np.bool_]:
        """Which units of the costs [U] live in GPU memory."""
        return np.asarray(picks[self.units] > self.n_formats)

    def kept(self, costs: Costs, picks: Picks) -> NDArray[np.bool_]:
        """Kept experts [L, E]."""
        if not self.picks_experts:
            return self.kept_set
        mask: NDArray[np.bool_] = picks[: self.program.n_experts].reshape(costs.n_layers, costs.n_experts) != DROP
        return mask

    def within(self, room: int, staging: int | None = None) -> Compiled:
        """This program with other bytes for weights in main memory, and without formats whose staging copy is larger than `staging`."""
        cost = self.program.cost if staging is None else np.where(self.staging <= staging, self.program.cost, np.inf)
        return replace(self, program=replace(self.program, room=room, cost=cost))


def compile_program(
    costs: Costs, constraints: Constraints, count_place: int, *, objective: str = "mean", near: Near | None = None
) -> Compiled:
    """The program of one kept count; `Compiled.within` gives it its room.

    Args:
        costs: the price list.
        constraints: from the rules.
        count_place: place of the kept count in costs.counts.
        objective: "mean" over domains or the "worst" domain.
        near: an earlier plan, and the nats that every difference to it costs.
    """
    picks_experts = costs.form == "experts" or constraints.chooses_experts or objective == "worst"
    domain_weights = costs.weights[None] if objective == "mean" else np.eye(len(costs.domains))  # [K, D]
    cost, size, staging = _options(costs, constraints, count_place, domain_weights)
    rows = [_row(costs, constraints, bound, count_place) for bound in constraints.bounds]
    if constraints.vram is not None:
        rows.append(_vram_row(costs, constraints, count_place))
    constant, drops = _price_drops(costs, count_place, domain_weights, near, picks_experts=picks_experts)
    if near is not None:
        cost = cost + near.of_formats(costs, cost.shape[2])
    units, blocks, kept = np.arange(len(costs.units)), _blocks(costs, constraints, count_place), costs.kept[count_place]
    needs_experts = any(b.expression.needs_experts for b in constraints.bounds)
    if costs.form == "stacks" and picks_experts and len(domain_weights) == 1 and not needs_experts:
        picks_experts = False  # nothing else depends on which experts stay, so the best sets are known before solving
        drop_nats, kept = _best_sets(constraints, blocks, drops)
        if np.isfinite(drop_nats):
            constant = constant + drop_nats
        else:  # pins and groups allow no sets, so there is no plan
            cost = np.full_like(cost, np.inf)
    if costs.form == "experts":
        units, cost, size, staging, rows = _experts_first(costs, cost, size, staging, rows, drops)
    elif picks_experts:
        cost, size, staging, rows = _with_selection(costs, cost, size, staging, rows, drops, constraints.bounds)
        units = units + costs.n_layers * costs.n_experts
    if picks_experts:
        _pin(cost, constraints)
    program = Program(
        cost=cost,
        size=size,
        constant=constant,
        fixed=int(costs.fixed_size[count_place]),
        room=0,
        blocks=blocks if picks_experts else None,
        rows=tuple(rows),
        soft=tuple(Soft(name=s.name, low=s.low, high=s.high, price=s.price) for s in constraints.soft.values()),
        format_of=_format_of(costs, size.shape, selection=costs.form == "stacks" and picks_experts),
        max_formats=constraints.max_formats,
    )
    program, units, staging = _tie(program, units, staging, constraints)
    return Compiled(
        program=program,
        count_place=count_place,
        staging=staging,
        kept_set=kept,
        units=units,
        n_formats=len(costs.formats),
        picks_experts=picks_experts,
    )


def _options(costs: Costs, constraints: Constraints, count_place: int, domain_weights: F64) -> tuple[F64, Bytes, Bytes]:
    """Nats [K, U, O], bytes in main memory and bytes of staging copies [U, O] of the options of all units that get a format."""
    factor = domain_weights @ costs.factor  # [K, U]
    main = np.where(constraints.offered, costs.cost[count_place], np.inf)
    no_drop = np.full((len(main), 1), np.inf)  # only experts can be dropped, and they get the price of this option later
    pools = [main] if constraints.vram is None else _two_pools(costs, main)
    base = np.concatenate([no_drop, *pools], axis=1)
    offered = np.isfinite(base)
    # What is not offered must stay at inf where a factor is 0; inf times 0 would be no number.
    cost = np.where(offered, np.where(offered, base, 0.0) * factor[:, :, None], np.inf)
    held = costs.size[count_place] + costs.extra[count_place]  # the room is for the bytes that the process holds
    dropped, nothing = np.zeros((len(main), 1), np.int64), np.zeros_like(held)
    in_gpu = [nothing] if constraints.vram else []  # formats in GPU memory take no main memory
    return cost, np.concatenate([dropped, held, *in_gpu], axis=1), np.concatenate([dropped, costs.staging[count_place], *in_gpu], axis=1)


def _price_drops(costs: Costs, count_place: int, domain_weights: F64, near: Near | None, *, picks_experts: bool) -> tuple[F64, F64]:
    """Nats that all choices of kept sets share [K], and nats of dropping each expert [K, L, E]."""
    menu = costs.kept[count_place]
    constant = domain_weights @ costs.drop_cost[:, count_place].sum(axis=1)
    drops = np.tensordot(domain_weights, costs.expert_drop + costs.inherited, axes=1)
    if costs.form == "stacks" and picks_experts:
        # The constant holds the price of the menu's sets.  If experts are picked, each dropped one pays its own price beside it, so the own
        # prices of those that the menu drops are subtracted: the menu's sets then cost what the menu says.
        constant = constant - np.array([d[~menu].sum() for d in drops])
    if near is not None:
        gone = near.gone(costs)
        # If experts are picked, each expert that the earlier plan drops is charged here, and dropping it again gives the charge back.
        constant = constant + near.nats * (gone.sum() if picks_experts else (gone != ~menu).sum())
        drops = drops + np.where(gone, -near.nats, near.nats)
    return constant, drops


def _pin(cost: F64, constraints: Constraints) -> None:
    """Make options that pins exclude infinitely dear, in place; the experts come first in the costs [K, U, O]."""
    pinned = constraints.pinned.ravel()
    cost[:, : pinned.size, DROP][:, pinned > 0] = np.inf
    cost[:, : pinned.size, SELECT:][:, pinned < 0] = np.inf


def _best_sets(constraints: Constraints, blocks: Blocks, drops: F64) -> tuple[float, NDArray[np.bool_]]:
    """The least nats of drops under pins and groups, and the kept sets [L, E] that have them; inf if there are no such sets."""
    n = blocks.n * blocks.size
    cost = np.stack([drops.reshape(1, n), np.zeros((1, n))], axis=2)
    _pin(cost, constraints)
    size = np.zeros((n, 2), np.int64)
    program = Program(cost=cost, size=size, constant=np.zeros(1), fixed=0, room=0, blocks=blocks)
    value, picks = minimise(program, plain_prices(program, 0.0))
    return value, picks.reshape(blocks.n, blocks.size) != DROP


def _format_of(costs: Costs, shape: tuple[int, ...], *, selection: bool) -> NDArray[np.int64]:
    """Format of every option [U, O]; -1 for dropping, and with `selection` for the experts, whose format is their stack's."""
    of_option = np.array([-1, *(f % len(costs.formats) for f in range(shape[1] - 1))])
    found = np.tile(of_option, (shape[0], 1))
    if selection:
        found[: costs.n_layers * costs.n_experts] = -1
    return found


def _two_pools(costs: Costs, main: F64) -> list[F64]:
    """Costs in main memory and in GPU memory: expert stacks may be in either, the embedding is in the first, the rest in the second."""
    stack = np.array([u.is_stack for u in costs.units])
    cpu = np.array([u.role in FOREVER_CPU for u in costs.units])
    return [np.where((stack | cpu)[:, None], main, np.inf), np.where(cpu[:, None], np.inf, main)]


def _row(costs: Costs, constraints: Constraints, bound: Bound, count_place: int) -> Row:
    """A rule's coefficients [U, O] at one kept count."""
    e = bound.expression
    size = costs.size[count_place]
    n_weights = np.array([costs.kept_weights(u, count_place) for u in range(len(costs.units))]) if e.weights.any() else np.zeros(len(size))
    rates = active_rates(costs, costs.counts[count_place]) if e.active.any() else np.zeros(len(size))
    coef = e.use + (e.size + e.active * rates)[:, None] * size + (e.weights * n_weights)[:, None]
    if costs.form == "experts" and e.keep.any():
        layers = {layer: row for row, layer in enumerate(costs.expert_layers)}
        kept = np.array([e.keep[layers[u.layer], u.expert] if u.expert >= 0 else 0.0 for u in costs.units])
        coef = coef + kept[:, None]
    pools = 2 if constraints.vram else 1
    soft = np.array([e.soft.get(name, 0.0) for name in constraints.soft])
    return Row(name=bound.name, coef=np.concatenate([np.zeros((len(size), 1)), *[coef] * pools], axis=1), limit=-e.constant, soft=soft)


def _vram_row(costs: Costs, constraints: Constraints, count_place: int) -> Row:
    """The limit of GPU memory, as coefficients [U, O] at one kept count."""
    assert constraints.vram is not None
    size = costs.size[count_place].astype(np.float64)
    of_main = np.where(held_by_gpu(costs)[:, None], size, 0.0)  # GPU bytes of a unit in main memory: a GPU also holds a tied embedding
    coef = np.concatenate([np.zeros((len(size), 1)), of_main, size], axis=1)
    return Row(
        name=constraints.vram.name or "vram",
        coef=coef,
        limit=float(vram_room(costs, constraints.vram)),
        soft=np.zeros(len(constraints.soft)),
    )


def _experts_first(
    costs: Costs, cost: F64, size: Bytes, staging: Bytes, rows: list[Row], drops: F64
) -> tuple[NDArray[np.int64], F64, Bytes, Bytes, list[Row]]:
    """Compile the experts form: experts come first, layer by layer, with the price of dropping them."""
    layers = {layer: row for row, layer in enumerate(costs.expert_layers)}
    place = [layers[u.layer] * costs.n_experts + u.expert if u.expert >= 0 else -1 for u in costs.units]
    n = costs.n_layers * costs.n_experts
    free = [i for i, p in enumerate(place) if p < 0]
    units = np.array(place)
    units[free] = n + np.arange(len(free))
    order = np.argsort(units, kind="stable")
    if len(order) != n + len(free) or not np.array_equal(units[order], np.arange(len(order))):
        raise UsageError("the price list does not hold every expert of every layer once", hint="make it again")
    cost = cost[:, order]
    cost[:, :n, DROP] = drops.reshape(len(cost), n)
    return units, cost, size[order], staging[order], [Row(name=r.name, coef=r.coef[order], limit=r.limit, soft=r.soft) for r in rows]


def _with_selection(
    costs: Costs, cost: F64, size: Bytes, staging: Bytes, rows: list[Row], drops: F64, bounds: list[Bound]
) -> tuple[F64, Bytes, Bytes, list[Row]]:
    """Compile the stacks form with free kept sets: experts come first, as units that are dropped or kept and hold no bytes."""
    n, options = costs.n_layers * costs.n_experts, size.shape[1]
    expert_cost = np.full((len(cost), n, options), np.inf)
    expert_cost[:, :, DROP], expert_cost[:, :, SELECT] = drops.reshape(len(cost), n), 0.0
    found = []
    for number, row in enumerate(rows):
        coef = np.zeros((n, options))
        if number < len(bounds):  # behind the rules comes the row of GPU memory, of which experts as such take nothing
            coef[:, SELECT] = bounds[number].expression.keep.ravel()
        found.append(Row(name=row.name, coef=np.concatenate([coef, row.coef]), limit=row.limit, soft=row.soft))
    none = np.zeros((n, options), np.int64)
    return np.concatenate([expert_cost, cost], axis=1), np.concatenate([none, size]), np.concatenate([none, staging]), found


def _blocks(costs: Costs, constraints: Constraints, count_place: int) -> Blocks:
    """The layers as blocks, with the number of experts that stay in the layer and in each routing group."""
    n_layers, n_experts, count = costs.n_layers, costs.n_experts, costs.counts[count_place]
    groups, least = constraints.groups
    if constraints.equal_groups:
        least = count // groups
    exact = np.full(n_layers, count)
    stacks = costs.form == "stacks"
    return Blocks(
        n=n_layers,
        size=n_experts,
        least=exact if stacks else np.full(n_layers, constraints.least_kept),
        most=exact if stacks else np.full(n_layers, constraints.most_kept),
        curve=np.zeros((n_layers, n_experts + 1)) if stacks else costs.drop_curve,
        group=np.arange(n_experts) // (n_experts // groups),
        group_least=least,
    )


def _tie(program: Program, units: NDArray[np.int64], staging: Bytes, constraints: Constraints) -> tuple[Program, NDArray[np.int64], Bytes]:
    """Join tied units into one unit, whose costs, bytes and coefficients are sums and whose copy is the largest; experts cannot be tied."""
    if not constraints.ties:
        return program, units, staging
    into = np.arange(program.cost.shape[1])  # for each unit, the first unit that it is tied to
    for tie in constraints.ties:
        tied = units[tie]
        if (tied < program.n_experts).any():
            raise UsageError("single experts cannot share a format", hint="tie stacks and other tensors")
        into[np.isin(into, into[tied])] = into[tied].min()
    names, merged = np.unique(into, return_inverse=True)
    shape = len(names), program.size.shape[1]

    def add(values: NDArray[Any]) -> NDArray[Any]:
        out = np.zeros(shape, values.dtype)
        np.add.at(out, merged, values)
        return out

    tied_program = Program(
        cost=np.stack([add(k) for k in program.cost]),
        size=add(program.size),
        constant=program.constant,
        fixed=program.fixed,
        room=program.room,
        blocks=program.blocks,
        rows=tuple(Row(name=r.name, coef=add(r.coef), limit=r.limit, soft=r.soft) for r in program.rows),
        soft=program.soft,
        format_of=None if program.format_of is None else program.format_of[names],
        max_formats=program.max_formats,
    )
    largest = np.zeros(shape, np.int64)
    np.maximum.at(largest, merged, staging)
    return tied_program, merged[units], largest


@dataclass(frozen=True, slots=True, kw_only=True)
class Near:
    """An earlier plan, and the nats that each difference from it costs."""

    plan: Plan
    nats: float

    def of_formats(self, costs: Costs, n_options: int) -> F64:
        """Nats of every option [U, O] whose format differs from the earlier plan's."""
        number = {name: f for f, name in enumerate(costs.formats)}
        earlier = np.array([number.get(self.plan.formats.get(unit.name, ""), -1) for unit in costs.units])
        return np.where((np.arange(n_options) - 1) % len(costs.formats) == earlier[:, None], 0.0, self.nats)

    def gone(self, costs: Costs) -> NDArray[np.bool_]:
        """Experts that the earlier plan drops [L, E]."""
        gone = np.ones((costs.n_layers, costs.n_experts), bool)
        for row, kept in enumerate(self.plan.kept):
            gone[row, list(kept)] = False
        return gone
