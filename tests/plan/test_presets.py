"""The presets that planners are compared with: PMQ and one format for the experts of a layer."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from command import MODEL
from strategies import random_costs, smallest_format

from edgemoe.base.errors import BudgetError, UsageError
from edgemoe.ir import Costs, Model, Plan, Stats
from edgemoe.model.inspect import inspect_model
from edgemoe.plan.infeasible import least_budget
from edgemoe.plan.presets import PMQ_WIDTHS, layer_uniform_plan, pmq_plan
from edgemoe.plan.solve import solve_plan

CONTEXT = 512


@pytest.fixture(scope="module")
def model() -> Model:
    return inspect_model(MODEL)


@pytest.fixture(scope="module")
def stats(shipped_stats: Stats) -> Stats:
    return shipped_stats


@pytest.fixture(scope="module")
def costs(onnx_costs: Costs) -> Costs:
    return onnx_costs


def bits_of(name: str) -> int:
    return int(name.removeprefix("INT").split("_")[0])


def bare(costs: Costs) -> Costs:
    """Prices whose budget is the file's."""
    nothing = np.zeros_like(costs.extra)
    return replace(costs, extra=nothing, staging=nothing, memory={**dict.fromkeys(costs.memory, 0), "context": CONTEXT})


def pmq(costs: Costs, stats: Stats, model: Model, budget: int) -> Plan:
    arrays = [stats.arrays(layer) for layer in range(model.n_layers)]
    tokens, gates = (np.stack([a[name].sum(axis=0).astype(float) for a in arrays]) for name in ("count", "gate"))
    return pmq_plan(bare(costs), budget, tokens, gates, {bits: f"INT{bits}_128" for bits in PMQ_WIDTHS}, "INT8_32")


def test_pmq_keeps_every_expert_its_widths_and_the_budget(costs: Costs, stats: Stats, model: Model) -> None:
    sizes: list[int] = []
    for budget in (4_000_000, 4_400_000, 4_800_000, 5_200_000):
        try:
            plan = pmq(costs, stats, model, budget)
        except BudgetError:
            continue
        sizes.append(plan.file_size)
        assert plan.file_size <= budget and plan.kept == (tuple(range(model.n_experts)),) * model.n_layers
        by_layer = [[plan.formats[f"blk.{layer}.ffn_exps.{e}"] for e in range(model.n_experts)] for layer in range(model.n_layers)]
        assert {bits_of(f) for row in by_layer for f in row} <= set(PMQ_WIDTHS)
        assert len({sum(map(bits_of, row)) for row in by_layer}) == 1  # as many bits for each layer
        assert all({3, 4} <= set(map(bits_of, row)) for row in by_layer)
        assert {f for name, f in plan.formats.items() if "exps" not in name} == {"INT8_32"}
        assert solve_plan(bare(costs), plan.file_size).q <= plan.q * (1 + 1e-9)
    assert sizes and sizes == sorted(set(sizes))
    with pytest.raises(BudgetError, match="pmq"):
        pmq(costs, stats, model, 100_000)


@pytest.mark.parametrize("share", [0.1, 0.3, 0.6])
def test_layer_uniform_plans_store_the_experts_of_a_layer_alike(costs: Costs, share: float) -> None:
    prices = bare(costs)
    budget = (least_budget(prices) or 0) + int(share * sum(int(prices.size[0, u].max()) for u in range(len(prices.units))))
    plan, free = layer_uniform_plan(prices, budget), solve_plan(prices, budget)
    assert plan.file_size <= budget
    for layer in range(costs.n_layers):
        assert len({f for name, f in plan.formats.items() if name.startswith(f"blk.{layer}.ffn_exps.")}) == 1
    assert free.bound <= plan.q * (1 + 1e-9)


def test_layer_uniform_is_the_best_of_its_kind() -> None:
    """Every plan of two layers, three experts and two formats, added up in plain Python."""
    for seed in range(12):
        costs = replace(random_costs(seed, "experts", experts=3, formats=2), staging=np.zeros((1, 7, 2), np.int64))
        size = np.random.default_rng(seed).integers(20, 60, costs.size.shape)
        size[:, :3], size[:, 3:6] = size[:, :1], size[:, 3:4]  # experts of a layer are equally large
        costs = replace(costs, cost=np.where(np.isfinite(costs.cost), costs.cost, 1.0), size=size, extra=size // 8)
        beside = sum(size for part, size in costs.memory.items() if part != "context") + int(costs.fixed_size[0])
        budget = beside + 200
        best = np.inf
        for number in range((2 * 8) ** 2 * 2):
            rest, other = number % (8 * 2), number // (8 * 2)
            masks, f = [rest % 8, other % 8], [rest // 8, other // 8 % 2, other // 16 % 2]
            if 0 in masks:
                continue
            q, held = 0.0, beside
            for u, unit in enumerate(costs.units):
                at = f[unit.layer] if unit.expert >= 0 else f[2]
                if unit.expert >= 0 and not masks[unit.layer] >> unit.expert & 1:
                    q += float(costs.weights @ costs.expert_drop[:, unit.layer, unit.expert])
                    q += float(costs.weights @ costs.factor[:, u]) * float(costs.cost[0, u, smallest_format(costs, u)])
                    continue
                q += float(costs.weights @ costs.factor[:, u]) * float(costs.cost[0, u, at])
                held += int(costs.size[0, u, at] + costs.extra[0, u, at])
            q += sum(float(costs.drop_curve[layer, 3 - masks[layer].bit_count()]) for layer in range(2))
            if held <= budget:
                best = min(best, q)
        assert layer_uniform_plan(costs, budget, 1e-9).q == pytest.approx(best, rel=1e-6)


def test_presets_refuse_prices_of_stacks() -> None:
    with pytest.raises(UsageError, match="experts form"):
        layer_uniform_plan(random_costs(0, "stacks"), 10**6)
