"""This module makes plans as other methods decide them (presets), from our price list and budget, to compare our plans with.

Every preset uses the formats, bytes and prices of our own plans, so a preset's plan and ours differ only in their decisions.  A preset
defines what may be decided, so it takes no rules, and no bound is proven for its plan.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from edgemoe.base.errors import BudgetError, EdgemoeError, UsageError
from edgemoe.base.types import F64
from edgemoe.base.units import format_bytes
from edgemoe.ir import Costs, Plan, Stats
from edgemoe.ir.memory import room_for_weights
from edgemoe.plan.evaluate import describe_choice
from edgemoe.plan.infeasible import least_budget
from edgemoe.plan.pmq import allocate_bits
from edgemoe.plan.solve import DEFAULT_GAP, solve_plan
from edgemoe.rules import KeptCount, Rule
from edgemoe.rules.constraints import Constraints
from edgemoe.solvers.effort import SECONDS, Effort, deadline
from edgemoe.solvers.program import Program
from edgemoe.solvers.search import solve

PMQ_WIDTHS = (2, 3, 4)  # bits; PMQ itself takes 1, 2 and 3, but onnxruntime has no 1
PMQ_REST = (4, 8)  # bits of everything outside the experts; MC keeps 4
GONE = -1
Formats = NDArray[np.int64]


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """The data that presets may use beside price list and budget."""

    stats: Stats | None = None  # calibration's statistics of the experts, which only PMQ needs
    gap: float = DEFAULT_GAP  # relative distance to the preset's own optimum that is good enough; PMQ's small programs are solved exactly
    seconds: float | None = SECONDS  # wall-clock limit of the solver, which PMQ has no use for


DEFAULTS = Settings()


def plan_preset(name: str, costs: Costs, budget: int, settings: Settings = DEFAULTS, *, costs_hash: str = "") -> Plan:
    """The plan of a preset.

    Args:
        name: one of PRESETS.
        costs: the price list.
        budget: bytes of the process at its peak.
        settings: statistics for PMQ, stopping rules for the other presets.
        costs_hash: recorded as the plan's origin.

    Raises:
        UsageError: there is no such preset, or it cannot work with this price list or without statistics.
        BudgetError: the preset has no plan of so few bytes; the message names its least bytes.
        EdgemoeError: the plan takes more than the budget.
    """
    made = find_preset(name)(costs, budget, settings)
    if made.memory["peak"] > budget:
        raise EdgemoeError(f"the plan of {name} takes {made.memory['peak']} of {budget} bytes", hint="please report this")
    return replace(made, costs=costs_hash or made.costs)


def find_preset(name: str) -> Preset:
    """The function of a preset.

    Raises:
        UsageError: no such preset; names those that there are.
    """
    if name not in PRESETS:
        raise UsageError(f"preset {name!r} is not known", hint=f"known: {', '.join(PRESETS)}")
    return PRESETS[name]


# ------------------------------------------------------------------------------------------------------ drops or formats alone
def plan_types_only(costs: Costs, budget: int, settings: Settings = DEFAULTS) -> Plan:
    """Decide formats alone: every expert stays, and each stack, expert and other matrix gets its format from one integer program.

    HAWQ-V3 chooses mixed precision by such a program over all matrices (Yao et al., arXiv 2011.10680); formats have our prices here.
    """
    return _solve_with(costs, budget, settings, "types-only", KeptCount(at_least=costs.n_experts, name="types-only"))


def plan_drops_only(costs: Costs, budget: int, settings: Settings = DEFAULTS) -> Plan:
    """Decide drops alone: every matrix has 8 bits, and the preset chooses which experts stay.

    Expert pruning of Lu et al. (arXiv 2402.14800) and REAP (arXiv 2510.13999) decides so; drops have our prices here.  The format is Q8_0,
    and for onnxruntime the best one of INT8_32, INT8_64 and INT8_128.  A matrix whose rows cannot be stored in it has the largest format
    that can store them (F16 in a GGUF).

    Raises:
        UsageError: the price list has no format of 8 bits.
        BudgetError: even the fewest experts take too many bytes.
    """
    eight = [f for f, name in enumerate(costs.formats) if _bits(name) == 8 and np.isfinite(costs.cost[-1, :, f]).any()]
    if not eight:
        raise UsageError(f"preset drops-only: no format of 8 bits is among {', '.join(costs.formats)}")
    found, failed = [], []
    for number in eight:
        try:
            found.append(_solve_with(costs, budget, settings, "drops-only", _OneFormat(number)))
        except BudgetError as error:
            failed.append(error)
    if not found:
        raise failed[-1]  # the error of the smallest format, because formats are listed by falling size
    return min(found, key=lambda plan: plan.q)


@dataclass(frozen=True, slots=True)
class _OneFormat:
    """The rule that every matrix is stored in one format, or in the largest possible one if its rows cannot be stored in this format."""

    number: int
    name: str = "drops-only"

    def apply(self, constraints: Constraints) -> None:
        """Mask all other formats."""
        costs = constraints.costs
        offered = np.isfinite(costs.cost[-1])
        largest = np.where(offered, costs.size[-1], -1).argmax(axis=1)
        chosen = np.where(offered[:, self.number], self.number, largest)
        constraints.offered &= chosen[:, None] == np.arange(len(costs.formats))


def _solve_with(costs: Costs, budget: int, settings: Settings, name: str, rule: Rule) -> Plan:
    """The best plan under one rule, as a preset's plan; its bound holds only under this rule, so the plan does not carry the bound.

    Raises:
        BudgetError: no plan fits; the message names the preset, since the user gave no rule.
    """
    try:
        plan = solve_plan(costs, budget, rules=[rule], gap=settings.gap, seconds=settings.seconds)
    except BudgetError as error:
        least = least_budget(costs, [rule])
        raise error if least is None else _too_few_bytes(name, budget, least) from error
    return replace(plan, solver=name, bound=0.0, gap=1.0, proven=False, price=0.0, counts=(), rules=())


# ------------------------------------------------------------------------------------------------------ one format for a layer
def plan_layer_uniform(costs: Costs, budget: int, settings: Settings = DEFAULTS) -> Plan:
    """The best plan in which all kept experts of a layer have one format; it also decides drops and the format of every other matrix.

    Mixed precision is usually decided layer by layer (HAWQ-V3, Yao et al., arXiv 2011.10680); this preset adds drops.  A layer has one
    option for each format and each number of dropped experts.  At a given format, the experts are dropped whose drop costs least beyond
    their storage, so no other set of this size is cheaper (experts of a layer have equal sizes).

    Raises:
        UsageError: the price list is not in the experts form, or the experts of a layer have no format in common.
        BudgetError: no plan fits; the message names the least bytes.
    """
    place = _expert_units(costs, "layer-uniform")
    drop = np.tensordot(costs.weights, costs.expert_drop + costs.inherited, axes=1)  # [L, E]
    held = costs.size[0] + costs.extra[0]
    most = costs.n_experts - costs.top_k if costs.n_groups == 1 else 0  # layers choose independently, so groups would not stay equal
    n_formats = len(costs.formats)
    order = np.zeros((*drop.shape, n_formats), np.int64)  # [L, E, F] experts in the order in which they are dropped
    cost = np.full((costs.n_layers + len(costs.units), n_formats * (most + 1)), np.inf)
    size = np.zeros(cost.shape, np.int64)
    for row, units in enumerate(place):
        common = np.flatnonzero(np.isfinite(costs.cost[0, units]).all(axis=0)).tolist()
        if not common:
            raise UsageError(f"preset layer-uniform: the experts of layer {costs.expert_layers[row]} have no format in common")
        for f in common:
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
    solution = solve(lambda _: program, 1, Effort(gap=settings.gap, until=deadline(settings.seconds)))
    if solution is None:
        smallest = np.where(np.isfinite(program.cost[0]), program.size, np.iinfo(np.int64).max).min(axis=1)
        raise _too_few_bytes("layer-uniform", budget, budget - room + program.fixed + int(smallest.sum()))
    kept, formats = np.ones(drop.shape, bool), np.full(len(costs.units), GONE)
    formats[free] = solution.picks[costs.n_layers :]
    for row, units in enumerate(place):
        f, k = divmod(int(solution.picks[row]), most + 1)
        kept[row, order[row, :k, f]] = False
        formats[units[kept[row]]] = f
    return describe_choice(costs, budget, kept, formats, solver="layer-uniform")


# --------------------------------------------------------------------------------------------------------------------- PMQ
def plan_pmq(costs: Costs, budget: int, settings: Settings = DEFAULTS) -> Plan:
    """PMQ's allocation with the most bits that fit: every expert stays, every layer gets the same bits, other matrices share one format.

    PMQ is from Huang et al., arXiv 2410.06270 (MC); 2, 3 and 4 bits take the place of its 1, 2 and 3, and the program is in pmq.py.  PMQ
    decides neither block sizes nor the format of other matrices (4 or 8 bits); of all that the price list offers, we take the plan with the
    least price.  PMQ's error of an expert at a bit width is the norm of the change in its layer's output.  It is the root of our price,
    which is a mean square.

    Raises:
        UsageError: the price list is not in the experts form or lacks a bit width, or there are no statistics of the experts.
        BudgetError: even the fewest bits do not fit; the message names the least bytes.
    """
    place = _expert_units(costs, "pmq")
    tokens, gates = _routing_sums(costs, settings.stats)
    rest = np.array([u for u, unit in enumerate(costs.units) if unit.expert < 0], np.int64)
    widths = [_common_formats(costs, (bits,), place.ravel(), "every expert") for bits in PMQ_WIDTHS]
    others = _common_formats(costs, PMQ_REST, rest, "every other matrix")
    held, room = costs.size[0] + costs.extra[0], room_for_weights(budget, costs.memory, 0)
    found, least = [], np.iinfo(np.int64).max
    for numbers in itertools.product(*widths):
        allocate = functools.cache(functools.partial(_allocate, tokens, gates, np.sqrt(costs.cost[0][place][:, :, numbers])))
        for other in others:
            left = room - int(costs.fixed_size[0] + held[rest, other].sum())
            options = held[place][:, :, numbers]  # bytes [L, E, J]
            fewest, chosen = _most_bits(allocate, options, left)
            least = min(least, budget - left + fewest)
            if chosen is not None:
                formats = np.full(len(costs.units), other)
                formats[place] = np.array(numbers)[chosen]
                everyone = np.ones((costs.n_layers, costs.n_experts), bool)
                found.append(describe_choice(costs, budget, everyone, formats, solver="pmq"))
    if not found:
        raise _too_few_bytes("pmq", budget, least)
    return min(found, key=lambda plan: plan.q)


def _allocate(tokens: F64, gates: F64, errors: F64, total_bits: int) -> NDArray[np.int64]:
    """PMQ's bit width of every expert [L, E] if each layer has `total_bits`; errors are [L, E, J]."""
    rows = [allocate_bits(*layer, total_bits, bits=PMQ_WIDTHS)[0] for layer in zip(tokens, gates, errors, strict=True)]
    return np.searchsorted(PMQ_WIDTHS, np.stack(rows))


