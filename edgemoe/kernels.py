"""The two inner loops of rounding, compiled: a row at a time, a column at a time, every column's error taken up by the rest of its block.

Both release the interpreter's lock, and a row's result does not depend on the rows beside it: threads share them out as they like.
"""

from __future__ import annotations

import numba
import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float32]
Codes = NDArray[np.int32]


@numba.njit(cache=True, nogil=True, inline="always")
def _nearest(w: np.float32, scale: np.float32, offset: np.float32, table: Floats) -> int:
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


@numba.njit(cache=True, nogil=True)
def round_block(
    work: Floats, scale: Floats, offset: Floats, table: Floats, upper: Floats, codes: Codes, values: Floats, error: Floats
) -> None:
    """GPTQ's loop over some columns; `work`, `codes`, `values`, `error` [R, n] are changed in place.

    Args:
        work: weights, less what earlier columns passed on.
        scale: of every weight [R, n].
        offset: likewise.
        table: what codes stand for [K], before scale and offset.
        upper: these columns' corner of the inverse second moments' factor [n, n].
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


@numba.njit(cache=True, nogil=True)
def descend_block(values: Floats, gradient: Floats, scale: Floats, offset: Floats, table: Floats, h: Floats, codes: Codes) -> None:
    """Every code of some columns chosen again, all others given; `values`, `gradient` and `codes` [R, n] are changed in place.

    Args:
        values: what the codes stand for.
        gradient: (weights - values) H at these columns.
        scale: of every weight [R, n].
        offset: likewise.
        table: what codes stand for [K], before scale and offset.
        h: these columns' corner of the second moments [n, n].
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
