"""This module collects the constraints of users' rules on a price list; the planner turns them into programs."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from edgemoe.base.errors import UsageError
from edgemoe.base.units import format_bytes, round_outwards
from edgemoe.ir import Costs
from edgemoe.rules.linear import Linear


@dataclass(frozen=True, slots=True)
class Bound:
    """A named rule that couples choices: expression <= 0."""

    name: str
    expression: Linear
    tell: Callable[[float], str]  # the rule in the form that a value of the expression keeps exactly, for instance ">= 880"


@dataclass(frozen=True, slots=True, kw_only=True)
class SoftVariable:
    """A variable of a soft rule with its price in nats per unit."""

    name: str
    low: float
    high: float
    price: float


@dataclass(frozen=True, slots=True, kw_only=True)
class GpuMemory:
    """A second pool: GPU memory of `size` bytes, of which `reserve` are kept free of weights, cache and buffers."""

    name: str
    size: int
    reserve: int


class Constraints:
    """The constraints of all rules on a price list; each rule adds its own, and the planner reads them."""

    def __init__(self, costs: Costs) -> None:
        self.costs = costs
        self.offered = np.ones((len(costs.units), len(costs.formats)), bool)
        self.pinned = np.zeros(costs.expert_drop.shape[1:], np.int8)  # 1: stays, -1: goes
        self.counts = dict.fromkeys(range(len(costs.counts)), True)  # index -> allowed
        self.least_kept, self.most_kept = costs.top_k, costs.n_experts  # in the experts form, of every layer
        self.groups: tuple[int, int] = (costs.n_groups, 0)  # routing groups, least kept of each
        self.equal_groups = costs.n_groups > 1
        self.ties: list[list[int]] = []
        self.bounds: list[Bound] = []
        self.soft: dict[str, SoftVariable] = {}
        self.max_formats = 0
        self.vram: GpuMemory | None = None

    @property
    def chooses_experts(self) -> bool:
        """Whether kept sets must be chosen anew instead of taken from the menu."""
        grouped = self.groups[1] > 0 or self.groups[0] != self.costs.n_groups
        return bool(self.pinned.any()) or grouped or any(b.expression.needs_experts for b in self.bounds)

    def bound(self, name: str, expression: Linear, sense: str, limit: float, tell: Callable[[float], str] | None = None) -> None:
        """Add expression <= limit, >= limit or == limit; `tell` writes another limit as the user would.

        Raises:
            UsageError: a coefficient is not finite, or the rule asks for an exact number of bytes.
        """
        if not (expression.is_finite and math.isfinite(limit)):
            raise UsageError(f"rule {name!r}: a number in it is not finite")
        if sense == "==" and not expression.soft and (expression.size.any() or expression.active.any() or expression.weights.any()):
            raise UsageError(f"rule {name!r}: bytes can hardly be equal to a number", hint="give a range with >= and <=")
        asked = limit - expression.constant
        if sense in ("<=", "=="):
            self.bounds.append(Bound(name, expression - limit, lambda over: (tell or _at_most)(asked + over)))
        if sense in (">=", "=="):
            self.bounds.append(Bound(name, -expression + limit, lambda over: (tell or _at_least)(asked - over)))

    def group(self, groups: int, at_least: int, name: str, *, equal: bool) -> None:
        """Ask for at least this number of kept experts in every routing group, or for the same number in each.

        Raises:
            UsageError: an earlier rule asked for other groups.
        """
        if self.groups[0] not in (1, groups):
            raise UsageError(f"rule {name!r}: asks for {groups} groups, another rule for {self.groups[0]}")
        self.groups = groups, max(at_least, self.groups[1] if self.groups[0] == groups else 0)
        self.equal_groups |= equal

    def pin(self, mask: NDArray[np.bool_], keep: int, name: str) -> None:
        """Pin experts that stay (1) or are dropped (-1).

        Raises:
            UsageError: an earlier rule asked for the opposite.
        """
        clash = mask & (self.pinned == -keep)
        if clash.any():
            layer, expert = np.argwhere(clash)[0]
            raise UsageError(f"rule {name!r}: expert {expert} of layer {self.costs.expert_layers[layer]} is to stay and to go")
        self.pinned[mask] = keep


def _at_most(limit: float) -> str:
    return f"<= {round_outwards(limit, up=True)}"


def _at_least(limit: float) -> str:
    return f">= {round_outwards(limit, up=False)}"


def held_by_gpu(costs: Costs) -> NDArray[np.bool_]:
    """Units [U] that stay in main memory and are held by a GPU as well: an embedding that is the output matrix too."""
    tied = all(unit.role != "output" for unit in costs.units)
    return np.array([tied and unit.role == "token_embd" for unit in costs.units])


def vram_room(costs: Costs, pool: GpuMemory) -> int:
    """Bytes of GPU memory for weights.

    Raises:
        UsageError: cache and buffers alone take more.
    """
    room = pool.size - pool.reserve - costs.memory["kv"] - costs.memory["compute"]
    if room <= 0:
        raise UsageError(f"rule {pool.name!r}: {format_bytes(pool.size)} do not hold the KV cache and the buffers")
    return room
