"""This script distils published measurements of large MoE models into the tables that `edgemoe.price.priors` prices others with.

    python benchmarks/distil_priors.py SENSITIVITY_FOLDER ROUTING_FOLDER

SENSITIVITY_FOLDER holds tensor_sensitivity.csv (model,probe,tensor,kld,ppl) and qtype_curve.csv (model,qtype,bpw,kld,kld_measured,...):
Thireus/GGUF-Tool-Suite @ 384c1f85, models/*/{kld,ppl}_results.csv and group0/*.csv in long form.  ROUTING_FOLDER holds
glm5.2_10domains.npz: Dorijan10/glm-expert-pruning @ 6cb44696, logs/g3/merged_*.json and keep_*.json packed.  Writes
edgemoe/price/data/priors.json and glm-5.2.npz.
"""

from __future__ import annotations

import csv
import json
import math
import re
from collections import Counter, defaultdict
from pathlib import Path
from typing import Any

import numpy as np
from arguments import make_parser

OUT = Path(__file__).parents[1] / "edgemoe" / "price" / "data"
OWN = "GLM-5.2"
MOE = re.compile(r"DeepSeek|GLM|Kimi|A\d+B$|A\d+B-")
# Layers after these are next-token-prediction blocks, which plain decoding never runs (their measured KLD is 0).
LAYERS = {"GLM-4.5": 92, "GLM-4.6": 92, "GLM-4.7": 92, "GLM-4.5-Air": 46, "GLM-5.1": 78, "GLM-5.2": 78}
TENSOR = re.compile(r"blk\.(\d+)\.(.+)\.weight")
BINS = 10  # of relative depth
FLOOR_QUANTILE = 0.02  # of a model's single-tensor KLDs: what remains when next to nothing was changed
SAME_GROUP = 0.75  # tensors whose figures agree in so many of their layers were measured as one
# Relative RMS error of a type on t(5)-distributed weights, weighted by a log-normal importance that the quantizer knew (llama.cpp 0c1e570).
# Its square gives the types that the curves lack (F16 from its 11 bit mantissa) and the fit that finds a curve's floor.
RMS_ERROR = {"F16": 2.8e-4, "Q8_0": 0.0068, "Q6_K": 0.0199, "Q5_K": 0.0388, "Q4_K": 0.0757, "IQ4_XS": 0.0836, "Q3_K": 0.1591}
RMS_ERROR |= {"IQ3_S": 0.1391, "IQ3_XXS": 0.1696, "Q2_K": 0.2618, "IQ2_S": 0.2648, "IQ2_XS": 0.2851, "IQ2_XXS": 0.3399, "IQ1_M": 0.4262}
RMS_ERROR |= {"IQ1_S": 0.5013, "Q5_1": 0.0358, "Q5_0": 0.0502, "Q4_1": 0.0739, "IQ4_NL": 0.0824, "Q4_0": 0.1001, "MXFP4": 0.1265}
FIT_TYPES = ("Q6_K", "Q5_K", "Q4_K")  # where KLD is smallest, hence the floor shows
LEAST_MODELS = 3  # to pool a type from
# GLM-5.2 pruned, perplexity over the parent's on held-out code and general text (same source, README and handover).
PRUNED = [("mix108_maxmin", 1.297, 1.645), ("code_108", 1.179, 2.786), ("code_96", 1.231, 3.283)]
TEXTS = {"code": ("code_instruct", "code_raw"), "general": ("web", "news", "wiki", "books", "chat", "science")}


def read_curves(path: Path) -> dict[str, dict[str, float]]:
    """Measured KLD of a whole model at one type: model -> type -> nats per token."""
    curves: dict[str, dict[str, float]] = defaultdict(dict)
    for row in csv.DictReader(path.open()):
        name = row["qtype"].upper()
        if MOE.search(row["model"]) and row["kld_measured"] == "1" and row["kld"] and name in RMS_ERROR:
            curves[row["model"]][name] = float(row["kld"])
    return curves


def fit_curve(curve: dict[str, float]) -> tuple[float, float] | None:
    """Floor and what Q4_K adds to it, by least relative squares over the finest types; None without them."""
    if not set(FIT_TYPES) <= set(curve):
        return None
    y = np.array([curve[t] for t in FIT_TYPES])
    x = np.array([(RMS_ERROR[t] / RMS_ERROR["Q4_K"]) ** 2 for t in FIT_TYPES])
    floor = max(0.0, float(np.linalg.lstsq(np.stack([1 / y, x / y], 1), np.ones(len(y)), rcond=None)[0][0]))
    return floor, curve["Q4_K"] - floor


