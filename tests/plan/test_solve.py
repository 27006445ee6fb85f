"""The planner against trying every plan, and what must hold however the numbers look."""

from __future__ import annotations

import dataclasses
import itertools
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from command import ROOT
from hypothesis import example, given, settings
from hypothesis import strategies as st
from strategies import (
    Choice,
    as_choice,
    best_cost,
    budget_between,
    changed,
    choices,
    make_costs,
    objective,
    peak_bytes,
    random_costs,
    random_rules,
)

from edgemoe.base.errors import BudgetError, EdgemoeError, UsageError
from edgemoe.ir import Costs, Plan, Router, Unit
from edgemoe.model.routing.kept_sets import offered_counts
from edgemoe.plan.infeasible import least_budget
from edgemoe.plan.solve import solve_plan
from edgemoe.price.priors import price_drops
from edgemoe.rules import Drop, Keep, MeanBits, Pin, Rule, Vram
from edgemoe.solvers import engine, ilp, search
from edgemoe.solvers.engine import Outcome

GAP = 1e-6
FORMS = ("stacks", "experts")
SEEDS = st.integers(0, 10**6)
SHARES = st.floats(0, 1)


def plan_or_none(costs: Costs, budget: int, rules: list[Rule], **options: Any) -> Plan | None:
    try:
        return solve_plan(costs, budget, rules=rules, **{"gap": GAP, **options})
    except (BudgetError, UsageError):
        return None


def told(plan: Plan, kind: str = "mean") -> float:
    return plan.q if kind == "mean" else max(plan.domain_q.values())


# ------------------------------------------------------------------------------------------------------------ the optimum
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("kind", ["mean", "worst"])
@settings(max_examples=25, deadline=None)
@given(seed=SEEDS, share=SHARES, n_rules=st.integers(0, 3))
def test_a_plan_is_the_best_of_all_that_fit_and_keep_every_rule(form: str, kind: str, seed: int, share: float, n_rules: int) -> None:
    costs = make_costs(seed, form)
    budget, ruled = budget_between(costs, share), random_rules(costs, seed, n_rules)
    plan, best = plan_or_none(costs, budget, [r.rule for r in ruled], objective=kind), best_cost(costs, budget, kind, ruled)
    assert (plan is None) == (best is None)
    if plan is None or best is None:
        return
    choice = as_choice(costs, plan)
    assert all(r.holds(choice) for r in ruled)
    assert plan.memory["peak"] == peak_bytes(costs, choice) <= budget
    assert told(plan, kind) == pytest.approx(objective(costs, choice, kind), rel=1e-9)
    assert told(plan, kind) <= best * (1 + GAP) + 1e-15
    assert plan.bound <= best * (1 + 1e-9)
    assert plan.proven


@pytest.mark.parametrize("form", FORMS)
@settings(max_examples=15, deadline=None)
@given(seed=SEEDS, share=SHARES, n_rules=st.integers(0, 3), kind=st.sampled_from(["mean", "worst"]))
def test_columns_keep_every_rule_find_a_plan_where_there_is_one_and_bound_it(
    form: str, seed: int, share: float, n_rules: int, kind: str
) -> None:
    costs = make_costs(seed, form)
    budget, ruled = budget_between(costs, share), random_rules(costs, seed, n_rules)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(search, "MONOLITH", 0)
        plan = plan_or_none(costs, budget, [r.rule for r in ruled], objective=kind)
    best = best_cost(costs, budget, kind, ruled)
    assert (plan is None) == (best is None)
    if plan is not None and best is not None:
        assert all(r.holds(as_choice(costs, plan)) for r in ruled)
        assert plan.memory["peak"] <= budget
        assert plan.bound <= best * (1 + 1e-9)
        assert best <= told(plan, kind) * (1 + 1e-9)
        assert told(plan, kind) <= best * (1 + plan.gap) + plan.gap * told(plan, kind) + 1e-15


