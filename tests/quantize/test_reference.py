"""The reference rounding has the error of its bits."""

import numpy as np
import pytest

from edgemoe.quantize.reference import round_to_nearest


@pytest.fixture
def matrix() -> np.ndarray:
    return np.random.default_rng(0).normal(size=(8, 64)).astype(np.float32)


def test_the_reference_rounding_has_the_error_of_its_bits(matrix: np.ndarray) -> None:
    errors = [float(((round_to_nearest(matrix, bits) - matrix) ** 2).mean()) for bits in (2, 3, 4, 8)]
    assert errors == sorted(errors, reverse=True)
    assert len(np.unique(round_to_nearest(matrix, 2)[0, :32])) <= 4
