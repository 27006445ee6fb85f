"""Presets: what each may decide, beside every choice there is; the command line; prices and options that they refuse."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from command import error_of
from hypothesis import given, settings
from hypothesis import strategies as st
from strategies import Choice, as_choice, budget_between, choices, least_peak, objective, peak_bytes, random_costs, smallest_format

from edgemoe.base.errors import BudgetError, UsageError
from edgemoe.base.storage import array_file, load_record, save_arrays, save_record
from edgemoe.ir import Costs, Domain, Plan, Stats
from edgemoe.plan.infeasible import least_budget
from edgemoe.plan.pmq import allocate_bits
from edgemoe.plan.presets import PMQ_WIDTHS, PRESETS, Settings, plan_preset
from edgemoe.plan.solve import solve_plan

EXACT = Settings(gap=1e-9)
Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Run:
    """Run the command line in this process: exit status, stdout and stderr."""
    from edgemoe.cli.main import main

    def call(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["edgemoe", *map(str, arguments)])
        capsys.readouterr()
        with pytest.raises(SystemExit) as stop:
            main()
        shown = capsys.readouterr()
        return int(stop.value.code or 0), shown.out, shown.err

    return call


def bits_of(name: str) -> int:
    return int(name.removeprefix("INT").split("_")[0])


# ------------------------------------------------------------------------------------------------- beside every choice there is
def keeps_all(costs: Costs, choice: Choice) -> bool:
    return all(len(kept) == costs.n_experts for kept in choice.kept)


def has_eight_bits(costs: Costs, choice: Choice) -> bool:
    """Every unit is Q8_0 or, where that is not offered, in its largest format."""
    for u, f in enumerate(choice.formats):
        offered = [n for n in range(len(costs.formats)) if np.isfinite(costs.cost[-1, u, n])]
        eight = costs.formats.index("Q8_0")
        if f not in (-1, eight if eight in offered else max(offered, key=lambda n: int(costs.size[-1, u, n]))):
            return False
    return True


@pytest.mark.parametrize(("name", "may"), [("types-only", keeps_all), ("drops-only", has_eight_bits)])
@pytest.mark.parametrize("form", ["stacks", "experts"])
@settings(max_examples=12, deadline=None)
@given(seed=st.integers(0, 10**6), share=st.floats(0, 0.9))
def test_a_preset_finds_the_best_of_all_plans_that_it_may_make(
    name: str, may: Callable[[Costs, Choice], bool], form: str, seed: int, share: float
) -> None:
    costs = random_costs(seed, form, experts=3, formats=3)
    budget = budget_between(costs, share)
    possible = [p for p in choices(costs, free_sets=False) if may(costs, p)]
    best = min((objective(costs, p, "mean") for p in possible if peak_bytes(costs, p) <= budget), default=None)
    if best is None:
        with pytest.raises(BudgetError, match=f"{min(peak_bytes(costs, p) for p in possible)} bytes"):
            plan_preset(name, costs, budget, EXACT)
        return
    plan = plan_preset(name, costs, budget, EXACT)
    assert plan.q == pytest.approx(best, rel=1e-6, abs=1e-12)
    assert may(costs, as_choice(costs, plan)) and plan.memory["peak"] == peak_bytes(costs, as_choice(costs, plan)) <= budget
    assert (plan.solver, plan.proven, plan.bound, plan.rules, plan.counts) == (name, False, 0.0, (), ())


def equal_experts(seed: int) -> Costs:
    """Two layers of three experts that are equally large in each of two formats, all offered."""
    costs = replace(random_costs(seed, "experts", experts=3, formats=2), staging=np.zeros((1, 7, 2), np.int64))
    size = np.random.default_rng(seed).integers(20, 60, costs.size.shape)
    size[:, :3], size[:, 3:6] = size[:, :1], size[:, 3:4]
    return replace(costs, cost=np.where(np.isfinite(costs.cost), costs.cost, 1.0), size=size, extra=size // 8)


def test_layer_uniform_is_the_best_of_its_kind() -> None:
    """Every plan of two layers, three experts and two formats, added up in plain Python."""
    for seed in range(12):
        costs = equal_experts(seed)
        beside = sum(size for part, size in costs.memory.items() if part != "context") + int(costs.fixed_size[0])
        budget = beside + 200
        best = np.inf
        for number in range((2 * 8) ** 2 * 2):
            rest, other = number % (8 * 2), number // (8 * 2)
            masks, f = [rest % 8, other % 8], [rest // 8, other // 8 % 2, other // 16 % 2]
            if 0 in masks:
                continue
            q, held = 0.0, beside
            for u, unit in enumerate(costs.units):
                at = f[unit.layer] if unit.expert >= 0 else f[2]
                if unit.expert >= 0 and not masks[unit.layer] >> unit.expert & 1:
                    q += float(costs.weights @ costs.expert_drop[:, unit.layer, unit.expert])
                    q += float(costs.weights @ costs.factor[:, u]) * float(costs.cost[0, u, smallest_format(costs, u)])
                    continue
                q += float(costs.weights @ costs.factor[:, u]) * float(costs.cost[0, u, at])
                held += int(costs.size[0, u, at] + costs.extra[0, u, at])
            q += sum(float(costs.drop_curve[layer, 3 - masks[layer].bit_count()]) for layer in range(2))
            if held <= budget:
                best = min(best, q)
        assert plan_preset("layer-uniform", costs, budget, EXACT).q == pytest.approx(best, rel=1e-6)


def test_layer_uniform_names_the_least_bytes_and_keeps_routing_groups_whole() -> None:
    costs = equal_experts(3)
    with pytest.raises(BudgetError) as told:
        plan_preset("layer-uniform", costs, 100)
    least = int(str(told.value).rpartition("(")[2].split()[0])
    assert least == least_peak(costs) and plan_preset("layer-uniform", costs, least).memory["peak"] == least
    with pytest.raises(BudgetError):
        plan_preset("layer-uniform", costs, least - 1)
    grouped = plan_preset("layer-uniform", replace(costs, n_groups=3), least + 10_000)
    assert grouped.kept == ((0, 1, 2),) * 2


# --------------------------------------------------------------------------------------------------------------------- PMQ
def widths_and_stats(seed: int, folder: Path) -> tuple[Costs, Stats]:
    """Prices of two layers with six experts in 4, 3 and 2 bits, all offered; what calibration saw of these experts."""
    costs = random_costs(seed, "experts", experts=6)
    size = np.where(costs.size == 0, costs.size.max(axis=2, keepdims=True), costs.size)
    whole = replace(
        costs,
        formats=("INT4_32", "INT3_32", "INT2_32"),
        cost=np.where(np.isfinite(costs.cost), costs.cost, 1e-4),
        size=-np.sort(-size, axis=2),
        extra=np.zeros_like(size),
    )
    rng = np.random.default_rng(seed)
    folder.mkdir()
    for layer in whole.expert_layers:
        save_arrays(folder / array_file(layer), {"count": rng.integers(1, 99, (2, 6)).astype(float), "gate": rng.uniform(1, 9, (2, 6))})
    domains = tuple(Domain(name=f"d{i}", weight=0.5, tokens=99, sha256="") for i in range(2))
    stats = Stats(folder=str(folder), model=whole.model, key="k", settings={}, domains=domains, probes=(), cold=())
    save_record(folder / "stats.json", stats)
    return whole, stats


@pytest.mark.parametrize("seed", range(4))
def test_pmq_takes_the_most_bits_that_fit(seed: int, tmp_path: Path) -> None:
    """Every number of bits is tried, from the most down, with the program of pmq.py for each layer."""
    costs, stats = widths_and_stats(seed, tmp_path / "stats")
    beside = sum(size for part, size in costs.memory.items() if part != "context") + int(costs.fixed_size[0])
    errors = np.sqrt(costs.cost[0, :12].reshape(2, 6, 3)[:, :, ::-1])  # 2, 3, 4 bits
    options = []
    for total in range(2 * 6 + 3, 4 * 6):
        names = []
        for layer in range(2):
            arrays = stats.arrays(layer)
            bits, _ = allocate_bits(arrays["count"].sum(axis=0), arrays["gate"].sum(axis=0), errors[layer], total, bits=PMQ_WIDTHS)
            names += [f"INT{b}_32" for b in bits]
        names.append("INT4_32")  # everything else
        options.append((names, beside + sum(int(costs.size[0, u, costs.formats.index(n)]) for u, n in enumerate(names))))
    for budget in sorted({size + more for _, size in options for more in (0, 1)}):
        plan = plan_preset("pmq", costs, budget, Settings(stats=stats))
        expected = next(names for names, size in reversed(options) if size <= budget)
        assert [plan.formats[unit.name] for unit in costs.units] == expected
        assert plan.kept == (tuple(range(6)),) * 2 and (plan.solver, plan.proven) == ("pmq", False)
    with pytest.raises(BudgetError, match=f"{min(size for _, size in options)} bytes"):
        plan_preset("pmq", costs, min(size for _, size in options) - 1, Settings(stats=stats))


# ------------------------------------------------------------------------------------------------------------- a trained model
def bare(costs: Costs) -> Costs:
    """Prices whose budget is the file's."""
    nothing = np.zeros_like(costs.extra)
    return replace(costs, extra=nothing, staging=nothing, memory={**dict.fromkeys(costs.memory, 0), "context": costs.memory["context"]})


