"""What flipped routing choices cost, told apart from what adds up: against models made by the formula, and against published numbers."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from edgemoe.ir import Unit
from edgemoe.model.routing.flips import additive_part, fit_flips, routers_behind, without_flips

LAYERS = 4
ROUTERS = range(LAYERS)
ROLES = ("attn_q", "attn_output", "ffn_gate_exps", "ffn_down_exps")
UNITS = [Unit(name=r, role=r, layer=-1, n_weights=1) for r in ("token_embd", "output")]
UNITS += [Unit(name=f"blk.{n}.{r}", role=r, layer=n, n_weights=1) for n in range(LAYERS) for r in ROLES]


@given(st.floats(1e-9, 1), st.floats(0, 1))
def test_a_probe_without_its_flips_gives_the_probe_again(q: float, kappa: float) -> None:
    assert float(without_flips(q + kappa * q**0.5, kappa)) == pytest.approx(q, rel=1e-6)


def test_a_change_moves_the_routers_after_it_and_no_other() -> None:
    assert routers_behind("token_embd", -1, ROUTERS).tolist() == [1, 1, 1, 1]
    assert routers_behind("attn_v", 2, ROUTERS).tolist() == [0, 0, 1, 1]
    assert routers_behind("ffn_up_exps", 2, ROUTERS).tolist() == [0, 0, 0, 1]
    assert routers_behind("output", -1, ROUTERS).tolist() == routers_behind("ffn_down_exps", 3, ROUTERS).tolist() == [0, 0, 0, 0]

    assert routers_behind("ffn_up", 0, [1, 3]).tolist() == [1, 1]  # layers without experts have none
    assert routers_behind("attn_q", 2, [1, 3]).tolist() == [0, 1]


@pytest.mark.parametrize("kappa", [0.0, 0.01, 0.06, 0.3])
def test_kappa_is_found_again_in_a_model_that_follows_the_formula(kappa: float) -> None:
    rng = np.random.default_rng(1)
    q = rng.lognormal(-6, 1, len(UNITS))
    behind = np.array([routers_behind(u.role, u.layer, ROUTERS) for u in UNITS])  # [U, L]
    probed = q + kappa * behind.mean(axis=1) * np.sqrt(q)
    whole = []
    for size in (0.2, 0.01):
        sums = size * (q[:, None] * behind).sum(axis=0)
        whole.append((size * probed, float(size * q.sum() + kappa * np.sqrt(sums).mean())))
    found, short = fit_flips(UNITS, ROUTERS, probed, whole)
    assert found == pytest.approx(kappa, rel=0.03, abs=1e-4)
    prices = float(additive_part(probed, found * behind.mean(axis=1)).sum())
    predicted = [size * prices + short * np.sqrt(size * prices) for size in (0.2, 0.01)]
    assert kappa > 0.1 or predicted == pytest.approx([kl for _, kl in whole], rel=0.2)


def test_one_kappa_fits_the_published_toy_at_three_widths() -> None:
    """Whole-model round to nearest at 4, 3, 2 bits: KL .0070 .0260 .1754, of it quadratic .0044 .0212 .1550."""
    kl, q = np.array([0.0070, 0.0260, 0.1754]), np.array([0.0044, 0.0212, 0.1550])
    kappas = (kl - q) / np.sqrt(q)
    assert ((kappas > 0.03) & (kappas < 0.06)).all()
    np.testing.assert_allclose(without_flips(kl, 0.045), q, rtol=0.12)


def test_without_probes_of_the_whole_model_nothing_is_assumed() -> None:
    assert fit_flips(UNITS, ROUTERS, np.ones(len(UNITS)), []) == (0.0, 0.0)
