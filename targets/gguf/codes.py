"""This module reads and writes the codes in ggml's blocks in place, from the place of each code bit of a weight or group of weights.

The rest of a block (scales, minimums, shifts) stays as the stock quantizer chose it.  ggml's own dequantizer says which value a code stands
for, so llama.cpp decodes every code to the chosen value.  The layouts come from ggml-common.h of llama.cpp 0c1e570.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from edgemoe.targets.gguf.formats import FORMATS


@dataclass(frozen=True, slots=True)
class CodeBits:
    """The code bits of a format; `bits` [groups, code bits] has the place of each in the block, counted from the low bit of byte 0."""

    dim: int  # columns of a group
    bits: NDArray[np.int64]
    halves: tuple[int, ...] = ()  # byte offsets of d (and dmin, m)
    flip: int = 0  # bits to turn over so that larger codes stand for larger values (two's complement)


def _nibbles(start: int, run: int, n: int) -> NDArray[np.int64]:
    """4-bit codes: in each run of 2 * `run` weights the first half has the low nibbles, the second the high ones."""
    i = np.arange(n)
    byte = start + i // (2 * run) * run + i % run
    return (8 * byte + 4 * (i // run % 2))[:, None] + np.arange(4)


def _pairs(start: int) -> NDArray[np.int64]:
    """2-bit codes of Q2_K and Q3_K: four weights a byte, 32 apart."""
    i = np.arange(256)
    return (8 * (start + i // 128 * 32 + i % 32) + 2 * (i // 32 % 4))[:, None] + np.arange(2)


def _bit(byte: NDArray[np.int64], shift: NDArray[np.int64]) -> NDArray[np.int64]:
    return (8 * byte + shift)[:, None]


@functools.cache
def code_bits(name: str) -> CodeBits:
    """Where a format keeps its codes.

    Raises:
        KeyError: the format is not described here.
    """
    i, g = np.arange(256), np.arange(32)
    eight = np.arange(8)
    layouts = {
        "Q2_K": lambda: CodeBits(1, _pairs(16), (80, 82)),
        "Q3_K": lambda: CodeBits(1, np.hstack([_pairs(32), _bit(i % 32, i // 32)]), (108,)),
        "Q4_K": lambda: CodeBits(1, _nibbles(16, 32, 256), (0, 2)),
        "Q5_K": lambda: CodeBits(1, np.hstack([_nibbles(48, 32, 256), _bit(16 + i % 32, i // 32)]), (0, 2)),
        "Q6_K": lambda: CodeBits(1, np.hstack([_q6_low(), _q6_high()]), (208,)),
        "IQ4_XS": lambda: CodeBits(1, _nibbles(8, 16, 256), (0,)),
        "IQ4_NL": lambda: CodeBits(1, _nibbles(2, 16, 32), (0,)),
        "Q4_0": lambda: CodeBits(1, _nibbles(2, 16, 32), (0,)),
        "Q4_1": lambda: CodeBits(1, _nibbles(4, 16, 32), (0, 2)),
        "Q5_0": lambda: CodeBits(1, np.hstack([_nibbles(6, 16, 32), (16 + g)[:, None]]), (0,)),
        "Q5_1": lambda: CodeBits(1, np.hstack([_nibbles(8, 16, 32), (32 + g)[:, None]]), (0, 2)),
        "Q8_0": lambda: CodeBits(1, 8 * (2 + g)[:, None] + eight, (0,), flip=128),
        "MXFP4": lambda: CodeBits(1, _nibbles(1, 16, 32)),
        "IQ2_XXS": lambda: CodeBits(8, np.hstack([8 * (2 + g // 4 * 8 + g % 4)[:, None] + eight, _sign_bits(6, 8)]), (0,)),
        "IQ2_XS": lambda: CodeBits(8, 8 * (2 + 2 * g)[:, None] + np.arange(16), (0,)),
        "IQ2_S": lambda: CodeBits(8, np.hstack([_bytes(2), (8 * (66 + g // 4) + 2 * (g % 4))[:, None] + np.arange(2), _bytes(34)]), (0,)),
        "IQ3_XXS": lambda: CodeBits(8, np.hstack([8 * (2 + 2 * g)[:, None] + np.arange(16), _sign_bits(66, 4)]), (0,)),
        "IQ3_S": lambda: CodeBits(8, np.hstack([_iq3s_index(0), _iq3s_index(1), _bytes(74)]), (0,)),
        "IQ1_S": lambda: CodeBits(8, np.hstack([_bytes(2), (8 * (34 + g // 4 * 2) + 3 * (g % 4))[:, None] + np.arange(3)]), (0,)),
        "IQ1_M": lambda: CodeBits(8, np.hstack([_bytes(0), (8 * (32 + g // 2) + 4 * (g % 2))[:, None] + np.arange(4)])),
    }
    return layouts[name]()


def _q6_low() -> NDArray[np.int64]:
    i = np.arange(256)
    return (8 * (i // 128 * 64 + i % 64) + 4 * (i // 64 % 2))[:, None] + np.arange(4)


def _q6_high() -> NDArray[np.int64]:
    i = np.arange(256)
    return (8 * (128 + i // 128 * 32 + i % 32) + 2 * (i // 32 % 4))[:, None] + np.arange(2)


def _bytes(start: int) -> NDArray[np.int64]:
    """A byte for each of 32 groups."""
    return 8 * (start + np.arange(32))[:, None] + np.arange(8)


def _sign_bits(start: int, stride: int) -> NDArray[np.int64]:
    """Seven sign bits for each eight weights, four times in a 32-bit word that follows every `stride` bytes."""
    g = np.arange(32)
    return (8 * (start + g // 4 * stride) + 7 * (g % 4))[:, None] + np.arange(7)


def _iq3s_index(half: int) -> NDArray[np.int64]:
    """Nine bits: a byte of qs, and one bit of qh."""
    g = np.arange(32)
    return np.hstack([8 * (2 + 2 * g + half)[:, None] + np.arange(8), (8 * (66 + g // 4) + 2 * (g % 4) + half)[:, None]])


def _as_bits(packed: NDArray[np.uint8], name: str) -> NDArray[np.uint8]:
    return np.unpackbits(packed.reshape(-1, FORMATS[name].block_bytes), axis=1, bitorder="little")


def read_codes(packed: NDArray[np.uint8], name: str) -> NDArray[np.int32]:
    """Codes [R, groups] of packed rows [R, bytes]."""
    where = code_bits(name).bits
    bits = _as_bits(packed, name)[:, where].astype(np.int32)
    codes: NDArray[np.int32] = (bits << np.arange(where.shape[1], dtype=np.int32)).sum(axis=2, dtype=np.int32)
    return codes.reshape(len(packed), -1) ^ code_bits(name).flip


def write_codes(packed: NDArray[np.uint8], name: str, codes: NDArray[np.int32]) -> NDArray[np.uint8]:
    """The same rows with other codes."""
    where = code_bits(name).bits
    bits = _as_bits(packed, name)
    values = (codes ^ code_bits(name).flip).reshape(len(bits), len(where), 1) >> np.arange(where.shape[1], dtype=np.int32)
    bits[:, where] = values & 1
    return np.packbits(bits, axis=1, bitorder="little").reshape(packed.shape)
