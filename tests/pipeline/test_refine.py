"""Refinement in a world whose true costs are known: other factors for drops and for formats than the prices say."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from command import MODEL
from strategies import budget_between, random_costs
from tiny import flat_plan, flat_stats, make_checkpoint

from edgemoe.base.storage import array_file, save_arrays
from edgemoe.ir import Costs, Model, Plan
from edgemoe.model.checkpoint import read_tensor
from edgemoe.model.describe import resize_experts
from edgemoe.model.inspect import inspect_model
from edgemoe.model.overlay import save_overlay
from edgemoe.pipeline.refine import (
    MEASURE_TOKENS,
    OFF,
    TEXTS,
    UNSEEN,
    Measured,
    Measurer,
    expect,
    fitted_share,
    measuring_windows,
    refine_plan,
    rescale,
)
from edgemoe.plan.solve import solve_plan
from edgemoe.repair.survivors import GUARD_EVERY
from edgemoe.stream.texts import choose_texts
from edgemoe.stream.windows import tokenize
from edgemoe.targets import find_target


def world(costs: Costs, drop: float, formats: float) -> Costs:
    """Costs as they really are."""
    scaled = {"drop_cost": costs.drop_cost * drop, "expert_drop": costs.expert_drop * drop, "drop_curve": costs.drop_curve * drop}
    return replace(costs, cost=costs.cost * formats, **scaled)


def observer(truth: Costs, said: Costs) -> Callable[[Plan], Measured]:
    """Measures a plan in that world: the factor of each part is known, so the plan's own sums at `said` prices tell."""
    drop = float(truth.expert_drop.sum() / said.expert_drop.sum())
    finite = np.isfinite(said.cost) & (said.cost > 0)
    formats = float(truth.cost[finite][0] / said.cost[finite][0])

    def measure(plan: Plan) -> Measured:
        at_said = _parts(said, plan)
        q_drop, q_formats = at_said[0] * drop, at_said[1] * formats
        return Measured(kl=truth.predict_kl(q_drop + q_formats), drop_kl=truth.predict_kl(q_drop) if q_drop else 0.0)

    return measure


def _parts(costs: Costs, plan: Plan) -> tuple[float, float]:
    """Drops and formats of a plan at these prices, added up here."""
    c = costs.counts.index(plan.count)
    formats = sum(float(costs.cost[c, u, costs.formats.index(plan.formats[n.name])]) for u, n in enumerate(costs.units))
    return float(costs.weights @ costs.drop_cost[:, c].sum(axis=1)), formats


@pytest.mark.parametrize(("drop", "formats"), [(3.0, 1.2), (0.3, 1.5), (1.0, 1.0), (1.4, 0.6)])
@pytest.mark.parametrize("seed", range(4))
def test_after_one_round_the_prediction_is_what_is_measured_and_no_plan_got_worse(seed: int, drop: float, formats: float) -> None:
    said = random_costs(seed, "stacks", layers=3, experts=6, formats=4)
    budget, measure = budget_between(said, 0.35), observer(world(said, drop, formats), said)
    first = solve_plan(said, budget)
    refined = refine_plan(said, first, 1, lambda costs: solve_plan(costs, budget), measure)
    found = measure(refined.plan).kl
    assert refined.plan.predicted_kl == pytest.approx(found, rel=1e-6)
    assert found <= measure(first).kl * (1 + 1e-9)
    assert len(refined.rounds) <= 2 and refined.rounds[0].predicted == first.predicted_kl
    assert refined.plan.bound <= refined.plan.q * (1 + 1e-9)


