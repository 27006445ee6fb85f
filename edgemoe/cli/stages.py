"""The stages as commands, each starting from the file that the one before wrote."""

from __future__ import annotations

import json
import shutil
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from edgemoe.base.errors import MachineError
from edgemoe.base.units import format_bytes, parse_bytes
from edgemoe.cli.options import (
    CalibrationOpt,
    ForceOpt,
    JsonOpt,
    ModelArg,
    OutOpt,
    RoundingOpt,
    ShardOpt,
    TokensOpt,
)
from edgemoe.cli.progress import open_model, print_rich, say, show_progress

if TYPE_CHECKING:
    from edgemoe.ir import Model
    from edgemoe.model.gguf_source import GgufSource


SameTextsOpt = Annotated[
    list[str] | None,
    typer.Option(
        "--calibration",
        metavar="FILE[:WEIGHT]",
        help="The texts that STATS were made from, to repair and round on. [default: the shipped mix]",
    ),
]
SameTokensOpt = Annotated[
    int | None,
    typer.Option("--calibration-tokens", metavar="N", min=1024, help="Calibration tokens of all texts together. [default: as STATS]"),
]


def inspect(model: ModelArg, as_json: JsonOpt = False) -> None:
    """What a checkpoint or a GGUF holds, from its headers alone."""
    from edgemoe.model.gguf_source import is_gguf, read_gguf
    from edgemoe.model.inspect import inspect_model

    facts = _gguf_facts(read_gguf(model)) if is_gguf(model) else _facts(inspect_model(model, hashed=False))
    if as_json:
        print(json.dumps(facts, indent=1))
    else:
        say(*(f"{name:18s} {value}" for name, value in facts.items()))


def _facts(model: Model) -> dict[str, Any]:
    experts = sum(t.n_weights for t in model.tensors if t.expert >= 0)
    return {
        "name": model.name,
        "model_type": model.model_type,
        "n_layers": model.n_layers,
        "n_experts": model.n_experts,
        "top_k": model.top_k,
        "expert_size": model.expert.size,
        "hidden_size": model.hidden_size,
        "vocab_size": model.vocab_size,
        "context_length": model.context_length,
        "weights": model.n_weights,
        "in experts": f"{experts / model.n_weights:.1%}",
        "bytes": format_bytes(model.n_bytes),
    }


def _gguf_facts(source: GgufSource) -> dict[str, Any]:
    return {
        "name": source.name,
        "architecture": source.architecture,
        "n_layers": source.n_layers,
        "with experts": len(source.moe_layers),
        "n_experts": source.n_experts,
        "top_k": source.top_k,
        "hidden_size": source.hidden_size,
        "vocab_size": source.vocab_size,
        "context_length": source.context_length,
        "weights": source.n_weights,
        "in experts": f"{source.n_expert_weights / source.n_weights:.1%}",
        "bytes": format_bytes(source.n_bytes),
        "types": ", ".join(f"{kind} {size / source.n_bytes:.1%}" for kind, size in source.bytes_by_type.items()),
    }


def calibrate(
    model: ModelArg, output: OutOpt, calibration: CalibrationOpt = None, calibration_tokens: TokensOpt = 65_536, as_json: JsonOpt = False
) -> None:
    """Watch the original model on text, a layer at a time -> statistics in a subfolder of OUT."""
    from edgemoe.base.ownership import check_outside
    from edgemoe.calibrate.collect import collect_stats
    from edgemoe.stream.texts import choose_texts

    check_outside(model, output)
    texts, _ = choose_texts(calibration or [], [])
    found = open_model(model)
    with show_progress() as progress:
        stats = collect_stats(found, texts, output, max_tokens=calibration_tokens, progress=lambda d, n: progress("calibrate", d, n))
    result = {"stats": stats.folder, "tokens": {d.name: d.tokens for d in stats.domains}, "cold_experts": len(stats.cold)}
    if as_json:
        print(json.dumps(result, indent=1))
    else:
        say(stats.folder, f"tokens {result['tokens']}, {len(stats.cold)} cold experts")


