"""The refit of survivors on numbers alone: a golden case, gradients against autograd, and what may never get worse."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from edgemoe.repair.adam import WARM_UP
from edgemoe.repair.experts import (
    RATE,
    Experts,
    Tokens,
    descend,
    factor_ridge,
    fill_residual,
    normal_sums,
    refit_down,
    refit_experts,
)

H, M = 6, 5


def make_problem(seed: int, n: int = 200, n_experts: int = 3, k: int = 2) -> tuple[Tokens, Experts]:
    """Random survivors, and targets that other weights would give, with noise."""
    rng = np.random.default_rng(seed)
    gates = rng.dirichlet(np.ones(k), size=n).astype(np.float32)
    chosen = np.argsort(rng.random((n, n_experts)), axis=1)[:, :k].astype(np.int32)
    x = rng.normal(size=(n, H)).astype(np.float32)
    truth, start = (
        Experts(gate=_random(rng, n_experts, M, H), up=_random(rng, n_experts, M, H), down=_random(rng, n_experts, H, M)) for _ in range(2)
    )
    target = (output_of(x, chosen, gates, truth) + 0.1 * rng.normal(size=(n, H))).astype(np.float32)
    weights = rng.exponential(size=n).astype(np.float32)
    tokens = Tokens(x=x, target=target, chosen=chosen, gates=gates, weights=weights, guard=np.arange(n) % 5 == 0)
    return tokens, start


def _random(rng: np.random.Generator, *shape: int) -> torch.Tensor:
    return torch.from_numpy(rng.normal(size=shape).astype(np.float32) / 2)


def output_of(x: np.ndarray, chosen: np.ndarray, gates: np.ndarray, experts: Experts) -> np.ndarray:
    """The layer's output, token by token in plain numpy."""
    gate, up, down = (s.detach().double().numpy() for s in experts.stacks)
    out = np.zeros(x.shape)
    for t in range(len(x)):
        for e, g in zip(chosen[t], gates[t], strict=True):
            a = gate[e] @ x[t]
            out[t] += g * down[e] @ (a / (1 + np.exp(-a)) * (up[e] @ x[t]))
    return out


def loss_of(tokens: Tokens, experts: Experts, *, guard: bool) -> float:
    squares = ((tokens.target - output_of(tokens.x, tokens.chosen, tokens.gates, experts)) ** 2).sum(axis=1)
    return float((tokens.weights * squares)[tokens.guard == guard].mean())


def solve_down(phi: torch.Tensor, residual: torch.Tensor, ridge: float) -> torch.Tensor:
    """Ridge regression: the change of W_down [H, M] that brings sum_t |r_t - dW phi_t|^2 down most, from the sums of `refit_down`."""
    a, b = normal_sums(phi, residual, torch.ones(len(phi), dtype=phi.dtype))
    change: torch.Tensor = torch.cholesky_solve(b, factor_ridge(a, ridge)).T
    return change


def test_closed_form_gives_the_worked_example() -> None:
    h = torch.tensor([[0.5, -1], [1.5, 0.25], [-0.75, 1], [0.2, -0.4]], dtype=torch.float64)
    g = torch.tensor([0.6, 0.4, 0.9, 0.3], dtype=torch.float64)
    r = torch.tensor([[0.2, -0.1], [0.3, 0.05], [-0.25, 0.15], [0, -0.05]], dtype=torch.float64)
    phi, ones = h * g[:, None], torch.ones(4, dtype=torch.float64)
    a, b = normal_sums(phi, r, ones)
    assert torch.allclose(a, torch.tensor([[0.909225, -0.7347], [-0.7347, 1.1944]], dtype=torch.float64), atol=1e-6)
    assert torch.allclose(b, torch.tensor([[0.40875, -0.10425], [-0.315, 0.206]], dtype=torch.float64), atol=1e-6)
    change = solve_down(phi, r, 0.1)
    assert torch.allclose(change, torch.tensor([[0.385056, -0.024700], [0.020381, 0.170035]], dtype=torch.float64), atol=1e-6)
    assert float((r**2).sum()) == pytest.approx(0.23)
    assert float(((r - phi @ change.T) ** 2).sum()) == pytest.approx(0.013182, abs=1e-6)


