"""This script compares the peak memory of llama.cpp processes on large random GGUFs with what was predicted from their shapes.

    python benchmarks/peak.py [--folder /tmp] [--only NAME ...]

Each file is written, run with a full context (VmHWM of the child) and deleted.  Bounds: predicted within 3 % of measured, and never below
it by more than max(1 %, 2 MiB).
"""

from __future__ import annotations

import dataclasses
import os
import platform
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
from arguments import make_parser

from edgemoe.ir.memory import Settings
from edgemoe.targets.gguf.formats import quantize
from edgemoe.targets.gguf.run import run

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
from oracles import child_settings, predict_peak
from shapes import Tiny, gqa, mla, sliding, write_sparse  # the same shapes that the memory model is tested on

ATTENTION = ("attn_q", "attn_k", "attn_v", "attn_output")
SHAPE: dict[str, Any] = {"hidden": 1024, "heads": 16, "kv_heads": 4, "dim": 64, "n_experts": 32, "size": 1024, "vocab": 4096}
QWEN: dict[str, Any] = {"hidden": 2048, "heads": 32, "kv_heads": 4, "dim": 128, "n_experts": 64, "top_k": 8, "size": 768, "vocab": 4096}


def types(gate: str, down: str, attention: str = "Q8_0", ends: str = "Q8_0") -> dict[str, str]:
    """Types of all matrices by role."""
    experts = {"ffn_gate_exps": gate, "ffn_up_exps": gate, "ffn_down_exps": down}
    return experts | dict.fromkeys(ATTENTION, attention) | dict.fromkeys(("token_embd", "output"), ends)


def cases() -> dict[str, tuple[Tiny, Settings]]:
    """Name -> file and settings."""
    plain = Settings(context=2048)
    wide = gqa(**{**SHAPE, "vocab": 151936}, layers=5, types=types("IQ4_XS", "IQ4_XS", ends="Q6_K"))
    return {
        "Q8_0": (gqa(**SHAPE, layers=5, types=types("Q8_0", "Q8_0")), plain),
        "Q4_K repacked": (gqa(**SHAPE, layers=10, types=types("Q4_K", "Q4_K", "Q4_K", "Q4_K")), plain),
        "Q2_K repacked": (gqa(**SHAPE, layers=17, types=types("Q2_K", "Q2_K")), plain),
        "Q4_K, Q6_K mixed, Mixtral": (gqa("llama", **SHAPE, layers=9, types=types("Q4_K", "Q6_K", "Q5_K")), plain),
        "IQ2_S, IQ3_XXS": (gqa(**SHAPE, layers=17, types=types("IQ2_S", "IQ3_XXS", "IQ4_XS", "IQ4_XS")), plain),
        "IQ4_XS, 151936 tokens": (dataclasses.replace(wide, bpe=True), plain),
        "Q4_K repacked, mapped": (
            gqa(**SHAPE, layers=10, types=types("Q4_K", "Q4_K", "Q4_K", "Q4_K")),
            dataclasses.replace(plain, mmap=True),
        ),
        "Q8_0, mapped": (gqa(**SHAPE, layers=5, types=types("Q8_0", "Q8_0")), dataclasses.replace(plain, mmap=True)),
        "Q3_K, Q4_K, top-8, Qwen3-30B's widths": (gqa(**QWEN, layers=4, types=types("Q3_K", "Q4_K")), plain),
        "Q8_0 KV, 4096 tokens": (gqa(**SHAPE, layers=10, types=types("IQ4_XS", "Q5_K")), Settings(context=4096, kv_k="Q8_0", kv_v="Q8_0")),
        "no flash attention": (gqa(**SHAPE, layers=5, types=types("Q8_0", "Q8_0")), dataclasses.replace(plain, flash=False)),
        "MLA, F16": (
            mla(
                hidden=1024,
                heads=16,
                rank=512,
                nope=128,
                value=128,
                q_rank=768,
                n_experts=64,
                size=512,
                layers=5,
                types=types("F16", "F16"),
            ),
            plain,
        ),
        "sliding windows, IQ4_XS": (
            sliding(hidden=1024, heads=16, n_experts=64, size=1024, layers=6, types=types("IQ4_XS", "IQ4_XS")),
            plain,
        ),
    }


def write(tiny: Tiny, path: Path) -> None:
    """A file with random weights: rows that ggml itself quantized, over and over."""
    write_sparse(tiny, path)
    rng = np.random.default_rng(0)
    sizes = [-(-size // 32) * 32 for _, _, size in tiny.units()]
    with path.open("r+b") as file:
        file.seek(path.stat().st_size - sum(sizes))
        for (_, kind, size), shape in zip(tiny.units(), tiny.tensors.values(), strict=True):
            rows = rng.standard_normal((min(64, int(np.prod(shape[:-1]))), shape[-1])).astype(np.float32) * shape[-1] ** -0.5
            if len(shape) == 1:
                rows = np.ones((1, *shape), np.float32)
            packed = quantize(rows, kind).tobytes() if kind != "F16" else rows.astype(np.float16).tobytes()
            file.write((packed * -(-size // len(packed)))[:size])
            file.seek(-(-file.tell() // 32) * 32)


def measure(tiny: Tiny, settings: Settings, folder: str) -> tuple[int, int, int, float]:
    """File size, predicted peak, measured peak, seconds."""
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        path = Path(scratch) / "random.gguf"
        write(tiny, path)
        size, began = path.stat().st_size, time.monotonic()
        job = {"context": settings.context, "tokens": list(range(1, 1000)), "prompts": [], "generate": 0, "repack": settings.repack}
        peak = run(path, {**job, "settings": child_settings(settings)})["peak"]
        return size, predict_peak(tiny.model, settings, size, tiny.units()), peak, time.monotonic() - began


def main() -> None:
    """Print a table, and say what is out of bounds."""
    parser = make_parser(__doc__)
    parser.add_argument("--folder", default=tempfile.gettempdir())
    parser.add_argument("--only", nargs="+", default=[])
    options = parser.parse_args()
    print(f"{platform.machine()}, {os.cpu_count()} cores, {time.strftime('%Y-%m-%d')}, MiB\n")
    print("| file | size | context | predicted | measured | off by | |\n|---|---|---|---|---|---|---|")
    for name, (tiny, settings) in cases().items():
        if options.only and name not in options.only:
            continue
        size, predicted, peak, _ = measure(tiny, settings, options.folder)
        good = predicted <= 1.03 * peak and predicted >= peak - max(peak // 100, 2 * 2**20)
        figures = f"{size / 2**20:.1f} | {settings.context} | {predicted / 2**20:.1f} | {peak / 2**20:.1f} | {predicted / peak - 1:+.2%}"
        print(f"| {tiny.arch}: {name} | {figures} | {'ok' if good else 'OUT OF BOUNDS'} |", flush=True)


if __name__ == "__main__":
    main()
