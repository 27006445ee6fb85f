"""PMQ's widths: the published bits, and the best of all allocations."""

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edgemoe.base.errors import BudgetError, UsageError
from edgemoe.plan.pmq import allocate_bits, pmq_costs

TOKENS = np.array([68862, 63387, 62746, 63751, 66314, 70431, 56466, 72331], np.float64)
WEIGHTS = np.array([19891.6387, 22812.1523, 21595.7480, 21344.5, 19123.9531, 16804.8867, 17566.2422, 18464.8809])
ERRORS = np.array(
    [
        [455.0034, 180.3979, 78.2074],
        [3856.1067, 708.0323, 369.9871],
        [735.9800, 372.6560, 156.3292],
        [663.1968, 341.5241, 143.5118],
        [525.4329, 273.9226, 114.7053],
        [434.1846, 218.0749, 92.0674],
        [3275.4322, 677.7527, 288.9788],
        [450.2718, 231.7869, 97.3900],
    ]
)


@pytest.mark.parametrize(
    ("total", "bits", "objective"),
    [
        (12, [1, 3, 2, 1, 1, 1, 2, 1], 21471.5294),
        (16, [2, 3, 2, 2, 2, 1, 3, 1], 15002.1592),
        (20, [2, 3, 3, 3, 2, 2, 3, 2], 10269.3653),
    ],
)
def test_pmq_gives_the_published_bits_of_mixtrals_first_layer(total: int, bits: list[int], objective: float) -> None:
    """Statistics and allocations that were released with arXiv 2410.06270."""
    found, cost = allocate_bits(TOKENS, WEIGHTS, ERRORS, total)
    assert found.tolist() == bits
    assert cost == pytest.approx(objective, rel=1e-6)


@settings(max_examples=15, deadline=None)
@given(seed=st.integers(0, 10**6), total=st.integers(4, 13))
def test_pmq_is_the_best_of_all_allocations(seed: int, total: int) -> None:
    rng = np.random.default_rng(seed)
    tokens, weights = rng.integers(1, 100, 4).astype(float), rng.lognormal(0, 1, 4)
    errors = np.sort(rng.lognormal(0, 2, (4, 3)), axis=1)[:, ::-1]
    cost = pmq_costs(tokens, weights, errors)
    plans = [p for p in itertools.product((1, 2, 3), repeat=4) if sum(p) <= total and 3 in p and 2 in p]
    if not plans:
        with pytest.raises(BudgetError):
            allocate_bits(tokens, weights, errors, total)
        return
    best = min(sum(cost[e, b - 1] for e, b in enumerate(p)) for p in plans)
    bits, found = allocate_bits(tokens, weights, errors, total)
    assert found == pytest.approx(best, rel=1e-6)
    assert tuple(bits.tolist()) in plans


def test_pmq_refuses_statistics_that_cannot_be() -> None:
    for tokens, weights, errors in (
        (TOKENS[:7], WEIGHTS, ERRORS),
        (TOKENS, WEIGHTS * np.nan, ERRORS),
        (TOKENS * 0, WEIGHTS, ERRORS),
        (TOKENS, -WEIGHTS, ERRORS),
        (TOKENS, WEIGHTS, ERRORS[:, :2]),
        (TOKENS, WEIGHTS, ERRORS[:, 0]),
    ):
        with pytest.raises(UsageError):
            allocate_bits(tokens, weights, errors, 16)
