"""This script asks which figure predicts what a plan costs: every predictor prices random plans, and held-out text measures them.

    python benchmarks/predictors.py examples/tiny-moe [--plans 120] [--work DIR]

Plans touch one layer or all: experts dropped at random, tensors of the layers in formats at random, or both; nothing is repaired.
KL is measured in transformers with the target's own roundings (forward.py).  Rank correlation is Spearman's: within a layer (mean over
layers), across layers (plans that touch one layer, pooled), and among plans that touch all of them.  The ratio predicted / measured is
given for predictors in nats.  The forms (a) to (f) use the true change D of each layer's output on calibration text and gradients g of
sampled log-likelihoods with respect to it: (a) (sum_t g.D)^2, (b) sum_t (g.D)^2, (c) sum_t,i g_i^2 D_i^2, (d) sum_t mean_i(g_i^2) |D|^2,
(e) a layer's mean of that times |D|^2, (f) |D|^2; half of each, per token.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import table
import torch
from arguments import make_parser
from forward import MATRICES, STACKS, Forward
from measure import remembered

from edgemoe.base.storage import hash_json
from edgemoe.calibrate.collect import collect_stats
from edgemoe.ir import Costs, Model, Stats
from edgemoe.model.inspect import inspect_model
from edgemoe.model.routing.kept_sets import make_replay, set_loss
from edgemoe.pipeline.widths import price_cached
from edgemoe.price.saliency import SCORES, score_experts
from edgemoe.stream.layers import apply_norm
from edgemoe.stream.texts import choose_texts
from edgemoe.stream.windows import tokenize
from edgemoe.targets import find_target

FORMATS = ("IQ4_XS", "Q3_K", "Q2_K", "IQ2_XXS")
KINDS = ("drop", "quantize", "both")
SAMPLES = 4  # of the labels, for gradients
FORMS = "abcdef"
IN_NATS = ("ours", *(f"form ({c})" for c in FORMS[:5]))
COLUMNS = """\
Each plan touches one layer or all of them: experts are dropped at random, tensors get random formats, or both; nothing is repaired.  The
first three columns are Spearman rank correlations of a predictor with the KL measured: within a layer (the mean over layers), across
plans that touch one layer each, and among plans that touch all layers.  The last column is told for predictors in nats.  Forms (a) to (f)
use the true change D of a layer's output on calibration text and gradients g of sampled log-likelihoods: (a) is (sum_t g.D)^2, (b) is
sum_t (g.D)^2, (c) is sum_t,i g_i^2 D_i^2, (d) is sum_t mean_i(g_i^2) |D|^2, (e) is a layer's mean of that times |D|^2, and (f) is |D|^2,
each of them halved and per token.  "Ours" is what the price list says."""


@dataclass(frozen=True)
class Trial:
    """A random plan; `layer` is -1 where it touches all of them."""

    kind: str
    layer: int
    kept: list[list[int]]
    formats: dict[tuple[str, int], str]


def random_trials(model: Model, number: int) -> list[Trial]:
    """As many plans of every kind, two of five on all layers."""
    rng = np.random.default_rng(0)
    trials = []
    for i in range(number):
        kind = KINDS[i % 3]
        layer = -1 if i // 3 % 5 < 2 else int(i // 3 % model.n_layers)
        touched = range(model.n_layers) if layer < 0 else [layer]
        kept = [list(range(model.n_experts)) for _ in range(model.n_layers)]
        formats = {}
        count = int(rng.integers(max(model.top_k, model.n_experts // 2), model.n_experts))
        for one in touched:
            if kind != "quantize":
                kept[one] = sorted(int(e) for e in rng.choice(model.n_experts, count, replace=False))
            if kind != "drop":
                units = (*MATRICES, *STACKS)
                chosen = units if layer < 0 or kind == "both" else [units[int(rng.integers(len(units)))]]
                formats |= {(role, one): str(rng.choice(FORMATS)) for role in chosen}
        trials.append(Trial(kind, layer, kept, formats))
    return trials


class Pricer:
    """Every predictor of a plan, a number for each layer."""

    def __init__(self, model: Model, stats: Stats, costs: Costs, forward: Forward) -> None:
        self.model, self.stats, self.costs, self.forward = model, stats, costs, forward
        self.replays = [make_replay(stats.arrays(n), stats.weights, model.router) for n in range(model.n_layers)]
        self.drops = [self._menu_prices(layer) for layer in range(model.n_layers)]
        self.units = {(u.role, u.layer): n for n, u in enumerate(costs.units)}
        self.gradients = self._gradients()

    def _menu_prices(self, layer: int) -> tuple[np.ndarray, np.ndarray]:
        """Losses of the menu's sets, rising, and nats for each unit of loss."""
        losses = np.array([set_loss(self.replays[layer], kept[layer])[0] for kept in self.costs.kept[:-1]])
        order = np.argsort(losses)
        return losses[order], (self.costs.weights @ self.costs.drop_cost[:, :-1, layer] / losses)[order]

    def _gradients(self) -> list[torch.Tensor]:
        """Of the summed log-likelihood of labels drawn from the model, by each layer's output [samples, tokens, hidden]."""
        forward, output = self.forward, self.forward.weights["output", -1]
        torch.manual_seed(0)
        found: list[list[torch.Tensor]] = [[] for _ in forward.modules]
        for _ in range(SAMPLES):
            for number, index in enumerate(forward.chunks):
                states, outputs = forward.before[0][number].clone(), []
                for layer, module in enumerate(forward.modules):
                    forward._fill(layer, {}, {})
                    positions = torch.arange(states.shape[1])[None]
                    states = module(
                        states, attention_mask=None, position_ids=positions, position_embeddings=forward.stream._rotary(states, positions)
                    )
                    states = states[0] if isinstance(states, tuple) else states
                    if layer == 0:
                        states = states.detach()
                    if not states.requires_grad:
                        states.requires_grad_()
                    states.retain_grad()
                    outputs.append(states)
                real = (torch.arange(states.shape[1])[None] < torch.from_numpy(forward.windows.lengths[index])[:, None]).flatten()
                log_p = (apply_norm(states, forward.norm, forward.eps).flatten(0, 1)[real] @ output.T).log_softmax(-1)
                labels = torch.multinomial(log_p.detach().exp(), 1)
                log_p.gather(1, labels).sum().backward()
                for layer, out in enumerate(outputs):
                    assert out.grad is not None
                    found[layer].append(out.grad.flatten(0, 1))
        return [torch.cat(parts).view(SAMPLES, -1, self.model.hidden_size) for parts in found]

    def price(self, trial: Trial) -> dict[str, float]:
        """All predictors, summed over the layers that the plan touches."""
        total: dict[str, float] = {}
        for layer in range(self.model.n_layers):
            formats = {unit: name for unit, name in trial.formats.items() if unit[1] == layer}
            if len(trial.kept[layer]) == self.model.n_experts and not formats:
                continue
            parts = self._forms(layer, trial.kept, formats) | self._ours(layer, trial.kept[layer], formats)
            if trial.kind == "drop":
                parts |= self._scores(layer, trial.kept[layer])
            if trial.kind == "quantize":
                parts |= self._errors(formats)
            total = {name: total.get(name, 0.0) + value for name, value in parts.items()}
        total["ours"] = self.costs.predict_kl(total["ours"])
        return total

    def _forms(self, layer: int, kept: list[list[int]], formats: dict[tuple[str, int], str]) -> dict[str, float]:
        """Forms (a) to (f) from the layer's true change of output."""
        forward, g = self.forward, self.gradients[layer]
        alone = [kept[layer] if n == layer else list(range(self.model.n_experts)) for n in range(self.model.n_layers)]
        after = forward.layer_output(layer, formats, alone)
        delta = torch.cat([(a - b).flatten(0, 1) for a, b in zip(after, forward.before[layer + 1], strict=True)])
        n, dot, size = len(delta), (g * delta).sum(-1), delta.square().sum(-1)
        windows = dot.view(SAMPLES, -1, self.forward.windows.tokens.shape[1]).sum(-1)
        stream = torch.cat([x.flatten(0, 1) for x in forward.before[layer + 1]]).square().sum(-1)
        token = g.square().mean((0, 2))
        values = (
            windows.square().sum(1).mean(), dot.square().sum(1).mean(), (g.square().mean(0) * delta.square()).sum(),
            (token * size).sum(), token.mean() * size.sum(), size.sum(),
        )  # fmt: skip
        relative = {"(f) over the stream's own square": float((size / stream).sum()) / n}
        return {f"form ({c})": 0.5 * float(v) / n for c, v in zip(FORMS, values, strict=True)} | relative

    def _ours(self, layer: int, kept: list[int], formats: dict[tuple[str, int], str]) -> dict[str, float]:
        costs, mask = self.costs, np.isin(np.arange(self.model.n_experts), kept)
        loss = set_loss(self.replays[layer], mask)[0]
        drop = loss * float(np.interp(loss, *self.drops[layer]))
        c = costs.counts.index(len(kept))
        rounding = sum(float(costs.cost[c, self.units[unit], costs.formats.index(name)]) for unit, name in formats.items())
        if formats:
            return {"ours": drop + rounding}
        plain = replace(self.replays[layer], weights=self.replays[layer].shares)
        return {"ours": drop, "set-aware over the stream's square": loss, "set-aware": set_loss(plain, mask)[0]}

    def _scores(self, layer: int, kept: list[int]) -> dict[str, float]:
        """Published scores of the dropped experts, added up; and energy with the layer's constant."""
        gone = np.setdiff1d(np.arange(self.model.n_experts), kept)
        found = {name: float(score_experts(self.stats, layer, name)[gone].sum()) for name in SCORES}
        g = self.gradients[layer]
        return found | {"energy with form (e)'s constant": found["energy"] * 0.5 * float(g.square().mean())}

    def _errors(self, formats: dict[tuple[str, int], str]) -> dict[str, float]:
        """Errors of weights, plain, relative, and weighted by the importance matrix; PMQ's product of them with use and gates."""
        found = dict.fromkeys(("weight error", "relative weight error", "imatrix-weighted error", "PMQ product"), 0.0)
        for unit, name in formats.items():
            role, layer = unit
            whole, known = self.forward.weights[unit].numpy(), self.forward.importance[layer]
            square = (self.forward.store(unit, name).numpy() - whole) ** 2
            found["weight error"] += float(square.sum())
            found["relative weight error"] += float(square.sum() / (whole**2).sum())
            if whole.ndim == 2:
                error = float((square @ known[role, -1]).sum())
                found["imatrix-weighted error"] += error
                found["PMQ product"] += error**0.5
                continue
            each = np.array([float((s @ known[role, e]).sum()) for e, s in enumerate(square)])
            used, gates = (score_experts(self.stats, layer, score) for score in ("frequency", "gate-sum"))
            gate_sq = (self.stats.weights / self.stats.arrays(layer)["tokens"]) @ self.stats.arrays(layer)["gate_sq"]
            found["imatrix-weighted error"] += float(gate_sq @ each)
            found["PMQ product"] += float((used / used.sum() * (gates / gates.sum()) ** 1.5 * np.sqrt(gate_sq * each)).sum())
        return found


