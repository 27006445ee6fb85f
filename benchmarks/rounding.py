"""Feedback against the stock quantizer, tensor by tensor at equal bytes: output error on held-out text, one table.

    python benchmarks/rounding.py [--tokens 16384] [--experts 4] [--models examples/tiny-moe examples/tiny-moe-b]

Both get what their builds get: the stock quantizer the importance matrix, feedback the second moments of the expert's inputs, from the same
calibration tokens (gate^2 weighted; of one stream, nothing rounded before).  One window in seven is kept out of the second moments and
chooses between the two, as in a build.  The error is sum g^2 |(W' - W) x|^2 over the held-out tokens routed to the expert.  "Better in"
counts matrices where feedback errs less than stock, whatever the guard says; the two columns after it are what a build stores: how often
the guard took stock, and how often what it took errs more than stock.  KL is not here: see quality.py, which measures whole files.
"""

from __future__ import annotations

import argparse
import os
import platform
import time
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import torch

from edgemoe.checkpoint import read_tensor
from edgemoe.feedback import factor_moments, mix_moments
from edgemoe.inspect import inspect_model
from edgemoe.ir import PROJECTIONS, Model
from edgemoe.stream import LayerStream, Recorder, map_ordered, recording, tokenize
from edgemoe.targets.gguf.feedback import quantize_fed_back
from edgemoe.targets.gguf.formats import FORMATS, dequantize, quantize
from edgemoe.texts import Text, choose_texts
from edgemoe.twin import GUARD_EVERY

KINDS = ("IQ1_S", "IQ1_M", "IQ2_XXS", "IQ2_XS", "IQ2_S", "Q2_K", "IQ3_XXS", "IQ3_S", "Q3_K", "IQ4_XS", "Q4_K", "Q5_K", "Q6_K", "Q8_0")
HEAD = "| format | bits | mean ratio | gate | up | down | worst | better in | guard took stock | stored is worse | MB/s |"
Moments = dict[tuple[int, str, int], tuple[np.ndarray, int]]  # (layer, "in" or "mid", expert) -> sum g^2 x x', tokens


@dataclass(frozen=True, slots=True, kw_only=True)
class Trial:
    """One matrix in one format."""

    kind: str
    projection: str
    ratio: float  # feedback's error on held-out text over stock's
    stock: bool  # the guard tokens would take the stock quantizer's
    seconds: float  # of feedback
    size: int  # bytes of the float32 matrix


