"""Peak memory of ONNX Runtime processes on random artifacts of 75 to 700 MiB, beside what was predicted from their shapes.

    python benchmarks/onnx_peak.py [--folder /tmp] [--only NAME ...]

Each artifact is written, run with a full context (VmHWM of the child) and deleted.  Bounds: never more than predicted, and predicted within
5 % of measured.
"""

from __future__ import annotations

import argparse
import os
import platform
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

from edgemoe.ir import Model
from edgemoe.memory import peak
from edgemoe.targets.onnx import list_units, memory_parts, run, unit_extra

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
from onnx_random import random_model, spread_formats, write_random  # real graphs with random weights

MIXED = ("INT2_32", "INT3_32", "INT4_32", "INT8_32")
DROPPED = ("INT2_64", "", "INT4_32", "INT3_64", "INT8_128")  # every fifth expert is gone
CHECKPOINT: dict[str, Any] = {"num_experts_per_tok": 2, "moe_intermediate_size": 1024, "num_hidden_layers": 6}  # of make_random_checkpoint
QWEN: dict[str, Any] = {  # Qwen3-30B-A3B's widths
    "hidden_size": 2048,
    "num_attention_heads": 32,
    "head_dim": 128,
    "num_experts": 64,
    "num_experts_per_tok": 8,
    "moe_intermediate_size": 768,
    "num_hidden_layers": 3,
}

# Name -> shape, formats of experts in turn, of attention, of embedding and output, context
Case = tuple[dict[str, Any], tuple[str, ...], str, str, int]
CASES: dict[str, Case] = {
    "INT4": ({"num_hidden_layers": 8}, ("INT4_32",), "INT8_32", "INT8_32", 512),
    "INT8": ({"num_hidden_layers": 8}, ("INT8_32",), "INT8_32", "INT8_32", 512),
    "INT2": ({"num_hidden_layers": 12}, ("INT2_32",), "INT4_32", "INT4_32", 512),
    "INT3": ({"num_hidden_layers": 12}, ("INT3_64",), "INT4_32", "INT4_32", 512),
    "INT3, 4096 tokens": ({"num_hidden_layers": 12}, ("INT3_64",), "INT4_32", "INT4_32", 4096),
    "mixed": ({"num_hidden_layers": 12}, MIXED, "INT8_32", "INT8_32", 512),
    "mixed, dropped experts": ({"num_hidden_layers": 10}, DROPPED, "INT4_64", "INT4_64", 2048),
    "mixed, 8192 tokens": ({"num_hidden_layers": 3}, MIXED, "INT8_32", "INT8_32", 8192),
    "INT4, 8192 tokens": ({"num_hidden_layers": 3}, ("INT4_32",), "INT8_32", "INT8_32", 8192),
    "wide experts, top-2": (CHECKPOINT, ("INT4_32", "INT8_32"), "INT8_32", "INT8_32", 1024),
    "Qwen3-30B's widths": (QWEN, ("INT2_32", "INT4_32", "INT4_64"), "INT8_32", "INT8_32", 512),
    "F32 ends": ({"num_hidden_layers": 6}, ("INT4_32", "INT3_32"), "INT8_64", "F32", 512),
}


def measure(case: Case, folder: str) -> tuple[Model, int, int, int]:
    """Shape, file size, predicted and measured peak."""
    config, experts, others, ends, context = case
    model = random_model(**config)
    formats = spread_formats(model, experts, others, ends)
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        path = write_random(model, formats, Path(scratch))
        size = sum(file.stat().st_size for file in path.parent.iterdir())
        extra = sum(unit_extra(model, u, formats[u.name], 0) for u in list_units(model) if u.name in formats)
        predicted = peak({**memory_parts(model, context), "weights": size + extra, "staging": 0})
        tokens = np.random.default_rng(0).permutation(model.vocab_size).tolist()
        measured = run(path, {"context": context, "tokens": tokens, "prompts": [], "generate": 0})["peak"]
        return model, size, predicted, measured


def main() -> None:
    """Print a table, and say what is out of bounds."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", default=tempfile.gettempdir())
    parser.add_argument("--only", nargs="+", default=[])
    options = parser.parse_args()
    print(f"onnxruntime {version('onnxruntime')}, {platform.machine()}, {os.cpu_count()} cores, {time.strftime('%Y-%m-%d')}, MiB\n")
    print("| experts | layers | file | context | predicted | measured | off by | |\n|---|---|---|---|---|---|---|---|")
    for name, case in CASES.items():
        if options.only and name not in options.only:
            continue
        model, size, predicted, measured = measure(case, options.folder)
        verdict = "ok" if measured <= predicted <= 1.05 * measured else "OUT OF BOUNDS"
        figures = f"{size / 2**20:.1f} | {case[-1]} | {predicted / 2**20:.1f} | {measured / 2**20:.1f} | {predicted / measured - 1:+.2%}"
        print(f"| {name} | {model.n_layers} | {figures} | {verdict} |", flush=True)


if __name__ == "__main__":
    main()
