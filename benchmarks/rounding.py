"""Feedback against the stock quantizer, tensor by tensor at equal bytes: output error on held-out text, one table.

    python benchmarks/rounding.py [--tokens 16384] [--experts 2] [--models examples/tiny-moe examples/tiny-moe-b]

Both get what their builds get: the stock quantizer the importance matrix, feedback the second moments of the expert's inputs, from the same
calibration tokens (gate^2 weighted; of one stream, nothing rounded before).  The error is sum g^2 |(W' - W) x|^2 over the held-out tokens
routed to the expert.  "KL" columns are not here: see quality.py, which measures whole files.
"""

from __future__ import annotations

import argparse
import os
import platform
import time
from collections.abc import Iterator
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

KINDS = ("IQ1_S", "IQ1_M", "IQ2_XXS", "IQ2_XS", "IQ2_S", "Q2_K", "IQ3_XXS", "IQ3_S", "Q3_K", "IQ4_XS", "Q4_K", "Q5_K", "Q6_K", "Q8_0")
Moments = dict[tuple[int, str, int], tuple[np.ndarray, int]]  # (layer, "in" or "mid", expert) -> sum g^2 x x', tokens


def input_moments(model: Model, texts: list[Text], tokens: int) -> Moments:
    """What every expert's matrices receive."""
    windows, stream = tokenize(model, texts, tokens, 512), LayerStream(model)
    real = torch.from_numpy(np.arange(windows.tokens.shape[1])[None] < windows.lengths[:, None])
    states = [stream.embed(windows.tokens[index]) for index in windows.chunks()]
    found: Moments = {}
    for layer in range(model.n_layers):
        module = stream.load_layer(layer)

        def run(pair: tuple[torch.Tensor, torch.Tensor], module: Any = module) -> tuple[torch.Tensor, list[Any]]:
            x, mask = pair
            seen: list[Any] = []

            def note(expert: int, token: torch.Tensor, x: torch.Tensor, h: torch.Tensor, _: torch.Tensor, gate: torch.Tensor) -> None:
                weight = gate**2 * mask[token]
                grams = (("in", (x * weight[:, None]).T @ x), ("mid", (h * weight[:, None]).T @ h))
                seen.extend((name, expert, gram.double().numpy(), int(mask[token].sum())) for name, gram in grams)

            with recording(Recorder(on_expert=note)):
                return stream.run_layer(module, x), seen

        pieces = list(zip(states, [real[index].flatten() for index in windows.chunks()], strict=True))
        states = []
        for out, seen in map_ordered(run, pieces, device=stream.device):
            states.append(out)
            for name, owner, gram, n in seen:
                old = found.get((layer, name, owner), (0.0, 0))
                found[layer, name, owner] = (old[0] + gram, old[1] + n)
        stream.unload_layer(layer)
    return found


def compare(model: Model, texts: tuple[list[Text], list[Text]], tokens: int, experts: int) -> Iterator[tuple[str, str, float, float, int]]:
    """(format, projection, feedback's error over stock's, seconds, bytes of float32) of every sampled matrix."""
    fitted, held = (input_moments(model, part, n) for part, n in zip(texts, (tokens, 5120), strict=True))
    for layer in range(model.n_layers):
        for name, projections in (("in", PROJECTIONS[:2]), ("mid", PROJECTIONS[2:])):
            whole = np.sum([fitted[key][0] for key in fitted if key[:2] == (layer, name)], axis=0)
            busy = sorted((key[2] for key in held if key[:2] == (layer, name)), key=lambda e: -held[layer, name, e][1])
            for expert in busy[:: max(1, len(busy) // experts)][:experts]:
                moments = factor_moments(mix_moments(*fitted[layer, name, expert], whole))
                importance = np.ascontiguousarray(fitted[layer, name, expert][0].diagonal(), np.float32)
                for projection in projections:
                    tensor = model.find(f"ffn_{projection}_exps", layer, expert)
                    assert tensor is not None
                    weights = read_tensor(model.folder, tensor)
                    for kind in KINDS:
                        start = time.process_time()
                        packed = quantize_fed_back(weights, kind, moments)
                        seconds = time.process_time() - start
                        errors = []
                        for found in (packed, quantize(weights, kind, importance)):
                            delta = dequantize(found, kind, weights.shape[1]) - weights
                            errors.append(float(((delta @ held[layer, name, expert][0]) * delta).sum()))
                        yield kind, projection, errors[0] / errors[1], seconds, weights.nbytes


def main() -> None:
    """Measure; write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", type=Path, nargs="+", default=[Path("examples/tiny-moe"), Path("examples/tiny-moe-b")])
    parser.add_argument("--tokens", type=int, default=16_384, help="calibration tokens")
    parser.add_argument("--experts", type=int, default=2, help="of each layer, from the busiest to the idlest")
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
        lines += ["| format | bits | mean ratio | gate | up | down | worst | better in | MB/s |", "|" + "---|" * 9]
        for kind in KINDS:
            mine = [f for f in found if f[0] == kind]
            ratios = [f[2] for f in mine]
            by = " | ".join(f"{np.exp(np.mean(np.log([f[2] for f in mine if f[1] == p]))):.2f}" for p in PROJECTIONS)
            wins, speed = np.mean([r < 1 for r in ratios]), sum(f[4] for f in mine) / sum(f[3] for f in mine) / 1e6
            mean = np.exp(np.mean(np.log(ratios)))
            lines += [f"| {kind} | {FORMATS[kind].bpw:.2f} | **{mean:.2f}** | {by} | {max(ratios):.2f} | {wins:.0%} | {speed:.1f} |"]
        lines.append("")
    options.results.mkdir(parents=True, exist_ok=True)
    (options.results / "rounding.md").write_text("\n".join(lines))
    print("\n".join(lines))


if __name__ == "__main__":
    main()
