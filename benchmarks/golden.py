"""This script hashes prices, plans and artifacts of small builds, so that a change of form can prove that it changes no number.

    python benchmarks/golden.py --work DIR [--record] [--only NAME ...]

Every case runs the command line in DIR and hashes what it leaves: the arrays of the price list, what the plan decided, and the bytes of the
GGUF or ONNX files without the keys of work folders that they name.  Without --record the hashes are compared with
benchmarks/results/golden.json; they hold for one kind of machine (the record names it), because matrix products round as the CPU has them.
"""

from __future__ import annotations

import hashlib
import json
import platform
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from arguments import make_parser

ROOT = Path(__file__).parents[1]
RECORD = ROOT / "benchmarks" / "results" / "golden.json"
CLI = [sys.executable, "-m", "edgemoe"]
TOKENS = ["--calibration-tokens", "8192"]
PLAN_FIELDS = (
    "kept",
    "formats",
    "sizes",
    "vram",
    "file_size",
    "memory",
    "q",
    "drop_q",
    "predicted_kl",
    "domain_q",
    "bound",
    "proven",
    "width",
)
VOLATILE = ("edgemoe.version", "edgemoe.stats", "edgemoe.costs", "edgemoe.model")  # keys of work folders, and what they are made of


@dataclass(frozen=True)
class Case:
    """One build: a model, options of `edgemoe build`, or a function that runs other commands."""

    model: str
    options: tuple[str, ...] = ()
    steps: Callable[[Path, Path, Path], None] | None = None


def by_stages(model: Path, work: Path, out: Path) -> None:
    """Price an importance matrix, plan and emit, each by its own command."""
    costs, plan = work / "imported" / "costs.json", work / "imported" / "plan.json"
    costs.parent.mkdir(parents=True, exist_ok=True)
    edgemoe("price", model, "--imatrix", model / "imatrix.gguf", "-o", costs)
    edgemoe("plan", costs, "--memory", "43MB", "-o", plan)
    stats = next(path.parent for path in costs.parent.glob("**/stats.json"))
    edgemoe("emit", model, stats, plan, "--rounding", "stock", "-o", out, "--force")


CASES = {
    "tiny-moe, feedback, drops": Case("tiny-moe", ("--memory", "41MB")),
    "tiny-moe, stock": Case("tiny-moe", ("--memory", "44MB", "--rounding", "stock")),
    "tiny-moe, onnx": Case("tiny-moe", ("--memory", "90MB", "--target", "onnx")),
    "tiny-moe-b, feedback": Case("tiny-moe-b", ("--memory", "40.5MB")),
    "tiny-moe-b, drops": Case("tiny-moe-b", ("--memory", "42.2MB", "--rounding", "stock", "--width", "full")),
    "tiny-moe-b, width": Case("tiny-moe-b", ("--memory", "38.6MB", "--width", "256")),
    "tiny-moe-b, top-k": Case("tiny-moe-b", ("--memory", "41MB", "--top-k", "1")),
    "tiny-moe-b, onnx, feedback": Case("tiny-moe-b", ("--memory", "87MB", "--target", "onnx")),
    "tiny-moe-b, onnx, stock": Case("tiny-moe-b", ("--memory", "87MB", "--target", "onnx", "--rounding", "stock")),
    "tiny-moe-b, imatrix": Case("tiny-moe-b", steps=by_stages),
    "olmoe, feedback": Case("olmoe", ("--memory", "41.5MB")),
    "olmoe, stock": Case("olmoe", ("--memory", "42.5MB", "--rounding", "stock")),
    "olmoe, onnx": Case("olmoe", ("--memory", "89MB", "--target", "onnx")),
    "tied qwen3_moe": Case("tied", ("--memory", "40.2MB")),
    "tied qwen3_moe, onnx": Case("tied", ("--memory", "87MB", "--target", "onnx")),
}  # fmt: skip


def edgemoe(*arguments: object) -> None:
    """Run a command; what it prints is shown only if it fails."""
    done = subprocess.run([*CLI, *map(str, arguments)], capture_output=True, text=True, check=False, cwd=ROOT)
    if done.returncode:
        raise RuntimeError(f"edgemoe {' '.join(map(str, arguments))}\n{done.stderr}")


def make_models(work: Path) -> dict[str, Path]:
    """The bundled models, and two random ones."""
    sys.path.insert(0, str(ROOT / "tests"))
    from tiny import WHOLE_VOCAB, make_checkpoint

    made = {"olmoe": work / "models" / "olmoe", "tied": work / "models" / "tied"}
    if not made["olmoe"].exists():
        make_checkpoint(made["olmoe"], "olmoe", seed=1, vocab=WHOLE_VOCAB)
    if not made["tied"].exists():
        make_checkpoint(made["tied"], "qwen3_moe", seed=2, tied=True, vocab=WHOLE_VOCAB)
    return made | {name: ROOT / "examples" / name for name in ("tiny-moe", "tiny-moe-b")}


