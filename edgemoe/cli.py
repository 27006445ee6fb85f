"""The command line: parse, call, print.  Results go to stdout, progress and errors to stderr; exit codes are in errors.py."""

from __future__ import annotations

import errno
import json
import os
import shlex
import shutil
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

# Our own threads do the work; a second layer of threads inside numpy would only make results depend on the number of cores.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import typer

from edgemoe import __version__
from edgemoe.errors import EdgemoeError, MachineError
from edgemoe.units import format_bytes, format_seconds, parse_bytes

if TYPE_CHECKING:
    from edgemoe.ir import Model
    from edgemoe.pipeline import Progress

INTERRUPTED = 130  # exit code
MACHINE_ERRORS = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOMEM}

app = typer.Typer(
    name="edgemoe",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    help="Give a Mixture-of-Experts checkpoint and a memory budget, get the best GGUF that really fits.\n\n"
    "    edgemoe build Qwen/Qwen3-30B-A3B --memory 16GB -o qwen3-16gb\n\n"
    "`build` does everything; the other commands are its stages, each starting from the file that the one before wrote.",
)
ModelArg = Annotated[
    str, typer.Argument(metavar="MODEL", help="Folder of a Hugging Face checkpoint, or a hub id such as Qwen/Qwen3-30B-A3B.")
]
MemoryOpt = Annotated[
    str, typer.Option("--memory", metavar="SIZE", help="Most that the running process may hold: 128GB (10^9), 119.2GiB (2^30), 123456B.")
]
ContextOpt = Annotated[
    int | None, typer.Option("--context", metavar="N", help="Tokens of context to leave room for. [default: 8192, or what the model has]")
]
CalibrationOpt = Annotated[
    list[str] | None,
    typer.Option(metavar="FILE[:WEIGHT]", help="Calibration text (UTF-8 or JSONL with 'text'), repeatable. [default: a shipped mix]"),
]
HeldoutOpt = Annotated[
    list[str] | None,
    typer.Option(
        metavar="FILE", help="Held-out text to measure on, repeatable. [default: last tenth of the calibration files, or a shipped mix]"
    ),
]
TokensOpt = Annotated[int, typer.Option("--calibration-tokens", metavar="N", min=1024, help="Calibration tokens of all texts together.")]
SolverOpt = Annotated[str, typer.Option("--solver", help="highs, cbc, or exhaustive (tiny programs).")]
GapOpt = Annotated[float, typer.Option("--gap", min=0, help="Relative distance to the optimum that is good enough.")]
JsonOpt = Annotated[bool, typer.Option("--json", help="Print the result as JSON.")]
OutOpt = Annotated[Path, typer.Option("-o", "--output", metavar="OUT", help="Where the result goes.")]
ForceOpt = Annotated[bool, typer.Option("--force", help="Replace what edgemoe wrote to OUT before.")]
ShardOpt = Annotated[str | None, typer.Option("--shard-max", metavar="SIZE", help="Split the GGUF into files of at most this size.")]


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
    memory: MemoryOpt,
    output: OutOpt,
    context: ContextOpt = None,
    target: Annotated[str, typer.Option(help="What to write: gguf.")] = "gguf",
    calibration: CalibrationOpt = None,
    calibration_tokens: TokensOpt = 65_536,
    heldout: HeldoutOpt = None,
    solver: SolverOpt = "highs",
    gap: GapOpt = 1e-4,
    shard_max: ShardOpt = None,
    work: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Keep calibration and prices here, to share them between budgets.")
    ] = None,
    repair: Annotated[bool, typer.Option("--repair/--no-repair", help="Refit the surviving experts to what dropped ones leave.")] = True,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what it would take, and the least budget; write nothing.")] = False,
    force: ForceOpt = False,
    as_json: JsonOpt = False,
) -> None:
    """Everything: from the checkpoint to a GGUF that fits the memory, run and measured, with a report.

    A killed build goes on where it stopped when the same command is given again.
    """
    from edgemoe.pipeline import BuildRequest, build_artifact

    request = BuildRequest(
        model=model,
        memory=parse_bytes(memory),
        out=output,
        context=context,
        target=target,
        calibration=tuple(calibration or ()),
        calibration_tokens=calibration_tokens,
        heldout=tuple(heldout or ()),
        solver=solver,
        gap=gap,
        shard_max=parse_bytes(shard_max) if shard_max else 0,
        repair=repair,
        work=work,
        force=force,
        command=shlex.join(
            ["edgemoe", "build", Path(model).name if Path(model).exists() else model, "--memory", memory, "-o", output.name]
        ),
    )
    if dry_run:
        _dry_run(request, as_json=as_json)
        return
    with _progress() as progress:
        report = build_artifact(request, progress)
    if as_json:
        print((output / "report.json").read_text(encoding="utf-8"), end="")
    else:
        from edgemoe.report import summarize_report

        _print(summarize_report(report))


