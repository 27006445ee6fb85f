"""This module finds the best code of a column, or of a group of eight columns, on grids whose scales are fixed.

A grid rounds a block of columns and passes each column's error on to the later ones, or it chooses a block's codes again while all others
stay.  The Hessian that weighs columns against each other comes from `gptq.py`.  The loops over rows and columns are compiled
(`kernels.py`).
"""

from __future__ import annotations

import functools
from dataclasses import dataclass, field
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray

from edgemoe.base.types import F32

Codes = NDArray[np.int32]
GROUP = 8  # columns that share a code


@dataclass(frozen=True, slots=True)
class Scalar:
    """value = offset + scale * table[code]: a code for every column."""

    scale: F32  # [R, C], of either sign
    offset: F32  # [R, C]
    table: F32  # [K], rising
    dim: ClassVar[int] = 1

    def round(self, at: slice, work: F32, upper: F32) -> tuple[Codes, F32, F32]:
        """Round some columns, and pass each column's error on to the later ones.

        Args:
            at: the columns, in the grid's numbers.
            work: weights to round [R, n].
            upper: their corner [n, n] of U, where H^-1 = U'U.

        Returns:
            Codes [R, n / dim], values [R, n], and errors [R, n]; errors @ U is to be subtracted from later columns.
        """
        from edgemoe.quantize.kernels import round_columns

        codes, values, error = np.empty(work.shape, np.int32), np.empty(work.shape, np.float32), np.empty(work.shape, np.float32)
        round_columns(np.array(work, order="C"), *self._columns(at), np.ascontiguousarray(upper), codes, values, error)
        return codes, values, error

    def descend(self, at: slice, codes: Codes, values: F32, gradient: F32, h: F32) -> tuple[Codes, F32]:
        """Choose the codes of some columns again while all others stay.

        Args:
            at: the columns, in the grid's numbers.
            codes: the codes so far [R, n / dim].
            values: of these codes [R, n].
            gradient: (weights - values) H at these columns [R, n].
            h: their corner of H [n, n].

        Returns:
            The new codes and values.
        """
        from edgemoe.quantize.kernels import descend_columns

        codes, values = np.array(codes, order="C"), np.array(values, order="C")
        descend_columns(values, np.array(gradient, order="C"), *self._columns(at), np.ascontiguousarray(h), codes)
        return codes, values

    def _columns(self, at: slice) -> tuple[F32, F32, F32]:
        return np.ascontiguousarray(self.scale[:, at]), np.ascontiguousarray(self.offset[:, at]), self.table


@dataclass(frozen=True, slots=True)
class Codebook:
    """value = offset + scale * sign * table[index]: `parts` indices, of 8 / parts columns each, and a pattern of signs for eight columns.

    code = the indices (from the lowest bits up), then the pattern's number.  The codebook is searched in full; if there is more than one
    pattern, indices and signs are chosen in turn, each with the other given.
    """

    scale: F32  # [R, G], of either sign
    offset: F32  # [R, G]; with signs there is none
    table: F32  # [K, 8 / parts]
    signs: F32  # [P, 8]: see `sign_patterns`
    products: F32 = field(init=False)
    dim: ClassVar[int] = GROUP

    def __post_init__(self) -> None:
        object.__setattr__(self, "products", pair_products(self.table))

    def round(self, at: slice, work: F32, upper: F32) -> tuple[Codes, F32, F32]:
        """Round some columns: see `Scalar.round`."""
        from edgemoe.quantize.kernels import round_groups

        corner = np.linalg.inv(_diagonal(upper))
        codes = np.empty((len(work), len(corner)), np.int32)
        values, error = np.empty(work.shape, np.float32), np.empty(work.shape, np.float32)
        metric = corner @ corner.transpose(0, 2, 1)
        round_groups(np.array(work, order="C"), self._groups(at), corner, metric, np.ascontiguousarray(upper), codes, values, error)
        return codes, values, error

    def descend(self, at: slice, codes: Codes, values: F32, gradient: F32, h: F32) -> tuple[Codes, F32]:
        """Choose the codes of some columns again: see `Scalar.descend`."""
        from edgemoe.quantize.kernels import descend_groups

        codes, values = np.array(codes, order="C"), np.array(values, order="C")
        metric = np.ascontiguousarray(_diagonal(h))
        gradient = np.array(gradient, order="C")
        descend_groups(values, gradient, self._groups(at), np.linalg.inv(metric), metric, np.ascontiguousarray(h), codes)
        return codes, values

    def _groups(self, at: slice) -> tuple[F32, ...]:
        groups = slice(at.start // GROUP, at.stop // GROUP)
        scale, offset = (np.ascontiguousarray(part[:, groups]) for part in (self.scale, self.offset))
        return scale, offset, self.table, self.products, self.signs, _sign_products(len(self.signs))


Grid = Scalar | Codebook


def _diagonal(matrix: F32) -> F32:
    """Blocks [G, 8, 8] on the diagonal of a matrix [n, n]."""
    blocks: F32 = matrix.reshape(len(matrix) // GROUP, GROUP, -1, GROUP).diagonal(axis1=0, axis2=2).transpose(2, 0, 1)
    return blocks


@functools.cache
def sign_patterns(n: int) -> F32:
    """Signs of eight columns [n, 8]: all (256), those with an even number of minuses (128; the last follows from the others), or plus (1).

    Bit i of a pattern's number says that column i has a minus.
    """
    minus = (np.arange(n)[:, None] >> np.arange(GROUP)) & 1
    if n == 128:
        minus[:, 7] = minus[:, :7].sum(axis=1) & 1
    return (1 - 2 * minus).astype(np.float32)


@functools.cache
def _sign_products(n: int) -> F32:
    return pair_products(sign_patterns(n))


def pair_products(table: F32) -> F32:
    """Products of all pairs of columns (of two different ones twice), then the columns: [n (n + 1) / 2 + n, K] of a table [K, n].

    With v = factors * a row, v M v' - 2 v t' is linear in these.  Rows of zeros are added up to a multiple of four.
    """
    first, second = np.triu_indices(table.shape[1])
    pairs = table[:, first] * table[:, second] * np.where(first == second, 1, 2)
    padding = np.zeros((len(table), -(pairs.shape[1] + table.shape[1]) % 4))
    return np.ascontiguousarray(np.concatenate([pairs, table, padding], axis=1).T, np.float32)
