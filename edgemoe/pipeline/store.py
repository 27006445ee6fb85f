"""This module makes the weights of a plan as they will be written: repaired, and rounded with feedback."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from edgemoe.base.progress import Progress
from edgemoe.ir import Model, Plan, Stats
from edgemoe.price.choices import check_rounding
from edgemoe.repair.engine_rounding import round_gguf
from edgemoe.repair.quantize_layer import plan_quantization
from edgemoe.repair.survivors import repair_survivors
from edgemoe.repair.width import Narrowed
from edgemoe.stream.gradients import collect_gradients
from edgemoe.stream.texts import DEFAULT_TOKENS, Text
from edgemoe.targets import find_target


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
    progress: Progress | None = None,
) -> Model:
    """The model as `emit` stores it: kept experts are repaired if the plan was priced so, and matrices are packed if feedback rounds them.

    Args:
        model: the original.
        texts: calibration texts.
        stats: of these texts.
        plan: says which experts stay, and in which formats.
        work: folder for the gradients of the original, which all plans share, and for the new weights.
        narrowed: the narrowed model that is stored, if there is one; `stats` are then of it, and new weights lie in its folder.
        rounding: "feedback" or "stock" (ggml's own, matrix by matrix).
        max_tokens: of all texts together.
        progress: called with (steps done, all steps).

    Raises:
        UsageError: `rounding` is neither.
        ModelError: as `repair_survivors`.
    """
    check_rounding(rounding)
    if model.architecture:
        stays = rounding == "stock" or not stats.probes
        return model if stays else round_gguf(model, texts, stats, plan, work, max_tokens=max_tokens, progress=progress)
    quantize_plan, start = None, narrowed.model if narrowed else model
    backward = 2 * model.n_layers  # steps, once for all plans

    def tell(done: int) -> None:
        if progress:
            progress(done, backward + model.n_layers)

    if rounding == "feedback" and stats.probes:  # statistics from an imatrix come without texts, and then nothing is run
        gradients = collect_gradients(model, texts, work, max_tokens=max_tokens, progress=lambda done, _: tell(done))
        quantize_plan = plan_quantization(start, stats, plan, find_target(plan.target), gradients)
    if not quantize_plan and not plan.repair:
        return start
    return repair_survivors(
        model,
        texts,
        plan,
        narrowed.work if narrowed else work,
        start=start,
        max_tokens=max_tokens,
        quantize_plan=quantize_plan,
        progress=lambda done, _: tell(backward + done),
    )
