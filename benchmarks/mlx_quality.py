"""This script compares our MLX folders with what people make for mlx_lm today, at equal bytes, on the same held-out text.

    python benchmarks/mlx_quality.py examples/tiny-moe [--work DIR] [--tokens 10240] [--budgets 8]

Every file is measured by what its bytes decode to, with everything else in float32: the weights of a folder are decoded by our own reader
(tests/targets/mlx shows that mlx_lm computes the same), those of a peer by mlx itself, and run layer by layer.  peers/mlx.py says what the
peers are.  What was measured is kept in --work: a killed run goes on, a second one is short.
"""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import table
from arguments import make_parser
from calibrated import first_words, hash_code, write_texts
from measure import Reference, mean_and_error
from peers import recipes
from peers.mlx import Peer, calibrated_peers, dropped_peers, stock_peers

from edgemoe.base.errors import VerifyError
from edgemoe.base.storage import array_file, hash_json, load_record, save_arrays
from edgemoe.base.types import F32
from edgemoe.calibrate.collect import collect_stats
from edgemoe.ir import Model, Report, Stats
from edgemoe.ir.memory import peak
from edgemoe.ir.model import is_stack
from edgemoe.model.checkpoint import read_tensor
from edgemoe.model.describe import resize_experts
from edgemoe.model.inspect import inspect_model
from edgemoe.model.overlay import save_overlay
from edgemoe.pipeline.build import build_artifact
from edgemoe.pipeline.request import BuildRequest
from edgemoe.pipeline.widths import price_cached
from edgemoe.plan.solve import solve_plan
from edgemoe.quantize.importance import importance_of
from edgemoe.rules import ByteLimit
from edgemoe.stream.passes import final_states
from edgemoe.stream.texts import choose_texts
from edgemoe.stream.windows import WINDOW, tokenize
from edgemoe.targets import Target, find_target
from edgemoe.targets.mlx.names import tensor_names
from edgemoe.targets.mlx.reader import read_values
from edgemoe.verify.logits import kl_of_rows

LARGEST, SMALLEST = "8 bits, g64", 0.12  # our sizes: from this peer's to this share of the checkpoint's bytes
CONTEXT = 512
CALIBRATION_WINDOWS = 16  # of the peers that calibrate
SHARES = (0.75, 0.5)  # of experts that REAP keeps
MORE = 1.1  # a peer may have so many times our bytes
EQUAL = 1.002  # and still count as a file of equal bytes
Kept = tuple[tuple[int, ...], ...]
TARGET = "mlx-f16"
COLUMNS = ("MB", "kept", "predicted", "KL", "KL / predicted", "best peer of equal bytes", "ours / it", "best of 10 % more", "ours / it")


@dataclass(frozen=True)
class File:
    """A measured file: its bytes, and its KL in each window."""

    kind: str
    name: str
    size: int
    windows: tuple[float, ...]
    predicted: float = 0.0
    kept: int = 0


