"""Kept sets and their prices, against direct computation."""

import itertools
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from edgemoe.ir import Router
from edgemoe.model.routing.kept_sets import (
    COLD_TOKENS,
    Replay,
    build_menu,
    drop_floor,
    make_replay,
    offered_counts,
    original_gates,
    removal_losses,
    set_loss,
)


def golden(*, renormalize: bool) -> Replay:
    """Six tokens, four experts, top-2: closed-form router logits and outputs."""
    t, e, i = np.arange(6), np.arange(4), np.arange(3)
    logits = 2 * np.sin(0.7 * t[:, None] + 1.3 * e + 0.2)
    outputs = (0.5 + 0.25 * e)[None, :, None] * np.cos(0.9 * t[:, None, None] + 0.4 * e[None, :, None] + 1.1 * i)
    return make(logits, outputs, 2, renormalize=renormalize)


def make(logits: np.ndarray, outputs: np.ndarray, top_k: int, *, renormalize: bool) -> Replay:
    probs = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    order = np.argsort(-probs, axis=1, kind="stable")
    sorted_outputs = np.take_along_axis(outputs, order[:, :, None], axis=1)
    n = len(logits)
    return Replay(
        scores=probs,
        choice=probs,
        candidates=order,
        gram=sorted_outputs @ sorted_outputs.transpose(0, 2, 1),
        weights=np.full(n, 1 / n),
        shares=np.full(n, 1 / n),
        floor=np.zeros(logits.shape[1]),
        router=Router(top_k=top_k, renormalize=renormalize),
    )


def direct_loss(logits: np.ndarray, outputs: np.ndarray, top_k: int, kept: np.ndarray, *, renormalize: bool) -> float:
    """The layer run twice, the second time with the experts really gone."""

    def block(columns: np.ndarray) -> np.ndarray:
        z = logits[:, columns]
        p = np.exp(z) / np.exp(z).sum(axis=1, keepdims=True)
        top = np.argsort(-p, axis=1, kind="stable")[:, :top_k]
        gates = np.take_along_axis(p, top, axis=1)
        if renormalize:
            gates = gates / gates.sum(axis=1, keepdims=True)
        return (gates[:, :, None] * np.take_along_axis(outputs[:, columns], top[:, :, None], axis=1)).sum(axis=1)

    return float(((block(np.flatnonzero(kept)) - block(np.arange(logits.shape[1]))) ** 2).sum(axis=1).mean())


GOLDEN = {
    (0,): 1.144384,
    (1,): 0.031558,
    (2,): 0.031453,
    (3,): 1.278745,
    (0, 1): 3.597837,
    (0, 2): 1.141010,
    (0, 3): 0.906367,
    (1, 2): 0.192611,
    (1, 3): 1.312503,
    (2, 3): 2.556748,
}
ENERGY = (0.626890, 0.803529, 0.093070, 2.901659)  # sum of g^2 |f|^2: what a drop would cost if the router did not choose again


@pytest.mark.parametrize(("gone", "loss"), GOLDEN.items())
def test_set_losses_equal_the_golden_values(gone: tuple[int, ...], loss: float) -> None:
    kept = np.array([e not in gone for e in range(4)])
    assert set_loss(golden(renormalize=True), kept)[0] * 6 == pytest.approx(loss, abs=1e-6)


def test_the_golden_menu_drops_the_best_pair_where_adding_up_energies_would_not() -> None:
    menu = build_menu(golden(renormalize=True), (2, 3, 4))
    assert np.flatnonzero(~menu.kept[1]).tolist() == [2] and np.flatnonzero(~menu.kept[0]).tolist() == [1, 2]
    assert np.argsort(ENERGY)[:2].tolist() == [2, 0] and GOLDEN[1, 2] < GOLDEN[0, 2] / 5


def test_dropping_one_more_expert_can_cost_less() -> None:
    assert GOLDEN[0, 2] < GOLDEN[0,]
    losses = [set_loss(golden(renormalize=True), np.array([e not in gone for e in range(4)]))[0] for gone in ((0,), (0, 2))]
    assert losses[1] < losses[0]


@pytest.mark.parametrize(("gone", "loss"), [((0,), 1.007515), ((1,), 0.023005), ((2,), 0.024037), ((3,), 1.116036)])
def test_without_renormalisation_the_rows_that_are_left_share_the_softmax(gone: tuple[int, ...], loss: float) -> None:
    kept = np.array([e not in gone for e in range(4)])
    assert set_loss(golden(renormalize=False), kept)[0] * 6 == pytest.approx(loss, abs=1e-6)


