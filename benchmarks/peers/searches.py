"""Searches of other projects choose a type for every tensor from errors, bytes and a size; they are rebuilt from their descriptions.

All know tensors (an expert stack is one) and types, and none knows drops.  U is the number of units, F of types; what cannot be stored
costs infinity.
"""

from __future__ import annotations

import heapq
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from edgemoe.base.types import F64
from edgemoe.ir import Model, Stats, Unit
from edgemoe.model.checkpoint import read_tensor
from edgemoe.quantize.importance import importance_of
from edgemoe.targets.gguf.formats import FORMATS, NARROW, OFFERED, WIDE, round_rows
from edgemoe.targets.gguf.writer import fixed_sizes
from edgemoe.targets.stacks import list_units
from peers.recipes import row_lengths, unit_bytes

TRIM = 0.01  # of the rows with the least and the largest error, where there are 100 or more
HALVINGS, DOUBLINGS = 40, 60  # of the price of a bit
SAMPLE_ROWS, EXPERT_ROWS = 256, 64
FLOOR_TIMES, FLOOR_MOST = 3.0, 6.5625  # bits per weight: small classes get min(3 times the target's, Q6_K's)
SMALL_CLASS = 0.1  # of the largest class's size
Sizes = NDArray[np.int64]


@dataclass(frozen=True, slots=True, kw_only=True)
class Shelf:
    """What the searches choose from: units, names of types, bytes [U, F] when `count` experts stay, and the bytes of all else."""

    units: tuple[Unit, ...]
    types: tuple[str, ...]
    size: Sizes
    offered: NDArray[np.bool_]
    fixed: int

    def name(self, picks: Sequence[int] | NDArray[np.intp]) -> dict[str, str]:
        """Choices as types by unit."""
        return {u.name: self.types[f] for u, f in zip(self.units, picks, strict=True)}


def make_shelf(model: Model, count: int) -> Shelf:
    """All types that we offer ourselves, for every unit."""
    units, cols = tuple(list_units(model)), row_lengths(model)
    offered = np.array([[f in offered_types(cols[u.name]) for f in OFFERED] for u in units])
    size = np.full(offered.shape, 2**60, np.int64)
    for u, f in np.argwhere(offered):
        size[u, f] = unit_bytes(model, units[u], OFFERED[f], count)
    return Shelf(units=units, types=OFFERED, size=size, offered=offered, fixed=fixed_sizes(model, [count])[0])


def offered_types(cols: int) -> tuple[str, ...]:
    """Types for rows of this length."""
    return WIDE if cols % 256 == 0 else tuple(name for name in NARROW if cols % FORMATS[name].block == 0)


def least_picks(size: Sizes) -> NDArray[np.intp]:
    """The smallest type of every unit."""
    return size.argmin(axis=1)


def total(size: Sizes, picks: Sequence[int] | NDArray[np.intp]) -> int:
    """Bytes of a choice."""
    return int(size[np.arange(len(size)), picks].sum())


# ------------------------------------------------------------------------------------- --target-size, llama.cpp pull request 15550
def output_errors(model: Model, stats: Stats) -> dict[str, F64]:
    """Error of each matrix of each unit in each type, by unit name: [experts or 1, F].

    llama.cpp pull request 15550 (EAddario): on sampled rows, sum_j v_j (y_j - x_j)^2 / sum_j v_j x_j^2 with v the importance matrix, the
    mean over rows without the outermost hundredth, times the number of rows.  The parts that need mean activations, which llama.cpp's own
    importance matrix does not hold, are left out, as they are there for such a file.
    """
    cols, found = row_lengths(model), {}
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        for unit in list_units(model):
            importance = importance_of(model, stats, unit.layer)
            tensors = sorted((t for t in model.tensors if (t.role, t.layer) == (unit.role, unit.layer)), key=lambda t: t.expert)
            jobs = []
            for tensor in tensors:
                rows = read_tensor(model.folder, tensor)
                wanted = EXPERT_ROWS if unit.is_stack else SAMPLE_ROWS
                sample = rows[np.unique(np.linspace(0, len(rows) - 1, min(len(rows), wanted)).round().astype(int))]
                values = importance.get((tensor.role, tensor.expert))
                jobs.append([pool.submit(row_error, sample, name, values, len(rows)) for name in offered_types(cols[unit.name])])
            errors = np.full((len(tensors), len(OFFERED)), np.inf)
            for e, row in enumerate(jobs):
                errors[e, [OFFERED.index(name) for name in offered_types(cols[unit.name])]] = [job.result() for job in row]
            found[unit.name] = errors
    return found


def row_error(rows: NDArray[np.float32], kind: str, importance: NDArray[np.float32] | None, n_rows: int) -> float:
    """Relative weighted error of sampled rows, for all `n_rows`."""
    values = np.ones(rows.shape[1]) if importance is None else importance.astype(np.float64)
    delta = round_rows(rows, kind, importance).astype(np.float64) - rows
    return n_rows * trimmed_mean((delta**2 @ values) / np.maximum(rows.astype(np.float64) ** 2 @ values, 1e-30))


