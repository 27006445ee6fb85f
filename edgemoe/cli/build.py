"""`edgemoe build`: everything, from the checkpoint to a report."""

from __future__ import annotations

import json
import shlex
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from edgemoe.base.units import format_bytes, parse_bytes
from edgemoe.cli.devices import choose_budget
from edgemoe.cli.options import (
    DEFAULT_SECONDS,
    CalibrationOpt,
    ContextOpt,
    DeviceOpt,
    DtypeOpt,
    ForceOpt,
    GapOpt,
    HeldoutOpt,
    JsonOpt,
    KvBitsOpt,
    KvSizeOpt,
    MemoryOpt,
    ModelArg,
    ObjectiveOpt,
    OutOpt,
    RecipeOpt,
    RoundingOpt,
    RuleOpt,
    ShardOpt,
    SolverOpt,
    TargetOpt,
    TimeOpt,
    TokensOpt,
    TopKOpt,
    WidthOpt,
    settled_target,
    target_options,
)
from edgemoe.cli.plan import read_rules
from edgemoe.cli.progress import print_rich, say, show_progress

if TYPE_CHECKING:
    from edgemoe.devices.profiles import Device
    from edgemoe.pipeline.request import BuildRequest
    from edgemoe.rules import Rule


STAGES = ("hash", "calibrate", "price", "plan", "repair", "emit", "verify")  # of every build, in this order

WorkOpt = Annotated[
    Path | None, typer.Option("--work", metavar="DIR", help="Keep calibration and prices here, to share them between budgets.")
]
RepairOpt = Annotated[bool, typer.Option("--repair/--no-repair", help="Refit the surviving experts to what dropped ones leave.")]
RefineOpt = Annotated[
    int, typer.Option("--refine", min=0, metavar="N", help="Measure the plan, rescale its prices, solve again; at most so many times.")
]
DryRunOpt = Annotated[bool, typer.Option("--dry-run", help="Say what it would take, and the least budget; write nothing.")]


def build(
    model: ModelArg,
    output: OutOpt,
    memory: MemoryOpt = None,
    device: DeviceOpt = None,
    context: ContextOpt = None,
    target: TargetOpt = "gguf",
    dtype: DtypeOpt = None,
    kv_bits: KvBitsOpt = None,
    max_kv_size: KvSizeOpt = None,
    calibration: CalibrationOpt = None,
    calibration_tokens: TokensOpt = 65_536,
    heldout: HeldoutOpt = None,
    recipe: RecipeOpt = None,
    rule: RuleOpt = None,
    objective: ObjectiveOpt = None,
    solver: SolverOpt = "highs",
    gap: GapOpt = 1e-4,
    time_limit: TimeOpt = DEFAULT_SECONDS,
    shard_max: ShardOpt = None,
    work: WorkOpt = None,
    repair: RepairOpt = True,
    rounding: RoundingOpt = "feedback",
    refine: RefineOpt = 0,
    width: WidthOpt = None,
    top_k: TopKOpt = None,
    dry_run: DryRunOpt = False,
    force: ForceOpt = False,
    as_json: JsonOpt = False,
) -> None:
    """Everything: from the checkpoint to a GGUF (or ONNX, or MLX) that fits the memory, run and measured, with a report.

    A killed build goes on where it stopped when the same command is given again.
    """
    request = _request(
        choose_budget(memory, device),
        read_rules(recipe, rule, objective),
        model=model,
        out=output,
        context=context,
        target=settled_target(target, dtype, kv_bits, max_kv_size),
        calibration=tuple(calibration or ()),
        calibration_tokens=calibration_tokens,
        heldout=tuple(heldout or ()),
        solver=solver,
        gap=gap,
        seconds=time_limit,
        shard_max=parse_bytes(shard_max) if shard_max else 0,
        repair=repair,
        rounding=rounding,
        refine=refine,
        width=width or "",
        top_k=top_k,
        work=work,
        force=force,
    )
    command = _command_of(request, memory or f"{request.memory}B", _told(recipe, objective, rule))
    (print_needs if dry_run else _build)(replace(request, command=command), as_json=as_json)


def _request(budget: tuple[int, Device | None], asked: tuple[tuple[Rule, ...], str], **given: Any) -> BuildRequest:
    """The request; importing its class takes time that --help should not."""
    from edgemoe.pipeline.request import BuildRequest

    return BuildRequest(memory=budget[0], device=budget[1], rules=asked[0], objective=asked[1], **given)


def _told(recipe: Path | None, objective: str | None, rules: list[str] | None) -> list[str]:
    """The options that a request no longer holds, as they were given."""
    told = [*(["--recipe", recipe.name] if recipe else []), *(["--objective", objective] if objective else [])]
    return told + [part for text in rules or () for part in ("--rule", text)]


def _build(request: BuildRequest, *, as_json: bool) -> None:
    """Build, and print the report."""
    from edgemoe.pipeline.build import build_artifact
    from edgemoe.report.terminal import summarize_report

    with show_progress(STAGES) as progress:
        report = build_artifact(request, progress, progress.gap)
    if as_json:
        print((request.out / "report.json").read_text(encoding="utf-8"), end="")
    else:
        print_rich(summarize_report(report))


def _command_of(request: BuildRequest, memory: str, told: list[str]) -> str:
    """The command that makes the same again, as it is published: options where they are not the default, no paths of this machine."""
    model = Path(request.model).name if Path(request.model).exists() else request.model
    usual = {f.name: f.default for f in fields(request)}
    shown = ("context", "calibration_tokens", "solver", "gap", "shard_max", "rounding", "refine", "width", "top_k")
    names = {f"--{name.replace('_', '-')}": name for name in shown} | {"--time-limit": "seconds"}
    given = {option: getattr(request, name) for option, name in names.items() if getattr(request, name) != usual[name]}
    asked = [part for option, value in given.items() for part in (option, f"{value}B" if option == "--shard-max" else str(value))]
    asked = [*(target_options(request.target) if request.target != usual["target"] else []), *asked]
    asked += [] if request.repair else ["--no-repair"]
    return shlex.join(["edgemoe", "build", model, "--memory", memory, *asked, *told, "-o", request.out.name])


def print_needs(request: BuildRequest, *, as_json: bool) -> None:
    """Say what a build would take, and refuse what no build can meet.

    Raises:
        EdgemoeError: what `check_needs` refuses.
    """
    from edgemoe.pipeline.doors import check_needs
    from edgemoe.pipeline.estimate import estimate_needs
    from edgemoe.pipeline.request import prepare, warn_of_context

    job = prepare(request)
    model, needs = job.model, estimate_needs(job)
    if as_json:
        print(json.dumps(asdict(needs), indent=1))
    else:
        rows = {"budget": needs.budget, "least budget": needs.least_budget, "of it beside the weights": needs.beside_weights}
        rows |= {"disk, about": needs.disk, "memory while building, at most about": needs.memory_to_build}
        say(f"{model.name}: {model.n_experts} experts in {model.n_layers} layers, {format_bytes(model.n_bytes)}; context {job.context}")
        say(*(f"{name:40s} {format_bytes(size)}" for name, size in rows.items()))
        if warn_of_context(model, job.context):
            say(f"warning: {warn_of_context(model, job.context)}", error=True)
    check_needs(job)
