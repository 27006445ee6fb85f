"""Explanations and differences of plans, from generic prices of a shipped shape."""

from dataclasses import replace

import pytest

from edgemoe.base.errors import UsageError
from edgemoe.ir import Costs, Plan
from edgemoe.plan.diff import diff_plans
from edgemoe.plan.explain import describe_why, explain_expert, explain_tensor, price_memory, price_rules
from edgemoe.plan.solve import solve_plan
from edgemoe.price.priors import price_config
from edgemoe.rules import Keep, KeptCount, MeanBits, Pin

GB = 10**9


@pytest.fixture(scope="module")
def costs() -> Costs:
    """OLMoE-1B-7B, 16 layers of 64 experts, which nobody measured here; prices of single experts are taken as if somebody had."""
    return replace(price_config("OLMoE-1B-7B", 4096), drawn=False)


@pytest.fixture(scope="module")
def plan(costs: Costs) -> Plan:
    return solve_plan(costs, 3 * GB)


# ---------------------------------------------------------------------------------------------------------------- explain
def test_a_rule_that_binds_costs_nats_and_one_that_does_not_costs_none(costs: Costs) -> None:
    rules = [Pin(tensors=("attention",), format="Q8_0", name="fine"), MeanBits(tensors=("experts",), at_least=1.0, name="easy")]
    made = solve_plan(costs, 3 * GB, rules=rules)
    fine, easy = price_rules(costs, made, rules)
    assert fine.nats > 0 and easy.nats == pytest.approx(0, abs=made.q * 1e-3)
    assert easy.slack is not None and easy.slack > 0


def test_more_memory_buys_what_solving_again_says(costs: Costs, plan: Plan) -> None:
    percent, gib = price_memory(costs, plan, [])
    assert 0 < percent.nats < gib.nats < plan.q
    assert gib.nats == pytest.approx(plan.q - solve_plan(costs, plan.budget + gib.bytes).q, rel=1e-3)


def test_a_tensor_has_the_format_that_is_cheapest_with_its_bytes_paid(costs: Costs, plan: Plan) -> None:
    cheapest = 0
    for unit in costs.units:
        name, options = explain_tensor(costs, plan, unit.name)
        assert name == unit.name and sum(o.chosen for o in options) == 1
        cheapest += options[0].chosen
    assert cheapest >= 0.7 * len(costs.units)  # the rest fills the last bytes


def test_the_experts_that_go_are_the_cheap_ones(costs: Costs) -> None:
    made = solve_plan(costs, 3 * GB, rules=[KeptCount(at_most=40)])
    fates = [explain_expert(costs, made, 3, e) for e in range(64)]
    assert sum(f.kept for f in fates) == made.count
    assert max(f.rank for f in fates if not f.kept) <= 64 - made.count + 1  # equal prices
    assert "goes" in describe_why(costs, made, f"3:{min(fates, key=lambda f: f.nats).expert}")[0]


@pytest.mark.parametrize("what", ["99:0", "3:64", "blk.3", "nonsense"])
def test_what_is_not_in_the_model_cannot_be_explained(costs: Costs, plan: Plan, what: str) -> None:
    with pytest.raises(UsageError):
        describe_why(costs, plan, what)


# --------------------------------------------------------------------------------------------------------------- exchange
def test_the_difference_of_a_plan_to_itself_is_none_and_to_another_is_named(costs: Costs, plan: Plan) -> None:
    assert "same experts and formats" in diff_plans(plan, plan)[-1]
    other = solve_plan(costs, 3 * GB, rules=[Keep(experts=(int(next(e for e in range(64) if e not in plan.kept[0])),), layers=(0,))])
    lines = "\n".join(diff_plans(plan, other))
    assert " in " in lines and "layer 0" in lines


def test_near_changes_less_than_a_free_plan_and_stays_as_good(costs: Costs, plan: Plan) -> None:
    budget = round(plan.budget * 0.995)
    free, near = solve_plan(costs, budget), solve_plan(costs, budget, near=plan)

    def changes(other: Plan) -> int:
        return sum(plan.formats[n] != other.formats[n] for n in plan.formats)

    assert changes(near) <= changes(free)
    assert near.q <= free.q * 1.02
