"""This module describes ggml types as data, and calls the real ggml quantizers in the shared library of llama-cpp-python.

Sizes are exact and need no library, so planning works without llama.cpp; only rounding loads the library.
"""

from __future__ import annotations

import ctypes
import functools
import importlib.util
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from edgemoe.base.errors import MachineError, ModelError

INSTALL = "pip install 'edgemoe[llama]'  (needs a C++ compiler and cmake)"
ALIGNMENT = 32  # bytes: GGUF pads every tensor to this


@dataclass(frozen=True, slots=True)
class Format:
    """A ggml type: its number, the weights and bytes of a block, and whether its quantizer needs importance."""

    id: int
    block: int
    block_bytes: int
    needs_importance: bool = False

    @property
    def bpw(self) -> float:
        """Bits per weight."""
        return 8 * self.block_bytes / self.block


# From ggml.h / ggml-common.h of llama.cpp 0c1e570.  For rows that 256 divides, a type is left out if another has fewer bits and less error.
FORMATS = {
    "F32": Format(0, 1, 4),
    "F16": Format(1, 1, 2),
    "BF16": Format(30, 1, 2),
    "Q8_0": Format(8, 32, 34),
    "Q6_K": Format(14, 256, 210),
    "Q5_K": Format(13, 256, 176),
    "Q4_K": Format(12, 256, 144),
    "IQ4_XS": Format(23, 256, 136),
    "Q3_K": Format(11, 256, 110),
    "IQ3_S": Format(21, 256, 110),
    "IQ3_XXS": Format(18, 256, 98),
    "Q2_K": Format(10, 256, 84),
    "IQ2_S": Format(22, 256, 82),
    "IQ2_XS": Format(17, 256, 74, needs_importance=True),
    "IQ2_XXS": Format(16, 256, 66, needs_importance=True),
    "IQ1_M": Format(29, 256, 56),
    "IQ1_S": Format(19, 256, 50, needs_importance=True),
    "Q5_1": Format(7, 32, 24),
    "Q5_0": Format(6, 32, 22),
    "Q4_1": Format(3, 32, 20),
    "IQ4_NL": Format(20, 32, 18),
    "Q4_0": Format(2, 32, 18),
    "MXFP4": Format(39, 32, 17),
}
WIDE = ("F16", "Q8_0", "Q6_K", "Q5_K", "Q4_K", "IQ4_XS", "Q3_K", "IQ3_S", "IQ3_XXS", "Q2_K", "IQ2_S", "IQ2_XS", "IQ2_XXS", "IQ1_M", "IQ1_S")
NARROW = ("F16", "Q8_0", "Q5_1", "Q5_0", "Q4_1", "IQ4_NL", "MXFP4")  # for rows that 256 does not divide
OFFERED = (*WIDE, *(name for name in NARROW if name not in WIDE))
COPIED = tuple(name for name in FORMATS if name not in OFFERED)  # types that a tensor of a GGUF may keep, and gets from nobody


def formats_of_rows(cols: int) -> tuple[str, ...]:
    """Formats that can store rows of this length."""
    return WIDE if cols % 256 == 0 else tuple(name for name in NARROW if cols % FORMATS[name].block == 0)


def row_bytes(name: str, cols: int) -> int:
    """Bytes of one row.

    Raises:
        ModelError: the block does not divide the row (ggml itself would write garbage).
    """
    kind = FORMATS[name]
    if cols % kind.block:
        raise ModelError(f"{name} stores rows of multiples of {kind.block}, not of {cols}")
    return cols // kind.block * kind.block_bytes


