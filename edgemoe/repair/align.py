"""What a matrix receives in the rounded stream, what it should give -> the matrix that gives it best (docs/pricing.md, 12).

Rounding and dropping move the stream that later matrices read.  What of that is linear can be undone before a matrix is rounded itself:
x ~ M x', with x what the original reads and x' what the rounded stream brings, is folded into every matrix that reads x', router and
output matrix included; the attention output is refitted to the difference between the two streams.  Only sums over tokens are needed.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from edgemoe.base.types import F32, F64

RIDGE = 0.01  # of the mean diagonal, towards the matrix as it was
Gram = F64


@dataclass(frozen=True, slots=True)
class PairSums:
    """Over some tokens, by weight: sum x x' [C, C] of what a matrix receives, and sum y x' [R, C] of what it should give."""

    gram: Gram
    cross: Gram

    def __add__(self, other: PairSums) -> PairSums:
        """Over the tokens of both."""
        return PairSums(self.gram + other.gram, self.cross + other.cross)


def sum_pairs(x: torch.Tensor, y: torch.Tensor, weights: torch.Tensor) -> PairSums:
    """The sums of inputs x [N, C] and wanted outputs y [N, R] over tokens with these weights [N]."""
    weighted = (x.float() * weights[:, None]).T
    return PairSums((weighted @ x.float()).double().cpu().numpy(), (weighted @ y.float()).T.double().cpu().numpy())


def refit_matrix(weights: F32, fitted: PairSums, guard: PairSums, ridge: float = RIDGE) -> F32:
    """The matrix [R, C] that brings sum |y - W x|^2 down most: ridge regression towards `weights`; these, if the guard tokens prefer them.

    W' = (sum y x' + r W) (sum x x' + r I)^-1,  r = ridge * mean(diag sum x x')
    """
    old, lift = weights.astype(np.float64), ridge * float(fitted.gram.diagonal().mean())
    if not lift > 0:  # no token came by
        return weights
    new = np.linalg.solve(fitted.gram + lift * np.eye(len(fitted.gram)), (fitted.cross + lift * old).T).T
    return new.astype(np.float32) if _loss(new, guard) < _loss(old, guard) else weights


def _loss(weights: NDArray[np.floating], sums: PairSums) -> float:
    """Sum |y - W x|^2, less sum |y|^2."""
    return float(((weights @ sums.gram) * weights).sum() - 2 * (weights * sums.cross).sum())
