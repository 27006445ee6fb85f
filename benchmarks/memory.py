"""This script compares the peak memory of every stage and of the running artifact with what was promised, on a large checkpoint.

    python benchmarks/memory.py CHECKPOINT [--work DIR] [--share 0.5 0.25] [--target gguf] [--rounding feedback]

CHECKPOINT: any, e.g. of make_random_checkpoint.py.  Bound for calibrate, price and emit: two largest F32 layers + 1.5 GiB.  With
stock rounding survivors are not repaired either: memory is the same, and random weights have no quality.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

from arguments import make_parser

from edgemoe.base.units import format_bytes
from edgemoe.model.inspect import inspect_model

TEXTS = Path(__file__).parents[1] / "edgemoe" / "stream" / "data"
TOKENS = "8192"


def run_stage(*arguments: str) -> tuple[int, float, str]:
    """Peak bytes of the largest process of one command, its seconds and its output."""
    began = time.monotonic()
    with subprocess.Popen([sys.executable, "-m", "edgemoe", *arguments], stdout=subprocess.PIPE, text=True) as child:
        assert child.stdout is not None
        out = child.stdout.read()
        _, status, usage = os.wait4(child.pid, 0)
        child.returncode = os.waitstatus_to_exitcode(status)
    if child.returncode:
        raise SystemExit(f"edgemoe {' '.join(arguments)}: exit {child.returncode}")
    return usage.ru_maxrss * 1024, time.monotonic() - began, out


def main() -> None:
    """Run the stages one by one and print a table."""
    parser = make_parser(__doc__)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--work", type=Path, default=Path("bench/memory"))
    parser.add_argument("--share", type=float, nargs="+", default=[0.5, 0.25], help="budgets as shares of the checkpoint's bytes")
    parser.add_argument("--target", default="gguf")
    parser.add_argument("--rounding", default="feedback")
    options = parser.parse_args()
    model = inspect_model(options.checkpoint)
    layer = max(sum(t.n_weights for t in model.tensors if t.layer == i) for i in range(-1, model.n_layers)) * 4
    bound = 2 * layer + 3 * 2**29
    work, source = options.work, str(options.checkpoint)
    print(f"{model.name}: {format_bytes(model.n_bytes)}, largest F32 layer {format_bytes(layer)}, bound {format_bytes(bound)}")
    peak, seconds, out = run_stage("calibrate", source, "-o", str(work), "--calibration-tokens", TOKENS, "--json")
    stats = json.loads(out)["stats"]
    print(f"calibrate  peak {format_bytes(peak)}  {'ok' if peak <= bound else 'OVER'}  {seconds:.0f} s", flush=True)
    peak, seconds, _ = run_stage("price", source, stats, "-o", str(work / "costs.json"), "--target", options.target)
    print(f"price      peak {format_bytes(peak)}  {'ok' if peak <= bound else 'OVER'}  {seconds:.0f} s", flush=True)
    for share in options.share:
        budget, folder = int(model.n_bytes * share), work / f"out-{share}"
        stock = ["--rounding", "stock"] if options.rounding == "stock" else []
        repair = ["--no-repair"] if stock else []
        run_stage("plan", str(work / "costs.json"), "--memory", f"{budget}B", "-o", str(work / "plan.json"), *stock, *repair)
        peak, seconds, _ = run_stage("emit", source, stats, str(work / "plan.json"), "-o", str(folder), "--force", *stock)
        print(f"emit       peak {format_bytes(peak)}  {'ok' if peak <= bound else 'OVER'}  {seconds:.0f} s", flush=True)
        _, seconds, out = run_stage("verify", source, str(folder), "--heldout", str(TEXTS / "heldout" / "english.txt"), "--json")
        report = json.loads(out)
        predicted, measured = report["plan"]["memory"]["peak"], report["measured_peak"]
        print(f"run at {share:.0%}: budget {format_bytes(budget)}, predicted {format_bytes(predicted)}, measured {format_bytes(measured)}")
        print(
            f"           off by {predicted / measured - 1:+.1%}, {'fits' if measured <= budget else 'DOES NOT FIT'}  {seconds:.0f} s",
            flush=True,
        )


if __name__ == "__main__":
    main()
