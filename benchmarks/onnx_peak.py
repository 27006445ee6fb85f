"""This script compares the peak memory of ONNX Runtime processes on random artifacts with what was predicted from their shapes.

    python benchmarks/onnx_peak.py [--folder /tmp] [--only NAME ...]

Each artifact is written, run with a full context (VmHWM of the child) and deleted.  A prediction holds for any machine, so it counts the
most that Python, numpy and onnxruntime were seen to take.  How much of their libraries Linux maps depends on how the page cache came by
them, and differs by 12 MiB between installations of the same wheels: so an empty session is measured too, and "here" is the prediction
with that in its place.  Bounds: never more than predicted, and "here" within 5 % of measured.
"""

from __future__ import annotations

import os
import platform
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
from arguments import make_parser

from edgemoe.ir import Model
from edgemoe.ir.memory import peak
from edgemoe.targets.child_process import run_job
from edgemoe.targets.onnx.memory import RUNTIME, memory_parts, unit_extra
from edgemoe.targets.onnx.run import run
from edgemoe.targets.onnx.writer import list_units

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
from onnx_random import random_model, spread_formats, write_random  # real graphs with random weights

MIXED = ("INT2_32", "INT3_32", "INT4_32", "INT8_32")
DROPPED = ("INT2_64", "", "INT4_32", "INT3_64", "INT8_128")  # every fifth expert is gone
CHECKPOINT: dict[str, Any] = {"num_experts_per_tok": 2, "moe_intermediate_size": 1024, "num_hidden_layers": 6}  # of make_random_checkpoint
BUNDLED: dict[str, Any] = {  # tiny-moe's widths
    "hidden_size": 256,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "num_experts": 16,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 256,
    "num_hidden_layers": 4,
    "vocab_size": 4096,
}
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
    "tiny-moe, INT4": (BUNDLED, ("INT4_32",), "INT8_32", "INT8_32", 512),
    "tiny-moe, INT8": (BUNDLED, ("INT8_32",), "INT8_32", "INT8_32", 512),
    "tiny-moe, mixed": (BUNDLED, MIXED, "INT8_32", "INT8_32", 512),
    "tiny-moe, INT3": (BUNDLED, ("INT3_32",), "INT4_32", "INT4_32", 512),
    "tiny-moe, INT2": (BUNDLED, ("INT2_32",), "INT4_32", "INT4_32", 512),
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


def measure_empty(folder: str) -> int:
    """Peak of a process with a session that does nothing."""
    import onnx

    value = [onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, [1]) for name in "xy"]
    graph = onnx.helper.make_graph([onnx.helper.make_node("Identity", ["x"], ["y"])], "empty", value[:1], value[1:])
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        path, script = Path(scratch) / "model.onnx", Path(scratch) / "empty.py"
        onnx.save(onnx.helper.make_model(graph, ir_version=10, opset_imports=[onnx.helper.make_opsetid("", 21)]), path)
        script.write_text("def do(job):\n    import numpy, onnxruntime\n    onnxruntime.InferenceSession(job['path'])\n    return {}\n")
        peak: int = run_job(script, path, {}, None, runtime="onnxruntime", hint="", environment={})["peak"]
    return peak


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
    parser = make_parser(__doc__)
    parser.add_argument("--folder", default=tempfile.gettempdir())
    parser.add_argument("--only", nargs="+", default=[])
    options = parser.parse_args()
    print(f"onnxruntime {version('onnxruntime')}, {platform.machine()}, {os.cpu_count()} cores, {time.strftime('%Y-%m-%d')}, MiB\n")
    empty = max(measure_empty(options.folder) for _ in range(3))
    print(f"An empty session: {empty / 2**20:.1f}; counted on in predictions: {RUNTIME / 2**20:.1f}\n")
    print("| experts | layers | file | context | predicted | here | measured | here off by | |\n|---|---|---|---|---|---|---|---|---|")
    for name, case in CASES.items():
        if options.only and name not in options.only:
            continue
        model, size, predicted, measured = measure(case, options.folder)
        here = predicted - RUNTIME + empty
        verdict = "ok" if measured <= predicted and abs(here / measured - 1) <= 0.05 else "OUT OF BOUNDS"
        shown = " | ".join(f"{value / 2**20:.1f}" for value in (predicted, here, measured))
        figures = f"{size / 2**20:.1f} | {case[-1]} | {shown} | {here / measured - 1:+.2%}"
        print(f"| {name} | {model.n_layers} | {figures} | {verdict} |", flush=True)


if __name__ == "__main__":
    main()
