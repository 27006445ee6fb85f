"""This module packs rows in a format by the stock search, or with error feedback and refitted scales and offsets (quantize/feedback.py)."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from edgemoe.base.errors import ModelError
from edgemoe.base.types import F32
from edgemoe.quantize.bits import pack, unpack
from edgemoe.quantize.feedback import SWEEPS, apply_change, chunks_of, refit_step, round_chunks, sweep_rows
from edgemoe.quantize.gptq import Hessian, descend_columns
from edgemoe.quantize.grids import Scalar
from edgemoe.targets.mlx.formats import FORMATS, Packed, dequantize, quantize, split_rows, storable


def feeds_back(name: str) -> bool:
    """Whether feedback knows a format."""
    return FORMATS[name].group > 0


def pack_rows(rows: F32, name: str, importance: F32 | None, hessian: Hessian | None, *, dtype: str) -> NDArray[np.uint8]:
    """Rows [R, C] in a format [R, bytes], by the stock search with this importance, or with feedback if there is a Hessian.

    Raises:
        ModelError: a weight is NaN or infinite.
    """
    if not np.isfinite(rows).all():
        raise ModelError(f"{name}: a row holds NaN or infinite weights")
    if hessian is None:
        return quantize(rows, name, importance, dtype).side_by_side()
    chunks, values = round_chunks(rows, hessian, lambda part, weights: quantize(part, name, weights, dtype), lambda p: _grid_of(p, name))
    scales, offsets = (np.concatenate([getattr(stock, part) for stock, _ in chunks], axis=1) for part in ("scales", "offsets"))
    codes = np.concatenate([codes for _, codes in chunks], axis=1).astype(np.uint8)
    packed = Packed(codes=pack(codes, FORMATS[name].bits), scales=scales, offsets=offsets).side_by_side()
    return sweep_rows(
        rows, packed, values, hessian, lambda part, q, slope: descend_rows(part, name, q, hessian, slope, dtype=dtype), SWEEPS
    )


def descend_rows(packed: NDArray[np.uint8], name: str, values: F32, hessian: Hessian, gradient: F32, *, dtype: str) -> NDArray[np.uint8]:
    """Refit scales and offsets, choose every code again while all others stay, and return the rows packed anew.

    Args:
        packed: rows [R, bytes].
        name: the format.
        values: what they decode to [R, C]; changed in place.
        hessian: of the inputs, H.
        gradient: (weights - values) H [R, C]; changed in place.
        dtype: of scales and offsets.
    """
    cols, kind = values.shape[1], FORMATS[name]
    parts = split_rows(packed, name, cols, dtype)
    codes = unpack(parts.codes, kind.bits, cols).astype(np.int32)
    for chunk in chunks_of(cols):
        parts = _refit(parts, codes, name, values, hessian, gradient, chunk, dtype)
        here = codes[:, chunk].copy()
        descend_columns(here, values, _grid_of(parts, name, chunk), hessian, gradient, chunk)
        codes[:, chunk] = here
    return replace(parts, codes=pack(codes.astype(np.uint8), kind.bits)).side_by_side()


def unpack_rows(packed: NDArray[np.uint8], name: str, cols: int, *, dtype: str) -> F32:
    """The values of packed rows [R, cols]."""
    return dequantize(split_rows(packed, name, cols, dtype), name, cols, dtype)


def _grid_of(packed: Packed, name: str, columns: slice | None = None) -> Scalar:
    """The grid of values that the codes of some columns stand for."""
    kind = FORMATS[name]
    assert packed.scales is not None
    assert packed.offsets is not None
    groups = slice(columns.start // kind.group, columns.stop // kind.group) if columns else slice(None)
    scale, offset = (np.repeat(part[:, groups].astype(np.float32), kind.group, axis=1) for part in (packed.scales, packed.offsets))
    return Scalar(scale, offset, np.arange(2**kind.bits, dtype=np.float32))


def _refit(
    packed: Packed, codes: NDArray[np.int32], name: str, values: F32, hessian: Hessian, gradient: F32, columns: slice, dtype: str
) -> Packed:
    """Fit scale and offset of every group by least squares to the present codes, one group after the other, and keep each fit if it helps.

    `values` and `gradient` [R, C] are changed in place.
    """
    group = FORMATS[name].group
    assert packed.scales is not None
    assert packed.offsets is not None
    scales, offsets = packed.scales.copy(), packed.offsets.copy()
    for start in range(columns.start, columns.stop, group):
        at, g = slice(start, start + group), start // group
        q = codes[:, at].astype(np.float32)
        step = refit_step(np.stack([q, np.ones_like(q)], axis=1), hessian.h[at, at], gradient[:, at])
        old = np.stack([scales[:, g], offsets[:, g]], axis=1).astype(np.float64)
        scale, offset = storable((old + step)[:, 0], (old + step)[:, 1], dtype)
        change = scale[:, None] * q + offset[:, None] - values[:, at]
        better = apply_change(change, at, values, hessian, gradient)
        scales[better, g], offsets[better, g] = scale[better], offset[better]
    return replace(packed, scales=scales, offsets=offsets)
