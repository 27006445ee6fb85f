"""What dropping experts costs before and after repair, everything else unquantized: one table, KL on held-out text by domain.

    python benchmarks/repair.py [--work DIR] [--tokens 5120] [--models examples/tiny-moe examples/tiny-moe-b]

The kept sets are the menu's own at 3/4, 1/2 and 1/4 of the experts.  "closed form" refits W_down alone; "default" is what `build` does.
Calibration text and held-out text are the shipped ones.  "repaired / not" is the factor by which `price` scales the cost of drops.
"""

from __future__ import annotations

import argparse
import os
import platform
import shutil
import time
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path

import numpy as np

from edgemoe.calibrate.collect import collect_stats
from edgemoe.ir import Costs, Model, Plan
from edgemoe.model.inspect import inspect_model
from edgemoe.pipeline.widths import price_cached
from edgemoe.plan.solve import solve_plan
from edgemoe.repair.survivors import EPOCHS, repair_survivors
from edgemoe.stream.layers import LayerStream
from edgemoe.stream.passes import final_states
from edgemoe.stream.texts import choose_texts
from edgemoe.stream.windows import Windows, tokenize
from edgemoe.targets import find_target
from edgemoe.verify.logits import kl_of_rows

SHARES = (0.75, 0.5, 0.25)
OPTIONS = {"closed form": {"epochs": 0}, "default": {"epochs": EPOCHS}}


def kl_by_domain(model: Model, windows: Windows, original: np.ndarray, changed: np.ndarray, n_domains: int) -> np.ndarray:
    """Mean KL(original || changed) in nats per token [domains], from normed last states [windows, length, hidden]."""
    head = LayerStream(model).head()[1].T.numpy()
    sums = [kl_of_rows(original[i, :n] @ head, changed[i, :n] @ head).sum() for i, n in enumerate(windows.lengths)]
    return np.bincount(windows.domain, sums, n_domains) / np.bincount(windows.domain, windows.lengths, n_domains)


def drop_plan(costs: Costs, count: int) -> Plan:
    """The menu's kept sets at one count; formats do not matter here."""
    plan, c = solve_plan(costs, 10**15), costs.counts.index(count)
    kept = tuple(tuple(int(e) for e in np.flatnonzero(costs.kept[c, layer])) for layer in range(costs.kept.shape[1]))
    return replace(plan, kept=kept)


def measure_model(source: str, work: Path, n_tokens: int) -> list[str]:
    """Table rows of one model."""
    model = inspect_model(source)
    work = work / model.name
    work.mkdir(parents=True, exist_ok=True)
    calibration, heldout = choose_texts([], [])
    stats = collect_stats(model, calibration, work)
    costs = price_cached(model, stats, find_target("gguf"), 512, work, None)[0]
    windows, names = tokenize(model, heldout, n_tokens, 512), [t.name for t in heldout]
    original = final_states(model, windows, work)
    rows = []
    for share in SHARES:
        plan = drop_plan(costs, max(model.top_k, round(share * model.n_experts)))
        before = kl_by_domain(model, windows, original, final_states(model, windows, work, kept=plan.kept), len(names))
        rows.append(_row(model.name, plan, "none", before, before, ""))
        print(rows[-1], flush=True)
        for name, options in OPTIONS.items():
            start = time.perf_counter()
            repaired = repair_survivors(model, calibration, plan, work, **options)
            seconds = f"{time.perf_counter() - start:.0f}"
            after = kl_by_domain(model, windows, original, final_states(repaired, windows, work, kept=plan.kept), len(names))
            rows.append(_row(model.name, plan, name, after, before, seconds))
            print(rows[-1], flush=True)
            shutil.rmtree(Path(repaired.find("ffn_down_exps", 0, plan.kept[0][0]).file).parent)  # so that times are times
    return rows


def _row(name: str, plan: Plan, option: str, kl: np.ndarray, before: np.ndarray, seconds: str) -> str:
    domains = " | ".join(f"{v:.4f}" for v in kl)
    factors = f"{kl.mean() / before.mean():.2f} | {(kl / before).max():.2f}"
    return f"| {name} | {plan.count} of {plan.n_experts} | {option} | {domains} | **{kl.mean():.4f}** | {factors} | {seconds} |"


def main() -> None:
    """Measure everything and write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=["examples/tiny-moe", "examples/tiny-moe-b"])
    parser.add_argument("--work", type=Path, default=Path("bench"), help="statistics are kept here between runs")
    parser.add_argument("--tokens", type=int, default=10_240, help="held-out tokens of all five texts")
    parser.add_argument("--results", type=Path, default=Path("benchmarks/results"), help="where repair.md goes")
    options = parser.parse_args()
    names = [t.name for t in choose_texts([], [])[1]]
    lines = [f"# Drops before and after repair: KL (nats/token) on {options.tokens} held-out tokens, nothing quantized", ""]
    lines += [f"`python benchmarks/repair.py`, {datetime.now(UTC):%Y-%m-%d}, {platform.machine()}, {os.cpu_count()} cores.", ""]
    lines += ["| model | kept | repair | " + " | ".join(names) + " | mean | repaired / not | worst domain | seconds |"]
    lines += ["|" + "---|" * (7 + len(names))]
    for source in options.models:
        lines += measure_model(source, options.work, options.tokens)
    options.results.mkdir(parents=True, exist_ok=True)
    (options.results / "repair.md").write_text("\n".join([*lines, ""]))


if __name__ == "__main__":
    main()
