"""Every refit of this package descends by Adam; its steps are scaled to the tensor that they change, and fall along a half cosine."""

from __future__ import annotations

import math

import torch

DECAY = (0.9, 0.98)  # of Adam's two moments
WARM_UP = 5  # steps over which the rate rises


class Adam:
    """Adam (Kingma and Ba, 2015) for one tensor."""

    def __init__(self, values: torch.Tensor) -> None:
        self.values, self.steps = values, 0
        self.mean, self.square = torch.zeros_like(values), torch.zeros_like(values)

    def step(self, gradient: torch.Tensor, size: float) -> None:
        """Change the tensor in place by about `size` in each entry, against the gradient."""
        self.steps += 1
        n, (first, second) = self.steps, DECAY
        self.mean.mul_(first).add_(gradient, alpha=1 - first)
        self.square.mul_(second).addcmul_(gradient, gradient, value=1 - second)
        bias = math.sqrt(1 - second**n) / (1 - first**n)
        self.values.addcdiv_(self.mean, self.square.sqrt().add_(1e-20), value=-size * bias)


def rate_at(step: int, steps: int) -> float:
    """Share of the full rate at one of `steps` steps: it rises for some steps, then falls to zero along a half cosine."""
    return min(1.0, (step + 1) / WARM_UP) * 0.5 * (1 + math.cos(math.pi * step / steps))
