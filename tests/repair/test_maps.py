"""Maps between two streams: least squares, and down the KL of the output matrix."""

from __future__ import annotations

import numpy as np
import torch

from edgemoe.repair.align import PairSums, refit_matrix, sum_pairs
from edgemoe.repair.output_map import HeadInputs, descend_map, kl_of_map


def pairs(x: np.ndarray, y: np.ndarray, weights: np.ndarray | None = None) -> PairSums:
    weights = np.ones(len(x)) if weights is None else weights
    return sum_pairs(*(torch.from_numpy(np.asarray(a, np.float32)) for a in (x, y, weights)))


def test_refit_is_weighted_least_squares() -> None:
    """With next to no ridge the map is numpy's least-squares answer over the weighted tokens."""
    rng = np.random.default_rng(0)
    x, y, w = rng.normal(size=(400, 6)), rng.normal(size=(400, 4)), rng.uniform(0.1, 2, 400)
    expected = np.linalg.lstsq(x * np.sqrt(w)[:, None], y * np.sqrt(w)[:, None], rcond=None)[0].T
    found = refit_matrix(np.zeros((4, 6), np.float32), pairs(x, y, w), pairs(x, y, w), ridge=1e-9)
    np.testing.assert_allclose(found, expected, atol=1e-4)


def test_a_refit_that_the_guard_tokens_do_not_confirm_is_not_made() -> None:
    """Fitted to noise, it is worse on other tokens than what was there."""
    rng = np.random.default_rng(1)
    old = rng.normal(size=(5, 8)).astype(np.float32)
    x, guard = rng.normal(size=(9, 8)), rng.normal(size=(500, 8))
    noisy = x @ old.T + 3 * rng.normal(size=(9, 5))
    assert refit_matrix(old, pairs(x, noisy), pairs(guard, guard @ old.T)) is old
    assert refit_matrix(old, pairs(x, noisy), pairs(x, noisy)) is not old


def test_nothing_seen_changes_nothing() -> None:
    """No token, no refit."""
    old = np.eye(3, dtype=np.float32)
    assert refit_matrix(old, pairs(np.zeros((0, 3)), np.zeros((0, 3))), pairs(np.ones((2, 3)), np.zeros((2, 3)))) is old


def ends(rng: np.random.Generator, shift: np.ndarray, n: int = 64, hidden: int = 8) -> HeadInputs:
    original = rng.normal(size=(n, hidden)).astype(np.float32)
    changed = (original @ shift.T + 0.05 * rng.normal(size=(n, hidden))).astype(np.float32)
    return HeadInputs(torch.from_numpy(changed), torch.from_numpy(original), torch.from_numpy(rng.uniform(0.5, 1.5, n).astype(np.float32)))


def test_gradient_of_the_kl_is_autograds() -> None:
    """The closed form of the gradient agrees with torch's own."""
    rng = np.random.default_rng(2)
    output = torch.from_numpy(rng.normal(size=(50, 8)).astype(np.float32))
    given = ends(rng, np.eye(8) + 0.2 * rng.normal(size=(8, 8)))
    m = (torch.eye(8) + 0.1 * torch.randn(8, 8, generator=torch.Generator().manual_seed(0))).requires_grad_()
    p, q = ((x @ output.T).log_softmax(-1) for x in (given.original, given.changed @ m.T))
    loss = (given.weights * torch.nn.functional.kl_div(q, p, reduction="none", log_target=True).sum(-1)).sum()
    (expected,) = torch.autograd.grad(loss, m)
    kl, gradient = kl_of_map(m.detach(), output, given)
    assert abs(kl.item() - loss.item()) < 1e-4 * loss.item()
    torch.testing.assert_close(gradient, expected, rtol=1e-3, atol=1e-4)


def test_descent_goes_below_least_squares_on_windows_it_never_saw() -> None:
    """Least squares counts all directions alike, the KL does not; the guard windows decide and see the gain."""
    rng = np.random.default_rng(3)
    output = torch.from_numpy((rng.normal(size=(60, 8)) * np.array([8, 6, 4, 1, 0.2, 0.1, 0.1, 0.05])).astype(np.float32))
    shift = np.eye(8) + 0.3 * rng.normal(size=(8, 8))
    windows = [ends(rng, shift) for _ in range(12)]
    fitted, guard, fresh = range(8), range(8, 10), range(10, 12)
    sides = ("changed", "original")
    sums = [pairs(*(np.concatenate([getattr(windows[i], side).numpy() for i in part]) for side in sides)) for part in (fitted, guard)]
    start = torch.from_numpy(refit_matrix(np.eye(8, dtype=np.float32), *sums, ridge=0.5))
    found = descend_map(start, output, windows.__getitem__, fitted, guard, epochs=20)
    before, after = (sum(float(kl_of_map(m, output, windows[i])[0]) for i in fresh) for m in (start, found))
    assert after < 0.9 * before


def test_descent_from_equal_streams_stays_where_it_is() -> None:
    """A map that is the identity leaves nothing to measure steps by, and nothing to gain."""
    rng = np.random.default_rng(4)
    output = torch.randn(20, 8, generator=torch.Generator().manual_seed(1))
    same = torch.from_numpy(rng.normal(size=(30, 8)).astype(np.float32))
    window = HeadInputs(same, same, torch.ones(30))
    torch.testing.assert_close(descend_map(torch.eye(8), output, lambda _: window, [0], [0]), torch.eye(8))