def test_drops_and_formats_get_factors_of_their_own() -> None:
    for seed in range(20):
        said = random_costs(seed, "stacks", layers=3, experts=6, formats=4)
        said = replace(said, kappa=0.0)
        plan = solve_plan(said, budget_between(said, 0.2))
        if 0.2 < plan.drop_q / plan.q < 0.8:
            after = rescale(said, plan, observer(world(said, 2.0, 0.7), said)(plan))
            assert after.drop_cost.sum() / said.drop_cost.sum() == pytest.approx(2.0, rel=1e-6)
            finite = np.isfinite(said.cost) & (said.cost > 0)
            assert after.cost[finite].sum() / said.cost[finite].sum() == pytest.approx(0.7, rel=1e-6)
            return
    raise AssertionError("no seed has a plan with both")


def test_a_plan_that_measures_worse_is_not_taken_though_prices_prefer_it() -> None:
    said = random_costs(1, "stacks", layers=3, experts=6, formats=4)
    budgets = [budget_between(said, share) for share in (0.5, 0.2)]
    good, bad = (solve_plan(said, b) for b in budgets)
    assert (good.kept, good.formats) != (bad.kept, bad.formats)
    worse = {str(bad.formats): Measured(kl=9.0, drop_kl=0.0)}
    refined = refine_plan(
        said, good, 1, lambda costs: solve_plan(costs, budgets[1]), lambda p: worse.get(str(p.formats), Measured(kl=0.5, drop_kl=0.0))
    )
    assert (refined.plan.kept, refined.plan.formats) == (good.kept, good.formats) and not refined.plan.proven
    assert refined.plan.predicted_kl == pytest.approx(0.5, rel=1e-6)


def test_a_kept_plan_is_repriced_with_the_rounding_that_a_dropped_experts_tokens_inherit() -> None:
    said = random_costs(1, "experts", layers=3, experts=6, formats=4)
    budgets = [budget_between(said, share) for share in (0.15, 0.05)]
    good, bad = (solve_plan(said, b) for b in budgets)
    assert (good.kept, good.formats) != (bad.kept, bad.formats) and sum(map(len, good.kept)) < 18
    measured = {str(good.formats): Measured(kl=0.5, drop_kl=0.1)}
    refined = refine_plan(
        said, good, 1, lambda costs: solve_plan(costs, budgets[1]), lambda p: measured.get(str(p.formats), Measured(kl=9.0, drop_kl=0.1))
    )
    assert (refined.plan.kept, refined.plan.formats) == (good.kept, good.formats)
    assert refined.plan.predicted_kl == pytest.approx(0.5, rel=1e-6)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Model:
    folder = tmp_path_factory.mktemp("checkpoint")
    return inspect_model(make_checkpoint(folder / "mixtral", "mixtral", n_experts=4, hidden=128, expert_size=160))


def test_what_was_measured_of_one_rounding_is_not_taken_for_another(checkpoint: Model, tmp_path: Path) -> None:
    asked: list[str] = []
    calibration, _ = choose_texts([], [])
    stats, plan = flat_stats(checkpoint, tmp_path / "stats"), flat_plan(checkpoint, "Q8_0")

    def measure(rounding: str) -> Measured:
        def stored_as(_: Plan, how: str = rounding) -> Model:
            asked.append(how)
            return checkpoint

        settings = {"max_tokens": 2048, "stored_as": stored_as, "rounding": rounding}
        return Measurer(checkpoint, stats, calibration, find_target("gguf"), tmp_path, **settings)(plan)

    for rounding in ("feedback", "stock", "feedback"):
        assert measure(rounding).drop_kl == 0 < measure(rounding).kl
    assert asked == ["feedback", "stock", "stock", "stock"]  # the file, then what is left out alone; each once


