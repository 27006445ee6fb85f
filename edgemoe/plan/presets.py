"""Price list in the experts form, a budget -> plans under narrower rules, as peers: PMQ's widths, and one width for all experts of a layer.

Both take the same formats, bytes and prices as our own plans, so they differ only in what may be decided.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

from edgemoe.base.errors import BudgetError, UsageError
from edgemoe.base.types import F64
from edgemoe.base.units import format_bytes
from edgemoe.ir import Costs, Plan
from edgemoe.ir.memory import room_for_weights
from edgemoe.plan.evaluate import describe_choice
from edgemoe.plan.pmq import allocate_bits
from edgemoe.solvers.program import Program
from edgemoe.solvers.search import solve

PMQ_WIDTHS = (2, 3, 4)  # bits; PMQ itself takes 1, 2 and 3, but onnxruntime has no 1
GONE = -1
Formats = NDArray[np.int64]


def pmq_plan(costs: Costs, budget: int, tokens: F64, gates: F64, formats: Mapping[int, str], others: Mapping[str, str] | str) -> Plan:
    """PMQ's allocation (solvers/pmq.py) with the most bits that fit: every expert stays, and every layer, alone, gets as many bits.

    An expert's error at a width, the norm of what changes in its layer's output, is the root of our price, which is a mean square.

    Args:
        costs: the price list.
        budget: bytes of the process.
        tokens: that each expert got [L, E].
        gates: sums of its routing weights [L, E].
        formats: of each of PMQ_WIDTHS.
        others: format of every other unit, or of each by its role; PMQ does not decide it.

    Raises:
        UsageError: the price list is not in the experts form, or a format is not offered.
        BudgetError: the fewest bits are too many.
    """
    place = _expert_units(costs)
    numbers = [_number(costs, formats[bits]) for bits in PMQ_WIDTHS]
    chosen = np.array(
        [GONE if u.expert >= 0 else _number(costs, others if isinstance(others, str) else others[u.role]) for u in costs.units]
    )
    errors = np.sqrt(costs.cost[0][place][:, :, numbers])  # [L, E, J]
    if not np.isfinite(errors).all() or not np.isfinite(costs.cost[0, np.arange(len(chosen)), chosen][chosen != GONE]).all():
        raise UsageError(f"pmq: not every unit can be stored as {', '.join(formats.values())} and {others}")
    room = room_for_weights(budget, costs.memory, 0)

    def allocate(total_bits: int) -> Formats:
        found = chosen.copy()
        for row, units in enumerate(place):
            bits = allocate_bits(tokens[row], gates[row], errors[row], total_bits, bits=PMQ_WIDTHS)[0]
            found[units] = [numbers[PMQ_WIDTHS.index(int(b))] for b in bits]
        return found

    low = PMQ_WIDTHS[0] * costs.n_experts + 3  # one expert has 3 bits and one 4
    high = PMQ_WIDTHS[-1] * costs.n_experts - 1
    best = allocate(low)
    if _held(costs, best) > room:
        raise BudgetError(f"pmq: the fewest bits take {format_bytes(_held(costs, best) + budget - room)}, more than the budget")
    while low < high:  # more bits never take fewer bytes
        middle = (low + high + 1) // 2
        found = allocate(middle)
        if _held(costs, found) <= room:
            best, low = found, middle
        else:
            high = middle - 1
    return describe_choice(costs, budget, np.ones((costs.n_layers, costs.n_experts), bool), best, solver="pmq")


def layer_uniform_plan(costs: Costs, budget: int, gap: float = 1e-4) -> Plan:
    """The best plan that stores all experts of a layer alike; which of them go is decided too, and the format of every other unit.

    A layer has one option for each format and number of experts that go: at a given format those go whose drop costs least beyond what
    storing them does, so no other set of that size is cheaper (experts of a layer are equally large).

    Raises:
        UsageError: the price list is not in the experts form.
        BudgetError: nothing fits.
    """
    place = _expert_units(costs)
    drop = np.tensordot(costs.weights, costs.expert_drop + costs.inherited, axes=1)  # [L, E]
    held = costs.size[0] + costs.extra[0]
    most = costs.n_experts - costs.top_k
    n_formats = len(costs.formats)
    order = np.zeros((*drop.shape, n_formats), np.int64)  # [L, E, F] who goes first
    cost = np.full((costs.n_layers + len(costs.units), n_formats * (most + 1)), np.inf)
    size = np.zeros(cost.shape, np.int64)
    for row, units in enumerate(place):
        for f in np.flatnonzero(np.isfinite(costs.cost[0, units]).all(axis=0)).tolist():
            own = costs.cost[0, units, f]
            order[row, :, f] = gone = np.argsort(drop[row] - own, kind="stable")
            saved = np.concatenate([[0.0], np.cumsum((drop[row] - own)[gone])])[: most + 1]
            freed = np.concatenate([[0], np.cumsum(held[units, f][gone])])[: most + 1]
            cost[row, f * (most + 1) :][: most + 1] = own.sum() + saved + costs.drop_curve[row, : most + 1]
            size[row, f * (most + 1) :][: most + 1] = held[units, f].sum() - freed
    free = [u for u, unit in enumerate(costs.units) if unit.expert < 0]
    rest = np.arange(costs.n_layers, costs.n_layers + len(free))
    cost[rest, :n_formats], size[rest, :n_formats] = costs.cost[0, free], held[free]
    used = [*range(costs.n_layers), *rest.tolist()]
    room = room_for_weights(budget, costs.memory, 0)
    program = Program(cost=cost[None, used], size=size[used], constant=np.zeros(1), fixed=int(costs.fixed_size[0]), room=room)
    solution = solve(lambda _: program, 1, gap)
    if solution is None:
        raise BudgetError(f"no plan with one format for the experts of a layer fits {format_bytes(budget)}")
    kept, formats = np.ones(drop.shape, bool), np.full(len(costs.units), GONE)
    formats[free] = solution.picks[costs.n_layers :]
    for row, units in enumerate(place):
        f, k = divmod(int(solution.picks[row]), most + 1)
        kept[row, order[row, :k, f]] = False
        formats[units[kept[row]]] = f
    return describe_choice(costs, budget, kept, formats, solver="layer-uniform")


def _expert_units(costs: Costs) -> NDArray[np.int64]:
    """Number of the unit of each expert [L, E]."""
    if costs.form != "experts":
        raise UsageError("these plans need a price list in the experts form", hint="price with --target onnx")
    numbers = {(unit.layer, unit.expert): u for u, unit in enumerate(costs.units)}
    return np.array([[numbers[layer, e] for e in range(costs.n_experts)] for layer in costs.expert_layers])


def _number(costs: Costs, name: str) -> int:
    if name not in costs.formats:
        raise UsageError(f"format {name!r} is not known", hint=f"known: {', '.join(costs.formats)}")
    return costs.formats.index(name)


def _held(costs: Costs, formats: Formats) -> int:
    """Bytes of the process for these weights."""
    stored = np.flatnonzero(formats != GONE)
    return int(costs.fixed_size[0] + (costs.size + costs.extra)[0, stored, formats[stored]].sum())
