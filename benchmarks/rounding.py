"""This script compares feedback rounding with the stock quantizer, matrix by matrix at equal bytes, by errors on held-out text.

    python benchmarks/rounding.py [--tokens 16384] [--experts 4] [--models examples/tiny-moe examples/tiny-moe-b] [--work DIR]

Both get what their builds get: the stock quantizer the importance matrix; feedback the Hessian of inputs and output gradients, from the
same calibration tokens (of one stream, nothing rounded before), by the product's own `expert_metrics` and `quantize_matrix`. One window in
seven is kept out and chooses between the two. "Alone" is feedback on what the matrix receives, by gate^2, every output by itself; "stored"
what a build stores, which minimises the loss and not the output error. "Output error" is sum g^2 |(W' - W) x|^2 over the held-out tokens
routed to the expert, "loss" what that does to second order: sum (gradient (W' - W) x)^2. "Better in" counts matrices that err less than
stock. KL of whole files: see quality.py.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import table
import torch
from arguments import make_parser
from numpy.typing import NDArray

from edgemoe.ir import PROJECTIONS, Model
from edgemoe.model.inspect import inspect_model
from edgemoe.quantize.gptq import factor_hessian, mix_hessians
from edgemoe.repair.experts import Experts, Tokens
from edgemoe.repair.quantize_layer import ErrorMetric, expert_metrics, quantize_matrix, sum_grams
from edgemoe.repair.two_streams import GUARD_EVERY
from edgemoe.stream.adapter import weights_of
from edgemoe.stream.gradients import collect_gradients, open_gradients
from edgemoe.stream.layers import LayerStream, Recorder, recording
from edgemoe.stream.passes import map_ordered
from edgemoe.stream.texts import Text, choose_texts
from edgemoe.stream.windows import tokenize
from edgemoe.targets import find_target
from edgemoe.targets.gguf.formats import FORMATS, quantize

KINDS = ("IQ1_S", "IQ1_M", "IQ2_XXS", "IQ2_XS", "IQ2_S", "Q2_K", "IQ3_XXS", "IQ3_S", "Q3_K", "IQ4_XS", "Q4_K", "Q5_K", "Q6_K", "Q8_0")
HEAD = (
    "| format | bits | alone: output error | gate | up | down | worst | better in | loss | stored: output error | better in "
    "| loss | gate | up | down | better in | MB/s |"
)
COLUMNS = """\
Each row compares feedback rounding with the stock quantizer at equal bytes, by geometric means of ratios over expert matrices; below one,
feedback errs less.  "Alone" is feedback on what the matrix receives, and "stored" is what a build stores, which minimises the loss and
not the output error.  "Output error" sums the squared change of gated outputs over the held-out tokens of an expert, and "loss" is what
that change does to second order.  "Gate", "up" and "down" split the mean before them by projection, "worst" is the largest ratio of one
matrix, and "better in" is the share of matrices that err less than stock.  MB/s counts the float32 bytes that a build rounds in a second
of processor time."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Trial:
    """One matrix in one format."""

    kind: str
    projection: str
    alone: tuple[float, float]  # output error and loss of feedback alone, on held-out text, over stock's
    stored: tuple[float, float]  # of what a build stores
    seconds: float  # of all that a build does to it
    size: int  # bytes of the float32 matrix


