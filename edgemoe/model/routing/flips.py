"""This module splits the KL of probes into a part that adds up and the cost of flipped routing choices, kappa (docs/pricing.md, 5).

A change of any size moves some tokens of later layers over the edge between two experts.  Their number is linear in the size of the change,
so KL = Q + (flips), where Q is quadratic and flips are linear.  With Q_m the part of Q that lies before router m, of M routers:

    KL = Q + kappa mean_m sqrt(Q_m)

A probe of one tensor has flips of its own: q + kappa h sqrt(q), where h is the share of routers behind it (0 for the output matrix, which
has none behind it).  The q of many changes add up, and their flips do not.  kappa is the value with which the probes of single tensors
agree with those of the whole model.  The planner needs sums, so a price is q plus its share of the flips of a plan whose Q is typical (the
tangent of the square root there): q (1 + kappa h / (2 sqrt(Q_typical))).
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from edgemoe.base.types import F64
from edgemoe.ir import Probe

TYPICAL = 0.01  # nats, the Q of plans of 3 to 5 bits a weight; chosen on the bundled models, .03 does as well (docs/pricing.md, 5)
KAPPAS = np.concatenate([[0.0], np.geomspace(1e-4, 1.0, 400)])  # square roots of nats; the best of these (2.3 % apart) is taken


def routers_behind(role: str, layer: int, routers: Sequence[int]) -> F64:
    """Which routers a change in a tensor can move: 1 or 0 for each layer that has a router [routers]."""
    if role == "token_embd":
        first = 0
    elif role == "output":
        first = max(routers) + 1
    else:
        first = layer if role.startswith("attn") else layer + 1
    behind: F64 = (np.asarray(routers) >= first).astype(np.float64)
    return behind


def without_flips(kl: F64 | float, kappa: F64 | float) -> F64:
    """The q of KL = q + kappa sqrt(q)."""
    root = (np.sqrt(np.square(kappa) + 4 * np.maximum(kl, 0.0)) - kappa) / 2
    return np.asarray(root**2)


def additive_part(kl: F64 | float, kappa: F64 | float) -> F64:
    """The price for a probe of this KL; `kappa` is that of the formula times the share of routers behind the probe."""
    part: F64 = without_flips(kl, kappa) * (1 + np.asarray(kappa) / (2 * np.sqrt(TYPICAL)))
    return part


def fit_flips(tensors: Sequence[Probe], routers: Sequence[int], probed: F64, whole: Sequence[tuple[F64, float]]) -> tuple[float, float]:
    """Kappa of the formula above, and kappa of KL = C + kappa sqrt(C), where C is a sum of prices.

    Args:
        tensors: probes of U tensors, of which role and layer count.
        routers: layers that have one.
        probed: KL of the units' probes [U].
        whole: for each probe of the whole model, the KL of every unit's part if it grew with the error alone [U], and the measured KL.

    Both kappas minimise the squares of log(predicted / measured).
    """
    if not whole:
        return 0.0, 0.0
    behind = np.stack([routers_behind(t.role, t.layer, routers) for t in tensors], axis=1)  # [L, U]
    reach, measured = behind.mean(axis=0), np.array([kl for _, kl in whole])
    parts = np.stack([part for part, _ in whole]) / np.maximum(probed, 1e-300)  # [probes, U]

    def misfit(predicted: F64) -> float:
        return float(np.square(np.log(np.maximum(predicted, 1e-300) / measured)).sum())

    def with_flips(kappa: float) -> F64:
        q = parts * without_flips(probed, kappa * reach)
        total: F64 = q.sum(axis=1) + kappa * np.sqrt(q @ behind.T).mean(axis=1)
        return total

    kappa = float(min(KAPPAS, key=lambda k: misfit(with_flips(k))))
    prices = parts @ additive_part(probed, kappa * reach)
    return kappa, float(min(KAPPAS, key=lambda k: misfit(prices + k * np.sqrt(prices))))
