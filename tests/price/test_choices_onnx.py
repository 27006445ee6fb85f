"""Prices and plans in which every expert is stored alone: the ONNX target's, on a trained model."""

from __future__ import annotations

import itertools
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from command import MODEL
from hypothesis import given, settings
from hypothesis import strategies as st
from strategies import random_costs, smallest_format

from edgemoe.base.errors import BudgetError, UsageError
from edgemoe.calibrate.probes import STACKS
from edgemoe.ir import Costs, Model, Plan, Stats
from edgemoe.model.inspect import inspect_model
from edgemoe.model.routing.kept_sets import build_menu, make_replay, offered_counts
from edgemoe.plan.evaluate import describe_choice
from edgemoe.plan.infeasible import least_budget
from edgemoe.plan.presets import PMQ_WIDTHS, layer_uniform_plan, pmq_plan
from edgemoe.plan.solve import solve_plan
from edgemoe.price.choices import discount_drops, least_process, price_choices
from edgemoe.price.priors import price_config
from edgemoe.quantize.importance import importance_of
from edgemoe.stream.layers import LayerStream, apply_norm
from edgemoe.stream.texts import choose_texts
from edgemoe.stream.windows import tokenize
from edgemoe.targets import find_target

CONTEXT = 512
TARGET = find_target("onnx")


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


# ---------------------------------------------------------------------------------------------------------------- prices
def test_there_is_one_entry_for_every_expert_and_every_other_matrix(model: Model, costs: Costs) -> None:
    assert costs.form == "experts" and costs.counts == (model.n_experts,)
    experts = {(u.layer, u.expert) for u in costs.units if u.expert >= 0}
    assert experts == {(layer, e) for layer in range(model.n_layers) for e in range(model.n_experts)}
    planned = sum(t.n_weights for t in model.tensors if len(t.shape) == 2 and t.role != "ffn_gate_inp")
    assert sum(u.n_weights for u in costs.units) == planned


def test_fewer_bits_cost_more_nats_and_fewer_bytes(costs: Costs) -> None:
    cost = costs.cost[0]
    assert (cost[np.isfinite(cost)] >= 0).all()
    for u, unit in enumerate(costs.units):
        offered = [f for f in range(len(costs.formats)) if np.isfinite(cost[u, f])]
        for block in ("32", "64", "128"):
            line = sorted((f for f in offered if costs.formats[f].endswith("_" + block)), key=lambda f: bits_of(costs.formats[f]))
            for few, many in itertools.pairwise(line):
                assert costs.size[0, u, few] < costs.size[0, u, many]
                assert cost[u, few] > 1.5 * cost[u, many], unit.name  # a bit more is a quarter of the squared error, on large samples


def test_an_8_bit_expert_costs_more_than_its_weights_because_inputs_are_rounded(model: Model, stats: Stats, costs: Costs) -> None:
    class Exact:
        """The same target with kernels that leave inputs alone."""

        __name__ = TARGET.__name__  # type: ignore[attr-defined]

        def __getattr__(self, name: str) -> object:
            return (lambda *_: 0) if name == "input_block" else getattr(TARGET, name)

    exact = price_choices(model, stats, Exact(), CONTEXT)  # type: ignore[arg-type]
    assert np.array_equal(np.isfinite(exact.cost), np.isfinite(costs.cost))
    known = np.isfinite(costs.cost)
    assert not exact.input_cost.any() and (costs.cost - costs.input_cost)[known] == pytest.approx(exact.cost[known], rel=1e-6)
    ratio = np.nan_to_num(costs.cost[0], posinf=1.0) / np.nan_to_num(exact.cost[0], posinf=1.0)
    for f, name in enumerate(costs.formats):
        experts = [u for u, unit in enumerate(costs.units) if unit.expert >= 0 and np.isfinite(costs.cost[0, u, f])]
        if bits_of(name) == 8:
            assert (ratio[experts, f] > 1.2).all(), name
        elif bits_of(name) in (3, 4):
            assert np.array_equal(ratio[experts, f], np.ones(len(experts))), name
        elif experts:
            assert (ratio[experts, f] >= 1).all() and np.median(ratio[experts, f]) < 1.1, name


