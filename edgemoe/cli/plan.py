"""`edgemoe plan`: one budget or many, with rules; why a plan is so; what changed; files for other tools."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from edgemoe.base.errors import UsageError
from edgemoe.cli.devices import choose_budget
from edgemoe.cli.options import (
    DEFAULT_SECONDS,
    ContextOpt,
    DeviceOpt,
    DtypeOpt,
    ForceOpt,
    GapOpt,
    JsonOpt,
    KvBitsOpt,
    KvSizeOpt,
    MemoryOpt,
    ObjectiveOpt,
    PresetOpt,
    RecipeOpt,
    RoundingOpt,
    RuleOpt,
    SolverOpt,
    StatsOpt,
    TargetOpt,
    TimeOpt,
    settled_target,
)
from edgemoe.cli.progress import print_rich, say, show_progress

if TYPE_CHECKING:
    from edgemoe.ir import Costs, Plan
    from edgemoe.rules import Rule
    from edgemoe.targets import Target

DEFAULT_GAP = 1e-4  # of plan/solve.py, which --help does not import
PRESET_ITSELF = {"--recipe", "--rule", "--objective", "--solver", "--near", "--explain", "--why", "--sweep"}  # says a preset itself
SWEEP_ITSELF = {"--memory", "--device", "--time-limit", "--near", "--explain", "--why", "--export"}  # have no meaning for many budgets


CostsArg = Annotated[Path | None, typer.Argument(metavar="COSTS", help="File that price made.")]
PlanOutOpt = Annotated[
    Path | None, typer.Option("-o", "--output", metavar="OUT", help="Write the plan here; with --sweep: a folder for table and page.")
]
NoRepairOpt = Annotated[
    bool, typer.Option("--no-repair", help="Price drops as they are without the survivors' repair, which emit then leaves out.")
]
NearOpt = Annotated[Path | None, typer.Option("--near", metavar="PLAN", help="Change as little of this plan as costs (nearly) nothing.")]
GenericOpt = Annotated[
    str | None,
    typer.Option(
        "--generic", metavar="NAME|CONFIG", help="Plan a model that nobody measured: a known shape (deepseek-v3 ...) or a config.json."
    ),
]
ExplainOpt = Annotated[bool, typer.Option("--explain", help="Say what each rule costs and what more memory buys (solves again).")]
WhyOpt = Annotated[
    list[str] | None,
    typer.Option("--why", metavar="TENSOR|LAYER:EXPERT", help="Say why a tensor has its format, or an expert went; repeatable."),
]
SweepOpt = Annotated[str | None, typer.Option("--sweep", metavar="LOW:HIGH:STEP", help="Plans for many budgets, e.g. 64GB:192GB:8GB.")]
DiffOpt = Annotated[tuple[Path, Path] | None, typer.Option("--diff", metavar="A B", help="Say what changed between two plans.")]
ExportOpt = Annotated[
    Path | None, typer.Option("--export", metavar="DIR", help="Write a keep list and a --tensor-type-file for llama-quantize.")
]


def plan(
    costs: CostsArg = None,
    memory: MemoryOpt = None,
    device: DeviceOpt = None,
    output: PlanOutOpt = None,
    recipe: RecipeOpt = None,
    rule: RuleOpt = None,
    objective: ObjectiveOpt = None,
    solver: SolverOpt = "highs",
    gap: GapOpt = DEFAULT_GAP,
    time_limit: TimeOpt = DEFAULT_SECONDS,
    no_repair: NoRepairOpt = False,
    rounding: RoundingOpt = "feedback",
    near: NearOpt = None,
    preset: PresetOpt = None,
    stats: StatsOpt = None,
    generic: GenericOpt = None,
    context: ContextOpt = None,
    target: TargetOpt = "gguf",
    dtype: DtypeOpt = None,
    kv_bits: KvBitsOpt = None,
    max_kv_size: KvSizeOpt = None,
    explain: ExplainOpt = False,
    why: WhyOpt = None,
    sweep: SweepOpt = None,
    diff: DiffOpt = None,
    export: ExportOpt = None,
    force: ForceOpt = False,
    as_json: JsonOpt = False,
) -> None:
    """Solve for the best plan within a budget: which experts stay, and the format of every tensor.

    Rules come from a recipe (--recipe) or one by one (--rule).  --sweep solves for many budgets and shows them on a page with a slider.
    --preset decides as another method does, from the same prices and for the same bytes, so that the two plans can be compared.
    """
    if diff is not None:
        _print_lines(_diff(*diff), as_json=as_json)
        return
    asked: dict[str, object] = {"--recipe": recipe, "--rule": rule, "--objective": objective, "--solver": solver != "highs"}
    asked |= {"--near": near, "--explain": explain, "--why": why, "--sweep": sweep, "--time-limit": time_limit != DEFAULT_SECONDS}
    asked |= {"--stats": stats, "--gap": gap != DEFAULT_GAP, "--generic": generic, "--memory": memory, "--device": device}
    asked |= {"--export": export}
    _check_together(preset, [option for option, value in asked.items() if value])
    rules, aim = read_rules(recipe, rule, objective)
    budget, box = (0, None) if sweep is not None else choose_budget(memory, device)
    named = settled_target(target, dtype, kv_bits, max_kv_size)
    prices, origin = _open_costs(costs, generic, context, named, repair=not no_repair, rounding=rounding)
    if box is not None:
        prices = _find_target(prices.target).on_device(prices, box)
    _check_outputs(prices, output, export, folder=sweep is not None, force=force)
    if sweep is not None:
        _sweep(prices, sweep, rules, aim, solver, gap, origin, output, as_json=as_json)
        return
    if preset is not None:
        solved = _plan_preset(preset, prices, budget, stats, gap, time_limit, origin)
    else:
        solved = _solve(prices, budget, rules, aim, solver, gap, time_limit, near, origin)
    _save(solved, output, export)
    _show(prices, solved, rules, why or [], gap if explain else None, as_json=as_json)


def _check_together(preset: str | None, given: list[str]) -> None:
    """Refuse options that have no meaning beside each other, and a preset that is not known.

    Raises:
        UsageError: names the options, or the presets that there are.
    """
    if preset is None:
        if "--stats" in given:
            raise UsageError("--stats goes with --preset pmq", hint="every other plan takes all that it needs from COSTS")
        wrong = [option for option in given if option in SWEEP_ITSELF]
        if "--sweep" in given and wrong:
            raise UsageError(f"--sweep names the budgets and solves for each; leave {', '.join(wrong)} out")
        return
    from edgemoe.plan.presets import find_preset

    find_preset(preset)
    excluded = PRESET_ITSELF | ({"--time-limit", "--gap", "--generic"} if preset == "pmq" else {"--stats"})
    wrong = [option for option in given if option in excluded]
    if wrong:
        hint = "a preset says itself what is decided, and nothing is proven of its plan; rules and reasons are for plans without --preset"
        raise UsageError(f"--preset {preset} does not go with {', '.join(wrong)}", hint=hint)


def _find_target(name: str) -> Target:
    from edgemoe.targets import find_target

    return find_target(name)


def _solve(
    costs: Costs, budget: int, rules: tuple[Rule, ...], aim: str, solver: str, gap: float, limit: float, near: Path | None, key: str
) -> Plan:
    from edgemoe.base.storage import load_record
    from edgemoe.ir import Plan
    from edgemoe.plan.solve import solve_plan

    before = load_record(near, Plan) if near else None
    with show_progress() as progress:
        plan = solve_plan(costs, budget, rules=rules, objective=aim, solver=solver, gap=gap, seconds=limit, near=before, watch=progress.gap)
    return replace(plan, costs=key)


def _save(solved: Plan, output: Path | None, export: Path | None) -> None:
    from edgemoe.base.storage import save_record
    from edgemoe.targets.gguf.export import export_plan

    if output:
        save_record(output, solved)
    if export:
        export_plan(solved, export)


def _plan_preset(name: str, costs: Costs, budget: int, folder: Path | None, gap: float, seconds: float, costs_hash: str) -> Plan:
    from edgemoe.base.storage import load_record
    from edgemoe.ir import Stats
    from edgemoe.plan.presets import Settings, plan_preset

    stats = replace(load_record(folder / "stats.json", Stats), folder=str(folder)) if folder else None
    return plan_preset(name, costs, budget, Settings(stats=stats, gap=gap, seconds=seconds), costs_hash=costs_hash)


def _check_outputs(costs: Costs, output: Path | None, export: Path | None, *, folder: bool, force: bool) -> None:
    """Refuse what cannot be written before anything is solved.

    Raises:
        UsageError: a file where a folder must be, no folder to write into, or a file that would be replaced.
    """
    from edgemoe.base.ownership import check_replaceable
    from edgemoe.plan.sweep import FILES as SWEEP_FILES
    from edgemoe.targets.gguf.export import FILES as EXPORT_FILES

    for path in filter(None, (export, output if folder else None)):
        if path.exists() and not path.is_dir():
            raise UsageError(f"{path}: is a file, not a folder", hint="choose another folder")
    if output is not None and not folder and (output.is_dir() or not output.resolve().parent.is_dir()):
        raise UsageError(f"{output}: {'is a folder' if output.is_dir() else 'its folder does not exist'}", hint="choose another -o")
    if output is not None and not folder:
        check_replaceable([output], force=force, record="Plan")
    elif output is not None:
        check_replaceable([output / name for name in SWEEP_FILES], force=force)
    if export is not None:
        check_replaceable([export / name for name in EXPORT_FILES], force=force)
    if export and costs.drawn:
        hint = "calibrate and price the model, or price its importance matrix (`edgemoe price --imatrix`)"
        raise UsageError("--export lists experts to keep, and these prices say only how many", hint=hint)
    if export and costs.form != "stacks":
        raise UsageError("--export writes files for llama-quantize, which cannot store experts one by one", hint="use prices for gguf")


def _open_costs(
    path: Path | None, generic: str | None, context: int | None, target: str, *, repair: bool, rounding: str
) -> tuple[Costs, str]:
    """The price list and its hash: from a file, or generic prices for a shape or a config.json.

    Prices that were measured are taken as they are after repair and feedback; of others nobody knows what these would bring.

    Raises:
        UsageError: neither, or both.
    """
    from edgemoe.base.storage import hash_file, hash_json, load_record
    from edgemoe.ir import Costs

    if (path is None) == (generic is None):
        raise UsageError("give either COSTS or --generic", hint="COSTS is the file that `edgemoe price` made")
    if path is not None:
        if context is not None:
            raise UsageError("--context belongs to `edgemoe price`", hint="the price list has its context already")
        loaded = load_record(path, Costs)
        if target not in ("gguf", loaded.target):
            raise UsageError(f"--target {target} belongs to `edgemoe price`", hint=f"this price list is for {loaded.target}")
        if loaded.origin:
            return loaded, hash_file(path)
        from edgemoe.price.choices import discount

        return discount(loaded, repair=repair, rounding=rounding), hash_file(path)
    from edgemoe.price.priors import price_config

    if context is not None and context < 1:
        raise UsageError(f"--context {context} is not a number of tokens", hint="leave it out for 8192, or what the model has")
    assert generic is not None
    costs = price_config(generic, context, target)
    return costs, hash_json(costs.model, costs.stats, costs.memory)


def read_rules(recipe: Path | None, expressions: list[str] | None, objective: str | None) -> tuple[tuple[Rule, ...], str]:
    """Rules of a recipe and of the command line, and the objective (the command line wins).

    Raises:
        UsageError: not rules, or an objective that is not known.
    """
    from edgemoe.rules.recipe import OBJECTIVES, expression_rule, load_recipe

    if objective is not None and objective not in OBJECTIVES:
        raise UsageError(f"objective {objective!r} is not known", hint=f"known: {', '.join(OBJECTIVES)}")
    loaded = load_recipe(recipe) if recipe else None
    rules = (*(loaded.rules if loaded else ()), *(expression_rule(text) for text in expressions or ()))
    return rules, objective or (loaded.objective if loaded else "mean")


def _diff(a: Path, b: Path) -> list[str]:
    from edgemoe.base.storage import load_record
    from edgemoe.ir import Plan
    from edgemoe.plan.diff import diff_plans

    return diff_plans(load_record(a, Plan), load_record(b, Plan))


def _show(costs: Costs, solved: Plan, rules: tuple[Rule, ...], why: list[str], gap: float | None, *, as_json: bool) -> None:
    from edgemoe.plan.explain import describe_plan, describe_why
    from edgemoe.targets.gguf.export import gpu_flags

    reasons = [] if gap is None else describe_plan(costs, solved, rules, gap)
    for what in why:
        reasons += describe_why(costs, solved, what)
    if as_json:
        kept = {"kept": [len(k) for k in solved.kept]} if solved.drawn else {}  # numbers of experts, where nobody knows which
        print(json.dumps({**asdict(solved), **kept, **({"explanation": reasons} if reasons else {})}, indent=1))
        return
    from edgemoe.report.terminal import summarize_plan

    print_rich(summarize_plan(solved))
    _print_lines(reasons, as_json=False)
    if solved.vram:
        _print_lines(["llama.cpp flags: " + " ".join(gpu_flags(solved))], as_json=False)


def _print_lines(lines: list[str], *, as_json: bool) -> None:
    if as_json:
        print(json.dumps(lines, indent=1))
    elif lines:
        say(*lines)


def _sweep(
    costs: Costs, text: str, rules: tuple[Rule, ...], aim: str, solver: str, gap: float, origin: str, output: Path | None, *, as_json: bool
) -> None:
    from edgemoe.base.files import write_text
    from edgemoe.base.ownership import seal_text
    from edgemoe.plan.sweep import COLUMNS, FILES, parse_budgets, render_sweep, rows_of, sweep_budgets, write_csv

    budgets = parse_budgets(text)
    with show_progress() as progress:
        points = sweep_budgets(
            costs, budgets, rules=rules, objective=aim, solver=solver, gap=gap, costs_hash=origin,
            progress=lambda done, total: progress("sweep", done, total),
        )  # fmt: skip
    if output:
        page = render_sweep(costs, points)
        output.mkdir(parents=True, exist_ok=True)
        for name, text in zip(FILES, (write_csv(points), seal_text(page)), strict=True):
            write_text(output / name, text)
    if as_json:
        print(json.dumps([dict(zip(COLUMNS, row, strict=True)) for row in rows_of(points)], indent=1))
    else:
        from edgemoe.report.terminal import summarize_sweep

        print_rich(summarize_sweep((p.budget, p.plan, p.carried_over) for p in points))
