"""This module packs rows in a ggml type with ggml's own scales, and chooses the codes with error feedback (quantize/gptq.py).

A row is packed chunk by chunk (quantize/feedback.py).  Then block scales (float16) are refitted to the codes and codes to the scales, in
turn.
"""

from __future__ import annotations

import functools

import numpy as np
from numpy.typing import NDArray

from edgemoe.base.errors import ModelError
from edgemoe.base.types import F32, F64
from edgemoe.quantize.feedback import SWEEPS, apply_change, chunks_of, refit_step, round_chunks, sweep_rows
from edgemoe.quantize.gptq import Hessian, descend_columns
from edgemoe.quantize.grids import Codebook, Grid, Scalar, sign_patterns
from edgemoe.targets.gguf.codes import code_bits, read_codes, write_codes
from edgemoe.targets.gguf.formats import FORMATS, dequantize, quantize, row_bytes

UNIFORM = ("Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0")
TABLES = ("IQ4_XS", "IQ4_NL", "MXFP4", "IQ1_S", "IQ1_M")
SIGNED = {"IQ2_XXS": (8, 1, True), "IQ2_XS": (9, 1, True), "IQ2_S": (10, 1, False), "IQ3_XXS": (8, 2, True), "IQ3_S": (9, 2, False)}
FED_BACK = (*UNIFORM, *TABLES, *SIGNED)
ONE = np.frombuffer(np.float16(1).tobytes(), np.uint8)


def quantize_fed_back(rows: F32, name: str, hessian: Hessian, sweeps: int = SWEEPS) -> NDArray[np.uint8]:
    """Rows [R, C] in a format of FED_BACK, as bytes [R, row_bytes], with codes that lower (w - q) H (w - q)' of each row.

    Args:
        rows: weights, finite.
        name: the ggml type.
        hessian: of the matrix's inputs, [C, C].
        sweeps: rounds that refit scales and codes after the feedback.

    Raises:
        ModelError: a weight is NaN or infinite (ggml itself would write garbage).
    """
    if not np.isfinite(rows).all():
        raise ModelError(f"{name}: a row holds NaN or infinite weights")
    chunks, values = round_chunks(rows, hessian, lambda part, weights: quantize(part, name, weights), lambda stock: grid_of(stock, name))
    packed = np.concatenate([write_codes(stock, name, codes) for stock, codes in chunks], axis=1)
    return sweep_rows(rows, packed, values, hessian, lambda rows, q, slope: descend_rows(rows, name, q, hessian, slope), sweeps)


def descend_rows(packed: NDArray[np.uint8], name: str, values: F32, hessian: Hessian, gradient: F32) -> NDArray[np.uint8]:
    """Refit scales, choose every code again while all others stay, and return the rows packed anew; values and gradient change in place.

    Args:
        packed: rows [R, bytes].
        name: the ggml type.
        values: what they decode to [R, C].
        hessian: of the inputs, H.
        gradient: (weights - values) H [R, C].
    """
    parts, start = [], 0
    for chunk in chunks_of(values.shape[1]):
        stop = start + row_bytes(name, chunk.stop - chunk.start)
        part = _refit_scales(np.ascontiguousarray(packed[:, start:stop]), name, values, hessian, gradient, chunk)
        codes = read_codes(part, name)
        descend_columns(codes, values, grid_of(part, name), hessian, gradient, chunk)
        parts.append(write_codes(part, name, codes))
        start = stop
    return np.concatenate(parts, axis=1)


def feeds_back(name: str) -> bool:
    """Whether feedback knows a format."""
    return name in FED_BACK


def pack_rows(rows: F32, name: str, importance: F32 | None, hessian: Hessian | None) -> NDArray[np.uint8]:
    """Rows in a format, by the stock quantizer with this importance, or with feedback if there is a Hessian."""
    return quantize(rows, name, importance) if hessian is None else quantize_fed_back(rows, name, hessian)


