"""Random price lists in both forms, random rules with what they mean, and an oracle that tries every plan.

The oracle reads `Costs` directly and shares no code with the planner: it enumerates kept sets and formats with itertools, adds up nats and
bytes in plain Python, and asks each rule's predicate.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from edgemoe.ir import Costs, Plan, Unit
from edgemoe.rules import ActiveBytes, ByteLimit, DomainKept, Drop, GroupKept, Keep, KeptCount, MaxFormats, MeanBits, Pin, Rule, SameFormat

FORMATS = ("F16", "Q8_0", "Q4_K", "IQ2_S")
BITS = {"F16": 16.0, "Q8_0": 8.5, "Q4_K": 4.5, "IQ2_S": 2.5625}
MEMORY = {"context": 512, "runtime": 1000, "kv": 500, "compute": 300, "output": 100}


# ------------------------------------------------------------------------------------------------------------ price lists
def random_costs(seed: int, form: str, *, layers: int = 2, experts: int = 4, formats: int = 3, domains: int = 2) -> Costs:
    """A small price list with heavy tails (importance exp(N(0, 1.6)), errors 4^-bits): the shapes of the real ones, in miniature."""
    rng = np.random.default_rng(seed)
    names = FORMATS[-formats:]
    units = _units(form, layers, experts, rng)
    counts = (experts,) if form == "experts" else tuple(range(min(2, experts), experts + 1))
    importance = rng.lognormal(0, 1.6, (layers, experts)) * rng.lognormal(0, 0.8, (layers, 1)) * 1e-2
    by_domain = rng.lognormal(0, 0.7, (domains, layers, experts))
    weights = rng.dirichlet(np.ones(domains) * 3)
    by_domain /= np.tensordot(weights, by_domain, axes=1)
    expert_drop = importance * by_domain
    kept, drop_cost = _menu(form, counts, expert_drop, importance, rng)
    share = np.array([counts_share(u, counts, experts) for u in units])  # [U, C]
    base = np.array([importance[u.layer, u.expert] if u.expert >= 0 else rng.lognormal(0, 1) * 0.03 for u in units])
    bits = np.array([BITS[n] for n in names])
    error = base[:, None] * 4.0 ** -(bits - 1) * rng.lognormal(0, 0.3, (len(units), formats))
    cost = share.T[:, :, None] * error[None]
    size = np.ceil(np.array([u.n_weights for u in units])[None, :, None] * share.T[:, :, None] * bits / 8).astype(np.int64)
    hidden = rng.random((len(units), formats)) < 0.1
    hidden[:, -1] = False
    cost[:, hidden] = np.inf
    repacked = np.array([n in ("Q4_K",) for n in names])
    stack = np.array([u.is_stack for u in units])
    curve = np.zeros((layers, experts + 1))
    if form == "experts" and rng.random() < 0.7:
        power = rng.choice([0.6, 2.0])  # concave and convex
        curve = importance.sum(axis=1)[:, None] * 0.5 * (np.arange(experts + 1) / experts) ** power
    usage = rng.dirichlet(np.ones(experts), (domains, layers))
    return Costs(
        model="m",
        model_name="random",
        stats="s",
        target="gguf",
        form=form,
        formats=names,
        units=tuple(units),
        counts=counts,
        n_experts=experts,
        top_k=1,
        kappa=0.01,
        memory=dict(MEMORY),
        cold=(),
        domains=tuple(f"d{i}" for i in range(domains)),
        domain_weights=tuple(weights.tolist()),
        cost=cost,
        input_cost=np.zeros_like(size, np.float64),
        size=np.where(np.isinf(cost), 0, size),
        extra=np.where(np.isinf(cost), 0, np.random.default_rng(seed + 1).integers(0, 40, size.shape) * (seed % 2)),
        staging=np.where(repacked & stack[:, None], size, 0) if rng.random() < 0.5 else np.zeros_like(size),
        fixed_size=np.array([64 + 8 * n for n in counts]),
        factor=_factors(units, weights, by_domain, rng),
        kept=kept,
        drop_cost=drop_cost,
        expert_drop=expert_drop,
        drop_curve=curve,
        usage=usage,
    )


def make_costs(seed: int, form: str) -> Costs:
    """Few enough choices to try every plan."""
    return random_costs(seed, form, formats=3 if form == "stacks" else 2)


def counts_share(unit: Unit, counts: Sequence[int], experts: int) -> list[float]:
    """Share of a unit that is left at each kept count."""
    return [n / experts if unit.is_stack else 1.0 for n in counts]


def _units(form: str, layers: int, experts: int, rng: np.random.Generator) -> list[Unit]:
    units = []
    for layer in range(layers):
        width = int(rng.integers(3, 40)) * 8
        if form == "experts":
            units += [
                Unit(name=f"blk.{layer}.ffn_exps.{e}", role="ffn_exps", layer=layer, expert=e, n_weights=width) for e in range(experts)
            ]
        else:
            roles = ("ffn_gate_exps", "ffn_up_exps") if layer == 0 else ("ffn_gate_exps",)
            units += [Unit(name=f"blk.{layer}.{r}.weight", role=r, layer=layer, n_weights=width * experts) for r in roles]
    units.append(Unit(name="token_embd.weight", role="token_embd", layer=-1, n_weights=int(rng.integers(5, 60)) * 8))
    return units


def _menu(
    form: str, counts: Sequence[int], expert_drop: np.ndarray, importance: np.ndarray, rng: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
    """Kept sets that are best by the mean price, and what they cost: a little more than their experts alone."""
    domains, layers, experts = expert_drop.shape
    kept = np.ones((len(counts), layers, experts), bool)
    drop_cost = np.zeros((domains, len(counts), layers))
    order = np.argsort(importance, axis=1, kind="stable")
    surplus = rng.uniform(1, 1.5, layers)
    for c, count in enumerate(counts if form == "stacks" else ()):
        for layer in range(layers):
            gone = order[layer, : experts - count]
            kept[c, layer, gone] = False
            drop_cost[:, c, layer] = expert_drop[:, layer, gone].sum(axis=1) * surplus[layer]
    return kept, drop_cost


def _factors(units: Sequence[Unit], weights: np.ndarray, by_domain: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    factor = rng.lognormal(0, 0.7, (len(weights), len(units)))
    for u, unit in enumerate(units):
        if unit.expert >= 0:
            factor[:, u] = by_domain[:, unit.layer, unit.expert]
    scaled: np.ndarray = factor / (weights @ factor)
    return scaled


# ----------------------------------------------------------------------------------------------------------------- oracle
@dataclass(frozen=True)
class Choice:
    """A plan as the oracle sees it."""

    c: int
    kept: tuple[tuple[int, ...], ...]
    formats: tuple[int, ...]  # of each unit; -1: dropped


def choices(costs: Costs, *, free_sets: bool) -> Iterator[Choice]:
    """Every plan there is."""
    experts, layers = range(costs.n_experts), range(costs.n_layers)
    offered = [[[f for f in range(len(costs.formats)) if np.isfinite(row[f])] for row in costs.cost[c]] for c in range(len(costs.counts))]
    for c, count in enumerate(costs.counts):
        if costs.form == "experts":
            sets = [s for n in range(costs.top_k, costs.n_experts + 1) for s in itertools.combinations(experts, n)]
            per_layer = [sets] * costs.n_layers
        elif free_sets:
            per_layer = [list(itertools.combinations(experts, count))] * costs.n_layers
        else:
            per_layer = [[tuple(np.flatnonzero(costs.kept[c, layer]).tolist())] for layer in layers]
        for kept in itertools.product(*per_layer):
            options = [o if u.expert < 0 or u.expert in kept[u.layer] else [-1] for u, o in zip(costs.units, offered[c], strict=True)]
            for formats in itertools.product(*options):
                yield Choice(c, kept, formats)


def smallest_format(costs: Costs, u: int) -> int:
    """The format that stores a single expert in the fewest bytes."""
    return min((f for f in range(len(costs.formats)) if np.isfinite(costs.cost[0, u, f])), key=lambda f: int(costs.size[0, u, f]))


def nats(costs: Costs, choice: Choice) -> list[float]:
    """Cost in each domain."""
    totals = []
    for d in range(len(costs.domains)):
        total = 0.0
        for u, f in enumerate(choice.formats):
            at = smallest_format(costs, u) if f < 0 else f  # who takes the tokens of an expert that goes is rounded too
            total += float(costs.cost[choice.c, u, at] * costs.factor[d, u])
        for layer, kept in enumerate(choice.kept):
            gone = [e for e in range(costs.n_experts) if e not in kept]
            drops = costs.expert_drop[d, layer]
            if costs.form == "experts":
                total += float(sum(drops[e] for e in gone) + costs.drop_curve[layer, len(gone)])
            else:
                menu = [e for e in range(costs.n_experts) if not costs.kept[choice.c, layer, e]]
                total += float(costs.drop_cost[d, choice.c, layer] + sum(drops[e] for e in gone) - sum(drops[e] for e in menu))
        totals.append(total)
    return totals


def file_bytes(costs: Costs, choice: Choice) -> int:
    """Bytes of the file."""
    return int(costs.fixed_size[choice.c]) + sum(int(costs.size[choice.c, u, f]) for u, f in enumerate(choice.formats) if f >= 0)


def peak_bytes(costs: Costs, choice: Choice) -> int:
    """Bytes of the process; staging copies here are below 32 MiB, so they stay with the process."""
    staging = max((int(costs.staging[choice.c, u, f]) for u, f in enumerate(choice.formats) if f >= 0), default=0)
    extra = sum(int(costs.extra[choice.c, u, f]) for u, f in enumerate(choice.formats) if f >= 0)
    return file_bytes(costs, choice) + extra + staging + sum(v for k, v in costs.memory.items() if k != "context")


def objective(costs: Costs, choice: Choice, kind: str) -> float:
    """What the planner minimises."""
    found = nats(costs, choice)
    return max(found) if kind == "worst" else float(np.dot(costs.domain_weights, found))


def as_choice(costs: Costs, plan: Plan) -> Choice:
    """A plan in the oracle's terms."""
    c = 0 if costs.form == "experts" else costs.counts.index(len(plan.kept[0]))
    formats = tuple(costs.formats.index(plan.formats[u.name]) if u.name in plan.formats else -1 for u in costs.units)
    return Choice(c, plan.kept, formats)


