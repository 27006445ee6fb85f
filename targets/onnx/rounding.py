"""This module packs rows in a format with the scales of the stock search, and chooses codes with error feedback (quantize/gptq.py).

A packed row holds its codes, scales and zero points one after the other, in the order of `Packed.pieces`.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from edgemoe.base.errors import ModelError
from edgemoe.base.types import F32
from edgemoe.quantize.bits import pack, unpack
from edgemoe.quantize.feedback import SWEEPS, round_chunks, sweep_rows
from edgemoe.quantize.gptq import Hessian, descend_columns
from edgemoe.quantize.grids import Scalar
from edgemoe.targets.onnx.formats import FORMATS, Packed, dequantize, piece_bytes, quantize


def feeds_back(name: str) -> bool:
    """Whether feedback knows a format."""
    return FORMATS[name].block > 0


def pack_rows(rows: F32, name: str, importance: F32 | None, hessian: Hessian | None) -> NDArray[np.uint8]:
    """Rows [R, C] in a format [R, bytes], by the stock search with this importance, or with feedback if there is a Hessian.

    Raises:
        ModelError: a weight is NaN or infinite.
    """
    if not np.isfinite(rows).all():
        raise ModelError(f"{name}: a row holds NaN or infinite weights")
    return _side_by_side(quantize(rows, name, importance)) if hessian is None else quantize_fed_back(rows, name, hessian)


def descend_rows(packed: NDArray[np.uint8], name: str, values: F32, hessian: Hessian, gradient: F32) -> NDArray[np.uint8]:
    """Choose every code again while all others stay, and return the rows packed anew; values and gradient change in place.

    Args:
        packed: rows [R, bytes].
        name: the format.
        values: what they decode to [R, C].
        hessian: of the inputs, H.
        gradient: (weights - values) H [R, C].
    """
    cols, bits = values.shape[1], FORMATS[name].bits
    parts = split_rows(packed, name, cols)
    codes = unpack(parts.codes, bits, cols).astype(np.int32)
    descend_columns(codes, values, _grid_of(parts, name), hessian, gradient, slice(0, cols))
    return _side_by_side(replace(parts, codes=pack(codes.astype(np.uint8), bits)))


def _side_by_side(packed: Packed) -> NDArray[np.uint8]:
    return np.concatenate(list(packed.pieces().values()), axis=1)


def split_rows(packed: NDArray[np.uint8], name: str, cols: int) -> Packed:
    """Packed rows [R, bytes] by piece."""
    ends = np.cumsum(list(piece_bytes(name, 1, cols).values()))
    codes, *others = np.split(packed, ends[:-1], axis=1)
    if not others:
        return Packed(codes=np.ascontiguousarray(codes))
    raw = np.ascontiguousarray(others[0])
    scales = raw.view(np.float16) if FORMATS[name].scale_bytes == 2 else raw.view(np.float32)
    return Packed(codes=np.ascontiguousarray(codes), scales=scales, zeros=others[1] if len(others) > 1 else None)


def unpack_rows(packed: NDArray[np.uint8], name: str, cols: int) -> F32:
    """The values of packed rows [R, cols]."""
    return dequantize(split_rows(packed, name, cols), name, cols)


def quantize_fed_back(rows: F32, name: str, hessian: Hessian, sweeps: int = SWEEPS) -> NDArray[np.uint8]:
    """Rows [R, C] in a format, as packed rows [R, bytes], with codes that lower (w - q) H (w - q)' of each row.

    The scales and zero points that the stock search finds for each chunk stay.

    Args:
        rows: weights, finite.
        name: the format.
        hessian: of the matrix's inputs, [C, C].
        sweeps: rounds in which every code is chosen again while all others stay.
    """
    chunks, values = round_chunks(rows, hessian, lambda part, weights: quantize(part, name, weights), lambda stock: _grid_of(stock, name))
    codes = np.concatenate([codes for _, codes in chunks], axis=1).astype(np.uint8)
    packed = _side_by_side(_join(codes, [stock for stock, _ in chunks], name))
    return sweep_rows(rows, packed, values, hessian, lambda rows, q, slope: descend_rows(rows, name, q, hessian, slope), sweeps)


def _grid_of(packed: Packed, name: str) -> Scalar:
    """The grid of values that the codes stand for."""
    kind = FORMATS[name]
    assert packed.scales is not None
    blocks = packed.scales.shape[1]
    zeros = np.full((1, 1), 2 ** (kind.bits - 1), np.float32)
    if packed.zeros is not None:
        zeros = unpack(packed.zeros, kind.bits, blocks).astype(np.float32)
    scales = packed.scales.astype(np.float32)
    scale, offset = (np.repeat(part, kind.block, axis=1) for part in (scales, -zeros * scales))
    return Scalar(scale, offset, np.arange(2**kind.bits, dtype=np.float32))


def _join(codes: NDArray[np.uint8], chunks: list[Packed], name: str) -> Packed:
    """Chunks of columns side by side, with these codes."""
    kind = FORMATS[name]
    scales = np.concatenate([part.scales for part in chunks if part.scales is not None], axis=1)
    zeros = None
    if kind.zeros:
        every = [
            unpack(part.zeros, kind.bits, part.scales.shape[1]) for part in chunks if part.zeros is not None and part.scales is not None
        ]
        zeros = pack(np.concatenate(every, axis=1), kind.bits)
    return Packed(codes=pack(codes, kind.bits), scales=scales, zeros=zeros)