def relative_curve(curve: dict[str, float]) -> dict[str, float]:
    """Each type's KLD over that of Q4_K, floors subtracted; types coarser than Q6_K only, the floor hides the finer ones."""
    found = fit_curve(curve)
    assert found
    floor, unit = found
    return {t: (k - floor) / unit for t, k in curve.items() if t not in ("F16", "Q8_0") and k > floor}


def pool_curves(curves: dict[str, dict[str, float]]) -> dict[str, float]:
    """Median over models of the relative curves; squared errors where too few models have a type."""
    found: dict[str, list[float]] = defaultdict(list)
    for curve in curves.values():
        if fit_curve(curve):
            for name, value in relative_curve(curve).items():
                found[name].append(value)
    square = {t: (e / RMS_ERROR["Q4_K"]) ** 2 for t, e in RMS_ERROR.items()}
    return {t: float(np.median(found[t])) if len(found[t]) >= LEAST_MODELS else square[t] for t in RMS_ERROR}


def read_sensitivities(path: Path) -> dict[str, dict[tuple[str, int], float]]:
    """KLD of each single degraded tensor: model -> (role, layer) -> nats per token, prediction blocks left out."""
    found: dict[str, dict[tuple[str, int], float]] = defaultdict(dict)
    for row in csv.DictReader(path.open()):
        if not MOE.search(row["model"]) or not row["kld"]:
            continue
        match = TENSOR.fullmatch(row["tensor"])
        role, layer = (match[2], int(match[1])) if match else (row["tensor"].removesuffix(".weight"), -1)
        if layer < LAYERS.get(row["model"], 10**9):
            found[row["model"]][role, layer] = float(row["kld"])
    return found


def find_groups(raw: dict[tuple[str, int], float]) -> dict[str, int]:
    """How many tensors share each role's figure: 1, or the size of the group that was degraded together."""
    roles = sorted({role for role, layer in raw if layer >= 0})
    sizes: Counter[str] = Counter()
    for a in roles:
        for b in roles:
            common = [layer for role, layer in raw if role == a and (b, layer) in raw]
            same = sum(raw[a, layer] == raw[b, layer] for layer in common)
            sizes[a] += bool(common) and same >= SAME_GROUP * len(common)
    return dict(sizes)


def subtract_floor(raw: dict[tuple[str, int], float]) -> dict[tuple[str, int], float]:
    """Nats of each tensor alone: floor off, groups shared out evenly."""
    groups = find_groups(raw)
    floor = float(np.quantile(list(raw.values()), FLOOR_QUANTILE))
    return {key: max(value - floor, 0.0) / groups.get(key[0], 1) for key, value in raw.items()}


def shares_by_role(nats: dict[tuple[str, int], float], n_layers: int) -> dict[str, tuple[float, list[float]]]:
    """Role -> its density (share of the model's sum, per layer that has it, times all layers), and its depth profile of mean 1."""
    total = sum(nats.values())
    result = {}
    for role in {role for role, _ in nats}:
        at = {layer: value for (r, layer), value in nats.items() if r == role}
        density = sum(at.values()) / total * (n_layers if -1 not in at else 1) / len(at)
        bins: dict[int, list[float]] = defaultdict(list)
        for layer, value in at.items():
            bins[int(BINS * (layer + 0.5) / n_layers)].append(value)
        mean = sum(at.values()) / len(at)
        flat = -1 in at or len(bins) < BINS or not mean > 0
        result[role] = (density, [1.0] * BINS if flat else [float(np.mean(bins[b])) / mean for b in range(BINS)])
    return result


def pool_roles(nats: dict[str, dict[tuple[str, int], float]]) -> dict[str, dict[str, Any]]:
    """Mean over models of densities and profiles."""
    found: dict[str, list[tuple[float, list[float]]]] = defaultdict(list)
    for model, values in nats.items():
        for role, entry in shares_by_role(values, n_layers_of(model, values)).items():
            found[role].append(entry)
    return {
        role: {
            "models": len(entries),
            "density": round(float(np.mean([d for d, _ in entries])), 5),
            "profile": [round(float(v), 3) for v in np.mean([p for _, p in entries], axis=0)],
        }
        for role, entries in sorted(found.items())
    }


def n_layers_of(model: str, values: dict[tuple[str, int], float]) -> int:
    """Layers that decode."""
    return LAYERS.get(model, 1 + max(layer for _, layer in values))


