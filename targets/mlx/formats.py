"""This module describes MLX's affine weight formats: exact bytes, and the search for scales and offsets.

A format has a bit width and a number of columns that share a scale and an offset (a group):

    weight = scale * code + offset

Scale and offset (MLX calls it bias) are 16-bit floats, of the type that all floats of the folder have.  The codes of a row are one
little-endian bit stream (quantize/bits.py), as `mx.quantize` writes them for every width.  This module needs no mlx.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from edgemoe.base.errors import ModelError
from edgemoe.base.types import F32
from edgemoe.quantize.bits import pack, unpack
from edgemoe.quantize.importance import floor_importance

HALF_BYTES = 2
DTYPES: dict[str, Any] = {"f16": np.dtype(np.float16), "bf16": np.dtype(ml_dtypes.bfloat16)}
LARGEST = {"f16": np.float32(65504), "bf16": np.float32(3.3895e38)}
_CHUNK = 2**16  # weights that are searched at a time, so that temporaries stay in the cache
_REFITS = 2  # rounds of least squares for scale and offset
# Ranges that are tried, as shares of the range of the group's values; with fewer codes, more clipping pays.
_SHRINK = {2: (1.0, 0.9, 0.8, 0.7, 0.6), 3: (1.0, 0.92, 0.84, 0.76), 4: (1.0, 0.95, 0.9, 0.85), 5: (1.0, 0.95), 6: (1.0,), 8: (1.0,)}


@dataclass(frozen=True, slots=True, kw_only=True)
class Format:
    """Width in bits, and columns that share a scale and an offset (0: 16-bit floats)."""

    bits: int
    group: int = 0

    @property
    def bpw(self) -> float:
        """Bits per weight."""
        return self.bits + (16 * HALF_BYTES / self.group if self.group else 0)


FORMATS = {"F16": Format(bits=16)} | {
    f"INT{bits}_{group}": Format(bits=bits, group=group) for bits in (8, 6, 5, 4, 3, 2) for group in (32, 64, 128)
}
# Groups of 32 bring nothing but to the embedding and the output matrix, and cost decode speed (docs/decisions/0018-mlx.md).
MENU = tuple(name for name, kind in FORMATS.items() if kind.group != 32)


@dataclass(frozen=True, slots=True, kw_only=True)
class Packed:
    """Rows in a format: codes [n, bytes], scales and offsets [n, groups] as 16-bit floats; rows of plain floats are their own codes."""

    codes: NDArray[np.uint8]
    scales: NDArray[Any] | None = None
    offsets: NDArray[Any] | None = None

    def side_by_side(self) -> NDArray[np.uint8]:
        """One row of bytes for each row [n, bytes]: codes, scales, offsets."""
        parts = [self.codes, *(part.view(np.uint8) for part in (self.scales, self.offsets) if part is not None)]
        return np.concatenate(parts, axis=1)


# ------------------------------------------------------------------------------------------------------------------ sizes
def formats_of_rows(cols: int, *, of_vocabulary: bool) -> tuple[str, ...]:
    """Formats that can store rows of this length; groups of 32 only where no other divides, and for the vocabulary's matrices."""
    fitting = [name for name, kind in FORMATS.items() if not kind.group or cols % kind.group == 0]
    wide = [name for name in fitting if name in MENU]
    return tuple(fitting if of_vocabulary or len(wide) == 1 else wide)