def test_a_token_counts_by_its_domain_and_over_the_square_of_its_own_stream() -> None:
    replay, domain, stream = golden(renormalize=True), np.array([0, 0, 0, 0, 1, 1]), np.array([1.0, 4, 9, 100, 2, 5])
    rows, cols = np.triu_indices(4)
    arrays = {
        "replay_logits": np.log(replay.scores),
        "candidates": replay.candidates,
        "gram": replay.gram[:, rows, cols],
        "replay_domain": domain,
        "replay_stream": stream,
        "tokens": np.array([4, 2]),
        "count": np.full((2, 4), 1000),
        "energy": np.ones((2, 4)),
    }
    made = make_replay(arrays, np.array([0.75, 0.25]), Router(top_k=2))
    kept = np.array([False, True, True, True])
    alone = [set_loss(replace(replay, weights=np.eye(6)[t]), kept)[0] for t in range(6)]  # each token's squared change
    by_hand = sum(share * change / square for share, change, square in zip([0.75 / 4] * 4 + [0.25 / 2] * 2, alone, stream, strict=True))
    assert set_loss(made, kept)[0] == pytest.approx(by_hand, rel=1e-9)
    assert by_hand < 0.75 * sum(alone)  # a large stream makes a change count less


@settings(max_examples=40, deadline=None)
@example(seed=142737, renormalize=False, top_k=1)  # an expert that goes holds nearly all of a token's scores, so that digits cancel
@given(seed=st.integers(0, 10**6), renormalize=st.booleans(), top_k=st.integers(1, 3))
def test_every_set_and_every_removal_costs_what_running_the_layer_says(seed: int, renormalize: bool, top_k: int) -> None:
    rng = np.random.default_rng(seed)
    logits, outputs = rng.normal(size=(12, 6)) * 2, rng.normal(size=(12, 6, 5))
    replay = make(logits, outputs, top_k, renormalize=renormalize)
    kept = rng.random(6) < 0.8
    kept[: top_k + 1] = True
    expected = direct_loss(logits, outputs, top_k, kept, renormalize=renormalize)
    assert set_loss(replay, kept)[0] == pytest.approx(expected, abs=1e-9)
    losses = removal_losses(replay, kept, original_gates(replay))
    for expert in np.flatnonzero(kept):
        without = kept.copy()
        without[expert] = False
        assert losses[expert] == pytest.approx(direct_loss(logits, outputs, top_k, without, renormalize=renormalize), rel=1e-7, abs=1e-9)
    assert np.isinf(losses[~kept]).all()


def test_the_menu_is_near_the_best_of_all_sets() -> None:
    rng = np.random.default_rng(0)
    ratios = []
    for _ in range(10):
        logits, outputs = rng.normal(size=(64, 7)) * 2, rng.normal(size=(64, 7, 5)) * rng.lognormal(size=(1, 7, 1))
        replay = make(logits, outputs, 2, renormalize=True)
        menu = build_menu(replay, (2, 3, 4, 5, 6, 7))
        assert menu.kept.sum(axis=1).tolist() == [2, 3, 4, 5, 6, 7]
        for count, loss in zip(menu.counts, menu.loss, strict=True):
            sets = [np.isin(np.arange(7), kept) for kept in itertools.combinations(range(7), count)]
            best = min(set_loss(replay, s)[0] for s in sets)
            assert loss >= best - 1e-12
            ratios.append(loss / best if best > 0 else 1.0)
    assert np.mean(ratios) < 1.02
    assert max(ratios) < 1.3


def test_experts_without_evidence_are_never_free() -> None:
    count, energy = np.array([1000, 0, 10, 500]), np.array([1.0, 0.0, 0.01, 0.5])
    floor = drop_floor(count, energy)
    assert floor[1] > floor[2] > 0
    assert floor[0] == floor[3] == 0
    assert (count[floor > 0] < COLD_TOKENS).all()


@given(n_experts=st.integers(2, 512), top_k=st.integers(1, 16))
def test_offered_counts_run_from_top_k_to_all(n_experts: int, top_k: int) -> None:
    top_k = min(top_k, n_experts)
    counts = offered_counts(n_experts, Router(top_k=top_k))
    assert counts[0] == top_k and counts[-1] == n_experts
    assert len(counts) <= 64
    assert list(counts) == sorted(set(counts))
