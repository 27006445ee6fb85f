"""This script compares a bit width for every expert with one for a layer's experts and with PMQ's rule, at equal bytes in onnxruntime.

    python benchmarks/onnx_widths.py examples/tiny-moe-b examples/tiny-moe [--work DIR] [--tokens 5120] [--rounding stock]

All plans take the same formats, prices and importance, and are stored as `build` does: survivors repaired where experts go, every matrix
rounded with feedback (or, if asked, by the stock quantizer).  "Layer" is the best plan that stores the experts of a layer
alike (its drops, and the formats of all else, are decided with it); "PMQ" gives every expert 2, 3 or 4 bits by PMQ's own importance, one
format to all else, and drops nothing: of all block sizes and formats for the rest, the plan that our prices like best.  The largest
file is that of everything at 8 bits.  What was measured is kept in the work folder, so a killed run goes on.
"""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import table
from arguments import make_parser
from measure import Reference, remembered

from edgemoe.base.errors import BudgetError
from edgemoe.base.storage import hash_json
from edgemoe.calibrate.collect import collect_stats
from edgemoe.ir import Costs, Plan, counts_text
from edgemoe.model.inspect import inspect_model
from edgemoe.pipeline.store import store_weights
from edgemoe.pipeline.widths import price_cached
from edgemoe.plan.infeasible import least_budget
from edgemoe.plan.presets import Settings, plan_preset
from edgemoe.plan.solve import solve_plan
from edgemoe.price.choices import ROUNDINGS, discount
from edgemoe.stream.texts import choose_texts
from edgemoe.targets import find_target

BUDGETS = 6
AS_LARGE = 0.97  # of our file: smaller ones, of rules that have no use for more bytes, are shown and not compared
METHODS = ("expert", "layer", "PMQ")
COLUMNS = """\
Each cell holds the KL measured; in brackets stand the KL predicted, the experts kept in a layer, and the file size in MB.  All plans take
the same prices: "a bit width for each expert" decides drops and formats freely, "one for a layer's experts" stores the experts of a layer
alike, and PMQ gives every expert its bits by PMQ's own importance, one format to all else, and drops nothing.  A ratio compares two files
only where the second has at least 0.97 times the bytes of the first."""


class PricedModel:
    """A model with prices whose budget is the file's bytes alone, and the plan and the KL of each method."""

    def __init__(self, source: Path, work: Path, tokens: int, rounding: str) -> None:
        self.model, self.target, self.work, self.rounding = inspect_model(source), find_target("onnx"), work, rounding
        work.mkdir(parents=True, exist_ok=True)
        self.calibration, heldout = choose_texts([], [])
        self.stats = collect_stats(self.model, self.calibration, work)
        priced, self.made_from = price_cached(self.model, self.stats, self.target, 512, work, None)
        prices = discount(priced, repair=True, rounding=rounding)
        nothing = np.zeros_like(prices.extra)
        self.costs: Costs = replace(prices, extra=nothing, staging=nothing, memory={**dict.fromkeys(prices.memory, 0), "context": 512})
        self.reference = Reference(self.model, heldout, tokens, work, self.target)
        arrays = [self.stats.arrays(layer) for layer in range(self.model.n_layers)]
        self.tokens, self.gates = (np.stack([a[name].sum(axis=0).astype(float) for a in arrays]) for name in ("count", "gate"))

    def plan(self, method: str, size: int) -> Plan | None:
        """The plan of a method for a file of at most `size` bytes; None: it has none."""
        if method == "expert":
            return solve_plan(self.costs, size)
        try:
            return plan_preset(method, self.costs, size, Settings(stats=self.stats))
        except BudgetError:
            return None

    def measure(self, plan: Plan) -> float:
        """Mean KL over the held-out texts."""
        stored_as = (self.rounding, plan.repair, self.stats.key)
        key = hash_json(plan.kept, plan.formats, stored_as, self.reference.windows.tokens.tolist())

        def make() -> float:
            folder, weights = self.work / "file", self.work / "weights"
            for made in (folder, weights):
                made.mkdir(exist_ok=True)
            stored = store_weights(self.model, self.calibration, self.stats, plan, weights, rounding=self.rounding)
            artifact = self.target.write(stored, self.stats, plan, folder, 0, None)
            assert artifact.model_size == plan.file_size
            kl = self.reference.kl_of_file(artifact.path)
            shutil.rmtree(folder)
            shutil.rmtree(weights)
            return kl

        return float(remembered(self.work / f"onnx-{key[:16]}.json", make))


