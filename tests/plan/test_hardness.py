"""A search is bounded, and says which rule makes it long and the strictest form of it that a plan keeps."""

from __future__ import annotations

import logging
import re

import pytest

from edgemoe.base.errors import ConflictError, UnsolvedError
from edgemoe.ir import Costs
from edgemoe.plan.explain import describe_plan, price_rules
from edgemoe.plan.hardness import find_hard_rule
from edgemoe.plan.solve import solve_plan
from edgemoe.plan.sweep import sweep_budgets
from edgemoe.plan.task import make_task
from edgemoe.price.priors import price_config
from edgemoe.rules import ActiveBytes, ByteLimit, Keep, Rule, Speed, apply_rules
from edgemoe.rules.recipe import expression_rule
from edgemoe.solvers.effort import Effort

BUDGET = 12 * 10**9


def speed(tokens: float) -> Speed:
    return Speed(tokens_per_second=tokens, bandwidth="200GB/s", name="quick")


@pytest.fixture(scope="module")
def costs() -> Costs:
    return price_config("qwen3-30b-a3b", None, "gguf")


def test_a_speed_rule_that_made_the_solver_loop_for_ever_is_planned(costs: Costs) -> None:
    """HiGHS 1.16.0 looped on this program when it was given a choice to start from."""
    free = solve_plan(costs, BUDGET)
    room = 0.9 * free.active_bytes + costs.memory["kv"]
    plan = solve_plan(costs, BUDGET, rules=[speed(200e9 / room)])
    assert plan.proven
    assert plan.active_bytes <= 0.9 * free.active_bytes


def test_a_search_without_a_plan_names_the_rule_and_its_strictest_form_which_can_be_kept(costs: Costs) -> None:
    with pytest.raises(UnsolvedError) as caught:
        solve_plan(costs, BUDGET, rules=[speed(140)], seconds=1e-9)
    found = re.search(
        r"the rule quick makes it hard: the strictest form that a plan keeps is tokens_per_second: ([\d.]+)", str(caught.value)
    )
    assert found
    assert caught.value.exit_code == 3
    assert solve_plan(costs, BUDGET, rules=[speed(float(found[1]))]).memory["peak"] <= BUDGET
    with pytest.raises(ConflictError):
        solve_plan(costs, BUDGET, rules=[speed(1.002 * float(found[1]))])


def test_a_plan_that_is_not_proven_when_time_is_over_says_how_near_it_is_and_why(costs: Costs, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, "edgemoe"):
        plan = solve_plan(costs, BUDGET, rules=[speed(125)], seconds=0.8, gap=0.0)
    assert not plan.proven
    assert f"at most {plan.gap:.2%} less than the one found after 0.8 s; the rule quick makes it hard" in caplog.text


@pytest.mark.parametrize(
    ("rule", "form"),
    [
        (expression_rule("bytes() <= 300*MB"), r"<= \d+"),
        (expression_rule("kept() >= 1000000"), r">= 6144$"),
        (expression_rule("active_bytes() <= 1*MB"), r"<= \d+"),
        (ByteLimit(at_most="300MB"), r"at_most: \d+B"),
        (ActiveBytes(at_most="1MB"), r"at_most: \d+B"),
    ],
)
def test_a_rule_that_no_plan_keeps_is_told_with_its_strictest_form(costs: Costs, rule: Rule, form: str) -> None:
    with pytest.raises(ConflictError) as caught:
        solve_plan(costs, 10**12, rules=[rule])
    assert re.search(f"that a plan keeps is {form}", caught.value.hint), caught.value.hint


def test_of_several_rules_the_hard_one_is_named(costs: Costs) -> None:
    rules: list[Rule] = [Keep(layers=[3], experts=(5,)), speed(125)]
    task = make_task(costs, apply_rules(costs, rules), Effort())
    assert find_hard_rule(task, BUDGET, rules) is rules[1]


def test_when_time_is_over_explanations_and_sweeps_go_on(costs: Costs, monkeypatch: pytest.MonkeyPatch) -> None:
    plan = solve_plan(costs, BUDGET)

    def unsolved(*_: object, **__: object) -> None:
        raise UnsolvedError("no time")

    monkeypatch.setattr("edgemoe.plan.explain.solve_plan", unsolved)
    assert price_rules(costs, plan, [speed(50)]) == ()
    assert any("not known" in line for line in describe_plan(costs, plan, []))
    monkeypatch.setattr("edgemoe.plan.sweep.solve_plan", lambda costs, budget, **_: plan if budget == BUDGET else unsolved())
    points = sweep_budgets(costs, [BUDGET, BUDGET + 10**9])
    assert [p.carried_over for p in points] == [False, True]
    assert points[1].plan is not None and not points[1].plan.proven
