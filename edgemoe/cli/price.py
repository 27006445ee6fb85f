"""`edgemoe price`: from what calibration measured, or from files that people already have."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from edgemoe.base.errors import ModelError, UsageError
from edgemoe.cli.options import ContextOpt, DtypeOpt, ForceOpt, KvBitsOpt, KvSizeOpt, ModelArg, OutOpt, TargetOpt, settled_target
from edgemoe.cli.progress import open_model, say, show_progress

if TYPE_CHECKING:
    from edgemoe.calibrate.imatrix import Imatrix
    from edgemoe.ir import Costs, Model, Stats
    from edgemoe.price.priors import Saliency
    from edgemoe.targets import Target


def price(
    model: ModelArg,
    output: OutOpt,
    stats: Annotated[Path | None, typer.Argument(metavar="STATS", help="Folder that calibrate made (with stats.json).")] = None,
    imatrix: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Instead of STATS: an importance matrix that llama-imatrix made (GGUF).")
    ] = None,
    saliency: Annotated[
        Path | None, typer.Option(metavar="CSV", help="With --imatrix: scores of experts, layer,expert,score[,domain]; larger means keep.")
    ] = None,
    score: Annotated[
        str | None, typer.Option(metavar="NAME", help="With STATS, a control: drop by a published score, as reap, energy or frequency.")
    ] = None,
    context: ContextOpt = None,
    target: TargetOpt = "gguf",
    dtype: DtypeOpt = None,
    kv_bits: KvBitsOpt = None,
    max_kv_size: KvSizeOpt = None,
    force: ForceOpt = False,
) -> None:
    """Nats and bytes of every choice -> a costs file.

    With --imatrix nothing is calibrated: less exact prices, from files that exist, and statistics for `emit` in a folder beside OUT.
    """
    _check_together(stats, imatrix, saliency, score)
    from edgemoe.base.ownership import check_outside, check_replaceable
    from edgemoe.base.storage import save_record
    from edgemoe.calibrate.imatrix import read_imatrix
    from edgemoe.model.inspect import inspect_model
    from edgemoe.pipeline.request import check_source, choose_context
    from edgemoe.price.imported import read_saliency
    from edgemoe.price.saliency import check_score
    from edgemoe.targets import find_target

    if output.suffix == ".safetensors":
        raise UsageError(f"{output}: the prices are JSON, with their arrays beside them", hint="choose a name such as costs.json")
    check_outside(model, output)
    check_replaceable([output], force=force, record="Costs")
    check_replaceable([output.with_suffix(".safetensors")], force=force)
    chosen = find_target(settled_target(target, dtype, kv_bits, max_kv_size))
    if score is not None:
        check_score(score, chosen.form)
    if imatrix is not None:  # files of the user are read before all tensors are hashed
        headers = inspect_model(model, hashed=False)
        read = read_imatrix(imatrix, headers), read_saliency(saliency, headers) if saliency else None
    found = open_model(model)
    check_source(found, chosen.name)
    tokens = choose_context(found, context)
    notes = []
    if imatrix is not None:
        costs, collected = _price_imported(found, *read, output.parent, chosen, tokens)
        notes = [f"{collected.folder}: statistics for `edgemoe emit`, {len(collected.cold)} cold experts"]
        say(f"note: {costs.origin}", error=True)
    else:
        assert stats is not None
        costs = _price_measured(found, stats, chosen, tokens, score)
    save_record(output, costs)
    say(f"{output}: {len(costs.units)} units, {len(costs.counts)} kept counts, kappa {costs.kappa:.4f}", *notes)


def _check_together(stats: Path | None, imatrix: Path | None, saliency: Path | None, score: str | None) -> None:
    """Refuse options that have no meaning beside each other.

    Raises:
        UsageError: names the option.
    """
    if (stats is None) == (imatrix is None):
        hint = "STATS from `edgemoe calibrate` prices best; --imatrix FILE needs no calibration"
        raise UsageError("give exactly one of STATS and --imatrix", hint=hint)
    if saliency is not None and imatrix is None:
        raise UsageError("--saliency goes with --imatrix: STATS already say what each expert is worth", hint="leave --saliency out")
    if score is not None and stats is None:
        raise UsageError("--score goes with STATS", hint="with --imatrix, give your scores with --saliency")


def _price_measured(model: Model, folder: Path, target: Target, context: int, score: str | None) -> Costs:
    from edgemoe.base.storage import load_record
    from edgemoe.ir import Stats
    from edgemoe.price.choices import price_choices
    from edgemoe.price.saliency import drops_by_score

    stats = replace(load_record(folder / "stats.json", Stats), folder=str(folder))
    if stats.model != model.fingerprint:
        raise ModelError(f"{folder}: was made from another checkpoint", hint="make it again from this one")
    with show_progress() as progress:
        costs = price_choices(model, stats, target, context, lambda done, total: progress("price", done, total))
    return drops_by_score(costs, stats, score) if score else costs


def _price_imported(
    model: Model, imatrix: Imatrix, scores: Saliency | None, work: Path, target: Target, context: int
) -> tuple[Costs, Stats]:
    """Prices, and the statistics that `emit` needs."""
    from edgemoe.calibrate.imatrix import save_imported_stats
    from edgemoe.price.imported import price_imported

    stats = save_imported_stats(imatrix, model, work)
    with show_progress() as progress:
        return price_imported(model, stats, target, context, scores, lambda done, total: progress("price", done, total)), stats
