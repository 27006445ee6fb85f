"""This module computes the bytes of llama.cpp's KV cache, recurrent states and output buffer; compute_graph.py computes the rest.

The bytes are products of shapes (src/llama-kv-cache*.cpp, llama-memory-recurrent.cpp, llama-context.cpp of llama.cpp 0c1e570).
"""

from __future__ import annotations

from edgemoe.base.errors import UsageError
from edgemoe.ir import Model
from edgemoe.ir.memory import Settings
from edgemoe.targets.gguf.formats import FORMATS

KV_FORMATS = {name: FORMATS[name] for name in ("F32", "F16", "BF16", "Q8_0", "Q5_1", "Q5_0", "Q4_1", "Q4_0", "IQ4_NL")}
CELLS = 256  # caches hold multiples of this many tokens (GGML_PAD in llama-context.cpp)


def cells_of(settings: Settings) -> int:
    """Tokens that the cache of one sequence holds; the sequences share the context."""
    return _pad(_pad(settings.context) // settings.sequences)


def window_cells(settings: Settings, window: int) -> int:
    """Tokens that the cache of a sliding-window layer holds: the window and one batch (llama-kv-cache-iswa.cpp)."""
    cells = cells_of(settings)
    return cells if settings.swa_full or not window else _pad(min(cells, window + rows_of(settings)))


def rows_of(settings: Settings) -> int:
    """Tokens of the largest batch that is computed at once."""
    return min(settings.ubatch, settings.context)


def kv_bytes(model: Model, settings: Settings) -> int:
    """Bytes of keys and values of all layers and sequences.

    Without flash attention V lies transposed, and every layer's V is as wide as the widest (TAG_V_CACHE_VARIABLE).

    Raises:
        UsageError: llama.cpp has no cache of this type, or not with these settings.
    """
    check(model, settings)
    widest = max(cache.v for cache in model.caches)
    total = 0
    for cache in model.caches:
        tokens = settings.sequences * window_cells(settings, cache.window)
        v = widest if cache.v and not settings.flash else cache.v
        total += tokens * (_kv_row(settings.kv_k, cache.k) + _kv_row(settings.kv_v, v))
    return total


def state_bytes(model: Model, settings: Settings) -> int:
    """Bytes of the recurrent layers' states: one F32 state per sequence, whose size does not depend on the context."""
    return 4 * settings.sequences * sum(cache.state for cache in model.caches)


def output_bytes(model: Model, settings: Settings) -> int:
    """Bytes of the returned logits: one row per sequence, or one per token of a batch."""
    rows = rows_of(settings) if settings.every_logit else settings.sequences
    return 4 * model.vocab_size * rows


def check(model: Model, settings: Settings) -> None:
    """Refuse the settings that llama.cpp refuses.

    Raises:
        UsageError: with the reason.
    """
    for name in (settings.kv_k, settings.kv_v):
        if name not in KV_FORMATS:
            raise UsageError(f"{name} is no type of a KV cache", hint=f"known: {', '.join(KV_FORMATS)}")
    if model.attention.latent and settings.kv_k != settings.kv_v:
        raise UsageError("latent attention keeps one cache, so K and V have one type", hint=f"take {settings.kv_k} for both")
    if not settings.flash and KV_FORMATS[settings.kv_v].block > 1:
        raise UsageError(f"a V cache of {settings.kv_v} needs flash attention", hint="turn flash attention on, or take F16")
    lengths = (model.attention.latent or model.attention.key_length, model.attention.latent or model.attention.value_length)
    for name, length in zip((settings.kv_k, settings.kv_v), lengths, strict=True):
        if length % KV_FORMATS[name].block:
            raise UsageError(f"{name} stores heads of multiples of {KV_FORMATS[name].block}, not of {length}", hint="take F16")


def _pad(tokens: int) -> int:
    return -(-tokens // CELLS) * CELLS


def _kv_row(name: str, width: int) -> int:
    kind = KV_FORMATS[name]
    return width // kind.block * kind.block_bytes
