"""The whole job: inspect -> (narrow) -> calibrate -> price -> plan -> repair -> emit -> verify -> report, and where its files lie.

OUT holds the result; OUT/.work (or --work) what a killed run goes on from, keyed by what it was made from.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path

from edgemoe import __version__
from edgemoe.calibrate import DEFAULT_TOKENS, collect_stats
from edgemoe.emit import emit_artifact
from edgemoe.errors import BudgetError, MachineError, ModelError, UsageError, VerifyError
from edgemoe.families import resize_experts
from edgemoe.inspect import inspect_model
from edgemoe.ir import Artifact, Costs, Model, Plan, Report, Stats, hash_file, hash_json, load_record, save_record, write_text
from edgemoe.memory import DEFAULT_CONTEXT
from edgemoe.narrow import charge, choose_widths, narrow_experts
from edgemoe.plan import DEFAULT_GAP, SOLVERS, solve_plan, sweep_sizes
from edgemoe.price import discount_drops, least_process, price_choices
from edgemoe.repair import EPOCHS, repair_survivors
from edgemoe.report import write_report
from edgemoe.rules import Rule
from edgemoe.targets import Target, find_target
from edgemoe.texts import Text, choose_texts
from edgemoe.units import format_bytes
from edgemoe.verify import broken_promises, verify_artifact

Progress = Callable[[str, int, int], None]  # (stage, done, all)
MARKER = "build.json"
CURVE_POINTS = 24
MAX_CONTEXT = 2**27  # tokens; llama.cpp counts them in 32 bits


@dataclass(frozen=True, slots=True, kw_only=True)
class BuildRequest:
    """What the user asked for."""

    model: str
    memory: int
    out: Path
    context: int | None = None
    target: str = "gguf"
    calibration: tuple[str, ...] = ()
    calibration_tokens: int = DEFAULT_TOKENS
    heldout: tuple[str, ...] = ()
    rules: tuple[Rule, ...] = ()
    objective: str = "mean"
    solver: str = "highs"
    gap: float = DEFAULT_GAP
    seconds: float | None = None
    shard_max: int = 0
    repair: bool = True
    width: str = ""  # neurons of every expert, or "auto"; empty: as they are
    work: Path | None = None
    force: bool = False
    command: str = ""


def build_artifact(request: BuildRequest, progress: Progress = lambda stage, done, total: None) -> Report:
    """Everything from checkpoint to report; goes on where a killed run stopped.

    Raises:
        EdgemoeError: every kind in errors.py; nothing half-written is left under a final name.
    """
    check_output(request.out, force=request.force)
    check_solver(request.solver)
    model = inspect_model(request.model)
    target = find_target(request.target)
    context = choose_context(model, request.context)
    widths = choose_widths(model, request.width)
    check_budget(resize_experts(model, widths[-1]), target, context, request.memory)
    calibration, heldout = choose_texts(request.calibration, request.heldout)
    prepare_output(request.out, force=request.force)
    work = open_work(request.out, request.work)

    offer, plan = plan_widths(request, model, widths, target, context, calibration, work, progress)
    save_record(request.out / ".work" / "plan.json", plan)
    stored = offer.model
    if plan.repair:
        stored = repair_survivors(
            *(model, calibration, plan, offer.work),
            start=offer.model,
            max_tokens=request.calibration_tokens,
            progress=_stage(progress, "repair"),
        )
    artifact = emit_artifact(stored, offer.stats, plan, target, request.out, shard_max=request.shard_max, progress=_stage(progress, "emit"))
    save_record(request.out / ".work" / "artifact.json", artifact)
    report = verify_artifact(artifact, model, plan, heldout, target, work, progress=_stage(progress, "verify"))
    warning = warn_of_context(model, context)
    report = replace(
        report,
        frontier=frontier_of(offer.costs, plan.file_size),
        model={**report.model, "command": request.command},
        problems=(*report.problems, *([f"note: {warning}"] if warning else [])),
    )
    finish_output(request.out, report)
    broken = broken_promises(report)
    if broken:
        raise VerifyError(f"{artifact.path.name}: {broken[0]}", hint=f"see {request.out / 'report.html'}; the artifact was kept")
    return report


@dataclass(frozen=True, slots=True, kw_only=True)
class Offer:
    """The experts at one width: their weights, what calibration saw of them, their prices, and the folder where all that lies."""

    model: Model
    stats: Stats
    costs: Costs
    costs_hash: str
    work: Path


def plan_widths(
    request: BuildRequest,
    model: Model,
    widths: Sequence[int],
    target: Target,
    context: int,
    texts: Sequence[Text],
    work: Path,
    progress: Progress,
) -> tuple[Offer, Plan]:
    """The best plan over all widths (falling) that are tried, by predicted KL; and what it was made from.

    A width whose narrowing alone costs more than a plan that was found is not calibrated, nor is any below it.

    Raises:
        BudgetError: nothing fits at any width; says what the narrowest needs.
    """
    best: tuple[Offer, Plan] | None = None
    refused: list[BudgetError] = []
    for width in widths:
        name, tokens = (f" {width}" if width < model.expert_size else ""), request.calibration_tokens
        epochs = EPOCHS if request.repair else 0
        tell = _stage(progress, f"narrow{name}")
        narrowed = narrow_experts(model, texts, width, work, max_tokens=tokens, epochs=epochs, progress=tell)
        if best and narrowed.loss(best[0].costs, request.objective) >= _promised(*best):
            break
        stats = collect_stats(narrowed.model, texts, narrowed.work, max_tokens=tokens, progress=_stage(progress, f"calibrate{name}"))
        costs, key = price_cached(narrowed.model, stats, target, context, narrowed.work, _stage(progress, f"price{name}"))
        costs = charge(discount_drops(costs) if request.repair else costs, narrowed)
        offer = Offer(model=narrowed.model, stats=stats, costs=costs, costs_hash=key, work=narrowed.work)
        try:
            plan = _solve(request, offer)
        except BudgetError as error:
            refused.append(error)
            continue
        if best is None or _promised(offer, plan) < _promised(*best):
            best = offer, plan
    if best is None:
        raise refused[-1]
    return best


def _solve(request: BuildRequest, offer: Offer) -> Plan:
    return solve_plan(
        offer.costs,
        request.memory,
        rules=request.rules,
        objective=request.objective,
        solver=request.solver,
        gap=request.gap,
        seconds=request.seconds,
        costs_hash=offer.costs_hash,
    )


def _promised(offer: Offer, plan: Plan) -> float:
    """KL that the plan's objective is predicted to have: the mean, or the worst domain's."""
    return offer.costs.predict_kl(max(plan.domain_q.values())) if plan.objective == "worst" else plan.predicted_kl


def price_model(
    source: str,
    work: Path,
    *,
    context: int | None = None,
    target: str = "gguf",
    calibration_tokens: int = DEFAULT_TOKENS,
    repair: bool = True,
) -> Costs:
    """Calibrate and price a checkpoint with the shipped texts; what is in the work folder already is not done again.

    Args:
        source: folder of a checkpoint, or a hub id.
        work: folder for statistics and prices.
        context: tokens that the process must have memory for; None: as `choose_context`.
        target: what the plan will be written as.
        calibration_tokens: of all texts together.
        repair: drops are priced as after the repair that `build` does.

    Raises:
        EdgemoeError: as `inspect_model`, `collect_stats` and `price_choices`.
    """
    model, chosen = inspect_model(source), find_target(target)
    calibration, _ = choose_texts((), ())
    stats = collect_stats(model, calibration, open_work(work, work), max_tokens=calibration_tokens)
    costs = price_cached(model, stats, chosen, choose_context(model, context), work, None)[0]
    return discount_drops(costs) if repair else costs


def _stage(progress: Progress, name: str) -> Callable[[int, int], None]:
    return lambda done, total: progress(name, done, total)


def choose_context(model: Model, asked: int | None) -> int:
    """The context to plan for: what was asked, else the smaller of 8192 and what the model was trained for.

    Raises:
        UsageError: less than a token, or so much that it can only be a mistake.
    """
    if asked is None:
        return min(DEFAULT_CONTEXT, model.context_length)
    if not 0 < asked <= MAX_CONTEXT:
        raise UsageError(f"--context {asked} is not between 1 and {MAX_CONTEXT} tokens")
    return asked


def warn_of_context(model: Model, context: int) -> str:
    """What to tell a user who asks for more context than the model was trained for; empty when there is nothing to tell."""
    if context <= model.context_length:
        return ""
    return f"context {context} is more than the {model.context_length} tokens that {model.name} was trained for: expect poor text beyond"


def check_budget(model: Model, target: Target, context: int, budget: int) -> None:
    """Refuse a budget that no plan can meet before hours of work.

    Raises:
        BudgetError: names the least budget.
    """
    least = least_process(model, target, context)
    if budget < least:
        raise BudgetError(
            f"{model.name} at context {context} needs at least {format_bytes(least)} ({least} bytes); the budget is {format_bytes(budget)}",
            hint=f"ask for --memory {least}B or more, or a smaller --context",
        )


def check_solver(name: str) -> None:
    """Refuse an unknown solver before hours of work.

    Raises:
        UsageError: names those that are known.
    """
    if name not in SOLVERS:
        raise UsageError(f"solver {name!r} is not known", hint=f"known: {', '.join(SOLVERS)}")


def price_cached(
    model: Model, stats: Stats, target: Target, context: int, work: Path, progress: Callable[[int, int], None] | None
) -> tuple[Costs, str]:
    """Costs from the work folder if they are there, else priced now; and their hash."""
    path = work / f"costs-{hash_json(stats.key, target.OFFERED, context, __version__)[:16]}.json"
    if not path.exists():
        save_record(path, price_choices(model, stats, target, context, progress))
    return load_record(path, Costs), hash_file(path)


def frontier_of(costs: Costs, file_size: int) -> tuple[dict[str, float], ...]:
    """Predicted KL at sizes from a third of this file to twice it, for the report's picture."""
    low, high = file_size / 3, min(file_size * 2.2, float(costs.size[-1].max(axis=1).sum() + costs.fixed_size[-1]))
    return sweep_sizes(costs, [round(low * (high / low) ** (i / (CURVE_POINTS - 1))) for i in range(CURVE_POINTS)])


