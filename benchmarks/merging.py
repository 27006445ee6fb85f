"""This script compares dropping and repairing with merging, by KL on held-out text at the same kept counts, with nothing quantized.

    python benchmarks/merging.py [--work DIR] [--tokens 5120] [--calibration-tokens 16384]

Kept sets are the menu's own at 3/4 and 1/2.  "merge": each dropped expert goes into the survivor whose outputs are most like its own (mean
cosine over the replayed calibration tokens, every expert run on every token, as in HC-SMoE, arXiv 2410.08589); its neurons are first put in
the survivor's order (assignment that is best by the sum of the inner products of gate rows, up rows and down columns, as in M-SMoE, arXiv
2310.01334); then the three matrices are averages by frequency.  The router keeps the survivors' rows (REAM).  After that the same repair as
after a drop, from there.  "gain": one number for each survivor, folded into W_down, all of a layer by joint least squares.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import table
import torch
from arguments import make_parser
from measure import Reference
from numpy.typing import NDArray

from edgemoe.base.types import F64
from edgemoe.calibrate.collect import collect_stats
from edgemoe.ir import PROJECTIONS, Model, Plan, Stats
from edgemoe.model.checkpoint import read_tensor
from edgemoe.model.inspect import inspect_model
from edgemoe.model.overlay import open_overlay, save_overlay
from edgemoe.model.routing.kept_sets import build_menu, make_replay, offered_counts
from edgemoe.repair.experts import Experts, Tokens
from edgemoe.repair.reconstruct import Change, refit_layer, resume
from edgemoe.repair.survivors import EPOCHS, repair_survivors
from edgemoe.repair.two_streams import TwoStreams
from edgemoe.stream.texts import Text, choose_texts

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
from tiny import flat_plan

SHARES = (0.75, 0.5)
BLOCK = 4096  # tokens
COLUMNS = """\
"Drop" removes the experts outside the menu's own kept set, and "merge" averages each of them by frequency into the survivor whose outputs
are most like its own.  "Gain only" fits one number for each survivor, "W_down closed form" refits that matrix by least squares, and
"descent" refits all three matrices as `edgemoe build` does.  The last two columns are the mean KL of a way over the mean KL of "drop",
and over that of "ours"."""


# ------------------------------------------------------------------------------------------------------------------ merging
def output_cosine(stats: Stats, layer: int, n_experts: int) -> F64:
    """Mean cosine of the outputs of every two experts over the replayed tokens [E, E]."""
    arrays = stats.arrays(layer)
    candidates, packed = arrays["candidates"], arrays["gram"]
    if candidates.shape[1] != n_experts:
        raise SystemExit("replay holds some experts' outputs only: no cosine of all")
    rows, cols = np.triu_indices(n_experts)
    norm = np.sqrt(packed[:, rows == cols])  # [N, E] in the order of candidates
    cosine = packed / np.maximum(norm[:, rows] * norm[:, cols], 1e-30)
    total = np.zeros((n_experts, n_experts))
    np.add.at(total, (candidates[:, rows], candidates[:, cols]), cosine)
    both = total + total.T
    np.fill_diagonal(both, 2 * len(packed))
    return both / len(packed)


def assign(score: F64) -> NDArray[np.int64]:
    """For every row the column of the one-to-one assignment with the largest sum (Hungarian method, shortest augmenting paths)."""
    n = len(score)
    cost, potential_row, potential_col = -score, np.zeros(n), np.zeros(n)
    row_of = np.full(n, -1)
    for start in range(n):
        row, distance, done, before = start, np.full(n, np.inf), np.zeros(n, bool), np.full(n, -1)
        col, reached = -1, 0.0
        while True:
            through = reached + cost[row] - potential_row[row] - potential_col
            better = ~done & (through < distance)
            distance[better], before[better] = through[better], col
            col = int(np.where(done, np.inf, distance).argmin())
            reached, done[col] = distance[col], True
            if row_of[col] < 0:
                break
            row = int(row_of[col])
        visited = done.copy()
        visited[col] = False
        potential_row[row_of[visited]] += reached - distance[visited]
        potential_col[visited] -= reached - distance[visited]
        potential_row[start] += reached
        while col >= 0:
            row_of[col] = start if before[col] < 0 else row_of[before[col]]
            col = int(before[col])
    result = np.empty(n, np.int64)
    result[row_of] = np.arange(n)
    return result


def read_expert(model: Model, layer: int, expert: int) -> dict[str, NDArray[np.float32]]:
    """The three matrices of an expert of the original."""
    return {p: read_tensor(model.folder, model.get(f"ffn_{p}_exps", layer, expert)) for p in PROJECTIONS}


def align(other: dict[str, NDArray[np.float32]], to: dict[str, NDArray[np.float32]]) -> dict[str, NDArray[np.float32]]:
    """The same expert with its neurons in the order of those of `to` that they are most like."""
    order = assign((to["gate"] @ other["gate"].T + to["up"] @ other["up"].T + to["down"].T @ other["down"]).astype(np.float64))
    return {"gate": other["gate"][order], "up": other["up"][order], "down": other["down"][:, order]}


def merger(model: Model, stats: Stats, plan: Plan) -> Change:
    """What puts each dropped expert into its most similar survivor."""

    def change(layer: int, _: Tokens, experts: Experts) -> Experts:
        kept, arrays = plan.kept_of[layer], stats.arrays(layer)
        used = stats.weights @ (arrays["count"] / np.maximum(arrays["tokens"], 1)[:, None])
        cosine = output_cosine(stats, layer, model.n_experts)
        total = {e: {p: used[e] * w for p, w in read_expert(model, layer, e).items()} for e in kept}
        weight = {e: used[e] for e in kept}
        for gone in sorted(set(range(model.n_experts)) - set(kept)):
            into = kept[int(cosine[gone, list(kept)].argmax())]
            moved = align(read_expert(model, layer, gone), read_expert(model, layer, into))
            weight[into] += used[gone]
            for p in PROJECTIONS:
                total[into][p] += used[gone] * moved[p]
        for n, expert in enumerate(kept):
            for p, stack in zip(PROJECTIONS, experts.stacks, strict=True):
                stack[n] = torch.from_numpy((total[expert][p] / weight[expert]).astype(np.float32))
        return experts

    return change


def scale_experts(_: int, tokens: Tokens, experts: Experts) -> Experts:
    """One gain for each survivor: the least-squares answer to sum_t lambda_t |y_t - sum_e a_e g_te f_te|^2, over the fitted tokens."""
    n = len(experts)
    normal, right = np.zeros((n, n)), np.zeros(n)
    fitted = np.flatnonzero(~tokens.guard)
    for rows in np.array_split(fitted, -(-len(fitted) // BLOCK)):
        x, chosen = torch.from_numpy(np.asarray(tokens.x[rows])), tokens.chosen[rows]
        outputs = torch.zeros(n, *x.shape)
        for e in range(n):
            token, slot = np.nonzero(chosen == e)
            outputs[e, token] = experts.hidden(e, x[token]) @ experts.down[e].T * torch.from_numpy(tokens.gates[rows][token, slot])[:, None]
        weighted = outputs * torch.from_numpy(tokens.weights[rows])[None, :, None]
        normal += np.array([[float((weighted[a] * outputs[b]).sum()) for b in range(n)] for a in range(n)])
        right += np.array([float((w * torch.from_numpy(np.asarray(tokens.target[rows]))).sum()) for w in weighted])
    gains = np.linalg.lstsq(normal, right, rcond=None)[0]
    experts.down *= torch.from_numpy(gains.astype(np.float32))[:, None, None]
    return experts


# ---------------------------------------------------------------------------------------------------------------- measuring
def menu_sets(model: Model, stats: Stats, count: int) -> list[list[int]]:
    """The kept sets that plans choose from, at one count."""
    counts = offered_counts(model.n_experts, model.router)
    sets = []
    for layer in range(model.n_layers):
        replay = make_replay(stats.arrays(layer), stats.weights, model.router)
        sets.append(np.flatnonzero(build_menu(replay, counts).kept[counts.index(count)]).tolist())
    return sets


def changed(model: Model, texts: Sequence[Text], plan: Plan, work: Path, name: str, change: Change, epochs: int, tokens: int) -> Model:
    """The survivors after `change` and a repair of so many epochs of descent (-1: none, 0: closed form alone)."""
    folder = work / f"{name.replace(' ', '-')}-{plan.count}-{tokens}"
    made = open_overlay(model, folder, {})
    if made is not None:
        return made
    streams = TwoStreams(model, model, texts, tokens, folder, name)
    for layer in resume(streams, None):
        refit_layer(streams, layer, plan.kept_of[layer], epochs=epochs, change=change)
    return save_overlay(model, folder, {})


def measure_model(source: str, work: Path, n_tokens: int, calibration_tokens: int) -> list[str]:
    """Table rows of one model."""
    model = inspect_model(source)
    work = (work / model.name).absolute()
    work.mkdir(parents=True, exist_ok=True)
    calibration, heldout = choose_texts([], [])
    stats = collect_stats(model, calibration, work, max_tokens=calibration_tokens)
    reference, rows = Reference(model, heldout, n_tokens, work), []
    for share in SHARES:
        plan = flat_plan(model, kept=menu_sets(model, stats, max(model.top_k, round(share * model.n_experts))))

        def repaired(epochs: int, plan: Plan = plan) -> Model:
            return repair_survivors(model, calibration, plan, work, max_tokens=calibration_tokens, epochs=epochs)

        def other(name: str, epochs: int, plan: Plan = plan) -> Model:
            change = scale_experts if name == "gain" else merger(model, stats, plan)
            return changed(model, calibration, plan, work, name, change, epochs, calibration_tokens)

        ways: dict[str, Callable[[], Model]] = {
            "drop": lambda: model,
            "drop, gain only": lambda: other("gain", -1),
            "drop, W_down closed form": lambda: repaired(0),
            "drop, then all three by descent (ours)": lambda: repaired(EPOCHS),
            "merge": lambda: other("merge", -1),
            "merge, W_down closed form": lambda: other("merge closed", 0),
            "merge, then all three by descent": lambda: other("merge descent", EPOCHS),
        }
        found: dict[str, tuple[NDArray[np.float64], float]] = {}
        for name, make in ways.items():
            start = time.perf_counter()
            made = make()
            seconds = time.perf_counter() - start
            found[name] = reference.kl_of_model(made, plan.kept), seconds
            print(model.name, plan.count, name, found[name], flush=True)
        ours = found["drop, then all three by descent (ours)"][0].mean()
        for name, (kl, _) in found.items():
            ratios = f"{kl.mean() / found['drop'][0].mean():.2f} | {kl.mean() / ours:.2f}"
            rows.append(f"| {model.name} | {plan.count} of {plan.n_experts} | {name} | **{kl.mean():.4f}** | {kl.max():.4f} | {ratios} |")
    return rows


def main() -> None:
    """Measure everything and write the table."""
    parser = make_parser(__doc__, work=True, tokens=5120, calibration_tokens=16_384, results="merging.md")
    parser.add_argument("--models", nargs="+", default=["examples/tiny-moe-b", "examples/tiny-moe"])
    options = parser.parse_args()
    rows = [row for source in options.models for row in measure_model(source, options.work, options.tokens, options.calibration_tokens)]
    lines = [f"# Drop or merge: KL (nats/token) on {options.tokens} held-out tokens, nothing quantized", ""]
    lines += [
        f"{table.made_by('python benchmarks/merging.py', 'cores')}; {options.calibration_tokens} calibration tokens.",
        "",
        COLUMNS,
        "",
    ]
    lines += [*table.head(["model", "kept", "way", "KL, mean of texts", "worst text", "over drop", "over ours"]), *rows, ""]
    table.save(options.results, "merging.md", lines)


if __name__ == "__main__":
    main()
