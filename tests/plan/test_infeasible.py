"""Budgets and rules that allow no plan: the least budget and the least conflict are named."""

from __future__ import annotations

import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from strategies import least_peak, make_costs, random_rules

from edgemoe.base.errors import BudgetError, UsageError
from edgemoe.plan.infeasible import least_budget, minimal_conflict
from edgemoe.plan.solve import solve_plan
from edgemoe.rules import Drop, Keep, KeptCount, MeanBits, Rule

GAP = 1e-6
FORMS = ("stacks", "experts")
SEEDS = st.integers(0, 10**6)


@settings(max_examples=15, deadline=None)
@given(seed=SEEDS, n_rules=st.integers(0, 2), form=st.sampled_from(FORMS))
def test_the_least_budget_that_is_named_is_the_least_that_does(seed: int, n_rules: int, form: str) -> None:
    costs = make_costs(seed, form)
    ruled = random_rules(costs, seed, n_rules)
    rules = [r.rule for r in ruled]
    least = least_peak(costs, ruled)
    try:
        assert least_budget(costs, rules) == least
    except UsageError:
        assert least is None
        return
    if least is None:
        with pytest.raises(BudgetError, match="no plan keeps these rules together"):
            solve_plan(costs, 10**9, rules=rules)
        return
    assert solve_plan(costs, least, rules=rules, gap=GAP).memory["peak"] == least
    with pytest.raises(BudgetError, match=re.escape(f"({least} bytes)")):
        solve_plan(costs, least - 1, rules=rules, gap=GAP)


@settings(max_examples=40, deadline=None)
@given(seed=SEEDS, form=st.sampled_from(FORMS))
def test_a_named_conflict_is_one_and_needs_every_rule_that_is_named(seed: int, form: str) -> None:
    costs = make_costs(seed, form)
    ruled = random_rules(costs, seed, 5)
    try:
        if least_peak(costs, ruled) is not None:
            return
        conflict = minimal_conflict(costs, [r.rule for r in ruled])
    except UsageError:  # two rules that exclude each other when they are read
        return
    named = [r for r in ruled if any(r.rule is c for c in conflict)]
    assert least_peak(costs, named) is None
    assert all(least_peak(costs, [r for r in named if r is not left]) is not None for left in named)


def test_a_conflict_of_equal_rules_names_one_of_them() -> None:
    costs = make_costs(3, "stacks")
    rules: list[Rule] = [MeanBits(at_least=8.4, name="fine"), MeanBits(at_most=3.0, name="coarse"), MeanBits(at_least=8.4, name="fine")]
    conflict = minimal_conflict(costs, rules)
    assert sorted(r.name for r in conflict if isinstance(r, MeanBits)) == ["coarse", "fine"]


@pytest.mark.parametrize("budget", [-(10**9), -1, 0, 1, 100])
def test_no_budget_at_all_is_a_budget_error(budget: int) -> None:
    with pytest.raises(BudgetError, match="the least is"):
        solve_plan(make_costs(1, "stacks"), budget)


def test_pins_and_counts_that_exclude_each_other_are_named() -> None:
    costs = make_costs(9, "experts")
    rules: list[Rule] = [KeptCount(at_most=1, name="one"), Keep(layers=[0], experts=(0, 1), name="two"), Drop(experts=(3,), name="three")]
    with pytest.raises(BudgetError, match=r"one: .*two: ") as told_error:
        solve_plan(costs, 10**6, rules=rules)
    assert "three" not in str(told_error.value)
