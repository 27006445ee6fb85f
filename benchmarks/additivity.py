"""This script asks whether the KLDs of single degraded tensors add up to that of the whole model, on published measurements.

    python benchmarks/additivity.py SENSITIVITY_FOLDER

The folder is that of distil_priors.py (Thireus/GGUF-Tool-Suite @ 384c1f85).  For each model and type of which both are known: the sum over
tensors of (KLD - floor), tensors that were degraded together counted once, over the KLD of the model stored whole in that type.
"""

from __future__ import annotations

import csv
from collections import defaultdict
from pathlib import Path

import numpy as np
from arguments import make_parser
from distil_priors import FLOOR_QUANTILE, LAYERS, MOE, TENSOR, find_groups


def main() -> None:
    """Print a line for each pair, and the quartiles."""
    parser = make_parser(__doc__)
    parser.add_argument("folder", type=Path, metavar="SENSITIVITY_FOLDER")
    folder: Path = parser.parse_args().folder
    single: dict[tuple[str, str], dict[tuple[str, int], float]] = defaultdict(dict)
    for row in csv.DictReader((folder / "tensor_sensitivity.csv").open()):
        match = TENSOR.fullmatch(row["tensor"])
        role, layer = (match[2], int(match[1])) if match else (row["tensor"].removesuffix(".weight"), -1)
        if row["kld"] and layer < LAYERS.get(row["model"], 10**9):
            single[row["model"], row["probe"].lower()][role, layer] = float(row["kld"])
    whole = {(r["model"], r["qtype"].lower()): float(r["kld"]) for r in csv.DictReader((folder / "qtype_curve.csv").open()) if r["kld"]}
    ratios = {}
    for pair in sorted(set(single) & set(whole)):
        if "bn" in pair[1]:  # ternary types: models not trained for them collapse
            continue
        raw, groups = single[pair], find_groups(single[pair])
        floor = float(np.quantile(list(raw.values()), FLOOR_QUANTILE))
        total = sum(max(kl - floor, 0.0) / groups.get(role, 1) for (role, _), kl in raw.items())
        ratios[pair] = total / whole[pair]
        print(f"{pair[0]:36s} {pair[1]:10s} sum {total:8.3f} whole {whole[pair]:8.3f} ratio {ratios[pair]:.2f}")
    for name, chosen in (("all", list(ratios)), ("MoE", [p for p in ratios if MOE.search(p[0])])):
        values = np.quantile([ratios[p] for p in chosen], (0.25, 0.5, 0.75))
        print(f"{name}: {len(chosen)} pairs, quartiles {' '.join(f'{v:.2f}' for v in values)}")


if __name__ == "__main__":
    main()