def _most_bits(allocate: Callable[[int], NDArray[np.int64]], size: NDArray[np.int64], room: int) -> tuple[int, NDArray[np.int64] | None]:
    """Bytes of the allocation with the fewest bits, and the one with the most bits that fits (None if none fits); sizes [L, E, J]."""

    def total(chosen: NDArray[np.int64]) -> int:
        return int(np.take_along_axis(size, chosen[:, :, None], axis=2).sum())

    low, high = PMQ_WIDTHS[0] * size.shape[1] + 3, PMQ_WIDTHS[-1] * size.shape[1] - 1  # one expert has 3 bits and one 4
    best = allocate(low)
    fewest = total(best)
    if fewest > room:
        return fewest, None
    while low < high:  # more bits never take fewer bytes
        middle = (low + high + 1) // 2
        chosen = allocate(middle)
        if total(chosen) <= room:
            best, low = chosen, middle
        else:
            high = middle - 1
    return fewest, best


def _routing_sums(costs: Costs, stats: Stats | None) -> tuple[F64, F64]:
    """Tokens that each expert got, and the sums of its routing weights [L, E], of all calibration texts together.

    Raises:
        UsageError: there are no such statistics, or they are another checkpoint's.
    """
    if stats is None:
        raise UsageError(
            "preset pmq weighs experts by their tokens and routing weights, which the price list does not hold",
            hint="give --stats, the folder that `edgemoe calibrate` made",
        )
    if stats.model != costs.model:
        raise UsageError("preset pmq: the statistics were made from another checkpoint than the prices", hint="give those of this one")
    arrays = [stats.arrays(layer) for layer in costs.expert_layers]
    if any("gate" not in layer for layer in arrays):
        raise UsageError("preset pmq: an importance matrix holds no routing weights", hint="give a folder that `edgemoe calibrate` made")
    tokens, gates = (np.stack([layer[name].sum(axis=0).astype(np.float64) for layer in arrays]) for name in ("count", "gate"))
    return tokens, gates


