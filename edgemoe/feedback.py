"""Weights, second moments of their inputs, a grid -> codes: rounding that lets later columns take up the error of earlier ones.

With X the inputs, the output error of rounding W to Q is |(W - Q) X'|^2 = tr (W - Q) H (W - Q)', H = X'X.  One group of columns is rounded
after another; each group's error is passed on to those still to come, which is exact minimisation of the rest (GPTQ, arXiv 2210.17323;
LDLQ, arXiv 2307.13304).  The grid (scales, offsets) is given and stays: stock formats store it per block of columns.
Then every group is chosen again, all others given (coordinate descent, as in QuantEase, arXiv 2309.01885).  So far rows are independent.

What the outputs' errors cost together is their own matter: with G the second moments of the loss's gradients with respect to them, KL grows
with tr G (W - Q) H (W - Q)' (the Kronecker factors of YAQA, arXiv 2505.22988).  `descend_outputs` brings that down, some rows at a time.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

DAMPING = 0.01  # of the mean diagonal, as in GPTQ
TRUST = 256.0  # routed tokens that count as much as the layer's own second moments
BELIEF = 0.4  # in products of two inputs, by tokens: see `shrink_moments` and docs/decisions/0009-feedback-rounding.md
LAZY = 128  # columns after which the rest of a row is corrected in one product
TURNS = 16  # groups of rows, chosen one after the other
ROUNDS = 2  # of turns
POWER = 8  # steps of the power iteration
Floats = NDArray[np.float32]
Descend = Callable[[NDArray[np.uint8], Floats, Floats], NDArray[np.uint8]]  # see `descend_outputs`


# ---------------------------------------------------------------------------------------------------------- second moments
def mix_moments(own: NDArray[np.floating], n_own: float, layer: NDArray[np.floating] | None = None) -> NDArray[np.float64]:
    """What feedback should believe of an expert's second moments [C, C], seen on n_own tokens.

    Args:
        own: of the expert's tokens.
        n_own: how many.
        layer: of all experts' tokens together, where all receive the same columns: few tokens lean on it, scaled to the same trace.
            The neurons of different experts have nothing in common, so for W_down there is none.
    """
    mixed: NDArray[np.float64] = np.asarray(own, np.float64)
    if layer is not None:
        whole = np.asarray(layer, np.float64)
        if not n_own > 0 or not np.trace(mixed) > 0:
            return whole
        scaled = whole * (np.trace(mixed) / max(np.trace(whole), 1e-300))
        mixed = (n_own * mixed + TRUST * scaled) / (n_own + TRUST)
    return shrink_moments(mixed, n_own)


def shrink_moments(h: NDArray[np.floating], n: float) -> NDArray[np.float64]:
    """Second moments [C, C] of n tokens, what lies off the diagonal brought down by 1 / (1 + BELIEF sqrt(n / C)).

    Products of two inputs are less certain than squares, and feedback trusts them where they are least so: in the directions that were
    hardly seen.  The square root and its factor are measured, not derived.
    """
    believed = 1 - 1 / (1 + BELIEF * float(np.sqrt(n / len(h))))
    shrunk: NDArray[np.float64] = believed * np.asarray(h, np.float64)
    np.fill_diagonal(shrunk, h.diagonal())
    return shrunk


@dataclass(frozen=True, slots=True)
class Moments:
    """Second moments [C, C] of a matrix's inputs, damped, and the upper factor U of their inverse: H^-1 = U'U (GPTQ's Cholesky form)."""

    h: Floats
    upper: Floats

    @property
    def importance(self) -> Floats:
        """Mean square of each column's input [C]: the diagonal."""
        return np.ascontiguousarray(self.h.diagonal())


def factor_moments(h: NDArray[np.floating], damping: float = DAMPING) -> Moments:
    """Damp and factor; columns that never saw an input count as the damping alone."""
    h = np.asarray(h, np.float64)
    mean = float(h.diagonal().mean())
    if not (mean > 0 and np.isfinite(mean)):
        h, mean = np.eye(len(h)), 1.0
    h = (h + h.T) / (2 * mean) + damping * np.eye(len(h))
    # H = L L' read backwards gives H^-1 = U'U without an explicit inverse: with J the reversal, J H J = A A', U = J A^-1 J.
    lower = np.linalg.cholesky(h[::-1, ::-1])
    upper = np.linalg.inv(lower)[::-1, ::-1]
    return Moments(h.astype(np.float32), np.ascontiguousarray(np.triu(upper)).astype(np.float32))


# -------------------------------------------------------------------------------------------------------------------- grids
@dataclass(frozen=True, slots=True)
class Uniform:
    """value = offset + scale * code, codes 0..n-1; one column a group."""

    scale: Floats  # [R, C], of either sign
    offset: Floats  # [R, C]
    n: int
    dim = 1

    def nearest(self, group: int, w: Floats, metric: Floats) -> tuple[NDArray[np.int32], Floats]:
        """Codes [R] and values [R, 1] nearest to w [R, 1]."""
        scale, offset = self.scale[:, group], self.offset[:, group]
        code = np.divide(w[:, 0] - offset, scale, out=np.zeros_like(offset), where=scale != 0)
        np.minimum(np.maximum(np.rint(code, out=code), 0, out=code), self.n - 1, out=code)
        return code.astype(np.int32), (offset + scale * code)[:, None]


@dataclass(frozen=True, slots=True)
class Table:
    """value = offset + scale * table[code], a group being `dim` columns; searched in full, in the metric of the group."""

    scale: Floats  # [R, G]
    offset: Floats  # [R, G]
    table: Floats  # [K, dim]

    @property
    def dim(self) -> int:
        """Columns of a group."""
        return int(self.table.shape[1])

    def nearest(self, group: int, w: Floats, metric: Floats) -> tuple[NDArray[np.int32], Floats]:
        """Codes [R] and values [R, dim] that minimise (w - v) metric (w - v)'."""
        scale, offset = self.scale[:, group, None], self.offset[:, group, None]
        quadratic = ((self.table @ metric) * self.table).sum(axis=1)
        cost = ((w - offset) @ metric * (-2 * scale)) @ self.table.T + scale**2 * quadratic
        code = cost.argmin(axis=1)
        return code.astype(np.int32), offset + scale * self.table[code]


@dataclass(frozen=True, slots=True)
class Signed:
    """value = scale * sign * magnitude: `parts` magnitudes of 8 / parts columns each, chosen from a table, and 8 signs.

    code = sum of magnitude indices (from the lowest bits up), then the signs' bits; `even`: only an even number of minus signs, of which
    seven bits are stored.  Magnitudes given the signs and signs given the magnitudes are chosen in turn.
    """

    scale: Floats  # [R, G], one per 8 columns
    magnitudes: Floats  # [K, 8 / parts]
    even: bool
    dim = 8

    def nearest(self, group: int, w: Floats, metric: Floats) -> tuple[NDArray[np.int32], Floats]:
        """Codes [R] and values [R, 8] that (nearly) minimise (w - v) metric (w - v)'."""
        scale = self.scale[:, group, None]
        linear = w @ metric
        width = self.magnitudes.shape[1]
        parts = 8 // width
        up = np.where(scale < 0, np.float32(-1), np.float32(1))
        signs = self._first_signs(w * up)
        value = (np.abs(w) * up).astype(np.float32)  # stands for the parts not yet chosen
        index = np.zeros((len(w), parts), np.int64)
        for turn in range(2):
            for part in range(parts):
                at = slice(part * width, (part + 1) * width)
                index[:, part] = self._magnitude(at, scale, signs, value, linear, metric)
                value[:, at] = scale * self.magnitudes[index[:, part]]
            if turn == 0:
                signs = self._signs(value, linear, metric)
        value = value * signs
        code = np.zeros(len(w), np.int64)
        bits = int(self.magnitudes.shape[0] - 1).bit_length()
        for part in range(parts):
            code |= index[:, part] << (bits * part)
        minus = (signs < 0).astype(np.int64)
        for i in range(7 if self.even else 8):
            code |= minus[:, i] << (bits * parts + i)
        return code.astype(np.int32), value

    def _first_signs(self, w: Floats) -> Floats:
        signs = np.where(w < 0, np.float32(-1), np.float32(1))
        if self.even:
            odd = np.flatnonzero(signs.prod(axis=1) < 0)
            smallest = np.abs(w[odd]).argmin(axis=1)
            signs[odd, smallest] *= -1
        return signs

    def _magnitude(self, at: slice, scale: Floats, signs: Floats, value: Floats, linear: Floats, metric: Floats) -> NDArray[np.int64]:
        """Best index of one part, the others given."""
        inner, mine = metric[at, at], signs[:, at]
        target = linear[:, at]
        if self.magnitudes.shape[1] < 8:
            others = value * signs
            others[:, at] = 0
            target = np.asarray(target - others @ metric[:, at], np.float32)
        rows, cols = np.triu_indices(inner.shape[0])
        twice = np.where(rows == cols, 1, 2).astype(np.float32)
        features = np.concatenate([self.magnitudes[:, rows] * self.magnitudes[:, cols] * twice, self.magnitudes], axis=1)
        weights = np.concatenate([scale**2 * mine[:, rows] * mine[:, cols] * inner[rows, cols], -2 * scale * mine * target], axis=1)
        best: NDArray[np.int64] = (weights @ features.T).argmin(axis=1)
        return best

    def _signs(self, value: Floats, linear: Floats, metric: Floats) -> Floats:
        """All sign patterns tried for the magnitudes found."""
        patterns = sign_patterns(even=self.even)
        rows, cols = np.triu_indices(8, 1)
        features = np.concatenate([patterns[:, rows] * patterns[:, cols] * 2, patterns], axis=1)
        weights = np.concatenate([value[:, rows] * value[:, cols] * metric[rows, cols], -2 * value * linear], axis=1)
        best: Floats = patterns[(weights @ features.T).argmin(axis=1)]
        return best


def sign_patterns(*, even: bool) -> Floats:
    """All patterns of eight signs [128 or 256, 8]; with an even number of minuses, the last sign follows from the others."""
    numbers = np.arange(128 if even else 256)
    minus = (numbers[:, None] >> np.arange(8)) & 1
    if even:
        minus[:, 7] = minus[:, :7].sum(axis=1) & 1
    return (1 - 2 * minus).astype(np.float32)


Grid = Uniform | Table | Signed


# ----------------------------------------------------------------------------------------------------------------- rounding
def round_columns(weights: Floats, grid: Grid, moments: Moments, columns: slice) -> tuple[NDArray[np.int32], Floats, Floats]:
    """Round some columns [R, n] of a matrix, each group's error passed on to the later ones among them.

    Returns:
        Codes [R, n / dim], values [R, n], and the correction of all later columns [R, C - columns.stop], to be subtracted.
    """
    start, stop, dim = columns.start, columns.stop, grid.dim
    upper = moments.upper
    work = np.array(weights[:, columns], np.float32, order="F")
    values, error = np.empty_like(work), np.empty_like(work)
    codes = np.empty((len(work), (stop - start) // dim), np.int32)
    for lazy in range(0, stop - start, LAZY):
        end = min(lazy + LAZY, stop - start)
        for i in range(lazy, end, dim):
            j = slice(start + i, start + i + dim)
            corner = np.linalg.inv(upper[j, j])
            codes[:, i // dim], values[:, i : i + dim] = grid.nearest(i // dim, work[:, i : i + dim], corner @ corner.T)
            error[:, i : i + dim] = (work[:, i : i + dim] - values[:, i : i + dim]) @ corner
            if i + dim < end:
                work[:, i + dim : end] -= error[:, i : i + dim] @ upper[j, start + i + dim : start + end]
        if end < stop - start:
            work[:, end:] -= error[:, lazy:end] @ upper[start + lazy : start + end, start + end : stop]
    return codes, values, error @ upper[columns, stop:]


def descend_columns(codes: NDArray[np.int32], values: Floats, grid: Grid, moments: Moments, gradient: Floats, columns: slice) -> None:
    """Choose every group of some columns again, all others given; codes, values and gradient [R, C] are changed in place.

    Args:
        codes: [R, n / dim] of these columns.
        values: [R, C] of all columns.
        grid: of these columns.
        moments: of all.
        gradient: (weights - values) H [R, C].
        columns: which.
    """
    dim, h = grid.dim, moments.h
    for lazy in range(columns.start, columns.stop, LAZY):
        end = min(lazy + LAZY, columns.stop)
        block = slice(lazy, end)
        before, inner = values[:, block].copy(), np.array(gradient[:, block], order="F")
        for j in range(lazy, end, dim):
            at, here = slice(j, j + dim), slice(j - lazy, j - lazy + dim)
            metric = h[at, at]
            step = inner[:, here] @ np.linalg.inv(metric) if dim > 1 else inner[:, here] / metric
            group = (j - columns.start) // dim
            code, value = grid.nearest(group, values[:, at] + step, metric)
            change = value - values[:, at]
            if dim > 1:  # the search is not exact: keep what is no better
                gain = 2 * (change * inner[:, here]).sum(axis=1) - ((change @ metric) * change).sum(axis=1)
                change *= (gain > 0)[:, None]
                code = np.where(gain > 0, code, codes[:, group])
            codes[:, group] = code
            values[:, at] += change
            inner -= change @ h[at, block]
        gradient -= (values[:, block] - before) @ h[block]


def descend_outputs(
    weights: Floats, packed: NDArray[np.uint8], values: Floats, moments: Moments, outputs: Floats, descend: Descend
) -> None:
    """Bring tr G (W - Q) H (W - Q)' down, G the second moments of the outputs' gradients; `packed` and `values` are changed in place.

    Rows take turns.  Those of one group are chosen at the same time, each as if the others of its group stayed; where that overshoots, the
    group is split.

    Args:
        weights: W [R, C].
        packed: rows that decode to `values` [R, bytes].
        values: Q [R, C].
        moments: of the inputs, H.
        outputs: G [R, R], damped.
        descend: packed rows, their values, and the gradient (W - Q) H that each row should see -> rows packed anew; values follow.
    """
    size = np.ascontiguousarray(outputs.diagonal())
    left = weights - values

    def turn(rows: NDArray[np.int64]) -> None:
        gradient = np.asarray((outputs[rows] @ left / size[rows, None]) @ moments.h, np.float32)
        found = values[rows]
        new = descend(packed[rows], found, gradient.copy())
        change = found - values[rows]
        gain = 2 * (size[rows, None] * change * gradient).sum() - ((outputs[np.ix_(rows, rows)] @ change) * (change @ moments.h)).sum()
        if gain >= 0:
            packed[rows], values[rows], left[rows] = new, found, left[rows] - change
        elif len(rows) > 1:
            turn(rows[::2])
            turn(rows[1::2])

    for group in _turns(outputs):
        turn(group)


def _turns(outputs: Floats) -> list[NDArray[np.int64]]:
    """Rows in groups for all rounds: those that share the strongest direction of errors are spread over the groups."""
    size = np.sqrt(outputs.diagonal())
    strongest: Floats = np.ones(len(outputs), np.float32)
    for _ in range(POWER):
        strongest = np.asarray(outputs @ (strongest / size) / size, np.float32)
        strongest /= np.float32(np.linalg.norm(strongest))
    order = np.argsort(strongest, kind="stable")
    groups = min(TURNS, len(order))
    return [np.sort(order[i::groups]) for i in range(groups)] * ROUNDS


def objective(weights: Floats, values: Floats, moments: Moments) -> NDArray[np.float64]:
    """(w - q) H (w - q)' of each row [R]."""
    delta = weights - values
    result: NDArray[np.float64] = ((delta @ moments.h) * delta).sum(axis=1, dtype=np.float64)
    return result