def emit(
    model: ModelArg,
    stats: Annotated[Path, typer.Argument(metavar="STATS", help="Folder that calibrate made.")],
    plan: Annotated[Path, typer.Argument(metavar="PLAN", help="File that plan made.")],
    output: OutOpt,
    calibration: SameTextsOpt = None,
    calibration_tokens: SameTokensOpt = None,
    shard_max: ShardOpt = None,
    rounding: RoundingOpt = "feedback",
    force: ForceOpt = False,
) -> None:
    """Write what a plan says.

    Surviving experts are repaired, and weights rounded, on the texts that STATS were made from: give again what `calibrate` or `build` had
    as --calibration.
    """
    from edgemoe.base.ownership import check_outside
    from edgemoe.base.storage import load_record, save_record
    from edgemoe.ir import Plan, Stats
    from edgemoe.pipeline.doors import check_shards
    from edgemoe.pipeline.emit import check_split, copy_licences, emit_artifact, fixed_names
    from edgemoe.pipeline.output_folder import hold_output, prepare_output
    from edgemoe.pipeline.store import store_weights
    from edgemoe.pipeline.widths import in_stage
    from edgemoe.price.choices import check_rounding
    from edgemoe.stream.texts import DEFAULT_TOKENS, choose_texts, recall_texts
    from edgemoe.targets import find_target

    check_rounding(rounding)
    check_outside(model, output)
    found, chosen = open_model(model), load_record(plan, Plan)
    collected = replace(load_record(stats / "stats.json", Stats), folder=str(stats))
    check_same_model(found.fingerprint, collected.model, stats)
    check_same_model(found.fingerprint, chosen.model, plan)
    target, most = find_target(chosen.target), parse_bytes(shard_max) if shard_max else 0
    check_split(target, most)
    check_shards(target, found, chosen.sizes, most)
    asked = collected.probes and (chosen.repair or rounding != "stock")  # an importance matrix does not say which texts it comes from
    texts = recall_texts(collected, calibration or []) if asked else choose_texts(calibration or [], [])[0]
    with hold_output(output):
        prepare_output(output, force=force, names=fixed_names(target, found))
        with show_progress() as progress:
            known, tokens = (found, texts, collected, chosen, output / ".work"), int(collected.settings.get("max_tokens", DEFAULT_TOKENS))
            tell = in_stage(progress, "repair")
            stored = store_weights(*known, rounding=rounding, max_tokens=calibration_tokens or tokens, progress=tell)
            made_from = (stored, collected, chosen, target, output)
            artifact = emit_artifact(*made_from, shard_max=most, progress=in_stage(progress, "emit"))
        artifact = copy_licences(artifact, found)
        save_record(output / "plan.json", chosen)
        save_record(output / "artifact.json", artifact)
        shutil.rmtree(output / ".work", ignore_errors=True)
    say(*(f"{file.sha256}  {output / file.name}  {file.size}" for file in artifact.files))


def verify(
    model: ModelArg,
    output: Annotated[Path, typer.Argument(metavar="OUT", help="Folder that emit or build made.")],
    heldout: Annotated[
        list[str] | None, typer.Option(metavar="FILE", help="Held-out text to measure on, repeatable. [default: a shipped mix]")
    ] = None,
    as_json: JsonOpt = False,
) -> None:
    """Run an artifact, measure it against the original, and write the report anew."""
    from edgemoe.base.errors import VerifyError
    from edgemoe.base.storage import load_record
    from edgemoe.ir import Plan, Report
    from edgemoe.pipeline.output_folder import check_built, find_artifact, finish_output, hold_output
    from edgemoe.report.terminal import summarize_report
    from edgemoe.stream.texts import choose_texts
    from edgemoe.targets import find_target
    from edgemoe.verify.artifact import broken_promises, verify_artifact

    check_built(output)
    chosen, artifact, found = load_record(output / "plan.json", Plan), find_artifact(output), open_model(model)
    check_same_model(found.fingerprint, chosen.model, output / "plan.json")
    old = load_record(output / "report.json", Report) if (output / "report.json").exists() else None
    _, texts = choose_texts([], heldout or [])
    target = find_target(chosen.target)
    with hold_output(output):
        with show_progress() as progress:
            report = verify_artifact(
                artifact,
                found,
                chosen,
                texts,
                target,
                output / ".work",
                progress=lambda d, n: progress("verify", d, n),
            )
        if old is not None:
            report = replace(report, frontier=old.frontier, model=old.model, rounds=old.rounds)
        finish_output(output, report)
    if as_json:
        print((output / "report.json").read_text(encoding="utf-8"), end="")
    else:
        print_rich(summarize_report(report))
    if broken_promises(report):
        raise VerifyError(f"{artifact.files[0].name}: {broken_promises(report)[0]}")


def report(file: Annotated[Path, typer.Argument(metavar="REPORT", help="A report.json.")], output: OutOpt, force: ForceOpt = False) -> None:
    """Write the page and the model card of a report.json again, and print its summary."""
    from edgemoe.base.ownership import check_replaceable
    from edgemoe.base.storage import load_record
    from edgemoe.ir import Report
    from edgemoe.report.page import PAGES, write_report
    from edgemoe.report.terminal import summarize_report

    loaded = load_record(file, Report)
    check_replaceable([output / name for name in PAGES], force=force)
    output.mkdir(parents=True, exist_ok=True)
    write_report(loaded, output)
    print_rich(summarize_report(loaded))


def doctor(as_json: JsonOpt = False) -> None:
    """What this machine has of what each stage needs, and how to get the rest."""
    from edgemoe.devices.doctor import examine_machine, list_missing

    checks = examine_machine(Path())
    if as_json:
        print(json.dumps([asdict(c) for c in checks], indent=1))
    else:
        for check in checks:
            purpose = f"{check.needed_for}{' of ' + check.target if check.target else ''}"
            say(f"{'ok     ' if check.found else 'MISSING'} {check.name:18s} {check.found or check.remedy:48s} for {purpose}")
    missing = list_missing(checks)
    if missing:
        raise MachineError(f"missing: {', '.join(missing)}")


def check_same_model(expected: str, found: str, where: Path) -> None:
    """Refuse a file of another checkpoint.

    Raises:
        ModelError: names the file.
    """
    from edgemoe.base.errors import ModelError

    if expected != found:
        raise ModelError(f"{where}: was made from another checkpoint", hint="make it again from this one")
