"""This module compiles the inner loops of rounding, which go row by row and column by column (or by groups of eight columns).

The loops release the interpreter's lock, and a row's result does not depend on the rows beside it, so threads may share rows in any way.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numba
import numpy as np
from numpy.typing import NDArray

from edgemoe.base.types import F32

Codes = NDArray[np.int32]
GROUP = 8


def compiled(**options: Any) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Compile at the first call; the machine code is kept beside this file or in the user's cache, if either can be written."""

    def compile_function(function: Callable[..., Any]) -> Callable[..., Any]:
        try:
            result: Callable[..., Any] = numba.njit(cache=True, nogil=True, **options)(function)
        except RuntimeError:  # no folder can be written, so every process compiles anew
            result = numba.njit(nogil=True, **options)(function)
        return result

    return compile_function


# --------------------------------------------------------------------------------------------------------- a code for a column
@compiled()
def round_columns(work: F32, scale: F32, offset: F32, table: F32, upper: F32, codes: Codes, values: F32, error: F32) -> None:
    """GPTQ's loop over some columns; `work`, `codes`, `values`, `error` [R, n] are changed in place.

    Args:
        work: weights, less what earlier columns passed on.
        scale: of every weight [R, n].
        offset: likewise.
        table: what codes stand for [K], before scale and offset.
        upper: these columns' corner of the inverse Hessian's factor [n, n].
        codes: chosen.
        values: of the codes.
        error: of each weight, in units of the factor's diagonal.
    """
    rows, n = work.shape
    for r in range(rows):
        for i in range(n):
            code = _nearest(work[r, i], scale[r, i], offset[r, i], table)
            value = offset[r, i] + scale[r, i] * table[code]
            e = (work[r, i] - value) * (np.float32(1) / upper[i, i])
            codes[r, i], values[r, i], error[r, i] = code, value, e
            for k in range(i + 1, n):
                work[r, k] -= e * upper[i, k]


@compiled()
def descend_columns(values: F32, gradient: F32, scale: F32, offset: F32, table: F32, h: F32, codes: Codes) -> None:
    """Choose every code of some columns again while all others stay; `values`, `gradient` and `codes` [R, n] are changed in place.

    Args:
        values: what the codes stand for.
        gradient: (weights - values) H at these columns.
        scale: of every weight [R, n].
        offset: likewise.
        table: what codes stand for [K], before scale and offset.
        h: these columns' corner of the Hessian [n, n].
        codes: chosen.
    """
    rows, n = values.shape
    for r in range(rows):
        for i in range(n):
            code = _nearest(values[r, i] + gradient[r, i] / h[i, i], scale[r, i], offset[r, i], table)
            value = offset[r, i] + scale[r, i] * table[code]
            change = value - values[r, i]
            codes[r, i] = code
            if change != 0:
                values[r, i] += change
                for k in range(n):
                    gradient[r, k] -= change * h[i, k]


@compiled(inline="always")
def _nearest(w: np.float32, scale: np.float32, offset: np.float32, table: F32) -> int:
    """Code whose offset + scale * table[code] is nearest to w."""
    if scale == 0:
        return 0
    want = (w - offset) / scale
    last = len(table) - 1
    if table[last] == last:  # 0, 1, 2 ...: no search
        return int(min(max(np.rint(want), np.float32(0)), np.float32(last)))
    best = 0
    for code in range(1, last + 1):
        if abs(table[code] - want) < abs(table[best] - want):
            best = code
    return best


# ---------------------------------------------------------------------------------------------------- a code for eight columns
@compiled()
def round_groups(work: F32, book: tuple[F32, ...], corner: F32, metric: F32, upper: F32, codes: Codes, values: F32, error: F32) -> None:
    """As `round_columns`, a group at a time.

    Args:
        work: weights [R, n], less what earlier columns passed on; changed.
        book: scale and offset [R, G], table and its products, signs and their products (`grids.Codebook`).
        corner: inverse of each group's block of the factor [G, 8, 8].
        metric: corner corner' [G, 8, 8].
        upper: these columns' corner of the inverse Hessian's factor [n, n].
        codes: chosen [R, G].
        values: of the codes [R, n].
        error: [R, n], in units of the factor's blocks.
    """
    scale, offset = book[0], book[1]
    cost, sign_cost = np.empty(len(book[2]), np.float32), np.empty(len(book[4]), np.float32)
    for r in range(len(work)):
        for g in range(len(corner)):
            start = g * GROUP
            at = slice(start, start + GROUP)
            codes[r, g] = _search_group(work[r, at], scale[r, g], offset[r, g], metric[g], book, cost, sign_cost, values[r, at])
            error[r, at] = _times(work[r, at] - values[r, at], corner[g])
            for i in range(start, start + GROUP):
                for k in range(start + GROUP, work.shape[1]):
                    work[r, k] -= error[r, i] * upper[i, k]


