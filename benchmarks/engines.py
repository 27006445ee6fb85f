"""This script compares llama.cpp and transformers as engines of calibration: the same statistics, the same probes, and their time.

    python benchmarks/engines.py examples/tiny-moe examples/tiny-moe-b [--calibration-tokens 16384] [--work DIR]

Each model is written as a GGUF in float32, and both engines watch it on the shipped texts.  Times are processor seconds of the whole
calibration with one thread.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path

import numpy as np
import table
from arguments import make_parser

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

from tiny import flat_plan, flat_stats

from edgemoe.base.storage import array_file, load_arrays
from edgemoe.calibrate.collect import collect_stats
from edgemoe.ir import Stats
from edgemoe.model.inspect import inspect_model
from edgemoe.stream.engine.stream import EngineStream
from edgemoe.stream.texts import choose_texts
from edgemoe.stream.windows import CHUNK_TOKENS, WINDOW
from edgemoe.targets import find_target

COLUMNS = (
    "model",
    "tokens",
    "choices",
    "moved",
    "sums apart",
    "probes",
    "KL apart, mean of texts",
    "KL apart, one text",
    "CPU s",
    "of transformers",
)
NOTE = """Differences are relative: of sums to the largest of their array, the worst of all arrays that are stored in full; of KL to its own
size, the worst of all probes. "Moved" are choices of experts in which the engines differ."""


def main() -> None:
    """Compare the engines on every model."""
    parser = make_parser(__doc__, work=True, calibration_tokens=16_384, results="the table")
    parser.add_argument("models", nargs="+", type=Path)
    arguments = parser.parse_args()
    names, tokens = " ".join(map(str, arguments.models)), arguments.calibration_tokens
    rows = [table.row(compare(folder, arguments.work / f"engines-{folder.name}", tokens)) for folder in arguments.models]
    made = table.made_by(f"python benchmarks/engines.py {names} --calibration-tokens {tokens}")
    lines = ["# llama.cpp and transformers as engines of calibration", "", made + ".", "", NOTE, "", *table.head(COLUMNS), *rows, ""]
    print(table.save(arguments.results, "engines.md", lines))


def compare(folder: Path, work: Path, tokens: int) -> tuple[object, ...]:
    """One row of the table."""
    model, texts, target = inspect_model(folder), choose_texts((), ())[0], find_target("gguf")
    work.mkdir(parents=True, exist_ok=True)
    path = target.write(model, flat_stats(model, work / "flat"), flat_plan(model, "F32"), work, 0, None).path
    stream = EngineStream(model, path, windows=CHUNK_TOKENS // WINDOW, length=WINDOW, threads=1)
    took, stats = [], []
    for name, engine in (("theirs", None), ("ours", stream)):
        began = time.process_time()
        stats.append(collect_stats(model, texts, work / name, max_tokens=tokens, stream=engine))
        took.append(time.process_time() - began)
    stream.close()
    moved, choices, apart = 0, 0, 0.0
    for layer in range(-1, model.n_layers):
        expected, found = (load_arrays(Path(each.folder) / array_file(layer)) for each in stats)
        for key, value in found.items():
            if key == "count":
                moved, choices = moved + int(np.abs(value - expected[key]).sum()) // 2, choices + int(value.sum())
            elif key not in ("replay_x", "gram", "candidates", "replay_domain"):  # the first two are stored in bfloat16, or made from it
                apart = max(apart, float(np.abs(value - expected[key]).max() / np.abs(expected[key]).max()))
    theirs, ours = (np.array([probe.kl for probe in each.probes]) for each in stats)
    one, mean = np.abs(ours / theirs - 1).max(), np.abs(ours.mean(1) / theirs.mean(1) - 1).max()
    said = (f"{apart:.1e}", len(ours), f"{mean:.1e}", f"{one:.1e}", f"{took[1]:.0f}", f"{took[1] / took[0]:.2f}")
    return (folder.name, _tokens(stats[0]), choices, moved, *said)


def _tokens(stats: Stats) -> int:
    return sum(domain.tokens for domain in stats.domains)


if __name__ == "__main__":
    main()