# ------------------------------------------------------------------------------------------------------------------ rules
Predicate = Callable[[Choice], bool]


@dataclass(frozen=True)
class Ruled:
    """A rule, what it means, and whether it makes kept sets free in the stacks form."""

    rule: Rule
    holds: Predicate
    frees: bool = False


def random_rules(costs: Costs, seed: int, number: int) -> list[Ruled]:
    """Some rules that may or may not hold together."""
    rng = np.random.default_rng(seed)
    makers = [m for m in MAKERS if costs.form == "stacks" or m is not _same_format]
    return [makers[int(rng.integers(len(makers)))](costs, rng) for _ in range(number)]


def _keep(costs: Costs, rng: np.random.Generator) -> Ruled:
    layer, expert = int(rng.integers(costs.n_layers)), int(rng.integers(costs.n_experts))
    return Ruled(Keep(layers=[layer], experts=(expert,)), lambda p: expert in p.kept[layer], frees=True)


def _drop(costs: Costs, rng: np.random.Generator) -> Ruled:
    layer, expert = int(rng.integers(costs.n_layers)), int(rng.integers(costs.n_experts))
    return Ruled(Drop(layers=[layer], experts=(expert,)), lambda p: expert not in p.kept[layer], frees=True)


def _kept_count(costs: Costs, rng: np.random.Generator) -> Ruled:
    low, high = sorted(int(n) for n in rng.integers(1, costs.n_experts + 1, 2))
    return Ruled(KeptCount(at_least=low, at_most=high), lambda p: all(low <= len(k) <= high for k in p.kept))


