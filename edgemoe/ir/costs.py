"""Costs: the price list, with the nats and bytes of every choice.  Costs are nats of KL(original || compressed) per token, sizes bytes."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from edgemoe.base.types import F64
from edgemoe.ir.check_costs import check_costs


# ---------------------------------------------------------------------------------------------------------------- Costs
@dataclass(frozen=True, slots=True, kw_only=True)
class Unit:
    """A part of the model that gets one format: a matrix, the stack of one projection of a layer's kept experts, or one expert."""

    name: str  # in the artifact
    role: str
    layer: int
    n_weights: int  # with every expert kept
    expert: int = -1  # in the experts form, the expert that has these matrices
    cols: int = 0  # length of a row; 0 if the matrices have different lengths

    @property
    def is_stack(self) -> bool:
        """Whether the unit's size depends on how many experts stay."""
        return self.expert < 0 and self.role.endswith("_exps")

    @property
    def of_experts(self) -> bool:
        """Whether it holds routed experts: a stack of them, or one."""
        return self.is_stack or self.expert >= 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Costs:
    """Price list: nats and bytes of every choice.

    There are two forms.  In the form "stacks" (stock GGUF), all layers have one kept count, each layer has a kept set, and each stack and
    other tensor has a format.  In the form "experts", every expert is dropped or has a format of its own, and kept counts are free;
    `counts` then has one entry, with every expert kept.

    There are D domains, C kept counts, L layers, E experts, U units and F formats.  All costs are nats of KL per token.
    `cost` [C, U, F] is the mean over domains by weight (inf if a format is not offered); in domain d a unit costs `factor[d, u]` times as
    much.  `input_cost` [C, U, F] is the part of it from inputs that the runtime's kernels round; 0 if this part was not priced apart.
    `size`, `extra` and `staging` [C, U, F] are bytes: in the artifact, in the process beyond the artifact, and of the copy that loading
    makes.  `fixed_size` [C] is header, norms and routers.
    `kept` [C, L, E] is the menu, with a kept set of each layer for each count, and `drop_cost` [D, C, L] is the cost of these sets.
    `expert_drop` [D, L, E] is the additive price of each expert, for sets that are not on the menu.  `drop_curve` [L, E + 1] is added to
    these prices when k experts of a layer are gone.  `usage` [D, L, E] is an expert's share of its layer's output (sum of g |f|).
    KL is predicted as Q + kappa sqrt(Q), where Q is the sum of the costs (docs/pricing.md, 5).
    """

    model: str
    model_name: str
    stats: str
    target: str
    form: str
    formats: tuple[str, ...]
    units: tuple[Unit, ...]
    counts: tuple[int, ...]
    n_experts: int
    top_k: int
    kappa: float
    memory: dict[str, int]  # bytes of the process beside the weights, by part (memory.py)
    cold: tuple[tuple[int, int], ...]
    domains: tuple[str, ...]
    domain_weights: tuple[float, ...]  # summing to 1
    origin: str = ""  # the source of the prices, if this model was not measured
    repair: bool = False  # whether drops are priced as they are after repair
    gradients: bool = True  # whether rounding with feedback knows gradients of the loss
    can_refit: bool = True  # whether repair can compute with the experts
    n_groups: int = 1  # routing groups (consecutive experts), which must all keep the same number of experts
    width: int = 0  # neurons that every expert is cut to; 0: as in the checkpoint
    drawn: bool = False  # prices of single experts are a draw that stands in for this model's own: how many stay is meant, not which
    cost: F64 = field(compare=False)
    input_cost: F64 = field(compare=False)
    size: NDArray[np.int64] = field(compare=False)
    extra: NDArray[np.int64] = field(compare=False)
    staging: NDArray[np.int64] = field(compare=False)
    fixed_size: NDArray[np.int64] = field(compare=False)
    factor: F64 = field(compare=False)
    kept: NDArray[np.bool_] = field(compare=False)
    drop_cost: F64 = field(compare=False)
    expert_drop: F64 = field(compare=False)
    drop_curve: F64 = field(compare=False)
    usage: F64 = field(compare=False)

    def __post_init__(self) -> None:
        check_costs(self)

    @property
    def n_layers(self) -> int:
        """Layers that have experts."""
        return int(self.expert_drop.shape[1])

    @property
    def expert_layers(self) -> list[int]:
        """Which layers these are, as tensor names count them (leading dense layers have none)."""
        return sorted({u.layer for u in self.units if u.of_experts})

    @property
    def weights(self) -> F64:
        """Weight of each domain [D]."""
        return np.array(self.domain_weights)

    @property
    def inherited(self) -> F64:
        """Rounding cost of a dropped expert's tokens by domain [D, L, E]; zeros in the stacks form, where `cost` holds it.

        Other experts serve these tokens and are quantized as well, so we charge what the dropped expert would have cost in its smallest
        format.  Without this charge, a drop would seem to save the error of storing the expert.
        """
        found, rows = np.zeros(self.expert_drop.shape), {layer: row for row, layer in enumerate(self.expert_layers)}
        smallest = np.where(np.isfinite(self.cost[0]), self.size[0], np.iinfo(np.int64).max).argmin(axis=1)
        place = [(u, rows[unit.layer], unit.expert) for u, unit in enumerate(self.units) if unit.expert >= 0]
        if place:
            u, row, expert = np.array(place).T
            found[:, row, expert] = self.factor[:, u] * self.cost[0, u, smallest[u]]
        return found

    def kept_weights(self, u: int, c: int) -> int:
        """Weights of a unit at one kept count."""
        unit = self.units[u]
        return unit.n_weights * self.counts[c] // self.n_experts if unit.is_stack else unit.n_weights

    def predict_kl(self, q: float) -> float:
        """KL in nats per token that is expected of a plan whose costs add up to `q`."""
        return q + self.kappa * math.sqrt(max(q, 0.0))
