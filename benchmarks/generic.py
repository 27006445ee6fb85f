"""This script says how far generic prices can be trusted: it prices every measured model from the others, beside its own measurements.

    python benchmarks/generic.py SENSITIVITY_FOLDER > benchmarks/results/generic.md

SENSITIVITY_FOLDER as in distil_priors.py.  A model's close relatives are left out with it.  Rank: Spearman correlation of its tensors'
nats (floor off) with the shares that the other models give them.  Last columns: one type per tensor in as many bytes as IQ4_XS or Q2_K
everywhere would take, chosen by the generic prices and by its own; what the first costs over the second, both by its own.
"""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
from arguments import make_parser
from distil_priors import fit_curve, n_layers_of, pool_curves, pool_roles, read_curves, read_sensitivities, relative_curve, subtract_floor

from edgemoe.model.describe import describe, load_shape
from edgemoe.price.priors import pooled_share
from edgemoe.targets.gguf.formats import FORMATS, WIDE, formats_of_rows

# Measured model -> its shape, and what its relatives' names begin with.
MODELS = {
    "DeepSeek-V3.1-Terminus": ("DeepSeek-V3", "DeepSeek"),
    "GLM-4.5": ("GLM-4.5", "GLM-4"),
    "GLM-4.5-Air": ("GLM-4.5-Air", "GLM-4"),
    "GLM-4.6": ("GLM-4.6", "GLM-4"),
    "GLM-4.7-Flash": ("GLM-4.7-Flash", "GLM-4"),
    "GLM-5.2": ("GLM-5.2", "GLM-5"),
    "Kimi-K2.5": ("Kimi-K2", "Kimi"),
    "Qwen3-VL-235B-A22B-Instruct": ("Qwen3-235B-A22B", "Qwen3-VL"),
    "Qwen3.5-122B-A10B": ("Qwen3.5-122B-A10B", "Qwen3.5-122B"),
    "Qwen3.5-35B-A3B": ("Qwen3.5-35B-A3B", "Qwen3."),
    "Qwen3.5-397B-A17B": ("Qwen3.5-397B-A17B", "Qwen3.5-397B"),
}
BUDGETS = ("IQ4_XS", "Q2_K")  # whose bytes are spent
TYPES = [name for name in WIDE if name != "F16"]
Keys = list[tuple[str, int]]


def choose(nats: np.ndarray, types: np.ndarray, weights: np.ndarray, cols: np.ndarray, bits: float) -> np.ndarray:
    """The format of each tensor with the least sum of nats at a mean of `bits`: the Lagrangian's choice, by bisection."""
    size = np.array([[FORMATS[t].bpw if t in formats_of_rows(int(c)) else np.inf for t in TYPES] for c in cols]) * weights[:, None]
    cost = nats[:, None] * types[None]
    low, high = 1e-20, 1e5
    for _ in range(100):
        price = math.sqrt(low * high)
        picks = (cost + price * np.where(np.isfinite(size), size, 1e30)).argmin(axis=1)
        total = size[np.arange(len(size)), picks].sum()
        low, high = (price, high) if total > bits * weights.sum() else (low, price)
    return (cost + high * np.where(np.isfinite(size), size, 1e30)).argmin(axis=1)


def ranks(values: np.ndarray) -> np.ndarray:
    """Ranks, ties by place."""
    return values.argsort(kind="stable").argsort(kind="stable").astype(float)


def main() -> None:
    """Print the table."""
    parser = make_parser(__doc__)
    parser.add_argument("folder", type=Path, metavar="SENSITIVITY_FOLDER")
    folder: Path = parser.parse_args().folder
    curves = read_curves(folder / "qtype_curve.csv")
    nats = {m: subtract_floor(raw) for m, raw in read_sensitivities(folder / "tensor_sensitivity.csv").items()}
    print("# Generic prices against measured ones\n")
    print("`python benchmarks/generic.py`: each model priced from the others (relatives left out), beside its own published measurements.")
    print("Rank: Spearman, tensors' nats.  Q4_K: nats of the whole model.  Types: largest factor between its curve and the pooled one.")
    print("Last columns: own nats of the plan that generic prices choose in the bytes of IQ4_XS (Q2_K) everywhere, over the best by its")
    print("own prices; in brackets, the same for that one type everywhere.  Nothing is dropped here.  GLM-4.7-Flash and Qwen3-VL-235B show")
    print("how far off a model can be that is unlike the others.\n")
    print("| model | tensors | rank | Q4_K own | Q4_K pooled | types | in IQ4_XS | in Q2_K |\n|---|---|---|---|---|---|---|---|")
    for model, (shape, family) in MODELS.items():
        others = [m for m in nats if not m.startswith(family)]
        pooled, types = pool_roles({m: nats[m] for m in others}), pool_curves({m: c for m, c in curves.items() if m in others})
        layers = n_layers_of(model, nats[model])
        keys: Keys = [k for k in nats[model] if k[0] in pooled]
        own = np.array([max(nats[model][k], 1e-6) for k in keys])
        guess = np.array([pooled_share(role, layer, layers, pooled) for role, layer in keys])
        rank = float(np.corrcoef(ranks(own), ranks(guess))[0, 1])
        known = describe(load_shape(shape), shape)
        tensors = [t for t in known.tensors if t.planned and t.expert <= 0]
        at = {(t.role, t.layer): (t.n_weights * (known.n_experts if t.expert == 0 else 1), t.shape[1]) for t in tensors}
        weights, cols = (np.array([at[k][i] for k in keys], float) for i in range(2))
        fit = fit_curve(curves.get(model, {}))
        own_types = types | (relative_curve(curves[model]) if fit else {})
        factor = max((abs(math.log(v / types[t])) for t, v in own_types.items() if t in TYPES and FORMATS[t].bpw > 2), default=0.0)
        mine, theirs = (np.array([table[t] for t in TYPES]) for table in (own_types, types))
        cells = []
        narrow = any(c % 256 for (role, _), c in zip(keys, cols, strict=True) if role.endswith("_exps"))
        for flat in BUDGETS:
            if narrow:
                cells.append("rows of 1408 fall back")
                continue
            by_generic, by_own = (choose(n, t, weights, cols, FORMATS[flat].bpw) for n, t in ((guess, theirs), (own, mine)))
            cost = [float((own * mine[picks]).sum()) for picks in (by_generic, by_own)]
            cells.append(f"{cost[0] / cost[1]:.2f} ({float(own.sum()) * own_types[flat] / cost[1]:.1f})")
        unit = np.median([f[1] for m, c in curves.items() if m in others and (f := fit_curve(c))])
        shown = (f"{fit[1]:.4f}", f"{math.exp(factor):.1f}") if fit else ("", "")
        print(f"| {model} | {len(keys)} | {rank:.2f} | {shown[0]} | {unit:.4f} | {shown[1]} | {' | '.join(cells)} |")


if __name__ == "__main__":
    main()
