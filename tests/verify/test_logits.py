"""KL of logits and its second-order form, against a worked example."""

from __future__ import annotations

import numpy as np
import pytest

from edgemoe.verify.logits import kl_of_rows


def test_kl_and_its_second_order_form_equal_the_worked_example() -> None:
    logits = np.array([[2.0, 1, 0, -1]], np.float32)
    p = np.exp(logits.astype(float)) / np.exp(logits.astype(float)).sum()
    for size, kl, quadratic in ((1, 0.001977354, 0.002027211), (10, 0.154443, 0.202721)):
        delta = size * np.array([0.05, -0.1, 0.02, 0.08])
        assert kl_of_rows(logits, (logits + delta).astype(np.float32))[0] == pytest.approx(kl, rel=2e-5)
        assert 0.5 * float((p * delta**2).sum() - (p * delta).sum() ** 2) == pytest.approx(quadratic, rel=1e-5)
