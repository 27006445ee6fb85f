"""Rounding with feedback onto ggml's grids: bit-exact codes of every format, and never worse than the stock quantizer."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from correlated import COLS, correlated, weights
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from edgemoe.base.errors import ModelError
from edgemoe.quantize.gptq import Hessian, factor_hessian, objective
from edgemoe.quantize.grids import Codebook, Scalar
from edgemoe.targets.gguf.codes import code_bits, read_codes, write_codes
from edgemoe.targets.gguf.formats import FORMATS, dequantize, quantize
from edgemoe.targets.gguf.rounding import FED_BACK, grid_of, quantize_fed_back


def total(rows: NDArray[np.float32], packed: NDArray[np.uint8], name: str, hessian: Hessian) -> float:
    return float(objective(rows, dequantize(packed, name, rows.shape[1]), hessian).sum())


@pytest.mark.parametrize("name", FED_BACK)
@settings(max_examples=2, deadline=None)
@given(seed=st.integers(0, 2**31), scale=st.sampled_from([1e-4, 1.0, 300.0]))
def test_codes_are_where_ggml_reads_them(name: str, seed: int, scale: float) -> None:
    """Any codes, written into stock blocks, decode in ggml to what the grid says they stand for, and nothing else changes."""
    rows = weights(seed % 1000, 3) * np.float32(scale)
    rows[1] = 0
    packed = quantize(rows, name, np.ones(COLS, np.float32))
    np.testing.assert_array_equal(write_codes(packed, name, read_codes(packed, name)), packed)
    layout, rng = code_bits(name), np.random.default_rng(seed)
    codes = rng.integers(0, 2 ** layout.bits.shape[1], (3, COLS // layout.dim)).astype(np.int32)
    written = write_codes(packed, name, codes)
    np.testing.assert_array_equal(read_codes(written, name), codes)
    decoded, grid = dequantize(written, name, COLS), grid_of(packed, name)
    expected = grid.offset + grid.scale * grid.table[codes] if isinstance(grid, Scalar) else _book_values(grid, codes).reshape(3, -1)
    np.testing.assert_allclose(decoded, expected, rtol=2e-5, atol=1e-5 * np.abs(decoded).max() + 1e-30)


def _book_values(grid: Codebook, codes: NDArray[np.int32]) -> NDArray[np.float32]:
    bits, parts = int(len(grid.table) - 1).bit_length(), 8 // grid.table.shape[1]
    index = (codes[..., None] >> bits * np.arange(parts)) & (len(grid.table) - 1)
    signs = grid.signs[codes >> bits * parts]
    return grid.offset[:, :, None] + grid.scale[:, :, None] * signs * grid.table[index].reshape(*codes.shape, 8)


@pytest.mark.parametrize("name", FED_BACK)
def test_feedback_beats_the_stock_quantizer_on_its_own_objective(name: str) -> None:
    for seed, cols in ((0, COLS), (1, 512)):
        rows, hessian = weights(seed, cols=cols), factor_hessian(correlated(seed, cols))
        stock, ours = quantize(rows, name, hessian.importance), quantize_fed_back(rows, name, hessian)
        assert ours.shape == stock.shape
        assert total(rows, ours, name, hessian) < 0.5 * total(rows, stock, name, hessian)


@pytest.mark.parametrize("name", ["Q2_K", "Q6_K", "Q8_0", "IQ4_XS", "IQ1_M", "IQ2_XXS", "IQ3_S"])
def test_odd_rows_stay_finite(name: str) -> None:
    rows = weights(5, 4)
    rows[0], rows[1, 32:64], rows[2] = 0, 0, 1e-30
    rows[3, 7] = 1e4
    found = dequantize(quantize_fed_back(rows, name, factor_hessian(correlated(5))), name, COLS)
    assert np.isfinite(found).all()
    assert not found[0].any()


def test_infinite_weights_are_refused() -> None:
    rows = weights(6, 2)
    rows[1, 3] = np.inf
    with pytest.raises(ModelError, match="infinite"):
        quantize_fed_back(rows, "Q4_K", factor_hessian(correlated(6)))


def test_columns_that_saw_nothing_do_no_harm() -> None:
    h = correlated(7)
    h[:, 40:80] = h[40:80] = 0
    rows, hessian = weights(7), factor_hessian(h)
    found = quantize_fed_back(rows, "Q3_K", hessian)
    assert np.isfinite(dequantize(found, "Q3_K", COLS)).all()
    assert total(rows, found, "Q3_K", hessian) <= total(rows, quantize(rows, "Q3_K", hessian.importance), "Q3_K", hessian)


@pytest.mark.parametrize("name", ["Q4_K", "IQ2_XS"])
def test_rows_are_rounded_alike_alone_together_and_in_threads(name: str) -> None:
    """Rows are priced by samples and written in blocks, so they must not depend on their company."""
    rows, hessian = weights(8, 64), factor_hessian(correlated(8))
    whole = quantize_fed_back(rows, name, hessian)
    with ThreadPoolExecutor(2) as pool:
        parts = list(pool.map(lambda i: quantize_fed_back(rows[i : i + 16], name, hessian), range(0, 64, 16)))
    same = (np.concatenate(parts) == whole).all(axis=1)
    assert same.mean() > 0.9  # sums of another length round otherwise in the last bit, which tips a close call now and then
    again = quantize_fed_back(rows, name, hessian)
    np.testing.assert_array_equal(again, whole)


def test_every_format_that_feedback_knows_is_a_ggml_type() -> None:
    for name in FED_BACK:
        layout = code_bits(name)
        assert len(layout.bits) * layout.dim == FORMATS[name].block
        assert len(np.unique(layout.bits)) == layout.bits.size
        assert layout.bits.max() < 8 * FORMATS[name].block_bytes