def pad(size: int) -> int:
    """Bytes of a tensor in the file, with its padding."""
    return -(-size // ALIGNMENT) * ALIGNMENT


def library_folder() -> Path:
    """The folder of llama-cpp-python's shared libraries.

    Raises:
        MachineError: not installed.
    """
    spec = importlib.util.find_spec("llama_cpp")
    if spec is None or not spec.submodule_search_locations:
        raise MachineError("llama-cpp-python is not installed", hint=INSTALL)
    return Path(spec.submodule_search_locations[0]) / "lib"


@functools.cache
def _ggml() -> ctypes.CDLL:
    """libggml-base, the same copy that libllama uses."""
    folder = library_folder()
    names = ("libggml-base.so", "libggml-base.dylib", "ggml-base.dll")
    path = next((folder / n for n in names if (folder / n).exists()), None)
    if path is None:
        raise MachineError(f"{folder}: libggml-base is not there", hint="reinstall llama-cpp-python from source")
    library = ctypes.CDLL(str(path))
    pointer, size = ctypes.c_void_p, ctypes.c_int64
    library.ggml_quantize_chunk.argtypes = [ctypes.c_int, pointer, pointer, size, size, size, pointer]
    library.ggml_quantize_chunk.restype = ctypes.c_size_t
    library.ggml_quantize_init.argtypes = [ctypes.c_int]
    library.ggml_type_name.argtypes = [ctypes.c_int]
    library.ggml_type_name.restype = ctypes.c_char_p
    return library


def quantize(rows: NDArray[np.float32], name: str, importance: NDArray[np.float32] | None = None) -> NDArray[np.uint8]:
    """Rows [n, cols] in a format, as bytes [n, row_bytes]; `importance` [cols] weighs columns (uniform if a type needs one)."""
    rows = np.ascontiguousarray(rows, np.float32)
    n, cols = rows.shape
    out = np.empty((n, row_bytes(name, cols)), np.uint8)
    if name == "F32":
        return rows.view(np.uint8)
    if importance is None and FORMATS[name].needs_importance:
        importance = np.ones(cols, np.float32)
    if importance is not None:
        importance = floor_importance(importance)
    pointer = None if importance is None else importance.ctypes.data
    written = _ggml().ggml_quantize_chunk(FORMATS[name].id, rows.ctypes.data, out.ctypes.data, 0, n, cols, pointer)
    if written != out.nbytes:
        raise ModelError(f"ggml wrote {written} bytes of {name}, expected {out.nbytes}")
    return out


def floor_importance(importance: NDArray[np.floating]) -> NDArray[np.float32]:
    """Importance without zeros, for which ggml writes zeros: at least a thousandth of the mean, or ones if all is zero."""
    values = np.asarray(importance, np.float32)
    mean = float(values.mean())
    if not mean > 0 or not np.isfinite(mean):
        return np.ones_like(values)
    return np.ascontiguousarray(np.maximum(values / mean, 1e-3))


def dequantize(packed: NDArray[np.uint8], name: str, cols: int) -> NDArray[np.float32]:
    """Bytes [n, row_bytes] back to rows [n, cols]."""
    if name == "F32":
        return packed.view(np.float32).reshape(-1, cols)
    if name == "F16":
        return packed.view(np.float16).reshape(-1, cols).astype(np.float32)
    if name == "BF16":
        return (packed.view(np.uint16).reshape(-1, cols).astype(np.uint32) << 16).view(np.float32)
    library = _ggml()
    function = getattr(library, "dequantize_row_" + library.ggml_type_name(FORMATS[name].id).decode())
    function.argtypes, function.restype = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64], None
    out = np.empty((packed.shape[0], cols), np.float32)
    function(np.ascontiguousarray(packed).ctypes.data, out.ctypes.data, out.size)
    return out


def round_rows(rows: NDArray[np.float32], name: str, importance: NDArray[np.float32] | None = None) -> NDArray[np.float32]:
    """Rows [n, cols] rounded as a format stores them."""
    return dequantize(quantize(rows, name, importance), name, rows.shape[1])


def input_block(name: str, role: str) -> int:
    """Inputs that ggml's CPU kernels round to int8 together: the size of the weights' block (Q8_0, Q8_1, Q8_K); 0 for 16 bits and more."""
    block = FORMATS[name].block
    return block if block > 1 else 0


def quantize_parallel(
    parts: Sequence[tuple[NDArray[np.float32], NDArray[np.float32] | None]], name: str, pool: ThreadPoolExecutor, rows_each: int = 256
) -> NDArray[np.uint8]:
    """Quantize matrices (with their importance) one below the other by several threads, with the same bytes as from a single call."""
    jobs = [
        pool.submit(quantize, rows[i : i + rows_each], name, importance)
        for rows, importance in parts
        for i in range(0, len(rows), rows_each)
    ]
    return np.concatenate([job.result() for job in jobs])
