"""The command line: parse, call, print.  Results go to stdout, progress and errors to stderr; exit codes are in errors.py."""

from __future__ import annotations

import errno
import json
import os
import shlex
import shutil
import sys
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

# Our own threads do the work; a second layer of threads inside numpy would only make results depend on the number of cores.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import typer

from edgemoe import __version__
from edgemoe.base.errors import EdgemoeError, MachineError
from edgemoe.base.units import format_bytes, parse_bytes
from edgemoe.cli.devices import choose_budget, devices_app
from edgemoe.cli.options import (
    CalibrationOpt,
    ContextOpt,
    DeviceOpt,
    ForceOpt,
    GapOpt,
    HeldoutOpt,
    JsonOpt,
    MemoryOpt,
    ModelArg,
    ObjectiveOpt,
    OutOpt,
    RecipeOpt,
    RoundingOpt,
    RuleOpt,
    ShardOpt,
    SolverOpt,
    TargetOpt,
    TimeOpt,
    TokensOpt,
    TopKOpt,
    WidthOpt,
)
from edgemoe.cli.plan import plan, read_rules
from edgemoe.cli.price import price
from edgemoe.cli.progress import print_rich, show_progress

if TYPE_CHECKING:
    from edgemoe.ir import Model

INTERRUPTED = 130  # exit code
MACHINE_ERRORS = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOMEM}

app = typer.Typer(
    name="edgemoe",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    help="Give a Mixture-of-Experts checkpoint and a memory budget, get the best GGUF (or ONNX) that really fits.\n\n"
    "    edgemoe build Qwen/Qwen3-30B-A3B --memory 16GB -o qwen3-16gb\n\n"
    "`build` does everything; the other commands are its stages, each starting from the file that the one before wrote.",
)
app.add_typer(devices_app, name="devices")


def _version(value: bool) -> None:
    if value:
        print(f"edgemoe {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show tracebacks of errors.")] = False,
) -> None:
    """Options of every command; --debug is read in `main`."""


@app.command()
def build(
    model: ModelArg,
    output: OutOpt,
    memory: MemoryOpt = None,
    device: DeviceOpt = None,
    context: ContextOpt = None,
    target: TargetOpt = "gguf",
    calibration: CalibrationOpt = None,
    calibration_tokens: TokensOpt = 65_536,
    heldout: HeldoutOpt = None,
    recipe: RecipeOpt = None,
    rule: RuleOpt = None,
    objective: ObjectiveOpt = None,
    solver: SolverOpt = "highs",
    gap: GapOpt = 1e-4,
    time_limit: TimeOpt = None,
    shard_max: ShardOpt = None,
    work: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Keep calibration and prices here, to share them between budgets.")
    ] = None,
    repair: Annotated[bool, typer.Option("--repair/--no-repair", help="Refit the surviving experts to what dropped ones leave.")] = True,
    rounding: RoundingOpt = "feedback",
    refine: Annotated[
        int, typer.Option(min=0, metavar="N", help="Measure the plan, rescale its prices, solve again; at most so many times.")
    ] = 0,
    width: WidthOpt = None,
    top_k: TopKOpt = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what it would take, and the least budget; write nothing.")] = False,
    force: ForceOpt = False,
    as_json: JsonOpt = False,
) -> None:
    """Everything: from the checkpoint to a GGUF (or ONNX) that fits the memory, run and measured, with a report.

    A killed build goes on where it stopped when the same command is given again.
    """
    (budget, box), name = choose_budget(memory, device), Path(model).name if Path(model).exists() else model
    rules, aim = read_rules(recipe, rule, objective)
    from edgemoe.pipeline.build import BuildRequest, build_artifact

    request = BuildRequest(
        model=model,
        memory=budget,
        device=box,
        out=output,
        context=context,
        target=target,
        calibration=tuple(calibration or ()),
        calibration_tokens=calibration_tokens,
        heldout=tuple(heldout or ()),
        rules=rules,
        objective=aim,
        solver=solver,
        gap=gap,
        seconds=time_limit,
        shard_max=parse_bytes(shard_max) if shard_max else 0,
        repair=repair,
        rounding=rounding,
        refine=refine,
        width=width or "",
        top_k=top_k,
        work=work,
        force=force,
    )
    told = [*(["--recipe", recipe.name] if recipe else []), *(["--objective", objective] if objective else [])]
    told += [part for text in rule or () for part in ("--rule", text)]
    request = replace(request, command=_command_of(request, name, memory or f"{budget}B", told))
    if dry_run:
        _dry_run(request, as_json=as_json)
        return
    with show_progress() as progress:
        report = build_artifact(request, progress)
    if as_json:
        print((output / "report.json").read_text(encoding="utf-8"), end="")
    else:
        from edgemoe.report.terminal import summarize_report

        print_rich(summarize_report(report))


