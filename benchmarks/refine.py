"""Predicted beside measured, before and after one refinement: plans at eight budgets, repaired, written and run in llama.cpp.

    python benchmarks/refine.py [examples/tiny-moe examples/tiny-moe-b] [--work DIR] [--tokens 2560]

"calibration" is the text that a refinement measures on (edgemoe/refine.py), "held-out" what nothing was fitted to.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np

from edgemoe.calibrate import collect_stats
from edgemoe.inspect import inspect_model
from edgemoe.ir import Model, Plan
from edgemoe.pipeline import price_cached, store_weights
from edgemoe.plan import least_budget, solve_plan
from edgemoe.price import discount
from edgemoe.refine import Measurer, refine_plan
from edgemoe.storage import hash_json
from edgemoe.targets import find_target
from edgemoe.texts import DEFAULT_TOKENS, choose_texts
from edgemoe.verify import compare_logits, reference_states, tokenize_heldout

BUDGETS = 8
LARGEST, LEAST = 0.5, 0.08  # of the checkpoint's bytes: 8 bits a weight, and where a quarter of the experts stays
HEADS = (
    "model",
    "file MB",
    "kept",
    "predicted",
    "held-out",
    "ratio",
    "rounds",
    "kept",
    "predicted",
    "calibration",
    "held-out",
    "ratio",
    "better",
)


def measure_model(source: str, work: Path, tokens: int) -> list[dict[str, Any]]:
    """One row for each budget."""
    model, target = inspect_model(source), find_target("gguf")
    work = work / model.name
    work.mkdir(parents=True, exist_ok=True)
    calibration, heldout = choose_texts([], [])
    stats = collect_stats(model, calibration, work)
    costs = discount(price_cached(model, stats, target, 512, work, None)[0], repair=True, rounding="feedback")
    windows, names = tokenize_heldout(model, heldout, tokens), [t.name for t in heldout]
    states = reference_states(model, windows, work)
    cache = work / "refine.json"
    known: dict[str, float] = json.loads(cache.read_text()) if cache.exists() else {}

    def stored_as(plan: Plan, rounding: str = "feedback") -> Model:
        return store_weights(model, calibration, stats, plan, work, rounding=rounding)

    def judge(plan: Plan) -> float:
        key = hash_json(model.fingerprint, stats.key, plan.kept, plan.formats, windows.tokens.tolist())
        if key not in known:
            path = target.write(stored_as(plan), stats, plan, work / "judge", 0, None).path
            known[key] = float(np.mean([s.kl_mean for s in compare_logits(path, model, windows, states, names, target)]))
            path.unlink()
            cache.write_text(json.dumps(known))
        return known[key]

    (work / "judge").mkdir(exist_ok=True)
    measure = Measurer(model, stats, calibration, target, work, max_tokens=DEFAULT_TOKENS, stored_as=stored_as, rounding="feedback")
    overhead = sum(costs.memory[part] for part in ("runtime", "kv", "compute", "output"))
    lowest = max(LEAST * model.n_bytes, (least_budget(costs) - overhead) * 1.02)
    rows = []
    for i in range(BUDGETS):
        budget = round(LARGEST * model.n_bytes * (lowest / LARGEST / model.n_bytes) ** (i / (BUDGETS - 1))) + overhead
        first = solve_plan(costs, budget)
        refined = refine_plan(costs, first, 1, lambda c, budget=budget: solve_plan(c, budget), measure)
        before, after, last = judge(first), judge(refined.plan), min(refined.rounds, key=lambda r: r.measured)
        rows.append(
            {
                "model": model.name, "file MB": f"{first.file_size / 1e6:.2f}", "kept 0": first.count, "predicted 0": first.predicted_kl,
                "held 0": before, "rounds": len(refined.rounds), "kept": refined.plan.count, "predicted": refined.plan.predicted_kl,
                "calibration": last.measured, "held": after, "drops": (refined.rounds[0].predicted_drops, refined.rounds[0].measured_drops),
            }
        )  # fmt: skip
        print(line(rows[-1]), flush=True)
    return rows


def line(r: dict[str, Any]) -> str:
    """A table row."""
    cells = (
        r["model"], r["file MB"], r["kept 0"], f"{r['predicted 0']:.4f}", f"{r['held 0']:.4f}", f"{r['predicted 0'] / r['held 0']:.2f}",
        r["rounds"], r["kept"], f"{r['predicted']:.4f}", f"{r['calibration']:.4f}", f"**{r['held']:.4f}**",
        f"{r['predicted'] / r['held']:.2f}", f"{r['held'] / r['held 0']:.3f}",
    )  # fmt: skip
    return "| " + " | ".join(map(str, cells)) + " |"


def summary(rows: list[dict[str, Any]]) -> str:
    """How many predictions were near, and whether the plans got better."""
    said = []
    for name, p, m in (("unrefined", "predicted 0", "held 0"), ("refined", "predicted", "held")):
        ratios = [r[p] / r[m] for r in rows if r[m] < 0.3]
        near = sum(1 / 1.2 < x < 1.2 for x in ratios)
        said.append(f"{name}: {near} of {len(ratios)} within 20 % (KL < 0.3), {min(ratios):.2f} to {max(ratios):.2f}")
    better = float(np.exp(np.mean([np.log(r["held"] / r["held 0"]) for r in rows])))
    return f"Predicted / measured on held-out text, {'; '.join(said)}. KL after / before, geometric mean: {better:.3f}."


def main() -> None:
    """Measure everything and write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="*", default=["examples/tiny-moe-b", "examples/tiny-moe"])
    parser.add_argument("--work", type=Path, default=Path("bench"), help="statistics and measurements are kept here between runs")
    parser.add_argument("--tokens", type=int, default=5120, help="held-out tokens of all five texts")
    parser.add_argument("--results", type=Path, default=Path("benchmarks/results"), help="where refine.md goes")
    options = parser.parse_args()
    rows = [row for source in options.models for row in measure_model(source, options.work, options.tokens)]
    text = ["# Predicted and measured KL (nats/token), before and after one refinement", ""]
    command = f"python benchmarks/refine.py {' '.join(options.models)} --tokens {options.tokens}"
    text += [f"`{command}`, {datetime.now(UTC):%Y-%m-%d}, {platform.machine()}, {os.cpu_count()} cores.", "", summary(rows), ""]
    text += [
        "Left as the prices say: file, experts kept, KL predicted, KL measured on held-out text, their ratio.  Right refined: rounds,",
        "experts kept, KL predicted, KL on calibration and on held-out text, ratio of predicted to held-out, KL after over before.",
        "",
        "| " + " | ".join(HEADS) + " |", "|" + "---|" * len(HEADS), *map(line, rows), "",
    ]  # fmt: skip
    options.results.mkdir(parents=True, exist_ok=True)
    (options.results / "refine.md").write_text("\n".join(text))


if __name__ == "__main__":
    main()
