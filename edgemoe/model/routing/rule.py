"""This module computes the router's rule in numpy: the experts that a token chooses from the kept ones, and their gates.

Kept sets are priced by it.  The stream runs transformers' own module, and the ONNX target builds the same rule from operators.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from edgemoe.base.types import F32, F64
from edgemoe.ir.model import Router

ALONE = ("sigmoid", "sqrtsoftplus")  # scorings in which no expert's score depends on the others


def weigh_scores(router: Router, logits: F64) -> F64:
    """Scores from which gates are made [N, E]: the softmax of the logits over all experts, or of each its sigmoid or sqrt(softplus)."""
    if router.scoring == "sigmoid":
        sigmoid: F64 = 1 / (1 + np.exp(-logits))
        return sigmoid
    if router.scoring == "sqrtsoftplus":
        root: F64 = np.sqrt(np.logaddexp(0.0, logits))
        return root
    scores = np.exp(logits - logits.max(axis=1, keepdims=True))
    softmax: F64 = scores / scores.sum(axis=1, keepdims=True)
    return softmax


def choice_scores(router: Router, logits: F32 | F64, bias: F32) -> F32 | F64:
    """Values by which experts are chosen [N, E], in any scale that keeps their order: scores plus bias, or logits without a bias."""
    return weigh_scores(router, logits.astype(np.float64)) + bias if router.biased else logits


def open_experts(router: Router, choice: F64, kept: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """Which kept experts a token may choose [N, E]: all, or those of its best groups if the router has groups."""
    if router.groups <= router.top_groups:
        return np.broadcast_to(kept, choice.shape)
    grouped = np.where(kept, choice, -np.inf).reshape(len(choice), router.groups, -1)
    best = np.sort(grouped, axis=2)[:, :, -router.group_best :]
    totals = np.where(np.isfinite(best), best, 0.0).sum(axis=2)
    rank = np.argsort(np.argsort(-totals, axis=1, kind="stable"), axis=1)
    opened = np.repeat(rank < router.top_groups, grouped.shape[2], axis=1)
    result: NDArray[np.bool_] = opened & kept
    return result