def _command_of(request: Any, model: str, memory: str, told: list[str]) -> str:
    """The command that makes the same again, as it is published: options where they are not the default, no paths of this machine."""
    usual = {f.name: f.default for f in fields(request)}
    shown = ("target", "context", "calibration_tokens", "solver", "gap", "shard_max", "rounding", "refine", "width", "top_k")
    names = {f"--{name.replace('_', '-')}": name for name in shown} | {"--time-limit": "seconds"}
    given = {option: getattr(request, name) for option, name in names.items() if getattr(request, name) != usual[name]}
    asked = [part for option, value in given.items() for part in (option, f"{value}B" if option == "--shard-max" else str(value))]
    asked += [] if request.repair else ["--no-repair"]
    return shlex.join(["edgemoe", "build", model, "--memory", memory, *asked, *told, "-o", request.out.name])


def _dry_run(request: Any, *, as_json: bool) -> None:
    from edgemoe.model.families import resize_experts
    from edgemoe.model.inspect import inspect_model
    from edgemoe.pipeline.build import check_budget, choose_context, warn_of_context
    from edgemoe.price.choices import least_process
    from edgemoe.repair.width import choose_top_k, choose_widths
    from edgemoe.targets import find_target

    model, target = inspect_model(request.model), find_target(request.target)
    context = choose_context(model, request.context)
    fewest = replace(model, top_k=choose_top_k(model, request.top_k))
    narrowest = resize_experts(fewest, choose_widths(model, request.width, target.FORM)[-1])
    parts = target.memory_parts(narrowest, context)
    least = least_process(narrowest, target, context)
    largest = max(sum(t.n_weights for t in model.tensors if t.layer == layer) * 4 for layer in range(-1, model.n_layers))
    experts = sum(t.n_bytes for t in model.tensors if t.expert >= 0)
    per_state = request.calibration_tokens * model.hidden_size * 4
    fed_back = request.rounding == "feedback"
    gradients = (model.n_layers + 1) * per_state if fed_back else 0  # while they are collected; half of it stays
    streams = gradients // 2 + 7 * per_state + experts if request.repair or fed_back else 2 * per_state
    needs = {
        "least_budget": least,
        "budget": request.memory,
        "beside_weights": sum(parts.values()),
        "context": context,
        "disk": min(request.memory, model.n_bytes) + max(streams, gradients),
        "memory_to_build": (4 if request.repair or fed_back else 2) * largest + 3 * 2**29,
    }
    if as_json:
        print(json.dumps(needs, indent=1))
    else:
        rows = {"budget": needs["budget"], "least budget": least, "of it beside the weights": needs["beside_weights"]}
        rows |= {"disk, about": needs["disk"], "memory while building, at most about": needs["memory_to_build"]}
        print(f"{model.name}: {model.n_experts} experts in {model.n_layers} layers, {format_bytes(model.n_bytes)}; context {context}")
        print("\n".join(f"{name:40s} {format_bytes(size)}" for name, size in rows.items()))
        if warn_of_context(model, context):
            print(f"warning: {warn_of_context(model, context)}", file=sys.stderr)
    check_budget(narrowest, target, context, request.memory)


@app.command()
def inspect(model: ModelArg, as_json: JsonOpt = False) -> None:
    """What a checkpoint holds, from its headers alone."""
    from edgemoe.model.inspect import inspect_model

    found = inspect_model(model)
    facts = _facts(found)
    print(json.dumps(facts, indent=1) if as_json else "\n".join(f"{name:18s} {value}" for name, value in facts.items()))


