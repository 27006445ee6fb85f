"""KL of probes -> the part of it that adds up, and kappa: what flipped routing choices cost (docs/pricing.md, 5).

A change of any size moves some tokens of later layers over the edge between two experts.  How many is linear in the size of the change, so
KL = Q + (flips), Q quadratic and flips linear.  With Q_m the part of Q that lies before router m, of M routers:

    KL = Q + kappa mean_m sqrt(Q_m)

A probe of one tensor holds its own flips: q + kappa h sqrt(q), where h is the share of routers behind it (0 for the output matrix, which
has none).  Flips of many changes do not add up, q does; so prices are made of q, and kappa is what makes the sum of the probes of single
tensors agree with the probes of the whole model.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from edgemoe.ir import Unit

KAPPAS = np.concatenate([[0.0], np.geomspace(1e-4, 1.0, 400)])  # square roots of nats; the best of these (2.3 % apart) is taken


def routers_behind(role: str, layer: int, n_layers: int) -> NDArray[np.float64]:
    """Which routers a change in a tensor can move [layers]: 1 or 0."""
    if role == "token_embd":
        first = 0
    elif role == "output":
        first = n_layers
    else:
        first = layer if role.startswith("attn") else layer + 1
    behind: NDArray[np.float64] = (np.arange(n_layers) >= first).astype(np.float64)
    return behind


def without_flips(kl: NDArray[np.float64] | float, kappa: NDArray[np.float64] | float) -> NDArray[np.float64]:
    """The q of KL = q + kappa sqrt(q)."""
    root = (np.sqrt(np.square(kappa) + 4 * np.maximum(kl, 0.0)) - kappa) / 2
    return np.asarray(root**2)


def fit_flips(
    units: Sequence[Unit], n_layers: int, probed: NDArray[np.float64], whole: Sequence[tuple[NDArray[np.float64], float]]
) -> tuple[float, float]:
    """Kappa of the formula above, and kappa of the short form KL = Q + kappa sqrt(Q) for changes spread as in the whole-model probes.

    Args:
        units: U tensors, each with a probe.
        n_layers: each with a router.
        probed: KL of the units' probes [U].
        whole: for each probe of the whole model the KL that every unit's share in it would cost if it grew with the error alone [U], and
            the KL that was measured.  Fitted by least squares of log(predicted / measured).
    """
    if not whole:
        return 0.0, 0.0
    behind = np.stack([routers_behind(u.role, u.layer, n_layers) for u in units], axis=1)  # [L, U]
    found = []
    for kappa in KAPPAS:
        share = without_flips(probed, kappa * behind.mean(axis=0)) / np.maximum(probed, 1e-300)
        q = np.array([(part * share).sum() for part, _ in whole])
        flips = np.array([kappa * np.sqrt(behind @ (part * share)).mean() for part, _ in whole])
        misfit = float(np.square(np.log(np.maximum(q + flips, 1e-300) / np.array([kl for _, kl in whole]))).sum())
        found.append((misfit, float(kappa), float(np.mean(flips / np.sqrt(np.maximum(q, 1e-300))))))
    return min(found)[1:]
