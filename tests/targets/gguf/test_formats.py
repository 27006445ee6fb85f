"""ggml's formats: the table is ggml's own, and our bytes mean the same to others."""

from __future__ import annotations

import ctypes
from concurrent.futures import ThreadPoolExecutor

import gguf
import numpy as np
import pytest

from edgemoe.base.errors import ModelError
from edgemoe.targets.gguf.formats import FORMATS, OFFERED, _ggml, dequantize, quantize, quantize_parallel, row_bytes


@pytest.mark.parametrize("name", OFFERED)
def test_our_bytes_mean_the_same_to_gguf_py(name: str) -> None:
    rows = np.random.default_rng(1).standard_normal((8, 512)).astype(np.float32)
    packed = quantize(rows, name, np.linspace(0.5, 2, 512, dtype=np.float32))
    theirs = gguf.quants.dequantize(packed.view(np.float16) if name == "F16" else packed, gguf.GGMLQuantizationType(FORMATS[name].id))
    np.testing.assert_allclose(dequantize(packed, name, 512), theirs, rtol=1e-5, atol=1e-6)
    assert np.abs(theirs - rows).mean() < 0.7  # a column's mean size is 0.8: the rows are in there


def test_the_format_table_is_ggmls() -> None:
    library = _ggml()
    library.ggml_type_size.argtypes, library.ggml_type_size.restype = [ctypes.c_int], ctypes.c_size_t
    library.ggml_blck_size.argtypes, library.ggml_blck_size.restype = [ctypes.c_int], ctypes.c_int64
    library.ggml_row_size.argtypes, library.ggml_row_size.restype = [ctypes.c_int, ctypes.c_int64], ctypes.c_size_t
    library.ggml_quantize_requires_imatrix.argtypes, library.ggml_quantize_requires_imatrix.restype = [ctypes.c_int], ctypes.c_bool
    for name, kind in FORMATS.items():
        theirs = library.ggml_blck_size(kind.id), library.ggml_type_size(kind.id), library.ggml_quantize_requires_imatrix(kind.id)
        assert (kind.block, kind.block_bytes, kind.needs_importance) == theirs, name
        assert all(row_bytes(name, cols) == library.ggml_row_size(kind.id, cols) for cols in (256, 768, 4096))
        assert library.ggml_type_name(kind.id).decode().upper() == name


@pytest.mark.parametrize("name", ["F32", "F16", "Q8_0", "Q4_K", "IQ2_XS", "IQ1_S"])
def test_rows_shared_out_over_threads_give_the_bytes_of_one_call(name: str) -> None:
    draw = np.random.default_rng(2)
    parts = [(draw.standard_normal((n, 256)).astype(np.float32), draw.exponential(size=256).astype(np.float32)) for n in (70, 33)]
    with ThreadPoolExecutor(4) as pool:
        shared = quantize_parallel(parts, name, pool, rows_each=16)
    np.testing.assert_array_equal(shared, np.concatenate([quantize(rows, name, importance) for rows, importance in parts]))


def test_rows_that_a_block_does_not_divide_are_refused() -> None:
    with pytest.raises(ModelError, match="Q4_K stores rows of multiples of 256, not of 320"):
        quantize(np.zeros((2, 320), np.float32), "Q4_K")
