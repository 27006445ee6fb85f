"""Options that several commands share."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from edgemoe.base.errors import UsageError

ModelArg = Annotated[
    str,
    typer.Argument(
        metavar="MODEL",
        help="Folder of a Hugging Face checkpoint, a hub id such as Qwen/Qwen3-30B-A3B, or a GGUF (of a split set, the first file).",
    ),
]
MemoryOpt = Annotated[
    str | None,
    typer.Option("--memory", metavar="SIZE", help="Most that the running process may hold: 128GB (10^9), 119.2GiB (2^30), 123456B."),
]
DeviceOpt = Annotated[
    str | None,
    typer.Option("--device", metavar="NAME", help="Instead of --memory: a box of `edgemoe devices list`, FILE.yaml#ID, or here."),
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
SolverOpt = Annotated[
    str, typer.Option("--solver", help="highs, cbc, lagrange (near-best in milliseconds, with its bound) or exhaustive (tiny programs).")
]
GapOpt = Annotated[float, typer.Option("--gap", min=0, help="Relative distance to the optimum that is good enough.")]
JsonOpt = Annotated[bool, typer.Option("--json", help="Print the result as JSON.")]
OutOpt = Annotated[Path, typer.Option("-o", "--output", metavar="OUT", help="Where the result goes.")]
ForceOpt = Annotated[bool, typer.Option("--force", help="Replace what edgemoe wrote to OUT before.")]
ShardOpt = Annotated[
    str | None, typer.Option("--shard-max", metavar="SIZE", help="Split the GGUF or the MLX weights: most bytes of a file.")
]
RoundingOpt = Annotated[
    str,
    typer.Option(
        "--rounding",
        help="feedback (on the calibration text, layer by layer) or stock (the format's usual quantizer, matrix by matrix).",
    ),
]
RecipeOpt = Annotated[
    Path | None,
    typer.Option("--recipe", metavar="FILE", help="YAML with rules that the plan must keep, and the objective."),
]
RuleOpt = Annotated[
    list[str] | None,
    typer.Option("--rule", metavar="EXPRESSION", help="A rule, repeatable: 'bytes(layers=range(40, 48)) <= 6*GiB', 'kept() >= 900'."),
]
ObjectiveOpt = Annotated[
    str | None, typer.Option("--objective", help="mean over the calibration domains, or worst: the domain that loses most. [default: mean]")
]
DEFAULT_SECONDS = 60.0  # of solvers/effort.py, which --help does not import
TimeOpt = Annotated[
    float, typer.Option("--time-limit", metavar="SECONDS", min=0.1, help="Then take the best plan so far, with its proven gap.")
]
TargetOpt = Annotated[
    str,
    typer.Option(
        metavar="NAME",
        help="What to write. gguf: one file for stock llama.cpp. onnx: a folder for onnxruntime, each expert with a width of its own. "
        "browser: the same for web browsers and transformers.js. mlx: a folder for mlx_lm on a Mac.",
    ),
]
DtypeOpt = Annotated[
    str | None,
    typer.Option("--dtype", metavar="f16|bf16", help="With --target mlx: the type of all floats. [default: f16 if the activations fit]"),
]
KvBitsOpt = Annotated[
    int | None,
    typer.Option("--kv-bits", metavar="2|4|8", help="With --target mlx: plan for mlx_lm's quantized KV cache; a report has its KL."),
]
KvSizeOpt = Annotated[
    int | None,
    typer.Option("--max-kv-size", metavar="N", help="With --target mlx: plan for mlx_lm's rotating KV cache, which forgets older tokens."),
]
WidthOpt = Annotated[
    str | None,
    typer.Option(
        "--width",
        metavar="N|auto|full",
        help="Cut experts to their N best neurons; auto: to 3/4 or 1/2 if that pays; full: never. "
        "[default: a GGUF of less than 2.75 bits a weight tries it]",
    ),
]
TopKOpt = Annotated[
    int | None,
    typer.Option("--top-k", metavar="N", help="Experts that compute a token: fewer are faster and cost KL. [default: as in MODEL]"),
]
PresetOpt = Annotated[
    str | None,
    typer.Option(
        "--preset",
        metavar="NAME",
        help="Decide as another method does, from the same prices and for the same bytes, to compare its plan with ours. "
        "types-only: every expert stays, formats are chosen. drops-only: experts go, every matrix has 8 bits. "
        "layer-uniform: the experts of a layer share one format (COSTS of `price --target onnx`). "
        "pmq: PMQ's bits for each expert, no drops (COSTS of `price --target onnx`, and --stats).",
    ),
]
StatsOpt = Annotated[
    Path | None,
    typer.Option(
        "--stats", metavar="DIR", help="With --preset pmq: the folder that calibrate made; PMQ weighs experts by how they are used."
    ),
]


def settled_target(target: str, dtype: str | None, kv_bits: int | None, max_kv_size: int | None) -> str:
    """The target's name with the settings that were given as options.

    Raises:
        UsageError: the target has no such settings, or the type is not known.
    """
    given = {"--dtype": dtype, "--kv-bits": kv_bits, "--max-kv-size": max_kv_size}
    asked = [option for option, value in given.items() if value is not None]
    if asked and target != "mlx":
        raise UsageError(f"{asked[0]} goes with --target mlx, not {target}", hint=f"leave {asked[0]} out")
    if dtype not in (None, "f16", "bf16"):
        raise UsageError(f"--dtype {dtype} is not known", hint="known: f16, bf16")
    for option, value, what in (("--kv-bits", kv_bits, "bits"), ("--max-kv-size", max_kv_size, "tokens")):
        if value is not None and value < 1:
            raise UsageError(f"{option} {value} is not a number of {what}", hint=f"leave {option} out")
    words = [dtype, f"kv{kv_bits}" if kv_bits is not None else None, f"max{max_kv_size}" if max_kv_size is not None else None]
    return "-".join([target, *(word for word in words if word is not None)])


def target_options(target: str) -> list[str]:
    """The options that give a target with its settings: what `settled_target` reads, written again."""
    name, *words = target.split("-")
    starts = {"kv": "--kv-bits", "max": "--max-kv-size", "": "--dtype"}
    told = [(next(start for start in starts if word.startswith(start)), word) for word in words]
    return ["--target", name, *(part for start, word in told for part in (starts[start], word.removeprefix(start)))]
