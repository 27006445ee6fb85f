"""Prices of a trained model: fewer bits and fewer experts cost more, and more memory never gives a worse plan."""

from pathlib import Path

import numpy as np
import pytest
from command import MODEL

from edgemoe.base.storage import load_record, save_record
from edgemoe.ir import Costs, Model, Router
from edgemoe.model.inspect import inspect_model
from edgemoe.model.routing.kept_sets import offered_counts
from edgemoe.plan.infeasible import least_budget
from edgemoe.plan.solve import solve_plan
from edgemoe.price.choices import least_process
from edgemoe.targets import find_target


@pytest.fixture(scope="module")
def model() -> Model:
    return inspect_model(MODEL)


@pytest.fixture(scope="module")
def costs(gguf_costs: Costs) -> Costs:
    return gguf_costs


def test_prices_fall_with_bits_and_nothing_is_free_but_keeping(costs: Costs) -> None:
    for u, unit in enumerate(costs.units):
        by_name = dict(zip(costs.formats, costs.cost[-1, u], strict=True))
        assert by_name["Q8_0"] < by_name["Q6_K"] < by_name["Q4_K"] < by_name["Q3_K"] < by_name["Q2_K"] < by_name["IQ1_S"], unit.name
        assert by_name["F16"] < 0.01 * by_name["Q8_0"]
    assert (costs.drop_cost[:, -1] == 0).all()
    assert (np.diff(costs.weights @ costs.drop_cost.sum(axis=2)) < 0).all()
    assert costs.counts == offered_counts(7, Router(top_k=2))


def test_costs_survive_saving(costs: Costs, tmp_path: Path) -> None:
    save_record(tmp_path / "costs.json", costs)
    again = load_record(tmp_path / "costs.json", Costs)
    assert again == costs
    assert np.array_equal(again.cost, costs.cost) and np.array_equal(again.kept, costs.kept)


def test_more_memory_never_gives_a_worse_plan(costs: Costs) -> None:
    least = least_budget(costs)
    plans = [solve_plan(costs, least + extra) for extra in (0, 300_000, 10**6, 2 * 10**6, 4 * 10**6, 10**8)]
    assert [p.predicted_kl for p in plans] == sorted((p.predicted_kl for p in plans), reverse=True)
    assert all(p.memory["peak"] <= p.budget and p.proven for p in plans)
    assert set(plans[-1].formats.values()) == {"F16"}


def test_the_least_budget_is_known_from_shapes_alone(model: Model, costs: Costs) -> None:
    assert least_process(model, find_target("gguf"), 512) == least_budget(costs)
