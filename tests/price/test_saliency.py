"""Published expert scores, against worked examples in closed form."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
import torch
from strategies import random_costs

from edgemoe.base.errors import UsageError
from edgemoe.base.storage import array_file, save_arrays
from edgemoe.calibrate.observer import LayerObserver
from edgemoe.ir import Costs, Domain, Stats
from edgemoe.ir.model import Expert
from edgemoe.plan.solve import solve_plan
from edgemoe.price.saliency import SCORES, drops_by_score, output_spread, score_experts, top_logits
from edgemoe.stream.windows import Windows

TOKENS, EXPERTS, HIDDEN, TOP = 6, 4, 3, 2
T, E, CHANNEL = np.arange(TOKENS), np.arange(EXPERTS), np.arange(HIDDEN)
LOGITS = 2 * np.sin(0.7 * T[:, None] + 1.3 * E + 0.2)
OUTPUTS = (0.5 + 0.25 * E)[None, :, None] * np.cos(0.9 * T[:, None, None] + 0.4 * E[None, :, None] + 1.1 * CHANNEL)
PROBS = np.exp(LOGITS) / np.exp(LOGITS).sum(axis=1, keepdims=True)
STREAM = 1 + 0.1 * T[:, None] + 0.2 * CHANNEL  # before the layer
CHOSEN = np.argsort(-PROBS, axis=1)[:, :TOP]

# Computed by hand for this router with top-2 gates that are renormalised; sums over tokens.
GOLDEN = {
    "frequency": (4, 3, 2, 3),
    "gate-sum": (2.442256, 1.481963, 0.339844, 1.735938),
    "ean": (2.458219, 2.753627, 2.442074, 4.574053),
    "man": (0.614555, 0.917876, 1.221037, 1.524684),
    "msan": (0.377857, 0.842958, 1.491952, 2.325632),
    "reap-sum": (1.489379, 1.376260, 0.417523, 2.620120),
    "reap": (0.372345, 0.458753, 0.208761, 0.873373),
    "energy": (0.626890, 0.803529, 0.093070, 2.901659),
    "easy-ep": (0.037359, 0.105121, 0.032453, 0.055789),
}
RAW = {"gate-sum": (2.270480, 1.322046, 0.300116, 1.606852), "reap": (0.346082, 0.408817, 0.184114, 0.808397)}
PER_TOKEN = {"frequency", "gate-sum", "ean", "reap-sum", "energy", "easy-ep"}  # ours are means over tokens


def watched(tmp_path: Path, *, renormalize: bool) -> Stats:
    """What calibration writes of one layer that gave these logits and outputs."""
    gates = np.take_along_axis(PROBS, CHOSEN, axis=1)
    gates = gates / gates.sum(axis=1, keepdims=True) if renormalize else gates
    windows = Windows(tokens=np.zeros((1, TOKENS), np.int64), lengths=np.array([TOKENS]), domain=np.zeros(1, np.int64))
    shape = cast(Any, SimpleNamespace(n_experts=EXPERTS, hidden_size=HIDDEN, expert=Expert(size=2), moe_layers=()))
    sums = LayerObserver(shape, windows, 1, np.ones(1))
    for e in range(EXPERTS):
        token, slot = np.nonzero(e == CHOSEN)
        f, g = torch.from_numpy(OUTPUTS[token, e]), torch.from_numpy(gates[token, slot]).float()
        sums._on_expert(e, torch.from_numpy(token), torch.zeros(len(token), HIDDEN), torch.zeros(len(token), 2), f, g)
    output = np.einsum("tk,tkh->th", gates, np.take_along_axis(OUTPUTS, CHOSEN[:, :, None], axis=1))
    sums.recorder.moe_output = torch.from_numpy(output)
    states = torch.from_numpy(STREAM + output)[None]
    arrays = {**sums.finish(states), "tokens": np.array([TOKENS]), "replay_logits": LOGITS, "replay_domain": np.zeros(TOKENS, np.int32)}
    save_arrays(tmp_path / array_file(0), arrays)
    domain = Domain(name="d", weight=1.0, tokens=TOKENS, sha256="")
    return Stats(folder=str(tmp_path), model="m", key="k", settings={}, domains=(domain,), probes=(), cold=())


@pytest.mark.parametrize("name", GOLDEN)
def test_a_score_equals_the_worked_example(name: str, tmp_path: Path) -> None:
    found = score_experts(watched(tmp_path, renormalize=True), 0, name) * (TOKENS if name in PER_TOKEN else 1)
    np.testing.assert_allclose(found, GOLDEN[name], atol=2e-6)


@pytest.mark.parametrize("name", RAW)
def test_gates_that_the_model_does_not_renormalise_count_as_they_are(name: str, tmp_path: Path) -> None:
    found = score_experts(watched(tmp_path, renormalize=False), 0, name) * (TOKENS if name in PER_TOKEN else 1)
    np.testing.assert_allclose(found, RAW[name], atol=2e-6)


def test_collaborative_and_tcess_equal_the_worked_example(tmp_path: Path) -> None:
    stats = watched(tmp_path, renormalize=False)
    np.testing.assert_allclose(score_experts(stats, 0, "collaborative"), (0.617143, 0.470341, 0.241696, 0.517809), atol=1e-6)
    np.testing.assert_allclose(score_experts(stats, 0, "tcess"), (0.581760, 0.601997, 0, 0.515453), atol=1e-6)
    np.testing.assert_allclose(top_logits(LOGITS, np.full(TOKENS, 7.0)), (0.581760, 0.601997, 0, 0.515453), atol=1e-6)


def test_mone_equals_the_worked_example(tmp_path: Path) -> None:
    stats = watched(tmp_path, renormalize=False)  # MoNE's gates are the softmax over all experts
    mone, gate = score_experts(stats, 0, "mone"), score_experts(stats, 0, "gate-sum")
    np.testing.assert_allclose(mone, (0.225661, 0.164956, 0.066546, 0.339427), atol=1e-6)
    np.testing.assert_allclose(mone / gate, (0.596333, 0.748639, 1.330402, 1.267423), atol=1e-6)


def test_an_expert_that_saw_one_token_or_none_has_no_spread() -> None:
    one = {"count": np.array([0.0, 0.1]), "norm_sq": np.array([0.0, 0.5])}
    assert output_spread(one, np.array([0, 1]), np.array([[0.0, 0.0], [0.1, 0.2]])).tolist() == [0, 0]


@pytest.fixture
def scored(tmp_path: Path) -> tuple[Costs, Stats]:
    costs = random_costs(3, "stacks", layers=1, experts=EXPERTS, domains=1)
    return costs, watched(tmp_path, renormalize=True)


@pytest.mark.parametrize("name", SCORES)
def test_drops_by_a_score_follow_its_order_and_cost_as_much_in_all(name: str, scored: tuple[Costs, Stats]) -> None:
    costs, stats = scored
    score = score_experts(stats, 0, name)
    found = drops_by_score(costs, stats, name)
    for c, count in enumerate(found.counts):
        assert set(np.flatnonzero(found.kept[c, 0])) == set(np.argsort(-score, kind="stable")[:count])
    assert found.drop_cost.sum() == pytest.approx(costs.drop_cost.sum())
    lost = [float(np.maximum(score, 0)[~kept[0]].sum()) for kept in found.kept]
    np.testing.assert_allclose(found.drop_cost[0, :, 0] * sum(lost), np.array(lost) * found.drop_cost.sum(), rtol=1e-9)
    assert (found.cost == costs.cost).all()
    plan = solve_plan(found, 10**12)
    assert set(plan.kept[0]) == set(np.argsort(-score, kind="stable")[: plan.count])


def test_an_unknown_score_is_refused_by_name(scored: tuple[Costs, Stats]) -> None:
    with pytest.raises(UsageError, match="magic"):
        drops_by_score(*scored, "magic")
