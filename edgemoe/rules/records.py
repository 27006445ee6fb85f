"""This module defines users' rules as records; each writes itself into a `Constraints`, which the planner turns into programs.

Pin, Keep, Drop, Protect, KeptCount, GroupKept, DomainKept, SameFormat, MaxFormats, MeanBits, ByteLimit, ActiveBytes, Speed, Vram
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from edgemoe.base.errors import UsageError
from edgemoe.base.units import parse_bytes, round_outwards
from edgemoe.ir import Costs
from edgemoe.rules.constraints import Constraints, GpuMemory
from edgemoe.rules.functions import apply_function
from edgemoe.rules.linear import Layers, find_domain, select_experts, select_units, sum_kept, sum_units


# ---------------------------------------------------------------------------------------------------------------- records
@dataclass(frozen=True, slots=True, kw_only=True)
class Pin:
    """Tensors are stored in `format`, or in a format from `at_least` to `at_most` (by bits per weight)."""

    tensors: tuple[str, ...]
    format: str = ""
    at_least: str = ""
    at_most: str = ""
    layers: Layers = None
    name: str = ""

    def apply(self, constraints: Constraints) -> None:
        """Mask the other formats."""
        _need(self.name, format=self.format, at_least=self.at_least, at_most=self.at_most)
        costs = constraints.costs
        for wanted in filter(None, (self.format, self.at_least, self.at_most)):
            if wanted.upper() not in costs.formats:
                raise UsageError(f"rule {self.name!r}: format {wanted!r} is not known", hint=f"known: {', '.join(costs.formats)}")
        for u in select_units(costs, self.tensors, self.layers, self.name):
            size = costs.size[-1, u].astype(np.float64)  # of the same weights in every format: by rising bits
            allowed = np.ones(len(costs.formats), bool)
            if self.format:
                allowed &= np.array([f == self.format.upper() for f in costs.formats])
            known = np.isfinite(costs.cost[-1, u])
            for limit, sign in ((self.at_least, 1), (self.at_most, -1)):
                if limit:
                    reference = size[costs.formats.index(limit.upper())]
                    if reference == 0:  # not offered for rows of this length: what it falls back to is larger
                        continue
                    allowed &= sign * size >= sign * reference
            constraints.offered[u] &= allowed
            if not (constraints.offered[u] & known).any():
                raise UsageError(f"rule {self.name!r}: leaves no format for {costs.units[u].name}")


@dataclass(frozen=True, slots=True, kw_only=True)
class Keep:
    """These experts stay."""

    layers: Layers = None
    experts: tuple[int, ...] | None = None
    name: str = ""

    def apply(self, constraints: Constraints) -> None:
        """Pin them."""
        constraints.pin(select_experts(constraints.costs, self.layers, self.experts, self.name), 1, self.name)


@dataclass(frozen=True, slots=True, kw_only=True)
class Drop:
    """These experts are dropped."""

    experts: tuple[int, ...]
    layers: Layers = None
    name: str = ""

    def apply(self, constraints: Constraints) -> None:
        """Pin them."""
        constraints.pin(select_experts(constraints.costs, self.layers, self.experts, self.name), -1, self.name)


@dataclass(frozen=True, slots=True, kw_only=True)
class Protect:
    """Layers that lose no expert and are stored in no smaller format than `at_least`."""

    layers: Layers
    at_least: str = ""
    name: str = ""

    def apply(self, constraints: Constraints) -> None:
        """Pin formats and experts."""
        constraints.pin(select_experts(constraints.costs, self.layers, None, self.name), 1, self.name)
        if self.at_least:
            Pin(tensors=("*",), at_least=self.at_least, layers=self.layers, name=self.name).apply(constraints)


@dataclass(frozen=True, slots=True, kw_only=True)
class KeptCount:
    """How many experts of a layer stay."""

    at_least: int = 0
    at_most: int = 0
    multiple_of: int = 1
    name: str = ""

    def apply(self, constraints: Constraints) -> None:
        """Exclude counts; in the experts form, bound each layer."""
        costs, most = constraints.costs, self.at_most or constraints.costs.n_experts
        if self.multiple_of < 1 or self.at_least < 0 or self.at_most < 0 or self.at_least > most:
            raise UsageError(f"rule {self.name!r}: no multiple of {self.multiple_of} is at least {self.at_least} and at most {most}")
        if costs.form == "experts":
            if self.multiple_of > 1:
                raise UsageError(f"rule {self.name!r}: multiple_of needs one kept count for all layers", hint="use at_least and at_most")
            constraints.least_kept, constraints.most_kept = max(constraints.least_kept, self.at_least), min(constraints.most_kept, most)
            return
        for c, count in enumerate(costs.counts):
            if not self.at_least <= count <= most or count % self.multiple_of:
                constraints.counts[c] = False


@dataclass(frozen=True, slots=True, kw_only=True)
class GroupKept:
    """Each routing group (consecutive experts) keeps `at_least` experts; with `equal` all keep the same number, as some routers need."""

    groups: int
    at_least: int = 0
    equal: bool = False
    name: str = ""

    def apply(self, constraints: Constraints) -> None:
        """Set the groups, and exclude counts that they do not divide."""
        costs = constraints.costs
        if self.groups < 1 or costs.n_experts % self.groups:
            raise UsageError(f"rule {self.name!r}: {costs.n_experts} experts are not {self.groups} equal groups")
        if self.equal and costs.form == "experts":
            raise UsageError(f"rule {self.name!r}: equal groups need one kept count for all layers", hint="use at_least")
        if not 0 <= self.at_least <= costs.n_experts // self.groups:
            raise UsageError(f"rule {self.name!r}: a group has {costs.n_experts // self.groups} experts, not {self.at_least}")
        constraints.group(self.groups, self.at_least, self.name, equal=self.equal)
        if self.equal:
            KeptCount(at_least=self.groups * self.at_least, multiple_of=self.groups, name=self.name).apply(constraints)


@dataclass(frozen=True, slots=True, kw_only=True)
class DomainKept:
    """The experts that a domain uses most stay: its `top` experts of every layer, or at least this `share` of its use of every layer."""

    domain: str
    top: int = 0
    share: float = 0.0
    layers: Layers = None
    name: str = ""

    def apply(self, constraints: Constraints) -> None:
        """Pin the most used, or bound the share."""
        costs, d = constraints.costs, find_domain(constraints.costs, self.domain, self.name)
        if not 0 <= self.top <= costs.n_experts or not 0 <= self.share <= 1 or not (self.top or self.share):
            raise UsageError(f"rule {self.name!r}: needs top (1 to {costs.n_experts}) or a share (0 to 1)")
        chosen: NDArray[np.bool_] = np.asarray(select_experts(costs, self.layers, None, self.name).any(axis=1))
        if self.top:
            best = np.argsort(-costs.usage[d], axis=1, kind="stable")[:, : self.top]
            mask = np.zeros(costs.expert_drop.shape[1:], bool)
            np.put_along_axis(mask, best, values=True, axis=1)
            constraints.pin(mask & chosen[:, None], 1, self.name)
        for layer in np.flatnonzero(chosen) if self.share else ():
            weights = np.zeros(costs.expert_drop.shape[1:])
            weights[layer] = costs.usage[d, layer]
            constraints.bound(self.name, sum_kept(costs, weights), ">=", self.share)


@dataclass(frozen=True, slots=True, kw_only=True)
class SameFormat:
    """These tensors share one format in every layer, as kernels that fuse gate and up need it."""

    tensors: tuple[str, ...] = ("ffn_gate_exps", "ffn_up_exps")
    layers: Layers = None
    across_layers: bool = False
    name: str = ""

    def apply(self, constraints: Constraints) -> None:
        """Tie the units."""
        costs = constraints.costs
        found = select_units(costs, self.tensors, self.layers, self.name)
        by_layer: dict[tuple[int, int], list[int]] = {}
        for u in found:
            unit = costs.units[u]
            by_layer.setdefault((0, 0) if self.across_layers else (unit.layer, unit.expert), []).append(u)
        constraints.ties += [units for units in by_layer.values() if len(units) > 1]


@dataclass(frozen=True, slots=True, kw_only=True)
class MaxFormats:
    """The file has at most this number of different formats."""

    at_most: int
    name: str = ""

    def apply(self, constraints: Constraints) -> None:
        """Set the limit."""
        if self.at_most < 1:
            raise UsageError(f"rule {self.name!r}: at_most {self.at_most} leaves no format")
        constraints.max_formats = min(self.at_most, constraints.max_formats or self.at_most)


@dataclass(frozen=True, slots=True, kw_only=True)
class MeanBits:
    """Limits the mean bits per weight of these tensors, after drops and with scales included."""

    tensors: tuple[str, ...] = ("*",)
    at_least: float = 0.0
    at_most: float = 0.0
    layers: Layers = None
    name: str = ""

    def apply(self, constraints: Constraints) -> None:
        """Bound 8 bytes - bits * weights."""
        _need(self.name, at_least=self.at_least, at_most=self.at_most)
        if not math.isfinite(self.at_least) or not math.isfinite(self.at_most):
            raise UsageError(f"rule {self.name!r}: bits are a finite number")
        units = select_units(constraints.costs, self.tensors, self.layers, self.name)
        bits, weights = sum_units(constraints.costs, "size", units) * 8, sum_units(constraints.costs, "weights", units)
        if self.at_least:
            constraints.bound(self.name, bits - weights * self.at_least, ">=", 0)
        if self.at_most:
            constraints.bound(self.name, bits - weights * self.at_most, "<=", 0)


@dataclass(frozen=True, slots=True, kw_only=True)
class ByteLimit:
    """Limits the bytes of these tensors in the file."""

    tensors: tuple[str, ...] = ("*",)
    at_least: str = ""
    at_most: str = ""
    layers: Layers = None
    name: str = ""

    def apply(self, constraints: Constraints) -> None:
        """Bound them."""
        _need(self.name, at_least=self.at_least, at_most=self.at_most)
        size = sum_units(constraints.costs, "size", select_units(constraints.costs, self.tensors, self.layers, self.name))
        if self.at_least:
            constraints.bound(self.name, size, ">=", parse_bytes(self.at_least), _least_bytes)
        if self.at_most:
            constraints.bound(self.name, size, "<=", parse_bytes(self.at_most), _most_bytes)


@dataclass(frozen=True, slots=True, kw_only=True)
class ActiveBytes:
    """Limits the bytes of weights that a token reads: top-k experts of each layer, and all other tensors once."""

    at_most: str
    name: str = ""

    def apply(self, constraints: Constraints) -> None:
        """Bound them."""
        active = sum_units(constraints.costs, "active", range(len(constraints.costs.units)))
        constraints.bound(self.name, active, "<=", parse_bytes(self.at_most), _most_bytes)


@dataclass(frozen=True, slots=True, kw_only=True)
class Speed:
    """A least speed of decoding on a box with this memory bandwidth (bytes per second), which bounds the bytes that a token reads.

    The speed is an estimate: a token takes at least its bytes over the bandwidth.  The KV cache is read too, and counts at full context.
    """

    tokens_per_second: float
    bandwidth: str
    name: str = ""

    def apply(self, constraints: Constraints) -> None:
        """Bound active bytes."""
        if not 0 < self.tokens_per_second < math.inf:
            raise UsageError(f"rule {self.name!r}: {self.tokens_per_second} tokens per second are no speed")
        rate, cache = parse_bytes(self.bandwidth.removesuffix("/s")), constraints.costs.memory.get("kv", 0)
        room = rate / self.tokens_per_second - cache
        if room <= 0:
            raise UsageError(f"rule {self.name!r}: reading the KV cache alone takes longer than that", hint="a smaller --context")
        active = sum_units(constraints.costs, "active", range(len(constraints.costs.units)))
        constraints.bound(
            self.name, active, "<=", room, lambda read: f"tokens_per_second: {round_outwards(rate / (read + cache), up=False)}"
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Vram:
    """A second pool, GPU memory, which holds the KV cache and the layers' tensors; expert stacks lie there as far as they fit.

    `reserve` is the memory of the driver and the GPU runtime.  The flags for llama.cpp are printed with the plan.
    """

    size: str
    reserve: str = "512MiB"
    name: str = ""

    def apply(self, constraints: Constraints) -> None:
        """Note the pool."""
        if constraints.costs.form != "stacks":
            raise UsageError(f"rule {self.name!r}: a second pool is planned for llama.cpp only")
        if constraints.vram is not None:
            raise UsageError(f"rule {self.name!r}: there is one GPU memory already", hint="give one vram rule")
        constraints.vram = GpuMemory(name=self.name, size=parse_bytes(self.size), reserve=parse_bytes(self.reserve))


def _most_bytes(size: float) -> str:
    return f"at_most: {math.ceil(size)}B"


def _least_bytes(size: float) -> str:
    return f"at_least: {math.floor(size)}B"


def _need(name: str, **values: object) -> None:
    """Refuse a rule that asks for nothing."""
    if not any(values.values()):
        raise UsageError(f"rule {name!r}: asks for nothing", hint=f"give {' or '.join(values)}")


class Record(Protocol):
    """A rule that writes itself into a Constraints: the records above, and the expressions of recipe.py."""

    @property
    def name(self) -> str:
        """The name of the rule in messages; if it is empty, they use its kind."""
        ...

    def apply(self, constraints: Constraints) -> None:
        """Write the rule into the constraints."""
        ...


Rule = Record | Callable[..., Any]  # a function gets a Problem, and returns or yields PuLP constraints (functions.py)
RECORDS: dict[str, type] = {
    "pin": Pin,
    "keep": Keep,
    "drop": Drop,
    "protect": Protect,
    "kept_count": KeptCount,
    "group_kept": GroupKept,
    "domain_kept": DomainKept,
    "same_format": SameFormat,
    "max_formats": MaxFormats,
    "mean_bits": MeanBits,
    "byte_limit": ByteLimit,
    "active_bytes": ActiveBytes,
    "speed": Speed,
    "vram": Vram,
}


def rule_name(rule: Rule) -> str:
    """The name of a rule in messages: its own name, else its kind or function."""
    kinds = [kind for kind, record in RECORDS.items() if isinstance(rule, record)]
    return str(getattr(rule, "name", "") or (kinds[0] if kinds else getattr(rule, "__name__", "rule")))


def describe_rule(rule: Rule) -> str:
    """A rule in one line."""
    if type(rule) not in RECORDS.values():
        return rule_name(rule)
    values = {n: getattr(rule, n) for n in getattr(type(rule), "__dataclass_fields__", ()) if n != "name"}
    given = [f"{n}={v}" for n, v in values.items() if v not in ("", 0, None, False)]
    return f"{rule_name(rule)}: {type(rule).__name__}({', '.join(given)})"


def apply_rules(costs: Costs, rules: Sequence[Rule]) -> Constraints:
    """Collect the constraints of all rules on a price list.

    Raises:
        UsageError: a rule names something that the model lacks, cannot hold, or contradicts another rule.
    """
    constraints = Constraints(costs)
    for rule in rules:
        if type(rule) in RECORDS.values():
            named: Any = rule
            replace(named, name=rule_name(rule)).apply(constraints)
        elif hasattr(rule, "apply"):
            rule.apply(constraints)
        else:
            apply_function(constraints, rule)
    if not any(constraints.counts.values()):
        raise UsageError(
            f"the rules leave no kept count of {', '.join(map(str, costs.counts))}", hint="see the rules on kept counts and groups"
        )
    return constraints
