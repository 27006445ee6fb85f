"""This script measures KL and decode speed at each number of active experts in files of equal size, and what the refit makes good.

    python benchmarks/active.py [--work DIR] [--bits 3] [--tokens 5120] [--calibration-tokens 16384] [--rounds 5]

Files: as `build --top-k N --rounding stock` makes them, with equal room for weights (smaller compute buffers with fewer active experts are
left out), KL in llama.cpp on held-out text; the files of a model are then run in turn, round after round, one thread (prompt of 120
tokens, then 32 decoded).  Nothing quantized: KL in transformers of the model with N active experts as it is, and refitted as `build` does,
on held-out text and on the windows of the calibration text that nothing was fitted to.  Speed alone: a random file of Qwen3-30B's widths,
two layers, told how many experts a token takes.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import table
from arguments import make_parser
from measure import Reference
from onnx_speed import rounds, runner
from peak import QWEN, types
from peak import write as write_random
from shapes import gqa

from edgemoe.ir import Plan
from edgemoe.model.inspect import inspect_model
from edgemoe.pipeline.emit import emit_artifact
from edgemoe.pipeline.request import BuildRequest, Job
from edgemoe.pipeline.store import store_weights
from edgemoe.pipeline.widths import plan_widths
from edgemoe.repair.survivors import EPOCHS
from edgemoe.repair.width import UNSEEN, narrow_experts
from edgemoe.stream.texts import choose_texts
from edgemoe.targets import find_target, gguf

CONTEXT = 160  # tokens, of the speed runs and of the plans
COLUMNS = """\
The files of a model hold equal bytes of weights, as `edgemoe build --top-k N --rounding stock` writes them; "kept" counts the experts
that stay in each layer.  "Over full top-k" is the KL measured of a file over the KL measured of the file with the checkpoint's own top-k.
In the second table the model runs in transformers: "none" changes top-k and nothing else, "closed form" refits W_down, and "and descent"
refits all three matrices as a build does.  "Charged" is what a plan is charged for it: the KL on calibration text that nothing was fitted
to, times the factor for unseen text where something was refitted."""


def write_file(source: str, top_k: int, options: argparse.Namespace) -> tuple[Plan, Path]:
    """The best plan with so many active experts whose weights take at most `bits` for each of the original's, and its file."""
    original, target = inspect_model(source), find_target("gguf")
    model, work = original.with_top_k(top_k), (options.work / original.name).absolute()
    room = round(options.bits / 8 * original.n_weights) + sum(target.memory_parts(model, CONTEXT).values())
    request = BuildRequest(
        model=source, memory=room, out=work, calibration_tokens=options.calibration_tokens, rounding="stock", top_k=top_k
    )
    texts, heldout = choose_texts((), ())
    job = Job(
        request=request,
        model=original,
        target=target,
        context=CONTEXT,
        widths=(original.expert.size,),
        top_k=top_k,
        calibration=texts,
        heldout=heldout,
    )
    offer, plan = plan_widths(job, work, lambda *_: None)
    known = (original, texts, offer.stats, plan, work)
    stored = store_weights(*known, narrowed=offer.narrowed, rounding="stock", max_tokens=options.calibration_tokens)
    folder = work / f"top-{top_k}"
    return plan, emit_artifact(stored, offer.stats, plan, target, folder).path


def compare_files(source: str, options: argparse.Namespace) -> list[str]:
    """Rows of the first table."""
    model = inspect_model(source)
    files = {k: write_file(source, k, options) for k in range(model.top_k, 0, -1)}
    reference, found = Reference(model, choose_texts((), ())[1], options.tokens, options.work / model.name), {}
    for top_k, (_, path) in files.items():
        found[top_k] = reference.kl_of_file(path)
        print(model.name, top_k, files[top_k][0].predicted_kl, found[top_k], flush=True)
    speeds = rounds({str(k): runner(gguf, path, 1) for k, (_, path) in files.items()}, options.rounds)
    rows = []
    for top_k, (plan, _) in files.items():
        prompt, decode = (f"{statistics.median(seen):.0f} ({max(seen):.0f})" for seen in speeds[str(top_k)])
        head = f"| {model.name} | {top_k} | {plan.count} of {plan.n_experts} | {plan.file_size / 1e6:.2f} | {plan.active_bytes / 1e6:.2f}"
        kl = f"{plan.predicted_kl:.4f} | **{found[top_k]:.4f}** | {found[top_k] / found[model.top_k]:.2f}"
        rows.append(f"{head} | {kl} | {prompt} | {decode} |")
    return rows


