"""This module writes the program in PuLP, unit by unit or by columns.

sets         every unit is a set whose items are its options; or a whole block is a set whose items are complete layer plans (columns.py)
variables    x[i] in {0, 1}                                       item i is taken
minimise     scale * sum_i cost[i] x[i] + soft variables          scaled so that the best known plan costs 10^4, because solvers give
             wrong answers without a warning if coefficients are near their tolerances
             or t, with t >= scale * (constant_k + sum_i cost[k, i] x[i]) for every objective k
subject to   sum_{i in set} x[i] = 1                              for each set
             sum_i size[i] / room x[i] <= 1                       bytes, and every rule scaled by its largest coefficient
             fewest <= sum_{e in block} x[e, drop] <= most        unit by unit only: kept counts, groups, the curve
             x[i] <= y[f] for each format f of i, sum_f y[f] <= max_formats
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgemoe.base.types import F64
from edgemoe.solvers.effort import Effort
from edgemoe.solvers.engine import Outcome, run
from edgemoe.solvers.lagrange import Relaxed, absorb, fill, minimise
from edgemoe.solvers.program import DROP, Picks, Prices, Program

SCALE = 1e4  # of the objective
CLEAREST = 1e7  # a scaled objective above this was expected to be smaller, and the program is scaled again
TRIES = 4  # solves of one program; a choice that keeps a row only within the solver's tolerance is cut off, and the program solved again
MARGIN = 2.0  # an exceeded row is tightened by this factor times its excess


@dataclass(frozen=True, slots=True, kw_only=True)
class Items:
    """I items in sets, of which one is taken from each set; item i is a choice for the units `units[i]`."""

    owner: NDArray[np.int64]  # [I] set
    units: list[NDArray[np.int64]]  # [I] the units that the item decides
    picks: list[Picks]  # [I] their options
    cost: F64  # [K, I]
    size: F64  # [I]
    rows: F64  # [R, I]
    n_sets: int


@dataclass(slots=True)
class LinearModel:
    """A PuLP problem and its parts."""

    problem: Any
    x: list[Any]
    scale: float
    room: float
    row_scale: F64  # [R] of the rules' rows; the bytes are scaled by `room`
    soft: list[Any] = field(default_factory=list)
    elastic: list[Any] = field(default_factory=list)


def unit_items(program: Program, units: NDArray[np.int64], known: Relaxed | None = None) -> Items:
    """The options of each of these units, one set for each; options that cannot improve on the known choice are left out."""
    offered = _promising(program, known)
    owner, option = np.nonzero(offered[units])
    index = units[owner]
    rows = np.stack([r.coef[index, option] for r in program.rows]) if program.rows else np.zeros((0, len(index)))
    return Items(
        owner=owner,
        units=list(index[:, None]),
        picks=list(option[:, None]),
        cost=program.cost[:, index, option],
        size=program.size[index, option].astype(np.float64),
        rows=rows,
        n_sets=len(units),
    )


def _promising(program: Program, known: Relaxed | None) -> NDArray[np.bool_]:
    """Options [U, O] that no other option beats in costs, bytes and every rule, and with which the bound stays below the known choice.

    The second condition is reduced-cost fixing: an option that raises the relaxation above the known cost is part of no better choice.
    """
    offered: NDArray[np.bool_] = np.asarray(np.isfinite(program.cost).all(axis=0))
    n = program.n_experts
    if known is not None and known.picks is not None and not program.soft:
        plain, value = absorb(program, known.prices), minimise(program, known.prices)[0]
        reduced = plain.cost[0, n:] + known.prices.byte * program.size[n:]
        margin = known.cost - value + 1e-9 * abs(known.cost)
        offered[n:] &= reduced - reduced.min(axis=1, keepdims=True) <= margin
    if program.max_formats:
        return offered
    first = 1 if n else 0  # dropping an expert is no format, so no format can beat it
    traits = np.stack([*np.where(np.isfinite(program.cost), program.cost, 0.0), program.size, *(r.coef for r in program.rows)])
    for o in range(first, offered.shape[1]):
        for other in range(first, offered.shape[1]):
            if o != other:
                no_worse = (traits[:, :, other] <= traits[:, :, o]).all(axis=0)
                twin = (traits[:, :, other] == traits[:, :, o]).all(axis=0)
                offered[:, o] &= ~(offered[:, other] & no_worse & (~twin | (other < o)))
    return offered


def join(first: Items, second: Items) -> Items:
    """The items of both, with their sets kept apart."""
    return Items(
        owner=np.concatenate([first.owner, second.owner + first.n_sets]),
        units=first.units + second.units,
        picks=first.picks + second.picks,
        cost=np.concatenate([first.cost, second.cost], axis=1),
        size=np.concatenate([first.size, second.size]),
        rows=np.concatenate([first.rows, second.rows], axis=1),
        n_sets=first.n_sets + second.n_sets,
    )


def build(program: Program, items: Items, best_cost: float, *, tighter: F64 | None = None, elastic: bool = False) -> LinearModel:
    """The problem over some items.

    Args:
        program: the numbers.
        items: that can be taken.
        best_cost: a known (or expected) objective, for the scale.
        tighter: by how much the scaled rows are tightened [1 + R], bytes first.
        elastic: minimise by how much rules and budget are exceeded, and ignore costs.
    """
    import pulp

    problem = pulp.LpProblem("edgemoe", pulp.LpMinimize)
    room = float(program.room - program.fixed)
    scale = _scale(program, items, best_cost)
    tighter = np.zeros(1 + len(program.rows)) if tighter is None else tighter
    x = [problem.add_variable(f"x{i:07d}", 0, 1, pulp.LpInteger) for i in range(len(items.owner))]
    model = LinearModel(problem, x, scale, room, np.ones(len(program.rows)))
    model.soft = [problem.add_variable(f"s{s:04d}", v.low, None if np.isinf(v.high) else v.high) for s, v in enumerate(program.soft)]
    priced = [(v, s.price * scale) for v, s in zip(model.soft, program.soft, strict=True)]
    if elastic:
        model.elastic = [problem.add_variable(f"z{r:05d}", 0) for r in range(len(program.rows) + 1)]
        problem += pulp.LpAffineExpression([(z, 1.0) for z in model.elastic])
    elif len(program.cost) == 1:
        problem += pulp.LpAffineExpression([*zip(x, (items.cost[0] * scale).tolist(), strict=True), *priced])
    else:
        worst = problem.add_variable("t")
        problem += pulp.LpAffineExpression([(worst, 1.0), *priced])
        for k, cost in enumerate(items.cost):
            terms = [*_terms(x, cost * scale), (worst, -1.0)]
            problem += _row(terms, -float(program.constant[k]) * scale), f"objective{k:03d}"
    problem += _row([*_terms(x, items.size / max(room, 1.0)), *_negative(model.elastic[:1])], 1 - tighter[0]), "bytes"
    for r, row in enumerate(program.rows):
        most = max(float(np.abs(items.rows[r]).max(initial=0.0)), float(np.abs(row.soft).max(initial=0.0)), abs(row.limit) / 1e3, 1e-300)
        model.row_scale[r] = 1 / most
        terms = [*_terms(x, items.rows[r] / most), *_terms(model.soft, row.soft / most), *_negative(model.elastic[r + 1 : r + 2])]
        problem += _row(terms, row.limit / most - tighter[r + 1]), f"rule{r:04d}"
    by_set: list[list[Any]] = [[] for _ in range(items.n_sets)]
    for variable, s in zip(x, items.owner, strict=True):
        by_set[s].append((variable, 1.0))
    for s, members in enumerate(by_set):
        problem += _row(members, 1.0, sense=0), f"one{s:06d}"
    _limit_formats(program, items, model)
    return model


def _scale(program: Program, items: Items, best_cost: float) -> float:
    """The factor that makes the best known cost 10^4, without constants; it is limited so that no coefficient is infinite to the solver."""
    constant = float(program.constant[0]) if len(program.constant) == 1 else 0.0
    largest = float(np.abs(items.cost).max(initial=0.0))
    return SCALE / max(abs(best_cost - constant), 1e-12 * largest, 1e-200)


def _terms(variables: list[Any], coefficients: F64) -> list[tuple[Any, float]]:
    return [(v, float(c)) for v, c in zip(variables, coefficients, strict=True) if c]


def _negative(variables: list[Any]) -> list[tuple[Any, float]]:
    return [(v, -1.0) for v in variables]


def _row(terms: list[tuple[Any, float]], limit: float, sense: int = -1) -> Any:
    import pulp

    return pulp.LpConstraint(pulp.LpAffineExpression(terms), sense, rhs=limit)


def _limit_formats(program: Program, items: Items, model: LinearModel) -> None:
    """Limit the number of formats; y[f] says that format f is used."""
    if not program.max_formats or program.format_of is None:
        return
    import pulp

    users: dict[int, list[int]] = {}
    for i, options in enumerate(items.picks):
        for f in sorted({int(f) for f in program.format_of[items.units[i], options] if f >= 0}):
            users.setdefault(f, []).append(i)
    used = {f: model.problem.add_variable(f"y{f:03d}", 0, 1, pulp.LpInteger) for f in sorted(users)}
    for f, members in sorted(users.items()):
        for s in sorted({int(items.owner[i]) for i in members}):
            mine = [(model.x[i], 1.0) for i in members if items.owner[i] == s]
            model.problem += _row([*mine, (used[f], -1.0)], 0.0), f"format{f:03d}_{s:06d}"
    model.problem += _row([(y, 1.0) for y in used.values()], float(program.max_formats)), "formats"


def add_block_rules(program: Program, items: Items, model: LinearModel) -> None:
    """Add kept counts, groups and the curve of blocks whose experts are sets of their own (the first sets)."""
    blocks, problem = program.blocks, model.problem
    if blocks is None:
        return
    gone: dict[int, Any] = {}
    for i, (s, option) in enumerate(zip(items.owner, items.picks, strict=True)):
        if s < program.n_experts and option[0] == DROP:
            gone[int(s)] = model.x[i]
    for b in range(blocks.n):
        members = [(gone[u], 1.0) for u in range(b * blocks.size, (b + 1) * blocks.size) if u in gone]
        problem += _row(members, float(blocks.size - blocks.least[b])), f"most_gone{b:04d}"
        if blocks.most[b] < blocks.size:
            problem += _row(members, float(blocks.size - blocks.most[b]), sense=1), f"least_gone{b:04d}"
        for g in np.unique(blocks.group) if blocks.group_least else ():
            mine = [(gone[b * blocks.size + int(e)], 1.0) for e in np.flatnonzero(blocks.group == g) if b * blocks.size + int(e) in gone]
            problem += _row(mine, float((blocks.group == g).sum() - blocks.group_least)), f"group{b:04d}_{int(g):03d}"
        _add_curve(program, model, b, members)


def _add_curve(program: Program, model: LinearModel, b: int, gone: list[tuple[Any, float]]) -> None:
    """Add the curve of one block: by steps z[j] in [0, 1] if it is convex, else by one binary for each count."""
    import pulp

    assert program.blocks is not None
    curve = program.blocks.curve[b]
    if not curve.any():
        return
    steps = np.diff(curve)
    if curve[0] == 0 and (np.diff(steps) >= -1e-15).all():
        z = [model.problem.add_variable(f"c{b:04d}_{j:04d}", 0, 1) for j in range(len(steps))]
        model.problem += _row([*gone, *_negative(z)], 0.0, sense=0), f"curve{b:04d}"
        priced = _terms(z, steps * model.scale)
    else:
        z = [model.problem.add_variable(f"c{b:04d}_{j:04d}", 0, 1, pulp.LpInteger) for j in range(len(curve))]
        model.problem += _row([(v, 1.0) for v in z], 1.0, sense=0), f"curve_one{b:04d}"
        model.problem += _row([*gone, *[(v, -float(j)) for j, v in enumerate(z) if j]], 0.0, sense=0), f"curve{b:04d}"
        priced = _terms(z, curve * model.scale)
    if len(program.cost) == 1:
        model.problem.objective.addInPlace(pulp.LpAffineExpression(priced))
    else:
        for k in range(len(program.cost)):
            model.problem.get_constraint_by_name(f"objective{k:03d}").addInPlace(pulp.LpAffineExpression(priced))


def prices_of(program: Program, model: LinearModel, scale: float | None = None) -> Prices:
    """Lagrange multipliers from the duals of a solved linear relaxation whose objective is scaled by the model, or by `scale`."""
    scale = model.scale if scale is None else scale

    def dual(name: str) -> float:
        return max(0.0, -float(model.problem.get_constraint_by_name(name).pi or 0.0))

    rows = np.array([dual(f"rule{r:04d}") * s for r, s in enumerate(model.row_scale)]) / scale
    if len(program.cost) == 1:
        objectives = np.ones(1)
    else:
        objectives = np.array([dual(f"objective{k:03d}") for k in range(len(program.cost))])
        objectives = objectives / max(objectives.sum(), 1e-300)
    return Prices(byte=dual("bytes") / scale / max(model.room, 1.0), rows=rows, objectives=objectives)


def solve_items(
    program: Program,
    items: Items,
    known: Relaxed,
    effort: Effort,
    *,
    exact: bool,
) -> Relaxed | None:
    """The best choice among these items, never worse than the known one; None if it is proven that there is no choice.

    Args:
        program: the numbers.
        items: that can be taken.
        known: bound and choice so far.
        effort: engine, gap and time limit.
        exact: the items are complete, so the solver's bound, or its proof that nothing fits, holds for the program.
    """
    best, cost, bound = known.picks, known.cost, known.bound
    expected = cost if np.isfinite(cost) else bound
    tighter = np.zeros(1 + len(program.rows))
    for _ in range(TRIES):
        model = build(program, items, expected, tighter=tighter)
        if items.n_sets == program.cost.shape[1]:  # unit by unit
            add_block_rules(program, items, model)
        closer = replace(effort, gap=0.9 * effort.gap)
        enough = bound + closer.gap * abs(bound)  # with this value, the known bound proves the gap
        target = (enough - (float(program.constant[0]) if len(program.cost) == 1 else 0.0)) * model.scale
        outcome = run(model.problem, closer, target=target)
        if outcome.infeasible and exact and not tighter.any():
            if best is None:
                return None
            bound = cost  # options left out are no better than the known choice, and the others hold no choice
        if exact and not tighter.any() and outcome.bound > -np.inf:
            bound = max(bound, _in_nats(program, model, outcome))
        if not outcome.solved:
            break
        picks = _decode(program, items, model)
        exceeded = _exceeded(program, model, picks)
        if not program.broken(picks):
            picks = fill(program, picks)
            if program.objective(picks) < cost:
                best, cost = picks, program.objective(picks)
            if abs(float(model.problem.objective.value())) < CLEAREST or tighter.any() or effort.is_over:
                break
            expected = cost
        elif (exceeded > 0).any():
            tighter = np.where(exceeded > 0, tighter + MARGIN * exceeded, tighter)
        else:
            break  # no row is exceeded, so the solver's values are no choice at all
    return Relaxed(bound=min(bound, cost), cost=cost, picks=best, prices=known.prices)


def _exceeded(program: Program, model: LinearModel, picks: Picks) -> F64:
    """By how much a choice exceeds the scaled rows [1 + R]."""
    every, soft = np.arange(len(picks)), program.soft_values(picks)
    over = [(program.evaluate(picks)[1] - program.room) / max(model.room, 1.0)]
    for row, scale in zip(program.rows, model.row_scale, strict=True):
        over.append((float(row.coef[every, picks].sum() + row.soft @ soft) - row.limit) * scale)
    return np.maximum(over, 0.0)


def _in_nats(program: Program, model: LinearModel, outcome: Outcome) -> float:
    """The solver's bound in nats, less the effect of its tolerance of 1e-6 on the objective of 10^4."""
    constant = float(program.constant[0]) if len(program.cost) == 1 else 0.0
    return (outcome.bound - 1e-6) / model.scale + constant


def _decode(program: Program, items: Items, model: LinearModel) -> Picks:
    picks = np.zeros(program.cost.shape[1], np.int64)
    values = np.array([v.varValue or 0.0 for v in model.x])
    for i in np.flatnonzero(values > 0.5):
        picks[items.units[i]] = items.picks[i]
    return picks