def test_pmq_keeps_every_expert_its_widths_and_the_budget(onnx_costs: Costs, shipped_stats: Stats) -> None:
    costs, given = bare(onnx_costs), Settings(stats=shipped_stats)
    sizes: list[int] = []
    for budget in (4_000_000, 4_400_000, 4_800_000, 5_200_000):
        try:
            plan = plan_preset("pmq", costs, budget, given)
        except BudgetError:
            continue
        sizes.append(plan.file_size)
        assert plan.file_size <= budget and plan.kept == (tuple(range(costs.n_experts)),) * costs.n_layers
        by_layer = [[plan.formats[f"blk.{layer}.ffn_exps.{e}"] for e in range(costs.n_experts)] for layer in range(costs.n_layers)]
        assert {bits_of(f) for row in by_layer for f in row} <= set(PMQ_WIDTHS)
        assert len({sum(map(bits_of, row)) for row in by_layer}) == 1  # as many bits for each layer
        assert all({3, 4} <= set(map(bits_of, row)) for row in by_layer)
        others = {f for name, f in plan.formats.items() if "exps" not in name}
        assert len(others) == 1 and bits_of(*others) in (4, 8)
        assert solve_plan(costs, plan.file_size).q <= plan.q * (1 + 1e-9)
    assert len(sizes) > 1 and sizes == sorted(sizes)
    with pytest.raises(BudgetError, match="pmq"):
        plan_preset("pmq", costs, 100_000, given)