def test_narrower_experts_are_measured_among_what_a_plan_leaves_out(checkpoint: Model, tmp_path: Path) -> None:
    for layer in range(checkpoint.n_layers):
        arrays = {
            f"{role}.{e}": np.take(read_tensor(checkpoint.folder, tensor), np.arange(96), axis=int(role == "ffn_down_exps"))
            for (role, e), tensor in checkpoint.of_layer(layer).items()
            if e >= 0
        }
        save_arrays(tmp_path / array_file(layer), arrays)
    narrow = save_overlay(resize_experts(checkpoint, 96), tmp_path, {})
    calibration, _ = choose_texts([], [])
    stats, plan = flat_stats(narrow, tmp_path / "stats"), flat_plan(narrow, "F32")
    settings = {"max_tokens": 2048, "stored_as": lambda _, __="": narrow, "rounding": "stock"}
    seen = Measurer(checkpoint, stats, calibration, find_target("gguf"), tmp_path, **settings)(plan)
    assert seen.drop_kl == pytest.approx(seen.kl, rel=0.01) and seen.kl > 0  # in F32 nothing else is lost


def test_the_measuring_text_goes_on_where_calibration_ends_and_holds_nothing_held_out() -> None:
    model = inspect_model(MODEL)
    calibration, heldout = choose_texts([], [])
    windows, among = measuring_windows(model, calibration, 65_536)
    each = np.bincount(windows.domain)
    assert not among.any() and len(each) == len(calibration) and each.sum() * 512 == MEASURE_TOKENS and (each == each[0]).all()
    for other in (tokenize(model, calibration, 65_536, 512), tokenize(model, heldout, 65_536, 512)):
        assert not {w.tobytes() for w in windows.tokens} & {w.tobytes() for w in other.tokens}


def test_a_text_that_ends_with_calibration_is_measured_on_the_windows_that_no_repair_was_fitted_to() -> None:
    model = inspect_model(MODEL)
    long, short = choose_texts([], [])[0][:2]
    short = replace(short, documents=short.documents[:150])
    every = tokenize(model, (long, short), 32_768, 512)
    windows, among = measuring_windows(model, (long, short), 32_768)
    assert among.tolist() == [False, True]
    mine = every.tokens[every.domain == 1]
    guards = {w.tobytes() for w in mine[GUARD_EVERY // 2 :: GUARD_EVERY]}
    assert {w.tobytes() for w in windows.tokens[windows.domain == 1]} <= guards and len(guards) > 1


def test_a_measurement_counts_less_the_more_it_scatters_and_unseen_text_loses_more_only_where_something_was_fitted() -> None:
    said = random_costs(1, "stacks", layers=3, experts=6, formats=4)
    plan = solve_plan(said, budget_between(said, 0.35))
    half = Measured(kl=plan.predicted_kl / 2, drop_kl=plan.predicted_kl / 8)
    kls = [expect(plan, replace(half, error=error), fitted=0.0).kl for error in (0.0, 0.1, 0.5, 5.0)]
    assert half.kl < kls[0] < kls[1] < kls[2] < kls[3] <= plan.predicted_kl and kls[3] == pytest.approx(plan.predicted_kl, rel=0.01)
    assert expect(plan, half, fitted=1.0).kl / kls[0] == pytest.approx(UNSEEN ** (OFF**2 / (OFF**2 + TEXTS**2)), rel=1e-9)
    assert expect(plan, half, fitted=0.7).drop_kl / expect(plan, half, fitted=0.7).kl == pytest.approx(0.25)  # the shares as measured


def test_what_kernels_round_of_their_inputs_and_the_stock_quantizers_errors_count_as_fitted_to_nothing() -> None:
    said = random_costs(1, "stacks", layers=3, experts=6, formats=4)
    plan = replace(solve_plan(said, budget_between(said, 0.35)), repair=True)
    assert fitted_share(plan, said, "feedback") == pytest.approx(1.0)
    assert fitted_share(plan, said, "stock") == pytest.approx(plan.drop_q / plan.q)
    assert fitted_share(replace(plan, repair=False), said, "stock") == 0
    of_inputs = replace(said, input_cost=np.where(np.isfinite(said.cost), said.cost / 4, 0.0))
    formats = plan.q - plan.drop_q
    assert fitted_share(plan, of_inputs, "feedback") == pytest.approx(1 - formats / 4 / plan.q)