# ------------------------------------------------------------------------------------------------------------------ hashes
def hash_arrays(path: Path) -> str:
    """Of arrays in a safetensors file, by name."""
    from safetensors.numpy import load_file

    digest = hashlib.sha256()
    for name, array in sorted(load_file(path).items()):
        digest.update(f"{name} {array.dtype} {array.shape}".encode() + np.ascontiguousarray(array).tobytes())
    return digest.hexdigest()


def hash_gguf(path: Path) -> str:
    """Of metadata and tensors of a GGUF."""
    import gguf

    reader, digest = gguf.GGUFReader(path), hashlib.sha256()
    for name, field in reader.fields.items():
        if name not in VOLATILE and not name.startswith("GGUF."):
            digest.update(f"{name} {field.contents()}".encode())
    for tensor in reader.tensors:
        digest.update(f"{tensor.name} {tensor.tensor_type} {tensor.shape.tolist()}".encode() + tensor.data.tobytes())
    return digest.hexdigest()


def hash_graph(path: Path) -> str:
    """Of an ONNX graph without its metadata."""
    import onnx

    model = onnx.load(path, load_external_data=False)
    kept = {p.key: p.value for p in model.metadata_props if p.key not in VOLATILE and not set(p.value) <= {"0", " "}}
    del model.metadata_props[:]
    return hashlib.sha256(model.SerializeToString(deterministic=True) + json.dumps(kept, sort_keys=True).encode()).hexdigest()


def hash_result(work: Path, out: Path) -> dict[str, str]:
    """Hashes of everything that one case left."""
    plan: Mapping[str, Any] = json.loads((out / "plan.json").read_text(encoding="utf-8"))
    found = {"plan": hashlib.sha256(json.dumps({n: plan[n] for n in PLAN_FIELDS}, sort_keys=True).encode()).hexdigest()}
    for number, path in enumerate(sorted(work.glob("**/costs*.safetensors"), key=hash_arrays)):
        found[f"costs {number}"] = hash_arrays(path)
    for path in sorted(out.glob("*.gguf")):
        found["gguf"] = hash_gguf(path)
    for path in sorted(out.glob("**/*.onnx*")):
        found[path.name] = hash_graph(path) if path.suffix == ".onnx" else hashlib.sha256(path.read_bytes()).hexdigest()
    return found


def run_case(name: str, case: Case, model: Path, work: Path) -> dict[str, str]:
    """Build anew and hash."""
    stem = "".join(c if c.isalnum() else "-" for c in name)
    own, out, began = work / f"{stem}.work", work / stem, time.monotonic()
    for old in (own, out):
        shutil.rmtree(old, ignore_errors=True)
    if case.steps is not None:
        case.steps(model, own, out)
    else:
        heldout = work / "heldout.txt"
        edgemoe("build", model, *case.options, *TOKENS, "--heldout", heldout, "--work", own, "-o", out)
    found = hash_result(own, out)
    print(f"{name}: {time.monotonic() - began:.0f} s", file=sys.stderr, flush=True)
    return found


def main() -> None:
    """Run the cases and compare, or record."""
    parser = make_parser(__doc__)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--record", action="store_true")
    parser.add_argument("--only", nargs="+", default=[], help="parts of names")
    parser.add_argument("--jobs", type=int, default=2)
    options = parser.parse_args()
    options.work.mkdir(parents=True, exist_ok=True)
    models = make_models(options.work)
    text = next(ROOT.glob("edgemoe/**/heldout/english.txt")).read_text(encoding="utf-8")
    (options.work / "heldout.txt").write_text(text[:4000], encoding="utf-8")
    chosen = {name: case for name, case in CASES.items() if not options.only or any(part in name for part in options.only)}
    with ThreadPoolExecutor(options.jobs) as pool:
        jobs = {name: pool.submit(run_case, name, case, models[case.model], options.work) for name, case in chosen.items()}
        found = {name: job.result() for name, job in jobs.items()}
    machine = f"{platform.machine()}, numpy {np.__version__}"
    known = json.loads(RECORD.read_text(encoding="utf-8")) if RECORD.exists() else {"cases": {}}
    if options.record:
        body = {"machine": machine, "cases": {**known["cases"], **found}}
        RECORD.write_text(json.dumps(body, indent=1) + "\n", encoding="utf-8")
        return
    if known.get("machine") != machine:
        print(f"note: recorded on {known.get('machine')}, this is {machine}")
    pairs = [(name, parts, known["cases"].get(name, {})) for name, parts in found.items()]
    wrong = [(name, part) for name, ours, theirs in pairs for part in {**ours, **theirs} if ours.get(part) != theirs.get(part)]
    print("\n".join(f"DIFFERS {name}: {part}" for name, part in wrong) or f"{len(found)} cases, every hash equal")
    raise SystemExit(bool(wrong))


if __name__ == "__main__":
    main()