# -------------------------------------------------------------------------------------------------------------------- grids
def grid_of(packed: NDArray[np.uint8], name: str) -> Grid:
    """The grid of values that the codes of packed rows [R, bytes] stand for, with their present scales."""
    if name in UNIFORM:
        last = 2 ** code_bits(name).bits.shape[1] - 1
        low, high = _decode_all(packed, name, 0), _decode_all(packed, name, last)
        return Scalar((high - low) / np.float32(last), low, np.arange(last + 1, dtype=np.float32))
    table = _table_of(name)
    if name in TABLES:
        first, second = int(table[:, 0].argmin()), int(table[:, 0].argmax())
        dim = table.shape[1]
        low, high = _decode_all(packed, name, first)[:, ::dim], _decode_all(packed, name, second)[:, ::dim]
        scale = (high - low) / (table[second, 0] - table[first, 0])
        offset = low - scale * table[first, 0]
        return Scalar(scale, offset, table[:, 0]) if dim == 1 else Codebook(scale, offset, table, sign_patterns(1))
    scale = _decode_all(packed, name, 0)[:, ::8] / table[0, 0]
    return Codebook(scale, np.zeros_like(scale), table, sign_patterns(128 if SIGNED[name][2] else 256))


def _decode_all(packed: NDArray[np.uint8], name: str, code: int) -> F32:
    """Values [R, C] if all codes were this one."""
    groups = packed.shape[1] // FORMATS[name].block_bytes * len(code_bits(name).bits)
    codes = np.full((len(packed), groups), code, np.int32)
    return dequantize(write_codes(packed, name, codes), name, groups * code_bits(name).dim)


@functools.cache
def _table_of(name: str) -> F32:
    """Values [codes, columns] of the codes of a format, up to a factor, which ggml gives by decoding one block for each code."""
    layout, kind = code_bits(name), FORMATS[name]
    block = np.zeros(kind.block_bytes, np.uint8)
    for offset in layout.halves:
        block[offset : offset + 2] = ONE
    if name == "MXFP4":
        block[0] = 128  # exponent of two: E8M0
    if name == "IQ1_M":
        block[[53, 55]] = 0xC0, 0x30  # the four nibbles of d
    if name in SIGNED:
        bits, parts, _ = SIGNED[name]
        codes, dim = np.arange(2**bits, dtype=np.int32), 8 // parts
    else:
        codes, dim = np.arange(2 ** layout.bits.shape[1], dtype=np.int32), layout.dim
    blocks = write_codes(np.tile(block, (len(codes), 1)), name, np.tile(codes[:, None], (1, len(layout.bits))))
    table = dequantize(blocks, name, kind.block)[:, :dim]
    return np.ascontiguousarray(table / np.abs(table).max())


# ------------------------------------------------------------------------------------------------------------------- scales
def _refit_scales(packed: NDArray[np.uint8], name: str, values: F32, hessian: Hessian, gradient: F32, columns: slice) -> NDArray[np.uint8]:
    """Fit d (and dmin) of every block by least squares to the present codes, one block after the other, and keep each fit if it helps.

    `values` and `gradient` [R, C] are changed in place.
    """
    halves, kind = code_bits(name).halves, FORMATS[name]
    if not halves:
        return packed
    packed = packed.copy()
    for start in range(0, columns.stop - columns.start, kind.block):
        at = slice(columns.start + start, columns.start + start + kind.block)
        block = packed[:, start // kind.block * kind.block_bytes :][:, : kind.block_bytes]
        parts = np.stack([_part(block, name, offset) for offset in halves], axis=1)  # [R, halves, block]
        step = refit_step(parts, hessian.h[at, at], gradient[:, at])
        old = np.stack([_half(block, offset) for offset in halves], axis=1)
        new = np.clip(old + step, -65504, 65504).astype(np.float16)
        fresh = block.copy()
        for i, offset in enumerate(halves):
            fresh[:, offset : offset + 2] = np.ascontiguousarray(new[:, i]).view(np.uint8).reshape(-1, 2)
        change = dequantize(fresh, name, kind.block) - values[:, at]
        better = apply_change(change, at, values, hessian, gradient)
        block[better] = fresh[better]
    return packed


def _half(block: NDArray[np.uint8], offset: int) -> F64:
    return np.ascontiguousarray(block[:, offset : offset + 2]).view(np.float16)[:, 0].astype(np.float64)


def _part(block: NDArray[np.uint8], name: str, offset: int) -> F32:
    """Values [R, block] if this float16 were one and the others were zero."""
    alone = block.copy()
    for other in code_bits(name).halves:
        alone[:, other : other + 2] = ONE if other == offset else 0
    return dequantize(alone, name, FORMATS[name].block)