def watch(model: Model, texts: Sequence[Text], tokens: int, work: Path) -> Iterator[tuple[Tokens, Experts]]:
    """What the experts of one layer after another receive, with gradients, and their weights."""
    windows, stream = tokenize(model, texts, tokens, 512), LayerStream(model)
    folder, real = (
        collect_gradients(model, texts, work, max_tokens=tokens),
        np.arange(windows.tokens.shape[1])[None] < windows.lengths[:, None],
    )
    number = np.array(
        [np.sum(windows.domain[:i] == d) for i, d in enumerate(windows.domain)]
    )  # of each window in its domain, as in edgemoe/repair/reconstruct.py
    guard = np.repeat(number % GUARD_EVERY == GUARD_EVERY // 2, windows.lengths)
    states = [stream.embed(windows.tokens[index]) for index in windows.chunks()]
    for layer in range(model.n_layers):
        module = stream.load_layer(layer)

        def run(piece: tuple[Any, torch.Tensor], module: Any = module) -> tuple[torch.Tensor, NDArray[Any], NDArray[Any], NDArray[Any]]:
            index, x = piece
            mask = torch.from_numpy(real[index].ravel())
            slots = torch.zeros(len(mask), dtype=torch.int64)
            who, gates = torch.zeros(len(mask), model.top_k, dtype=torch.int32), torch.zeros(len(mask), model.top_k)

            def note(expert: int, token: torch.Tensor, _: Any, __: Any, ___: Any, gate: torch.Tensor) -> None:
                who[token, slots[token]], gates[token, slots[token]] = expert, gate
                slots[token] += 1

            with recording(Recorder(on_expert=note)) as seen:
                out = stream.run_layer(module, x)
            assert seen.moe_input is not None
            return out, seen.moe_input[mask].numpy(), who[mask].numpy(), gates[mask].numpy()

        found = list(map_ordered(run, list(zip(windows.chunks(), states, strict=True)), device=stream.device))
        states, (x, chosen, gates) = [f[0] for f in found], (np.concatenate([f[i] for f in found]) for i in (1, 2, 3))
        with open_gradients(folder, layer, windows, model.hidden_size) as kept:
            gradients = np.concatenate([kept.read(index)[torch.from_numpy(real[index])].numpy() for index in windows.chunks()])
        stacks = {p: weights_of(module, f"ffn_{p}_exps").clone() for p in PROJECTIONS}
        ones = np.ones(len(x), np.float32)
        yield (
            Tokens(x=x, target=x, chosen=chosen, gates=gates, weights=ones, guard=guard, gradients=gradients),
            Experts(**stacks),
        )
        stream.unload_layer(layer)


def judge(tokens: Tokens, experts: Experts, n: int, projection: str) -> Any:
    """A function of an error [R, C] of an expert's matrix: its output error and its loss over all tokens."""
    rows, slots = np.nonzero(tokens.chosen == n)
    assert tokens.gradients is not None
    gates = tokens.gates[rows, slots][:, None]
    x, given = torch.from_numpy(tokens.x[rows]), torch.from_numpy(tokens.gradients[rows] * gates)
    h, d_gate, d_up = experts.hidden_gradients(n, x, given)
    inputs, slope = {"gate": (x, d_gate), "up": (x, d_up), "down": (h, given)}[projection]

    def errors(delta: NDArray[np.float32]) -> tuple[float, float]:
        moved = inputs.numpy() @ delta.T
        return float(((gates * moved) ** 2).sum()), float(((slope.numpy() * moved).sum(axis=1) ** 2).sum())

    return errors


def compare(model: Model, texts: tuple[Sequence[Text], Sequence[Text]], tokens: int, experts: int, work: Path) -> Iterator[Trial]:
    """Every sampled matrix in every format."""
    gguf = find_target("gguf")
    pairs = zip(*(watch(model, part, n, work) for part, n in zip(texts, (tokens, 5120), strict=True)), strict=True)
    with ThreadPoolExecutor(1) as pool:
        for (seen, weights), (held, _) in pairs:
            count = np.bincount(seen.chosen.ravel(), minlength=model.n_experts)
            busy = np.argsort(-count, kind="stable")
            layer_gram = sum_grams(seen, weights)
            slot = [torch.from_numpy(seen.x * seen.gates[:, i : i + 1])[torch.from_numpy(~seen.guard)] for i in range(model.top_k)]
            whole = np.sum([(x.T @ x).double().numpy() for x in slot], axis=0)
            for n in busy[:: max(1, len(busy) // experts)][:experts].tolist():
                rows, slots = np.nonzero(seen.chosen == n)
                gates = torch.from_numpy(seen.gates[rows, slots])[:, None]
                x = torch.from_numpy(seen.x[rows])
                inputs = {hidden: gates * (weights.hidden(n, x) if hidden else x) for hidden in (False, True)}
                importances = {hidden: (values**2).mean(dim=0).numpy() for hidden, values in inputs.items()}
                for projection in PROJECTIONS:
                    hidden, matrix = projection == "down", getattr(weights, projection)[n].numpy()
                    found = expert_metrics(seen, weights, n, hidden=hidden, layer_gram=None if hidden else layer_gram)
                    metric, errors = found[0 if hidden else PROJECTIONS.index(projection)], judge(held, weights, n, projection)
                    kept = torch.from_numpy(~seen.guard[rows])
                    gram, guard = ((inputs[hidden][side].T @ inputs[hidden][side]).double().numpy() for side in (kept, ~kept))
                    plain = ErrorMetric(inputs=factor_hessian(mix_hessians(gram, int(kept.sum()), None if hidden else whole)), guard=guard)
                    for kind in KINDS:
                        start = time.process_time()
                        _, stored = quantize_matrix(gguf, matrix, kind, importances[hidden], metric, pool)
                        seconds = time.process_time() - start
                        others = [quantize_matrix(gguf, matrix, kind, importances[hidden], other, pool)[1] for other in (plain, None)]
                        ours, alone, stock = (errors(values - matrix) for values in (stored, *others))
                        ratios = {"alone": tuple(np.divide(alone, stock)), "stored": tuple(np.divide(ours, stock))}
                        yield Trial(kind=kind, projection=projection, seconds=seconds, size=matrix.nbytes, **ratios)


def summarise(kind: str, trials: list[Trial]) -> str:
    """One row of the table."""
    cells = []
    for name, which in (("alone", 0), ("alone", 1), ("stored", 0), ("stored", 1)):
        ratios = np.array([getattr(t, name)[which] for t in trials])
        by = [np.exp(np.log(ratios[[t.projection == p for t in trials]]).mean()) for p in PROJECTIONS]
        cells.append(f"**{np.exp(np.log(ratios).mean()):.2f}**")
        cells += [f"{v:.2f}" for v in by] if (name, which) in (("alone", 0), ("stored", 1)) else []
        cells += [f"{ratios.max():.2f}"] if (name, which) == ("alone", 0) else []
        cells += [f"{np.mean(ratios < 1):.0%}"] if (name, which) != ("alone", 1) else []
    speed = sum(t.size for t in trials) / sum(t.seconds for t in trials) / 1e6
    return f"| {kind} | {FORMATS[kind].bpw:.2f} | {' | '.join(cells)} | {speed:.1f} |"


def main() -> None:
    """Measure; write the table."""
    parser = make_parser(__doc__, work=True, results="rounding.md")
    parser.add_argument("--models", type=Path, nargs="+", default=[Path("examples/tiny-moe"), Path("examples/tiny-moe-b")])
    parser.add_argument("--tokens", type=int, default=16_384, help="calibration tokens")
    parser.add_argument("--experts", type=int, default=4, help="of each layer, from the busiest to the idlest")
    options = parser.parse_args()
    torch.set_num_threads(1)
    for kind in KINDS:  # ggml's search tables are built once
        quantize(np.ones((1, 256), np.float32), kind, np.ones(256, np.float32))
    texts = choose_texts([], [])
    lines = ["# Errors on held-out text: what a build stores over the stock quantizer with an importance matrix, same bytes", ""]
    lines += [f"{table.made_by('python benchmarks/rounding.py', 'shared cores')}.", "", COLUMNS, ""]
    for source in options.models:
        model = inspect_model(source)
        found = list(compare(model, texts, options.tokens, options.experts, options.work / model.name))
        lines += [f"## {model.name}: {len(found) // len(KINDS)} expert matrices, {options.tokens} calibration tokens", ""]
        lines += [HEAD, "|" + "---|" * 17]
        lines += [summarise(kind, [t for t in found if t.kind == kind]) for kind in KINDS]
        lines.append("")
    print(table.save(options.results, "rounding.md", lines))


if __name__ == "__main__":
    main()
