"""Plans for many budgets from one price list, and a page with a slider.

python examples/sweep.py [MODEL] [--budgets LOW:HIGH:STEP] [-o FOLDER] [--work DIR]
"""

from __future__ import annotations

import argparse
from pathlib import Path

import edgemoe as em
from edgemoe.plan.sweep import parse_budgets, render_sweep, sweep_budgets, write_csv


def main() -> None:
    """Price the model once, plan for every budget, write table and page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", default=str(Path(__file__).parent / "tiny-moe-b"))
    parser.add_argument("--budgets", default="39MB:50MB:1MB")
    parser.add_argument("-o", "--output", type=Path, default=Path("sweep"))
    parser.add_argument("--work", type=Path, default=Path("example-work"))
    parser.add_argument("--calibration-tokens", type=int, default=16_384)
    options = parser.parse_args()
    costs = em.price_model(options.model, options.work, context=512, calibration_tokens=options.calibration_tokens)
    points = sweep_budgets(costs, parse_budgets(options.budgets))
    options.output.mkdir(parents=True, exist_ok=True)
    (options.output / "sweep.csv").write_text(write_csv(points), encoding="utf-8")
    (options.output / "sweep.html").write_text(render_sweep(costs, points), encoding="utf-8")
    for point in points:
        plan = point.plan
        print(f"{point.budget:12d}", "nothing fits" if plan is None else f"{plan.count:3d} experts  KL {plan.predicted_kl:.5f}")
    print(f"the page: {options.output / 'sweep.html'}")


if __name__ == "__main__":
    main()