def trimmed_mean(values: F64) -> float:
    """Mean without the outermost hundredth at each end."""
    cut = int(TRIM * len(values)) if len(values) >= 100 else 0
    return float(np.sort(values)[cut : len(values) - cut].mean())


def target_boosts(units: Sequence[Unit], bits: float) -> F64:
    """The search's factors on errors: output 3, attn_v 1.25, a tied embedding 2.5 from 2.2 bits per weight on."""
    tied = not any(u.role == "output" for u in units)
    boosts = {"output": 3.0, "attn_v": 1.25} | ({"token_embd": 2.5} if tied and bits >= 2.2 else {})
    return np.array([boosts.get(u.role, 1.0) for u in units])


def search_target(shelf: Shelf, errors: F64, boosts: F64, room: int) -> dict[str, str] | None:
    """Types for a file of at most `room` bytes as pull request 15550 finds them: the price of a bit by bisection, then greedy upgrades.

    choice = argmin error + price / boost * bits; of the prices that fit, the plan nearest below the size; what is left goes to the upgrades
    with the largest boost * error saved per byte.  It would clamp a size that cannot be met; here there is no such peer.
    """
    left = room - shelf.fixed
    error = np.where(pareto(errors, shelf.size), errors, np.inf)
    if total(shelf.size, least_picks(np.where(np.isfinite(error), shelf.size, 2**60))) > left:
        return None

    def choose(price: float) -> NDArray[np.intp]:
        value = np.where(np.isfinite(error), error + price / boosts[:, None] * 8 * shelf.size, np.inf)
        return np.array([np.lexsort((shelf.size[u], value[u]))[0] for u in range(len(value))])

    low, high = 0.0, float(np.nanmax(errors[np.isfinite(errors)])) / (8 * max(left, 1))
    for _ in range(DOUBLINGS):
        if total(shelf.size, choose(high)) <= left:
            break
        high *= 2
    best = choose(high)
    for _ in range(HALVINGS):
        middle = (low + high) / 2
        picks = choose(middle)
        if total(shelf.size, picks) <= left:
            high = middle
            best = max(best, picks, key=lambda p: total(shelf.size, p))
        else:
            low = middle
    return shelf.name(_upgrade(shelf.size, boosts[:, None] * error, best, left))


def pareto(errors: F64, size: Sizes) -> NDArray[np.bool_]:
    """Types of each unit that no smaller or equal type beats."""
    kept = np.zeros(errors.shape, bool)
    for u in range(len(errors)):
        least = np.inf
        for f in np.lexsort((errors[u], size[u])):
            if errors[u, f] < least:
                kept[u, f], least = True, errors[u, f]
    return kept


def _upgrade(size: Sizes, value: F64, picks: NDArray[np.intp], left: int) -> NDArray[np.intp]:
    """Spend what is left on single steps upward, the largest gain per byte first."""
    picks, left = picks.copy(), left - total(size, picks)
    heap: list[tuple[float, int, int]] = []

    def push(u: int) -> None:
        above = [f for f in range(size.shape[1]) if np.isfinite(value[u, f]) and size[u, f] > size[u, picks[u]]]
        if above:
            f = min(above, key=lambda f: size[u, f])
            heapq.heappush(heap, (-(value[u, picks[u]] - value[u, f]) / (size[u, f] - size[u, picks[u]]), u, f))

    for u in range(len(size)):
        push(u)
    while heap:
        gain, u, f = heapq.heappop(heap)
        cost = int(size[u, f] - size[u, picks[u]])
        if gain < 0 and cost <= left:
            picks[u], left = f, left - cost
            push(u)
    return picks


# --------------------------------------------------------------------------------------------- greedy, Thireus/GGUF-Tool-Suite
def search_greedy(
    shelf: Shelf, sensitivity: F64, curve: dict[str, float], room: int, weights: int, *, pinned: bool
) -> dict[str, str] | None:
    """Types for a file of at most `room` bytes as `quant_assign.py --use-greedy-quant-assign` finds them.

    Damage = sum over tensors of sensitivity (KL with this tensor alone at the worst type) times the curve (KL of the whole model at a
    type).  From the largest type down, the step that adds least damage per byte saved, until it fits; then back up with what is left.
    Gate and up of a layer share a type.  Small classes of tensors have a floor where that leaves room; embedding and output are Q8_0 if
    `pinned`.  Source: docs/quant_assign.md of Thireus/GGUF-Tool-Suite.

    Args:
        shelf: what there is.
        sensitivity: KL in nats of each unit [U].
        curve: KL in nats by type.
        room: bytes.
        weights: of the model, for the floor, which is a multiple of the target's bits per weight.
        pinned: hold embedding and output at Q8_0.
    """
    ladder = _ladder(shelf, curve)
    groups = _tie_gate_and_up(shelf.units)
    size = np.array([[int(sum(shelf.size[u, f] for u in g)) for f in ladder] for g in groups], np.int64)
    damage = np.array([sensitivity[g].sum() for g in groups])[:, None] * np.array([curve[shelf.types[f]] for f in ladder])
    floor = _floors(shelf, groups, ladder, 8 * (room - shelf.fixed) / weights)
    top = ladder.index(shelf.types.index("Q8_0"))
    ends = np.array([shelf.units[g[0]].layer < 0 for g in groups])
    lowest, highest = np.where(ends & pinned, top, floor), np.where(ends & pinned, top, len(ladder) - 1)
    left = room - shelf.fixed
    if total(size, lowest) > left:
        lowest = np.where(ends & pinned, top, 0)
    if total(size, lowest) > left:
        return None
    picks = _descend(size, damage, lowest, highest, left)
    chosen = np.zeros(len(shelf.units), int)
    for g, pick in zip(groups, picks, strict=True):
        chosen[g] = ladder[pick]
    return shelf.name([int(f) for f in chosen])