def _facts(model: Model) -> dict[str, Any]:
    names = ("name", "model_type", "n_layers", "n_experts", "top_k", "expert_size", "hidden_size", "vocab_size", "context_length")
    experts = sum(t.n_weights for t in model.tensors if t.expert >= 0)
    sizes = {"weights": model.n_weights, "in experts": f"{experts / model.n_weights:.1%}", "bytes": format_bytes(model.n_bytes)}
    return {**{n: getattr(model, n) for n in names}, **sizes, "fingerprint": model.fingerprint}


@app.command()
def calibrate(
    model: ModelArg, output: OutOpt, calibration: CalibrationOpt = None, calibration_tokens: TokensOpt = 65_536, as_json: JsonOpt = False
) -> None:
    """Watch the original model on text, a layer at a time -> statistics in a subfolder of OUT."""
    from edgemoe.calibrate.collect import collect_stats
    from edgemoe.model.inspect import inspect_model
    from edgemoe.stream.texts import choose_texts

    texts, _ = choose_texts(calibration or [], [])
    with show_progress() as progress:
        stats = collect_stats(
            inspect_model(model), texts, output, max_tokens=calibration_tokens, progress=lambda d, n: progress("calibrate", d, n)
        )
    result = {"stats": stats.folder, "tokens": {d.name: d.tokens for d in stats.domains}, "cold_experts": len(stats.cold)}
    print(json.dumps(result, indent=1) if as_json else f"{stats.folder}\ntokens {result['tokens']}, {len(stats.cold)} cold experts")


app.command()(price)
app.command()(plan)


@app.command()
def emit(
    model: ModelArg,
    stats: Annotated[Path, typer.Argument(metavar="STATS", help="Folder that calibrate made.")],
    plan: Annotated[Path, typer.Argument(metavar="PLAN", help="File that plan made.")],
    output: OutOpt,
    calibration: Annotated[
        list[str] | None,
        typer.Option(
            metavar="FILE[:WEIGHT]", help="The texts that STATS were made from, to repair and round on. [default: the shipped mix]"
        ),
    ] = None,
    calibration_tokens: Annotated[
        int | None, typer.Option(metavar="N", min=1024, help="Calibration tokens of all texts together. [default: as STATS]")
    ] = None,
    shard_max: ShardOpt = None,
    rounding: RoundingOpt = "feedback",
    force: ForceOpt = False,
) -> None:
    """Write what a plan says.

    Surviving experts are repaired, and weights rounded, on the texts that STATS were made from: give again what `calibrate` or `build` had
    as --calibration.
    """
    from edgemoe.base.storage import load_record, save_record
    from edgemoe.ir import Plan, Stats
    from edgemoe.model.inspect import inspect_model
    from edgemoe.pipeline.build import store_weights
    from edgemoe.pipeline.emit import check_split, emit_artifact
    from edgemoe.pipeline.output_folder import prepare_output
    from edgemoe.price.choices import check_rounding
    from edgemoe.stream.texts import DEFAULT_TOKENS, choose_texts, recall_texts
    from edgemoe.targets import find_target

    check_rounding(rounding)
    found, chosen = inspect_model(model), load_record(plan, Plan)
    collected = replace(load_record(stats / "stats.json", Stats), folder=str(stats))
    _same_model(found.fingerprint, collected.model, stats)
    _same_model(found.fingerprint, chosen.model, plan)
    target, most = find_target(chosen.target), parse_bytes(shard_max) if shard_max else 0
    check_split(target, most)
    asked = collected.probes and (chosen.repair or rounding != "stock")  # an importance matrix does not say which texts it comes from
    texts = recall_texts(collected, calibration or []) if asked else choose_texts(calibration or [], [])[0]
    prepare_output(output, force=force, names=target.FIXED_NAMES)
    with show_progress() as progress:
        stored = store_weights(
            found,
            texts,
            collected,
            chosen,
            output / ".work",
            rounding=rounding,
            max_tokens=calibration_tokens or int(collected.settings.get("max_tokens", DEFAULT_TOKENS)),
            progress=lambda d, n: progress("repair", d, n),
        )
        artifact = emit_artifact(
            stored,
            collected,
            chosen,
            target,
            output,
            shard_max=most,
            progress=lambda d, n: progress("emit", d, n),
        )
    save_record(output / "plan.json", chosen)
    save_record(output / "artifact.json", artifact)
    shutil.rmtree(output / ".work", ignore_errors=True)
    print("\n".join(f"{file.sha256}  {output / file.name}  {file.size}" for file in artifact.files))