@pytest.mark.parametrize("share", [0.1, 0.3, 0.6])
def test_layer_uniform_plans_store_the_experts_of_a_layer_alike(onnx_costs: Costs, share: float) -> None:
    prices = bare(onnx_costs)
    budget = (least_budget(prices) or 0) + int(share * sum(int(prices.size[0, u].max()) for u in range(len(prices.units))))
    plan, free = plan_preset("layer-uniform", prices, budget), solve_plan(prices, budget)
    assert plan.file_size <= budget
    for layer in range(prices.n_layers):
        assert len({f for name, f in plan.formats.items() if name.startswith(f"blk.{layer}.ffn_exps.")}) == 1
    assert free.bound <= plan.q * (1 + 1e-9)


def largest_process(costs: Costs) -> int:
    """Bytes that hold everything at its largest."""
    beside = sum(size for part, size in costs.memory.items() if part != "context")
    return beside + int(costs.fixed_size[-1] + (costs.size + costs.extra)[-1].max(axis=1).sum() + costs.staging.max())


@pytest.mark.parametrize("target", ["gguf", "onnx"])
def test_every_preset_on_the_command_line_costs_no_less_than_our_plan_in_the_same_bytes(
    target: str, gguf_costs: Costs, onnx_costs: Costs, shipped_stats: Stats, run: Run, tmp_path: Path
) -> None:
    costs = gguf_costs if target == "gguf" else onnx_costs
    save_record(tmp_path / "costs.json", costs)
    budget = (largest_process(costs) + 2 * (least_budget(costs) or 0)) // 3
    common = ("plan", tmp_path / "costs.json", "--memory", f"{budget}B")
    assert run(*common, "-o", tmp_path / "ours.json")[0] == 0
    ours = load_record(tmp_path / "ours.json", Plan)
    for name in PRESETS if target == "onnx" else ("types-only", "drops-only"):
        more = ("--stats", shipped_stats.folder) if name == "pmq" else ()
        status, shown, errors = run(*common, "--preset", name, *more, "-o", tmp_path / f"{name}.json")
        assert status == 0, errors
        assert f"nothing is proven of a plan that {name} made" in " ".join(shown.split())
        plan = load_record(tmp_path / f"{name}.json", Plan)
        assert (plan.solver, plan.proven, plan.budget, plan.costs) == (name, False, budget, ours.costs)
        assert plan.memory["peak"] <= budget and plan.q >= ours.bound * (1 - 1e-9)
        if name == "drops-only":
            assert set(plan.formats.values()) <= ({"Q8_0", "F16"} if target == "gguf" else {"INT8_32", "INT8_64", "INT8_128"})


