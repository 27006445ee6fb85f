"""This module defines linear expressions over the decisions of a plan, and reads the names of layers, tensors, experts and domains.

A rule may be a record, a line of a recipe or a Python function.  If it couples choices, it becomes a `Linear` over the same few quantities
of tensors: experts kept, formats used, bytes, weights and bytes read per token.
"""

from __future__ import annotations

import fnmatch
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgemoe.base.errors import UsageError
from edgemoe.base.types import F64
from edgemoe.ir import Costs, Plan, Unit

ALIASES = {"experts": "ffn_*exps", "attention": "attn_*", "embedding": "token_embd", "shared": "ffn_*_shexp"}
ARRAYS = ("keep", "use", "size", "weights", "active")


@dataclass(frozen=True, slots=True, kw_only=True)
class Linear:
    """A constant plus the sum of coefficients times the decisions of a plan (L layers, E experts, U units, F formats)."""

    keep: F64  # [L, E] 1 if the expert stays
    use: F64  # [U, F] 1 if the unit is stored in the format
    size: F64  # [U] the unit's bytes
    weights: F64  # [U] the unit's weights that are left
    active: F64  # [U] the unit's bytes read for a token
    soft: dict[str, float] = field(default_factory=dict)  # variables of soft rules
    constant: float = 0.0

    def __add__(self, other: Linear | float) -> Linear:
        if not isinstance(other, Linear):
            return replace(self, constant=self.constant + other)
        sums: dict[str, Any] = {n: getattr(self, n) + getattr(other, n) for n in (*ARRAYS, "constant")}
        return Linear(**sums, soft={n: self.soft.get(n, 0.0) + other.soft.get(n, 0.0) for n in {**self.soft, **other.soft}})

    def __mul__(self, factor: float) -> Linear:
        scaled: dict[str, Any] = {n: getattr(self, n) * factor for n in (*ARRAYS, "constant")}
        return Linear(**scaled, soft={n: v * factor for n, v in self.soft.items()})

    def __neg__(self) -> Linear:
        return self * -1.0

    def __sub__(self, other: Linear | float) -> Linear:
        return self + (-other)

    @property
    def is_constant(self) -> bool:
        """Whether the expression depends on no decision of a plan."""
        return not self.soft and not any(getattr(self, n).any() for n in ARRAYS)

    @property
    def is_finite(self) -> bool:
        """Whether all its numbers are finite."""
        numbers = (self.constant, *self.soft.values())
        return all(map(math.isfinite, numbers)) and all(bool(np.isfinite(getattr(self, n)).all()) for n in ARRAYS)

    @property
    def needs_experts(self) -> bool:
        """Whether the expression contains single experts."""
        return bool(self.keep.any())

    def value(self, costs: Costs, plan: Plan) -> float:
        """The value of the expression under a finished plan, from the plan's own bytes, without soft variables."""
        total = self.constant
        for layer, kept in enumerate(plan.kept):
            total += float(self.keep[layer, list(kept)].sum())
        formats = {name: f for f, name in enumerate(costs.formats)}
        rates = active_rates(costs, plan.count) if self.active.any() else np.zeros(len(costs.units))
        for u, unit in enumerate(costs.units):
            if unit.name in plan.formats:  # a dropped expert has none
                size = plan.sizes[unit.name]
                total += float(self.use[u, formats[plan.formats[unit.name]]]) + float(self.size[u]) * size
                total += float(self.active[u]) * size * float(rates[u])
                total += float(self.weights[u]) * (unit.n_weights * plan.count // plan.n_experts if unit.is_stack else unit.n_weights)
        return total


def zero(costs: Costs) -> Linear:
    """The expression 0."""
    n_units = len(costs.units)
    vectors: dict[str, Any] = {name: np.zeros(n_units) for name in ("size", "weights", "active")}
    return Linear(keep=np.zeros(costs.expert_drop.shape[1:]), use=np.zeros((n_units, len(costs.formats))), **vectors)


def active_rates(costs: Costs, count: int) -> F64:
    """Share of each unit's bytes that is read for a token [U]: top-k of the kept experts, and all of the other units.

    Only a row of an embedding is read, unless it is the output matrix too.

    In the experts form, an expert's share is top-k times its share of the layer's output, which says how often it is picked.
    """
    rows = {layer: row for row, layer in enumerate(costs.expert_layers)}
    tied = all(unit.role != "output" for unit in costs.units)
    share = np.minimum(1.0, costs.top_k * np.tensordot(costs.weights, costs.usage, axes=1))

    def rate(unit: Unit) -> float:
        if unit.expert >= 0:
            return float(share[rows[unit.layer], unit.expert])
        if unit.is_stack:
            return costs.top_k / count
        return 0.0 if unit.role == "token_embd" and not tied else 1.0

    return np.array([rate(unit) for unit in costs.units])


# -------------------------------------------------------------------------------------------------------------- selection
Layers = Sequence[int] | str | None


def parse_layers(layers: Layers, known: Iterable[int], name: str) -> list[int]:
    """Layers as people give them (None: all; "0-3,10"; numbers), checked.

    Raises:
        UsageError: not layers of this model.
    """
    known = sorted(set(known))
    if layers is None:
        return known
    wanted = _read_layers(layers, name) if isinstance(layers, str) else [(layer, layer) for layer in layers]
    found: list[int] = []
    for first, last in wanted:
        for layer in (first, last):
            if isinstance(layer, bool) or not isinstance(layer, int | np.integer) or layer not in known:
                raise UsageError(f"rule {name!r}: layer {layer!r} is outside {known[0]}..{known[-1]}")
        found += [n for n in range(first, last + 1) if n in known]
    if not found:
        raise UsageError(f"rule {name!r}: names no layer", hint=f"layers: {known[0]}..{known[-1]}")
    return found


def _read_layers(text: str, name: str) -> list[tuple[int, int]]:
    """Pairs of first and last layer in a text such as "0-3,10"."""
    found = []
    for part in text.split(","):
        first, dash, last = (p.strip() for p in part.partition("-"))
        if not (first.isdecimal() and (last.isdecimal() or not dash)) or len(first) > 9 or len(last) > 9:
            raise UsageError(f"rule {name!r}: layers {text[:80]!r} cannot be read", hint='write them like "0-3,10"')
        found.append((int(first), int(last) if dash else int(first)))
        if found[-1][0] > found[-1][1]:
            raise UsageError(f"rule {name!r}: layers {part.strip()!r} end before they begin", hint='write them like "0-3,10"')
    return found


def select_units(costs: Costs, tensors: Sequence[str], layers: Layers, name: str, experts: Sequence[int] | None = None) -> list[int]:
    """Indices of the units that these patterns name (by name, role, or a word such as "experts" or "attention").

    Raises:
        UsageError: nothing is named so.
    """
    if not all(isinstance(t, str) for t in tensors):
        raise UsageError(f"rule {name!r}: tensors are named by text", hint='such as "experts" or "blk.0.*"')
    patterns = [ALIASES.get(t, t) for t in tensors]
    if experts is not None:
        experts = check_experts(costs, experts, name)
        if costs.form == "stacks":
            raise UsageError(
                f"rule {name!r}: an expert's tensors are stored in its layer's stack", hint="ask for the stack, without experts"
            )
    wanted = None if layers is None else parse_layers(layers, (u.layer for u in costs.units if u.layer >= 0), name)
    found = [
        i
        for i, unit in enumerate(costs.units)
        if any(fnmatch.fnmatchcase(unit.name, p) or fnmatch.fnmatchcase(unit.role, p) for p in patterns)
        and (wanted is None or unit.layer in wanted)
        and (experts is None or unit.expert in experts)
    ]
    if not found:
        roles = sorted({u.role for u in costs.units})
        raise UsageError(
            f"rule {name!r}: no tensor is called {', '.join(tensors)}", hint=f"roles: {', '.join(roles)}; or a name such as blk.0.*"
        )
    return found


def select_experts(costs: Costs, layers: Layers, experts: Sequence[int] | None, name: str) -> NDArray[np.bool_]:
    """Mask [L, E] of experts; layers count as in the tensor names.

    Raises:
        UsageError: no such layer or expert.
    """
    mask = np.zeros(costs.expert_drop.shape[1:], bool)
    rows = {layer: row for row, layer in enumerate(costs.expert_layers)}
    columns = list(range(costs.n_experts)) if experts is None else check_experts(costs, experts, name)
    for layer in parse_layers(layers, rows, name):
        mask[rows[layer], columns] = True
    return mask


def check_experts(costs: Costs, experts: Sequence[int], name: str) -> list[int]:
    """The experts as numbers.

    Raises:
        UsageError: they are none, or not of this model.
    """
    for expert in experts:
        if isinstance(expert, bool) or not isinstance(expert, int | np.integer) or not 0 <= expert < costs.n_experts:
            raise UsageError(f"rule {name!r}: expert {expert!r} is outside 0..{costs.n_experts - 1}")
    if not len(experts):
        raise UsageError(f"rule {name!r}: names no expert", hint=f"experts: 0..{costs.n_experts - 1}")
    return [int(e) for e in experts]


def find_domain(costs: Costs, domain: str, name: str) -> int:
    """Number of a domain.

    Raises:
        UsageError: calibration knew no such domain.
    """
    if domain not in costs.domains:
        raise UsageError(f"rule {name!r}: unknown domain {domain!r}", hint=f"known: {', '.join(costs.domains)}")
    return costs.domains.index(domain)


def sum_kept(costs: Costs, mask: NDArray[np.bool_] | F64) -> Linear:
    """Experts kept, of those in the mask [L, E] (or their weights)."""
    return replace(zero(costs), keep=mask.astype(np.float64))


def sum_units(costs: Costs, quantity: str, units: Sequence[int]) -> Linear:
    """Bytes ("size"), weights or active bytes of some units."""
    vector = np.zeros(len(costs.units))
    vector[list(units)] = 1.0
    chosen: dict[str, Any] = {quantity: vector}
    return replace(zero(costs), **chosen)
