"""`edgemoe plan`: one budget or many, with rules; why a plan is so; what changed; files for other tools."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from edgemoe.base.errors import UsageError
from edgemoe.cli.devices import choose_budget
from edgemoe.cli.options import (
    ContextOpt,
    DeviceOpt,
    GapOpt,
    JsonOpt,
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
)
from edgemoe.cli.progress import print_rich, show_progress

if TYPE_CHECKING:
    from edgemoe.ir import Costs, Plan
    from edgemoe.rules import Rule

DEFAULT_GAP = 1e-4  # of plan/solve.py, which --help does not import


def plan(
    costs: Annotated[Path | None, typer.Argument(metavar="COSTS", help="File that price made.")] = None,
    memory: MemoryOpt = None,
    device: DeviceOpt = None,
    output: Annotated[
        Path | None, typer.Option("-o", "--output", metavar="OUT", help="Write the plan here; with --sweep: a folder for table and page.")
    ] = None,
    recipe: RecipeOpt = None,
    rule: RuleOpt = None,
    objective: ObjectiveOpt = None,
    solver: SolverOpt = "highs",
    gap: GapOpt = DEFAULT_GAP,
    time_limit: TimeOpt = None,
    no_repair: Annotated[
        bool, typer.Option("--no-repair", help="Price drops as they are without the survivors' repair, which emit then leaves out.")
    ] = False,
    rounding: RoundingOpt = "feedback",
    near: Annotated[Path | None, typer.Option(metavar="PLAN", help="Change as little of this plan as costs (nearly) nothing.")] = None,
    preset: PresetOpt = None,
    stats: StatsOpt = None,
    generic: Annotated[
        str | None,
        typer.Option(metavar="NAME|CONFIG", help="Plan a model that nobody measured: a known shape (deepseek-v3 ...) or a config.json."),
    ] = None,
    context: ContextOpt = None,
    target: TargetOpt = "gguf",
    explain: Annotated[bool, typer.Option("--explain", help="Say what each rule costs and what more memory buys (solves again).")] = False,
    why: Annotated[
        list[str] | None,
        typer.Option(metavar="TENSOR|LAYER:EXPERT", help="Say why a tensor has its format, or an expert went; repeatable."),
    ] = None,
    sweep: Annotated[str | None, typer.Option(metavar="LOW:HIGH:STEP", help="Plans for many budgets, e.g. 64GB:192GB:8GB.")] = None,
    diff: Annotated[tuple[Path, Path] | None, typer.Option(metavar="A B", help="Say what changed between two plans.")] = None,
    export: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Write a keep list and a --tensor-type-file for llama-quantize.")
    ] = None,
    as_json: JsonOpt = False,
) -> None:
    """Solve for the best plan within a budget: which experts stay, and the format of every tensor.

    Rules come from a recipe (--recipe) or one by one (--rule).  --sweep solves for many budgets and shows them on a page with a slider.
    --preset decides as another method does, from the same prices and for the same bytes, so that the two plans can be compared.
    """
    if diff is not None:
        _print_lines(_diff(*diff), as_json=as_json)
        return
    if preset is not None:
        asked: dict[str, object] = {
            "--recipe": recipe,
            "--rule": rule,
            "--objective": objective,
            "--solver": solver != "highs",
            "--near": near,
        }
        asked |= {"--explain": explain, "--why": why, "--sweep": sweep}
        asked |= {"--time-limit": time_limit, "--gap": gap != DEFAULT_GAP, "--generic": generic} if preset == "pmq" else {"--stats": stats}
        _check_preset(preset, asked)
    elif stats is not None:
        raise UsageError("--stats goes with --preset pmq", hint="every other plan takes all that it needs from COSTS")
    rules, aim = read_rules(recipe, rule, objective)
    budget, box = (0, None) if sweep is not None else choose_budget(memory, device)
    prices, origin = _open_costs(costs, generic, context, target, repair=not no_repair, rounding=rounding)
    if box is not None:
        from edgemoe.targets import find_target

        prices = find_target(prices.target).on_device(prices, box)
    _check_outputs(output, export, folder=sweep is not None)
    if export and prices.form != "stacks":
        raise UsageError("--export writes files for llama-quantize, which cannot store experts one by one", hint="use prices for gguf")
    from edgemoe.base.storage import load_record, save_record
    from edgemoe.ir import Plan

    if sweep is not None:
        if memory or device or time_limit is not None or near or explain or why or export:
            others = "--memory, --device, --time-limit, --near, --explain, --why and --export"
            raise UsageError(f"--sweep names the budgets and solves for each; leave {others} out")
        _sweep(prices, sweep, rules, aim, solver, gap, origin, output, as_json=as_json)
        return
    if preset is not None:
        solved = _plan_preset(preset, prices, budget, stats, gap, time_limit, origin)
    else:
        from edgemoe.plan.solve import solve_plan

        before = load_record(near, Plan) if near else None
        solved = solve_plan(
            prices, budget, rules=rules, objective=aim, solver=solver, gap=gap, seconds=time_limit, near=before, costs_hash=origin
        )
    if output:
        save_record(output, solved)
    _show(prices, solved, rules, why or [], gap if explain else None, as_json=as_json)
    if export:
        from edgemoe.targets.gguf.export import export_plan

        export_plan(solved, export)


def _check_preset(name: str, asked: Mapping[str, object]) -> None:
    """Refuse a preset that is not known, and options that have no meaning beside it.

    Raises:
        UsageError: names the presets that there are, or the options.
    """
    from edgemoe.plan.presets import find_preset

    find_preset(name)
    given = [option for option, value in asked.items() if value]
    if given:
        hint = "a preset says itself what is decided, and nothing is proven of its plan; rules and reasons are for plans without --preset"
        raise UsageError(f"--preset {name} does not go with {', '.join(given)}", hint=hint)


def _plan_preset(name: str, costs: Costs, budget: int, folder: Path | None, gap: float, seconds: float | None, costs_hash: str) -> Plan:
    from edgemoe.base.storage import load_record
    from edgemoe.ir import Stats
    from edgemoe.plan.presets import Settings, plan_preset

    stats = replace(load_record(folder / "stats.json", Stats), folder=str(folder)) if folder else None
    return plan_preset(name, costs, budget, Settings(stats=stats, gap=gap, seconds=seconds), costs_hash=costs_hash)


def _check_outputs(output: Path | None, export: Path | None, *, folder: bool) -> None:
    """Refuse what cannot be written before anything is solved.

    Raises:
        UsageError: a file where a folder must be, or no folder to write into.
    """
    for path in filter(None, (export, output if folder else None)):
        if path.exists() and not path.is_dir():
            raise UsageError(f"{path}: is a file, not a folder", hint="choose another folder")
    if output is not None and not folder and (output.is_dir() or not output.resolve().parent.is_dir()):
        raise UsageError(f"{output}: {'is a folder' if output.is_dir() else 'its folder does not exist'}", hint="choose another -o")


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
        print(json.dumps({**asdict(solved), **({"explanation": reasons} if reasons else {})}, indent=1))
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
        print("\n".join(lines))


def _sweep(
    costs: Costs, text: str, rules: tuple[Rule, ...], aim: str, solver: str, gap: float, origin: str, output: Path | None, *, as_json: bool
) -> None:
    from edgemoe.base.storage import write_text
    from edgemoe.plan.sweep import COLUMNS, parse_budgets, render_sweep, rows_of, sweep_budgets, write_csv

    budgets = parse_budgets(text)
    with show_progress() as progress:
        points = sweep_budgets(
            costs, budgets, rules=rules, objective=aim, solver=solver, gap=gap, costs_hash=origin,
            progress=lambda done, total: progress("sweep", done, total),
        )  # fmt: skip
    if output:
        page = render_sweep(costs, points)
        output.mkdir(parents=True, exist_ok=True)
        write_text(output / "sweep.csv", write_csv(points))
        write_text(output / "sweep.html", page)
    if as_json:
        print(json.dumps([dict(zip(COLUMNS, row, strict=True)) for row in rows_of(points)], indent=1))
    else:
        from edgemoe.report.terminal import summarize_sweep

        print_rich(summarize_sweep((p.budget, p.plan, p.carried_over) for p in points))
