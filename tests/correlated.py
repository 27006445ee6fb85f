"""Weights and the Hessians of correlated inputs, for rounding with error feedback."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

COLS = 256


def correlated(seed: int, cols: int = COLS, noise: float = 0.7) -> NDArray[np.float64]:
    """Hessian of inputs that a quarter as many hidden causes drive."""
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(2 * cols, cols // 4)) @ rng.normal(size=(cols // 4, cols)) + noise * rng.normal(size=(2 * cols, cols))
    return x.T @ x / len(x)


def weights(seed: int, rows: int = 16, cols: int = COLS) -> NDArray[np.float32]:
    return np.random.default_rng(seed).standard_t(5, (rows, cols)).astype(np.float32)