class Bench:
    """A model with its texts, statistics and reference, and the log of what was measured."""

    def __init__(self, source: Path, work: Path, tokens: int, calibration_tokens: int) -> None:
        self.source, self.work, self.calibration_tokens = source, work, calibration_tokens
        work.mkdir(parents=True, exist_ok=True)
        self.model = inspect_model(source)
        self.calibration, heldout = choose_texts([], [])
        self.check = write_texts(work / "texts-check", (first_words(heldout[0]),))
        self.files = write_texts(work / "texts", self.calibration)
        self.reference = Reference(self.model, heldout, tokens, work)
        self.stats: Stats = collect_stats(self.model, self.calibration, work, max_tokens=calibration_tokens)
        self.target: Target = find_target(TARGET)
        self.log = work / "mlx.jsonl"
        lines = self.log.read_text().splitlines() if self.log.exists() else []
        self.known = {key: File(**{**values, "windows": tuple(values["windows"])}) for key, values in map(json.loads, lines)}

    def key(self, *parts: object) -> str:
        """Of a file and the windows that it is measured on."""
        return hash_json(self.reference.key, *parts)

    def remember(self, key: str, file: File) -> File:
        """Keep what was measured."""
        self.known[key] = file
        with self.log.open("a") as log:
            log.write(json.dumps([key, file.__dict__]) + "\n")
        print(f"  {file.kind}, {file.name}: {file.size} bytes, KL {self.mean(file):.5f}", flush=True)
        return file

    def mean(self, file: File) -> float:
        """KL in nats per token, the mean over texts."""
        return float(np.mean([part.mean() for part in self.reference.split(file.windows)]))

    # -------------------------------------------------------------------------------------------------------- measuring
    def kl_of(self, values: Mapping[str, F32], kept: Kept, width: int = 0) -> tuple[float, ...]:
        """KL of the model with these weights in each window; `values` by the names of an MLX folder, `width` of cut experts."""
        changed = self.lay_over(values, kept, width)
        windows, head = self.reference.windows, read_tensor(changed.folder, changed.output_matrix)
        states = final_states(changed, windows, self.work, kept=kept)
        pairs = zip(self.reference.states, states, windows.lengths, strict=True)
        return tuple(float(kl_of_rows(a[:n] @ self.reference.head.T, b[:n] @ head.T).mean()) for a, b, n in pairs)

    def lay_over(self, values: Mapping[str, F32], kept: Kept, width: int) -> Model:
        """The model in which these weights replace the checkpoint's; dropped experts are zero, and are never run."""
        model = resize_experts(self.model, width) if width else self.model
        names, folder = tensor_names(model), self.work / "decoded"
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        kept_of = dict(zip(self.model.moe_layers, kept, strict=True))
        for layer in range(-1, model.n_layers):
            arrays: dict[str, Any] = {}
            for (role, expert), tensor in model.of_layer(layer).items():
                value = values[names[role, layer]]
                if is_stack(role):
                    stays = expert in kept_of[layer]
                    arrays[f"{role}.{expert}"] = value[kept_of[layer].index(expert)] if stays else np.zeros(tensor.shape, np.float32)
                elif role in ("ffn_gate_inp", "exp_probs_b.bias"):
                    whole = read_tensor(self.model.folder, tensor).copy()
                    whole[list(kept_of[layer])] = value
                    arrays[f"{role}.{expert}"] = whole
                else:
                    arrays[f"{role}.{expert}"] = value.reshape(tensor.shape)
            save_arrays(folder / array_file(layer), arrays)
        return save_overlay(model, folder, {})

    # ------------------------------------------------------------------------------------------------------------ peers
    def base(self, dtype: str, kept: Kept) -> Path:
        """A folder of 16-bit floats with these experts, from which peers start."""
        target = find_target(f"mlx-{dtype}")
        folder = self.work / f"base-{dtype}-{hash_json(kept)[:8]}"
        if not folder.exists():
            folder.mkdir()
            costs = price_cached(self.model, self.stats, target, CONTEXT, self.work, None)[0]
            plan = solve_plan(costs, 10**15)
            formats = dict.fromkeys(plan.formats, "F16")
            count = len(kept[0])
            sizes = {unit.name: target.unit_size(self.model, unit, "F16", count) for unit in plan.units}
            target.write(self.model, self.stats, replace(plan, kept=kept, formats=formats, sizes=sizes, repair=False), folder, 0, None)
        return folder

    def importance(self) -> dict[str, F32]:
        """Mean squares of the inputs of each weight's columns, by its name in an MLX folder."""
        names, found = tensor_names(self.model), dict[str, F32]()
        for layer in range(-1, self.model.n_layers):
            by_role: dict[str, list[F32]] = {}
            for (role, _), columns in sorted(importance_of(self.model, self.stats, layer).items()):
                by_role.setdefault(role, []).append(columns)
            found |= {names[role, layer]: np.stack(parts) if is_stack(role) else parts[0] for role, parts in by_role.items()}
        return found

    def peers(self) -> list[File]:
        """All peers, each measured once."""
        everyone = tuple(tuple(range(self.model.n_experts)) for _ in self.model.moe_layers)
        windows = tokenize(self.model, self.calibration, CALIBRATION_WINDOWS * WINDOW, WINDOW)
        full = windows.tokens[windows.lengths == WINDOW]

        def every() -> Iterator[tuple[Peer, Kept]]:
            bf16, f16 = self.base("bf16", everyone), self.base("f16", everyone)
            yield from ((peer, everyone) for peer in stock_peers(bf16, f16))
            for share in SHARES:
                kept = recipes.kept_sets(self.model, self.stats, "reap", share)
                yield from ((peer, kept) for peer in dropped_peers(self.base("bf16", kept), "REAP", f"{share:.0%}"))
            yield from ((peer, everyone) for peer in calibrated_peers(bf16, f16, full, self.importance()))

        done = self.work / "peers.json"
        if not done.exists():
            for peer, kept in every():
                key = self.key(peer.kind, peer.name, self.stats.key)
                if key not in self.known:
                    self.remember(key, File(peer.kind, peer.name, peer.size, self.kl_of(peer.values, kept), kept=len(kept[0])))
            done.write_text(json.dumps([key for key, file in self.known.items() if file.kind != "ours"]))
        return [self.known[key] for key in json.loads(done.read_text())]

    # ------------------------------------------------------------------------------------------------------------- ours
    def ours(self, size: int) -> File:
        """Our folder for so many bytes, as `edgemoe build --target mlx --refine 1` makes it."""
        key = self.key("ours", size, hash_code(), self.calibration_tokens)
        if key in self.known:
            return self.known[key]
        costs = price_cached(self.model, self.stats, self.target, CONTEXT, self.work, None)[0]
        request = BuildRequest(
            model=str(self.source),
            memory=size + peak({**costs.memory, "weights": 0, "staging": 0}),
            rules=(ByteLimit(at_most=f"{size - int(costs.fixed_size.max())}B"),),
            out=self.work / f"ours-{size}",
            target=TARGET,
            context=CONTEXT,
            calibration=self.files,
            calibration_tokens=self.calibration_tokens,
            heldout=self.check,
            refine=1,
            work=self.work,
            force=True,
        )
        try:
            build_artifact(request)
        except VerifyError as error:
            print(f"  note: {error}")
        plan = load_record(request.out / "report.json", Report).plan
        windows = self.kl_of(dict(read_values(request.out)), plan.kept, plan.width)
        found = File("ours", f"{size}", plan.file_size, windows, predicted=plan.predicted_kl, kept=plan.count)
        shutil.rmtree(request.out)
        return self.remember(key, found)


