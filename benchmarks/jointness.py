"""This script compares the joint optimum with the usual ways to get into the same bytes, on the same prices.

    python benchmarks/jointness.py examples/tiny-moe [--work DIR] [--tokens 5120]
    python benchmarks/jointness.py --generic GLM-5.2 Qwen3-30B-A3B      # predicted only, from published measurements

Every way is solved to within 0.1 % of its own optimum, so the differences are those of the limits:
    bits only         every expert kept, types free
    drops only        every tensor Q8_0 (or F16 where a row allows no Q8_0), kept count free
    round ratio       3/4, 1/2 or 1/4 of the experts kept, whichever is best (tuned), then types free
    one type          kept count free (tuned), then one type for the whole file
    equal layers      as joint, but every layer gets the same bytes for its experts
KL is measured in llama.cpp on held-out text.  Survivors are not repaired here, so that the ways differ in nothing but their plans.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import table
from arguments import make_parser
from calibrated import CalibratedModel

from edgemoe.base.errors import BudgetError, UsageError
from edgemoe.ir import Costs, Plan
from edgemoe.ir.memory import peak
from edgemoe.plan.presets import Settings, plan_preset
from edgemoe.plan.solve import solve_plan
from edgemoe.price.priors import price_config
from edgemoe.rules import ByteLimit, KeptCount, Pin, Rule

GAP, SECONDS = 1e-3, 20.0  # of every solve
SHARES = (0.75, 0.5, 0.25)
SIZES = (0.45, 0.33, 0.24, 0.17, 0.12)  # of the checkpoint's bytes
BITS = (4.0, 2.5, 1.5)  # bytes of the file over all weights, for shapes
PRESETS = {"bits only": "types-only", "drops only": "drops-only"}  # as `edgemoe plan --preset` knows them
WAYS = ("joint", "bits only", "drops only", "round ratio", "one type", "equal layers")
COLUMNS = """\
All ways take the same prices and the same budget, and differ in their limits alone: "joint" has none, "bits only" keeps every expert,
"drops only" stores every tensor in Q8_0, "round ratio" keeps a round share of the experts (whichever share is best), "one type" stores
the whole file in one type, and "equal layers" gives every layer the same bytes for its experts."""
UNREPAIRED = "Survivors are not repaired, so that the ways differ in nothing but their plans."


def tries(costs: Costs, way: str, joint: Plan) -> Iterator[list[Rule]]:
    """The limits of one way that is no preset; the best of several tries counts."""
    if way == "joint":
        yield []
    elif way == "round ratio":
        for share in SHARES:
            count = min(costs.counts, key=lambda n: abs(n - share * costs.n_experts))
            yield [KeptCount(at_least=count, at_most=count)]
    elif way == "one type":
        for name in costs.formats:
            yield [Pin(tensors=("*",), format=name)]
    else:
        experts = sum(size for name, size in joint.sizes.items() if "_exps" in name)
        each = experts // costs.n_layers
        yield [ByteLimit(tensors=("experts",), layers=(layer,), at_most=f"{each}B", name=f"layer {layer}") for layer in costs.expert_layers]


def best_of(costs: Costs, budget: int, way: str, joint: Plan) -> Plan | None:
    """The best plan of one way; None when it cannot get into these bytes."""
    if way in PRESETS:
        try:
            return plan_preset(PRESETS[way], costs, budget, Settings(gap=GAP, seconds=SECONDS))
        except BudgetError:
            return None
    found = []
    for rules in tries(costs, way, joint):
        try:
            found.append(solve_plan(costs, budget, rules=rules, gap=GAP, seconds=SECONDS))
        except (BudgetError, UsageError):  # does not fit, or a tensor whose rows do not take the type
            continue
    return min(found, key=lambda p: p.q) if found else None


def predict(name: str, results: Path) -> None:
    """The table of a shape whose prices come from published measurements: nothing is emitted."""
    costs = price_config(name)
    lines = [f"# {name}: what deciding jointly is worth, predicted", ""]
    lines += [f"{table.made_by(f'python benchmarks/jointness.py --generic {name}')}. Prices: {costs.origin}.", ""]
    lines += [COLUMNS, "", "Each cell holds the nats per token predicted (times the joint optimum) and the kept experts.", ""]
    lines += table.head(["file GB", *WAYS])
    weights = sum(u.n_weights for u in costs.units)
    beside = peak({**costs.memory, "weights": 0, "staging": 0})
    for bits in BITS:
        budget = beside + round(weights * bits / 8)
        joint = solve_plan(costs, budget)
        cells = []
        for way in WAYS:
            plan = best_of(costs, budget, way, joint)
            cells.append("does not fit" if plan is None else f"**{plan.q:.3f}** ({plan.q / joint.q:.2f}), {plan.count}")
        lines.append(table.row([f"{(budget - beside) / 1e9:.1f} ({bits} bits)", *cells]))
    print(table.save(results, f"jointness-{name.lower()}.md", [*lines, ""]))


def main() -> None:
    """Plan, emit and measure every way at every size; write the table."""
    parser = make_parser(__doc__, work=True, tokens=5120, results="jointness-NAME.md")
    parser.add_argument("model", type=Path, nargs="?")
    parser.add_argument("--generic", nargs="+", default=[], metavar="SHAPE")
    options = parser.parse_args()
    for name in options.generic:
        predict(name, options.results)
    if options.model is None:
        return
    calibrated = CalibratedModel(options.model, options.work / options.model.name, options.tokens)
    costs, overhead = calibrated.costs, calibrated.overhead  # without repair, which needs minutes for each plan
    lines = [f"# {calibrated.model.name}: what deciding jointly is worth", ""]
    lines += [f"{table.made_by(f'python benchmarks/jointness.py {options.model}')}.", ""]
    lines += [COLUMNS, UNREPAIRED, ""]
    lines += ["Each cell holds the KL measured (predicted) in nats per token, the kept experts and the file size in MB.", ""]
    lines += table.head(["budget MB", *WAYS])
    for share in SIZES:
        budget = overhead + round(share * calibrated.model.n_bytes)
        joint = solve_plan(costs, budget)
        cells = []
        for way in WAYS:
            plan = best_of(costs, budget, way, joint)
            if plan is None:
                cells.append("does not fit")
                continue
            made_from = ("types", calibrated.imatrix, sorted(plan.formats.items()), plan.kept)
            made = calibrated.held.measure(lambda plan=plan: calibrated.write(plan.formats, plan.kept), *made_from)
            cells.append(f"**{calibrated.held.mean_kl(made):.4f}** ({plan.predicted_kl:.4f}), {plan.count}, {made.size / 1e6:.2f}")
        lines.append(table.row([f"{budget / 1e6:.1f}", *cells]))
    print(table.save(options.results, f"jointness-{calibrated.model.name}.md", [*lines, ""]))


if __name__ == "__main__":
    main()
