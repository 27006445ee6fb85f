"""Embedding or output matrix, what its rows' tokens see -> packed rows, in groups of alike tokens (docs/pricing.md, 12).

Both matrices have a row for every token of the vocabulary, and no two rows care for the same inputs.  The output matrix's row v costs
p_v (1 - p_v) (error x)^2 for a token whose distribution is p, so it matters where v is a likely and not a certain word; an embedding's row
matters where its own token stands, by the gradient there.  Rows in alike directions are of alike words, so each group has second
moments of its own.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray

from edgemoe.pack import Metric, PackedRows, Packing, pack_matrix
from edgemoe.pools import open_pool
from edgemoe.scores import importance_of

GROUPS = 16  # four times as many gain 2 % more (docs/decisions/0012-outputs.md)
STEPS = 8  # of k-means
SAMPLE = 8192  # rows that the centres are found from
BLOCK = 4096  # rows at once


def group_rows(weights: NDArray[np.float32], groups: int = GROUPS) -> NDArray[np.int64]:
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


def _directions(rows: NDArray[np.float32]) -> NDArray[np.float32]:
    return rows / np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), 1e-20)


def masses(original: torch.Tensor, output: torch.Tensor, group: NDArray[np.int64]) -> NDArray[np.float32]:
    """How much each group's logits matter to each token [n, groups]: sum of p (1 - p) over its rows; states [n, H], output [V, H]."""
    p = (original @ output.T).softmax(-1)
    sums = torch.zeros(len(p), int(group.max()) + 1, device=p.device)
    sums.index_add_(1, torch.from_numpy(group).to(p.device), p * (1 - p))
    found: NDArray[np.float32] = sums.cpu().numpy()
    return found


def pack_end(packing: Packing, role: str, weights: NDArray[np.float32], group: NDArray[np.int64], metrics: Sequence[Metric]) -> PackedRows:
    """Pack a matrix [V, H] group by group of its rows; also what it decodes to."""
    importance = importance_of(packing.model, packing.stats, -1).get((role, -1))
    packed: NDArray[np.uint8] | None = None
    values = np.empty_like(weights)
    with open_pool() as pool:
        for i, metric in enumerate(metrics):
            rows = np.flatnonzero(group == i)
            if not len(rows):
                continue
            found, values[rows] = pack_matrix(packing.target, weights[rows], packing.format_of(role, -1), importance, metric, pool)
            if packed is None:
                packed = np.empty((len(weights), found.shape[1]), found.dtype)
            packed[rows] = found
    assert packed is not None
    return packed, values
