"""This script compares imported prices with measured ones: plans from an imatrix file are priced by the model's own and run.

    python benchmarks/imported.py examples/tiny-moe examples/tiny-moe-b [--work DIR] [--tokens 5120]

Each model's folder holds `imatrix.gguf`, made by llama-imatrix from the first 70,000 bytes of each shipped calibration text.  Plans, all at
the same budgets, which leave 5, 3.5 and 2.5 bits for each weight:
    measured       calibrated on this model: the best by its own prices
    imatrix        errors and selection counts of the imatrix file, the rest generic
    + saliency     the same with REAP sums by domain, from our calibration, as a CSV
    generic        no file at all
    one type       by measured prices, the kept count free
Nats are sums of the measured prices (Q); sets that are not on the measured menu are priced by single experts.  KL is measured in llama.cpp
on held-out text; plans from an imatrix are written with its importance, all others with ours.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import table
from arguments import make_parser
from calibrated import CalibratedModel

from edgemoe.base.errors import BudgetError
from edgemoe.calibrate.imatrix import read_imatrix, save_imported_stats
from edgemoe.ir import Costs, Plan, Stats
from edgemoe.plan.solve import solve_plan
from edgemoe.price.imported import price_imported, read_saliency
from edgemoe.price.priors import price_generic
from edgemoe.rules import MaxFormats

BITS = (5.0, 3.5, 2.5)  # for each weight of the checkpoint
WAYS = ("measured", "imatrix", "+ saliency", "generic", "one type")


def measured_nats(costs: Costs, plan: Plan) -> float:
    """What a plan costs by a price list that it was not made from."""
    c = costs.counts.index(plan.count)
    kept = np.zeros(costs.kept.shape[1:], bool)
    for row, experts in enumerate(plan.kept):
        kept[row, list(experts)] = True
    picks = [costs.formats.index(plan.formats[unit.name]) for unit in costs.units]
    gone, back = costs.kept[c] & ~kept, ~costs.kept[c] & kept
    drop = costs.drop_cost[:, c].sum(axis=1) + (costs.expert_drop * gone).sum(axis=(1, 2)) - (costs.expert_drop * back).sum(axis=(1, 2))
    return float(costs.weights @ (costs.factor @ costs.cost[c, np.arange(len(picks)), picks] + drop))


def write_saliency(calibrated: CalibratedModel, path: Path) -> Path:
    """REAP sums of every domain, as a user's table."""
    lines = ["layer,expert,score,domain"]
    for layer in range(calibrated.model.n_layers):
        sums = calibrated.stats.arrays(layer)["gate_norm"]
        lines += [
            f"{layer},{e},{sums[d, e]:.6g},{own.name}"
            for d, own in enumerate(calibrated.stats.domains)
            for e in range(calibrated.model.n_experts)
        ]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def compare(source: Path, work: Path, tokens: int) -> None:
    """Print the rows of one model."""
    calibrated = CalibratedModel(source, work, tokens)
    model, target = calibrated.model, calibrated.target
    imported = save_imported_stats(read_imatrix(source / "imatrix.gguf", model), model, work)
    saliency = read_saliency(write_saliency(calibrated, work / "saliency.csv"), model)
    prices = {
        "imatrix": price_imported(model, imported, target, 512),
        "+ saliency": price_imported(model, imported, target, 512, saliency),
        "generic": price_generic(model, target, 512),
    }
    beside = sum(size for name, size in calibrated.costs.memory.items() if name != "context")
    for bits in BITS:
        budget = beside + round(bits * model.n_weights / 8)
        best, cells = 1.0, []
        for way in WAYS:
            try:
                plan = solve_plan(prices.get(way, calibrated.costs), budget, rules=(MaxFormats(at_most=1),) if way == "one type" else ())
            except BudgetError:
                cells.append("-")
                continue
            q = measured_nats(calibrated.costs, plan)
            kl = measure(calibrated, imported if way in ("imatrix", "+ saliency") else calibrated.stats, plan)
            best = q if way == "measured" else best
            cells.append(
                f"{q:.4f} nats, KL {kl:.4f}, keeps {plan.count}" if way == "measured" else f"{q / best:.2f} (KL {kl:.4f}, {plan.count})"
            )
        print(table.row([model.name, f"{bits:g}", *cells]), flush=True)


def measure(calibrated: CalibratedModel, stats: Stats, plan: Plan) -> float:
    """KL of a plan's file, written with one importance matrix."""

    def make() -> Path:
        folder = calibrated.work / "file"
        folder.mkdir(exist_ok=True)
        return calibrated.target.write(calibrated.model, stats, plan, folder, 0, None).path

    return calibrated.held.mean_kl(calibrated.held.measure(make, stats.key, plan.formats, plan.kept))


def main() -> None:
    """Print the table."""
    parser = make_parser(__doc__, work=True, tokens=5120)
    parser.add_argument("models", type=Path, nargs="+")
    args = parser.parse_args()
    print("\n".join(table.head(["model", "bits", *WAYS])))
    for source in args.models:
        compare(source, args.work / source.name, args.tokens)


if __name__ == "__main__":
    main()