def fit_drops(share: np.ndarray, domains: list[str], masks: dict[str, np.ndarray], weight: np.ndarray) -> dict[str, Any]:
    """Nats that dropping every expert would cost on each kind of text, and the linear part m of its growth.

    ln(perplexity ratio) = c * sum_l w_l (m lost_l + (1 - m) lost_l^2).  m comes from the general texts, whose lost shares span 0.39 to
    0.64; those of code span only 0.34 to 0.40.
    """
    points: dict[str, list[tuple[float, float, float]]] = defaultdict(list)  # lost, lost^2, nats
    for name, *ratios in PRUNED:
        lost = 1 - (share * masks[name]).sum(axis=2)
        for text, ratio in zip(TEXTS, ratios, strict=True):
            rows = lost[[domains.index(d) for d in TEXTS[text]]]
            points[text].append((float((rows @ weight).mean()), float((rows**2 @ weight).mean()), math.log(ratio)))

    def logs(text: str, m: float) -> np.ndarray:
        return np.array([math.log(nats / (m * one + (1 - m) * two)) for one, two, nats in points[text]])

    linear = min((round(m, 2) for m in np.linspace(0, 1, 101)), key=lambda m: float(logs("general", m).std()))
    worst = max(float(np.abs(logs(text, linear) - logs(text, linear).mean()).max()) for text in TEXTS)
    print(
        f"drops: linear {linear}, worst error of the six {math.expm1(worst):.1%}", {t: [round(v[0], 3) for v in points[t]] for t in TEXTS}
    )
    return {"linear": float(linear), "nats": {text: round(math.exp(float(logs(text, linear).mean())), 3) for text in TEXTS}}


def main() -> None:
    """Read the folders, write the two files."""
    parser = make_parser(__doc__)
    parser.add_argument("sensitivity", type=Path, metavar="SENSITIVITY_FOLDER")
    parser.add_argument("routing", type=Path, metavar="ROUTING_FOLDER")
    options = parser.parse_args()
    sensitivity, routing = options.sensitivity, options.routing
    curves = read_curves(sensitivity / "qtype_curve.csv")
    nats = {m: subtract_floor(raw) for m, raw in read_sensitivities(sensitivity / "tensor_sensitivity.csv").items()}
    pooled = pool_curves(curves)
    fits = {m: f for m, curve in curves.items() if (f := fit_curve(curve))}
    own = nats[OWN]
    roles = sorted({role for role, _ in own})
    with np.load(routing / "glm5.2_10domains.npz") as source:
        domains, layers = [str(d) for d in source["domains"]], source["layers"]
        saliency = source["sal"].astype(np.float64)
        share = saliency / saliency.sum(axis=2, keepdims=True)
        masks = {name: np.unpackbits(source[f"keep_{name}"], axis=1).astype(bool) for name in ("mix108_maxmin", "code_108", "code_96")}
        kept = {f"keep_{n}": source[f"keep_{n}"] for n in ("mix108_maxmin", "mix108_uniform", "code_108", "code_96")}
        np.savez_compressed(
            OUT / "glm-5.2.npz", domains=source["domains"], layers=layers, share=(share * share.shape[2]).astype(np.float16), **kept
        )
    weight = np.array([sum(own.get((f"ffn_{p}_exps", int(layer)), 0.0) for p in ("gate", "up", "down")) for layer in layers])
    priors = {
        "about": "Made by benchmarks/distil_priors.py; what it means: edgemoe/price/priors.py.",
        "sources": {
            "types, roles": "Thireus/GGUF-Tool-Suite @ 384c1f85 (MIT), per-tensor and whole-model KLD; 16 MoE models",
            "drops": "Dorijan10/glm-expert-pruning @ 6cb44696 (MIT by its data card), saliency, keep lists and perplexities of GLM-5.2",
        },
        "q4_k_nats": round(float(np.median([unit for _, unit in fits.values()])), 5),
        "floor_nats": round(float(np.median([floor for floor, _ in fits.values()])), 5),
        "types": {t: float(f"{v:.4g}") for t, v in pooled.items()},
        "models_with_curves": {m: [round(v, 5) for v in fit] for m, fit in sorted(fits.items())},
        "roles": pool_roles(nats),
        "drop": fit_drops(share, domains, masks, weight / weight.sum()),
        OWN.lower(): {
            "q4_k_nats": round(fits[OWN][1], 5),
            "floor_nats": round(fits[OWN][0], 5),
            "types": {t: float(f"{v:.4g}") for t, v in relative_curve(curves[OWN]).items()},
            "nats": {
                role: {str(layer): float(f"{v:.4g}") for (r, layer), v in sorted(own.items(), key=lambda kv: kv[0][1]) if r == role}
                for role in roles
            },
        },
    }
    text = json.dumps(priors, indent=1)
    text = re.sub(r"\[\s+([^\]]*?)\s+\]", lambda m: "[" + re.sub(r"\s+", " ", m[1]) + "]", text)
    text = re.sub(r"\{\s+(\"-?\d+\": [^{}]*?)\s+\}", lambda m: "{" + re.sub(r"\s+", " ", m[1]) + "}", text)
    (OUT / "priors.json").write_text(text + "\n", encoding="utf-8")
    print({p.name: p.stat().st_size for p in OUT.iterdir()})


if __name__ == "__main__":
    main()
