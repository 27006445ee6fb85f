"""The whole job: inspect -> (narrow) -> calibrate -> price -> plan -> (refine) -> repair -> emit -> verify -> report.

OUT holds the result; OUT/.work (or --work) what a killed run goes on from, keyed by what it was made from.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from edgemoe import __version__
from edgemoe.base.errors import BudgetError, ConflictError, UsageError, VerifyError
from edgemoe.base.storage import alone, hash_file, hash_json, load_record, save_record
from edgemoe.base.units import format_bytes
from edgemoe.calibrate.collect import collect_stats
from edgemoe.devices.profiles import Device
from edgemoe.ir import Costs, Model, Plan, Report, Round, Stats
from edgemoe.ir.memory import DEFAULT_CONTEXT
from edgemoe.model.families import resize_experts
from edgemoe.model.inspect import inspect_model
from edgemoe.pipeline.emit import check_split, emit_artifact
from edgemoe.pipeline.output_folder import check_output, finish_output, open_work, prepare_output
from edgemoe.pipeline.refine import Measured, Measurer, expect, fitted_share, refine_plan
from edgemoe.plan.solve import DEFAULT_GAP, SOLVERS, solve_plan, sweep_sizes
from edgemoe.price.choices import REVISION, check_rounding, discount, least_process, price_choices
from edgemoe.repair.quantize_layer import plan_packing
from edgemoe.repair.survivors import EPOCHS, repair_survivors
from edgemoe.repair.width import FEW_BITS, Narrowed, charge, choose_top_k, choose_widths, narrow_experts
from edgemoe.rules import Rule
from edgemoe.stream.gradients import collect_gradients
from edgemoe.stream.texts import DEFAULT_TOKENS, Text, choose_texts
from edgemoe.targets import Target, find_target
from edgemoe.verify.artifact import broken_promises, verify_artifact

Progress = Callable[[str, int, int], None]  # (stage, done, all)
CURVE_POINTS = 24
DEFAULT_ROUNDS = 0  # of refinement: each costs one more file written and run
MAX_CONTEXT = 2**27  # tokens; llama.cpp counts them in 32 bits


@dataclass(frozen=True, slots=True, kw_only=True)
class BuildRequest:
    """What the user asked for."""

    model: str
    memory: int
    out: Path
    device: Device | None = None  # the box, if it is known: what its processor holds twice counts
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
    rounding: str = "feedback"
    refine: int = DEFAULT_ROUNDS
    width: str = ""  # neurons of every expert, "full" or "auto"; empty: narrower ones where bits are few
    top_k: int | None = None  # experts that the router picks; None: as in the checkpoint
    work: Path | None = None
    force: bool = False
    command: str = ""


def build_artifact(request: BuildRequest, progress: Progress = lambda stage, done, total: None) -> Report:
    """Everything from checkpoint to report; goes on where a killed run stopped.

    Raises:
        EdgemoeError: every kind in errors.py; nothing half-written is left under a final name.
    """
    target = find_target(request.target)
    check_split(target, request.shard_max)
    check_output(request.out, force=request.force, names=target.FIXED_NAMES)
    check_solver(request.solver)
    check_rounding(request.rounding)
    model = inspect_model(request.model)
    context = choose_context(model, request.context)
    widths = choose_widths(model, request.width, target.FORM)
    top_k = choose_top_k(model, request.top_k)
    check_budget(resize_experts(replace(model, top_k=top_k), widths[-1]), target, context, request.memory)
    calibration, heldout = choose_texts(request.calibration, request.heldout)
    prepare_output(request.out, force=request.force, names=target.FIXED_NAMES)
    work = open_work(request.out, request.work)

    offer, plan = plan_widths(request, model, widths, top_k, target, context, calibration, work, progress)

    def stored_as(plan: Plan, rounding: str = request.rounding) -> Model:
        tokens, stage = request.calibration_tokens, _stage(progress, "repair")
        known = (model, calibration, offer.stats, plan, work)
        return store_weights(*known, narrowed=offer.narrowed, rounding=rounding, max_tokens=tokens, progress=stage)

    rounds = tuple[Round, ...]()
    if request.refine:
        tokens, stage = request.calibration_tokens, _stage(progress, "refine")
        run = Measurer(
            model, offer.stats, calibration, target, work, max_tokens=tokens, stored_as=stored_as, rounding=request.rounding, progress=stage
        )
        priced = offer.costs

        def measure(plan: Plan) -> Measured:
            return expect(plan, run(plan), run.among * fitted_share(plan, priced, request.rounding))

        refined = refine_plan(offer.costs, plan, request.refine, lambda costs: _solve(request, replace(offer, costs=costs)), measure)
        plan, offer, rounds = refined.plan, replace(offer, costs=refined.costs), refined.rounds
    save_record(request.out / ".work" / "plan.json", plan)
    stored = stored_as(plan)
    artifact = emit_artifact(stored, offer.stats, plan, target, request.out, shard_max=request.shard_max, progress=_stage(progress, "emit"))
    save_record(request.out / ".work" / "artifact.json", artifact)
    report = verify_artifact(artifact, model, plan, heldout, target, work, progress=_stage(progress, "verify"))
    warning = warn_of_context(model, context)
    report = replace(
        report,
        rounds=rounds,
        frontier=frontier_of(offer.costs, plan.memory["weights"] + sum(plan.sizes[name] for name in plan.vram)),
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
    """The experts at one width: their weights and where they lie, what calibration saw of them, and their prices."""

    narrowed: Narrowed
    stats: Stats
    costs: Costs
    costs_hash: str


def plan_widths(
    request: BuildRequest,
    model: Model,
    widths: Sequence[int],
    top_k: int,
    target: Target,
    context: int,
    texts: Sequence[Text],
    work: Path,
    progress: Progress,
) -> tuple[Offer, Plan]:
    """The best plan over all widths (falling) that are tried, with `top_k` active experts, by predicted KL; and what it was made from.

    A width whose narrowing alone costs more than a plan that was found is not calibrated, nor is any below it; unasked, none is tried
    where the whole width fits with bits to spare.

    Raises:
        BudgetError: nothing fits at any width; says what the narrowest needs.
    """
    best: tuple[Offer, Plan] | None = None
    refused: list[BudgetError] = []
    for width in widths:
        name, tokens = (f" {width}" if width < model.expert_size else ""), request.calibration_tokens
        epochs = EPOCHS if request.repair else 0 if name else -1
        tell = _stage(progress, f"narrow{name}" if name else f"top-{top_k}")
        narrowed = narrow_experts(model, texts, width, work, top_k=top_k, max_tokens=tokens, epochs=epochs, progress=tell)
        if best and narrowed.loss(best[0].costs, request.objective) >= _promised(*best):
            break
        stats = collect_stats(narrowed.model, texts, narrowed.work, max_tokens=tokens, progress=_stage(progress, f"calibrate{name}"))
        costs, key = price_cached(narrowed.model, stats, target, context, narrowed.work, _stage(progress, f"price{name}"))
        costs = charge(discount(costs, repair=request.repair, rounding=request.rounding), narrowed)
        costs = target.on_device(costs, request.device) if request.device else costs
        offer = Offer(narrowed=narrowed, stats=stats, costs=costs, costs_hash=key)
        try:
            plan = _solve(request, offer)
        except ConflictError:
            raise  # no width helps
        except BudgetError as error:
            refused.append(error)
            continue
        if best is None or _promised(offer, plan) < _promised(*best):
            best = offer, plan
        if not request.width and 8 * plan.file_size >= FEW_BITS * model.n_weights:
            break
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


def store_weights(
    model: Model,
    texts: Sequence[Text],
    stats: Stats,
    plan: Plan,
    work: Path,
    *,
    narrowed: Narrowed | None = None,
    rounding: str = "feedback",
    max_tokens: int = DEFAULT_TOKENS,
    progress: Callable[[int, int], None] | None = None,
) -> Model:
    """The model as `emit` stores it: survivors repaired if the plan was priced so, matrices packed if rounding is by feedback.

    Args:
        model: the original.
        texts: calibration texts.
        stats: what they gave.
        plan: what stays, and as what.
        work: folder for the gradients of the original, which all plans share, and for the new weights.
        narrowed: what is stored, if it is a narrowed model; `stats` are then of it, and new weights lie in its folder.
        rounding: "feedback" or "stock" (ggml's own, matrix by matrix).
        max_tokens: of all texts together.
        progress: called with (steps done, all steps).

    Raises:
        UsageError: `rounding` is neither.
        ModelError: as `repair_survivors`.
    """
    check_rounding(rounding)
    packing, start = None, narrowed.model if narrowed else model
    backward = 2 * model.n_layers  # steps, once for all plans

    def tell(done: int) -> None:
        if progress:
            progress(done, backward + model.n_layers)

    if rounding == "feedback" and stats.probes:  # statistics from an imatrix come with no texts: then nothing is run
        gradients = collect_gradients(model, texts, work, max_tokens=max_tokens, progress=lambda done, _: tell(done))
        packing = plan_packing(start, stats, plan, find_target(plan.target), gradients)
    if not packing and not plan.repair:
        return start
    return repair_survivors(
        model,
        texts,
        plan,
        narrowed.work if narrowed else work,
        start=start,
        max_tokens=max_tokens,
        packing=packing,
        progress=lambda done, _: tell(backward + done),
    )


def price_model(
    source: str,
    work: Path,
    *,
    context: int | None = None,
    target: str = "gguf",
    calibration_tokens: int = DEFAULT_TOKENS,
    repair: bool = True,
    rounding: str = "feedback",
) -> Costs:
    """Calibrate and price a checkpoint with the shipped texts; what is in the work folder already is not done again.

    Args:
        source: folder of a checkpoint, or a hub id.
        work: folder for statistics and prices.
        context: tokens that the process must have memory for; None: as `choose_context`.
        target: what the plan will be written as.
        calibration_tokens: of all texts together.
        repair: drops are priced as after the repair that `build` does.
        rounding: how the plan's weights will be rounded, "feedback" or "stock".

    Raises:
        EdgemoeError: as `inspect_model`, `collect_stats` and `price_choices`.
    """
    model, chosen = inspect_model(source), find_target(target)
    calibration, _ = choose_texts((), ())
    stats = collect_stats(model, calibration, open_work(work, work), max_tokens=calibration_tokens)
    costs = price_cached(model, stats, chosen, choose_context(model, context), work, None)[0]
    return discount(costs, repair=repair, rounding=rounding)


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
    path = work / f"costs-{hash_json(stats.key, target.OFFERED, context, __version__, REVISION)[:16]}.json"
    with alone(path):
        if not path.exists():
            save_record(path, price_choices(model, stats, target, context, progress))
    return load_record(path, Costs), hash_file(path)


def frontier_of(costs: Costs, weights: int) -> tuple[dict[str, float], ...]:
    """Predicted KL where weights take from a third of these bytes of the process to twice as many, for the report's picture."""
    largest = (costs.size[-1] + costs.extra[-1]).max(axis=1).sum() + costs.fixed_size[-1]
    low, high = weights / 3, min(weights * 2.2, float(largest))
    return sweep_sizes(costs, [round(low * (high / low) ** (i / (CURVE_POINTS - 1))) for i in range(CURVE_POINTS)])