def _descend(size: Sizes, damage: F64, lowest: NDArray[np.intp], highest: NDArray[np.intp], left: int) -> NDArray[np.intp]:
    """Cheapest steps down from `highest` until it fits, then steps up, most damage undone per byte first."""
    picks, used = highest.copy(), total(size, highest)

    def rate(g: int, up: int) -> float:
        f = picks[g]
        return float((damage[g, f - 1 + up] - damage[g, f + up]) / max(int(size[g, f + up] - size[g, f - 1 + up]), 1))

    while used > left:
        g = min((g for g in range(len(size)) if picks[g] > lowest[g]), key=lambda g: rate(g, 0))
        used += int(size[g, picks[g] - 1] - size[g, picks[g]])
        picks[g] -= 1
    while True:
        fits = [g for g in range(len(size)) if picks[g] < highest[g] and used + size[g, picks[g] + 1] - size[g, picks[g]] <= left]
        if not fits:
            return picks
        g = max(fits, key=lambda g: rate(g, 1))
        used += int(size[g, picks[g] + 1] - size[g, picks[g]])
        picks[g] += 1


def _ladder(shelf: Shelf, curve: dict[str, float]) -> list[int]:
    """Types that every unit can have and the curve knows, smallest first, without those that a smaller one beats."""
    shared = [f for f in range(len(shelf.types)) if shelf.offered[:, f].all() and shelf.types[f] in curve]
    shared.sort(key=lambda f: (FORMATS[shelf.types[f]].bpw, curve[shelf.types[f]]))
    return [f for i, f in enumerate(shared) if all(curve[shelf.types[f]] < curve[shelf.types[g]] for g in shared[:i])]


def _tie_gate_and_up(units: Sequence[Unit]) -> list[list[int]]:
    groups: dict[object, list[int]] = {}
    for u, unit in enumerate(units):
        groups.setdefault(("gate and up", unit.layer) if unit.role in ("ffn_gate_exps", "ffn_up_exps") else unit.name, []).append(u)
    return list(groups.values())


def _floors(shelf: Shelf, groups: list[list[int]], ladder: list[int], bits: float) -> NDArray[np.intp]:
    """The lowest step of each group: small classes of tensors (of one role) keep to a multiple of the target's bits per weight."""
    classes: dict[str, int] = {}
    for unit in shelf.units:
        classes[unit.role] = classes.get(unit.role, 0) + unit.n_weights
    least = min(FLOOR_TIMES * bits, FLOOR_MOST)
    step = next((i for i, f in enumerate(ladder) if FORMATS[shelf.types[f]].bpw >= least), len(ladder) - 1)
    small = [classes[shelf.units[g[0]].role] < SMALL_CLASS * max(classes.values()) for g in groups]
    return np.where(small, step, 0)


# ----------------------------------------------------------------------------------------- collaborative compression (2509.25689)
def raise_most_sensitive(shelf: Shelf, gain: F64, room: int) -> dict[str, str] | None:
    """Types for a file of at most `room` bytes as arXiv 2509.25689 describes its search (the drop comes before it).

    Everything in one low type, the largest that fits; then the tensors that gained most when raised alone go one type up, while memory
    allows; one that would overflow is passed over.

    Args:
        shelf: what there is, for the experts that stay.
        gain: nats of KL that raising each unit alone saved [U].
        room: bytes.
    """
    names = [f for f in range(len(shelf.types)) if shelf.offered[:, f].all()]
    ladder = sorted(names, key=lambda f: FORMATS[shelf.types[f]].bpw)
    fitting = [i for i, f in enumerate(ladder) if shelf.fixed + int(shelf.size[:, f].sum()) <= room]
    if not fitting:
        return None
    base = fitting[-1]
    picks = [ladder[base]] * len(shelf.units)
    left = room - shelf.fixed - int(shelf.size[:, ladder[base]].sum())
    above = ladder[min(base + 1, len(ladder) - 1)]
    for u in np.argsort(-gain, kind="stable"):
        cost = int(shelf.size[u, above] - shelf.size[u, ladder[base]])
        if gain[u] > 0 and cost <= left:
            picks[u], left = above, left - cost
    return shelf.name(picks)
