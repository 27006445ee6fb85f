"""What every neuron of an expert is worth, from the gradients of the loss (backward.py).

A neuron of an expert is a row of W_gate, a row of W_up and a column w_j of W_down: f = sum_j h_j w_j.  With gamma_t the gradient of the
loss with respect to the expert's output, deleting neuron j costs to second order (HEAPr, arXiv 2509.22299, without its mean over gamma
gamma')

    s_j = 1/2 sum_t lambda_t (h_tj <gamma_t, w_j>)^2

which is an unbiased estimate of the KL that the deletion causes, in nats per token, and needs no matrix of hidden size squared.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

CAMERA_MAX = 0.9  # share of the largest token in CAMERA's energy: its published script (xuyuzhuang11/CAMERA)


def heapr_sums(h: torch.Tensor, gamma: torch.Tensor, down: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """1/2 sum_t lambda_t (h_tj <gamma_t, w_j>)^2 of each neuron [M].

    Args:
        h: hidden activations [n, M] of the tokens routed to the expert.
        gamma: gradient of the loss with respect to the expert's output [n, H], gate included.
        down: W_down [H, M].
        weights: lambda [n].
    """
    return 0.5 * (weights @ (h * (gamma @ down)).square())


def camera_energy(phi_sq: NDArray[Any], phi_sq_max: NDArray[Any], down_sq: NDArray[Any], share: float = CAMERA_MAX) -> NDArray[np.float64]:
    """|w_j|^2 ((1 - a) sum_t (g_t h_tj)^2 + a max_t (g_t h_tj)^2) of each neuron: CAMERA, arXiv 2508.02322.

    Args:
        phi_sq: sum of (g_t h_tj)^2 over the routed tokens.
        phi_sq_max: the largest of them.
        down_sq: |w_j|^2.
        share: a; 0 is HEAPr's score with the identity in place of the gradients.
    """
    energy: NDArray[np.float64] = down_sq * ((1 - share) * phi_sq + share * phi_sq_max)
    return energy