def _common_formats(costs: Costs, bits: Sequence[int], units: NDArray[np.int64], what: str) -> list[int]:
    """Formats of these bit widths in which all these units can be stored.

    Raises:
        UsageError: there is none.
    """
    offered = np.isfinite(costs.cost[0, units]).all(axis=0)
    found = [f for f, name in enumerate(costs.formats) if _bits(name) in bits and offered[f]]
    if not found:
        wanted = " or ".join(map(str, bits))
        raise UsageError(
            f"preset pmq: the price list has no format of {wanted} bits that {what} takes",
            hint="price the model with --target onnx; browsers have no 3 bits",
        )
    return found


# ------------------------------------------------------------------------------------------------------------------ shared
def _bits(name: str) -> int:
    """Bits of a format's codes, if its name gives them, as in INT3_128; 8 for Q8_0; 0 for every other format."""
    digits = name.removeprefix("INT").partition("_")[0]
    return 8 if name == "Q8_0" else int(digits) if name.startswith("INT") and digits.isdecimal() else 0


def _expert_units(costs: Costs, name: str) -> NDArray[np.int64]:
    """Number of the unit of each expert [L, E].

    Raises:
        UsageError: the price list is in the stacks form.
    """
    if costs.form != "experts":
        raise UsageError(
            f"preset {name} chooses formats of single experts and needs a price list in the experts form; this one is in the stacks form",
            hint="price with --target onnx; in a GGUF the experts of a layer share their formats anyway",
        )
    numbers = {(unit.layer, unit.expert): u for u, unit in enumerate(costs.units)}
    return np.array([[numbers[layer, e] for e in range(costs.n_experts)] for layer in costs.expert_layers])


def _too_few_bytes(name: str, budget: int, least: int) -> BudgetError:
    message = f"no plan of the preset {name} fits {format_bytes(budget)}: the least is {format_bytes(least)} ({least} bytes)"
    return BudgetError(message, hint=f"ask for --memory {least}B or more, or a smaller --context")


Preset = Callable[[Costs, int, Settings], Plan]
PRESETS: dict[str, Preset] = {
    "pmq": plan_pmq,
    "layer-uniform": plan_layer_uniform,
    "types-only": plan_types_only,
    "drops-only": plan_drops_only,
}
