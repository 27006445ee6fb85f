"""This module finds the map M from the changed stream's last states to the original's that gives the least KL (docs/pricing.md, 12).

The output matrix is the only matrix whose cost is known in nats for each token.  Logits are linear in the state, so the gradient of the KL
with respect to M is a few matrix products.  M starts as the least-squares map, and Adam lowers its KL.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from edgemoe.repair.adam import Adam, rate_at
from edgemoe.stream.passes import kl_of_log_probs, map_ordered

EPOCHS = 3
RATE = 0.1  # of the first steps, in root-mean-squares of M - I at the start, which says how far the streams are apart
STEP_WINDOWS = 2
BLOCK = 2**24  # logits at once


@dataclass(frozen=True, slots=True)
class HeadInputs:
    """What a window's tokens bring to the output matrix."""

    changed: torch.Tensor  # [N, H] normed states of the changed stream
    original: torch.Tensor  # [N, H]
    weights: torch.Tensor  # [N]


def kl_of_map(translation: torch.Tensor, output: torch.Tensor, ends: HeadInputs) -> tuple[torch.Tensor, torch.Tensor]:
    """Weighted sum of KL(original || W M x) in nats, and its gradient with respect to M [H, H]: sum w (W'(q - p)) x'."""
    total, gradient = torch.zeros((), dtype=torch.float64, device=output.device), torch.zeros_like(translation)
    for rows in torch.arange(len(ends.changed)).split(max(1, BLOCK // len(output))):
        x, w = ends.changed[rows], ends.weights[rows]
        p = (ends.original[rows] @ output.T).log_softmax(-1)
        q = (x @ translation.T @ output.T).log_softmax(-1)
        total += (w * kl_of_log_probs(p, q)).sum().double()
        gradient += ((q.exp() - p.exp()) @ output * w[:, None]).T @ x
    return total, gradient


def descend_map(
    start: torch.Tensor,
    output: torch.Tensor,
    read: Callable[[int], HeadInputs],
    fitted: Sequence[int],
    guard: Sequence[int],
    *,
    epochs: int = EPOCHS,
    rate: float = RATE,
) -> torch.Tensor:
    """Lower the KL of the fitted windows by steps on M; return the start if the guard windows prefer it.

    Args:
        start: M [H, H].
        output: the output matrix [V, H].
        read: gives the head's inputs of a window.
        fitted: windows to learn from.
        guard: windows that decide.
        epochs: times over the fitted windows.
        rate: of the first steps.
    """
    moved = start.clone()
    adam = Adam(moved)
    size = float((start - torch.eye(len(start), device=start.device)).square().mean().sqrt())
    steps = epochs * math.ceil(len(fitted) / STEP_WINDOWS)

    def each(windows: Sequence[int], at: torch.Tensor) -> list[tuple[torch.Tensor, torch.Tensor]]:
        return list(map_ordered(lambda window: kl_of_map(at, output, read(window)), windows, device=output.device))

    for epoch in range(epochs):
        order = np.random.default_rng(epoch).permutation(fitted)
        for windows in np.array_split(order, max(1, math.ceil(len(order) / STEP_WINDOWS))):
            gradient = torch.stack([found[1] for found in each(windows.tolist(), moved)]).sum(0)
            adam.step(gradient, rate * rate_at(adam.steps, steps) * size)
    before, after = (float(sum(found[0] for found in each(guard, at))) for at in (start, moved))
    return moved if after < before else start
