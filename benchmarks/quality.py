"""Our plans beside what people do today, at equal bytes: one table, measured in llama.cpp on the same held-out text.

    python benchmarks/quality.py examples/tiny-moe [--work DIR] [--tokens 5120]

Peers, every file with our importance matrix: (a) one ggml type for everything; (b) llama-quantize's own mixes; (c) random drops times those
mixes, three seeds; (d) drops by frequency times those mixes; (e) drops by REAP's sum times those mixes.  Drops keep 3/4, 1/2 and 1/4 of the
experts.  At each of our files a peer stands with its smallest file that is not smaller than ours; of each class the table shows the best.
16-bit files are no peers.  Differences below the noise floor (KL of the F16 file) are ties.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import platform
from collections.abc import Iterator
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import llama_cpp as lc
import numpy as np
from picture import draw

from edgemoe.calibrate import collect_stats
from edgemoe.inspect import inspect_model
from edgemoe.ir import Costs, Model, Plan, Stats, hash_json
from edgemoe.pipeline import ROUNDINGS, price_cached, store_weights
from edgemoe.plan import least_budget, solve_plan
from edgemoe.price import discount_drops
from edgemoe.scores import importance_of, score_experts
from edgemoe.targets import find_target
from edgemoe.targets.gguf.formats import WIDE, floor_importance
from edgemoe.targets.gguf.writer import tensor_name
from edgemoe.texts import choose_texts
from edgemoe.verify import compare_logits, reference_states, tokenize_heldout

MIXES = ("Q8_0", "Q6_K", "Q5_K_M", "Q5_K_S", "Q4_K_M", "Q4_K_S", "IQ4_XS", "Q3_K_L", "Q3_K_M", "Q3_K_S", "IQ3_M", "IQ3_XS", "IQ3_XXS")
MIXES += ("Q2_K", "Q2_K_S", "IQ2_M", "IQ2_S", "IQ2_XS", "IQ2_XXS", "IQ1_M", "IQ1_S")
DROP_MIXES = ("Q8_0", "Q6_K", "Q5_K_M", "Q4_K_M", "IQ4_XS", "Q3_K_M", "IQ3_M", "IQ3_XXS", "Q2_K", "IQ2_M", "IQ2_XXS", "IQ1_M")
SHARES = (0.75, 0.5, 0.25)
SEEDS = 3
BUDGETS = 10


@dataclass(frozen=True)
class Result:
    """One measured file; `recipe` names the peer (its mix aside), `kind` its class."""

    kind: str
    recipe: str
    name: str
    size: int
    kl: float


class Bench:
    """A model, its statistics, prices and held-out windows; measures files and remembers the results."""

    def __init__(self, source: Path, work: Path, tokens: int, rounding: str = ROUNDINGS[0]) -> None:
        self.model, self.target, self.work, self.rounding = inspect_model(source), find_target("gguf"), work, rounding
        work.mkdir(parents=True, exist_ok=True)
        self.calibration, heldout = choose_texts([], [])
        self.stats: Stats = collect_stats(self.model, self.calibration, work)
        self.costs: Costs = discount_drops(price_cached(self.model, self.stats, self.target, 512, work, None)[0])
        self.names = [t.name for t in heldout]
        self.windows = tokenize_heldout(self.model, heldout, tokens)
        self.states = reference_states(self.model, self.windows, work)
        importance = [importance_of(self.model, self.stats, layer) for layer in range(-1, self.model.n_layers)]
        digests = [sorted((*k, float(v.sum())) for k, v in found.items()) for found in importance]
        self.made_from = hash_json(self.model.fingerprint, digests, self.windows.tokens.tolist())
        self.cache = work / "results.json"
        self.known: dict[str, Any] = json.loads(self.cache.read_text()) if self.cache.exists() else {}

    def measure(self, key: str, kind: str, recipe: str, name: str, make: Any) -> Result:
        """Make a file (unless it was measured before), measure its KL, delete it."""
        key = hash_json(key, self.made_from)
        if key not in self.known:
            path: Path = make()
            scores = compare_logits(path, self.model, self.windows, self.states, self.names, self.target)
            self.known[key] = [path.stat().st_size, float(np.mean([s.kl_mean for s in scores]))]
            path.unlink()
            self.cache.write_text(json.dumps(self.known))
        size, kl = self.known[key]
        print(f"  {kind:10s} {recipe:22s} {name:8s} {size:10d} {kl:.5f}", flush=True)
        return Result(kind, recipe, name, size, kl)

    def write(self, plan: Plan, model: Model | None = None) -> Path:
        """Emit a plan, of the original or of a repaired model."""
        folder = self.work / "file"
        folder.mkdir(exist_ok=True)
        return self.target.write(model or self.model, self.stats, plan, folder, 0, None).path

    def write_stored(self, plan: Plan) -> Path:
        """Emit a plan as `build` does."""
        return self.write(plan, store_weights(self.model, self.calibration, self.stats, plan, self.work, rounding=self.rounding))

    def flat_plan(self, name: str, kept: tuple[tuple[int, ...], ...]) -> Plan:
        """Every tensor in one format."""
        best = solve_plan(self.costs, 10**15)
        formats = dict.fromkeys(best.formats, name)
        return replace(best, kept=kept, formats=formats, sizes=dict.fromkeys(best.sizes, 0), file_size=0)


def kept_sets(bench: Bench, method: str, share: float) -> tuple[tuple[int, ...], ...]:
    """Experts that stay in each layer."""
    model = bench.model
    count = max(model.top_k, round(share * model.n_experts))
    sets = []
    for layer in range(model.n_layers):
        if method.startswith("random"):
            score = np.random.default_rng([int(method[-1]), layer]).random(model.n_experts)
        else:
            score = score_experts(bench.stats, layer, method)
        sets.append(tuple(sorted(int(e) for e in np.argsort(-score, kind="stable")[:count])))
    return tuple(sets)


def imatrix_entries(model: Model, stats: Stats, kept: tuple[tuple[int, ...], ...]) -> dict[str, np.ndarray]:
    """Importance by tensor name, experts in the order of the file."""
    entries: dict[str, np.ndarray] = {}
    for layer in range(-1, model.n_layers):
        found = importance_of(model, stats, layer)
        for role in {role for role, _ in found}:
            experts = [-1] if (role, -1) in found else kept[layer]
            entries[tensor_name(role, layer)] = np.concatenate([floor_importance(found[role, e]) for e in experts])
    return entries


def llama_quantize(source: Path, out: Path, mix: str, entries: dict[str, np.ndarray]) -> Path:
    """llama-quantize with an importance matrix."""
    params = lc.llama_model_quantize_default_params()
    params.ftype = getattr(lc, f"LLAMA_FTYPE_MOSTLY_{mix}")
    params.nthread = 2
    array = (lc.llama_model_imatrix_data * (len(entries) + 1))()
    for slot, (name, values) in zip(array, sorted(entries.items()), strict=False):
        slot.name, slot.size = name.encode(), values.size
        slot.data = values.ctypes.data_as(ctypes.POINTER(ctypes.c_float))
    params.imatrix = ctypes.cast(array, ctypes.POINTER(lc.llama_model_imatrix_data))
    if lc.llama_model_quantize(str(source).encode(), str(out).encode(), ctypes.byref(params)) != 0:
        raise SystemExit(f"llama-quantize failed for {mix}")
    return out


def measure_peers(bench: Bench) -> Iterator[Result]:
    """All peers' files."""
    everyone = tuple(tuple(range(bench.model.n_experts)) for _ in range(bench.model.n_layers))
    for name in WIDE:
        kind = "16-bit" if name == "F16" else "one type"
        yield bench.measure(f"flat {name}", kind, "one type", name, lambda name=name: bench.write(bench.flat_plan(name, everyone)))
    drops = [("mix", "all experts", everyone)]
    for share in SHARES:
        methods = [("frequency", "frequency"), ("reap-sum", "REAP sum"), *((f"random{seed}", "random") for seed in range(SEEDS))]
        drops += [(kind, f"{method} keep {share:.0%}", kept_sets(bench, method, share)) for method, kind in methods]
    for kind, recipe, kept in drops:
        source: Path | None = None
        for mix in MIXES if kind == "mix" else DROP_MIXES:

            def make(mix: str = mix, kept: Any = kept) -> Path:
                nonlocal source
                source = source or bench.write(bench.flat_plan("F16", kept)).rename(bench.work / "source.gguf")
                return llama_quantize(source, bench.work / "peer.gguf", mix, imatrix_entries(bench.model, bench.stats, kept))

            yield bench.measure(f"{recipe} {kept} {mix}", kind, recipe, mix, make)