@compiled()
def descend_groups(values: F32, gradient: F32, book: tuple[F32, ...], inverse: F32, metric: F32, h: F32, codes: Codes) -> None:
    """As `descend_columns`, a group at a time; the search is not exact, so a code that is no better is not taken.

    Args:
        values: what the codes stand for [R, n]; changed.
        gradient: (weights - values) H at these columns [R, n]; changed.
        book: as in `round_groups`.
        inverse: of each group's metric [G, 8, 8].
        metric: each group's block of H [G, 8, 8].
        h: these columns' corner of H [n, n].
        codes: chosen [R, G]; changed.
    """
    scale, offset = book[0], book[1]
    cost, sign_cost = np.empty(len(book[2]), np.float32), np.empty(len(book[4]), np.float32)
    value = np.empty(GROUP, np.float32)
    for r in range(len(values)):
        for g in range(len(metric)):
            start = g * GROUP
            at = slice(start, start + GROUP)
            wanted = values[r, at] + _times(gradient[r, at], inverse[g])
            code = _search_group(wanted, scale[r, g], offset[r, g], metric[g], book, cost, sign_cost, value)
            change = value - values[r, at]
            if np.sum(change * (2 * gradient[r, at] - _times(change, metric[g]))) > 0:
                codes[r, g] = code
                values[r, at] += change
                for i in range(GROUP):
                    for k in range(values.shape[1]):
                        gradient[r, k] -= change[i] * h[start + i, k]


@compiled()
def _search_group(
    w: F32,
    scale: np.float32,
    offset: np.float32,
    metric: F32,
    book: tuple[F32, ...],
    cost: F32,
    sign_cost: F32,
    value: F32,
) -> int:
    """Code of a group that (nearly) minimises (w - v) metric (w - v)'; v goes to `value` [8], `cost` and `sign_cost` are scratch."""
    _, _, table, products, signs, sign_products = book
    width, bits = table.shape[1], int(np.ceil(np.log2(len(table))))
    up = np.float32(1) if scale >= 0 else np.float32(-1)
    sign = np.ones(GROUP, np.float32)
    if len(signs) > 1:
        sign = np.where(w * up < 0, np.float32(-1), np.float32(1))
        if len(signs) < 256 and np.sum(sign < 0) % 2:  # only even numbers of minuses
            sign[np.argmin(np.abs(w))] *= -1
    linear, size = _times(w - offset, metric), np.abs(w) * up  # which stands for the parts not yet chosen
    code, sign_code = 0, 0
    for turn in range(2 if len(signs) > 1 else 1):
        code = 0
        for start in range(0, GROUP, width):
            at = slice(start, start + width)
            others = size * sign
            others[at] = 0
            target = (linear - _times(others, metric))[at]
            best = _search(scale * sign[at], target, metric[at, at], products, cost)
            size[at] = scale * table[best]
            code |= best << (bits * (start // width))
        if turn == 0 and len(signs) > 1:
            sign_code = _search(size, linear, metric, sign_products, sign_cost)
            sign[:] = signs[sign_code]
    value[:] = offset + size * sign
    return int(code | sign_code << (bits * (GROUP // width)))


@compiled(fastmath={"contract"})
def _search(factors: F32, target: F32, metric: F32, products: F32, cost: F32) -> int:
    """Row t of a table that minimises v M v' - 2 v target', v = factors * t: linear in `grids.pair_products`; `cost` is scratch [K]."""
    n, f = len(factors), 0
    weights = np.zeros(len(products), np.float32)
    for i in range(n):
        for j in range(i, n):
            weights[f] = factors[i] * factors[j] * metric[i, j]
            f += 1
    for i in range(n):
        weights[f + i] = np.float32(-2) * factors[i] * target[i]
    cost[:] = 0
    for f in range(0, len(products), 4):
        w0, w1, w2, w3 = weights[f], weights[f + 1], weights[f + 2], weights[f + 3]
        p0, p1, p2, p3 = products[f], products[f + 1], products[f + 2], products[f + 3]
        for k in range(len(cost)):
            cost[k] += w0 * p0[k] + w1 * p1[k] + w2 * p2[k] + w3 * p3[k]
    best = 0
    for k in range(1, len(cost)):
        if cost[k] < cost[best]:
            best = k
    return best


@compiled()
def _times(row: F32, matrix: F32) -> F32:
    result = np.zeros(len(row), np.float32)
    for i in range(len(row)):
        for j in range(len(row)):
            result[j] += row[i] * matrix[i, j]
    return result