def _group_kept(costs: Costs, rng: np.random.Generator) -> Ruled:
    half = costs.n_experts // 2

    def holds(p: Choice) -> bool:
        return all(any(e < half for e in k) and any(e >= half for e in k) for k in p.kept)

    return Ruled(GroupKept(groups=2, at_least=1), holds, frees=True)


def _domain_kept(costs: Costs, rng: np.random.Generator) -> Ruled:
    share, d = float(rng.uniform(0.3, 0.95)), int(rng.integers(len(costs.domains)))

    def holds(p: Choice) -> bool:
        return all(sum(float(costs.usage[d, layer, e]) for e in k) >= share for layer, k in enumerate(p.kept))

    return Ruled(DomainKept(domain=costs.domains[d], share=share), holds, frees=True)


def _same_format(costs: Costs, rng: np.random.Generator) -> Ruled:
    pair = [u for u, unit in enumerate(costs.units) if unit.layer == 0]
    return Ruled(SameFormat(), lambda p: len({p.formats[u] for u in pair}) == 1)


def _max_formats(costs: Costs, rng: np.random.Generator) -> Ruled:
    most = int(rng.integers(1, len(costs.formats)))
    return Ruled(MaxFormats(at_most=most), lambda p: len({f for f in p.formats if f >= 0}) <= most)


def left_weights(costs: Costs, p: Choice, u: int) -> int:
    """Weights of a unit that are left."""
    unit = costs.units[u]
    return 0 if p.formats[u] < 0 else unit.n_weights * costs.counts[p.c] // costs.n_experts if unit.is_stack else unit.n_weights


def unit_bytes(costs: Costs, p: Choice, u: int) -> int:
    """Bytes of a unit."""
    return 0 if p.formats[u] < 0 else int(costs.size[p.c, u, p.formats[u]])