def measure_ours(bench: Bench, largest: int) -> Iterator[tuple[Result, Plan]]:
    """Our plans at ten sizes, from the size of Q8_0 down to 8 per cent of bf16 (or the least there is)."""
    overhead = sum(bench.costs.memory[part] for part in ("runtime", "kv", "compute", "output"))
    lowest = max(0.08 * bench.model.n_bytes, (least_budget(bench.costs) - overhead) * 1.02)
    for i in range(BUDGETS):
        size = round(largest * (lowest / largest) ** (i / (BUDGETS - 1)))
        plan = solve_plan(bench.costs, size + overhead)
        key = f"ours {bench.rounding} {hash_json(plan.kept, plan.formats)}"
        yield bench.measure(key, "ours", "ours", f"E{plan.count}", lambda plan=plan: bench.write_stored(plan)), plan


CLASSES = ("one type", "mix", "random", "frequency", "REAP sum")


def best_of(kind: str, size: int, peers: list[Result]) -> Result | None:
    """The best of a class: every recipe stands with its smallest file that is not smaller (random drops: their mean over seeds)."""
    mine = [p for p in peers if p.kind == kind and p.size >= size]
    smallest = [min((p for p in mine if p.recipe == recipe), key=lambda p: p.size) for recipe in sorted({p.recipe for p in mine})]
    if kind == "random":
        shares = {r.recipe.split(" ", 1)[1] for r in smallest}
        groups = {share: [r for r in smallest if r.recipe.endswith(share)] for share in sorted(shares)}
        smallest = [replace(g[0], recipe=share, kl=float(np.mean([r.kl for r in g]))) for share, g in groups.items()]
    return min(smallest, key=lambda p: p.kl) if smallest else None


