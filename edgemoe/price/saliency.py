"""This module computes published scores of experts from the statistics of one layer.

Scores are controls and options (`price --score`) and not prices: they have no unit, and are comparable within one layer only.  Sums run
over the routed tokens of every domain, and each domain counts by its weight.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from edgemoe.base.errors import UsageError
from edgemoe.base.types import F64
from edgemoe.ir import Costs, Stats

SUMS = ("count", "gate", "gate_sq", "norm", "norm_sq", "gate_norm", "energy", "residual")
ScoreSums = dict[str, F64]  # [E] each: SUMS, top_logit and spread


def _mean(total: F64, count: F64) -> F64:
    result: F64 = total / np.maximum(count, 1e-30)
    return result


# Formulas: docs/pricing.md, 7, with papers.  n_e tokens routed to e, gate g, output f.
SCORES: dict[str, Callable[[ScoreSums], F64]] = {
    "frequency": lambda s: s["count"],  # n_e
    "gate-sum": lambda s: s["gate"],  # sum g
    "ean": lambda s: s["norm"],  # sum |f|
    "man": lambda s: _mean(s["norm"], s["count"]),  # sum |f| / n_e: arXiv 2606.15716
    "msan": lambda s: _mean(s["norm_sq"], s["count"]),  # sum |f|^2 / n_e: the same
    "reap-sum": lambda s: s["gate_norm"],  # sum g |f|
    "reap": lambda s: _mean(s["gate_norm"], s["count"]),  # sum g |f| / n_e: REAP, arXiv 2510.13999
    "energy": lambda s: s["energy"],  # sum g^2 |f|^2
    "collaborative": lambda s: 0.5 * s["count"] + 0.5 * _mean(s["gate"], s["count"]),  # share of tokens, mean gate: arXiv 2509.25689
    "easy-ep": lambda s: s["residual"],  # sum g |f| (1 - cos), of the stream before and after the layer: EASY-EP, arXiv 2504.06792
    "mone": lambda s: s["spread"] * s["gate"],  # standard deviation of f, times the mean gate: MoNE, arXiv 2507.00390
    "tcess": lambda s: s["top_logit"],  # router logit where e is the first choice, mean over tokens: PreMoe, arXiv 2505.17639
}


def check_score(score: str, form: str) -> None:
    """Refuse a score that is not known, or prices of single experts' formats.

    Raises:
        UsageError: names the scores that there are.
    """
    if score not in SCORES or form != "stacks":
        raise UsageError(f"score {score!r} cannot price these drops", hint=f"known, for GGUF: {', '.join(SCORES)}")


def score_experts(stats: Stats, layer: int, score: str) -> F64:
    """A published saliency of each expert of a layer [E]; larger means keep."""
    arrays = stats.arrays(layer)
    share = (stats.weights / np.maximum(arrays["tokens"], 1))[:, None]
    sums = {name: (share * arrays[name]).sum(axis=0) for name in SUMS}
    domain = arrays["replay_domain"].astype(np.int64)
    sums["top_logit"] = top_logits(arrays["replay_logits"], (stats.weights / np.maximum(np.bincount(domain), 1))[domain])
    sums["spread"] = output_spread(sums, arrays["count"].sum(axis=0), share.max() * arrays["expert_out"])
    return SCORES[score](sums)


def output_spread(sums: ScoreSums, count: NDArray[np.int64], output: F64) -> F64:
    """Standard deviation of each expert's output over its tokens, all channels together [E].

    Args:
        sums: of the layer.
        count: tokens of each expert; of n the variance is over n - 1, as in MoNE's code.
        output: sum of f [E, H].
    """
    mean = output / np.maximum(sums["count"], 1e-30)[:, None]
    variance = np.maximum(_mean(sums["norm_sq"], sums["count"]) - (mean**2).sum(axis=1), 0.0)
    spread: F64 = np.sqrt(variance * count / np.maximum(count - 1, 1))
    return spread


def top_logits(logits: NDArray[np.floating], weights: F64) -> F64:
    """Mean over tokens (by weight) of an expert's router logit [E], counted where it is the token's largest."""
    mean: F64 = np.zeros(logits.shape[1])
    np.add.at(mean, logits.argmax(axis=1), weights * logits.max(axis=1) / weights.sum())
    return mean


def drops_by_score(costs: Costs, stats: Stats, score: str) -> Costs:
    """Replace the prices of drops, as a control: experts go in the order of a published score, and a set costs in proportion to it.

    One factor for the whole model keeps the sum of all sets' costs as it was, so that drops and formats stay comparable.

    Raises:
        UsageError: no such score, or prices of single experts' formats.
    """
    check_score(score, costs.form)
    scores = np.stack([score_experts(stats, layer, score) for layer in costs.expert_layers])  # [L, E]
    rank = np.argsort(np.argsort(-scores, axis=1, kind="stable"), axis=1)
    kept = rank[None] < np.array(costs.counts)[:, None, None]  # [C, L, E]
    gone = (np.maximum(scores, 0.0)[None] * ~kept).sum(axis=2)  # [C, L]
    factor = float(costs.weights @ costs.drop_cost.sum(axis=(1, 2))) / max(float(gone.sum()), 1e-300)
    shape = costs.drop_cost.shape, costs.expert_drop.shape
    experts = np.broadcast_to(factor * np.maximum(scores, 0.0), shape[1]).copy()
    return replace(costs, kept=kept, drop_cost=np.broadcast_to(factor * gone, shape[0]).copy(), expert_drop=experts)