@pytest.mark.skipif(not engine.is_available("cbc"), reason="CBC is not installed")
@settings(max_examples=12, deadline=None)
@example(seed=1, share=0.4375, n_rules=1, form="experts")  # fractions keep the rule, no choice of whole units does
@given(seed=SEEDS, share=SHARES, n_rules=st.integers(0, 2), form=st.sampled_from(FORMS))
def test_highs_and_cbc_agree(seed: int, share: float, n_rules: int, form: str) -> None:
    costs = make_costs(seed, form)
    budget, rules = budget_between(costs, share), [r.rule for r in random_rules(costs, seed, n_rules)]
    first, second = (plan_or_none(costs, budget, rules, solver=s) for s in ("highs", "cbc"))
    assert (first is None) == (second is None)
    if first is not None and second is not None:
        assert first.q == pytest.approx(second.q, rel=2 * GAP)


@settings(max_examples=40, deadline=None)
@given(seed=SEEDS, share=SHARES, form=st.sampled_from(FORMS))
def test_the_relaxation_alone_gives_a_plan_that_fits_and_a_bound_below_the_optimum(seed: int, share: float, form: str) -> None:
    costs = make_costs(seed, form)
    budget = budget_between(costs, share)
    plan, best = plan_or_none(costs, budget, [], solver="lagrange"), best_cost(costs, budget, "mean")
    assert (plan is None) == (best is None)
    if plan is not None and best is not None:
        assert plan.memory["peak"] == peak_bytes(costs, as_choice(costs, plan)) <= budget
        assert plan.bound <= best * (1 + 1e-9)
        assert best <= plan.q * (1 + 1e-9)
        assert not plan.proven or plan.q <= best * (1 + GAP)


# ---------------------------------------------------------------------------------------------------- what must not change
@settings(max_examples=10, deadline=None)
@given(seed=SEEDS, form=st.sampled_from(FORMS))
def test_more_memory_never_costs_more(seed: int, form: str) -> None:
    costs = make_costs(seed, form)
    plans = [plan_or_none(costs, budget_between(costs, share), []) for share in np.linspace(0, 1.1, 7)]
    found = [p.q for p in plans if p is not None]
    assert None not in plans[len(plans) - len(found) :]
    assert all(more <= less * (1 + GAP) for less, more in itertools.pairwise(found))


@settings(max_examples=12, deadline=None)
@given(seed=SEEDS, share=st.floats(0.2, 1), form=st.sampled_from(FORMS))
def test_a_further_rule_never_makes_a_plan_cheaper(seed: int, share: float, form: str) -> None:
    costs = make_costs(seed, form)
    budget, rules = budget_between(costs, share), [r.rule for r in random_rules(costs, seed, 3)]
    plans = [plan_or_none(costs, budget, rules[:n]) for n in range(4)]
    known = [np.inf if p is None else p.q for p in plans]
    assert all(more >= fewer * (1 - GAP) for fewer, more in itertools.pairwise(known))


@settings(max_examples=12, deadline=None)
@given(seed=SEEDS, share=st.floats(0.1, 0.9), form=st.sampled_from(FORMS))
def test_a_rule_that_the_plan_keeps_anyway_costs_nothing(seed: int, share: float, form: str) -> None:
    costs = make_costs(seed, form)
    plan = plan_or_none(costs, budget_between(costs, share), [])
    if plan is None:
        return
    rules: list[Rule] = [Keep(layers=[layer], experts=kept) for layer, kept in enumerate(plan.kept)]
    rules += [Pin(tensors=(name,), format=f) for name, f in plan.formats.items()]
    again = solve_plan(costs, plan.budget, rules=rules, gap=GAP)
    assert again.q == pytest.approx(plan.q, rel=2 * GAP)