def _dry_run(request: Any, *, as_json: bool) -> None:
    from edgemoe.inspect import inspect_model
    from edgemoe.pipeline import check_budget, choose_context
    from edgemoe.price import least_process
    from edgemoe.targets import find_target

    model, target = inspect_model(request.model), find_target(request.target)
    context = choose_context(model, request.context)
    parts = target.memory_parts(model, context)
    least = least_process(model, target, context)
    largest = max(sum(t.n_weights for t in model.tensors if t.layer == layer) * 4 for layer in range(-1, model.n_layers))
    needs = {
        "least_budget": least,
        "budget": request.memory,
        "beside_weights": sum(parts.values()),
        "context": context,
        "disk": min(request.memory, model.n_bytes) + request.calibration_tokens * model.hidden_size * 8,
        "memory_to_build": 2 * largest + 3 * 2**29,
    }
    if as_json:
        print(json.dumps(needs, indent=1))
    else:
        rows = {"budget": needs["budget"], "least budget": least, "of it beside the weights": needs["beside_weights"]}
        rows |= {"disk, about": needs["disk"], "memory while building, at most about": needs["memory_to_build"]}
        print(f"{model.name}: {model.n_experts} experts in {model.n_layers} layers, {format_bytes(model.n_bytes)}; context {context}")
        print("\n".join(f"{name:40s} {format_bytes(size)}" for name, size in rows.items()))
    check_budget(model, target, context, request.memory)


@app.command()
def inspect(model: ModelArg, as_json: JsonOpt = False) -> None:
    """What a checkpoint holds, from its headers alone."""
    from edgemoe.inspect import inspect_model

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
    from edgemoe.calibrate import collect_stats
    from edgemoe.inspect import inspect_model
    from edgemoe.texts import choose_texts

    texts, _ = choose_texts(calibration or [], [])
    with _progress() as progress:
        stats = collect_stats(
            inspect_model(model), texts, output, max_tokens=calibration_tokens, progress=lambda d, n: progress("calibrate", d, n)
        )
    result = {"stats": stats.folder, "tokens": {d.name: d.tokens for d in stats.domains}, "cold_experts": len(stats.cold)}
    print(json.dumps(result, indent=1) if as_json else f"{stats.folder}\ntokens {result['tokens']}, {len(stats.cold)} cold experts")


@app.command()
def price(
    model: ModelArg,
    stats: Annotated[Path, typer.Argument(metavar="STATS", help="Folder that calibrate made (with stats.json).")],
    output: OutOpt,
    context: ContextOpt = None,
    target: str = "gguf",
) -> None:
    """Nats and bytes of every choice -> a costs file."""
    from edgemoe.inspect import inspect_model
    from edgemoe.ir import Stats, load_record, save_record
    from edgemoe.pipeline import choose_context
    from edgemoe.price import price_choices
    from edgemoe.targets import find_target

    found = inspect_model(model)
    collected = replace(load_record(stats / "stats.json", Stats), folder=str(stats))
    _same_model(found.fingerprint, collected.model, stats)
    with _progress() as progress:
        costs = price_choices(found, collected, find_target(target), choose_context(found, context), lambda d, n: progress("price", d, n))
    save_record(output, costs)
    print(f"{output}: {len(costs.units)} units, {len(costs.counts)} kept counts, kappa {costs.kappa:.4f}")


@app.command()
def plan(
    costs: Annotated[Path, typer.Argument(metavar="COSTS", help="File that price made.")],
    memory: MemoryOpt,
    output: Annotated[Path | None, typer.Option("-o", "--output", metavar="OUT", help="Write the plan here.")] = None,
    solver: SolverOpt = "highs",
    gap: GapOpt = 1e-4,
    as_json: JsonOpt = False,
) -> None:
    """Solve for the best plan within a budget: which experts stay, and the format of every tensor."""
    from edgemoe.ir import Costs, hash_file, load_record, save_record
    from edgemoe.plan import solve_plan

    solved = solve_plan(load_record(costs, Costs), parse_bytes(memory), solver=solver, gap=gap, costs_hash=hash_file(costs))
    if output:
        save_record(output, solved)
    if as_json:
        print(json.dumps(asdict(solved), indent=1))
    else:
        from edgemoe.report import summarize_plan

        _print(summarize_plan(solved))