def piece_bytes(name: str, cols: int) -> dict[str, int]:
    """Bytes of each piece of a row.

    Raises:
        ModelError: the group does not divide the row.
    """
    kind = FORMATS[name]
    if not kind.group:
        return {"codes": HALF_BYTES * cols}
    if cols % kind.group:
        raise ModelError(f"{name} stores rows of multiples of {kind.group}, not of {cols}")
    floats = HALF_BYTES * cols // kind.group
    return {"codes": cols * kind.bits // 8, "scales": floats, "offsets": floats}


def row_bytes(name: str, cols: int) -> int:
    """Bytes of a row."""
    return sum(piece_bytes(name, cols).values())


def split_rows(packed: NDArray[np.uint8], name: str, cols: int, dtype: str) -> Packed:
    """Rows of bytes [n, bytes] by piece."""
    ends = np.cumsum(list(piece_bytes(name, cols).values()))
    codes, *halves = (np.ascontiguousarray(part) for part in np.split(packed, ends[:-1], axis=1))
    return Packed(codes=codes, **{key: half.view(DTYPES[dtype]) for key, half in zip(("scales", "offsets"), halves, strict=False)})


# ------------------------------------------------------------------------------------------------------------ quantization
def to_half(values: NDArray[Any], dtype: str) -> NDArray[Any]:
    """Values in the folder's float type; what is too large for float16 becomes its largest number only in scales, see `storable`."""
    with np.errstate(over="ignore"):
        return values.astype(DTYPES[dtype])


def quantize(rows: F32, name: str, importance: F32 | None, dtype: str) -> Packed:
    """Rows [n, cols] in a format; `importance` [cols] weighs the columns' squared errors (uniform if there is none).

    Raises:
        ModelError: the group does not divide the row.
    """
    kind = FORMATS[name]
    rows = np.ascontiguousarray(rows, np.float32)
    n, cols = rows.shape
    piece_bytes(name, cols)
    if not kind.group:
        return Packed(codes=to_half(rows, dtype).view(np.uint8))
    groups = cols // kind.group
    weights = floor_importance(importance, cols).reshape(groups, kind.group)
    codes = np.empty((n * groups, kind.group), np.uint8)
    scales, offsets = np.empty(n * groups, np.float32), np.empty(n * groups, np.float32)
    step = max(1, _CHUNK // cols)
    for start in range(0, n, step):
        x = rows[start : start + step].reshape(-1, kind.group)
        here = slice(start * groups, start * groups + len(x))
        codes[here], scales[here], offsets[here] = _search(x, np.tile(weights, (len(x) // groups, 1)), kind.bits, dtype)
    scales, offsets = scales.reshape(n, groups), offsets.reshape(n, groups)
    return Packed(codes=pack(codes.reshape(n, cols), kind.bits), scales=to_half(scales, dtype), offsets=to_half(offsets, dtype))


def dequantize(packed: Packed, name: str, cols: int, dtype: str) -> F32:
    """Rows [n, cols] again, in float32."""
    kind = FORMATS[name]
    if packed.scales is None or packed.offsets is None:
        floats: F32 = packed.codes.view(DTYPES[dtype]).astype(np.float32)
        return floats
    n, groups = packed.scales.shape
    codes = unpack(packed.codes, kind.bits, cols).reshape(n, groups, kind.group).astype(np.float32)
    scales, offsets = (part.astype(np.float32)[:, :, None] for part in (packed.scales, packed.offsets))
    values: F32 = codes * scales + offsets
    return values.reshape(n, cols)


def round_rows(rows: F32, name: str, importance: F32 | None = None, *, dtype: str) -> F32:
    """Rows [n, cols] rounded as a format stores them."""
    return dequantize(quantize(rows, name, importance, dtype), name, rows.shape[1], dtype)


def quantize_parallel(rows: F32, name: str, importance: F32 | None, dtype: str, pool: ThreadPoolExecutor) -> NDArray[np.uint8]:
    """Rows of bytes in a format, made by several threads; the bytes are those of a single call."""
    parts = pool.map(lambda i: quantize(rows[i : i + 256], name, importance, dtype).side_by_side(), range(0, len(rows), 256))
    return np.concatenate(list(parts))


Grid = tuple[F32, F32]  # scales and offsets [B]


def _search(x: F32, weights: F32, bits: int, dtype: str) -> tuple[NDArray[np.uint8], F32, F32]:
    """Codes, scale and offset of each group [B, group]: the best of some shrunk ranges, each refitted by weighted least squares."""
    low, high = x.min(axis=1), x.max(axis=1)
    top = np.float32(2**bits - 1)
    least = np.full(len(x), np.inf, np.float32)
    scale, offset = np.zeros_like(low), low.copy()
    for share in _SHRINK[bits]:
        cut = (high - low) * np.float32((1 - share) / 2)
        grid = storable((high - low - 2 * cut) / top, low + cut, dtype)
        for turn in range(_REFITS + 1):
            q = _codes(x, grid, top)
            error = np.einsum("ij,ij->i", weights, (q * grid[0][:, None] + grid[1][:, None] - x) ** 2)
            better = error < least
            least[better], scale[better], offset[better] = error[better], grid[0][better], grid[1][better]
            if turn < _REFITS:
                grid = _fit(x, weights, q, grid, dtype)
    return _codes(x, (scale, offset), top).astype(np.uint8), scale, offset


def _codes(x: F32, grid: Grid, top: np.float32) -> F32:
    """Nearest codes of groups [B, group]."""
    scale = np.where(grid[0] == 0, np.float32(1), grid[0])
    q: F32 = np.rint((x - grid[1][:, None]) / scale[:, None])
    clipped: F32 = np.clip(q, 0, top)
    return clipped


def _fit(x: F32, weights: F32, q: F32, grid: Grid, dtype: str) -> Grid:
    """Scale and offset of least weighted squared error for these codes; the old ones where all codes are equal."""
    total = weights.sum(axis=1)
    mean_q, mean_x = (np.einsum("ij,ij->i", weights, part) / total for part in (q, x))
    away = q - mean_q[:, None]
    spread = np.einsum("ij,ij,ij->i", weights, away, away)
    slope = np.einsum("ij,ij,ij->i", weights, away, x) / np.maximum(spread, np.float32(1e-30))
    scale = np.where(spread > 0, slope, grid[0]).astype(np.float32)
    offset = np.where(spread > 0, mean_x - slope * mean_q, grid[1]).astype(np.float32)
    return storable(scale, offset, dtype)


def storable(scale: NDArray[np.floating], offset: NDArray[np.floating], dtype: str) -> Grid:
    """Scales and offsets as the folder holds them, in float32."""
    largest = LARGEST[dtype]
    rounded = [np.clip(part, -largest, largest).astype(DTYPES[dtype]).astype(np.float32) for part in (scale, offset)]
    return rounded[0], rounded[1]
