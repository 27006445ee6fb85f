"""This module checks which needs of each stage this machine meets, and says how to get the rest."""

from __future__ import annotations

import importlib.util
import re
import shutil
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import psutil

from edgemoe.base.threads import count_cores
from edgemoe.base.units import format_bytes


@dataclass(frozen=True, slots=True)
class Check:
    """One thing that a stage needs."""

    name: str
    needed_for: str
    found: str  # version or amount; empty if missing
    remedy: str
    target: str = ""  # the only target that needs it


PACKAGES = (  # distribution, module, needed for, remedy, target
    ("torch", "torch", "calibrate, verify", "pip install 'edgemoe[hf]'", ""),
    ("transformers", "transformers", "calibrate, verify", "pip install 'edgemoe[hf]'", ""),
    ("numba", "numba", "build", "pip install 'edgemoe[hf]'", ""),
    ("gguf", "gguf", "price, emit", "pip install gguf", "gguf"),
    ("llama-cpp-python", "llama_cpp", "price, emit, verify", "pip install 'edgemoe[llama]'", "gguf"),
    ("onnx", "onnx", "emit", "pip install 'edgemoe[onnx]'", "onnx"),
    ("onnxruntime", "onnxruntime", "verify", "pip install 'onnxruntime>=1.32'", "onnx"),
    ("mlx", "mlx", "verify", "pip install 'edgemoe[mlx]'", "mlx"),
    ("mlx-lm", "mlx_lm", "verify", "pip install 'edgemoe[mlx]'", "mlx"),
    ("pulp", "pulp", "plan", "pip install pulp", ""),
    ("highspy", "highspy", "plan", "pip install highspy", ""),
)
# Older versions of onnxruntime lack 3 bits, and unpack 4- and 8-bit experts for every token, which is 50 times slower.  Older versions of
# mlx give garbage in products of sorted experts on an M5 (ml-explore/mlx #3856, #3887).
LEAST = {"onnxruntime": (1, 32), "mlx": (0, 32, 2), "mlx-lm": (0, 32, 2)}
TOOLS = (("cmake", "building llama-cpp-python"), ("c++", "building llama-cpp-python"))


def examine_machine(folder: Path) -> list[Check]:
    """Every check, missing things with an empty `found`."""
    checks = [
        Check(
            "python", "everything", ".".join(map(str, sys.version_info[:3])) if sys.version_info >= (3, 11) else "", "install Python 3.11+"
        )
    ]
    for distribution, module, stages, remedy, target in PACKAGES:
        checks.append(Check(distribution, stages, find_package(distribution, module), remedy, target))
    built = any(c.name == "llama-cpp-python" and c.found for c in checks)
    for tool, purpose in TOOLS:
        path = shutil.which(tool) or ""
        found = path or ("not needed: built already" if built else "")
        checks.append(Check(tool, purpose, found, f"install {tool} from your system's packages", "gguf"))
    memory, disk = psutil.virtual_memory(), shutil.disk_usage(folder)
    checks.append(Check("memory", "calibrate: two layers in F32 + 1.5 GiB; build: four", f"{format_bytes(memory.available)} free", ""))
    checks.append(
        Check(
            "disk",
            "build: the artifact and its work folder (build --dry-run says how much)",
            f"{format_bytes(disk.free)} free in {folder.resolve()}",
            "",
        )
    )
    checks.append(Check("cores", "speed", str(count_cores()), ""))
    return checks


def find_package(distribution: str, module: str) -> str:
    """The version of an installed package; empty if it is missing or too old."""
    try:
        found = version(distribution) if importlib.util.find_spec(module) else ""
    except PackageNotFoundError:
        return ""
    numbers = tuple(int(part) for part in re.findall(r"\d+", found)[:3])
    return found if numbers >= LEAST.get(distribution, ()) else ""


def list_missing(checks: Sequence[Check]) -> list[str]:
    """Names of the missing things without which nothing can be built: all that every target needs, and all of the nearest target."""
    targets = {c.target for c in checks if c.target}
    lacking = {t: [c.name for c in checks if c.target == t and not c.found] for t in targets}
    nearest = min(sorted(lacking), key=lambda t: len(lacking[t]))
    return [c.name for c in checks if not c.target and not c.found] + lacking[nearest]
