"""This module rounds rows in chunks of columns by error feedback, on the grids that a format's own quantizer chooses (gptq.py).

The quantizer packs a chunk after the errors of earlier chunks were passed on to it.  Its scales stay for now, and its codes are chosen
again.  Afterwards come sweeps, in which a format may refit its scales to the codes by `refit_step`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from edgemoe.base.types import F32, F64
from edgemoe.quantize.gptq import Hessian, round_columns
from edgemoe.quantize.grids import Codes, Grid

CHUNK = 256  # columns: the largest block of any ggml type, and two of the largest groups of ONNX and MLX
SWEEPS = 2
Stock = TypeVar("Stock")


def chunks_of(cols: int) -> list[slice]:
    """The chunks of a row."""
    return [slice(i, min(i + CHUNK, cols)) for i in range(0, cols, CHUNK)]


def round_chunks(
    rows: F32, hessian: Hessian, quantize: Callable[[F32, F32], Stock], grid_of: Callable[[Stock], Grid]
) -> tuple[list[tuple[Stock, Codes]], F32]:
    """What the quantizer made of each chunk with the codes that feedback chose for it, and the values [R, C] of these codes.

    Args:
        rows: weights [R, C], finite.
        hessian: of the matrix's inputs, [C, C].
        quantize: packs a chunk [R, n], with the importance of its columns [n].
        grid_of: the values that the codes of a packed chunk stand for.
    """
    left, values = np.array(rows, np.float32), np.empty(rows.shape, np.float32)
    found: list[tuple[Stock, Codes]] = []
    for chunk in chunks_of(rows.shape[1]):
        stock = quantize(left[:, chunk], hessian.importance[chunk])
        codes, values[:, chunk], correction = round_columns(left, grid_of(stock), hessian, chunk)
        left[:, chunk.stop :] -= correction
        found.append((stock, codes))
    return found, values


def sweep_rows(
    rows: F32,
    packed: NDArray[np.uint8],
    values: F32,
    hessian: Hessian,
    descend: Callable[[NDArray[np.uint8], F32, F32], NDArray[np.uint8]],
    sweeps: int,
) -> NDArray[np.uint8]:
    """Packed rows [R, bytes] after some sweeps; `values`, what they decode to [R, C], change in place.

    Args:
        rows: weights [R, C].
        packed: rows [R, bytes].
        values: what they decode to [R, C].
        hessian: of the inputs, H.
        descend: packs anew, from packed rows, their values and the gradient (rows - values) H, of which it changes the last two in place.
        sweeps: how many.
    """
    if sweeps:
        gradient = np.asarray((rows - values) @ hessian.h, np.float32)
    for _ in range(sweeps):
        packed = descend(packed, values, gradient)
    return packed


def refit_step(parts: F32, inner: F32, gradient: F32) -> F64:
    """By how much the parameters of a block should change [R, P], by least squares in the Hessian's metric.

    The block's values are a sum of P parts, each multiplied by a parameter (a scale, an offset); codes stay.

    Args:
        parts: values of the block if one parameter were 1 and all others 0 [R, P, n].
        inner: the block's corner of the Hessian [n, n].
        gradient: (weights - values) H at the block [R, n].
    """
    normal = np.einsum("rib,rjb->rij", parts @ inner, parts).astype(np.float64)
    wanted = np.einsum("rib,rb->ri", parts, gradient).astype(np.float64)
    lift = 1e-9 * np.trace(normal, axis1=1, axis2=2) + 1e-300
    step: F64 = np.linalg.solve(normal + lift[:, None, None] * np.eye(parts.shape[1]), wanted[..., None])[..., 0]
    return step


def apply_change(change: F32, at: slice, values: F32, hessian: Hessian, gradient: F32) -> NDArray[np.bool_]:
    """Change the values of a block [R, n] in the rows where this lowers the error, and say in which; all but `change` is [R, C].

    `values` and `gradient` (weights - values) H change in place.
    """
    inner = hessian.h[at, at]
    better: NDArray[np.bool_] = 2 * (change * gradient[:, at]).sum(axis=1) - ((change @ inner) * change).sum(axis=1) > 0
    change *= better[:, None]
    values[:, at] += change
    gradient -= change @ hessian.h[at]
    return better
