"""This module packs the embedding and the output matrix, whose rows are grouped by similar direction (docs/pricing.md, 12).

Both matrices have one row for every token of the vocabulary, and errors of different rows matter on different inputs.  An error in row v of
the output matrix costs p_v (1 - p_v) (error x)^2 for a token whose distribution is p, so it matters where word v is likely but not certain.
An error in a row of the embedding matters where the row's own token stands, by the gradient there.  Rows of similar direction belong to
similar words, so each group of rows gets a Hessian of its own.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray

from edgemoe.base.threads import open_threads
from edgemoe.base.types import F32
from edgemoe.quantize.gptq import factor_hessian, mix_hessians
from edgemoe.quantize.importance import importance_of
from edgemoe.repair.quantize_layer import ErrorMetric, Gram, PackedAndDecoded, QuantizePlan, quantize_matrix

GROUPS = 16  # four times as many gain 2 % more (docs/decisions/0012-outputs.md)
STEPS = 8  # of k-means
SAMPLE = 8192  # rows that the centres are found from
BLOCK = 4096  # rows at once


def group_rows(weights: F32, groups: int = GROUPS) -> NDArray[np.int64]:
    """Group of every row [R]: k-means of their directions."""
    rng = np.random.default_rng(0)
    sample = _directions(weights[np.sort(rng.permutation(len(weights))[:SAMPLE])])
    centres = sample[rng.permutation(len(sample))[:groups]]
    for _ in range(STEPS):
        nearest = (sample @ centres.T).argmax(axis=1)
        found = [sample[nearest == i].mean(axis=0) if (nearest == i).any() else centre for i, centre in enumerate(centres)]
        centres = _directions(np.stack(found))
    parts = [(_directions(weights[i : i + BLOCK]) @ centres.T).argmax(axis=1) for i in range(0, len(weights), BLOCK)]
    return np.concatenate(parts)


def _directions(rows: F32) -> F32:
    unit: F32 = rows / np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), np.float32(1e-20))
    return unit


# ------------------------------------------------------------------------------------------------------------------ metrics
def masses(original: torch.Tensor, output: torch.Tensor, group: NDArray[np.int64]) -> F32:
    """Weight of each group's logits for each token [n, groups], sum p (1 - p) over the group's rows; states [n, H], output [V, H]."""
    p = (original @ output.T).softmax(-1)
    sums = torch.zeros(len(p), GROUPS, device=p.device)
    sums.index_add_(1, torch.from_numpy(group).to(p.device), p * (1 - p))
    found: F32 = sums.cpu().numpy()
    return found


def gradient_sums(group: NDArray[np.int64], gradients: F32, guard: NDArray[np.bool_]) -> list[tuple[Gram, Gram]]:
    """Hessian [H, H] of an embedding's gradients [N, H] by the group of each token [N], over fitted and over guard tokens."""

    def gram(chosen: NDArray[np.bool_]) -> Gram:
        index, total = np.flatnonzero(chosen), np.zeros((gradients.shape[1],) * 2)
        for i in range(0, len(index), BLOCK):
            rows = np.asarray(gradients[index[i : i + BLOCK]])
            total += rows.T @ rows
        return total

    return [(gram((group == i) & ~guard), gram((group == i) & guard)) for i in range(GROUPS)]


def group_metrics(sums: Sequence[tuple[Gram, Gram]], seen: Sequence[float]) -> list[ErrorMetric]:
    """The metric of each group: its own Hessian, mixed with that of all groups together if few tokens were seen."""
    fitted, guard = (np.sum([one[side] for one in sums], axis=0) for side in (0, 1))
    return [
        ErrorMetric(inputs=factor_hessian(mix_hessians(own, n, fitted)), guard=kept if kept.any() else guard)
        for (own, kept), n in zip(sums, seen, strict=True)
    ]


# ----------------------------------------------------------------------------------------------------------------- rounding
def quantize_rows_by_group(
    quantize_plan: QuantizePlan, role: str, weights: F32, group: NDArray[np.int64], metrics: Sequence[ErrorMetric] | None
) -> PackedAndDecoded:
    """Pack a matrix [V, H] group by group of rows, by the stock quantizer if there are no metrics; also return the decoded values."""
    importance = importance_of(quantize_plan.model, quantize_plan.stats, -1).get((role, -1))
    packed: list[NDArray[np.uint8]] = []
    values, order = np.empty_like(weights), [np.flatnonzero(group == i) for i in range(GROUPS)]
    with open_threads() as pool:
        for i, rows in enumerate(order):
            if len(rows):
                metric, kind = metrics[i] if metrics else None, quantize_plan.format_of(role, -1)
                found, values[rows] = quantize_matrix(quantize_plan.target, weights[rows], kind, importance, metric, pool)
                packed.append(found)
    whole = np.concatenate(packed)
    whole[np.concatenate(order)] = whole.copy()
    return whole, values