# ------------------------------------------------------------------------------------------------------------------ tables
def best_of(bench: Bench, peers: Sequence[File], most: float) -> File | None:
    """The peer with the least KL among those of at most so many bytes."""
    return min((peer for peer in peers if peer.size <= most), key=bench.mean, default=None)


def write_up(bench: Bench, command: str, ours: Sequence[File], peers: Sequence[File]) -> str:
    """All tables as one page."""
    lines = [f"# {bench.model.name}: MLX folders at equal bytes", "", f"{table.made_by(command)}.", ""]
    tokens, count = int(bench.reference.windows.lengths.sum()), len(peers)
    lines += [
        f"KL in nats per token against the original in float32, on {tokens} held-out tokens, of what the bytes of a file decode to, with",
        f"float32 activations. ± is one standard error over windows. Ours are folders of float16 with one round of refinement. {count}",
        'files of peers stand beside them. "Equal bytes" allows a peer 0.2 % more bytes than ours, and the next columns 10 % more.',
        "",
        *table.head(
            ("MB", "kept", "predicted", "KL", "KL / predicted", "best peer of equal bytes", "ours / it", "best of 10 % more", "ours / it")
        ),
    ]
    equal, more = [], []
    for file in ours:
        mean, error = mean_and_error(bench.reference.split(file.windows))
        cells: list[object] = [f"{file.size / 1e6:.2f}", f"{file.kept} of {bench.model.n_experts}", f"{file.predicted:.3g}"]
        cells += [f"**{mean:.3g}** ± {error:.1g}", f"{mean / file.predicted:.2f}"]
        for share, found in ((EQUAL, equal), (MORE, more)):
            peer = best_of(bench, peers, share * file.size)
            if peer is None:
                cells += ["-", "-"]
                continue
            found.append(mean / bench.mean(peer))
            cells += [f"{bench.mean(peer):.3g} ({peer.kind}: {peer.name}, {peer.size / 1e6:.2f})", f"{found[-1]:.2f}"]
        lines.append(table.row(cells))
    means = [math.exp(float(np.mean(np.log(found)))) for found in (equal, more)]
    lines += ["", f"Geometric mean of ours / best peer: {means[0]:.2f} at equal bytes, {means[1]:.2f} of 10 % more bytes.", ""]
    lines += ["## Every peer", "", *table.head(("kind", "file", "kept", "MB", "KL"))]
    for peer in sorted(peers, key=lambda p: (p.kind, p.size)):
        mean, error = mean_and_error(bench.reference.split(peer.windows))
        lines.append(table.row((peer.kind, peer.name, peer.kept, f"{peer.size / 1e6:.2f}", f"{mean:.3g} ± {error:.1g}")))
    return "\n".join([*lines, ""])


def main() -> None:
    """Measure everything; write the table and the picture."""
    parser = make_parser(__doc__, work=True, tokens=10_240, calibration_tokens=65_536, results="mlx-NAME.md and mlx-NAME.svg")
    parser.add_argument("model", type=Path)
    parser.add_argument("--budgets", type=int, default=8, help="how many sizes")
    options = parser.parse_args()
    bench = Bench(options.model, options.work / f"mlx-{options.model.name}", options.tokens, options.calibration_tokens)
    peers = bench.peers()
    largest = next(peer.size for peer in peers if peer.name == LARGEST)
    lowest = SMALLEST * bench.model.n_bytes
    sizes = [round(largest * (lowest / largest) ** (i / (options.budgets - 1))) for i in range(options.budgets)]
    ours = [bench.ours(size) for size in sizes]
    command = f"python benchmarks/mlx_quality.py {options.model} --tokens {options.tokens} --budgets {options.budgets}"
    text = write_up(bench, command, ours, peers)
    table.save(options.results, f"mlx-{bench.model.name}.md", [text])
    dots: dict[str, list[table.Point]] = {}
    for peer in peers:
        dots.setdefault(peer.kind, []).append((peer.size, bench.mean(peer)))
    picture = table.draw(f"{bench.model.name}: MLX folders at equal bytes", [(f.size, bench.mean(f)) for f in ours], dots)
    (options.results / f"mlx-{bench.model.name}.svg").write_text(picture)
    print(text)


if __name__ == "__main__":
    main()
