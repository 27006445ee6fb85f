"""This script compares plans of narrower experts with plans of the full width at equal bytes, and scores that say which neurons stay.

    python benchmarks/width.py [--work DIR] [--tokens 5120] [--calibration-tokens 32768] [--models examples/tiny-moe-b]

Plans: the best of each width in files of equal size, written and measured in llama.cpp.  Scores: nothing quantized, nothing dropped, every
expert cut to 3/4 and 1/2 by each score; as cut, with W_down refitted in closed form, and (for HEAPr's score, the product's own) after
descent, as `build` does; KL on held-out text, and on the windows of the calibration text that nothing was fitted to, which is what the
prices hold.  The other three scores are controls and live here.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import table
import torch
from arguments import make_parser
from measure import Reference, remembered

from edgemoe.base.errors import BudgetError
from edgemoe.base.storage import array_file, hash_json, save_arrays
from edgemoe.base.types import F64
from edgemoe.calibrate.collect import collect_stats
from edgemoe.ir import PROJECTIONS, Model
from edgemoe.model.describe import resize_experts
from edgemoe.model.inspect import inspect_model
from edgemoe.model.overlay import open_overlay, save_overlay
from edgemoe.pipeline.store import store_weights
from edgemoe.pipeline.widths import price_cached
from edgemoe.plan.solve import solve_plan
from edgemoe.price.choices import discount
from edgemoe.repair.experts import Experts, Tokens
from edgemoe.repair.reconstruct import refit_layer, resume
from edgemoe.repair.survivors import EPOCHS
from edgemoe.repair.two_streams import TwoStreams
from edgemoe.repair.width import best_neurons, charge, choose_widths, cut, magnitude, narrow_experts
from edgemoe.stream.adapter import weights_of
from edgemoe.stream.gradients import collect_gradients, load_gradients
from edgemoe.stream.layers import LayerStream, Recorder, recording
from edgemoe.stream.passes import map_ordered
from edgemoe.stream.texts import Text, choose_texts
from edgemoe.stream.windows import WINDOW, tokenize
from edgemoe.targets import find_target

BITS = (4.0, 3.0, 2.0)  # of the file for each weight of the original
SCORE_TOKENS = 8192
SCORES = ("heapr", "camera", "magnitude", "random")
CAMERA_MAX = 0.9  # share of the largest token in CAMERA's energy: its published script (xuyuzhuang11/CAMERA)
COLUMNS = """\
The first table holds, for each file size, the best plan of each width as `edgemoe build` writes it: "predicted" is the plan's own KL,
"measured" is the KL of the file in llama.cpp, and the last column compares the measured KL of a width with that of the full width.  The
second table cuts every expert to one width by one score, drops nothing and quantizes nothing: KL is told as cut, after W_down was
refitted in closed form, and after descent on all three matrices.  HEAPr is the score that a build takes; CAMERA, the product of norms
(magnitude) and random are controls.  The last column is the KL after descent on the windows of the calibration text that nothing was
fitted to."""


@dataclass(frozen=True)
class Run:
    """A model, its texts, and a folder where everything measured is remembered."""

    model: Model
    work: Path
    tokens: int
    calibration_tokens: int

    def remember(self, key: Any, make: Callable[[], Any]) -> Any:
        """The result of `make`, from the folder if it is there."""
        return remembered(self.work / f"result-{hash_json(key, self.tokens)[:16]}.json", make)


# ----------------------------------------------------------------------------------------------------------------- controls
def camera_energy(phi_sq: np.ndarray, phi_sq_max: np.ndarray, down_sq: np.ndarray, share: float = CAMERA_MAX) -> F64:
    """|w_j|^2 ((1 - a) sum_t (g_t h_tj)^2 + a max_t (g_t h_tj)^2) of each neuron: CAMERA, arXiv 2508.02322.

    Args:
        phi_sq: sum of (g_t h_tj)^2 over the routed tokens.
        phi_sq_max: the largest of them.
        down_sq: |w_j|^2.
        share: a; 0 is HEAPr's score with the identity in place of the gradients.
    """
    energy: F64 = down_sq * ((1 - share) * phi_sq + share * phi_sq_max)
    return energy


def camera_scores(model: Model, texts: Sequence[Text], max_tokens: int) -> list[F64]:
    """CAMERA's energy of every neuron [E, M] in each layer, tokens weighted as for HEAPr."""
    stream, windows = LayerStream(model), tokenize(model, texts, max_tokens, WINDOW)
    weights = np.array([t.weight for t in texts]) / sum(t.weight for t in texts)
    share = weights / np.bincount(windows.domain, windows.lengths, len(weights))
    real = np.arange(windows.tokens.shape[1])[None] < windows.lengths[:, None]
    each = torch.from_numpy((share[windows.domain][:, None] * real).astype(np.float32))
    states, found = [stream.embed(windows.tokens[index]) for index in windows.chunks()], []
    for layer in range(model.n_layers):
        module = stream.load_layer(layer)
        down = module.mlp.experts.down_proj.data

        def chunk(piece: tuple[Any, torch.Tensor], module: Any = module, down: torch.Tensor = down) -> tuple[torch.Tensor, F64, F64]:
            index, x = piece
            weight, sums, most = each[index].flatten(), *torch.zeros(2, down.shape[0], down.shape[2])

            def note(expert: int, token: torch.Tensor, _: Any, h: torch.Tensor, __: Any, gate: torch.Tensor) -> None:
                phi_sq = (gate[:, None] * h.float()).square() * weight[token][:, None]
                sums[expert], most[expert] = phi_sq.sum(dim=0), phi_sq.amax(dim=0)

            with recording(Recorder(on_expert=note)):
                out = stream.run_layer(module, x)
            return out, sums.double().numpy(), most.double().numpy()

        parts = list(map_ordered(chunk, list(zip(windows.chunks(), states, strict=True)), device=stream.device))
        states, down_sq = [out for out, _, _ in parts], down.double().square().sum(dim=1).numpy()
        found.append(camera_energy(sum(s for _, s, _ in parts), np.max([m for _, _, m in parts], axis=0), down_sq))
        stream.unload_layer(layer)
    return found