# ---------------------------------------------------------------------------------------------------------------- results
def spearman(a: np.ndarray, b: np.ndarray) -> float:
    """Rank correlation; ties share their mean rank."""
    ranks = [np.unique(v, return_inverse=True, return_counts=True) for v in (a, b)]
    means = [(np.cumsum(n) - (n - 1) / 2)[i] for _, i, n in ranks]
    return float(np.corrcoef(means[0], means[1])[0, 1]) if min(np.ptp(m) for m in means) > 0 else float("nan")


def cell(rows: list[tuple[Trial, float, dict[str, float]]], name: str) -> str:
    """Rank correlations of one predictor for one kind of plan: within layers, across, all layers touched; ratio of those in nats."""
    rows = [r for r in rows if name in r[2]]
    if not rows:
        return "- | - | - | -"

    def rank(part: list[tuple[Trial, float, dict[str, float]]]) -> float:
        return spearman(np.array([p[name] for _, _, p in part]), np.array([kl for _, kl, _ in part]))

    single, everywhere = [r for r in rows if r[0].layer >= 0], [r for r in rows if r[0].layer < 0]
    layers = sorted({t.layer for t, _, _ in single})
    within = float(np.mean([rank([r for r in single if r[0].layer == n]) for n in layers]))
    ratio = "-"
    if name in IN_NATS:
        low, middle, high = np.quantile([p[name] / kl for _, kl, p in rows], (0.1, 0.5, 0.9))
        ratio = f"{middle:.2f} ({low:.2f}-{high:.2f})"
    return f"{within:.2f} | {rank(single):.2f} | {rank(everywhere):.2f} | {ratio}"


