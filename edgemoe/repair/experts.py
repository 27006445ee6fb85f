"""This module refits the survivors of a pruned layer to the output that each token should get (docs/pricing.md, 10).

The survivors are the kept experts.  The first step is a closed form: W_down of one expert after another becomes the least-squares answer to
the residual that the other experts leave.  The second step is descent on the same squared error, which moves all three matrices of all
survivors together.  Guard tokens, to which nothing is fitted, decide whether each step is kept.
Work is split by experts and by fixed blocks of tokens; each piece is computed with one thread, and pieces are summed in order.  So the
result is the same on any number of cores.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from edgemoe.base.types import F32
from edgemoe.repair.adam import Adam, rate_at
from edgemoe.stream.passes import map_ordered

BLOCK = 4096  # tokens of one piece of work
# docs/decisions/0005-repair.md lists what was tried instead of these numbers.
RIDGE = 0.2  # of the mean diagonal
SWEEPS = 2  # over the experts
BATCH = 1024  # tokens of one step of descent
RATE = 0.05  # of descent, in root-mean-squares of the matrix that is changed
Tensors = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


@dataclass(frozen=True, slots=True, kw_only=True)
class Tokens:
    """N tokens in a pruned layer with n survivors; the large arrays may lie in files."""

    x: F32  # [N, H] what the experts receive
    target: F32  # [N, H] what their weighted outputs should add up to
    chosen: NDArray[np.int32]  # [N, k] survivors by position, 0..n-1
    gates: F32  # [N, k]
    weights: F32  # [N] how much each token counts, mean one
    guard: NDArray[np.bool_]  # [N] set aside: never fitted to
    gradients: F32 | None = None  # [N, H] of the loss with respect to the layer's output, times the root of the token's weight


@dataclass(slots=True, kw_only=True)
class Experts:
    """Weights of a layer's survivors, changed in place."""

    gate: torch.Tensor  # [n, M, H]
    up: torch.Tensor  # [n, M, H]
    down: torch.Tensor  # [n, H, M]

    def __len__(self) -> int:
        return len(self.gate)

    @property
    def stacks(self) -> Tensors:
        """The three stacks."""
        return self.gate, self.up, self.down

    def copy(self) -> Experts:
        """A copy of these weights in memory of its own."""
        return Experts(gate=self.gate.clone(), up=self.up.clone(), down=self.down.clone())

    def hidden(self, expert: int, x: torch.Tensor) -> torch.Tensor:
        """Hidden activations silu(W_gate x) * (W_up x), [tokens, M]."""
        return torch.nn.functional.silu(x @ self.gate[expert].T) * (x @ self.up[expert].T)

    def hidden_gradients(self, expert: int, x: torch.Tensor, gradients: torch.Tensor) -> Tensors:
        """Hidden activations, and the gradients for W_gate x and W_up x (all [tokens, M]), from the gradients for the output."""
        with torch.enable_grad():
            gate, up = ((x @ stack[expert].T).requires_grad_() for stack in (self.gate, self.up))
            h = torch.nn.functional.silu(gate) * up
            d_gate, d_up = torch.autograd.grad(h, (gate, up), gradients @ self.down[expert])
        return h.detach(), d_gate, d_up