@app.command()
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
    from edgemoe.model.inspect import inspect_model
    from edgemoe.pipeline.output_folder import find_artifact, finish_output
    from edgemoe.report.terminal import summarize_report
    from edgemoe.stream.texts import choose_texts
    from edgemoe.targets import find_target
    from edgemoe.verify.artifact import broken_promises, verify_artifact

    found, chosen = inspect_model(model), load_record(output / "plan.json", Plan)
    _same_model(found.fingerprint, chosen.model, output / "plan.json")
    artifact = find_artifact(output)
    old = load_record(output / "report.json", Report) if (output / "report.json").exists() else None
    _, texts = choose_texts([], heldout or [])
    target = find_target(chosen.target)
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


@app.command()
def report(file: Annotated[Path, typer.Argument(metavar="REPORT", help="A report.json.")], output: OutOpt) -> None:
    """Write the page and the model card of a report.json again, and print its summary."""
    from edgemoe.base.storage import load_record
    from edgemoe.ir import Report
    from edgemoe.report.page import write_report
    from edgemoe.report.terminal import summarize_report

    loaded = load_record(file, Report)
    output.mkdir(parents=True, exist_ok=True)
    write_report(loaded, output)
    print_rich(summarize_report(loaded))


@app.command()
def doctor(as_json: JsonOpt = False) -> None:
    """What this machine has of what each stage needs, and how to get the rest."""
    from edgemoe.devices.doctor import examine_machine, list_missing

    checks = examine_machine(Path())
    if as_json:
        print(json.dumps([asdict(c) for c in checks], indent=1))
    else:
        for check in checks:
            purpose = f"{check.needed_for}{' of ' + check.target if check.target else ''}"
            print(f"{'ok     ' if check.found else 'MISSING'} {check.name:18s} {check.found or check.remedy:48s} for {purpose}")
    missing = list_missing(checks)
    if missing:
        raise MachineError(f"missing: {', '.join(missing)}")


def _same_model(expected: str, found: str, where: Path) -> None:
    from edgemoe.base.errors import ModelError

    if expected != found:
        raise ModelError(f"{where}: was made from another checkpoint", hint="make it again from this one")


def main() -> None:
    """Run the command line; every error becomes one line and an exit code."""
    try:
        app()
    except (Exception, KeyboardInterrupt) as error:
        if "--debug" in sys.argv:
            raise
        _fail(*_explain(error))
    except SystemExit as stop:
        if stop.code == INTERRUPTED:  # what typer makes of Ctrl-C
            _fail(*_explain(KeyboardInterrupt()))
        raise


def _explain(error: BaseException) -> tuple[str, str, int]:
    """An error as message, hint and exit code."""
    if isinstance(error, EdgemoeError):
        return str(error), error.hint, error.exit_code
    if isinstance(error, KeyboardInterrupt):
        return "interrupted", "give the same command again to go on", INTERRUPTED
    if isinstance(error, ImportError):
        return f"a package is missing: {error}", "run `edgemoe doctor`", MachineError.exit_code
    if isinstance(error, OSError):
        machine = error.errno in MACHINE_ERRORS
        return str(error), "free some space or choose another folder" if machine else "", MachineError.exit_code if machine else 1
    if isinstance(error, MemoryError):
        return "this machine has too little memory", "close other programs, or use a larger machine", MachineError.exit_code
    return f"internal: {type(error).__name__}: {error}", "please report this; --debug shows where", 1


def _fail(message: str, hint: str, code: int) -> None:
    print(f"error: {message}", file=sys.stderr)
    if hint:
        print(f"hint: {hint}", file=sys.stderr)
    sys.stdout.flush()
    sys.exit(code)
