"""This module defines the Plan record: the experts that stay, the format of every tensor, and the promised figures."""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction

from edgemoe.base.errors import ModelError
from edgemoe.ir.check_records import check_plan
from edgemoe.ir.costs import Unit
from edgemoe.ir.model import Model


@dataclass(frozen=True, slots=True, kw_only=True)
class CountBound:
    """The bound and the best plan that the search found for one kept count."""

    count: int
    bound: float | None  # no plan with this count costs less (nats); None if no plan with this count fits
    cost: float | None  # the best plan found with it


@dataclass(frozen=True, slots=True, kw_only=True)
class RuleUse:
    """A user's rule in a plan: its name, and the room that it leaves (in the rule's own unit; None if it has no limit)."""

    name: str
    slack: float | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """The experts that stay and the format of every unit; `proven` says that no plan is better by more than the asked gap."""

    model: str
    model_name: str
    costs: str
    target: str
    budget: int
    context: int
    solver: str  # or the preset that made it (plan/presets.py)
    objective: str  # "mean" over domains, or the "worst" domain
    n_experts: int
    top_k: int
    kept: tuple[tuple[int, ...], ...]  # [layers with experts], original indices in order
    units: tuple[Unit, ...]  # those that are stored
    formats: dict[str, str]  # unit name -> format
    sizes: dict[str, int]  # unit name -> bytes
    vram: tuple[str, ...]  # units that live in the second pool, GPU memory
    file_size: int
    memory: dict[str, int]  # predicted, by part; "peak" is their sum as the process sees it
    q: float  # sum of the costs, mean over domains
    drop_q: float
    predicted_kl: float
    domain_q: dict[str, float]  # sum of the costs in each domain
    bound: float  # of the objective
    gap: float
    proven: bool
    price: float  # nats that one more byte would save (Lagrange multiplier of the budget)
    counts: tuple[CountBound, ...]
    rules: tuple[RuleUse, ...]
    repair: bool  # whether kept experts are repaired after the drop, as the prices assume
    origin: str  # the source of the prices, if this model was not measured
    width: int = 0  # neurons that every expert is cut to; 0: as in the checkpoint
    drawn: bool = False  # how many experts stay is meant, not which: see Costs

    def __post_init__(self) -> None:
        check_plan(self)
        for layer, kept in enumerate(self.kept):
            if list(kept) != sorted(set(kept)) or any(not 0 <= e < self.n_experts for e in kept):
                raise ModelError(f"plan: layer {layer} keeps {kept}, which are not some of {self.n_experts} experts in order")
            if not self.top_k <= len(kept):
                raise ModelError(f"plan: layer {layer} keeps {len(kept)} experts, but the router picks {self.top_k}")

    def check_experts(self, model: Model) -> None:
        """Refuse a model whose experts have another width than the plan's, or whose router picks another number.

        Raises:
            ModelError: the message names both widths, or both numbers.
        """
        if self.top_k != model.top_k:
            found = f"{model.folder} has {model.top_k}"
            raise ModelError(
                f"the plan is for {self.top_k} active experts, {found}", hint=f"`edgemoe build --top-k {self.top_k}` has so many"
            )
        if self.width not in (0, model.expert.size):
            found = f"{model.folder} has {model.expert.size}"
            raise ModelError(
                f"the plan is for experts of {self.width} neurons, {found}", hint=f"`edgemoe build --width {self.width}` cuts them"
            )

    @property
    def count(self) -> int:
        """Kept experts of a layer; the largest number if layers differ."""
        return max(map(len, self.kept), default=0)

    @property
    def layers(self) -> list[int]:
        """Numbers of the layers to which the rows of `kept` belong (leading dense layers have no experts)."""
        return sorted({unit.layer for unit in self.units if unit.of_experts})

    @property
    def kept_of(self) -> dict[int, tuple[int, ...]]:
        """Kept experts by layer number, of layers that have experts."""
        return dict(zip(self.layers, self.kept, strict=True))

    @property
    def active_bytes(self) -> int:
        """Bytes of weights that a token reads: top-k experts of each layer, and all other tensors.

        Only a row of an embedding is read, unless it is the output matrix too.
        """
        kept, tied = self.kept_of, all(unit.role != "output" for unit in self.units)
        total = Fraction(0)
        for unit in self.units:
            if unit.of_experts:
                total += Fraction(self.sizes[unit.name] * self.top_k, len(kept[unit.layer]))
            elif unit.role != "token_embd" or tied:
                total += self.sizes[unit.name]
        return int(total)

    @property
    def has_one_count(self) -> bool:
        """Whether every layer keeps the same number of experts."""
        return len(set(map(len, self.kept))) <= 1


def counts_text(plan: Plan) -> str:
    """Kept experts of a layer as text: "12", or "9-16" if layers differ."""
    return str(plan.count) if plan.has_one_count else f"{min(map(len, plan.kept))}-{plan.count}"
