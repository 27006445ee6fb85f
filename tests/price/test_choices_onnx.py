"""Prices in which every expert is stored alone: the ONNX target's, on a trained model."""

from __future__ import annotations

import itertools
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from command import MODEL
from strategies import smallest_format

from edgemoe.ir import Costs, Model, Stats
from edgemoe.ir.model import is_stack
from edgemoe.model.inspect import inspect_model
from edgemoe.model.routing.kept_sets import build_menu, make_replay, offered_counts
from edgemoe.plan.evaluate import describe_choice
from edgemoe.plan.infeasible import least_budget
from edgemoe.plan.solve import solve_plan
from edgemoe.price.choices import discount_drops, least_process, price_choices
from edgemoe.price.priors import price_config
from edgemoe.quantize.importance import importance_of
from edgemoe.stream.adapter import weights_of
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
    exact = price_choices(model, stats, replace(TARGET, input_block=lambda *_: 0), CONTEXT)  # kernels that leave inputs alone
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
            roles = [role for role in model.planned_roles(last) if is_stack(role)]
            views = [weights_of(module, role, expert) for role in roles]
            kept = [view.clone() for view in views]
            for view, role in zip(views, roles, strict=True):
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
        replay = make_replay(stats.arrays(layer), stats.weights, model.router)
        menu = build_menu(replay, offered_counts(model.n_experts, model.router))
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
        replay = make_replay(stats.arrays(layer), stats.weights, model.router)
        order = build_menu(replay, offered_counts(model.n_experts, model.router)).order
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
