"""This module refits the experts that a Plan keeps, packs all matrices in the same pass, and gives the new Model (docs/pricing.md, 10)."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from edgemoe.base.errors import ModelError
from edgemoe.base.progress import Progress
from edgemoe.base.work import key_of, open_or_make, path_of
from edgemoe.ir import Model, Plan
from edgemoe.model.overlay import open_overlay, save_overlay
from edgemoe.repair.experts import RATE, RIDGE
from edgemoe.repair.quantize_layer import QuantizePlan
from edgemoe.repair.quantize_steps import quantize_output
from edgemoe.repair.reconstruct import refit_layer, resume
from edgemoe.repair.two_streams import DOMAIN_POWER, GUARD_EVERY, TwoStreams
from edgemoe.stream.layers import default_device
from edgemoe.stream.texts import DEFAULT_TOKENS, Text, texts_key
from edgemoe.stream.windows import WINDOW

EPOCHS = 4  # of descent; docs/decisions/0005-repair.md lists what was tried instead


def repair_survivors(
    model: Model,
    texts: Sequence[Text],
    plan: Plan,
    work: Path,
    *,
    start: Model | None = None,
    max_tokens: int = DEFAULT_TOKENS,
    epochs: int = EPOCHS,
    quantize_plan: QuantizePlan | None = None,
    progress: Progress | None = None,
) -> Model:
    """Refit the experts that the plan keeps, and pack every matrix in the same pass; without drops and quantize_plan, return the model.

    Args:
        model: the original, from `inspect_model`, to whose outputs the survivors are fitted.
        texts: calibration texts with weights.
        plan: says which experts stay; its formats matter for quantize_plan only.
        work: folder for the new weights (in a subfolder named by a hash of the inputs) and for the state of a killed run.
        start: the model whose experts are refitted, if it is not the original: a narrowed one, in a work folder of its own.
        max_tokens: of all texts together; every text gives the same number.
        epochs: of descent after the closed form; 0 refits W_down alone.
        quantize_plan: if given, every matrix is packed in its format when the stream reaches it (see `quantize_layer.py`).
        progress: called with (layers done, all layers).

    Returns:
        The starting model's record with the survivors' tensors (or all that were packed) in files of the work folder.

    Raises:
        ModelError: the plan belongs to another model, or the texts give no tokens.
    """
    base = start or model
    if plan.model != model.fingerprint:
        raise ModelError(f"the plan was made for another checkpoint than {model.folder}", hint="make a new plan, or give the right folder")
    plan.check_experts(base)
    if not quantize_plan and all(len(kept) == model.n_experts for kept in plan.kept):
        return base
    if quantize_plan and not plan.repair:
        epochs = -1
    fit = (WINDOW, max_tokens, GUARD_EVERY, epochs, RATE, RIDGE, DOMAIN_POWER, default_device(), plan.width, plan.top_k)
    made_for = (quantize_plan.stats.key, plan.formats, f"{quantize_plan.flip_weight:.6g}") if quantize_plan else None
    key = key_of("repair", model.fingerprint, texts_key(texts), plan.kept, fit, made_for)
    folder = path_of(work.absolute(), "repair", key)
    formats = quantize_plan.formats if quantize_plan else {}

    def make() -> Model:
        streams = TwoStreams(model, base, texts, max_tokens, folder, key, quantize_plan)
        for layer in resume(streams, progress):
            refit_layer(streams, layer, plan.kept_of.get(layer, ()), epochs=epochs)
            if progress:
                progress(layer + 1, model.n_layers)
        quantize_output(streams)
        return save_overlay(base, folder, formats)

    return open_or_make(folder, lambda: open_overlay(base, folder, formats), make)