# ----------------------------------------------------------------------------------------------------------------- folders
def check_output(out: Path, *, force: bool) -> None:
    """Refuse an OUT that is not new, empty, our unfinished work or, with `force`, any folder; nothing is changed.

    Raises:
        UsageError: something else is there.
    """
    for parent in (out, *out.parents):
        if parent.exists() and not parent.is_dir():
            raise UsageError(f"{out}: {parent} is a file, not a folder", hint="choose another -o")
        if parent.exists():
            break
    if out.is_dir() and any(out.iterdir()) and not force and not (out / ".work" / MARKER).exists():
        raise UsageError(f"{out} is not empty", hint="choose another -o, or add --force to replace what edgemoe wrote there")


def prepare_output(out: Path, *, force: bool) -> None:
    """Make OUT ours, cleared of our last result or of what an unfinished build emitted.

    Raises:
        UsageError: something else is there.
        MachineError: it cannot be made.
    """
    check_output(out, force=force)
    try:
        for folder in (out, out / ".work"):
            with suppress(ModelError):  # nothing there, not ours, or of another version: it stays
                _remove_result(out, find_artifact(folder))
        (out / ".work").mkdir(parents=True, exist_ok=True)
        write_text(out / ".work" / MARKER, json.dumps({"unfinished": True}) + "\n")
    except OSError as error:
        raise MachineError(f"{out}: cannot be written: {error.strerror}") from error


