"""What users' rules make of a price list, collected rule by rule; the planner turns it into programs."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from edgemoe.errors import UsageError
from edgemoe.ir import Costs
from edgemoe.terms import Linear
from edgemoe.units import format_bytes


@dataclass(frozen=True, slots=True)
class Bound:
    """A named rule that couples choices: expression <= 0."""

    name: str
    expression: Linear


@dataclass(frozen=True, slots=True, kw_only=True)
class SoftVariable:
    """A variable of a soft rule with its price in nats per unit."""

    name: str
    low: float
    high: float
    price: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Pool:
    """A second memory: GPU memory of `size` bytes, of which `reserve` are not for weights, cache or buffers."""

    name: str
    size: int
    reserve: int


class Draft:
    """What rules make of a price list, collected rule by rule; the planner reads it."""

    def __init__(self, costs: Costs) -> None:
        self.costs = costs
        self.offered = np.ones((len(costs.units), len(costs.formats)), bool)
        self.pinned = np.zeros(costs.expert_drop.shape[1:], np.int8)  # 1: stays, -1: goes
        self.counts = dict.fromkeys(range(len(costs.counts)), True)  # index -> allowed
        self.least_kept = np.full(costs.n_layers, costs.top_k)
        self.groups: tuple[int, int] = (1, 0)  # routing groups, least kept of each
        self.equal_groups = False
        self.ties: list[list[int]] = []
        self.bounds: list[Bound] = []
        self.soft: dict[str, SoftVariable] = {}
        self.max_formats = 0
        self.vram: Pool | None = None

    @property
    def chooses_experts(self) -> bool:
        """Whether kept sets must be chosen anew instead of taken from the menu."""
        grouped = self.equal_groups or self.groups[1] > 0
        return bool(self.pinned.any()) or grouped or any(b.expression.needs_experts for b in self.bounds)

    def bound(self, name: str, expression: Linear, sense: str, limit: float) -> None:
        """Add expression <= limit, >= limit or == limit."""
        if sense in ("<=", "=="):
            self.bounds.append(Bound(name, expression - limit))
        if sense in (">=", "=="):
            self.bounds.append(Bound(name, -expression + limit))

    def pin(self, mask: NDArray[np.bool_], keep: int, name: str) -> None:
        """Experts that stay (1) or go (-1).

        Raises:
            UsageError: the opposite was asked for before.
        """
        clash = mask & (self.pinned == -keep)
        if clash.any():
            layer, expert = np.argwhere(clash)[0]
            raise UsageError(f"rule {name!r}: expert {expert} of layer {self.costs.expert_layers[layer]} is to stay and to go")
        self.pinned[mask] = keep


def vram_room(costs: Costs, pool: Pool) -> int:
    """Bytes of GPU memory for weights.

    Raises:
        UsageError: cache and buffers alone take more.
    """
    room = pool.size - pool.reserve - costs.memory["kv"] - costs.memory["compute"]
    if room <= 0:
        raise UsageError(f"rule {pool.name!r}: {format_bytes(pool.size)} do not hold the KV cache and the buffers")
    return room
