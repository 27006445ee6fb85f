"""What a process needs beside the weights -> bytes, by part; shared by planner, report and verification.

A budget is the most that the process may hold at its peak (VmHWM of a process that runs stock llama.cpp without mmap at the full context):

    peak = runtime + weights + max(kv + compute + output, staging)

where staging is the temporary copy of the tensor being repacked at load, gone before the context is made (docs/decisions/0003-memory.md).
Each target owns the formulas of its parts.
"""

from __future__ import annotations

from collections.abc import Mapping

DEFAULT_CONTEXT = 8192
PARTS = ("weights", "kv", "compute", "output", "staging", "runtime")


def peak(parts: Mapping[str, int]) -> int:
    """Peak bytes of a process whose parts are known."""
    return parts["runtime"] + parts["weights"] + max(parts["kv"] + parts["compute"] + parts["output"], parts["staging"])


def room_for_weights(budget: int, parts: Mapping[str, int], staging: int) -> int:
    """Bytes left for weights when the largest staged tensor takes `staging`."""
    return budget - parts["runtime"] - max(parts["kv"] + parts["compute"] + parts["output"], staging)
