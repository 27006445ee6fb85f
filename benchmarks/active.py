"""Fewer active experts: KL and decode speed at each top-k in files of equal size, and what the refit makes good.

    python benchmarks/active.py [--work DIR] [--bits 3] [--tokens 5120] [--calibration-tokens 16384] [--rounds 5]

Files: as `build --top-k N --rounding stock` makes them, with equal room for weights (smaller compute buffers with fewer active experts are
left out), KL in llama.cpp on held-out text; the files of a model are then run in turn, round after round, one thread (prompt of 120
tokens, then 32 decoded).  Nothing quantized: KL in transformers of the model with N active experts as it is, and refitted as `build` does,
on held-out text and on the windows of the calibration text that nothing was fitted to.  Speed alone: a random file of Qwen3-30B's widths,
two layers, told how many experts a token takes.
"""

from __future__ import annotations

import argparse
import os
import platform
import statistics
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
from onnx_speed import rounds, runner
from peak import QWEN, types
from peak import write as write_random
from repair import kl_by_domain
from shapes import gqa

from edgemoe.ir import Model, Plan
from edgemoe.model.inspect import inspect_model
from edgemoe.pipeline.emit import emit_artifact
from edgemoe.pipeline.request import BuildRequest
from edgemoe.pipeline.store import store_weights
from edgemoe.pipeline.widths import plan_widths
from edgemoe.repair.survivors import EPOCHS
from edgemoe.repair.width import UNSEEN, narrow_experts
from edgemoe.stream.passes import final_states
from edgemoe.stream.texts import choose_texts
from edgemoe.stream.windows import tokenize
from edgemoe.targets import find_target, gguf
from edgemoe.verify.logits import compare_logits, reference_states, tokenize_heldout

CONTEXT = 160  # tokens, of the speed runs and of the plans


def write_file(source: str, top_k: int, options: argparse.Namespace) -> tuple[Plan, Path]:
    """The best plan with so many active experts whose weights take at most `bits` for each of the original's, and its file."""
    original, target = inspect_model(source), find_target("gguf")
    model, work = replace(original, top_k=top_k), (options.work / original.name).absolute()
    room = round(options.bits / 8 * original.n_weights) + sum(target.memory_parts(model, CONTEXT).values())
    request = BuildRequest(
        model=source, memory=room, out=work, calibration_tokens=options.calibration_tokens, rounding="stock", top_k=top_k
    )
    texts = choose_texts((), ())[0]
    offer, plan = plan_widths(request, original, [original.expert.size], top_k, target, CONTEXT, texts, work, lambda *_: None)
    known = (original, texts, offer.stats, plan, work)
    stored = store_weights(*known, narrowed=offer.narrowed, rounding="stock", max_tokens=options.calibration_tokens)
    folder = work / f"top-{top_k}"
    return plan, emit_artifact(stored, offer.stats, plan, target, folder).path


def compare_files(source: str, options: argparse.Namespace) -> list[str]:
    """Rows of the first table."""
    model = inspect_model(source)
    work = options.work / model.name
    files = {k: write_file(source, k, options) for k in range(model.top_k, 0, -1)}
    heldout = choose_texts((), ())[1]
    windows = tokenize_heldout(model, heldout, options.tokens)
    states, found = reference_states(model, windows, work), {}
    for top_k, (_, path) in files.items():
        scores = compare_logits(path, model, windows, states, [t.name for t in heldout], gguf)  # type: ignore[arg-type]
        found[top_k] = float(np.mean([s.kl_mean for s in scores]))
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
    windows = tokenize(model, heldout, options.tokens, 512)
    work = options.work / model.name
    work.mkdir(parents=True, exist_ok=True)
    original = final_states(model, windows, work)

    def measure(changed: Model) -> np.ndarray:
        return kl_by_domain(model, windows, original, final_states(changed, windows, work), len(heldout))

    for top_k in range(model.top_k - 1, 0, -1):
        for name, epochs in (("none", -1), ("closed form", 0), ("and descent", EPOCHS)):
            made = narrow_experts(
                *(model, calibration, model.expert.size, work),
                top_k=top_k,
                max_tokens=options.calibration_tokens,
                epochs=epochs,
            )
            found = measure(made.model)
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
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=["examples/tiny-moe-b", "examples/tiny-moe"])
    parser.add_argument("--work", type=Path, default=Path("bench"), help="calibration, prices and weights are kept here between runs")
    parser.add_argument("--bits", type=float, default=3.0, help="of the file for each weight of the original")
    parser.add_argument("--tokens", type=int, default=5120, help="held-out tokens of all five texts")
    parser.add_argument("--calibration-tokens", type=int, default=16_384)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--results", type=Path, default=Path("benchmarks/results"), help="where active.md goes")
    options = parser.parse_args()
    refits = [row for source in options.models for row in compare_refits(source, options)]
    files = [row for source in options.models for row in compare_files(source, options)]
    speeds = compare_speeds(options.rounds)
    made = f"{datetime.now(UTC):%Y-%m-%d}, {platform.machine()}, {os.cpu_count()} cores shared with other work"
    speed = f"Speed: tokens/s in llama.cpp with one thread, median of {options.rounds} rounds, best in brackets"
    heads = (
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
    )
    lines = [
        "# Fewer active experts (`--top-k`): KL in nats per token, and speed",
        "",
        f"`python benchmarks/active.py`, {made}; {options.calibration_tokens} calibration tokens, {options.tokens} held out.",
        "",
        f"{speed}.",
        "",
        f"## Files of {options.bits:g} bits for each weight, stock rounding",
        "",
        f"| {' | '.join(heads)} |",
        "|" + "---|" * len(heads),
        *files,
        "",
        "## Nothing quantized, every expert kept",
        "",
        "| model | top-k | refit | KL held out, mean of texts | worst text | KL on unfitted calibration text | charged |",
        "|" + "---|" * 7,
        *refits,
        "",
        "## Speed alone: random weights, 64 experts of Qwen3-30B's widths, two layers, Q4_K",
        "",
        "| top-k | prompt tokens/s | decode tokens/s | decode, best over best of top-8 |",
        "|" + "---|" * 4,
        *speeds,
        "",
    ]
    options.results.mkdir(parents=True, exist_ok=True)
    (options.results / "active.md").write_text("\n".join(lines))


if __name__ == "__main__":
    main()
