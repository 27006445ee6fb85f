"""Rounding with error feedback: the published golden case, and what feedback may never do."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest
from correlated import COLS, correlated, weights
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from edgemoe.quantize.gptq import Hessian, descend_outputs, factor_hessian, mix_hessians, objective, round_columns, shrink_hessian
from edgemoe.quantize.grids import Codebook, Scalar, sign_patterns
from edgemoe.targets import find_target
from edgemoe.targets.gguf.formats import dequantize
from edgemoe.targets.gguf.rounding import quantize_fed_back


def test_golden_case_of_gptq() -> None:
    """Worked by hand from the paper's formulas: plain rounding errs 1.019 over the five tokens, feedback 0.128."""
    x = np.array([[1, 0.8, 0.1, 0], [0.9, 1, 0, 0.2], [0.2, 0.1, 1, 0.7], [0, 0.3, 0.6, 1], [1, 0.7, 0.2, 0.1]])
    w = np.array([[0.9, -0.35, 0.6, 0.15]], np.float32)
    h = 2 / 5 * x.T @ x
    hessian = factor_hessian(h)
    expected = np.array([5.062179, -5.789697, -3.104988, 3.639489])
    np.testing.assert_allclose(hessian.upper[0] / np.sqrt(h.diagonal().mean()), expected, rtol=1e-4)
    grid = Scalar(np.full((1, 4), 0.5, np.float32), np.full((1, 4), -1, np.float32), np.arange(4, dtype=np.float32))
    codes, values, rest = round_columns(w, grid, hessian, slice(0, 4))
    np.testing.assert_allclose(values, [[0.5, 0, 0.5, 0]])
    np.testing.assert_array_equal(codes, [[3, 2, 3, 2]])
    assert rest.shape == (1, 0)
    nearest = np.array([[0.5, -0.5, 0.5, 0]], np.float32)
    for stored, summed, exact, diagonal in ((nearest, 1.019125, 0.407650, 0.554925), (values, 0.128125, 0.051250, 0.777925)):
        delta = (w - stored).astype(np.float64)
        np.testing.assert_allclose(((delta @ x.T) ** 2).sum(), summed, rtol=1e-5)
        np.testing.assert_allclose(delta @ h @ delta.T, exact, rtol=1e-5)
        np.testing.assert_allclose(delta**2 @ (x**2).sum(axis=0), diagonal, rtol=1e-5)  # which would prefer plain rounding
    np.testing.assert_allclose(objective(w, values, hessian) * h.diagonal().mean() / 2, 0.026890, rtol=1e-4)  # half the sum of e_j^2


def test_uncorrelated_inputs_leave_nothing_to_feed_back() -> None:
    w = weights(0)
    hessian = factor_hessian(np.diag(np.random.default_rng(0).uniform(0.1, 2, COLS)))
    grid = Scalar(np.full(w.shape, 0.3, np.float32), np.full(w.shape, -1.2, np.float32), np.arange(9, dtype=np.float32))
    _, values, _ = round_columns(w, grid, hessian, slice(0, COLS))
    np.testing.assert_allclose(values, np.clip(np.rint((w + 1.2) / 0.3), 0, 8) * 0.3 - 1.2, atol=1e-5)


def best_codes(book: Codebook, w: NDArray[np.float32], metric: NDArray[np.float32]) -> tuple[NDArray[np.int32], NDArray[np.float32]]:
    """Codes and values of one group of eight columns in a metric: feedback's is M M' with M the inverse of the factor's corner."""
    codes, values, _ = book.round(slice(0, 8), w, np.linalg.inv(np.linalg.cholesky(metric)))
    return codes[:, 0], values


