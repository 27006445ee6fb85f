"""MLX's weight formats: what we pack is what mlx decodes, bit for bit, and the search wastes nothing."""

from __future__ import annotations

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from edgemoe.base.errors import ModelError
from edgemoe.base.types import F32
from edgemoe.quantize.bits import pack, unpack
from edgemoe.targets.mlx.formats import (
    DTYPES,
    FORMATS,
    dequantize,
    formats_of_rows,
    quantize,
    quantize_parallel,
    round_rows,
    row_bytes,
    split_rows,
)

AFFINE = [name for name, kind in FORMATS.items() if kind.group]
FLOATS = {"f16": mx.float16, "bf16": mx.bfloat16}


def random_rows(n: int, cols: int, seed: int = 0) -> F32:
    generator = np.random.default_rng(seed)
    return (generator.standard_normal((n, cols)) * np.exp(generator.standard_normal(cols) / 2)).astype(np.float32)


def mlx_values(codes: NDArray[np.uint8], scales: F32, offsets: F32, name: str) -> F32:
    """What mlx decodes, in float32."""
    words = mx.array(codes.view(np.uint32))
    kind = FORMATS[name]
    return np.array(mx.dequantize(words, mx.array(scales), mx.array(offsets), group_size=kind.group, bits=kind.bits))


def test_there_are_the_18_affine_formats() -> None:
    assert {(FORMATS[name].bits, FORMATS[name].group) for name in AFFINE} == {(b, g) for b in (2, 3, 4, 5, 6, 8) for g in (32, 64, 128)}
    assert FORMATS["INT3_64"].bpw == 3.5


@settings(max_examples=40, deadline=None)
@given(
    name=st.sampled_from(AFFINE),
    dtype=st.sampled_from(["f16", "bf16"]),
    rows=st.integers(1, 5),
    groups=st.integers(1, 4),
    seed=st.integers(0, 2**32 - 1),
    size=st.sampled_from([0.0, 1e-6, 1e-3, 1.0, 300.0]),
)
def test_mlx_decodes_what_we_pack(name: str, dtype: str, rows: int, groups: int, seed: int, size: float) -> None:
    cols = groups * FORMATS[name].group
    weights = random_rows(rows, cols, seed) * np.float32(size)
    packed = quantize(weights, name, None, dtype)
    assert packed.side_by_side().shape == (rows, row_bytes(name, cols))
    assert packed.scales is not None
    assert packed.offsets is not None
    assert packed.scales.dtype == DTYPES[dtype]
    theirs = mlx_values(packed.codes, packed.scales.astype(np.float32), packed.offsets.astype(np.float32), name)
    ours = dequantize(packed, name, cols, dtype)
    np.testing.assert_array_equal(ours, theirs)
    again = split_rows(packed.side_by_side(), name, cols, dtype)
    np.testing.assert_array_equal(dequantize(again, name, cols, dtype), ours)


@settings(max_examples=40, deadline=None)
@given(name=st.sampled_from(AFFINE), rows=st.integers(1, 5), groups=st.integers(1, 4), seed=st.integers(0, 2**32 - 1))
def test_our_bytes_are_those_of_mx_quantize_for_its_own_codes(name: str, rows: int, groups: int, seed: int) -> None:
    kind = FORMATS[name]
    cols = groups * kind.group
    words, scales, offsets = mx.quantize(mx.array(random_rows(rows, cols, seed)), group_size=kind.group, bits=kind.bits)
    theirs = np.array(words).view(np.uint8)
    codes = unpack(theirs, kind.bits, cols)
    np.testing.assert_array_equal(pack(codes, kind.bits), theirs)
    by_group = codes.reshape(rows, groups, kind.group) * np.array(scales)[..., None] + np.array(offsets)[..., None]
    values = np.array(mx.dequantize(words, scales, offsets, group_size=kind.group, bits=kind.bits))
    np.testing.assert_allclose(by_group.reshape(rows, cols), values, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("name", AFFINE)
def test_the_search_beats_minimum_and_maximum(name: str, dtype: str) -> None:
    kind, rows = FORMATS[name], random_rows(64, 512)
    stock = mx.quantize(mx.array(rows).astype(FLOATS[dtype]), group_size=kind.group, bits=kind.bits)
    wide = [part.astype(mx.float32) if part.dtype == FLOATS[dtype] else part for part in stock]
    theirs = np.array(mx.dequantize(*wide, group_size=kind.group, bits=kind.bits))
    ours = round_rows(rows, name, dtype=dtype)
    share = ((ours - rows) ** 2).sum() / ((theirs - rows) ** 2).sum()
    assert share < {2: 0.75, 3: 0.82, 4: 0.88, 5: 0.95, 6: 0.98, 8: 1.0}[kind.bits]


@pytest.mark.parametrize("name", AFFINE)
def test_importance_lowers_the_error_that_it_weighs(name: str) -> None:
    rows, importance = random_rows(64, 512, 1), np.random.default_rng(2).exponential(size=512).astype(np.float32) ** 4
    weighed = ((round_rows(rows, name, importance, dtype="f16") - rows) ** 2 @ importance).sum()
    plain = ((round_rows(rows, name, dtype="f16") - rows) ** 2 @ importance).sum()
    assert weighed < plain


def test_plain_floats_rows_of_one_value_and_rows_that_no_group_divides() -> None:
    rows = random_rows(3, 48)
    np.testing.assert_array_equal(round_rows(rows, "F16", dtype="f16"), rows.astype(np.float16).astype(np.float32))
    constant = np.full((2, 64), 0.375, np.float32)
    for name in ("INT2_64", "INT8_32"):
        np.testing.assert_array_equal(round_rows(constant, name, dtype="bf16"), constant)
    with pytest.raises(ModelError, match="multiples of 64, not of 48"):
        quantize(rows, "INT4_64", None, "f16")
    assert formats_of_rows(48, of_vocabulary=False) == ("F16",)
    assert formats_of_rows(96, of_vocabulary=False) == ("F16", *(f"INT{b}_32" for b in (8, 6, 5, 4, 3, 2)))
    assert all(not name.endswith("_32") for name in formats_of_rows(128, of_vocabulary=False))
    assert "INT4_32" in formats_of_rows(128, of_vocabulary=True)


def test_threads_do_not_change_the_bytes() -> None:
    from concurrent.futures import ThreadPoolExecutor

    rows = random_rows(700, 128, 3)
    whole = quantize(rows, "INT3_64", None, "f16").side_by_side()
    for threads in (1, 3):
        with ThreadPoolExecutor(threads) as pool:
            np.testing.assert_array_equal(quantize_parallel(rows, "INT3_64", None, "f16", pool), whole)