@settings(max_examples=12, deadline=None)
@given(seed=SEEDS, share=st.floats(0.1, 0.9), form=st.sampled_from(FORMS))
def test_the_order_of_formats_and_units_does_not_matter(seed: int, share: float, form: str) -> None:
    costs = make_costs(seed, form)
    budget = budget_between(costs, share)
    rng = np.random.default_rng(seed)
    f, u = rng.permutation(len(costs.formats)), rng.permutation(len(costs.units))
    shuffled = changed(
        costs,
        formats=tuple(costs.formats[i] for i in f),
        units=tuple(costs.units[i] for i in u),
        cost=costs.cost[:, u][:, :, f],
        input_cost=costs.input_cost[:, u][:, :, f],
        size=costs.size[:, u][:, :, f],
        extra=costs.extra[:, u][:, :, f],
        staging=costs.staging[:, u][:, :, f],
        factor=costs.factor[:, u],
    )
    plan, other = plan_or_none(costs, budget, []), plan_or_none(shuffled, budget, [])
    assert (plan is None) == (other is None)
    if plan is not None and other is not None:
        assert plan.q == pytest.approx(other.q, rel=2 * GAP)


@settings(max_examples=12, deadline=None)
@given(seed=SEEDS, share=st.floats(0.1, 0.9))
def test_the_order_of_experts_does_not_matter(seed: int, share: float) -> None:
    costs = make_costs(seed, "experts")
    order = np.random.default_rng(seed).permutation(costs.n_experts)
    moved = {int(old): new for new, old in enumerate(order)}
    units = tuple(dataclasses.replace(u, expert=moved[u.expert]) if u.expert >= 0 else u for u in costs.units)
    shuffled = changed(costs, units=units, expert_drop=costs.expert_drop[:, :, order], usage=costs.usage[:, :, order])
    plan, other = (plan_or_none(c, budget_between(costs, share), []) for c in (costs, shuffled))
    assert (plan is None) == (other is None)
    if plan is not None and other is not None:
        assert plan.q == pytest.approx(other.q, rel=2 * GAP)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("scale", [1e-12, 1e-9, 1e-6, 1e-3, 1e3, 1e6])
def test_the_unit_of_costs_does_not_matter(form: str, scale: float) -> None:
    costs = make_costs(11, form)
    names = ("cost", "drop_cost", "expert_drop", "drop_curve")
    scaled = changed(costs, **{n: getattr(costs, n) * scale for n in names})
    budget, rules = budget_between(costs, 0.3), [MeanBits(at_most=6.0)]
    plan, other = solve_plan(costs, budget, rules=rules, gap=GAP), solve_plan(scaled, budget, rules=rules, gap=GAP)
    assert other.q == pytest.approx(plan.q * scale, rel=2 * GAP)
    assert other.proven


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("scale", [10**3, 10**6, 10**9])
def test_the_unit_of_bytes_does_not_matter(form: str, scale: int) -> None:
    costs = changed(make_costs(12, form), staging=np.zeros_like(make_costs(12, form).staging))
    memory = {part: size * scale for part, size in costs.memory.items()}
    scaled = changed(costs, size=costs.size * scale, extra=costs.extra * scale, fixed_size=costs.fixed_size * scale, memory=memory)
    budget = budget_between(costs, 0.3)
    plan, other = solve_plan(costs, budget, gap=GAP), solve_plan(scaled, budget * scale, gap=GAP)
    assert other.q == pytest.approx(plan.q, rel=2 * GAP)
    assert plan_or_none(scaled, least_budget(scaled) or 0, []) is not None