def compare_refits(source: str, options: argparse.Namespace) -> list[str]:
    """Rows of the second table."""
    model, rows = inspect_model(source), []
    calibration, heldout = choose_texts([], [])
    work = options.work / model.name
    reference = Reference(model, heldout, options.tokens, work)
    for top_k in range(model.top_k - 1, 0, -1):
        for name, epochs in (("none", -1), ("closed form", 0), ("and descent", EPOCHS)):
            made = narrow_experts(
                *(model, calibration, model.expert.size, work),
                top_k=top_k,
                max_tokens=options.calibration_tokens,
                epochs=epochs,
            )
            found = reference.kl_of_model(made.model)
            charged = (UNSEEN if epochs >= 0 else 1.0) * np.mean(made.kl)
            rows.append(
                f"| {model.name} | {top_k} | {name} | **{found.mean():.4f}** | {found.max():.4f} | {np.mean(made.kl):.4f} | {charged:.4f} |"
            )
            print(rows[-1], flush=True)
    return rows


def compare_speeds(count: int) -> list[str]:
    """Rows of the third table."""
    tops: Sequence[int] = (8, 4, 2)
    with tempfile.TemporaryDirectory() as folder:
        paths = {str(k): Path(folder) / f"{k}.gguf" for k in tops}
        for k in tops:
            write_random(gqa(**{**QWEN, "top_k": k}, layers=2, types=types("Q4_K", "Q4_K")), paths[str(k)])
        found = rounds({k: runner(gguf, path, 1) for k, path in paths.items()}, count)
    best = max(found[str(tops[0])][1])
    return [
        f"| {k} | {' | '.join(f'{statistics.median(s):.0f} ({max(s):.0f})' for s in found[str(k)])} | {max(found[str(k)][1]) / best:.2f} |"
        for k in tops
    ]


def main() -> None:
    """Measure everything and write the tables."""
    parser = make_parser(__doc__, work=True, tokens=5120, calibration_tokens=16_384, results="active.md")
    parser.add_argument("--models", nargs="+", default=["examples/tiny-moe-b", "examples/tiny-moe"])
    parser.add_argument("--bits", type=float, default=3.0, help="of the file for each weight of the original")
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    refits = [row for source in options.models for row in compare_refits(source, options)]
    files = [row for source in options.models for row in compare_files(source, options)]
    speeds = compare_speeds(options.rounds)
    made = table.made_by("python benchmarks/active.py", "cores shared with other work")
    speed = f"Speed: tokens/s in llama.cpp with one thread, median of {options.rounds} rounds, best in brackets"
    heads = [
        "model",
        "top-k",
        "kept",
        "file MB",
        "MB read for a token",
        "KL predicted",
        "KL measured",
        "over full top-k",
        "prompt",
        "decode",
    ]
    lines = [
        "# Fewer active experts (`--top-k`): KL in nats per token, and speed",
        "",
        f"{made}; {options.calibration_tokens} calibration tokens, {options.tokens} held out.",
        "",
        COLUMNS,
        "",
        f"{speed}.",
        "",
        f"## Files of {options.bits:g} bits for each weight, stock rounding",
        "",
        *table.head(heads),
        *files,
        "",
        "## Nothing quantized, every expert kept",
        "",
        *table.head(["model", "top-k", "refit", "KL held out, mean of texts", "worst text", "KL on unfitted calibration text", "charged"]),
        *refits,
        "",
        "## Speed alone: random weights, 64 experts of Qwen3-30B's widths, two layers, Q4_K",
        "",
        *table.head(["top-k", "prompt tokens/s", "decode tokens/s", "decode, best over best of top-8"]),
        *speeds,
        "",
    ]
    table.save(options.results, "active.md", lines)


if __name__ == "__main__":
    main()