def compare_methods(priced: PricedModel) -> list[list[tuple[Plan, float] | None]]:
    """For each budget, plan and measured KL of each method."""
    eight = {unit.name: priced.costs.formats.index("INT8_128") for unit in priced.costs.units}
    largest = int(priced.costs.fixed_size[0] + sum(priced.costs.size[0, u, f] for u, f in enumerate(eight.values())))
    least = (least_budget(priced.costs) or 0) * 2
    found = []
    for i in range(BUDGETS):
        size = round(largest * (least / largest) ** (i / (BUDGETS - 1)))
        line: list[tuple[Plan, float] | None] = []
        for method in METHODS:
            plan = priced.plan(method, size)
            line.append(None if plan is None else (plan, priced.measure(plan)))
            print(method, size, line[-1] and (counts_text(line[-1][0]), line[-1][0].predicted_kl, line[-1][1]), flush=True)
        found.append(line)
    return found


def cell(entry: tuple[Plan, float] | None) -> str:
    """KL measured, KL predicted, kept experts and bytes."""
    if entry is None:
        return "-"
    plan, kl = entry
    return f"{kl:.4f} ({plan.predicted_kl:.4f}, {counts_text(plan)}, {plan.file_size / 1e6:.2f})"


def model_lines(priced: PricedModel, lines: list[list[tuple[Plan, float] | None]]) -> list[str]:
    """One model's results as Markdown."""
    tokens = int(priced.reference.windows.lengths.sum())
    out = [f"## {priced.model.name}, {tokens} held-out tokens of {', '.join(priced.reference.names)}", ""]
    ways = ["a bit width for each expert", "one for a layer's experts", "PMQ, 2 to 4 bits"]
    out += table.head(["file MB", *ways, "expert / layer", "expert / PMQ"])
    ratios: list[list[float]] = [[], []]
    for line in lines:
        ours = line[0]
        assert ours is not None  # solve_plan finds a plan, or raises
        cells = []
        for number, peer in enumerate(line[1:]):
            as_large = peer is not None and peer[0].file_size >= AS_LARGE * ours[0].file_size
            if peer is not None and as_large:
                ratios[number].append(ours[1] / peer[1])
            cells.append(f"{ratios[number][-1]:.2f}" if as_large else "-")
        out.append(f"| {ours[0].budget / 1e6:.2f} | **{cell(ours)[:6]}**{cell(ours)[6:]} | {' | '.join([*map(cell, line[1:]), *cells])} |")
    means = [f"{np.exp(np.mean(np.log(r))):.2f}" if r else "-" for r in ratios]
    return [*out, "", f"Geometric means: expert / layer {means[0]}, expert / PMQ {means[1]}.", ""]


def main() -> None:
    """Measure every model; write one table."""
    parser = make_parser(__doc__, work=True, tokens=5120, results="onnx-widths.md")
    parser.add_argument("models", type=Path, nargs="+")
    parser.add_argument("--rounding", choices=ROUNDINGS, default=ROUNDINGS[0], help="how matrices are rounded")
    options = parser.parse_args()
    stock = " --rounding stock" if options.rounding == "stock" else ""
    command = f"python benchmarks/onnx_widths.py {' '.join(map(str, options.models))}{stock}"
    runtime = find_target("onnx").runtime()
    text = ["# ONNX: what a bit width for every expert is worth, KL (nats per token) at equal file bytes", ""]
    text += [
        f"{table.made_by(command, 'cores')}, {runtime}; repaired where experts go, {options.rounding} rounding.",
        "",
    ]
    text += [COLUMNS, ""]
    for source in options.models:
        priced = PricedModel(source, options.work / source.name, options.tokens, options.rounding)
        text += model_lines(priced, compare_methods(priced))
    print(table.save(options.results, f"onnx-widths{stock and '-stock'}.md", text))


if __name__ == "__main__":
    main()
