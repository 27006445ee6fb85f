"""This script times ONNX artifacts: whether decoding slows down with more experts, and how fast the same model is as GGUF.

    python benchmarks/onnx_speed.py [--rounds 7] [--threads 1] [--folder /tmp]

All files of a table run in turn, round after round, so that what else the machine does strikes all of them; figures are medians of the
rounds, and the best round behind them.  Bound: a token takes at most 1.3 times as long with 128 experts as with 8.
"""

from __future__ import annotations

import os
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

from arguments import make_parser
from peak import types
from peak import write as write_random_gguf

from edgemoe.model.inspect import inspect_model
from edgemoe.targets import gguf, onnx

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
from onnx_folder import write_folder
from onnx_random import random_model, spread_formats, write_random
from shapes import gqa
from tiny import flat_plan, flat_stats

BOUND = 1.3
CONTEXT, TOKENS = 160, list(range(1, 1000))
COUNTS = (8, 32, 128)
SHAPE: dict[str, Any] = {"num_hidden_layers": 2, "hidden_size": 1024, "moe_intermediate_size": 256, "num_experts_per_tok": 4}
WIDTHS = {"INT4": ("INT4_32",), "INT2, INT4, INT8 mixed": ("INT2_32", "INT4_32", "INT8_32", "INT4_32")}
EXAMPLE = Path(__file__).parents[1] / "examples" / "tiny-moe"

Run = Callable[[], dict[str, Any]]


def rounds(runs: Mapping[str, Run], count: int) -> dict[str, tuple[list[float], list[float]]]:
    """Prompt and decode tokens per second of every file, in turn, `count` times."""
    found: dict[str, tuple[list[float], list[float]]] = {name: ([], []) for name in runs}
    for _ in range(count):
        for name, run in runs.items():
            measured = run()
            found[name][0].append(measured["prompt_tokens_per_second"])
            found[name][1].append(measured["decode_tokens_per_second"])
    return found


def runner(target: Any, path: Path, threads: int) -> Run:
    """One measuring run of an artifact."""
    job = {"context": CONTEXT, "tokens": TOKENS, "prompts": [], "generate": 0, "repack": True, "settings": {"threads": threads}}
    return lambda: dict(target.run(path, job, None))


def file_size(path: Path) -> float:
    """MiB of the weights and the graph."""
    return sum(file.stat().st_size for file in path.parent.glob(f"{path.name}*")) / 2**20


def compare_counts(folder: Path, count: int, threads: int) -> None:
    """Decode time by number of experts."""
    print("| experts' formats | experts | file | decode tokens/s (best) | time of a token against 8 experts | |\n|---|---|---|---|---|---|")
    for label, widths in WIDTHS.items():
        paths = {}
        for experts in COUNTS:
            model = random_model(**SHAPE, num_experts=experts)
            paths[str(experts)] = write_random(model, spread_formats(model, widths), folder / f"{len(widths)}-{experts}")
        found = rounds({name: runner(onnx, path, threads) for name, path in paths.items()}, count)
        base = statistics.median(found[str(COUNTS[0])][1])
        for name, (_, decode) in found.items():
            middle = statistics.median(decode)
            verdict = "" if name == str(COUNTS[0]) else "ok" if base / middle <= BOUND else "SLOWER THAN THE BOUND"
            print(
                f"| {label} | {name} | {file_size(paths[name]):.0f} | {middle:.1f} ({max(decode):.1f}) | {base / middle:.2f} | {verdict} |"
            )
        sys.stdout.flush()


def example_files(folder: Path) -> dict[str, tuple[Any, Path]]:
    """examples/tiny-moe as both targets write it, at about 4 and 8 bits."""
    model, found = inspect_model(EXAMPLE), {}
    for name, experts, kind in (("4 bits", "INT4_32", "Q4_0"), ("8 bits", "INT8_32", "Q8_0")):
        _, artifact = write_folder(EXAMPLE, folder / f"onnx-{kind}", lambda unit, e=experts: e if unit.expert >= 0 else "INT8_32")
        found[f"tiny-moe, {name}: ONNX"] = (onnx, artifact.path)
        out = folder / f"gguf-{kind}"
        out.mkdir()
        plan = flat_plan(model, {u.name: kind if u.role.endswith("_exps") else "Q8_0" for u in gguf.TARGET.list_units(model)})
        written = gguf.TARGET.write(model, flat_stats(model, out / "stats"), plan, out, 2**40, None)
        found[f"tiny-moe, {name}: GGUF"] = (gguf, written.path)
    return found


def random_files(folder: Path) -> dict[str, tuple[Any, Path]]:
    """A random model of 300 MB at about 4 bits in both."""
    model = random_model(num_hidden_layers=8)
    path = write_random(model, spread_formats(model, ["INT4_32"]), folder / "random")
    shape: dict[str, Any] = {"hidden": 1024, "heads": 16, "kv_heads": 4, "dim": 64, "n_experts": 32, "top_k": 4, "size": 512, "vocab": 4096}
    other = folder / "random.gguf"
    write_random_gguf(gqa(**shape, layers=8, types=types("Q4_0", "Q4_0")), other)
    return {"random, 4 bits: ONNX": (onnx, path), "random, 4 bits: GGUF": (gguf, other)}


def compare_runtimes(folder: Path, count: int, threads: int) -> None:
    """The same models in onnxruntime and in llama.cpp."""
    print("\n| model | file | prompt tokens/s (best) | decode tokens/s (best) |\n|---|---|---|---|")
    for files in (example_files(folder), random_files(folder)):
        found = rounds({name: runner(target, path, threads) for name, (target, path) in files.items()}, count)
        for name, speeds in found.items():
            columns = [f"{statistics.median(values):.1f} ({max(values):.1f})" for values in speeds]
            print(f"| {name} | {file_size(files[name][1]):.1f} | {' | '.join(columns)} |", flush=True)


def main() -> None:
    """Print both tables."""
    parser = make_parser(__doc__)
    parser.add_argument("--folder", default=tempfile.gettempdir())
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    runtimes = f"onnxruntime {version('onnxruntime')}, llama-cpp-python {version('llama-cpp-python')}"
    load = f"{options.rounds} rounds, load average {os.getloadavg()[0]:.0f}"
    print(
        f"{runtimes}, {platform.machine()}, {os.cpu_count()} cores, {options.threads} threads, {load}, {time.strftime('%Y-%m-%d')}, MiB\n"
    )
    for compare in (compare_counts, compare_runtimes):
        with tempfile.TemporaryDirectory(dir=options.folder) as folder:
            compare(Path(folder), options.rounds, options.threads)


if __name__ == "__main__":
    main()