def input_moments(model: Model, texts: list[Text], tokens: int) -> tuple[Moments, Moments]:
    """What every expert's matrices receive: in the windows that are fitted to, and in the guard."""
    windows, stream = tokenize(model, texts, tokens, 512), LayerStream(model)
    real = torch.from_numpy(np.arange(windows.tokens.shape[1])[None] < windows.lengths[:, None])
    states = [stream.embed(windows.tokens[index]) for index in windows.chunks()]
    number = np.array(
        [np.sum(windows.domain[:i] == d) for i, d in enumerate(windows.domain)]
    )  # of each window in its domain, as in twin.py
    guard = real & torch.from_numpy(number % GUARD_EVERY == GUARD_EVERY // 2)[:, None]
    found: tuple[Moments, Moments] = ({}, {})
    for layer in range(model.n_layers):
        module = stream.load_layer(layer)

        def run(piece: tuple[torch.Tensor, ...], module: Any = module) -> tuple[torch.Tensor, list[Any]]:
            x, *masks = piece
            seen: list[Any] = []

            def note(expert: int, token: torch.Tensor, x: torch.Tensor, h: torch.Tensor, _: torch.Tensor, gate: torch.Tensor) -> None:
                for part, mask in enumerate(masks):
                    weight = gate**2 * mask[token]
                    grams = (("in", (x * weight[:, None]).T @ x), ("mid", (h * weight[:, None]).T @ h))
                    seen.extend((part, name, expert, gram.double().numpy(), int(mask[token].sum())) for name, gram in grams)

            with recording(Recorder(on_expert=note)):
                return stream.run_layer(module, x), seen

        pieces = [(x, (real & ~guard)[i].flatten(), guard[i].flatten()) for x, i in zip(states, windows.chunks(), strict=True)]
        states = []
        for out, seen in map_ordered(run, pieces, device=stream.device):
            states.append(out)
            for part, name, owner, gram, n in seen:
                old = found[part].get((layer, name, owner), (0.0, 0))
                found[part][layer, name, owner] = (old[0] + gram, old[1] + n)
        stream.unload_layer(layer)
    return found


def compare(model: Model, texts: tuple[list[Text], list[Text]], tokens: int, experts: int) -> Iterator[Trial]:
    """Every sampled matrix in every format."""
    (fitted, guard), held = (input_moments(model, part, n) for part, n in zip(texts, (tokens, 5120), strict=True))
    for layer in range(model.n_layers):
        for name, projections in (("in", PROJECTIONS[:2]), ("mid", PROJECTIONS[2:])):
            keys = [key for key in fitted if key[:2] == (layer, name) and key in held[0]]
            whole = np.sum([fitted[key][0] for key in keys], axis=0) if name == "in" else None
            busy = sorted(keys, key=lambda key: -fitted[key][1])
            for key in busy[:: max(1, len(busy) // experts)][:experts]:
                moments = factor_moments(mix_moments(*fitted[key], whole))
                importance = np.ascontiguousarray((fitted[key][0] + guard[key][0]).diagonal(), np.float32)
                judges = guard[key][0], held[0][key][0] + held[1][key][0]
                for projection in projections:
                    tensor = model.find(f"ffn_{projection}_exps", layer, key[2])
                    assert tensor is not None
                    weights = read_tensor(model.folder, tensor)
                    for kind in KINDS:
                        start = time.process_time()
                        packed = quantize_fed_back(weights, kind, moments)
                        seconds = time.process_time() - start
                        deltas = [
                            dequantize(found, kind, weights.shape[1]) - weights for found in (packed, quantize(weights, kind, importance))
                        ]
                        guarded, ratio = (np.divide(*[float(((d @ gram) * d).sum()) for d in deltas]) for gram in judges)
                        yield Trial(kind=kind, projection=projection, ratio=ratio, stock=guarded > 1, seconds=seconds, size=weights.nbytes)


def summarise(kind: str, trials: list[Trial]) -> str:
    """One row of the table."""
    ratios = np.array([t.ratio for t in trials])
    by = " | ".join(f"{np.exp(np.mean([np.log(t.ratio) for t in trials if t.projection == p])):.2f}" for p in PROJECTIONS)
    speed = sum(t.size for t in trials) / sum(t.seconds for t in trials) / 1e6
    row = f"| {kind} | {FORMATS[kind].bpw:.2f} | **{np.exp(np.log(ratios).mean()):.2f}** | {by} | {ratios.max():.2f}"
    worse = sum(t.ratio > 1 and not t.stock for t in trials)
    return f"{row} | {np.mean(ratios < 1):.0%} | {sum(t.stock for t in trials)} | {worse} | {speed:.1f} |"


def main() -> None:
    """Measure; write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", type=Path, nargs="+", default=[Path("examples/tiny-moe"), Path("examples/tiny-moe-b")])
    parser.add_argument("--tokens", type=int, default=16_384, help="calibration tokens")
    parser.add_argument("--experts", type=int, default=4, help="of each layer, from the busiest to the idlest")
    parser.add_argument("--results", type=Path, default=Path("benchmarks/results"))
    options = parser.parse_args()
    torch.set_num_threads(1)
    for kind in KINDS:  # ggml's search tables are built once
        quantize(np.ones((1, 256), np.float32), kind, np.ones(256, np.float32))
    texts = choose_texts([], [])
    lines = ["# Output error on held-out text: feedback over the stock quantizer with an importance matrix, same bytes", ""]
    lines += [f"`python benchmarks/rounding.py`, {datetime.now(UTC):%Y-%m-%d}, {platform.machine()}, {os.cpu_count()} shared cores.", ""]
    for source in options.models:
        model = inspect_model(source)
        found = list(compare(model, texts, options.tokens, options.experts))
        lines += [f"## {model.name}: {len(found) // len(KINDS)} expert matrices, {options.tokens} calibration tokens", ""]
        lines += [HEAD, "|" + "---|" * 11]
        lines += [summarise(kind, [t for t in found if t.kind == kind]) for kind in KINDS]
        lines.append("")
    options.results.mkdir(parents=True, exist_ok=True)
    (options.results / "rounding.md").write_text("\n".join(lines))
    print("\n".join(lines))


if __name__ == "__main__":
    main()
