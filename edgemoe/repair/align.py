"""This module refits a matrix by least squares, from inputs of the changed stream to outputs of the original (docs/pricing.md, 12).

Rounding and dropping move the stream that later matrices read.  The linear part of this move can be undone before a matrix is rounded
itself.  If x is what the original reads and x' is what the changed stream brings, the map M of x ~ M x' is folded into every matrix that
reads x', router and output matrix included.  The attention output is refitted to the difference between the two streams.  A refit needs
only sums over tokens.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from edgemoe.base.types import F32, F64

RIDGE = 0.01  # of the mean diagonal; it pulls towards the matrix as it was
Gram = F64


@dataclass(frozen=True, slots=True)
class PairSums:
    """Weighted sums over tokens, of a matrix's inputs x and wanted outputs y: sum x x' [C, C] and sum y x' [R, C]."""

    gram: Gram
    cross: Gram

    def __add__(self, other: PairSums) -> PairSums:
        """The sums over the tokens of both."""
        return PairSums(self.gram + other.gram, self.cross + other.cross)


def sum_pairs(x: torch.Tensor, y: torch.Tensor, weights: torch.Tensor) -> PairSums:
    """The sums of inputs x [N, C] and wanted outputs y [N, R] over tokens with these weights [N]."""
    weighted = (x.float() * weights[:, None]).T
    return PairSums((weighted @ x.float()).double().cpu().numpy(), (weighted @ y.float()).T.double().cpu().numpy())


def refit_matrix(weights: F32, fitted: PairSums, guard: PairSums, ridge: float = RIDGE) -> F32:
    """Minimise sum |y - W x|^2 by ridge regression towards `weights` [R, C]; return `weights` themselves if the guard tokens prefer them.

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
