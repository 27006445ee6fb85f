"""This module chooses codes on a grid by error feedback: later columns make up for the errors of earlier ones, weighed by a Hessian.

With X the inputs, the output error of rounding W to Q is |(W - Q) X'|^2 = tr (W - Q) H (W - Q)', H = X'X.  Groups of columns are rounded
one after the other, and each group's error is passed on to the groups that follow, which minimises the rest exactly (GPTQ, arXiv
2210.17323; LDLQ, arXiv 2307.13304).  The grid (scales, offsets) is given and stays, because stock formats store it per block of columns.
Then every group is chosen again while all others stay (coordinate descent, as in QuantEase, arXiv 2309.01885).  So far, rows are
independent.

Errors of different outputs also matter together: with G the Hessian of the loss's gradients with respect to the outputs, KL grows with
tr G (W - Q) H (W - Q)' (the Kronecker factors of YAQA, arXiv 2505.22988).  `descend_outputs` lowers this sum, some rows at a time.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from edgemoe.base.types import F32, F64
from edgemoe.quantize.grids import Grid

DAMPING = 0.01  # of the mean diagonal, as in GPTQ
TRUST = 256.0  # routed tokens whose Hessian counts as much as the layer's
BELIEF = 0.4  # trust in products of two inputs, by tokens: see `shrink_hessian` and docs/decisions/0009-feedback-rounding.md
LAZY = 128  # columns after which the rest of a row is corrected in one product
TURNS = 16  # groups of rows, chosen one after the other
ROUNDS = 2  # of turns
POWER = 8  # steps of the power iteration
Descend = Callable[[NDArray[np.uint8], F32, F32], NDArray[np.uint8]]  # see `descend_outputs`


# ---------------------------------------------------------------------------------------------------------- Hessian
def mix_hessians(own: NDArray[np.floating], n_own: float, layer: NDArray[np.floating] | None = None) -> F64:
    """The Hessian [C, C] that feedback should use for an expert that saw n_own tokens.

    Args:
        own: the Hessian of the expert's tokens.
        n_own: their number.
        layer: the Hessian of all experts' tokens together, scaled to the same trace; it counts more if the expert has few tokens.  None for
            W_down, because the neurons of different experts have nothing in common.
    """
    mixed: F64 = np.asarray(own, np.float64)
    if layer is not None:
        whole = np.asarray(layer, np.float64)
        if not n_own > 0 or not np.trace(mixed) > 0:
            return whole
        scaled = whole * (np.trace(mixed) / max(np.trace(whole), 1e-300))
        mixed = (n_own * mixed + TRUST * scaled) / (n_own + TRUST)
    return shrink_hessian(mixed, n_own)


def shrink_hessian(h: NDArray[np.floating], n: float) -> F64:
    """The Hessian [C, C] of n tokens, with its off-diagonal part reduced by a share of 1 / (1 + BELIEF sqrt(n / C)).

    Products of two inputs are less certain than squares, and feedback relies most on the least certain products, those in directions that
    few tokens have.  The square root and its factor are measured, not derived.
    """
    believed = 1 - 1 / (1 + BELIEF * float(np.sqrt(n / len(h))))
    shrunk: F64 = believed * np.asarray(h, np.float64)
    np.fill_diagonal(shrunk, h.diagonal())
    return shrunk


@dataclass(frozen=True, slots=True)
class Hessian:
    """The damped Hessian [C, C] of a matrix's inputs, and the upper factor U of its inverse: H^-1 = U'U (GPTQ's Cholesky form)."""

    h: F32
    upper: F32

    @property
    def importance(self) -> F32:
        """Mean square of each column's input [C]: the diagonal."""
        return np.ascontiguousarray(self.h.diagonal())


def factor_hessian(h: NDArray[np.floating], damping: float = DAMPING) -> Hessian:
    """Damp and factor a Hessian; columns whose inputs were always zero get the damping alone."""
    h = np.asarray(h, np.float64)
    mean = float(h.diagonal().mean())
    if not (mean > 0 and np.isfinite(mean)):
        h, mean = np.eye(len(h)), 1.0
    h = (h + h.T) / (2 * mean) + damping * np.eye(len(h))
    # H = L L' read backwards gives H^-1 = U'U without an explicit inverse: with J the reversal, J H J = A A', U = J A^-1 J.
    upper = _invert_lower(np.linalg.cholesky(h[::-1, ::-1]))[::-1, ::-1]
    return Hessian(h.astype(np.float32), np.ascontiguousarray(upper, np.float32))


def _invert_lower(lower: NDArray[np.floating]) -> NDArray[np.floating]:
    """Inverse of a lower triangular matrix, by halves: a sixth of the work of a general inverse."""
    n = len(lower) // 2
    if n < LAZY:
        return np.tril(np.linalg.inv(lower))
    first, last, result = _invert_lower(lower[:n, :n]), _invert_lower(lower[n:, n:]), np.zeros_like(lower)
    result[:n, :n], result[n:, n:], result[n:, :n] = first, last, -last @ (lower[n:, :n] @ first)
    return result


# ----------------------------------------------------------------------------------------------------------------- rounding
def round_columns(weights: F32, grid: Grid, hessian: Hessian, columns: slice) -> tuple[NDArray[np.int32], F32, F32]:
    """Round some columns [R, n] of a matrix; each group's error is passed on to the later groups among them.

    Returns:
        Codes [R, n / dim], values [R, n], and the correction of all later columns [R, C - columns.stop], to be subtracted.
    """
    start, stop, dim, upper = columns.start, columns.stop, grid.dim, hessian.upper
    work = np.array(weights[:, columns], np.float32, order="F")
    values, error = np.empty_like(work), np.empty_like(work)
    codes = np.empty((len(work), (stop - start) // dim), np.int32)
    for i in range(start, stop, LAZY):
        block = slice(i, min(i + LAZY, stop))
        at = slice(block.start - start, block.stop - start)
        groups = slice(at.start // dim, at.stop // dim)
        codes[:, groups], values[:, at], error[:, at] = grid.round(at, work[:, at], upper[block, block])
        if block.stop < stop:
            work[:, at.stop :] -= error[:, at] @ upper[block, block.stop : stop]
    return codes, values, error @ upper[columns, stop:]


def descend_columns(codes: NDArray[np.int32], values: F32, grid: Grid, hessian: Hessian, gradient: F32, columns: slice) -> None:
    """Choose every group of some columns again while all others stay; codes, values and gradient [R, C] are changed in place.

    Args:
        codes: [R, n / dim] of these columns.
        values: [R, C] of all columns.
        grid: of these columns.
        hessian: of all.
        gradient: (weights - values) H [R, C].
        columns: which.
    """
    dim, h = grid.dim, hessian.h
    for i in range(columns.start, columns.stop, LAZY):
        block = slice(i, min(i + LAZY, columns.stop))
        at = slice(block.start - columns.start, block.stop - columns.start)
        groups = slice(at.start // dim, at.stop // dim)
        codes[:, groups], found = grid.descend(at, codes[:, groups], values[:, block], gradient[:, block], h[block, block])
        gradient -= (found - values[:, block]) @ h[block]
        values[:, block] = found


def descend_outputs(weights: F32, packed: NDArray[np.uint8], values: F32, hessian: Hessian, outputs: F32, descend: Descend) -> None:
    """Lower tr G (W - Q) H (W - Q)', with G the Hessian of the outputs' gradients; `packed` and `values` are changed in place.

    Groups of rows take turns.  The rows of one group are chosen at the same time, each as if the others of its group stayed.  If this
    raises the sum, the group is split.

    Args:
        weights: W [R, C].
        packed: rows that decode to `values` [R, bytes].
        values: Q [R, C].
        hessian: of the inputs, H.
        outputs: G [R, R], damped.
        descend: packs rows anew, from packed rows, their values, and the gradient (W - Q) H that each row should see; it updates values.
    """
    size = np.ascontiguousarray(outputs.diagonal())
    left = weights - values

    def turn(rows: NDArray[np.int64]) -> None:
        gradient = np.asarray((outputs[rows] @ left / size[rows, None]) @ hessian.h, np.float32)
        found = values[rows]
        new = descend(packed[rows], found, gradient.copy())
        change = found - values[rows]
        gain = 2 * (size[rows, None] * change * gradient).sum() - ((outputs[np.ix_(rows, rows)] @ change) * (change @ hessian.h)).sum()
        if gain >= 0:
            packed[rows], values[rows], left[rows] = new, found, left[rows] - change
        elif len(rows) > 1:
            turn(rows[::2])
            turn(rows[1::2])

    for group in _turns(outputs):
        turn(group)


def _turns(outputs: F32) -> list[NDArray[np.int64]]:
    """Groups of rows for all rounds; rows that share the strongest direction of errors are spread over the groups."""
    size = np.sqrt(outputs.diagonal())
    strongest: F32 = np.ones(len(outputs), np.float32)
    for _ in range(POWER):
        strongest = np.asarray(outputs @ (strongest / size) / size, np.float32)
        strongest /= np.float32(np.linalg.norm(strongest))
    order = np.argsort(strongest, kind="stable")
    groups = min(TURNS, len(order))
    return [np.sort(order[i::groups]) for i in range(groups)] * ROUNDS


def objective(weights: F32, values: F32, hessian: Hessian) -> F64:
    """(w - q) H (w - q)' of each row [R]."""
    delta = weights - values
    result: F64 = ((delta @ hessian.h) * delta).sum(axis=1, dtype=np.float64)
    return result
