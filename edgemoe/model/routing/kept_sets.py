"""This module makes a menu of kept sets from the replay tokens of one layer: for each kept count, the set with the least loss.

When experts are dropped, the router picks again among the kept ones, so the losses of single drops do not add up.  The Gram matrix of the
outputs of a token's candidate experts prices every kept set without running an expert again (docs/pricing.md, 3; the Gram identity is that
of NAEE, ACL 2024):

    y_t(S) = sum_e g_te(S) f_te,   |y_t(S) - y_t|^2 = dg_t' G_t dg_t,   G_t[i, j] = <f_ti, f_tj>,   dg_t = g_t(S) - g_t

Sets are found by backward greedy elimination, then improved by swaps where that is affordable.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from edgemoe.base.types import F64
from edgemoe.ir.model import Router
from edgemoe.model.routing.rule import ALONE, open_experts, weigh_scores

MAX_COUNTS = 64  # kept counts offered
SWAP_UP_TO = 16  # experts; with more, swaps cost minutes a layer and gain little
COLD_TOKENS = 100  # routed tokens below which an expert's statistics alone are not reliable
SHRINK_TOKENS = 32.0  # weight of the layer's mean, in tokens


def offered_counts(n_experts: int, router: Router) -> tuple[int, ...]:
    """Kept counts in the menu: all from top_k to n_experts, or 64 of them, evenly spread.

    With routing groups, the same number of experts must stay in each, and at least two, because the value of a group is the sum of its two
    best experts (DeepSeek-V3).  A router whose rule is not known keeps all experts.
    """
    if router.scoring == "unknown":  # nobody knows what the router does when an expert is gone
        return (n_experts,)
    groups = kept_groups(router)
    least = -(-router.top_k // groups) if groups == 1 else max(2, -(-router.top_k // groups))
    counts = np.linspace(least, n_experts // groups, min(MAX_COUNTS, n_experts // groups - least + 1))
    return tuple(int(n) * groups for n in np.unique(np.rint(counts)))


def kept_groups(router: Router) -> int:
    """Number of groups that must keep the same number of experts; 1 if the router has no groups or every token may choose from all."""
    return router.groups if router.groups > router.top_groups else 1


def drop_floor(count: NDArray[np.int64], energy: F64) -> F64:
    """The least cost of dropping each expert [E]: the layer's mean energy times a share that shrinks with the tokens that it saw."""
    floor: F64 = SHRINK_TOKENS / (SHRINK_TOKENS + count) * energy.mean()
    return np.where(count < COLD_TOKENS, floor, 0.0)


@dataclass(frozen=True, slots=True, kw_only=True)
class Replay:
    """The data of one layer's replay tokens that price any kept set (N tokens, E experts, K candidates in falling order)."""

    scores: F64  # [N, E] softmax or sigmoid of the router logits, from which gates are made
    choice: F64  # [N, E] the values by which experts are chosen
    candidates: NDArray[np.int64]  # [N, K]
    gram: F64  # [N, K, K] of the candidates' outputs
    weights: F64  # [N] in the loss: the token's share over the square of its stream
    shares: F64  # [N] in means over tokens, summing to 1
    floor: F64  # [E] least cost of dropping each expert, same unit as the loss
    router: Router


@dataclass(frozen=True, slots=True, kw_only=True)
class Menu:
    """For each kept count the set, its loss (mean |y(S) - y|^2 / |s|^2 per token) and the use of each kept expert; and the greedy path."""

    counts: tuple[int, ...]
    kept: NDArray[np.bool_]  # [C, E]
    loss: F64  # [C]
    gate_sq: F64  # [C, E] mean over tokens of g(S)^2
    order: NDArray[np.int64]  # [G] experts in the order in which they went
    path: F64  # [G + 1] loss when 0, 1, .. of them are gone


def make_replay(arrays: dict[str, NDArray[np.generic]], domain_weights: F64, router: Router) -> Replay:
    """A layer's arrays of Stats as a Replay; tokens of each domain share the domain's weight."""
    logits = arrays["replay_logits"].astype(np.float64)
    scores = weigh_scores(router, logits)
    choice = scores + arrays["router_bias"].astype(np.float64) if router.biased else scores
    candidates = arrays["candidates"].astype(np.int64)
    n, k = candidates.shape
    rows, cols = np.triu_indices(k)
    gram = np.zeros((n, k, k))
    gram[:, rows, cols] = arrays["gram"].astype(np.float64)
    gram[:, cols, rows] = gram[:, rows, cols]
    domain = arrays["replay_domain"].astype(np.int64)
    per_domain = np.bincount(domain, minlength=len(domain_weights))
    shares = domain_weights[domain] / per_domain[domain]
    weights = shares / np.maximum(arrays["replay_stream"].astype(np.float64), 1e-30)
    share = domain_weights[:, None] / np.maximum(arrays["tokens"].astype(np.float64)[:, None], 1.0)
    energy = (arrays["energy"].astype(np.float64) * share).sum(axis=0)
    floor = drop_floor(arrays["count"].astype(np.int64).sum(axis=0), energy) * weights.sum()
    return Replay(
        scores=scores,
        choice=choice,
        candidates=candidates,
        gram=gram,
        weights=weights,
        shares=shares / shares.sum(),
        floor=floor,
        router=router,
    )


