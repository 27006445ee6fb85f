"""Plans in which every expert is stored alone: counts differ by layer, and the process' bytes count."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from strategies import random_costs

from edgemoe.base.errors import BudgetError
from edgemoe.ir import Costs
from edgemoe.plan.infeasible import least_budget
from edgemoe.plan.solve import solve_plan


@pytest.fixture(scope="module")
def costs(onnx_costs: Costs) -> Costs:
    return onnx_costs


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
