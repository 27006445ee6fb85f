"""This module solves the program of PMQ, the pre-loading mixed precision of MC: bits for each expert from its importance and errors.

    minimise    sum_i phi_i w_i^1.5 sum_j eps_ij x_ij               phi: share of tokens, w: share of routing weight, eps: output error
    subject to  sum_j x_ij = 1,  sum_ij bits_j x_ij <= B,  at least one expert at the largest and one at the second largest bit width

Each layer is solved alone, and no expert is dropped.  Source: Huang et al., arXiv 2410.06270 (MC), precision_solver.py of
Aaronhuang-778/MC-MoE.  The paper raises eps to gamma = 2, and the released code to 1; the allocations here follow the code.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from edgemoe.base.errors import BudgetError, UsageError
from edgemoe.base.types import F64
from edgemoe.solvers.effort import Effort
from edgemoe.solvers.program import Program, Row
from edgemoe.solvers.search import solve

ALPHA, BETA = 1.0, 1.5  # exponents of phi and w; defaults of the released code
SCALE = 1000.0  # of phi, as in the released code; it changes only the objective's unit


def allocate_bits(
    tokens: F64, weights: F64, errors: F64, total_bits: int, *, bits: tuple[int, ...] = (1, 2, 3)
) -> tuple[NDArray[np.int64], float]:
    """Bits of every expert of a layer [E], and the objective.

    Args:
        tokens: how many tokens each expert got [E].
        weights: sum of its routing weights [E].
        errors: error of the layer's output if only this expert is rounded to each bit width [E, J].
        total_bits: B, the most that the experts' bits may add up to.
        bits: J bit widths, rising.

    Raises:
        UsageError: shapes or numbers are impossible.
        BudgetError: there are fewer bits than the experts need at least.
    """
    cost = pmq_costs(tokens, weights, errors)
    if cost.shape[1] != len(bits) or list(bits) != sorted(set(bits)) or bits[0] < 1:
        raise UsageError(f"pmq: {cost.shape[1]} errors of each expert for the widths {bits}", hint="one for each width, rising")
    least = [_at_least_one(f"one expert at {width} bits", j, cost.shape) for j, width in enumerate(bits) if j >= len(bits) - 2]
    program = Program(
        cost=cost[None],
        size=np.tile(np.array(bits, np.int64), (len(cost), 1)),
        constant=np.zeros(1),
        fixed=0,
        room=total_bits,
        rows=tuple(least),
    )
    found = solve(lambda _: program, 1, Effort(gap=1e-9))
    if found is None:
        raise BudgetError(f"pmq: {total_bits} bits do not go round {len(cost)} experts", hint="ask for more bits")
    return np.array(bits)[found.picks], found.cost


def pmq_costs(tokens: F64, weights: F64, errors: F64) -> F64:
    """The cost of each expert at each bit width [E, J]: 1000 phi w^1.5 eps.

    Raises:
        UsageError: shapes or numbers are impossible.
    """
    if errors.ndim != 2 or not tokens.shape == weights.shape == errors.shape[:1]:
        raise UsageError(f"pmq: shapes {tokens.shape}, {weights.shape} and {errors.shape} do not belong together")
    if not all(np.isfinite(a).all() and (a >= 0).all() and a.any() for a in (tokens, weights, errors)):
        raise UsageError("pmq: statistics are finite, not negative and not all 0")
    phi, mass = tokens / tokens.sum(), weights / weights.sum()
    found: F64 = (SCALE * phi**ALPHA * mass**BETA)[:, None] * errors
    return found


def _at_least_one(name: str, option: int, shape: tuple[int, ...]) -> Row:
    coef = np.zeros(shape)
    coef[:, option] = -1.0
    return Row(name=name, coef=coef, limit=-1.0, soft=np.zeros(0))
