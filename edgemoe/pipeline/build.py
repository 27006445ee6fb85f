"""This module runs the whole job: inspect, (narrow,) calibrate, price, plan, (refine,) repair, emit, verify, report.

OUT holds the result.  OUT/.work (or --work) holds the state from which a killed run goes on, under keys that hash what it was made from.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from edgemoe.base.errors import VerifyError
from edgemoe.base.progress import GapProgress, Progress, StageProgress
from edgemoe.base.storage import save_record
from edgemoe.calibrate.collect import collect_stats
from edgemoe.ir import Costs, Model, Plan, Report, Round
from edgemoe.model.hashes import hash_model
from edgemoe.model.inspect import inspect_model
from edgemoe.pipeline.doors import check_needs, check_shards
from edgemoe.pipeline.emit import copy_licences, emit_artifact, fixed_names
from edgemoe.pipeline.output_folder import finish_output, hold_output, open_work, prepare_output
from edgemoe.pipeline.refine import Measured, Measurer, expect, fitted_share, refine_plan
from edgemoe.pipeline.request import BuildRequest, Job, check_loads, check_source, choose_context, prepare, warn_of_context, warn_of_source
from edgemoe.pipeline.store import store_weights
from edgemoe.pipeline.widths import Offer, in_stage, plan_widths, price_cached, solve_request
from edgemoe.plan.solve import sweep_sizes
from edgemoe.price.choices import discount
from edgemoe.stream.engine.traced import complete_model
from edgemoe.stream.texts import DEFAULT_TOKENS, choose_texts
from edgemoe.targets import find_target
from edgemoe.verify.artifact import broken_promises, verify_artifact

CURVE_POINTS = 24


def build_artifact(
    request: BuildRequest, progress: StageProgress = lambda stage, done, total: None, watch: GapProgress = lambda gap: None
) -> Report:
    """Run everything from checkpoint to report, and go on where a killed run stopped.

    Args:
        request: what to build.
        progress: called with (stage, steps done, all steps).
        watch: told how near to the optimum the search for a plan has come.

    Raises:
        EdgemoeError: of every kind in base/errors.py; no half-written file is left under a final name.
    """
    job = prepare(request)
    check_needs(job)
    with hold_output(request.out):
        return _build(complete_job(replace(job, model=hash_model(job.model, in_stage(progress, "hash")))), progress, watch)


def _build(job: Job, progress: StageProgress, watch: GapProgress) -> Report:
    """All stages, in an output folder that no other run works in."""
    request = job.request
    prepare_output(request.out, force=request.force, names=fixed_names(job.target, job.model))
    work = open_work(request.out, request.work)
    offer, plan = plan_widths(job, work, progress, watch)
    job = replace(job, target=find_target(plan.target))  # as the prices settled it
    offer, plan, rounds = refine(job, offer, plan, work, progress, watch)
    save_record(request.out / ".work" / "plan.json", plan)
    check_shards(job.target, offer.narrowed.model, plan.sizes, request.shard_max)
    stored = store_weights(
        job.model,
        job.calibration,
        offer.stats,
        plan,
        work,
        narrowed=offer.narrowed,
        rounding=request.rounding,
        max_tokens=request.calibration_tokens,
        progress=in_stage(progress, "repair"),
    )
    artifact = emit_artifact(
        stored, offer.stats, plan, job.target, request.out, shard_max=request.shard_max, progress=in_stage(progress, "emit")
    )
    artifact = copy_licences(artifact, job.model)
    save_record(request.out / ".work" / "artifact.json", artifact)
    report = verify_artifact(artifact, job.model, plan, job.heldout, job.target, work, progress=in_stage(progress, "verify"))
    warnings = filter(None, (warn_of_context(job.model, job.context), warn_of_source(job.model)))
    report = replace(
        report,
        rounds=rounds,
        frontier=frontier_of((offer.costs, *offer.others), plan.memory["weights"] + sum(plan.sizes[name] for name in plan.vram)),
        model={**report.model, "command": request.command},
        problems=(*report.problems, *(f"note: {warning}" for warning in warnings)),
    )
    finish_output(request.out, report)
    broken = broken_promises(report)
    if broken:
        raise VerifyError(f"{artifact.path.name}: {broken[0]}", hint=f"see {request.out / 'report.html'}; the artifact was kept")
    return report


def complete_job(job: Job) -> Job:
    """The job of a model that is hashed, with what a GGUF's Model lacks; experts of unknown formula are not repaired."""
    model = complete_model(job.model)
    return replace(job, model=model, request=replace(job.request, repair=job.request.repair and model.expert.can_refit))