def test_prices_of_the_last_layers_experts_rank_them_as_the_kl_does_that_each_alone_costs(model: Model, stats: Stats, costs: Costs) -> None:
    stream, windows, last = LayerStream(model), tokenize(model, choose_texts((), ())[0], 4096, 512), model.n_layers - 1
    norm, output, eps = stream.head()
    importance, kind = importance_of(model, stats, last), costs.formats.index("INT2_128")
    with torch.inference_mode():
        states = stream.embed(windows.tokens)
        for layer in range(last):
            states = stream.run_layer(stream.load_layer(layer), states)
        module = stream.load_layer(last)

        def log_p() -> torch.Tensor:
            logits = apply_norm(stream.run_layer(module, states), norm, eps) @ output.T
            return torch.cat([row[:n] for row, n in zip(logits.double().log_softmax(-1), windows.lengths, strict=True)])

        before, measured, priced = log_p(), [], []
        for expert in range(model.n_experts):
            views = [stream.expert_slice(module, role, expert) for role in STACKS]
            kept = [view.clone() for view in views]
            for view, role in zip(views, STACKS, strict=True):
                view.copy_(torch.from_numpy(TARGET.round_rows(view.numpy(), "INT2_128", importance[role, expert])))
            measured.append(float((before.exp() * (before - log_p())).sum(-1).mean()))
            priced += [costs.cost[0, u, kind] for u, unit in enumerate(costs.units) if (unit.layer, unit.expert) == (last, expert)]
            for view, old in zip(views, kept, strict=True):
                view.copy_(old)
    ranks = [np.argsort(np.argsort(values)) for values in (priced, measured)]
    assert np.corrcoef(*ranks)[0, 1] > 0.8  # errors of all tokens alike: 0 to 0.3
    assert np.std(np.log(np.array(priced) / measured)) < 0.35  # 0.65 and more


def test_a_set_of_the_greedy_path_costs_what_it_costs_where_layers_share_a_count(
    model: Model, stats: Stats, costs: Costs, gguf_costs: Costs
) -> None:
    stacks, compared = gguf_costs, 0
    for layer in range(model.n_layers):
        replay = make_replay(stats.arrays(layer), stats.weights, model.top_k, renormalize=model.renormalize)
        menu = build_menu(replay, offered_counts(model.n_experts, model.top_k))
        for gone in range(len(menu.order) + 1):
            kept = np.ones(model.n_experts, bool)
            kept[menu.order[:gone]] = False
            added = stats.weights @ costs.expert_drop[:, layer, menu.order[:gone]].sum(axis=1) + costs.drop_curve[layer, gone]
            assert added >= -1e-9
            c = stacks.counts.index(model.n_experts - gone)
            if np.array_equal(stacks.kept[c, layer], kept):  # no swap found a better set
                assert added == pytest.approx(stats.weights @ stacks.drop_cost[:, c, layer], rel=1e-6, abs=1e-12)
                compared += 1
        assert costs.drop_curve[layer, 0] == 0
    assert compared > model.n_layers and not costs.drop_cost.any()


def test_experts_go_in_the_order_of_the_greedy_path_where_formats_do_not_tell_them_apart(model: Model, stats: Stats, costs: Costs) -> None:
    for layer in range(model.n_layers):
        replay = make_replay(stats.arrays(layer), stats.weights, model.top_k, renormalize=model.renormalize)
        order = build_menu(replay, offered_counts(model.n_experts, model.top_k)).order
        prices = costs.weights @ costs.expert_drop[:, layer]
        assert (np.diff(prices[order]) > 0).all()
        assert np.delete(prices, order).min() > prices[order[-1]]


def test_a_drop_saves_no_rounding_error_that_the_smallest_format_has(costs: Costs) -> None:
    formats = np.array([smallest_format(costs, u) for u in range(len(costs.units))])
    whole = describe_choice(costs, 10**9, np.ones((costs.n_layers, costs.n_experts), bool), formats, solver="none")
    kept = np.ones((costs.n_layers, costs.n_experts), bool)
    kept[0, 2] = False
    gone = np.array([-1 if (unit.layer, unit.expert) == (0, 2) else f for unit, f in zip(costs.units, formats, strict=True)])
    without = describe_choice(costs, 10**9, kept, gone, solver="none")
    assert without.drop_q > 0 and without.file_size < whole.file_size
    assert without.q - whole.q == pytest.approx(without.drop_q)