def test_an_expert_that_saw_nothing_stays_as_it_is() -> None:
    change = solve_down(torch.zeros(3, 2), torch.ones(3, 4), 0.2)
    assert torch.equal(change, torch.zeros(4, 2, dtype=torch.float64))
    assert torch.equal(factor_ridge(torch.zeros(2, 2, dtype=torch.float64), 0.2), torch.eye(2, dtype=torch.float64))


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 10**6), st.floats(0.001, 10))
def test_the_closed_form_never_makes_either_residual_worse(seed: int, ridge: float) -> None:
    tokens, experts = make_problem(seed)
    before = [loss_of(tokens, experts, guard=g) for g in (False, True)]
    residual = np.zeros_like(tokens.x)
    fill_residual(tokens, experts, residual)
    refit_down(tokens, experts, residual, ridge=ridge)
    after = [loss_of(tokens, experts, guard=g) for g in (False, True)]
    assert all(a <= b * (1 + 1e-5) for a, b in zip(after, before, strict=True))
    expected = tokens.target - output_of(tokens.x, tokens.chosen, tokens.gates, experts)
    assert np.allclose(residual, expected, atol=1e-4)  # kept up to date on the way


def test_the_first_step_of_descent_follows_the_gradient() -> None:
    tokens, experts = make_problem(3)
    before = experts.copy()
    leaves = [s.clone().requires_grad_() for s in experts.stacks]
    gate, up, down = leaves
    out = torch.zeros(len(tokens.x), H)
    for slot in range(tokens.chosen.shape[1]):
        e = torch.from_numpy(tokens.chosen[:, slot]).long()
        x = torch.from_numpy(tokens.x)[:, :, None]
        h = torch.nn.functional.silu(gate[e] @ x) * (up[e] @ x)
        out = out + torch.from_numpy(tokens.gates[:, slot])[:, None] * (down[e] @ h)[:, :, 0]
    fit = torch.from_numpy(tokens.weights * ~tokens.guard)
    (fit * (torch.from_numpy(tokens.target) - out).square().sum(1)).sum().backward()
    descend(tokens, experts, epochs=1)  # fewer tokens than a batch: one step
    for old, new, leaf in zip(before.stacks, experts.stacks, leaves, strict=True):
        assert leaf.grad is not None
        size = RATE / WARM_UP * old.square().mean(dim=(1, 2), keepdim=True).sqrt()  # of Adam's first step
        assert torch.allclose(new - old, -size * leaf.grad.sign(), atol=1e-5)


def test_a_whole_refit_improves_the_guard_tokens_and_reports_what_is_stored() -> None:
    tokens, experts = make_problem(1, n=2000)
    residual = np.zeros_like(tokens.x)
    halve = lambda e: e.down.copy_((e.down * 8).round() / 8)  # noqa: E731
    before, closed, after = refit_experts(tokens, experts, residual, epochs=40, store=halve)
    assert before > closed > 0
    assert after == pytest.approx(loss_of(tokens, experts, guard=True), rel=1e-4)
    assert after < 0.9 * closed
    assert torch.equal(experts.down * 8, (experts.down * 8).round())


def test_descent_that_the_guard_tokens_do_not_confirm_is_taken_back() -> None:
    tokens, experts = make_problem(2)
    target = np.where(tokens.guard[:, None], output_of(tokens.x, tokens.chosen, tokens.gates, experts), tokens.target)
    tokens = Tokens(**{**{n: getattr(tokens, n) for n in tokens.__dataclass_fields__}, "target": target.astype(np.float32)})
    before = experts.copy()  # already right for the guard tokens: anything else is worse
    refit_experts(tokens, experts, np.zeros_like(tokens.x), epochs=3, store=lambda e: None)
    assert all(torch.equal(a, b) for a, b in zip(experts.stacks, before.stacks, strict=True))


@pytest.mark.parametrize("cores", [1, 3])
def test_the_number_of_cores_does_not_matter(cores: int, monkeypatch: pytest.MonkeyPatch) -> None:
    def refit() -> Experts:
        tokens, experts = make_problem(5, n=5000)
        refit_experts(tokens, experts, np.zeros_like(tokens.x), epochs=1, store=lambda e: None)
        return experts

    expected = refit()
    monkeypatch.setattr("edgemoe.stream.passes.count_cores", lambda: cores)
    assert all(torch.equal(a, b) for a, b in zip(refit().stacks, expected.stacks, strict=True))
