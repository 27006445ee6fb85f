"""What the codes of packed rows stand for, the scales being as they are -> the best code of a column, or of a group of columns.

A grid rounds a block of columns, each one's error passed on to those after it, or chooses a block's codes again, all others given; what
columns mean to each other comes from `feedback.py`.  With one column to a code both loops are compiled (`kernels.py`).
"""

from __future__ import annotations

import functools
from dataclasses import dataclass, field
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float32]
Codes = NDArray[np.int32]


@dataclass(frozen=True, slots=True)
class Scalar:
    """value = offset + scale * table[code]: a code for every column."""

    scale: Floats  # [R, C], of either sign
    offset: Floats  # [R, C]
    table: Floats  # [K], rising
    dim: ClassVar[int] = 1

    def round(self, at: slice, work: Floats, upper: Floats) -> tuple[Codes, Floats, Floats]:
        """Round columns `at`: see `Groups.round`."""
        from edgemoe.kernels import round_block  # compiles: nothing that only plans should wait for it

        codes, values, error = np.empty(work.shape, np.int32), np.empty(work.shape, np.float32), np.empty(work.shape, np.float32)
        round_block(np.array(work, order="C"), *self._columns(at), np.ascontiguousarray(upper), codes, values, error)
        return codes, values, error

    def descend(self, at: slice, codes: Codes, values: Floats, gradient: Floats, h: Floats) -> tuple[Codes, Floats]:
        """Choose the codes of columns `at` again: see `Groups.descend`."""
        from edgemoe.kernels import descend_block

        codes, values = np.empty(values.shape, np.int32), np.array(values, order="C")
        descend_block(values, np.array(gradient, order="C"), *self._columns(at), np.ascontiguousarray(h), codes)
        return codes, values

    def _columns(self, at: slice) -> tuple[Floats, Floats, Floats]:
        return np.ascontiguousarray(self.scale[:, at]), np.ascontiguousarray(self.offset[:, at]), self.table


class Groups:
    """A code for every `dim` columns."""

    __slots__ = ()
    dim: ClassVar[int] = 8

    def nearest(self, group: int, w: Floats, metric: Floats) -> tuple[Codes, Floats]:
        """Codes [R] and values [R, dim] of a group that minimise (w - v) metric (w - v)'."""
        raise NotImplementedError

    def round(self, at: slice, work: Floats, upper: Floats) -> tuple[Codes, Floats, Floats]:
        """Round some columns, each group's error passed on to the later ones.

        Args:
            at: which, of the grid's.
            work: what is to be rounded [R, n].
            upper: their corner [n, n] of U, where H^-1 = U'U.

        Returns:
            Codes [R, n / dim], values [R, n], and errors [R, n] such that errors @ U is what later columns should give up.
        """
        dim = self.dim
        work = np.array(work, order="F")
        values, error = np.empty_like(work), np.empty_like(work)
        codes = np.empty((len(work), work.shape[1] // dim), np.int32)
        for i in range(0, work.shape[1], dim):
            here, group = slice(i, i + dim), (at.start + i) // dim
            corner = np.linalg.inv(upper[here, here])
            codes[:, i // dim], values[:, here] = self.nearest(group, work[:, here], corner @ corner.T)
            error[:, here] = (work[:, here] - values[:, here]) @ corner
            work[:, here.stop :] -= error[:, here] @ upper[here, here.stop :]
        return codes, values, error

    def descend(self, at: slice, codes: Codes, values: Floats, gradient: Floats, h: Floats) -> tuple[Codes, Floats]:
        """Choose the codes of some columns again, all others given.

        Args:
            at: which, of the grid's.
            codes: as they are [R, n / dim].
            values: what they stand for [R, n].
            gradient: (weights - values) H at these columns [R, n].
            h: their corner of H [n, n].

        Returns:
            Codes and values anew.
        """
        dim = self.dim
        codes, values, gradient = codes.copy(), values.copy(), np.array(gradient, order="F")
        for i in range(0, values.shape[1], dim):
            here, group = slice(i, i + dim), i // dim
            metric = h[here, here]
            step = gradient[:, here] @ np.linalg.inv(metric)
            code, value = self.nearest(at.start // dim + group, values[:, here] + step, metric)
            change = value - values[:, here]
            gain = 2 * (change * gradient[:, here]).sum(axis=1) - ((change @ metric) * change).sum(axis=1)
            change *= (gain > 0)[:, None]  # the search is not exact: keep what is no better
            codes[:, group] = np.where(gain > 0, code, codes[:, group])
            values[:, here] += change
            gradient -= change @ h[here]
        return codes, values


@dataclass(frozen=True, slots=True)
class Table(Groups):
    """value = offset + scale * table[code], a group being `dim` columns; searched in full."""

    scale: Floats  # [R, G]
    offset: Floats  # [R, G]
    table: Floats  # [K, dim]

    @property
    def dim(self) -> int:  # type: ignore[override]
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
class Signed(Groups):
    """value = scale * sign * magnitude: `parts` magnitudes of 8 / parts columns each, chosen from a table, and 8 signs.

    code = sum of magnitude indices (from the lowest bits up), then the signs' bits; `even`: only an even number of minus signs, of which
    seven bits are stored.  Magnitudes given the signs and signs given the magnitudes are chosen in turn.
    """

    scale: Floats  # [R, G], one per 8 columns
    magnitudes: Floats  # [K, 8 / parts]
    even: bool
    products: Floats = field(init=False)  # of the magnitudes

    def __post_init__(self) -> None:
        object.__setattr__(self, "products", _products(self.magnitudes))

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
        return _least(scale * mine, target, inner, self.products)

    def _signs(self, value: Floats, linear: Floats, metric: Floats) -> Floats:
        """All sign patterns tried for the magnitudes found."""
        patterns, products = _sign_products(self.even)
        return patterns[_least(value, linear, metric, products)]


def _products(table: Floats) -> Floats:
    """Products of all pairs of columns, and the columns: [n (n + 1) / 2 + n, K] of a table [K, n]."""
    first, second = _pairs(table.shape[1])
    return np.concatenate([table[:, first] * table[:, second] * np.where(first == second, np.float32(1), np.float32(2)), table], axis=1).T


def _least(factors: Floats, target: Floats, metric: Floats, products: Floats) -> NDArray[np.int64]:
    """For each row [R], which row t of a table minimises v metric v' - 2 v target', where v = factors * t: linear in the products."""
    first, second = _pairs(len(metric))
    weights = np.concatenate([factors[:, first] * factors[:, second] * metric[first, second], -2 * factors * target], axis=1)
    best: NDArray[np.int64] = (weights @ products).argmin(axis=1)
    return best


@functools.cache
def _pairs(n: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    return np.triu_indices(n)


@functools.cache
def _sign_products(even: bool) -> tuple[Floats, Floats]:
    patterns = sign_patterns(even=even)
    return patterns, _products(patterns)


def sign_patterns(*, even: bool) -> Floats:
    """All patterns of eight signs [128 or 256, 8]; with an even number of minuses, the last sign follows from the others."""
    numbers = np.arange(128 if even else 256)
    minus = (numbers[:, None] >> np.arange(8)) & 1
    if even:
        minus[:, 7] = minus[:, :7].sum(axis=1) & 1
    return (1 - 2 * minus).astype(np.float32)


Grid = Scalar | Table | Signed