def table(bench: Bench, command: str, ours: list[tuple[Result, Plan]], peers: list[Result]) -> str:
    """The results as Markdown."""
    floor = next(p.kl for p in peers if p.kind == "16-bit")
    tokens = int(bench.windows.lengths.sum())
    lines = [f"# {bench.model.name}: KL (nats/token) at equal bytes, {tokens} held-out tokens of {', '.join(bench.names)}", ""]
    lines += [f"`{command}`, {datetime.now(UTC):%Y-%m-%d}, {platform.machine()}; noise floor (the F16 file) {floor:.1e}.", ""]
    lines += ["In brackets: kept experts, mix, file size in MB of the best peer of each class (what stands where: see quality.py).", ""]
    lines += ["| file MB | kept | ours predicted | ours | " + " | ".join(f"best {kind}" for kind in CLASSES) + " | ours / best peer |"]
    lines += ["|" + "---|" * (5 + len(CLASSES))]
    ratios = []
    for result, plan in ours:
        found = [best_of(kind, result.size, peers) for kind in CLASSES]
        ratios.append(result.kl / min(f.kl for f in found if f))
        cells = " | ".join(f"{f.kl:.4f} ({f.recipe}, {f.name}, {f.size / 1e6:.2f})" if f else "-" for f in found)
        mine = f"{result.size / 1e6:.2f} | {plan.count} of {plan.n_experts} | {plan.predicted_kl:.4f} | **{result.kl:.4f}**"
        lines += [f"| {mine} | {cells} | {ratios[-1]:.2f} |"]
    return "\n".join([*lines, "", f"Geometric mean of ours / best peer: {float(np.exp(np.mean(np.log(ratios)))):.2f}", ""])


def main() -> None:
    """Measure everything; write the table and the picture."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--work", type=Path, default=Path("bench"), help="files and results are kept here between runs")
    parser.add_argument("--tokens", type=int, default=5120, help="held-out tokens of all five texts")
    parser.add_argument("--rounding", choices=ROUNDINGS, default=ROUNDINGS[0], help="of our files")
    parser.add_argument("--results", type=Path, default=Path("benchmarks/results"), help="where NAME.md and NAME.svg go")
    options = parser.parse_args()
    bench = Bench(options.model, options.work / options.model.name, options.tokens, options.rounding)
    peers = list(measure_peers(bench))
    largest = next(p.size for p in peers if p.recipe == "all experts" and p.name == "Q8_0")
    ours = list(measure_ours(bench, largest))
    text = table(bench, f"python benchmarks/quality.py {options.model}", ours, peers)
    options.results.mkdir(parents=True, exist_ok=True)
    (options.results / f"{bench.model.name}.md").write_text(text)
    dots = {kind: [(p.size, p.kl) for p in peers if p.kind == kind] for kind in CLASSES}
    picture = draw(f"{bench.model.name}: quality at equal bytes", [(r.size, r.kl) for r, _ in ours], dots)
    (options.results / f"{bench.model.name}.svg").write_text(picture)
    print(text)


if __name__ == "__main__":
    main()