# ------------------------------------------------------------------------------------------------------------ closed form
def normal_sums(phi: torch.Tensor, residual: torch.Tensor, weights: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """A = sum_t lambda_t phi_t phi_t' [M, M] and B = sum_t lambda_t phi_t r_t' [M, H] in double precision."""
    weighted = (phi * weights[:, None]).T
    return (weighted @ phi).double(), (weighted @ residual).double()


def factor_ridge(a: torch.Tensor, ridge: float) -> torch.Tensor:
    """Cholesky factor of A + ridge mean(diag A) I, or of the identity if the expert saw no token."""
    lift = ridge * a.diagonal().mean()
    if not lift > 0:
        return torch.eye(len(a), dtype=a.dtype, device=a.device)
    factor: torch.Tensor = torch.linalg.cholesky(a + lift * torch.eye(len(a), dtype=a.dtype, device=a.device))
    return factor


def refit_down(tokens: Tokens, experts: Experts, residual: F32, *, ridge: float = RIDGE, sweeps: int = SWEEPS) -> None:
    """Refit W_down of one survivor after another (Gauss-Seidel), in place; a change is made only if the guard tokens confirm it.

    Args:
        tokens: what the layer sees.
        experts: changed in place.
        residual: target minus output [N, H], kept up to date.
        ridge: of `factor_ridge`.
        sweeps: times that every expert gets its turn.
    """
    device = experts.down.device
    factors: dict[int, torch.Tensor] = {}  # all factors together are no larger than the survivors' weights
    for _ in range(sweeps):
        for expert in range(len(experts)):
            rows, slots = np.nonzero(tokens.chosen == expert)
            if not len(rows):
                continue
            gates = tokens.gates[rows, slots]
            blocks = [slice(i, i + BLOCK) for i in range(0, len(rows), BLOCK)]
            phis: list[torch.Tensor] = []
            a = b = torch.zeros((), dtype=torch.float64, device=device)

            def sums(block: slice, expert: int = expert, rows: NDArray[np.int64] = rows, gates: F32 = gates) -> Tensors:
                mine = rows[block]
                phi = experts.hidden(expert, _at(tokens.x, mine, device)) * _to(gates[block], device)[:, None]
                weights = _to(tokens.weights[mine] * ~tokens.guard[mine], device)
                return phi, *normal_sums(phi, _at(residual, mine, device), weights)

            for phi, part_a, part_b in map_ordered(sums, blocks, device=device):
                phis.append(phi)
                a, b = a + part_a, b + part_b
            with one_thread():
                if expert not in factors:
                    factors[expert] = factor_ridge(a, ridge)
                change = torch.cholesky_solve(b, factors[expert]).float()
            _accept(tokens, experts, residual, expert, [(rows[s], p) for s, p in zip(blocks, phis, strict=True)], change)


def _accept(
    tokens: Tokens,
    experts: Experts,
    residual: F32,
    expert: int,
    parts: Sequence[tuple[NDArray[np.int64], torch.Tensor]],
    change: torch.Tensor,
) -> None:
    """Make the change of W_down' [M, H] if the guard tokens' residual falls."""
    device = change.device

    def gain(part: tuple[NDArray[np.int64], torch.Tensor]) -> tuple[torch.Tensor, float]:
        rows, phi = part
        before = _at(residual, rows, device)
        after = before - phi @ change
        weights = _to(tokens.weights[rows] * tokens.guard[rows], device)
        return after, float(weights @ (before.square().sum(1) - after.square().sum(1)))

    results = list(map_ordered(gain, parts, device=device))
    if sum(g for _, g in results) <= 0:
        return
    for (rows, _), (after, _) in zip(parts, results, strict=True):
        residual[rows] = after.cpu().numpy()
    experts.down[expert] += change.T


# --------------------------------------------------------------------------------------------------------------- residual
def fill_residual(tokens: Tokens, experts: Experts, residual: F32) -> tuple[float, float]:
    """Write target minus output [N, H]; return its weighted mean square over the fitted tokens and over the guard tokens."""
    device = experts.down.device

    def block(rows: slice) -> tuple[float, float]:
        x = _to(np.ascontiguousarray(tokens.x[rows]), device)
        left = _to(np.array(tokens.target[rows]), device)
        chosen, gates = tokens.chosen[rows], tokens.gates[rows]
        for expert in np.unique(chosen).tolist():
            token, slot = np.nonzero(chosen == expert)
            at = _to(token, device)
            left.index_add_(0, at, experts.hidden(expert, x[at]) @ experts.down[expert].T * -_to(gates[token, slot], device)[:, None])
        residual[rows] = left.cpu().numpy()
        squares = tokens.weights[rows].astype(np.float64) * left.square().sum(1).cpu().numpy()
        guard = tokens.guard[rows]
        return float(squares[~guard].sum()), float(squares[guard].sum())

    fitted = kept_back = 0.0
    for first, second in map_ordered(block, [slice(i, i + BLOCK) for i in range(0, len(tokens.x), BLOCK)], device=device):
        fitted, kept_back = fitted + first, kept_back + second
    n_guard = int(tokens.guard.sum())
    return fitted / max(len(tokens.guard) - n_guard, 1), kept_back / max(n_guard, 1)


# ---------------------------------------------------------------------------------------------------------------- descent
def descend(tokens: Tokens, experts: Experts, *, epochs: int, rate: float = RATE, seed: int = 0) -> None:
    """Lower sum_t lambda_t |target - output|^2 by gradient steps on all three matrices of every survivor, in place.

    Routing and gates stay as they are.  The step size rises for some steps, then falls to zero along a half cosine.
    """
    adams, device = [[Adam(stack[n]) for stack in experts.stacks] for n in range(len(experts))], experts.down.device
    scales = [stack.square().mean(dim=(1, 2)).sqrt() for stack in experts.stacks]  # steps are in root-mean-squares of the matrix
    fitted = np.flatnonzero(~tokens.guard)
    per_epoch = max(1, len(fitted) // BATCH)
    for epoch in range(epochs):
        order = np.random.default_rng([seed, epoch]).permutation(fitted)
        for number, rows in enumerate(np.array_split(order, per_epoch)):
            now = rate * rate_at(epoch * per_epoch + number, epochs * per_epoch)

            def change(expert: int, gradients: Tensors, now: float = now) -> None:
                for adam, scale, gradient in zip(adams[expert], scales, gradients, strict=True):
                    adam.step(gradient, now * float(scale[expert]))

            _step(tokens, experts, change, np.sort(rows), device)


def _step(tokens: Tokens, experts: Experts, change: Callable[[int, Tensors], None], rows: NDArray[np.int64], device: torch.device) -> None:
    """One step on some tokens: `change` gets each expert that they chose and the gradients of its three matrices."""
    x, chosen, gates = _at(tokens.x, rows, device), tokens.chosen[rows], tokens.gates[rows]
    error = -_at(tokens.target, rows, device)

    def forward(expert: int) -> tuple[int, torch.Tensor, torch.Tensor, tuple[torch.Tensor, ...]]:
        token, slot = np.nonzero(chosen == expert)
        at, g = _to(token, device), _to(gates[token, slot], device)[:, None]
        mine = x[at]
        a, b = mine @ experts.gate[expert].T, mine @ experts.up[expert].T
        s = a.sigmoid()
        h = a * s * b
        return expert, at, h @ experts.down[expert].T * g, (g, mine, a, b, s, h)

    seen = list(map_ordered(forward, np.unique(chosen).tolist(), device=device))
    for _, at, out, _ in seen:
        error.index_add_(0, at, out)
    error *= _to(tokens.weights[rows], device)[:, None]

    def backward(part: tuple[int, torch.Tensor, torch.Tensor, tuple[torch.Tensor, ...]]) -> None:
        expert, at, _, (g, mine, a, b, s, h) = part
        to_output = error[at] * g
        to_hidden = to_output @ experts.down[expert]
        to_up = to_hidden * a * s
        to_gate = to_hidden * b * s * (1 + a * (1 - s))  # silu'(a) = s (1 + a (1 - s))
        change(expert, (to_gate.T @ mine, to_up.T @ mine, to_output.T @ h))

    for _ in map_ordered(backward, seen, device=device):
        pass


def refit_experts(
    tokens: Tokens, experts: Experts, residual: F32, *, epochs: int, ridge: float = RIDGE, store: Callable[[Experts], None]
) -> tuple[float, float, float]:
    """Refit in closed form, then by descent, keep each step as far as it lowers the guard tokens' residual, then round to the stored type.

    Args:
        tokens: what the layer sees.
        experts: changed in place.
        residual: scratch [N, H]; at the end target minus output of the weights as stored.
        epochs: of descent, times over all tokens; 0 leaves it out.
        ridge: of the closed form.
        store: rounds the weights in place to what is stored.

    Returns:
        Weighted mean square residual of the guard tokens: before, after the closed form, at the end.
    """
    before = fill_residual(tokens, experts, residual)[1]
    refit_down(tokens, experts, residual, ridge=ridge)
    closed = fill_residual(tokens, experts, residual)[1]
    if epochs:
        start = experts.copy()
        descend(tokens, experts, epochs=epochs)
        _search_back(tokens, experts, residual, start, closed)
    store(experts)
    return before, closed, fill_residual(tokens, experts, residual)[1]


def _search_back(tokens: Tokens, experts: Experts, residual: F32, start: Experts, closed: float) -> None:
    """Go half the way back to `start`, up to twice, while the guard tokens' residual is not below that at `start`; then go all the way."""
    for _ in range(3):
        if fill_residual(tokens, experts, residual)[1] < closed:
            return
        for stack, old in zip(experts.stacks, start.stacks, strict=True):
            stack.lerp_(old, 0.5)
    for stack, old in zip(experts.stacks, start.stacks, strict=True):
        stack.copy_(old)


# ------------------------------------------------------------------------------------------------------------------ pieces
class one_thread:
    """Inside this context, arithmetic uses one thread, so its result does not depend on the number of cores."""

    def __enter__(self) -> None:
        self.before = torch.get_num_threads()
        torch.set_num_threads(1)

    def __exit__(self, *_: object) -> None:
        torch.set_num_threads(self.before)


def _to(values: NDArray[np.generic], device: torch.device) -> torch.Tensor:
    return torch.from_numpy(values).to(device)


def _at(array: F32, rows: NDArray[np.int64], device: torch.device) -> torch.Tensor:
    """Some rows of an array that may lie in a file."""
    return _to(np.asarray(array[rows]), device)
