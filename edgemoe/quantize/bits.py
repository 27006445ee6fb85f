"""This module packs codes of a few bits into bytes: one little-endian bit stream a row, the least significant bit of each code first.

ONNX Runtime and MLX store codes so.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

LANES = 8  # codes that fill whole bytes at every width: as many bytes as a code has bits


def pack(codes: NDArray[np.uint8], bits: int) -> NDArray[np.uint8]:
    """Codes [n, cols] of 1 to 8 bits as bytes [n, cols * bits / 8 rounded up]."""
    if bits == 8:
        return codes
    n, cols = codes.shape
    if cols % LANES:
        codes = np.concatenate([codes, np.zeros((n, -cols % LANES), np.uint8)], axis=1)
    lanes = codes.reshape(n, -1, LANES).astype(np.uint64)
    word = np.zeros(lanes.shape[:2], "<u8")
    for lane in range(LANES):
        word |= lanes[..., lane] << np.uint64(bits * lane)
    filled = word.view(np.uint8).reshape(n, -1, 8)[..., :bits]
    return np.ascontiguousarray(filled).reshape(n, -1)[:, : packed_size(cols, bits)]


def unpack(packed: NDArray[np.uint8], bits: int, cols: int) -> NDArray[np.uint8]:
    """The codes [n, cols] again."""
    if bits == 8:
        return packed
    n = len(packed)
    groups = -(-cols // LANES)
    filled = np.zeros((n, groups * bits), np.uint8)
    filled[:, : packed.shape[1]] = packed
    word = np.zeros((n, groups, 8), np.uint8)
    word[..., :bits] = filled.reshape(n, groups, bits)
    whole = word.reshape(n, -1).view("<u8")
    codes = np.stack([(whole >> np.uint64(bits * lane)) & np.uint64(2**bits - 1) for lane in range(LANES)], axis=-1)
    return codes.reshape(n, -1)[:, :cols].astype(np.uint8)


def packed_size(cols: int, bits: int) -> int:
    """Bytes of a packed row."""
    return -(-cols * bits // 8)
