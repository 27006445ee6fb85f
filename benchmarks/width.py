"""Fewer experts, narrower experts or fewer bits: plans with the width free beside plans without, at equal bytes; and which neurons to keep.

    python benchmarks/width.py [--work DIR] [--tokens 5120] [--calibration-tokens 32768] [--models examples/tiny-moe-b]

Plans: the best of each width in files of equal size, written and measured in llama.cpp.  Scores: nothing quantized, nothing dropped, every
expert cut to 3/4 and 1/2 by each score; as cut, with W_down refitted in closed form, and (for the default score) after descent, as `build`
does; KL on held-out text, and on the windows of the calibration text that nothing was fitted to, which is what the prices hold.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
from repair import kl_by_domain

from edgemoe.base.errors import BudgetError
from edgemoe.base.storage import array_file, hash_json, save_arrays
from edgemoe.calibrate.collect import collect_stats
from edgemoe.ir import PROJECTIONS, Model
from edgemoe.model.describe import resize_experts
from edgemoe.model.inspect import inspect_model
from edgemoe.model.overlay import save_overlay
from edgemoe.pipeline.store import store_weights
from edgemoe.pipeline.widths import price_cached
from edgemoe.plan.solve import solve_plan
from edgemoe.price.choices import discount
from edgemoe.repair.experts import Experts
from edgemoe.repair.survivors import EPOCHS
from edgemoe.repair.width import SCORES, best_neurons, charge, choose_widths, cut, magnitude, narrow_experts, score_of
from edgemoe.stream.gradients import collect_gradients, load_gradients
from edgemoe.stream.layers import LayerStream
from edgemoe.stream.passes import final_states
from edgemoe.stream.texts import choose_texts
from edgemoe.stream.windows import tokenize
from edgemoe.targets import find_target
from edgemoe.verify.logits import compare_logits, reference_states, tokenize_heldout

BITS = (4.0, 3.0, 2.0)  # of the file for each weight of the original
SCORE_TOKENS = 8192


@dataclass(frozen=True)
class Bench:
    """A model, its texts, and a folder where everything measured is remembered."""

    model: Model
    work: Path
    tokens: int
    calibration_tokens: int

    def remember(self, key: Any, make: Callable[[], Any]) -> Any:
        """The result of `make`, from the folder if it is there."""
        path = self.work / f"result-{hash_json(key, self.tokens)[:16]}.json"
        if not path.exists():
            path.write_text(json.dumps(make()))
        return json.loads(path.read_text())


def cut_only(model: Model, width: int, score: str, folder: Path, work: Path) -> Model:
    """Every expert cut, nothing refitted."""
    stream = LayerStream(model)
    work.mkdir(parents=True, exist_ok=True)
    for layer in range(model.n_layers):
        module = stream.load_layer(layer)
        gate, up, down = (stream.expert_slice(module, f"ffn_{p}_exps").clone() for p in PROJECTIONS)
        experts = Experts(gate=gate, up=up, down=down)
        stream.unload_layer(layer)
        left = cut(experts, best_neurons(score_of(score, load_gradients(folder, layer), experts, layer), magnitude(experts), width))
        stacks = zip(PROJECTIONS, left.stacks, strict=True)
        save_arrays(work / array_file(layer), {f"ffn_{p}_exps.{e}": s[e].numpy() for p, s in stacks for e in range(model.n_experts)})
    return save_overlay(resize_experts(model, width), work, {})


def compare_scores(bench: Bench) -> list[str]:
    """Rows of the first table."""
    model, rows = bench.model, []
    calibration, heldout = choose_texts([], [])
    windows = tokenize(model, heldout, bench.tokens, 512)
    original = final_states(model, windows, bench.work)

    def heldout_kl(changed: Model) -> list[float]:
        return kl_by_domain(model, windows, original, final_states(changed, windows, bench.work), len(heldout)).tolist()

    def narrowed(width: int, score: str, tokens: int, epochs: int) -> dict[str, Any]:
        made = narrow_experts(model, calibration, width, bench.work, score=score, max_tokens=tokens, epochs=epochs)
        return {"guard": made.kl, "heldout": heldout_kl(made.model)}

    for width in choose_widths(model, "auto")[1:]:
        for score in SCORES:

            def as_cut(width: int = width, score: str = score) -> list[float]:
                folder = collect_gradients(model, calibration, bench.work, max_tokens=SCORE_TOKENS)
                return heldout_kl(cut_only(model, width, score, folder, bench.work / f"cut-{width}-{score}"))

            raw = bench.remember(["cut", width, score], as_cut)
            fit = bench.remember(["fit", width, score, SCORE_TOKENS], lambda w=width, s=score: narrowed(w, s, SCORE_TOKENS, 0))
            full = None
            if score == SCORES[0]:
                key = ["descent", width, score, bench.calibration_tokens]
                full = bench.remember(key, lambda w=width, s=score: narrowed(w, s, bench.calibration_tokens, EPOCHS))
            cells = [np.mean(raw), np.mean(fit["heldout"]), *([np.mean(full["heldout"]), np.mean(full["guard"])] if full else [])]
            texts = " | ".join([f"{v:.4f}" for v in cells] + [""] * (4 - len(cells)))
            rows.append(f"| {model.name} | {width} of {model.expert.size} | {score} | {texts} |")
            print(rows[-1], flush=True)
    return rows


def compare_plans(bench: Bench) -> list[str]:
    """Rows of the second table."""
    model, target, rows = bench.model, find_target("gguf"), []
    calibration, heldout = choose_texts([], [])
    windows = tokenize_heldout(model, heldout, bench.tokens)
    states = reference_states(model, windows, bench.work)
    offers = []
    for width in choose_widths(model, "auto"):
        made = narrow_experts(model, calibration, width, bench.work, max_tokens=bench.calibration_tokens, epochs=EPOCHS)
        stats = collect_stats(made.model, calibration, made.work, max_tokens=bench.calibration_tokens)
        costs = charge(discount(price_cached(made.model, stats, target, 512, made.work, None)[0], repair=True, rounding="feedback"), made)
        offers.append((width, made, stats, costs))
    for bits in BITS:
        size, found = round(bits / 8 * model.n_weights), []
        for width, made, stats, costs in offers:
            beside = sum(costs.memory[part] for part in ("runtime", "kv", "compute", "output"))
            try:
                plan = solve_plan(costs, size + beside)
            except BudgetError:
                continue

            def measure(plan: Any = plan, made: Any = made, stats: Any = stats) -> list[float]:
                options = {"narrowed": made, "max_tokens": bench.calibration_tokens}
                stored = store_weights(model, calibration, stats, plan, bench.work, **options)
                folder = bench.work / "file"
                folder.mkdir(exist_ok=True)
                path = target.write(stored, stats, plan, folder, 0, None).path
                scores = compare_logits(path, model, windows, states, [t.name for t in heldout], target)
                length = path.stat().st_size
                path.unlink()
                return [length, float(np.mean([s.kl_mean for s in scores]))]

            key = ["plan, fed back", width, bench.calibration_tokens, plan.kept, plan.formats]
            length, kl = bench.remember(key, measure)
            found.append((plan.predicted_kl, kl, width, plan.count, length))
            print(bits, found[-1], flush=True)
        best, without = min(found), next((f for f in found if f[2] == model.expert.size), None)
        for predicted, kl, width, count, length in found:
            mark = " (chosen)" if width == best[2] else ""
            ratio = f"{kl / without[1]:.2f}" if without else ""
            head = f"| {model.name} | {bits:g} | {width} of {model.expert.size}{mark} | {count} of {model.n_experts} | {length / 1e6:.2f}"
            rows.append(f"{head} | {predicted:.4f} | **{kl:.4f}** | {ratio} |")
    return rows


def main() -> None:
    """Measure everything and write the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=["examples/tiny-moe-b"])
    parser.add_argument("--work", type=Path, default=Path("bench"), help="everything measured is kept here between runs")
    parser.add_argument("--tokens", type=int, default=5120, help="held-out tokens of all five texts")
    parser.add_argument("--calibration-tokens", type=int, default=32_768)
    parser.add_argument("--results", type=Path, default=Path("benchmarks/results"), help="where width.md goes")
    options = parser.parse_args()
    scores, plans = [], []
    for source in options.models:
        model = inspect_model(source)
        bench = Bench(model, (options.work / model.name).absolute(), options.tokens, options.calibration_tokens)
        bench.work.mkdir(parents=True, exist_ok=True)
        plans += compare_plans(bench)
        scores += compare_scores(bench)
    command = f"`python benchmarks/width.py --models {' '.join(options.models)}`"
    made = f"{command}, {datetime.now(UTC):%Y-%m-%d}, {platform.machine()}, {os.cpu_count()} cores"
    lines = [f"# The expert width as an option: KL (nats/token) on {options.tokens} held-out tokens", ""]
    lines += [
        f"{made}; {options.calibration_tokens} calibration tokens for plans, {SCORE_TOKENS} for scores. What stands where: see width.py.",
        "",
    ]
    lines += ["## Plans of each width at equal file sizes", ""]
    lines += ["| model | bits for each weight | width | kept | file MB | predicted | measured | measured / full width |", "|" + "---|" * 8]
    lines += [*plans, "", "## Which neurons stay, nothing quantized", ""]
    lines += ["| model | width | score | as cut | closed form | and descent | the same, on unfitted calibration text |", "|" + "---|" * 7]
    options.results.mkdir(parents=True, exist_ok=True)
    (options.results / "width.md").write_text("\n".join([*lines, *scores, ""]))


if __name__ == "__main__":
    main()
