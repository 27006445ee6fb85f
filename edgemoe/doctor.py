"""What this machine has of what each stage needs, and how to get the rest."""

from __future__ import annotations

import importlib.util
import os
import shutil
import sys
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import psutil

from edgemoe.units import format_bytes


@dataclass(frozen=True, slots=True)
class Check:
    """One thing that a stage needs."""

    name: str
    needed_for: str
    found: str  # version or amount; empty when missing
    remedy: str


PACKAGES = (  # distribution, module, needed for, remedy
    ("torch", "torch", "calibrate, verify", "pip install 'edgemoe[hf]'"),
    ("transformers", "transformers", "calibrate, verify", "pip install 'edgemoe[hf]'"),
    ("gguf", "gguf", "price, emit", "pip install gguf"),
    ("llama-cpp-python", "llama_cpp", "price, emit, verify", "pip install 'edgemoe[llama]'"),
    ("pulp", "pulp", "plan", "pip install pulp"),
    ("highspy", "highspy", "plan", "pip install highspy"),
)
TOOLS = (("cmake", "building llama-cpp-python"), ("c++", "building llama-cpp-python"))


def examine_machine(folder: Path) -> list[Check]:
    """Every check, missing things with an empty `found`."""
    checks = [
        Check(
            "python", "everything", ".".join(map(str, sys.version_info[:3])) if sys.version_info >= (3, 11) else "", "install Python 3.11+"
        )
    ]
    for distribution, module, stages, remedy in PACKAGES:
        try:
            found = version(distribution) if importlib.util.find_spec(module) else ""
        except PackageNotFoundError:
            found = ""
        checks.append(Check(distribution, stages, found, remedy))
    built = bool(checks[4].found)
    for tool, purpose in TOOLS:
        path = shutil.which(tool) or ""
        checks.append(
            Check(tool, purpose, path or ("not needed: built already" if built else ""), f"install {tool} from your system's packages")
        )
    memory, disk = psutil.virtual_memory(), shutil.disk_usage(folder)
    checks.append(Check("memory", "calibrate: two layers in F32 + 1.5 GiB", f"{format_bytes(memory.available)} free", ""))
    checks.append(Check("disk", "emit: the artifact", f"{format_bytes(disk.free)} free in {folder.resolve()}", ""))
    checks.append(Check("cores", "speed", str(os.cpu_count()), ""))
    return checks
