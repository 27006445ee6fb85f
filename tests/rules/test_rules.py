"""Users' rules: the same rule in three spellings is one rule, and what is not a rule is refused, by name."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import numpy as np
import pulp
import pytest
from strategies import as_choice, budget_between, nats, random_costs, unit_bytes

from edgemoe.base.errors import UsageError
from edgemoe.ir import Costs
from edgemoe.plan.solve import solve_plan
from edgemoe.rules import (
    ActiveBytes,
    ByteLimit,
    DomainKept,
    Drop,
    GroupKept,
    Keep,
    KeptCount,
    MaxFormats,
    MeanBits,
    Pin,
    Protect,
    Rule,
    SameFormat,
    Speed,
    Vram,
    apply_rules,
)
from edgemoe.rules.constraints import Constraints
from edgemoe.rules.linear import ARRAYS
from edgemoe.rules.recipe import expression_rule


@pytest.fixture(scope="module")
def costs() -> Costs:
    return random_costs(1, "stacks")


@pytest.fixture(scope="module")
def single() -> Costs:
    """One format for every expert."""
    return random_costs(1, "experts")


def same(one: Constraints, two: Constraints) -> bool:
    """Whether two drafts bound the same, whatever the rules are called."""
    pairs = list(zip(one.bounds, two.bounds, strict=True))
    return bool(pairs) and all(
        np.array_equal(getattr(a.expression, n), getattr(b.expression, n)) and a.expression.constant == b.expression.constant
        for a, b in pairs
        for n in ARRAYS
    )


# --------------------------------------------------------------------------------------------------- three ways, one rule
SPELLINGS: list[tuple[str, Callable[[Any], Any], Rule | None]] = [
    ("bytes(layers=range(0, 1)) <= 0.5*kB", lambda p: p.bytes(layers=range(1)) <= 0.5 * p.kB, ByteLimit(layers=[0], at_most="500B")),
    ("kept(layers=[0]) >= kept(layers=[1]) - 1", lambda p: p.kept(layers=[0]) >= p.kept(layers=[1]) - 1, None),
    ("bits() <= 5.5", lambda p: p.bits() <= 5.5, MeanBits(at_most=5.5)),
    ("5.5 >= bits()", lambda p: p.bits() <= 5.5, MeanBits(at_most=5.5)),
    ("bits(tensors='experts') >= 3", lambda p: p.bits(tensors="ffn_*_exps") >= 3, MeanBits(tensors=("experts",), at_least=3)),
    ("active_bytes() <= 0.3*kB", lambda p: p.active_bytes() <= 300, ActiveBytes(at_most="300B")),
    ("2 <= kept(layers=1)", lambda p: p.kept(layers=[1]) >= 2, None),
    ("kept(domain='d0', top=2) >= 3", lambda p: pulp.lpSum(p.keep(y, e) for y in p.layers for e in p.experts(y, "d0", 2)) >= 3, None),
    ("dropped(layers=0) <= 2", lambda p: 4 - p.kept(layers=[0]) <= 2, None),
    ("-2*bytes(layers=0)/4 + 100 >= -bytes(layers=1)", lambda p: 100 - p.bytes(layers=[0]) / 2 >= -p.bytes(layers=[1]), None),
]


@pytest.mark.parametrize(("text", "function", "record"), SPELLINGS, ids=[s[0] for s in SPELLINGS])
def test_a_text_a_function_and_a_record_that_say_the_same_are_the_same_rule(
    costs: Costs, text: str, function: Callable[[Any], Any], record: Rule | None
) -> None:
    first = apply_rules(costs, [expression_rule(text)])
    assert same(first, apply_rules(costs, [function]))
    if record is not None:
        assert same(first, apply_rules(costs, [record]))


# --------------------------------------------------------------------------------------------- what PuLP lets pass silently
def both_ends(p: Any) -> Any:
    return 0 <= p.keep(0, 0) <= 1


def two_by_and(p: Any) -> Any:
    return (p.kept(layers=[0]) <= 3) and (p.kept(layers=[1]) <= 3)


def two_by_or(p: Any) -> Any:
    return (p.kept(layers=[0]) <= 3) or (p.kept(layers=[1]) <= 3)


def condition(p: Any) -> Any:
    return p.bytes() <= 100 if p.kept() <= 3 else None


def condition_on_a_quantity(p: Any) -> Any:
    return p.bytes() <= 100 if p.keep(0, 0) else None


def unequal(p: Any) -> Any:
    return p.kept() != 3


def unequal_quantities(p: Any) -> Any:
    return p.kept(layers=[0]) != p.kept(layers=[1])


def negated(p: Any) -> Any:
    return not p.kept() <= 3


def member(p: Any) -> Any:
    return p.keep(0, 0) in [p.keep(0, 1)]


def both_ends_of_bits(p: Any) -> Any:
    return 2 <= p.bits() <= 4


def equal_bits(p: Any) -> Any:
    return p.bits() == 4


def empty_python_sum(p: Any) -> Any:
    return sum([]) <= 3


def empty_pulp_sum(p: Any) -> Any:
    return pulp.lpSum([]) <= 3


def no_comparison(p: Any) -> Any:
    return p.kept() - 3


def nothing(p: Any) -> Any:
    p.kept() >= 3  # noqa: B015 - the mistake


def product(p: Any) -> Any:
    return p.kept() * p.bytes() <= 3


def quotient(p: Any) -> Any:
    return p.bytes() / p.kept() <= 3


def strict(p: Any) -> Any:
    return p.kept() < 3


def largest(p: Any) -> Any:
    return max(p.kept(layers=[0]), p.kept(layers=[1])) <= 3


def not_a_number(p: Any) -> Any:
    return p.kept() <= float("nan")


def infinite(p: Any) -> Any:
    return float("inf") * p.kept() <= 3


def infinite_by_the_back_door(p: Any) -> Any:
    return pulp.lpDot([float("inf")], [p.keep(0, 0)]) <= 3


def not_a_number_by_the_back_door(p: Any) -> Any:
    return pulp.LpConstraint(pulp.LpAffineExpression([(p.keep(0, 0).atom(), float("nan"))]), -1, rhs=3)


def foreign(p: Any) -> Any:
    return pulp.LpAffineExpression([(pulp.LpProblem("x").add_variable("y"), 1.0)]) <= 3


def of_another_call(p: Any, seen: list[Any] = []) -> Any:  # noqa: B006 - the mistake
    seen.append(p.kept())
    return seen[0] <= 3


def random(p: Any) -> Any:
    return p.kept() <= float(np.random.default_rng().random()) + 3


def equal_bytes(p: Any) -> Any:
    return p.bytes() == 1000


def broken(p: Any) -> Any:
    return p.no_such_quantity() <= 3


def array(p: Any) -> Any:
    return np.array([1.0, 2.0]) * p.kept() <= 3


def strange(p: Any) -> Any:
    return "kept() <= 3"


def two_of_a_name(p: Any) -> Any:
    return p.kept() - p.new_var("a") - p.new_var("a") <= 3


def penalty_of_a_number(p: Any) -> Any:
    p.penalty(3)
    return p.kept() - p.new_var("a") <= 3


def penalty_of_a_choice(p: Any) -> Any:
    p.penalty(p.kept())
    return p.kept() - p.new_var("a") <= 3


def negative_penalty(p: Any) -> Any:
    over = p.new_var("over")
    p.penalty(-1 * over)
    return p.kept() - over <= 3


def upside_down(p: Any) -> Any:
    return p.kept() - p.new_var("a", low=3, high=2) <= 3


def no_such_expert(p: Any) -> Any:
    return p.keep(0, 99) >= 1


def no_such_layer(p: Any) -> Any:
    return p.kept(layers=[-1]) >= 1


def no_such_domain(p: Any) -> Any:
    return p.kept(experts=p.experts(0, domain="poetry")) >= 1


def no_such_format(p: Any) -> Any:
    return p.uses("token_embd.weight", "Q9_9") >= 1


def second_of_two(p: Any) -> Any:
    return [p.kept(layers=[0]) >= 2, (sum([]) <= 3, "empty")]


MISTAKES = [
    *(both_ends, two_by_and, two_by_or, condition, condition_on_a_quantity, unequal, unequal_quantities, negated, member),
    *(both_ends_of_bits, equal_bits, empty_python_sum, empty_pulp_sum, no_comparison, nothing, product, quotient, strict, largest),
    *(not_a_number, infinite, infinite_by_the_back_door, not_a_number_by_the_back_door, foreign, of_another_call, random, equal_bytes),
    *(broken, array, strange, two_of_a_name, penalty_of_a_number, penalty_of_a_choice, negative_penalty, upside_down),
    *(no_such_expert, no_such_layer, no_such_domain, no_such_format, second_of_two),
]


@pytest.mark.parametrize("function", MISTAKES, ids=lambda f: f.__name__)
def test_a_function_that_makes_no_rule_is_refused_by_its_name(costs: Costs, function: Callable[[Any], Any]) -> None:
    with pytest.raises(UsageError, match=f"rule '{function.__name__}"):
        apply_rules(costs, [function])


def test_a_mistake_in_one_of_several_rules_names_function_and_rule(costs: Costs) -> None:
    with pytest.raises(UsageError, match="rule 'second_of_two: empty'"):
        apply_rules(costs, [second_of_two])


def test_pulp_is_as_it_was_after_a_rule_even_one_that_failed(costs: Costs) -> None:
    for function in (both_ends, lambda p: p.kept() >= 1):
        with contextlib.suppress(UsageError):
            apply_rules(costs, [function])
        x = pulp.LpProblem("x").add_variable("x", 0, 1)
        assert bool(x <= 1) and bool(x + 1) and (x != 3)
        assert isinstance(0 <= x <= 1, pulp.LpConstraint)


def test_a_comparison_keeps_what_it_compared_when_the_expression_grows_later(costs: Costs) -> None:
    def grows(p: Any) -> Any:
        total = p.kept(layers=[0])
        small = total <= 3
        total += p.kept(layers=[1])
        return small

    assert same(apply_rules(costs, [grows]), apply_rules(costs, [lambda p: p.kept(layers=[0]) <= 3]))


def test_numbers_of_numpy_and_chains_of_sums_are_rules(costs: Costs) -> None:
    def numpy_left(p: Any) -> Any:
        return np.float64(3) >= sum(p.keep(0, e) for e in range(4))

    assert same(apply_rules(costs, [numpy_left]), apply_rules(costs, [lambda p: p.kept(layers=[0]) <= 3]))


# ------------------------------------------------------------------------------------------------------------ soft rules
@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("form", ["stacks", "experts"])
def test_a_soft_rule_is_broken_as_far_as_its_price_is_worth(seed: int, form: str) -> None:
    from strategies import choices, peak_bytes

    costs = random_costs(seed, form, formats=3 if form == "stacks" else 2)
    mine = [u for u, unit in enumerate(costs.units) if unit.layer == 0]
    limit, price = 200, 1e-5 * 10 ** float(np.random.default_rng(seed).uniform(-1, 2))

    def soft(p: Any) -> Any:
        over = p.new_var("over")
        p.penalty(price * over)
        return p.bytes(layers=[0]) - over <= limit

    budget = budget_between(costs, 0.5)
    best = min(
        float(np.dot(costs.domain_weights, nats(costs, p))) + price * max(0, sum(unit_bytes(costs, p, u) for u in mine) - limit)
        for p in choices(costs, free_sets=False)
        if peak_bytes(costs, p) <= budget
    )
    plan = solve_plan(costs, budget, rules=[soft], gap=1e-6)
    over = max(0, sum(unit_bytes(costs, as_choice(costs, plan), u) for u in mine) - limit)
    assert plan.q + price * over == pytest.approx(best, rel=1e-6)
    assert plan.bound <= best * (1 + 1e-9)


def test_a_soft_variable_goes_no_further_than_its_high() -> None:
    costs = random_costs(2, "stacks")
    free = solve_plan(costs, budget_between(costs, 1.0))
    largest = sum(size for name, size in free.sizes.items() if name.startswith("blk.0."))

    def soft(p: Any) -> Any:
        over = p.new_var("over", high=50)
        return p.bytes(layers=[0]) - over <= largest - 51

    plan = solve_plan(costs, budget_between(costs, 1.0), rules=[soft], gap=1e-6)
    hard = solve_plan(costs, budget_between(costs, 1.0), rules=[ByteLimit(layers=[0], at_most=f"{largest - 1}B")], gap=1e-6)
    assert plan.q == pytest.approx(hard.q, rel=2e-6)


# --------------------------------------------------------------------------------------------------------- bad records
BAD: list[Rule] = [
    Pin(tensors=("nothing",), format="Q8_0"),
    Pin(tensors=("experts",), format="Q9_9"),
    Pin(tensors=("experts",)),
    Pin(tensors=("experts",), at_least="Q8_0", at_most="IQ2_S"),
    Keep(experts=(4,)),
    Keep(experts=(-1,)),
    Keep(experts=()),
    Keep(layers=[2]),
    Keep(layers=[]),
    Keep(layers="0-1000000000"),
    Keep(layers="1-0"),
    Keep(layers="0-" + "9" * 5000),
    Keep(layers="zero"),
    Keep(layers=""),
    Drop(experts=(True,)),
    Protect(layers="0", at_least="Q9_9"),
    KeptCount(multiple_of=0),
    KeptCount(at_least=-1),
    KeptCount(at_least=4, at_most=2),
    KeptCount(at_least=5),
    GroupKept(groups=3),
    GroupKept(groups=0),
    GroupKept(groups=2, at_least=3),
    GroupKept(groups=2, at_least=-1),
    DomainKept(domain="poetry", top=1),
    DomainKept(domain="d0"),
    DomainKept(domain="d0", top=-1),
    DomainKept(domain="d0", top=5),
    DomainKept(domain="d0", share=1.5),
    DomainKept(domain="d0", share=float("nan")),
    SameFormat(tensors=("nothing",)),
    MaxFormats(at_most=0),
    MeanBits(),
    MeanBits(at_most=float("nan")),
    MeanBits(at_least=float("inf")),
    ByteLimit(),
    ByteLimit(at_most="12"),
    ByteLimit(at_most="-5GB"),
    ActiveBytes(at_most="fast"),
    Speed(tokens_per_second=0, bandwidth="100GB/s"),
    Speed(tokens_per_second=float("nan"), bandwidth="100GB/s"),
    Speed(tokens_per_second=-5, bandwidth="100GB/s"),
    Speed(tokens_per_second=1e9, bandwidth="1kB/s"),
    Vram(size="1kB"),
]


@pytest.mark.parametrize("rule", BAD, ids=[f"{type(r).__name__}-{i}" for i, r in enumerate(BAD)])
def test_an_impossible_record_is_a_usage_error(costs: Costs, rule: Rule) -> None:
    with pytest.raises(UsageError):
        solve_plan(costs, 10**6, rules=[rule])


@pytest.mark.parametrize(
    "rules",
    [
        [Keep(layers=[0], experts=(1,)), Drop(layers=[0], experts=(1,))],
        [GroupKept(groups=2, at_least=1), GroupKept(groups=4, at_least=1)],
        [Pin(tensors=("token_embd",), format="Q8_0"), Pin(tensors=("token_embd",), format="IQ2_S")],
        [KeptCount(at_most=2), KeptCount(at_least=3)],
        [Vram(size="10kB"), Vram(size="20kB")],
    ],
    ids=["keep-drop", "groups", "pins", "counts", "vram"],
)
def test_two_records_that_exclude_each_other_are_a_usage_error(costs: Costs, rules: list[Rule]) -> None:
    with pytest.raises(UsageError):
        apply_rules(costs, rules)


def test_of_two_rules_on_the_same_groups_the_stricter_holds(single: Costs) -> None:
    rules: list[Rule] = [GroupKept(groups=2, at_least=2), GroupKept(groups=2, at_least=1)]
    plan = solve_plan(single, 10**6, rules=rules)
    assert all(len(kept) == 4 for kept in plan.kept)


@pytest.mark.parametrize("rule", [KeptCount(multiple_of=2), GroupKept(groups=2, equal=True), Vram(size="1GB")])
def test_what_needs_one_kept_count_is_refused_for_single_experts(single: Costs, rule: Rule) -> None:
    with pytest.raises(UsageError):
        apply_rules(single, [rule])


def test_kept_counts_of_single_experts_are_bounded_in_every_layer(single: Costs) -> None:
    plan = solve_plan(single, budget_between(single, 0.9), rules=[KeptCount(at_least=2, at_most=3)])
    assert {len(kept) for kept in plan.kept} <= {2, 3}


def test_a_byte_limit_is_kept_to_the_byte_also_for_terabytes() -> None:
    costs = random_costs(6, "stacks", layers=1)
    size = costs.size * 10**9 + np.arange(costs.size.shape[2])
    costs = random_costs_with(costs, size)
    free = solve_plan(costs, 10**15, rules=[])
    largest = sum(s for name, s in free.sizes.items() if name.startswith("blk"))
    plan = solve_plan(costs, 10**15, rules=[ByteLimit(tensors=("experts",), at_most=f"{largest - 1}B")])
    assert sum(s for name, s in plan.sizes.items() if name.startswith("blk")) < largest


def random_costs_with(costs: Costs, size: np.ndarray) -> Costs:
    from dataclasses import replace

    return replace(costs, size=np.where(np.isfinite(costs.cost), size, 0), extra=np.zeros_like(size), staging=np.zeros_like(size))