@settings(max_examples=10, deadline=None)
@given(seed=SEEDS, share=st.floats(0.05, 0.9), form=st.sampled_from(FORMS))
def test_a_twin_format_changes_nothing_and_a_worse_one_is_never_chosen(seed: int, share: float, form: str) -> None:
    costs = make_costs(seed, form)
    budget = budget_between(costs, share)
    plan = plan_or_none(costs, budget, [])
    staging = np.concatenate([costs.staging, costs.staging[:, :, :1], costs.staging[:, :, :1]], axis=2)
    more = changed(
        costs,
        formats=(*costs.formats, "TWIN", "WORSE"),
        cost=np.concatenate([costs.cost, costs.cost[:, :, :1], costs.cost[:, :, :1] * 1.1 + 1e-6], axis=2),
        input_cost=np.zeros((*costs.cost.shape[:2], costs.cost.shape[2] + 2)),
        size=np.concatenate([costs.size, costs.size[:, :, :1], np.where(costs.size[:, :, :1] > 0, costs.size[:, :, :1] + 1, 0)], axis=2),
        extra=np.concatenate([costs.extra, costs.extra[:, :, :1], costs.extra[:, :, :1]], axis=2),
        staging=staging,
    )
    other = plan_or_none(more, budget, [])
    assert (plan is None) == (other is None)
    if plan is not None and other is not None:
        assert other.q == pytest.approx(plan.q, rel=2 * GAP)
        assert "WORSE" not in other.formats.values()


