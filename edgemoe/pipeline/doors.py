"""This module makes the checks of a request that need figures: its budget, its rules, its shards, and the space on the disk.

`build` and `--dry-run` share them.  Rules are tried on generic prices, whose bytes are those of the model: a rule that no plan keeps there
cannot be kept after hours of calibration.
"""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from edgemoe.base.errors import BudgetError, MachineError, UnsolvedError, UsageError
from edgemoe.base.units import format_bytes
from edgemoe.ir import Costs, Model
from edgemoe.model.describe import resize_experts
from edgemoe.pipeline.estimate import estimate_needs
from edgemoe.pipeline.request import Job
from edgemoe.pipeline.widths import offered_here
from edgemoe.plan.infeasible import explain_infeasible, least_of_task
from edgemoe.plan.task import make_task
from edgemoe.price.choices import least_process
from edgemoe.price.priors import price_generic
from edgemoe.rules import apply_rules
from edgemoe.rules.constraints import Constraints
from edgemoe.solvers.effort import Effort, deadline
from edgemoe.targets import Target, count_bytes

LOOK = 20.0  # seconds in which the rules must be tried
DISK_SHARE = 0.9  # of the estimated bytes, without which a build does not begin


def check_needs(job: Job) -> None:
    """Refuse what no plan can meet, or this disk cannot hold, before hours of work.

    Raises:
        BudgetError: no plan fits the budget, or keeps the rules; names the least budget, or the rules.
        UsageError: a rule names something that the model lacks, or --shard-max is below the smallest form of a tensor.
        ModelError: the device can hold no form of a tensor.
        MachineError: the disk has too little space.
    """
    least, budget = least_process(job.smallest, job.target, job.context), job.request.memory
    if budget < least:
        name = job.model.name
        raise BudgetError(
            f"{name} at context {job.context} needs at least {format_bytes(least)} ({least} bytes); the budget is {format_bytes(budget)}",
            hint=f"ask for --memory {least}B or more, or a smaller --context",
        )
    check_shards(job.target, job.smallest, least_sizes(job.smallest, job.target), job.request.shard_max)
    check_device(job)
    check_rules(job)
    check_disk(job)


def check_device(job: Job) -> None:
    """Refuse a box that can hold no form of one of the tensors.

    Raises:
        ModelError: names the tensor.
    """
    if job.request.device:
        job.target.on_device(price_generic(job.smallest, job.target, job.context), job.request.device)


# ------------------------------------------------------------------------------------------------------------------- rules
def check_rules(job: Job) -> None:
    """Refuse rules that no plan keeps, on the bytes of the model at every width that is tried.

    Rules that depend on how experts are used are left out, because only calibration knows that.

    Raises:
        UsageError: a rule names something that the model lacks.
        BudgetError: no plan keeps the rules within the budget.
    """
    refused: BudgetError | None = None
    for width in job.widths:
        refused = _refuse_at_width(job, resize_experts(job.model.with_top_k(job.top_k), width)) if job.request.rules else None
        if refused is None:
            return
    if refused is not None:
        raise refused


def _refuse_at_width(job: Job, model: Model) -> BudgetError | None:
    request = job.request
    costs = _with_domains(price_generic(model, job.target, job.context), [t.name for t in job.calibration])
    costs = offered_here(costs, model, job.target, request)
    apply_rules(costs, request.rules)  # names are checked for all of them
    rules = [rule for rule in request.rules if not _needs_usage(apply_rules(costs, [rule]))]
    task = make_task(costs, apply_rules(costs, rules), Effort(until=deadline(LOOK)))
    try:
        least = least_of_task(task)
        return explain_infeasible(task, request.memory, rules) if least is None or least > request.memory else None
    except UnsolvedError:
        return None  # nothing is proven


def _needs_usage(constraints: Constraints) -> bool:
    """Whether a rule weighs experts, or bytes of single experts, by how they are used."""
    for bound in constraints.bounds:
        weights = bound.expression.keep
        if (weights != np.round(weights)).any() or (constraints.costs.form == "experts" and bound.expression.active.any()):
            return True
    return False


def _with_domains(costs: Costs, names: Sequence[str]) -> Costs:
    """Generic prices under the names of the calibration texts, which rules may name; every domain has the prices of the first."""

    def repeat(values: np.ndarray) -> np.ndarray:
        return np.repeat(values[:1], len(names), axis=0)

    return replace(
        costs,
        domains=tuple(names),
        domain_weights=(1 / len(names),) * len(names),
        factor=repeat(costs.factor),
        drop_cost=repeat(costs.drop_cost),
        expert_drop=repeat(costs.expert_drop),
        usage=repeat(costs.usage),
    )


# ------------------------------------------------------------------------------------------------------------------ shards
def least_sizes(model: Model, target: Target) -> dict[str, int]:
    """Bytes of every unit in its smallest format, with the fewest experts that a plan can keep."""
    units = target.list_units(model)
    sizes = count_bytes(model, target, units, (model.n_experts if target.form == "experts" else model.top_k,))
    least = np.where(sizes.offered, sizes.size[0], np.iinfo(np.int64).max).min(axis=1)
    return {unit.name: int(size) for unit, size in zip(units, least, strict=True)}


def check_shards(target: Target, model: Model, sizes: dict[str, int], shard_max: int) -> None:
    """Refuse a --shard-max that is smaller than a tensor of these bytes with the header of its file.

    Raises:
        UsageError: names the tensor and the least size.
    """
    if not shard_max or target.least_shard is None:
        return
    least, name = target.least_shard(model, sizes)
    if shard_max < least:
        what = f"--shard-max {shard_max}B: {name} and the header of its file take {format_bytes(least)}"
        raise UsageError(what, hint=f"give --shard-max {least}B or more")


# -------------------------------------------------------------------------------------------------------------------- disk
def check_disk(job: Job) -> None:
    """Refuse a disk that cannot hold scratch and artifact; what a killed run left there counts as had.

    Raises:
        MachineError: names the folder, the bytes that are free, and those that are needed.
    """
    request, needed = job.request, estimate_needs(job).disk
    work = request.work or request.out / ".work"
    there = sum(f.stat().st_size for folder in {work, request.out / ".work"} if folder.is_dir() for f in folder.rglob("*") if f.is_file())
    place = next(p for p in (work.absolute(), *work.absolute().parents) if p.exists())
    usage = shutil.disk_usage(place)
    free = usage.free
    if usage.total and free + there < DISK_SHARE * needed:
        what = f"{place}: {format_bytes(free)} free, the build needs about {format_bytes(needed)}"
        raise MachineError(what, hint="free some space, or choose another -o and --work")
