"""Feedback on MLX's formats: scales and offsets are refitted, and nothing gets worse."""

from __future__ import annotations

import numpy as np
import pytest
from correlated import correlated, weights

from edgemoe.base.errors import ModelError
from edgemoe.quantize.gptq import factor_hessian, objective
from edgemoe.targets.mlx.formats import FORMATS, round_rows
from edgemoe.targets.mlx.rounding import descend_rows, feeds_back, pack_rows, unpack_rows

AFFINE = [name for name, kind in FORMATS.items() if kind.group]


@pytest.mark.parametrize("name", AFFINE)
def test_feedback_beats_the_stock_search_on_its_own_objective(name: str) -> None:
    assert feeds_back(name)
    for seed, cols in ((0, 256), (1, 384)):  # a last chunk that is shorter
        rows, hessian = weights(seed, cols=cols), factor_hessian(correlated(seed, cols))
        stock = round_rows(rows, name, hessian.importance, dtype="f16")
        ours = unpack_rows(pack_rows(rows, name, None, hessian, dtype="f16"), name, cols, dtype="f16")
        assert objective(rows, ours, hessian).sum() < 0.6 * objective(rows, stock, hessian).sum()


@pytest.mark.parametrize("name", ["INT2_64", "INT5_128"])
def test_a_sweep_never_raises_the_error_of_a_row_and_keeps_values_and_gradient_true(name: str) -> None:
    rows, hessian = weights(2), factor_hessian(correlated(2))
    packed = pack_rows(rows, name, hessian.importance, None, dtype="bf16")
    values = unpack_rows(packed, name, 256, dtype="bf16")
    gradient = np.asarray((rows - values) @ hessian.h, np.float32)
    before = objective(rows, values, hessian)
    packed = descend_rows(packed, name, values, hessian, gradient, dtype="bf16")
    np.testing.assert_allclose(unpack_rows(packed, name, 256, dtype="bf16"), values, atol=1e-5)
    np.testing.assert_allclose((rows - values) @ hessian.h, gradient, atol=2e-3)
    after = objective(rows, values, hessian)
    assert (after <= before * (1 + 1e-5)).all()
    assert after.sum() < 0.9 * before.sum()


def test_rows_do_not_depend_on_the_rows_beside_them() -> None:
    rows, hessian = weights(3), factor_hessian(correlated(3))
    whole = pack_rows(rows, "INT4_64", None, hessian, dtype="f16")
    parts = [pack_rows(rows[i : i + 8], "INT4_64", None, hessian, dtype="f16") for i in range(0, 16, 8)]
    np.testing.assert_array_equal(np.concatenate(parts), whole)


def test_floats_and_odd_weights() -> None:
    assert not feeds_back("F16")
    rows = weights(6, 3)
    rows[0] = 0
    assert not unpack_rows(pack_rows(rows, "INT3_128", None, factor_hessian(correlated(6)), dtype="f16"), "INT3_128", 256, dtype="f16")[
        0
    ].any()
    rows[1, 3] = np.nan
    with pytest.raises(ModelError, match="NaN"):
        pack_rows(rows, "INT4_64", None, None, dtype="f16")
