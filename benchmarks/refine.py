"""This script compares KL predicted with KL measured, before and after one refinement, for plans at eight budgets run in llama.cpp.

    python benchmarks/refine.py [examples/tiny-moe examples/tiny-moe-b] [--work DIR] [--tokens 81920] [--jobs 2]

"expected" is what a refinement takes from its measurement on calibration text (edgemoe/pipeline/refine.py), "held-out" what nothing was
fitted to.
"""

from __future__ import annotations

from concurrent.futures import ProcessPoolExecutor, as_completed
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import table
from arguments import make_parser
from measure import Reference, remembered

from edgemoe.base.storage import hash_json
from edgemoe.base.work import REVISIONS
from edgemoe.calibrate.collect import collect_stats
from edgemoe.ir import Model, Plan
from edgemoe.model.inspect import inspect_model
from edgemoe.pipeline.refine import Measured, Measurer, expect, fitted_share, refine_plan
from edgemoe.pipeline.store import store_weights
from edgemoe.pipeline.widths import price_cached
from edgemoe.plan.infeasible import least_budget
from edgemoe.plan.solve import solve_plan
from edgemoe.price.choices import discount
from edgemoe.stream.texts import DEFAULT_TOKENS, choose_texts
from edgemoe.targets import find_target

BUDGETS = 8
LARGEST, LEAST = 0.5, 0.08  # of the checkpoint's bytes: 8 bits a weight, and where a quarter of the experts stays
HEADS = [
    "model",
    "file MB",
    "kept",
    "predicted",
    "held-out",
    "ratio",
    "rounds",
    "kept",
    "predicted",
    "expected",
    "held-out",
    "ratio",
    "better",
]


def measure_row(source: str, work: Path, tokens: int, number: int) -> dict[str, Any]:
    """One budget, of all `BUDGETS` the one with this number; statistics and prices are made by who comes first."""
    model, target = inspect_model(source), find_target("gguf")
    work = work / model.name
    judged = work / f"judge-{number}"
    judged.mkdir(parents=True, exist_ok=True)
    calibration, heldout = choose_texts([], [])
    stats = collect_stats(model, calibration, work)
    costs = discount(price_cached(model, stats, target, 512, work, None)[0], repair=True, rounding="feedback")
    reference = Reference(model, heldout, tokens, work)

    def stored_as(plan: Plan, rounding: str = "feedback") -> Model:
        return store_weights(model, calibration, stats, plan, work, rounding=rounding)

    def judge(plan: Plan) -> float:
        def write_and_measure() -> float:
            path = target.write(stored_as(plan), stats, plan, judged, 0, None).path
            kl = reference.kl_of_file(path)
            path.unlink()
            return kl

        key = hash_json(model.fingerprint, stats.key, REVISIONS["repair"], plan.kept, plan.formats, reference.windows.tokens.tolist())
        return float(remembered(judged / f"{key[:16]}.json", write_and_measure))

    run = Measurer(model, stats, calibration, target, work, max_tokens=DEFAULT_TOKENS, stored_as=stored_as, rounding="feedback")

    def measure(plan: Plan) -> Measured:
        return expect(plan, run(plan), run.among * fitted_share(plan, costs, "feedback"))

    overhead = sum(costs.memory[part] for part in ("runtime", "kv", "compute", "output"))
    lowest = max(LEAST * model.n_bytes, ((least_budget(costs) or 0) - overhead) * 1.02)
    budget = round(LARGEST * model.n_bytes * (lowest / LARGEST / model.n_bytes) ** (number / (BUDGETS - 1))) + overhead
    first = solve_plan(costs, budget)
    refined = refine_plan(costs, first, 1, lambda c: solve_plan(c, budget), measure)
    before, after, last = judge(first), judge(refined.plan), min(refined.rounds, key=lambda r: r.expected)
    return {
        "model": model.name, "file MB": f"{first.file_size / 1e6:.2f}", "kept 0": first.count, "predicted 0": first.predicted_kl,
        "held 0": before, "rounds": len(refined.rounds), "kept": refined.plan.count, "predicted": refined.plan.predicted_kl,
        "expected": last.expected, "held": after,
    }  # fmt: skip


def line(r: dict[str, Any]) -> str:
    """A table row."""
    cells = (
        r["model"], r["file MB"], r["kept 0"], f"{r['predicted 0']:.5f}", f"{r['held 0']:.5f}", f"{r['predicted 0'] / r['held 0']:.2f}",
        r["rounds"], r["kept"], f"{r['predicted']:.5f}", f"{r['expected']:.5f}", f"**{r['held']:.5f}**",
        f"{r['predicted'] / r['held']:.2f}", f"{r['held'] / r['held 0']:.3f}",
    )  # fmt: skip
    return table.row(cells)


def summary(rows: list[dict[str, Any]]) -> str:
    """How many predictions were near, and whether the plans got better."""
    said = []
    for name, p, m in (("unrefined", "predicted 0", "held 0"), ("refined", "predicted", "held")):
        ratios = [r[p] / r[m] for r in rows if r[m] < 0.3]
        near = sum(0.8 <= x <= 1.2 for x in ratios)
        said.append(f"{name}: {near} of {len(ratios)} within 20 % (KL < 0.3), {min(ratios):.2f} to {max(ratios):.2f}")
    better = float(np.exp(np.mean([np.log(r["held"] / r["held 0"]) for r in rows])))
    return f"Predicted / measured on held-out text, {'; '.join(said)}. KL after / before, geometric mean: {better:.3f}."


def main() -> None:
    """Measure everything and write the table."""
    parser = make_parser(__doc__, work=True, tokens=81_920, results="refine.md")  # few tokens flip and hold most of the KL: it takes many
    parser.add_argument("models", nargs="*", default=["examples/tiny-moe-b", "examples/tiny-moe"])
    parser.add_argument("--jobs", type=int, default=1, help="budgets that run at once; each takes its share of the cores")
    options = parser.parse_args()
    wanted = [(source, number) for source in options.models for number in range(BUDGETS)]
    with ProcessPoolExecutor(options.jobs, mp_context=get_context("spawn")) as pool:
        running = [pool.submit(measure_row, source, options.work, options.tokens, number) for source, number in wanted]
        for future in as_completed(running):
            print(line(future.result()), flush=True)
    rows = [future.result() for future in running]
    text = ["# Predicted and measured KL (nats/token), before and after one refinement", ""]
    command = f"python benchmarks/refine.py {' '.join(options.models)} --tokens {options.tokens}"
    text += [f"{table.made_by(command, 'cores')}.", "", summary(rows), ""]
    text += [
        "Left as the prices say: file, experts kept, KL predicted, KL measured on held-out text, their ratio.  Right refined: rounds,",
        "experts kept, KL predicted, KL expected from calibration text, KL on held-out text, ratio of predicted to held-out, KL after over",
        "before.",
        "",
        *table.head(HEADS), *map(line, rows), "",
    ]  # fmt: skip
    table.save(options.results, "refine.md", text)


if __name__ == "__main__":
    main()
