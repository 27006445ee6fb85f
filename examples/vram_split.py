"""Two memories: attention and everything else that each token reads on the GPU, expert stacks there as far as they fit, the rest in RAM.

    python examples/vram_split.py [MODEL] [--vram SIZE] [--memory SIZE] [--work DIR]

Prints the plan's flags for llama.cpp.  Planned from llama.cpp's rules; bytes of the GPU's own buffers were never measured on a GPU here.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import edgemoe as em
from edgemoe.rules import Vram
from edgemoe.targets.gguf.export import gpu_flags


def main() -> None:
    """Price the model once; plan for RAM alone and for both."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", default=str(Path(__file__).parent / "tiny-moe-b"))
    parser.add_argument("--memory", default="36MB", help="main memory of the process")
    parser.add_argument("--vram", default="12MB", help="GPU memory; what driver and runtime take is --reserve")
    parser.add_argument("--reserve", default="1MB")
    parser.add_argument("--work", type=Path, default=Path("example-work"))
    parser.add_argument("--calibration-tokens", type=int, default=16_384)
    options = parser.parse_args()
    costs = em.price_model(options.model, options.work, context=512, calibration_tokens=options.calibration_tokens)
    plan = em.solve_plan(costs, em.parse_bytes(options.memory), rules=[Vram(size=options.vram, reserve=options.reserve)])
    on_gpu = sum(plan.sizes[name] for name in plan.vram)
    print(f"{plan.count} of {plan.n_experts} experts, predicted KL {plan.predicted_kl:.4f}")
    print(f"GPU {on_gpu} bytes of weights in {len(plan.vram)} tensors, RAM {plan.file_size - on_gpu}")
    print("llama-server -m MODEL.gguf", *gpu_flags(plan))


if __name__ == "__main__":
    main()
