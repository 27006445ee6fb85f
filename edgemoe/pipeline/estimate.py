"""This module estimates the bytes that a build would need, before any work, from a Job, which is a request that passed all checks."""

from __future__ import annotations

from dataclasses import dataclass

from edgemoe.pipeline.request import Job
from edgemoe.price.choices import least_process


@dataclass(frozen=True, slots=True, kw_only=True)
class Needs:
    """The needs of a build; all of them but the context are bytes."""

    least_budget: int
    budget: int
    beside_weights: int  # part of the least budget: cache, buffers, runtime
    context: int
    disk: int  # scratch and artifact together, approximately
    memory_to_build: int  # an approximate upper limit


def estimate_needs(job: Job) -> Needs:
    """The needs of this build, from shapes alone."""
    model, request = job.model, job.request
    largest = max(sum(t.n_weights for t in model.tensors if t.layer == layer) * 4 for layer in range(-1, model.n_layers))
    experts = sum(t.n_bytes for t in model.tensors if t.expert >= 0)
    per_state = request.calibration_tokens * model.hidden_size * 4
    fed_back = request.rounding == "feedback"
    gradients = (model.n_layers + 1) * per_state if fed_back else 0  # while gradients are collected; half of these bytes stay
    streams = gradients // 2 + 7 * per_state + experts if request.repair or fed_back else 2 * per_state
    return Needs(
        least_budget=least_process(job.smallest, job.target, job.context),
        budget=request.memory,
        beside_weights=sum(job.target.memory_parts(job.smallest, job.context).values()),
        context=job.context,
        disk=min(request.memory, model.n_bytes) + max(streams, gradients),
        memory_to_build=(4 if request.repair or fed_back else 2) * largest + 3 * 2**29,
    )