def scorer(model: Model, texts: Sequence[Text], score: str, max_tokens: int, work: Path) -> Callable[[int, Experts], F64]:
    """What each neuron is worth [E, M] by one of SCORES, a function of a layer and its experts; comparable within an expert."""
    if score == "heapr":
        folder = collect_gradients(model, texts, work, max_tokens=max_tokens)
        return lambda layer, _: np.asarray(load_gradients(folder, layer)["heapr"], np.float64)
    if score == "camera":
        energies = camera_scores(model, texts, max_tokens)
        return lambda layer, _: energies[layer]
    if score == "magnitude":
        return lambda _, experts: magnitude(experts)
    return lambda layer, experts: np.random.default_rng(layer).random(tuple(experts.gate.shape[:2]))


def cut_only(model: Model, texts: Sequence[Text], width: int, score: str, work: Path) -> Model:
    """Every expert cut, nothing refitted."""
    stream, value, folder = LayerStream(model), scorer(model, texts, score, SCORE_TOKENS, work), work / f"cut-{width}-{score}"
    folder.mkdir(parents=True, exist_ok=True)
    for layer in range(model.n_layers):
        module = stream.load_layer(layer)
        gate, up, down = (weights_of(module, f"ffn_{p}_exps").clone() for p in PROJECTIONS)
        experts = Experts(gate=gate, up=up, down=down)
        stream.unload_layer(layer)
        left = cut(experts, best_neurons(value(layer, experts), magnitude(experts), width))
        stacks = zip(PROJECTIONS, left.stacks, strict=True)
        save_arrays(folder / array_file(layer), {f"ffn_{p}_exps.{e}": s[e].numpy() for p, s in stacks for e in range(model.n_experts)})
    return save_overlay(resize_experts(model, width), folder, {})


def cut_and_refit(
    model: Model, texts: Sequence[Text], width: int, score: str, work: Path, max_tokens: int = SCORE_TOKENS
) -> tuple[Model, list[float]]:
    """Every expert cut by a score and W_down refitted in closed form as a build does it; KL on the windows that nothing was fitted to."""
    folder = (work / f"refit-{width}-{score}-{max_tokens}").absolute()
    value, base = scorer(model, texts, score, max_tokens, work), resize_experts(model, width)
    streams = TwoStreams(model, model, texts, max_tokens, folder, score)

    def change(layer: int, _: Tokens, experts: Experts) -> Experts:
        return cut(experts, best_neurons(value(layer, experts), magnitude(experts), width))

    made = open_overlay(base, folder, {})
    if made is None:
        for layer in resume(streams, None):
            refit_layer(streams, layer, range(model.n_experts), epochs=0, change=change)
        (folder / "kl.json").write_text(json.dumps(list(streams.measure())))
        made = save_overlay(base, folder, {})
    return made, json.loads((folder / "kl.json").read_text())