def test_repair_makes_every_set_of_the_path_cheaper_by_the_factor_of_its_count(costs: Costs) -> None:
    after = discount_drops(costs)
    before, cheaper = (np.sort(np.tensordot(c.weights, c.expert_drop, axes=1), axis=1).cumsum(axis=1) for c in (costs, after))
    for gone in range(1, costs.n_experts):
        whole, rest = before[:, gone - 1] + costs.drop_curve[:, gone], cheaper[:, gone - 1] + after.drop_curve[:, gone]
        assert rest == pytest.approx(whole * (0.3 + 0.38 * (costs.n_experts - gone) / costs.n_experts), abs=1e-12)


def test_factors_of_domains_have_the_mean_one(costs: Costs) -> None:
    assert costs.weights @ costs.factor == pytest.approx(np.ones(len(costs.units)))


def test_the_least_process_is_that_of_the_smallest_plan(model: Model, costs: Costs) -> None:
    assert least_process(model, TARGET, CONTEXT) == least_budget(costs)


def test_generic_prices_need_no_weights_and_give_a_plan(tmp_path: Path) -> None:
    costs = price_config("qwen3-30b-a3b", 4096, "onnx")
    assert costs.form == "experts" and costs.target == "onnx" and costs.origin.startswith("generic")
    eight, two = costs.formats.index("INT8_32"), costs.formats.index("INT2_128")
    experts = np.array([u.expert >= 0 for u in costs.units])
    assert (costs.cost[0, experts, two] > 20 * costs.cost[0, experts, eight]).all()
    plan = solve_plan(costs, 16 * 10**9, solver="lagrange")
    assert plan.memory["peak"] <= 16 * 10**9 and plan.target == "onnx"


# ----------------------------------------------------------------------------------------------------------------- plans
def test_a_plan_names_what_is_left_and_counts_differ_by_layer(costs: Costs) -> None:
    least = least_budget(costs) or 0
    most = sum(int(costs.size[0, u].max()) for u in range(len(costs.units)))
    seen = set()
    for share in (0.05, 0.15, 0.3, 0.6):
        plan = solve_plan(costs, least + int(share * most))
        kept = {f"blk.{layer}.ffn_exps.{e}" for layer, row in enumerate(plan.kept) for e in row}
        assert {n for n in plan.formats if "ffn_exps" in n} == kept
        assert plan.sizes.keys() == plan.formats.keys() == kept | {u.name for u in costs.units if u.expert < 0}
        assert plan.file_size == sum(plan.sizes.values()) + costs.fixed_size[0]
        expected = sum(size for name, size in plan.sizes.items() if "exps" not in name and name != "token_embd.weight")
        for layer, row in enumerate(plan.kept):
            expected += costs.top_k * sum(plan.sizes[f"blk.{layer}.ffn_exps.{e}"] for e in row) / len(row)
        assert plan.active_bytes == pytest.approx(expected, abs=1)
        seen |= set(map(len, plan.kept))
    assert len(seen) > 1


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 10**6), each=st.integers(1, 50))
def test_bytes_that_the_process_holds_beyond_the_file_count_against_the_budget(seed: int, each: int) -> None:
    costs = random_costs(seed, "experts")
    extra = np.where(np.isfinite(costs.cost), each, 0)
    larger = replace(costs, extra=extra)
    least = least_budget(larger) or 0
    plan = solve_plan(larger, least + 20)
    held = sum(each for _ in plan.formats)
    beside = sum(size for part, size in costs.memory.items() if part != "context")
    assert plan.memory["weights"] == plan.file_size + held
    assert beside + plan.file_size + held + plan.memory["staging"] <= least + 20
    with pytest.raises(BudgetError):
        solve_plan(larger, least - 1)


# --------------------------------------------------------------------------------------------------------------- presets
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