def _mean_bits(costs: Costs, rng: np.random.Generator) -> Ruled:
    bits, least = float(rng.uniform(3, 8)), bool(rng.random() < 0.5)

    def holds(p: Choice) -> bool:
        total = 8 * sum(unit_bytes(costs, p, u) for u in range(len(p.formats)))
        limit = bits * sum(left_weights(costs, p, u) for u in range(len(p.formats)))
        return total >= limit if least else total <= limit

    return Ruled(MeanBits(at_least=bits) if least else MeanBits(at_most=bits), holds)


def _byte_limit(costs: Costs, rng: np.random.Generator) -> Ruled:
    layer = int(rng.integers(costs.n_layers))
    mine = [u for u, unit in enumerate(costs.units) if unit.layer == layer]
    most = int(rng.uniform(0.1, 1) * sum(costs.size[-1, u].max() for u in mine)) + 1
    return Ruled(ByteLimit(layers=[layer], at_most=f"{most}B"), lambda p: sum(unit_bytes(costs, p, u) for u in mine) <= most)


def active(costs: Costs, p: Choice) -> float:
    """Bytes that a token reads: of a stack top-k of the kept experts, of single experts by how often they are picked."""
    total = 0.0
    for u, unit in enumerate(costs.units):
        rate = 0.0 if unit.role == "token_embd" and any(other.role == "output" for other in costs.units) else 1.0
        if unit.expert >= 0:
            share = sum(w * float(costs.usage[d, unit.layer, unit.expert]) for d, w in enumerate(costs.domain_weights))
            rate = min(1.0, costs.top_k * share)
        elif unit.is_stack:
            rate = costs.top_k / costs.counts[p.c]
        total += rate * unit_bytes(costs, p, u)
    return total


def _active_bytes(costs: Costs, rng: np.random.Generator) -> Ruled:
    whole = Choice(len(costs.counts) - 1, (), tuple(int(np.argmax(s)) for s in costs.size[-1]))
    most = int(rng.uniform(0.1, 0.9) * active(costs, whole)) + 1
    return Ruled(ActiveBytes(at_most=f"{most}B"), lambda p: active(costs, p) <= most * (1 + 1e-12))


def _pin(costs: Costs, rng: np.random.Generator) -> Ruled:
    u = int(rng.integers(len(costs.units)))
    offered = [f for f in range(len(costs.formats)) if np.isfinite(costs.cost[-1, u, f])]
    f = offered[int(rng.integers(len(offered)))]
    size = costs.size[-1, u]

    def holds(p: Choice) -> bool:
        return p.formats[u] < 0 or size[p.formats[u]] >= size[f]

    return Ruled(Pin(tensors=(costs.units[u].name,), at_least=costs.formats[f]), holds)


MAKERS: list[Callable[[Costs, np.random.Generator], Ruled]] = [
    _keep,
    _drop,
    _kept_count,
    _group_kept,
    _domain_kept,
    _same_format,
    _max_formats,
    _mean_bits,
    _byte_limit,
    _active_bytes,
    _pin,
]


def budget_between(costs: Costs, share: float) -> int:
    """A budget between the least process and one that holds everything at its largest."""
    beside = sum(v for k, v in costs.memory.items() if k != "context")
    held = costs.size + costs.extra
    sizes = np.where(np.isfinite(costs.cost), held, 10**12)
    small = sizes.min(axis=2)
    if costs.form == "experts":
        experts = np.array([u.expert >= 0 for u in costs.units])
        small = np.where(experts, 0, small)
    least = int((costs.fixed_size + small.sum(axis=1)).min())
    most = int((costs.fixed_size + np.where(np.isfinite(costs.cost), held, 0).max(axis=2).sum(axis=1)).max() + costs.staging.max())
    return beside + least + int(share * (most - least))


def changed(costs: Costs, **values: Any) -> Costs:
    """The same price list with some fields replaced."""
    return replace(costs, **values)


def best_cost(costs: Costs, budget: int, kind: str, ruled: Sequence[Ruled] = ()) -> float | None:
    """The least objective of all plans that fit and keep the rules, by trying each; None: there is none."""
    free = kind == "worst" or any(r.frees for r in ruled)
    fitting = (p for p in choices(costs, free_sets=free) if peak_bytes(costs, p) <= budget and all(r.holds(p) for r in ruled))
    return min((objective(costs, p, kind) for p in fitting), default=None)


def least_peak(costs: Costs, ruled: Sequence[Ruled] = ()) -> int | None:
    """Bytes of the smallest process of any plan that keeps the rules."""
    free = any(r.frees for r in ruled)
    return min((peak_bytes(costs, p) for p in choices(costs, free_sets=free) if all(r.holds(p) for r in ruled)), default=None)