# ------------------------------------------------------------------------------------------------------------------- tables
def compare_scores(run: Run) -> list[str]:
    """Rows of the first table."""
    model, rows = run.model, []
    calibration, heldout = choose_texts([], [])
    reference = Reference(model, heldout, run.tokens, run.work)

    def kl_of(changed: Model) -> list[float]:
        return reference.kl_of_model(changed).tolist()

    def refitted(width: int, score: str) -> dict[str, Any]:
        made, guard = cut_and_refit(model, calibration, width, score, run.work)
        return {"guard": guard, "heldout": kl_of(made)}

    def narrowed(width: int) -> dict[str, Any]:
        made = narrow_experts(model, calibration, width, run.work, max_tokens=run.calibration_tokens, epochs=EPOCHS)
        return {"guard": made.kl, "heldout": kl_of(made.model)}

    for width in choose_widths(model, "auto")[1:]:
        for score in SCORES:
            raw = run.remember(["cut", width, score], lambda w=width, s=score: kl_of(cut_only(model, calibration, w, s, run.work)))
            fit = run.remember(["fit", width, score, SCORE_TOKENS], lambda w=width, s=score: refitted(w, s))
            full = None
            if score == SCORES[0]:
                full = run.remember(["descent", width, score, run.calibration_tokens], lambda w=width: narrowed(w))
            cells = [np.mean(raw), np.mean(fit["heldout"]), *([np.mean(full["heldout"]), np.mean(full["guard"])] if full else [])]
            texts = " | ".join([f"{v:.4f}" for v in cells] + [""] * (4 - len(cells)))
            rows.append(f"| {model.name} | {width} of {model.expert.size} | {score} | {texts} |")
            print(rows[-1], flush=True)
    return rows


def compare_plans(run: Run) -> list[str]:
    """Rows of the second table."""
    model, target, rows = run.model, find_target("gguf"), []
    calibration, heldout = choose_texts([], [])
    reference, offers = Reference(model, heldout, run.tokens, run.work), []
    for width in choose_widths(model, "auto"):
        made = narrow_experts(model, calibration, width, run.work, max_tokens=run.calibration_tokens, epochs=EPOCHS)
        stats = collect_stats(made.model, calibration, made.work, max_tokens=run.calibration_tokens)
        costs = charge(discount(price_cached(made.model, stats, target, 512, made.work, None)[0], repair=True, rounding="feedback"), made)
        offers.append((width, made, stats, costs))
    for bits in BITS:
        size, found = round(bits / 8 * model.n_weights), []
        for width, made, stats, costs in offers:
            beside = sum(costs.memory[part] for part in ("runtime", "kv", "compute", "output"))
            try:
                plan = solve_plan(costs, size + beside)
            except BudgetError:
                continue

            def measure(plan: Any = plan, made: Any = made, stats: Any = stats) -> list[float]:
                options = {"narrowed": made, "max_tokens": run.calibration_tokens}
                stored = store_weights(model, calibration, stats, plan, run.work, **options)
                folder = run.work / "file"
                folder.mkdir(exist_ok=True)
                path = target.write(stored, stats, plan, folder, 0, None).path
                kl, length = reference.kl_of_file(path), path.stat().st_size
                path.unlink()
                return [length, kl]

            key = ["plan, fed back", width, run.calibration_tokens, plan.kept, plan.formats]
            length, kl = run.remember(key, measure)
            found.append((plan.predicted_kl, kl, width, plan.count, length))
            print(bits, found[-1], flush=True)
        best, without = min(found), next((f for f in found if f[2] == model.expert.size), None)
        for predicted, kl, width, count, length in found:
            mark = " (chosen)" if width == best[2] else ""
            ratio = f"{kl / without[1]:.2f}" if without else ""
            head = f"| {model.name} | {bits:g} | {width} of {model.expert.size}{mark} | {count} of {model.n_experts} | {length / 1e6:.2f}"
            rows.append(f"{head} | {predicted:.4f} | **{kl:.4f}** | {ratio} |")
    return rows


def main() -> None:
    """Measure everything and write the tables."""
    parser = make_parser(__doc__, work=True, tokens=5120, calibration_tokens=32_768, results="width.md")
    parser.add_argument("--models", nargs="+", default=["examples/tiny-moe-b"])
    options = parser.parse_args()
    scores, plans = [], []
    for source in options.models:
        model = inspect_model(source)
        run = Run(model, (options.work / model.name).absolute(), options.tokens, options.calibration_tokens)
        run.work.mkdir(parents=True, exist_ok=True)
        plans += compare_plans(run)
        scores += compare_scores(run)
    command = f"python benchmarks/width.py --models {' '.join(options.models)}"
    lines = [f"# The expert width as an option: KL (nats/token) on {options.tokens} held-out tokens", ""]
    made = table.made_by(command, "cores")
    lines += [f"{made}; {options.calibration_tokens} calibration tokens for plans, {SCORE_TOKENS} for scores.", "", COLUMNS, ""]
    lines += ["## Plans of each width at equal file sizes", ""]
    lines += table.head(["model", "bits for each weight", "width", "kept", "file MB", "predicted", "measured", "measured / full width"])
    lines += [*plans, "", "## Which neurons stay, nothing quantized", ""]
    steps = ["as cut", "closed form", "and descent", "the same, on unfitted calibration text"]
    table.save(options.results, "width.md", [*lines, *table.head(["model", "width", "score", *steps]), *scores, ""])


if __name__ == "__main__":
    main()
