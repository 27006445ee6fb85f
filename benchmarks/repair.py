"""This script measures what dropping experts costs before and after repair, with nothing quantized: KL on held-out text by domain.

    python benchmarks/repair.py [--work DIR] [--tokens 5120] [--models examples/tiny-moe examples/tiny-moe-b]

The kept sets are the menu's own at 3/4, 1/2 and 1/4 of the experts.  "closed form" refits W_down alone; "default" is what `build` does.
Calibration text and held-out text are the shipped ones.  "repaired / not" is the factor by which `price` scales the cost of drops.
"""

from __future__ import annotations

import shutil
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import table
from arguments import make_parser
from measure import Reference

from edgemoe.calibrate.collect import collect_stats
from edgemoe.ir import Costs, Plan
from edgemoe.model.inspect import inspect_model
from edgemoe.pipeline.widths import price_cached
from edgemoe.plan.solve import solve_plan
from edgemoe.repair.survivors import EPOCHS, repair_survivors
from edgemoe.stream.texts import choose_texts
from edgemoe.targets import find_target

SHARES = (0.75, 0.5, 0.25)
OPTIONS = {"closed form": 0, "default": EPOCHS}  # epochs of descent
COLUMNS = """\
Each row holds the KL of one kept set (the menu's own at that count) by text, and the mean of the texts.  "None" drops experts and repairs
nothing, "closed form" refits W_down of the survivors, and "default" repairs as `edgemoe build` does.  "Repaired / not" is the mean KL of
a row over the mean KL of "none", by which `price` scales the cost of drops; "worst domain" is the largest such ratio of one text, and the
seconds are those of the repair."""


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
    reference, rows = Reference(model, heldout, n_tokens, work), []
    for share in SHARES:
        plan = drop_plan(costs, max(model.top_k, round(share * model.n_experts)))
        before = reference.kl_of_model(model, plan.kept)
        rows.append(_row(model.name, plan, "none", before, before, ""))
        print(rows[-1], flush=True)
        for name, epochs in OPTIONS.items():
            start = time.perf_counter()
            repaired = repair_survivors(model, calibration, plan, work, epochs=epochs)
            seconds = f"{time.perf_counter() - start:.0f}"
            after = reference.kl_of_model(repaired, plan.kept)
            rows.append(_row(model.name, plan, name, after, before, seconds))
            print(rows[-1], flush=True)
            shutil.rmtree(Path(repaired.get("ffn_down_exps", 0, plan.kept[0][0]).file).parent)  # so that times are times
    return rows


def _row(name: str, plan: Plan, option: str, kl: np.ndarray, before: np.ndarray, seconds: str) -> str:
    domains = " | ".join(f"{v:.4f}" for v in kl)
    factors = f"{kl.mean() / before.mean():.2f} | {(kl / before).max():.2f}"
    return f"| {name} | {plan.count} of {plan.n_experts} | {option} | {domains} | **{kl.mean():.4f}** | {factors} | {seconds} |"


def main() -> None:
    """Measure everything and write the table."""
    parser = make_parser(__doc__, work=True, tokens=10_240, results="repair.md")
    parser.add_argument("--models", nargs="+", default=["examples/tiny-moe", "examples/tiny-moe-b"])
    options = parser.parse_args()
    names = [t.name for t in choose_texts([], [])[1]]
    lines = [f"# Drops before and after repair: KL (nats/token) on {options.tokens} held-out tokens, nothing quantized", ""]
    lines += [f"{table.made_by('python benchmarks/repair.py', 'cores')}.", "", COLUMNS, ""]
    lines += table.head(["model", "kept", "repair", *names, "mean", "repaired / not", "worst domain", "seconds"])
    for source in options.models:
        lines += measure_model(source, options.work, options.tokens)
    table.save(options.results, "repair.md", [*lines, ""])


if __name__ == "__main__":
    main()
