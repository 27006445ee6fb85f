"""This module describes ONNX Runtime's weight formats: grids, bit packing and exact bytes.

A format has a bit width, a number of columns that share a scale (a block), and a zero point for each block or none:

    weight = (code - zero) * scale,  zero = 2^(bits-1) if none is stored

Expert nodes (QMoE), matrix products (MatMulNBits) and the embedding (GatherBlockQuantized) read the same bytes: codes of a row LSB first, a
scale per block, zero points packed like the codes.  Measurements decided which formats are offered (docs/decisions/0007-onnx-formats.md).
This module needs neither onnx nor onnxruntime.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from edgemoe.base.errors import ModelError
from edgemoe.quantize.bits import pack, packed_size, unpack
from edgemoe.quantize.importance import floor_importance

ALIGNMENT = 64  # bytes: every piece of the data file starts at a multiple; a cache line, and the widest vector (AVX-512)
_CHUNK = 2**16  # weights that are searched at a time, so that temporaries stay in the cache


@dataclass(frozen=True, slots=True, kw_only=True)
class Format:
    """Width in bits, columns that share a scale (0: plain floats), whether blocks have zero points, bytes of a scale."""

    bits: int
    block: int = 0
    zeros: bool = False
    scale_bytes: int = 4  # float32, as the graph's values; QMoE of 3 bits runs in float16 only

    @property
    def bpw(self) -> float:
        """Bits per weight, without padding."""
        return self.bits + (8 * self.scale_bytes + self.bits * self.zeros) / self.block if self.block else self.bits


FORMATS = {
    "F32": Format(bits=32),
    "INT8_32": Format(bits=8, block=32),
    "INT8_64": Format(bits=8, block=64),
    "INT8_128": Format(bits=8, block=128),
    "INT4_32": Format(bits=4, block=32, zeros=True),
    "INT4_64": Format(bits=4, block=64, zeros=True),
    "INT4_128": Format(bits=4, block=128, zeros=True),
    "INT3_32": Format(bits=3, block=32, scale_bytes=2),
    "INT3_64": Format(bits=3, block=64, scale_bytes=2),
    "INT3_128": Format(bits=3, block=128, scale_bytes=2),
    "INT2_32": Format(bits=2, block=32, zeros=True),
    "INT2_64": Format(bits=2, block=64, zeros=True),
    "INT2_128": Format(bits=2, block=128, zeros=True),
}
# The formats offered for each bit width have the least measured error for their bytes; if none fits, all formats that fit are offered.
MENU = {8: ("INT8_32", "INT8_128"), 4: ("INT4_32", "INT4_64", "INT4_128"), 3: ("INT3_128",), 2: ("INT2_128",)}
OFFERED = tuple(name for name in FORMATS if name != "F32")


@dataclass(frozen=True, slots=True, kw_only=True)
class Packed:
    """Rows in a format: codes [n, bytes], scales [n, blocks], zero points [n, bytes]; float rows are their own codes."""

    codes: NDArray[np.uint8]
    scales: NDArray[np.float32] | NDArray[np.float16] | None = None
    zeros: NDArray[np.uint8] | None = None

    def pieces(self) -> dict[str, NDArray[np.uint8]]:
        """The pieces that the file holds, by name, as bytes [n, bytes]."""
        parts = {"codes": self.codes, "scales": self.scales, "zeros": self.zeros}
        return {name: part.view(np.uint8) for name, part in parts.items() if part is not None}


# ------------------------------------------------------------------------------------------------------------------ sizes
def pad(size: int) -> int:
    """Bytes that a piece takes in the data file."""
    return -(-size // ALIGNMENT) * ALIGNMENT


def fits(name: str, cols: int) -> bool:
    """Whether rows of this length can be stored: in whole blocks, and in more than one (fast kernels do not run single blocks)."""
    block = FORMATS[name].block
    return block == 0 or (cols % block == 0 and cols > block)


def choose_menu(cols: Sequence[int], widths: Sequence[int]) -> tuple[str, ...]:
    """Formats that can store rows of all these lengths: for each bit width those of the menu, or the others if none of these fits."""
    found: list[str] = []
    for bits in widths:
        fitting = [name for name, kind in FORMATS.items() if kind.bits == bits and all(fits(name, n) for n in cols)]
        found += [name for name in fitting if name in MENU[bits]] or fitting
    return tuple(found)


def piece_bytes(name: str, rows: int, cols: int) -> dict[str, int]:
    """Bytes of each piece of a matrix, without padding.

    Raises:
        ModelError: the block does not divide the row.
    """
    kind = FORMATS[name]
    if not kind.block:
        return {"codes": rows * cols * kind.bits // 8}
    if cols % kind.block:
        raise ModelError(f"{name} stores rows of multiples of {kind.block}, not of {cols}")
    blocks = cols // kind.block
    sizes = {"codes": rows * cols * kind.bits // 8, "scales": rows * blocks * kind.scale_bytes}
    return {**sizes, "zeros": rows * packed_size(blocks, kind.bits)} if kind.zeros else sizes


def matrix_size(name: str, rows: int, cols: int) -> int:
    """Bytes of a matrix in the data file, each piece padded."""
    return sum(map(pad, piece_bytes(name, rows, cols).values()))


# ------------------------------------------------------------------------------------------------------------ quantization
def quantize(rows: NDArray[np.float32], name: str, importance: NDArray[np.float32] | None = None) -> Packed:
    """Rows [n, cols] in a format; `importance` [cols] weighs the columns' squared errors (uniform if there is none).

    Raises:
        ModelError: the block does not divide the row.
    """
    kind = FORMATS[name]
    rows = np.ascontiguousarray(rows, np.float32)
    n, cols = rows.shape
    piece_bytes(name, n, cols)
    if not kind.block:
        return Packed(codes=rows.view(np.uint8))
    blocks = cols // kind.block
    weights = floor_importance(importance, cols).reshape(blocks, kind.block)
    codes = np.empty((n * blocks, kind.block), np.uint8)
    scales, zeros = np.empty(n * blocks, np.float32), np.empty(n * blocks, np.uint8)
    step = max(1, _CHUNK // cols)
    for start in range(0, n, step):
        x = rows[start : start + step].reshape(-1, kind.block)
        here = slice(start * blocks, start * blocks + len(x))
        codes[here], scales[here], zeros[here] = _search(x, np.tile(weights, (len(x) // blocks, 1)), kind)
    by_row = scales.reshape(n, blocks)
    return Packed(
        codes=pack(codes.reshape(n, cols), kind.bits),
        scales=by_row.astype(np.float16) if kind.scale_bytes == 2 else by_row,
        zeros=pack(zeros.reshape(n, blocks), kind.bits) if kind.zeros else None,
    )


def dequantize(packed: Packed, name: str, cols: int) -> NDArray[np.float32]:
    """Rows [n, cols] again, as the kernels read them."""
    kind = FORMATS[name]
    if not kind.block or packed.scales is None:
        return packed.codes.view(np.float32).reshape(-1, cols)
    n, blocks = packed.scales.shape
    codes = unpack(packed.codes, kind.bits, cols).reshape(n, blocks, kind.block).astype(np.float32)
    zeros = np.full((1, 1, 1), 2 ** (kind.bits - 1), np.float32)
    if packed.zeros is not None:
        zeros = unpack(packed.zeros, kind.bits, blocks).astype(np.float32)[:, :, None]
    result: NDArray[np.float32] = (codes - zeros) * packed.scales.astype(np.float32)[:, :, None]
    return result.reshape(n, cols)


def round_rows(rows: NDArray[np.float32], name: str, importance: NDArray[np.float32] | None = None) -> NDArray[np.float32]:
    """Rows [n, cols] rounded as a format stores them."""
    return dequantize(quantize(rows, name, importance), name, rows.shape[1])


def quantize_parallel(
    rows: NDArray[np.float32], name: str, importance: NDArray[np.float32] | None, pool: ThreadPoolExecutor, rows_each: int = 256
) -> list[Packed]:
    """Rows in a format, quantized by several threads: the pieces from top to bottom, with the same bytes as from a single call."""
    starts = range(0, len(rows), rows_each)
    return list(pool.map(lambda i: quantize(rows[i : i + rows_each], name, importance), starts))


Grid = tuple[NDArray[np.uint8], NDArray[np.float32], NDArray[np.uint8]]  # codes [B, block], scales [B], zeros [B]


def _search(x: NDArray[np.float32], weights: NDArray[np.float32], kind: Format) -> Grid:
    """Codes, scale and zero point of each block.

    For given codes q, the scale of least weighted squared error is sum(w q x) / sum(w q^2), and its error is
    sum(w x^2) - sum(w q x)^2 / sum(w q^2), by which every grid is judged.  But least squares shrinks the weights: the error is missing from
    the projection on the original, so every output loses the same share, and the losses of three matrices in a row add up.  The stored
    scale, sum(w x^2) / sum(w q x), keeps the projection, as stochastic rounding would, and the error is then independent of the output.  It
    lowers KL by 30 to 40 % at 2 bits (docs/decisions/0007-onnx-formats.md).
    """
    best_gain = np.full(len(x), -1, np.float32)
    scale, zero = np.ones(len(x), np.float32), np.full(len(x), 2 ** (kind.bits - 1), np.float32)
    for s, z in _grids(x, kind):
        gain, fitted = _fit(x, weights, _codes(x, s, z, kind))
        better = gain > best_gain
        best_gain[better], scale[better], zero[better] = gain[better], (fitted if kind.bits < 8 else s)[better], z[better]
    q = _codes(x, scale, zero, kind)
    if kind.bits < 8:
        gain, fitted = _fit(x, weights, q)
        whole = np.einsum("ij,ij,ij->i", weights, x, x)
        scale = fitted * np.clip(whole / np.maximum(gain, np.float32(1e-30)), 1, 2)  # a block of noise stays noise
    return (q + zero[:, None]).astype(np.uint8), _storable(scale, kind), zero.astype(np.uint8)


def _codes(x: NDArray[np.float32], scale: NDArray[np.float32], zero: NDArray[np.float32], kind: Format) -> NDArray[np.float32]:
    """Nearest codes of blocks, less their zero points [B, block]."""
    q = x / _storable(scale, kind)[:, None]
    np.rint(q, out=q)
    return np.clip(q, -zero[:, None], (2**kind.bits - 1) - zero[:, None], out=q)


def _fit(x: NDArray[np.float32], weights: NDArray[np.float32], q: NDArray[np.float32]) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """The error that the best scale removes, and this scale [B]."""
    weighted = weights * q
    dot, square = np.einsum("ij,ij->i", weighted, x), np.einsum("ij,ij->i", weighted, q)
    fitted = dot / np.maximum(square, np.float32(1e-30))
    return dot * fitted, fitted


def _storable(scale: NDArray[np.float32], kind: Format) -> NDArray[np.float32]:
    """Scales as the file holds them: never zero, and positive float16 for 3 bits (the operator's own condition)."""
    if kind.scale_bytes == 2:
        smallest, largest = np.float32(2.0**-14), np.float32(65504)  # normal numbers of float16
        return np.clip(scale, smallest, largest).astype(np.float16).astype(np.float32)
    return np.where(np.abs(scale) < 1e-30, np.float32(1), scale)


# Scales that are tried, as shares of the scale that just spans the block's values; with fewer codes, more clipping pays.
_SHRINK = {8: (1.0,), 4: (1.0, 0.93, 0.86, 0.79), 3: (1.0, 0.9, 0.8, 0.7, 0.6), 2: (1.0, 0.9, 0.8, 0.7, 0.6)}


def _grids(x: NDArray[np.float32], kind: Format) -> Iterator[tuple[NDArray[np.float32], NDArray[np.float32]]]:
    """Scales and zero points to try for blocks [B, block]."""
    top, half = np.float32(2**kind.bits - 1), np.float32(2 ** (kind.bits - 1))
    low, high = np.minimum(x.min(axis=1), 0), np.maximum(x.max(axis=1), 0)
    middle = np.full(len(x), half, np.float32)
    if not kind.zeros:
        largest = np.maximum(high, -low)
        # Codes reach from -half to half - 1.  A negative scale gives the longer end to the block's largest magnitude, whatever its sign.
        sign = np.where(-low > high, np.float32(1), np.float32(-1)) if kind.scale_bytes == 4 else np.float32(1)
        span = sign * largest / half if kind.scale_bytes == 4 else largest / (half - 1)
        for share in _SHRINK[kind.bits]:
            yield (span * np.float32(share)).astype(np.float32), middle
        return
    span = (high - low) / top
    for share in _SHRINK[kind.bits]:
        scale = np.maximum(span * np.float32(share), np.float32(1e-30))
        if kind.bits == 2:  # four codes: every place of zero inside them
            for zero in (1, 2):
                yield scale, np.full(len(x), zero, np.float32)
        else:
            yield scale, np.clip(np.rint(-(low + (high - low) * np.float32((1 - share) / 2)) / scale), 0, top)
    if kind.bits == 2:  # all of one sign
        yield span, np.where(-low > high, top, np.float32(0))


# ------------------------------------------------------------------------------------------------------------ activations
def input_block(name: str, role: str = "ffn_exps") -> int:
    """Inputs of a product with weights in this format that are rounded to int8 together (`round_to_int8`); 0 if none are rounded.

    QMoE of 8 bits and MatMulNBits of accuracy_level 4, which all matrices have, round exactly so.  QMoE of 2 bits rounds sums of four
    inputs instead, with a slightly smaller error.  QMoE of 4 and 3 bits computes in floats.  `role` tells experts from matrices.
    """
    kind = FORMATS[name]
    return 0 if role.endswith("_exps") and kind.bits in (3, 4) else kind.block
