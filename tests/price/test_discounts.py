"""What repair and feedback take off a price list."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from strategies import random_costs

from edgemoe.plan.infeasible import least_budget
from edgemoe.plan.solve import solve_plan
from edgemoe.price.choices import FED_BACK, discount, discount_drops


def test_feedback_lowers_the_price_of_rounded_weights_and_not_of_inputs_that_kernels_round() -> None:
    costs = random_costs(0, "experts")
    finite = np.isfinite(costs.cost)
    costs = replace(costs, input_cost=np.where(finite, costs.cost / 4, 0.0))
    after = discount(costs, repair=False, rounding="feedback")
    assert after.cost[finite] == pytest.approx(costs.cost[finite] * (0.75 * FED_BACK + 0.25))
    assert np.array_equal(discount(costs, repair=False, rounding="stock").cost, costs.cost)


def test_drops_are_priced_after_repair_and_nothing_else_changes() -> None:
    for form in ("stacks", "experts"):
        costs = random_costs(0, form)
        after = discount_drops(costs)
        assert after.repair and not costs.repair
        assert (after.drop_cost <= costs.drop_cost).all() and np.array_equal(after.expert_drop, costs.expert_drop / 2)
        assert np.array_equal(after.cost, costs.cost) and np.array_equal(after.size, costs.size)
        budget = least_budget(costs) * 11 // 10
        assert solve_plan(after, budget).predicted_kl <= solve_plan(costs, budget).predicted_kl