@dataclass(frozen=True, slots=True)
class _Selection:
    """The router's choices from a kept set, for all tokens at once, on the columns (candidates) that matter."""

    router: Router
    candidates: NDArray[np.int64]  # [N, W]
    chosen: NDArray[np.bool_]  # [N, W] the top-k of the kept set
    runner_up: NDArray[np.bool_]  # [N, W] who would follow
    original: F64  # [N, W] gates with every expert kept
    p: F64  # [N, W]
    gram: F64  # [N, W, W]
    mass: F64  # [N] sum of the scores of the rows that are left

    def loss(self, chosen: NDArray[np.bool_], mass: F64, tokens: NDArray[np.bool_] | slice = slice(None)) -> F64:
        """|y(choice) - y|^2 of some tokens, gates as the runtime computes them from the rows that are left."""
        gates = gates_of(self.router, self.p[tokens] * chosen[tokens], mass[tokens])
        return _quadratic(self.gram[tokens], gates - self.original[tokens])


def gates_of(router: Router, chosen: F64, mass: F64) -> F64:
    """Gates [N, W] from the scores of the chosen experts, zero elsewhere, and from the sum of all kept experts' scores [N].

    The values of a softmax grow if there are fewer rows, while sigmoids do not depend on each other.
    """
    if router.renormalize:
        gates = chosen / np.maximum(chosen.sum(axis=1), 1e-30)[:, None]
    else:
        gates = chosen if router.scoring in ALONE else chosen / np.maximum(mass, 1e-30)[:, None]
    scaled: F64 = gates if router.scale == 1.0 else gates * router.scale
    return scaled


def _select(replay: Replay, kept: NDArray[np.bool_], original: F64) -> _Selection:
    """The selection from a kept set, cut down to the 2k + 1 columns whose gates can be other than zero."""
    top_k = replay.router.top_k
    alive = np.take_along_axis(open_experts(replay.router, replay.choice, kept), replay.candidates, axis=1)
    rank = alive.cumsum(axis=1)
    chosen, runner_up = alive & (rank <= top_k), alive & (rank == top_k + 1)
    width = min(2 * top_k + 1, chosen.shape[1])
    columns = np.argsort(~(chosen | runner_up | (original > 0)), axis=1, kind="stable")[:, :width]
    rows = np.arange(len(columns))[:, None]
    candidates = replay.candidates[rows, columns]
    return _Selection(
        router=replay.router,
        candidates=candidates,
        chosen=chosen[rows, columns],
        runner_up=runner_up[rows, columns],
        original=original[rows, columns],
        p=replay.scores[rows, candidates],
        gram=replay.gram[rows[:, :, None], columns[:, :, None], columns[:, None, :]],
        mass=replay.scores @ kept,
    )


def original_gates(replay: Replay) -> F64:
    """Gates of the candidates [N, K] with every expert kept: of the first top-k that a token may choose."""
    router, everyone = replay.router, np.ones(replay.scores.shape[1], bool)
    p = np.take_along_axis(replay.scores, replay.candidates, axis=1)
    alive = np.take_along_axis(open_experts(router, replay.choice, everyone), replay.candidates, axis=1)
    p[~(alive & (alive.cumsum(axis=1) <= router.top_k))] = 0
    gates = p / p.sum(axis=1, keepdims=True) if router.renormalize else p
    return gates if router.scale == 1.0 else gates * router.scale


def soft_gates(replay: Replay) -> F64:
    """A gate for every expert of every token [N, E], chosen or not, so that no expert is unseen."""
    router = replay.router
    if router.scoring == "softmax":
        return replay.scores
    chosen = original_gates(replay) > 0
    total = (np.take_along_axis(replay.scores, replay.candidates, axis=1) * chosen).sum(axis=1) if router.renormalize else 1.0
    soft: F64 = replay.scores * router.scale / np.reshape(np.maximum(total, 1e-30), (-1, 1))
    return soft


def set_loss(replay: Replay, kept: NDArray[np.bool_]) -> tuple[float, F64]:
    """Loss of one kept set, and mean squared gate of each expert under it [E]."""
    selection = _select(replay, kept, original_gates(replay))
    loss = float(replay.weights @ selection.loss(selection.chosen, selection.mass)) + float(replay.floor[~kept].sum())
    gates = gates_of(replay.router, selection.p * selection.chosen, selection.mass)
    gate_sq = np.zeros(len(kept))
    np.add.at(gate_sq, selection.candidates, gates**2 * replay.shares[:, None])
    return loss, gate_sq