def test_table_search_is_exhaustive() -> None:
    rng = np.random.default_rng(1)
    table, w = rng.normal(size=(50, 8)).astype(np.float32), rng.normal(size=(20, 8)).astype(np.float32)
    scale, offset = rng.uniform(0.5, 2, (20, 1)).astype(np.float32), rng.normal(size=(20, 1)).astype(np.float32)
    metric = correlated(1, 8).astype(np.float32)
    codes, values = best_codes(Codebook(scale, offset, table, sign_patterns(1)), w, metric)
    delta = w[:, None] - (offset[:, :, None] + scale[:, :, None] * table)
    np.testing.assert_array_equal(codes, np.einsum("rki,ij,rkj->rk", delta, metric, delta).argmin(axis=1))
    np.testing.assert_allclose(values, offset + scale * table[codes], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("parts", [1, 2])
@pytest.mark.parametrize("patterns", [128, 256])
def test_signed_search_comes_close_to_the_best_code(parts: int, patterns: int) -> None:
    rng = np.random.default_rng(2)
    magnitudes = rng.choice([0.2, 0.6, 1.0], (16, 8 // parts)).astype(np.float32)
    w, metric = rng.normal(size=(40, 8)).astype(np.float32), correlated(2, 8, noise=3).astype(np.float32)
    scale = np.ones((40, 1), np.float32)
    _, values = best_codes(Codebook(scale, 0 * scale, magnitudes, sign_patterns(patterns)), w, metric)
    index = np.stack(np.meshgrid(*[np.arange(16)] * parts), axis=-1).reshape(-1, parts)
    every = (magnitudes[index].reshape(-1, 1, 8) * sign_patterns(patterns)).reshape(-1, 8)
    delta = w[:, None] - every
    best = np.einsum("rki,ij,rkj->rk", delta, metric, delta).min(axis=1)
    found = (((w - values) @ metric) * (w - values)).sum(axis=1)
    assert (found >= best * (1 - 1e-4)).all()  # it is a code that exists
    assert found.sum() < 1.35 * best.sum()


def test_few_tokens_lean_on_the_layer() -> None:
    own, layer = correlated(3, 16), correlated(4, 16)
    np.testing.assert_array_equal(mix_hessians(own, 0, layer), layer)
    near, far = mix_hessians(own, 10, layer), mix_hessians(own, 10_000, layer)
    assert np.abs(far - own).max() < np.abs(near - own).max()
    np.testing.assert_allclose(np.trace(near), np.trace(own))


def test_products_of_few_tokens_are_hardly_believed_and_squares_are() -> None:
    own = correlated(3, 16)
    np.testing.assert_array_equal(shrink_hessian(own, 0), np.diag(own.diagonal()))
    sizes = [np.abs(np.triu(shrink_hessian(own, n), 1)).sum() for n in (1, 16, 256, 10**9)]
    assert sizes == sorted(sizes)
    np.testing.assert_allclose(shrink_hessian(own, 10**12), own, rtol=1e-4)
    for n in (0, 5, 10**6):
        np.testing.assert_array_equal(shrink_hessian(own, n).diagonal(), own.diagonal())


@pytest.mark.parametrize("tokens", [64, 1024])
def test_shrunk_moments_of_few_hidden_activations_cost_fresh_tokens_less_than_the_gram_itself(tokens: int) -> None:
    rng = np.random.default_rng(tokens)
    gate, up = rng.normal(size=(2, 64, COLS)) / 8

    def gram(n: int) -> NDArray[np.float64]:
        x = rng.standard_t(5, size=(n, 64))
        hidden = x @ gate / (1 + np.exp(-x @ gate)) * (x @ up)
        return hidden.T @ hidden / n

    seen, fresh, rows = gram(tokens), gram(20_000), weights(9)

    def loss(h: NDArray[np.float64]) -> float:
        delta = dequantize(quantize_fed_back(rows, "Q4_0", factor_hessian(h)), "Q4_0", COLS) - rows
        return float(((delta @ fresh) * delta).sum())

    assert loss(mix_hessians(seen, tokens)) < loss(seen)


def together(rows: NDArray[np.float32], values: NDArray[np.float32], hessian: Hessian, outputs: NDArray[np.floating]) -> float:
    """tr G D H D'."""
    delta = rows - values
    return float(((outputs @ delta) * (delta @ hessian.h)).sum())


@pytest.mark.parametrize(
    ("target", "name"),
    [("gguf", "Q2_K"), ("gguf", "Q4_K"), ("gguf", "IQ2_XS"), ("gguf", "IQ4_XS"), ("onnx", "INT4_32"), ("onnx", "INT2_64")],
)
def test_rows_whose_errors_matter_together_are_chosen_together(target: str, name: str) -> None:
    """Outputs that a few directions drive: KL has tr G D H D', and rounding rows by themselves brings only its diagonal down."""
    find, rows, hessian = find_target(target), weights(9, 64), factor_hessian(correlated(9))
    outputs = factor_hessian(correlated(10, 64)).h
    packed = find.pack_rows(rows, name, None, hessian)
    values = find.unpack_rows(packed, name, COLS)
    alone = together(rows, values, hessian, outputs)
    descend_outputs(rows, packed, values, hessian, outputs, lambda *group: find.descend_rows(group[0], name, group[1], hessian, group[2]))
    np.testing.assert_allclose(values, find.unpack_rows(packed, name, COLS), atol=1e-5)
    assert together(rows, values, hessian, outputs) < 0.85 * alone


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 10**6), st.sampled_from([1, 3, 16, 40]), st.floats(0, 30))
def test_taking_turns_never_makes_errors_worse(seed: int, n: int, shared: float) -> None:
    """However alike the outputs are: a group that overshoots is split, down to single rows."""
    rows, hessian, gguf = weights(seed, n), factor_hessian(correlated(seed)), find_target("gguf")
    common = np.random.default_rng(seed).normal(size=n)
    outputs = factor_hessian(np.eye(n) + shared * np.outer(common, common)).h
    packed = gguf.pack_rows(rows, "Q3_K", None, hessian)
    values = gguf.unpack_rows(packed, "Q3_K", COLS)
    before = together(rows, values, hessian, outputs)
    descend_outputs(rows, packed, values, hessian, outputs, lambda *group: gguf.descend_rows(group[0], "Q3_K", group[1], hessian, group[2]))
    assert together(rows, values, hessian, outputs) <= before * (1 + 1e-5)
    np.testing.assert_allclose(values, gguf.unpack_rows(packed, "Q3_K", COLS), atol=1e-5)


def test_without_a_place_to_keep_compiled_code_rounding_still_works() -> None:
    script = """
import numba.core.caching
numba.core.caching.CacheImpl._locator_classes = []  # as where neither the package nor a home can be written
import numpy as np
from edgemoe.quantize.kernels import descend_columns
ones = np.ones((1, 2), np.float32)
codes = np.zeros((1, 2), np.int32)
descend_columns(0 * ones, 3 * ones, ones, 0 * ones, np.arange(4, dtype=np.float32), np.eye(2, dtype=np.float32), codes)
print(codes)
"""
    assert subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout == "[[3 3]]\n"
