"""This module finds the best plan over the expert widths that are tried."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from edgemoe.base.errors import BudgetError, UnsolvedError
from edgemoe.base.progress import GapProgress, Progress, StageProgress
from edgemoe.base.storage import hash_file, load_record, save_record
from edgemoe.base.work import key_of, open_or_make, path_of
from edgemoe.calibrate.collect import collect_stats
from edgemoe.ir import Costs, Model, Plan, Stats
from edgemoe.pipeline.request import BuildRequest, Job
from edgemoe.plan.solve import solve_plan
from edgemoe.price.choices import discount, price_choices
from edgemoe.repair.survivors import EPOCHS
from edgemoe.repair.width import FEW_BITS, Narrowed, charge, narrow_experts
from edgemoe.targets import Target

HUGE = 2**60  # bytes, more than any other tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class Offer:
    """The experts at one width: their weights, where these lie, their statistics, and their prices."""

    narrowed: Narrowed
    stats: Stats
    costs: Costs
    costs_hash: str
    others: tuple[Costs, ...] = ()  # the prices at the other widths that were tried


def in_stage(progress: StageProgress, name: str) -> Progress:
    """The Progress of one stage, which reports to `progress`."""
    return lambda done, total: progress(name, done, total)


def plan_widths(job: Job, work: Path, progress: StageProgress, watch: GapProgress = lambda gap: None) -> tuple[Offer, Plan]:
    """The plan with the least predicted KL over all widths (falling) that are tried, and the offer that it was made from.

    If narrowing to a width alone costs more than a plan that was found, neither this width nor a smaller one is calibrated.  If the user
    asked for no width, none is tried where the plan at the whole width has enough bits a weight.

    Raises:
        BudgetError: no plan fits at any width; the message names the bytes that the narrowest width needs.
    """
    request, model, target, texts, top_k = job.request, job.model, job.target, job.calibration, job.top_k
    best: tuple[Offer, Plan] | None = None
    priced: list[Costs] = []
    refused: list[BudgetError | UnsolvedError] = []
    for width in job.widths:
        name, tokens = (f" {width}" if width < model.expert.size else ""), request.calibration_tokens
        epochs = EPOCHS if request.repair else 0 if name else -1
        tell = in_stage(progress, f"narrow{name}" if name else f"top-{top_k}")
        narrowed = narrow_experts(model, texts, width, work, top_k=top_k, max_tokens=tokens, epochs=epochs, progress=tell)
        if best and narrowed.loss(best[0].costs, request.objective) >= promised_kl(*best):
            break
        stats = collect_stats(narrowed.model, texts, narrowed.work, max_tokens=tokens, progress=in_stage(progress, f"calibrate{name}"))
        costs, key = price_cached(narrowed.model, stats, target, job.context, narrowed.work, in_stage(progress, f"price{name}"))
        costs = charge(discount(costs, repair=request.repair, rounding=request.rounding), narrowed)
        costs = offered_here(costs, narrowed.model, target, request)
        priced.append(costs)
        offer = Offer(narrowed=narrowed, stats=stats, costs=costs, costs_hash=key)
        try:
            plan = solve_request(request, offer, watch)
        except (BudgetError, UnsolvedError) as error:
            refused.append(error)
            continue
        if best is None or promised_kl(offer, plan) < promised_kl(*best):
            best = offer, plan
        if not request.width and 8 * plan.file_size >= FEW_BITS * model.n_weights:
            break
    if best is None:
        raise refused[-1]
    offer, plan = best
    return replace(offer, others=tuple(costs for costs in priced if costs is not offer.costs)), plan


def offered_here(costs: Costs, model: Model, target: Target, request: BuildRequest) -> Costs:
    """The prices without the formats in which a unit is too large for the request's device, or for a file of --shard-max bytes."""
    costs = target.on_device(costs, request.device) if request.device else costs
    if not request.shard_max or target.least_shard is None:
        return costs
    beside = target.least_shard(model, {"": HUGE})[0] - HUGE  # what a file holds beside its largest unit
    return replace(costs, cost=np.where(costs.size + beside > request.shard_max, np.inf, costs.cost))


def solve_request(request: BuildRequest, offer: Offer, watch: GapProgress) -> Plan:
    """The best plan for these prices under the request's rules and objective."""
    plan = solve_plan(
        offer.costs,
        request.memory,
        rules=request.rules,
        objective=request.objective,
        solver=request.solver,
        gap=request.gap,
        seconds=request.seconds,
        watch=watch,
    )
    return replace(plan, costs=offer.costs_hash)


def promised_kl(offer: Offer, plan: Plan) -> float:
    """KL that the plan's objective is predicted to have: the mean, or the worst domain's."""
    return offer.costs.predict_kl(max(plan.domain_q.values())) if plan.objective == "worst" else plan.predicted_kl


def price_cached(model: Model, stats: Stats, target: Target, context: int, work: Path, progress: Progress | None) -> tuple[Costs, str]:
    """Costs and their hash, from the work folder if they are there, else priced now."""
    path = path_of(work, "costs", key_of("costs", stats.key, target.name, target.offered, context), ".json")

    def make() -> Costs:
        save_record(path, price_choices(model, stats, target, context, progress))
        return load_record(path, Costs)

    return open_or_make(path, lambda: load_record(path, Costs) if path.exists() else None, make), hash_file(path)
