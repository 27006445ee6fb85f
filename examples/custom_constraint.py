"""A rule of your own, three lines of Python: at most so many bytes read per token, gate and up alike, and what German uses stays.

    python examples/custom_constraint.py [MODEL] [--memory SIZE] [--work DIR]

Calibration and prices are kept in DIR, so a second run with another rule takes a second.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import edgemoe as em
from edgemoe.rules import DomainKept, SameFormat


def light_traffic(p: Any) -> Any:
    """A token reads at most 1.3 MB of weights: what a box of known bandwidth can read at the speed that is wanted."""
    return p.active_bytes() <= 1.3 * p.MB


def busy_experts(p: Any) -> Iterator[Any]:
    """In every layer at least two of the three experts that mathematics uses most stay."""
    for layer in p.layers:
        yield p.kept(layers=[layer], experts=p.experts(layer, domain="math", top=3)) >= 2, f"math in layer {layer}"


def main() -> None:
    """Price the model once, then plan without and with the rules."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", default=str(Path(__file__).parent / "tiny-moe-b"))
    parser.add_argument("--memory", default="44MB")
    parser.add_argument("--work", type=Path, default=Path("example-work"))
    parser.add_argument("--calibration-tokens", type=int, default=16_384)
    options = parser.parse_args()
    costs = em.price_model(options.model, options.work, context=512, calibration_tokens=options.calibration_tokens)
    budget = em.parse_bytes(options.memory)
    rules = [light_traffic, busy_experts, SameFormat(name="gate and up alike"), DomainKept(domain="german", top=2, name="german")]
    for label, chosen in (("without rules", []), ("with rules", rules)):
        plan = em.solve_plan(costs, budget, rules=chosen)
        print(f"{label:14s} {plan.count} of {plan.n_experts} experts, {plan.file_size} bytes, predicted KL {plan.predicted_kl:.4f}")
        for rule in plan.rules:
            print(f"               {rule.name}: {'kept' if rule.slack is None else f'{rule.slack:.6g} left'}")


if __name__ == "__main__":
    main()