def open_model(source: str, progress: Progress | None = None) -> Model:
    """The Model of a checkpoint or a GGUF, hashed, and complete.

    Raises:
        EdgemoeError: as `inspect_model` and `complete_model`.
    """
    model = inspect_model(source, progress=progress)
    check_loads(model, choose_context(model, None))
    return complete_model(model)


def refine(
    job: Job, offer: Offer, plan: Plan, work: Path, progress: StageProgress, watch: GapProgress
) -> tuple[Offer, Plan, tuple[Round, ...]]:
    """Refine as often as the request asks: return the offer with rescaled prices, the best measured plan, and the rounds that led to it."""
    request, priced = job.request, offer.costs
    if not request.refine:
        return offer, plan, ()

    def stored_as(plan: Plan, rounding: str = request.rounding) -> Model:
        tokens, stage = request.calibration_tokens, in_stage(progress, "repair")
        known = (job.model, job.calibration, offer.stats, plan, work)
        return store_weights(*known, narrowed=offer.narrowed, rounding=rounding, max_tokens=tokens, progress=stage)

    run = Measurer(
        job.model,
        offer.stats,
        job.calibration,
        job.target,
        work,
        max_tokens=request.calibration_tokens,
        stored_as=stored_as,
        rounding=request.rounding,
        progress=in_stage(progress, "refine"),
    )

    def measure(plan: Plan) -> Measured:
        return expect(plan, run(plan), run.among * fitted_share(plan, priced, request.rounding))

    def solve(costs: Costs) -> Plan:
        return solve_request(request, replace(offer, costs=costs), watch)

    refined = refine_plan(priced, plan, request.refine, solve, measure)
    return replace(offer, costs=refined.costs), refined.plan, refined.rounds


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
    """Calibrate and price a checkpoint with the shipped texts; results that the work folder holds already are not made again.

    Args:
        source: folder of a checkpoint, or a hub id.
        work: folder for statistics and prices.
        context: tokens that the process must have memory for; None: as `choose_context`.
        target: what the plan will be written as.
        calibration_tokens: of all texts together.
        repair: price drops as they are after the repair that `build` does.
        rounding: how the plan's weights will be rounded, "feedback" or "stock".

    Raises:
        EdgemoeError: as `inspect_model`, `collect_stats` and `price_choices`.
    """
    model, chosen = open_model(source), find_target(target)
    check_source(model, chosen.name)
    calibration, _ = choose_texts((), ())
    stats = collect_stats(model, calibration, open_work(work, work), max_tokens=calibration_tokens)
    costs = price_cached(model, stats, chosen, choose_context(model, context), work, None)[0]
    return discount(costs, repair=repair, rounding=rounding)


def frontier_of(priced: Sequence[Costs], weights: int) -> tuple[dict[str, float], ...]:
    """Predicted KL of plans whose weights take from a third of these bytes to twice as many, for the report's picture.

    At each size the best plan over all price lists counts, and none is worse than that of a smaller size.
    """
    largest = max(float((costs.size[-1] + costs.extra[-1]).max(axis=1).sum() + costs.fixed_size[-1]) for costs in priced)
    low, high = weights / 3, min(weights * 2.2, largest)
    sizes = [round(low * (high / low) ** (i / (CURVE_POINTS - 1))) for i in range(CURVE_POINTS)]
    points = sorted((p for costs in priced for p in sweep_sizes(costs, sizes)), key=lambda p: (p["file_size"], p["predicted_kl"]))
    found: list[dict[str, float]] = []
    for point in points:
        if not found or point["predicted_kl"] < found[-1]["predicted_kl"]:
            found.append(point)
    return tuple(found)