@app.command()
def emit(
    model: ModelArg,
    stats: Annotated[Path, typer.Argument(metavar="STATS", help="Folder that calibrate made.")],
    plan: Annotated[Path, typer.Argument(metavar="PLAN", help="File that plan made.")],
    output: OutOpt,
    shard_max: ShardOpt = None,
    force: ForceOpt = False,
) -> None:
    """Write what a plan says."""
    from edgemoe.emit import emit_artifact
    from edgemoe.inspect import inspect_model
    from edgemoe.ir import Plan, Stats, load_record, save_record
    from edgemoe.pipeline import prepare_output
    from edgemoe.targets import find_target

    found, chosen = inspect_model(model), load_record(plan, Plan)
    collected = replace(load_record(stats / "stats.json", Stats), folder=str(stats))
    _same_model(found.fingerprint, collected.model, stats)
    _same_model(found.fingerprint, chosen.model, plan)
    prepare_output(output, force=force)
    with _progress() as progress:
        artifact = emit_artifact(
            found,
            collected,
            chosen,
            find_target(chosen.target),
            output,
            shard_max=parse_bytes(shard_max) if shard_max else 0,
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
    heldout: HeldoutOpt = None,
    as_json: JsonOpt = False,
) -> None:
    """Run an artifact, measure it against the original, and write the report anew."""
    from edgemoe.errors import VerifyError
    from edgemoe.inspect import inspect_model
    from edgemoe.ir import Plan, Report, load_record
    from edgemoe.pipeline import find_artifact, finish_output
    from edgemoe.report import summarize_report
    from edgemoe.targets import find_target
    from edgemoe.texts import choose_texts
    from edgemoe.verify import broken_promises, verify_artifact

    found, chosen = inspect_model(model), load_record(output / "plan.json", Plan)
    _same_model(found.fingerprint, chosen.model, output / "plan.json")
    artifact = find_artifact(output)
    old = load_record(output / "report.json", Report) if (output / "report.json").exists() else None
    _, texts = choose_texts([], heldout or [])
    target = find_target(chosen.target)
    with _progress() as progress:
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
        report = replace(report, frontier=old.frontier, model=old.model)
    finish_output(output, report)
    if as_json:
        print((output / "report.json").read_text(encoding="utf-8"), end="")
    else:
        _print(summarize_report(report))
    if broken_promises(report):
        raise VerifyError(f"{artifact.files[0].name}: {broken_promises(report)[0]}")


@app.command()
def report(file: Annotated[Path, typer.Argument(metavar="REPORT", help="A report.json.")], output: OutOpt) -> None:
    """Write the page and the model card of a report.json again, and print its summary."""
    from edgemoe.ir import Report, load_record
    from edgemoe.report import summarize_report, write_report

    loaded = load_record(file, Report)
    output.mkdir(parents=True, exist_ok=True)
    write_report(loaded, output)
    _print(summarize_report(loaded))


@app.command()
def doctor(as_json: JsonOpt = False) -> None:
    """What this machine has of what each stage needs, and how to get the rest."""
    from edgemoe.doctor import examine_machine

    checks = examine_machine(Path())
    if as_json:
        print(json.dumps([asdict(c) for c in checks], indent=1))
    else:
        for check in checks:
            print(f"{'ok     ' if check.found else 'MISSING'} {check.name:18s} {check.found or check.remedy:48s} for {check.needed_for}")
    missing = [c.name for c in checks if not c.found]
    if missing:
        raise MachineError(f"missing: {', '.join(missing)}")


def _same_model(expected: str, found: str, where: Path) -> None:
    from edgemoe.errors import ModelError

    if expected != found:
        raise ModelError(f"{where}: was made from another checkpoint", hint="make it again from this one")


def _print(renderable: Any) -> None:
    from rich.console import Console

    Console().print(renderable)


@contextmanager
def _progress() -> Iterator[Progress]:
    """Progress on stderr: a bar with time left on a terminal, else a line every ten seconds."""
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

    console = Console(stderr=True)
    if not console.is_terminal:
        yield _line_progress()
        return
    columns = (
        TextColumn("{task.description:10s}"),
        BarColumn(),
        TextColumn("{task.percentage:3.0f} %"),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console) as bars:
        tasks: dict[str, Any] = {}

        def update(stage: str, done: int, total: int) -> None:
            if stage not in tasks:
                tasks[stage] = bars.add_task(stage, total=total)
            bars.update(tasks[stage], completed=done, total=total)

        yield update


def _line_progress() -> Progress:
    began: dict[str, float] = {}
    last = [0.0]

    def update(stage: str, done: int, total: int) -> None:
        now = time.monotonic()
        began.setdefault(stage, now)
        if done < total and now - last[0] < 10:
            return
        last[0] = now
        spent = now - began[stage]
        left = f", about {format_seconds(spent / done * (total - done))} left" if 0 < done < total else ""
        print(f"{stage} {100 * done // max(total, 1)} %, {format_seconds(spent)}{left}", file=sys.stderr, flush=True)

    return update


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
