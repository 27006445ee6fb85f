"""What a process needs beside the weights -> bytes, by part; shared by planner, report and verification.

A budget is the most that the process may hold at its peak (VmHWM of a process that runs stock llama.cpp without mmap at the full context):

    peak = runtime + weights + max(kv + compute + output + min(staging, RETAINED), staging)

where staging is the temporary copy of the largest tensor that is repacked at load.  It is freed before the context is made, but the C
library keeps freed pieces of up to 32 MiB for later (docs/decisions/0003-memory.md).
Each target owns the formulas of its parts.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from edgemoe.ir.model import Model

DEFAULT_CONTEXT = 8192
RETAINED = 32 * 2**20  # glibc's largest dynamic mmap threshold on 64-bit machines (mallopt(3), M_MMAP_THRESHOLD)


def peak(parts: Mapping[str, int]) -> int:
    """Peak bytes of a process whose parts are known; `retained`, where it is known, is what the C library really keeps of `staging`."""
    return parts["weights"] + _beside_weights(parts, parts["staging"])


def room_for_weights(budget: int, parts: Mapping[str, int], staging: int) -> int:
    """Bytes left for weights when the largest staged tensor takes `staging`."""
    return budget - _beside_weights(parts, staging)


def _beside_weights(parts: Mapping[str, int], staging: int) -> int:
    steady = parts["kv"] + parts["compute"] + parts["output"]
    return parts["runtime"] + max(steady + parts.get("retained", min(staging, RETAINED)), staging)


@dataclass(frozen=True, slots=True, kw_only=True)
class Cache:
    """What one layer remembers of the past, in numbers (not bytes)."""

    k: int = 0  # per token: KV heads x key length; latent attention (MLA): rank + rotary part, and no v
    v: int = 0  # per token: KV heads x value length
    window: int = 0  # sliding window in tokens; 0: the whole context
    state: int = 0  # recurrent layers: F32 numbers of the sequence, whatever its length


@dataclass(frozen=True, slots=True, kw_only=True)
class Layout:
    """The shapes that memory beside the weights depends on; the target turns them into bytes."""

    caches: tuple[Cache, ...]  # of each layer
    hidden_size: int
    n_heads: int
    key_length: int  # of one head
    value_length: int
    vocab_size: int
    n_experts: int
    top_k: int
    expert_size: int  # routed expert's width
    gating: str = "softmax"  # of the router: softmax or sigmoid over all experts, or softmax over the chosen ones' logits (chosen)
    renormalize: bool = True  # gates of the chosen experts are divided by their sum
    scale: float = 1.0  # and then multiplied by this
    expert_bias: bool = False  # experts' outputs have biases
    dense_layers: int = 0  # leading layers without experts
    dense_size: int = 0  # their width
    shared_size: int = 0  # width of the shared expert
    latent: int = 0  # latent attention (MLA): the rank of what is kept of keys and values; key_length is then that of an expanded head
    q_latent: int = 0  # and the rank of the queries


def layout_of(model: Model) -> Layout:
    """The layout of a model of the families that are written: grouped-query attention, experts in every layer."""
    cache = Cache(k=model.n_kv_heads * model.head_dim, v=model.n_kv_heads * model.head_dim)
    return Layout(
        caches=(cache,) * model.n_layers,
        hidden_size=model.hidden_size,
        n_heads=model.n_heads,
        key_length=model.head_dim,
        value_length=model.head_dim,
        vocab_size=model.vocab_size,
        n_experts=model.n_experts,
        top_k=model.top_k,
        expert_size=model.expert_size,
        renormalize=model.renormalize,
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """How the artifact will be run; the defaults are those that budgets are promised for."""

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