def find_artifact(out: Path) -> Artifact:
    """The artifact that `emit` or `build` left in a folder.

    Raises:
        ModelError: there is none.
    """
    if (out / "artifact.json").exists():
        return replace(load_record(out / "artifact.json", Artifact), folder=str(out))
    if (out / "report.json").exists():
        return replace(load_record(out / "report.json", Report).artifact, folder=str(out))
    raise ModelError(f"{out}: neither artifact.json nor report.json is there", hint="give the folder that emit or build made")


def _remove_result(out: Path, artifact: Artifact) -> None:
    for name in (*(f.name for f in artifact.files), "artifact.json", "plan.json", "report.json", "report.html", "README.md"):
        if Path(name).name == name and (out / name).is_file():
            (out / name).unlink()


def open_work(out: Path, work: Path | None) -> Path:
    """The folder for Stats and Costs: OUT/.work, or one that is shared between builds."""
    folder = work or out / ".work"
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise MachineError(f"{folder}: cannot be made: {error.strerror}") from error
    return folder


def finish_output(out: Path, report: Report) -> None:
    """Write plan and report beside the artifact; the work folder inside OUT goes."""
    save_record(out / "plan.json", report.plan)
    write_report(replace(report, artifact=replace(report.artifact, folder=".")), out)  # no path of this machine is published
    shutil.rmtree(out / ".work", ignore_errors=True)