def test_plans_are_the_same_bytes_every_time_and_under_another_hash_seed(tmp_path: Path) -> None:
    code = """
import sys
sys.path.insert(0, "tests")
from pathlib import Path
from strategies import budget_between, random_costs
from edgemoe.base.storage import save_record
from edgemoe.plan.solve import solve_plan
from edgemoe.rules import Keep, MaxFormats, MeanBits
for form in ("stacks", "experts"):
    costs = random_costs(5, form)
    rules = [MeanBits(at_most=6.0), Keep(layers=[0], experts=(0, 1)), MaxFormats(at_most=2), lambda p: p.kept(layers=[1]) >= 2]
    save_record(Path(sys.argv[1]) / f"{form}.json", solve_plan(costs, budget_between(costs, 0.6), rules=rules, objective="worst"))
"""
    found = []
    for number, seed in enumerate(("0", "0", "1")):
        folder = tmp_path / str(number)
        folder.mkdir()
        environment = {**os.environ, "PYTHONHASHSEED": seed, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
        subprocess.run([sys.executable, "-c", code, str(folder)], check=True, env=environment, cwd=ROOT)
        found.append([(folder / f"{form}.json").read_bytes() for form in FORMS])
    assert found[0] == found[1] == found[2]


@pytest.mark.parametrize("form", FORMS)
def test_one_expert_one_format_and_one_layer_are_planned_like_any_other(form: str) -> None:
    for options in ({"experts": 1}, {"formats": 1}, {"layers": 1}, {"experts": 1, "formats": 1, "layers": 1, "domains": 1}):
        costs = random_costs(4, form, **options)  # type: ignore[arg-type]
        budget = budget_between(costs, 0.7)
        plan, best = plan_or_none(costs, budget, []), best_cost(costs, budget, "mean")
        assert (None if plan is None else plan.q) == (None if best is None else pytest.approx(best, rel=GAP))


# ----------------------------------------------------------------------------------------------------- solvers that fail
@pytest.mark.parametrize(
    "outcome", [Outcome(solved=False, infeasible=False, bound=-np.inf), Outcome(solved=True, infeasible=False, bound=-np.inf)]
)
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("rules", [[], [MeanBits(at_most=6.0)]])
@pytest.mark.parametrize("monolith", [20_000, 0])
def test_a_solver_that_fails_or_answers_zeros_gives_the_relaxations_plan_or_an_error(
    monkeypatch: pytest.MonkeyPatch, outcome: Outcome, form: str, rules: list[Rule], monolith: int
) -> None:
    from edgemoe.solvers import columns

    def fail(problem: Any, *_: Any, **__: Any) -> Outcome:
        for variable in problem.variables():
            variable.varValue = 0.0
        return outcome

    monkeypatch.setattr(ilp, "run", fail)
    monkeypatch.setattr(columns, "run", fail)
    monkeypatch.setattr(search, "MONOLITH", monolith)
    costs = make_costs(21, form)
    budget = budget_between(costs, 0.4)
    try:
        plan = solve_plan(costs, budget, rules=rules, gap=GAP)
    except EdgemoeError as error:
        assert not isinstance(error, BudgetError)  # it is not proven that nothing fits
        return
    best = best_cost(costs, budget, "mean")
    assert best is not None
    assert plan.memory["peak"] == peak_bytes(costs, as_choice(costs, plan)) <= budget
    assert plan.bound <= best * (1 + 1e-9)
    assert not plan.proven or plan.q <= best * (1 + GAP)


def test_a_time_limit_of_nothing_gives_a_plan_with_its_gap_or_an_error() -> None:
    costs = make_costs(22, "stacks")
    plan = solve_plan(costs, budget_between(costs, 0.4), seconds=1e-9, gap=0.0)
    best = best_cost(costs, plan.budget, "mean")
    assert best is not None
    assert plan.bound <= best * (1 + 1e-9) <= plan.q * (1 + 2e-9)


# -------------------------------------------------------------------------------------------------- near, GPU memory, T8
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("seed", range(4))
def test_a_plan_near_another_is_priced_and_bounded_without_the_nats_of_staying_near(form: str, seed: int) -> None:
    costs = make_costs(seed, form)
    before = solve_plan(costs, budget_between(costs, 0.6), gap=GAP)
    budget = budget_between(costs, 0.5)
    near, best = solve_plan(costs, budget, near=before, gap=GAP), best_cost(costs, budget, "mean")
    assert best is not None
    decisions = len(costs.units) + costs.n_layers * costs.n_experts
    assert near.bound <= best * (1 + 1e-9) <= near.q * (1 + 2e-9)
    assert near.q <= best * (1 + GAP) + decisions * 1e-5 * before.q
    assert solve_plan(costs, before.budget, near=before, gap=GAP).formats == before.formats


@pytest.mark.parametrize("seed", range(6))
def test_two_memories_are_filled_as_well_as_by_trying_every_split(seed: int) -> None:
    costs = make_costs(seed, "stacks")
    stack = [u for u, unit in enumerate(costs.units) if unit.is_stack]
    rng = np.random.default_rng(seed)
    embedding = next(u for u, unit in enumerate(costs.units) if unit.role == "token_embd")  # tied: the GPU holds it as well
    vram = int(rng.uniform(0.1, 0.6) * costs.size[-1, stack].max(axis=1).sum()) + int(costs.size[-1, embedding].min()) + 1
    budget = budget_between(costs, 0.15) - 800
    rule = Vram(size=f"{vram + 800 + 1}B", reserve="1B")  # the cache (500) and the buffers (300) are there too
    best = np.inf
    for p in choices(costs, free_sets=False):
        for gpu in itertools.product([False, True], repeat=len(stack)):
            on_gpu = {u for u, yes in zip(stack, gpu, strict=True) if yes}
            cpu = Choice(p.c, p.kept, tuple(-1 if u in on_gpu else f for u, f in enumerate(p.formats)))
            used = sum(int(costs.size[p.c, u, p.formats[u]]) for u in (*on_gpu, embedding))
            if used <= vram and peak_bytes(costs, cpu) - 800 <= budget:
                best = min(best, objective(costs, p, "mean"))
    plan = plan_or_none(costs, budget, [rule])
    assert (np.inf if plan is None else plan.q) == pytest.approx(best, rel=GAP)


DROPS = [[0.9, 0.05, 0.02, 1.2], [0.3, 0.6, 0.04, 0.5]]
AT_BITS = {2: [[0.08, 0.02, 0.01, 0.2], [0.05, 0.09, 0.03, 0.06]], 4: [[0.005, 0.001, 0.001, 0.01], [0.004, 0.006, 0.002, 0.003]]}


def golden_costs() -> Costs:
    """Two layers of four experts that are dropped or take 2 or 4 bytes; nothing else needs memory.  A drop costs DROPS in all."""
    units = [Unit(name=f"{layer}.{e}", role="ffn_exps", layer=layer, expert=e, n_weights=8) for layer in range(2) for e in range(4)]
    units.append(Unit(name="rest", role="output", layer=-1, n_weights=8))
    cost = np.array([[AT_BITS[b][u.layer][u.expert] if u.expert >= 0 else 0.0 for b in (2, 4)] for u in units])[None]
    size = np.tile(np.array([2, 4]), (1, len(units), 1))
    size[0, -1] = 1
    costs = dataclasses.replace(
        random_costs(0, "experts", domains=1),
        formats=("two", "four"),
        units=tuple(units),
        memory=dict.fromkeys(("context", "runtime", "kv", "compute", "output"), 0),
        cost=cost,
        input_cost=np.zeros(cost.shape),
        size=size,
        extra=np.zeros_like(size),
        staging=np.zeros_like(size),
        fixed_size=np.zeros(1, np.int64),
        factor=np.ones((1, len(units))),
        expert_drop=np.array(DROPS)[None],
        drop_curve=np.zeros((2, 5)),
        top_k=2,
    )
    return dataclasses.replace(costs, expert_drop=costs.expert_drop - costs.inherited)


@pytest.mark.parametrize(("budget", "expected"), [(12, 0.400), (16, 0.241), (20, 0.138)])
def test_golden_plan_with_free_kept_counts(budget: int, expected: float) -> None:
    """Two drops of a layer at most; optimal values by enumeration elsewhere."""
    assert solve_plan(golden_costs(), budget + 1, gap=GAP).q == pytest.approx(expected, abs=5e-4)


@pytest.mark.parametrize(("budget", "expected"), [(12, 0.560), (16, 0.286), (20, 0.154)])
def test_golden_plan_with_equal_kept_counts(budget: int, expected: float) -> None:
    def equal(p: Any) -> Any:
        return p.kept(layers=[0]) == p.kept(layers=[1])

    assert solve_plan(golden_costs(), budget + 1, rules=[equal], gap=GAP).q == pytest.approx(expected, abs=5e-4)


GROUPED = Router(top_k=2, groups=4, top_groups=2)


def grouped_costs() -> Costs:
    """A layer of twelve experts in four routing groups of three; 1, 3 and 4, of two groups, are the cheapest to drop."""
    costs = dataclasses.replace(random_costs(5, "stacks", layers=1, experts=12, domains=1), top_k=2, n_groups=4)
    picked = [costs.counts.index(n) for n in offered_counts(12, GROUPED)]
    drop = np.full((1, 1, 12), 1.0) + 0.01 * np.arange(12)
    drop[0, 0, [1, 3, 4]] = 1e-6
    by_count = {name: getattr(costs, name)[picked] for name in ("kept", "cost", "input_cost", "size", "extra", "staging", "fixed_size")}
    return dataclasses.replace(
        costs, counts=offered_counts(12, GROUPED), expert_drop=drop, drop_cost=costs.drop_cost[:, picked], **by_count
    )


def test_of_a_grouped_router_as_many_of_each_group_stay() -> None:
    costs = grouped_costs()
    assert costs.counts == (8, 12) and offered_counts(8, GROUPED) == (8,)  # a group's value is its two best: pairs lose none
    plan = solve_plan(costs, 10**6, rules=[Drop(experts=(1,))], gap=GAP)  # a pin, so that sets are chosen anew
    assert plan.count == 8 and np.bincount(np.array(plan.kept[0]) // 3, minlength=4).tolist() == [2, 2, 2, 2]
    assert sorted(set(range(12)) - set(plan.kept[0])) == [1, 3, 6, 9]  # 3 and 4 share a group: 4 stays, though it is cheap to drop
    share = np.random.default_rng(0).dirichlet(np.ones(12), (1, 3))
    menu = price_drops(("d",), np.ones(1), share, np.full(3, 1 / 3), costs.counts, 4)["kept"]
    assert (menu.reshape(2, 3, 4, 3).sum(axis=3) == np.array([2, 3])[:, None, None]).all()


def test_drops_that_would_leave_the_groups_of_a_router_unequal_are_refused() -> None:
    with pytest.raises(BudgetError):
        solve_plan(grouped_costs(), 10**6, rules=[Drop(experts=(3, 4))])