# ------------------------------------------------------------------------------------------------------------ command line
@pytest.mark.parametrize("name", [*PRESETS])
def test_small_price_lists_are_planned_on_the_command_line(name: str, run: Run, tmp_path: Path) -> None:
    costs, stats = widths_and_stats(2, tmp_path / "stats")
    costs = costs if name == "pmq" else equal_experts(2) if name == "layer-uniform" else random_costs(2, "experts", experts=3)
    save_record(tmp_path / "costs.json", costs)
    more = ("--stats", stats.folder) if name == "pmq" else ()
    status, shown, errors = run("plan", tmp_path / "costs.json", "--memory", "1MB", "--preset", name, *more, "--json")
    assert status == 0, errors
    plan = json.loads(shown)
    assert (plan["solver"], plan["proven"], plan["rules"]) == (name, False, [])


@pytest.mark.parametrize(
    ("form", "arguments", "words"),
    [
        ("experts", ("--preset", "best"), ("'best' is not known", "pmq, layer-uniform, types-only, drops-only")),
        ("stacks", ("--preset", "layer-uniform"), ("layer-uniform", "experts form", "--target onnx")),
        ("stacks", ("--preset", "pmq"), ("pmq", "experts form", "--target onnx")),
        ("experts", ("--preset", "pmq"), ("routing weights", "--stats")),
        ("experts", ("--preset", "pmq", "--stats", "STATS"), ("no format of 2 bits", "--target onnx")),
        ("experts", ("--preset", "pmq", "--stats", "OTHERS"), ("another checkpoint",)),
        ("experts", ("--preset", "pmq", "--stats", "IMPORTED"), ("holds no routing weights",)),
        ("experts", ("--preset", "types-only", "--stats", "STATS"), ("--stats",)),
        ("experts", ("--stats", "STATS"), ("--preset pmq",)),
        ("experts", ("--preset", "pmq", "--time-limit", "1"), ("--time-limit",)),
        ("experts", ("--preset", "pmq", "--generic", "glm-5.2"), ("--generic",)),
        ("experts", ("--preset", "types-only", "--rule", "kept() >= 2", "--explain"), ("--rule, --explain",)),
        ("experts", ("--preset", "types-only", "--recipe", "recipe.yaml", "--near", "plan.json"), ("--recipe, --near",)),
        ("experts", ("--preset", "types-only", "--sweep", "1MB:2MB:1MB"), ("--sweep",)),
        ("experts", ("--preset", "types-only", "--objective", "worst", "--solver", "cbc"), ("--objective, --solver",)),
        ("experts", ("--preset", "types-only", "--why", "0:1"), ("--why",)),
    ],
)
def test_what_a_preset_cannot_do_is_told_in_one_line(
    form: str, arguments: tuple[str, ...], words: tuple[str, ...], run: Run, tmp_path: Path
) -> None:
    _, stats = widths_and_stats(2, tmp_path / "STATS")
    (tmp_path / "OTHERS").mkdir()
    save_record(tmp_path / "OTHERS" / "stats.json", replace(stats, model="another"))
    (tmp_path / "IMPORTED").mkdir()
    save_record(tmp_path / "IMPORTED" / "stats.json", stats)
    for layer in range(2):
        save_arrays(tmp_path / "IMPORTED" / array_file(layer), {"count": np.ones((1, 6))})
    save_record(tmp_path / "costs.json", random_costs(2, form))
    given = [tmp_path / word if word.isupper() else word for word in arguments]
    status, shown, errors = run("plan", tmp_path / "costs.json", "--memory", "1MB", *given)
    assert status == 2 and shown == "" and error_of(errors)
    assert all(word in errors for word in words), errors


def test_a_budget_that_is_too_small_is_told_with_the_least(run: Run, tmp_path: Path) -> None:
    save_record(tmp_path / "costs.json", equal_experts(2))
    for name in ("types-only", "layer-uniform"):
        status, _, errors = run("plan", tmp_path / "costs.json", "--memory", "100B", "--preset", name)
        assert status == 3 and f"no plan of the preset {name} fits" in error_of(errors) and "--memory" in errors and "rules" not in errors


def test_a_list_without_8_bits_has_no_plan_of_drops_only() -> None:
    with pytest.raises(UsageError, match="8 bits"):
        plan_preset("drops-only", random_costs(0, "stacks", formats=2), 10**6)


def test_help_says_what_every_preset_decides(run: Run) -> None:
    status, shown, _ = run("plan", "--help")
    assert status == 0 and all(f"{name}:" in " ".join(shown.split()) for name in PRESETS)
