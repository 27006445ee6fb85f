"""What a llama.cpp process holds beside the weights, in parts, from shapes alone (docs/decisions/0003-memory.md has the measurements).

A budget is promised for the defaults of `Settings`: no mmap (what is held cannot be given back), repacking on, KV in F16, flash attention,
ubatch 512, logits of the last token only.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable

from edgemoe.ir import Model, Unit
from edgemoe.memory import RETAINED, Cache, Layout, Settings
from edgemoe.targets.gguf.buffers import cells_of, compute_bytes, kv_bytes, output_bytes, state_bytes, touched_bytes, work_bytes
from edgemoe.targets.gguf.formats import FORMATS, pad, row_bytes

RUNTIME = 29 * 2**20  # a process that has loaded llama.cpp and no model, with the loader's and the graph's own memory
PER_TOKEN = 400  # bytes of one vocabulary entry in llama.cpp's tables


def unit_size(unit: Unit, cols: int, name: str, n_weights: int) -> int:
    """Bytes of a tensor in the file, padded."""
    return pad(n_weights // cols * row_bytes(name, cols))


def unit_staging(size: int, name: str, role: str) -> int:
    """Bytes of the copy that is made while a tensor is repacked.

    The embedding is only looked up, never repacked; the output matrix is loaded before the layers, so its copy can only matter for what the
    C library retains of it.
    """
    if not FORMATS[name].repacked or role == "token_embd" or (role == "output" and size > RETAINED):
        return 0
    return size


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


def memory_parts(model: Model | Layout, context: int, settings: Settings | None = None) -> dict[str, int]:
    """KV cache (with recurrent states), touched compute buffer, output buffer and runtime in bytes.

    Args:
        model: or its layout.
        context: tokens, shared out among the sequences.
        settings: of the run, if they are not the default; their context is not looked at.

    Raises:
        UsageError: llama.cpp would refuse these settings.
    """
    layout = model if isinstance(model, Layout) else layout_of(model)
    settings = dataclasses.replace(settings, context=context) if settings else Settings(context=context)
    return {
        "kv": kv_bytes(layout, settings) + state_bytes(layout, settings),
        "compute": touched_bytes(layout, settings) + work_bytes(layout, settings),
        "output": output_bytes(layout, settings),
        "runtime": RUNTIME + PER_TOKEN * layout.vocab_size,
    }