def _quadratic(gram: F64, delta: F64) -> F64:
    result: F64 = ((gram @ delta[:, :, None])[:, :, 0] * delta).sum(axis=1)
    return result


def removal_losses(replay: Replay, kept: NDArray[np.bool_], original: F64) -> F64:
    """Loss of the kept set without each of its experts [E] (inf for experts not in it): all removals from one pass over the tokens."""
    selection = _select(replay, kept, original)
    base = selection.loss(selection.chosen, selection.mass)
    change = np.zeros(len(kept))  # against the loss of the set itself
    scaled = None
    if not replay.router.renormalize and replay.router.scoring == "softmax":  # every removal scales every token's gates
        scaled = _scaled_losses(replay, selection) - base[:, None]
        change += replay.weights @ scaled
    order = selection.chosen.cumsum(axis=1) * selection.chosen
    every = np.arange(len(order))
    for slot in range(1, replay.router.top_k + 1):
        here = order == slot
        tokens = here.any(axis=1)
        gone = selection.candidates[every, here.argmax(axis=1)]
        loss = selection.loss((selection.chosen & ~here) | selection.runner_up, selection.mass - replay.scores[every, gone], tokens)
        extra = loss - base[tokens]
        if scaled is not None:  # the scaling counted above does not apply where the expert was chosen
            extra -= scaled[tokens, gone[tokens]]
        np.add.at(change, gone[tokens], extra * replay.weights[tokens])
    total = float(replay.weights @ base) + float(replay.floor[~kept].sum()) + change + replay.floor
    return np.where(kept, total, np.inf)


def _scaled_losses(replay: Replay, selection: _Selection) -> F64:
    """Loss of each token [N, E] when a row that it has not chosen leaves the softmax: its gates grow by one factor."""
    raw = selection.p * selection.chosen * replay.router.scale
    weighted = (selection.gram @ raw[:, :, None])[:, :, 0]
    aa, ab = (weighted * raw).sum(axis=1), (weighted * selection.original).sum(axis=1)
    cc = _quadratic(selection.gram, selection.original)
    scale = 1 / np.maximum(selection.mass[:, None] - replay.scores, 1e-30)
    result: F64 = scale**2 * aa[:, None] - 2 * scale * ab[:, None] + cc[:, None]
    return result


def build_menu(replay: Replay, counts: tuple[int, ...]) -> Menu:
    """Kept sets for these counts (the largest is all experts): backward greedy, then swaps."""
    n_experts = replay.scores.shape[1]
    original = original_gates(replay)
    kept = np.ones(n_experts, bool)
    found: dict[int, NDArray[np.bool_]] = {n_experts: kept.copy()}
    order, path = [], [0.0]
    for count in range(n_experts - 1, min(counts) - 1, -1):
        losses = np.where(fullest_groups(replay.router, kept), removal_losses(replay, kept, original), np.inf)
        order.append(int(losses.argmin()))
        path.append(float(losses.min()))
        kept[order[-1]] = False
        if count in counts:
            found[count] = _improve_by_swaps(replay, kept.copy(), original) if n_experts <= SWAP_UP_TO else kept.copy()
    sets = np.stack([found[n] for n in counts])
    priced = [set_loss(replay, s) for s in sets]
    return Menu(
        counts=counts,
        kept=sets,
        loss=np.array([p[0] for p in priced]),
        gate_sq=np.stack([p[1] for p in priced]),
        order=np.array(order, np.int64),
        path=np.array(path),
    )


def fullest_groups(router: Router, kept: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """Experts [E] of the groups that have the most experts left; if only they lose experts, groups are equal after every round."""
    if router.groups <= router.top_groups:
        return np.ones(len(kept), bool)
    left = kept.reshape(router.groups, -1).sum(axis=1)
    return np.repeat(left == left.max(), len(kept) // router.groups)


def _improve_by_swaps(replay: Replay, kept: NDArray[np.bool_], original: F64) -> NDArray[np.bool_]:
    """Take back one dropped expert and drop the cheapest instead, as long as this lowers the loss."""
    loss = set_loss(replay, kept)[0]
    improved = True
    while improved:
        improved = False
        for expert in np.flatnonzero(~kept):
            trial = kept.copy()
            trial[expert] = True
            losses = np.where(fullest_groups(replay.router, trial), removal_losses(replay, trial, original), np.inf)
            worst = int(losses.argmin())
            if losses[worst] < loss * (1 - 1e-9):
                trial[worst] = False
                kept, loss, improved = trial, float(losses[worst]), True
    return kept
