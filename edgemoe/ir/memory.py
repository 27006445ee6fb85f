"""This module adds up the memory parts of a process to its peak, for planner, report and verification.

A budget is the most that the process may hold at its peak (VmHWM of a process that runs stock llama.cpp without mmap at the full context):

    peak = runtime + weights + max(kv + compute + output + min(staging, RETAINED), staging)

where staging is the temporary copy of the largest tensor that is repacked at load.  It is freed before the context is made, but the C
library keeps freed pieces of up to 32 MiB for later (docs/decisions/0003-memory.md).
Each target owns the formulas of its parts.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

DEFAULT_CONTEXT = 8192
RETAINED = 32 * 2**20  # glibc's largest dynamic mmap threshold on 64-bit machines (mallopt(3), M_MMAP_THRESHOLD)


def peak(parts: Mapping[str, int]) -> int:
    """Peak bytes of a process from its parts; `retained`, if it is known, is the part of `staging` that the C library really keeps."""
    return parts["weights"] + _beside_weights(parts, parts["staging"])


def room_for_weights(budget: int, parts: Mapping[str, int], staging: int) -> int:
    """Bytes left for weights when the largest staged tensor takes `staging`."""
    return budget - _beside_weights(parts, staging)


def _beside_weights(parts: Mapping[str, int], staging: int) -> int:
    steady = parts["kv"] + parts["compute"] + parts["output"]
    return parts["runtime"] + max(steady + parts.get("retained", min(staging, RETAINED)), staging)


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """The settings of the run; budgets are promised for the defaults."""

    context: int
    kv_k: str = "F16"  # ggml type of the key cache
    kv_v: str = "F16"
    flash: bool = True  # flash attention (llama.cpp's "auto" turns it on where it can)
    ubatch: int = 512
    sequences: int = 1  # each has its own part of the context
    swa_full: bool = True  # sliding windows get caches of the whole context, which is llama.cpp's default
    every_logit: bool = False  # logits of every token are asked for, not only of the last
    mmap: bool = False
    repack: bool = True