def model_page(model: Model, rows: list[tuple[Trial, float, dict[str, float]]], note: str) -> str:
    """A table for each kind of plan."""
    lines = [f"# {model.name}: what predicts the KL of a plan ({len(rows)} random plans)", "", note, "", COLUMNS, ""]
    for kind in KINDS:
        mine = [r for r in rows if r[0].kind == kind]
        names = list(dict.fromkeys(name for _, _, p in mine for name in p))
        kls = [kl for _, kl, _ in mine]
        lines += [f"## {kind}: {len(mine)} plans, KL {min(kls):.4f} to {max(kls):.3f}", ""]
        correlations = ["within a layer", "across layers", "all layers at once"]
        lines += table.head(["predictor", *correlations, "predicted / measured, median (10-90 %)"])
        lines += [f"| {name} | {cell(mine, name)} |" for name in names] + [""]
    return "\n".join(lines)


def measure(source: str, work: Path, number: int, tokens: int) -> tuple[Model, list[tuple[Trial, float, dict[str, float]]]]:
    """Every plan priced and measured, or read from the work folder."""
    model, target = inspect_model(source), find_target("gguf")
    work = work / model.name
    work.mkdir(parents=True, exist_ok=True)
    calibration, heldout = choose_texts([], [])
    stats = collect_stats(model, calibration, work)
    costs = price_cached(model, stats, target, 512, work, None)[0]
    trials = random_trials(model, number)
    judge = Forward(model, stats, target, tokenize(model, heldout, tokens, 512))
    measured = []
    for trial in trials:
        key = hash_json(trial.kept, sorted((*u, f) for u, f in trial.formats.items()), tokens)
        measured.append(remembered(work / f"predictors-{key[:16]}.json", lambda t=trial: float(judge.kl(t.formats, t.kept).mean())))
    watch = Forward(model, stats, target, tokenize(model, calibration, tokens, 512))
    watch.rounded = judge.rounded
    pricer = Pricer(model, stats, costs, watch)
    return model, [(trial, kl, pricer.price(trial)) for trial, kl in zip(trials, measured, strict=True)]


def main() -> None:
    """Measure everything and write the tables."""
    parser = make_parser(__doc__, work=True, results="predictors.md")
    parser.add_argument("models", nargs="*", default=["examples/tiny-moe"])
    parser.add_argument("--plans", type=int, default=120)
    parser.add_argument("--tokens", type=int, default=2560, help="held-out tokens to measure on, and calibration tokens for the forms")
    options = parser.parse_args()
    texts = []
    for source in options.models:
        start = time.perf_counter()
        model, rows = measure(source, options.work, options.plans, options.tokens)
        note = f"{table.made_by(f'python benchmarks/predictors.py {source} --plans {options.plans}')}; "
        note += f"{options.tokens} held-out tokens; {time.perf_counter() - start:.0f} s."
        texts.append(model_page(model, rows, note))
        print(texts[-1], flush=True)
    table.save(options.results, "predictors.md", texts)


if __name__ == "__main__":
    main()
