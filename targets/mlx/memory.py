"""This module counts the bytes of an MLX folder and predicts the bytes that Metal holds beside the tensors.

The budget bounds Metal's active peak (`mx.get_peak_memory`) of one sequence that fills the context: tensors, KV cache, and the values of a
chunk of the prompt.  Python and its libraries are apart.  The constants come from mlx_lm's code and from fits (docs/decisions/0018-mlx.md).
"""

from __future__ import annotations

import dataclasses

import numpy as np

from edgemoe.base.errors import ModelError, UsageError
from edgemoe.base.units import format_bytes
from edgemoe.devices.profiles import Device
from edgemoe.ir import Costs, Model, Unit
from edgemoe.targets.mlx.formats import HALF_BYTES, formats_of_rows, row_bytes
from edgemoe.targets.mlx.names import check_family
from edgemoe.targets.mlx.settings import KV_GROUP, Settings, check_heads

STEP = 256  # tokens by which the KV cache grows (KVCache.step in mlx_lm/models/cache.py)
HELD = 1.75  # times the values of a chunk that Metal holds until a command buffer is done; fitted to mlx_lm/BENCHMARKS.md
BUFFER = 0.75  # of Metal's working set: the largest buffer (86,586,540,032 of 115,448,725,504 bytes on an M4 Max with 128 GB)
VOCABULARY = ("token_embd", "output")
F32 = 4  # bytes


def offered_formats(model: Model, unit: Unit) -> tuple[str, ...]:
    """Formats that can store a unit.

    Raises:
        ModelError: mlx_lm cannot load the family.
    """
    check_family(model)
    return formats_of_rows(unit.cols, of_vocabulary=unit.role in VOCABULARY)


def unit_size(model: Model, unit: Unit, name: str, count: int) -> int:
    """Bytes of a module's tensors; a stack has `count` experts."""
    n_weights = unit.n_weights * count // model.n_experts if unit.is_stack else unit.n_weights
    return n_weights // unit.cols * row_bytes(name, unit.cols)


def nothing_more(model: Model, unit: Unit, name: str, size: int) -> int:
    """Bytes that the process holds for a unit beyond the file's, also while it loads: none, for tensors are read into their buffers."""
    return 0


def memory_parts(model: Model, context: int, settings: Settings) -> dict[str, int]:
    """KV cache, values of a chunk, and logits in bytes.

    Args:
        model: the shapes.
        context: tokens.
        settings: of the cache.

    Raises:
        ModelError: the cache cannot be quantized.
        UsageError: the settings of the cache save nothing at this context.
    """
    check_heads(model, settings)
    parts, plain = _parts(model, context, settings), _parts(model, context, Settings())
    if settings.max_kv and parts["kv"] >= plain["kv"]:
        what = f"--max-kv-size {settings.max_kv} saves nothing at a context of {context} tokens"
        raise UsageError(
            f"{what}: prompts are computed in chunks of {settings.chunk} tokens, which the cache holds too", hint="leave --max-kv-size out"
        )
    if settings.kv_bits and sum(parts.values()) >= sum(plain.values()):
        more = sum(parts.values()) - sum(plain.values())
        raise UsageError(
            f"--kv-bits {settings.kv_bits} takes {format_bytes(more)} more than it saves at a context of {context} tokens: "
            "attention to a quantized cache holds the scores of all heads",
            hint="leave --kv-bits out",
        )
    return parts


def _parts(model: Model, context: int, settings: Settings) -> dict[str, int]:
    chunk = min(settings.chunk, context)
    tokens = min(context, settings.max_kv + chunk) if settings.max_kv else context  # a rotating cache is cut after each chunk
    tokens = -(-tokens // STEP) * STEP
    bits = settings.kv_bits + 16 * HALF_BYTES / KV_GROUP if settings.kv_bits else 8 * HALF_BYTES
    # Attention to a quantized cache is no fused kernel: the scores of all heads, and their softmax, are arrays.
    scores = 2 * HALF_BYTES * chunk * tokens * model.attention.heads if settings.kv_bits else 0
    return {
        "kv": sum(int(bits * tokens * (cache.k + cache.v)) // 8 for cache in model.caches),
        "compute": int(HELD * HALF_BYTES * chunk * values_of_token(model)) + scores,
        "output": F32 * 2 * model.vocab_size,  # logits of the last token, and their logarithms
        "runtime": 0,
    }


def values_of_token(model: Model) -> int:
    """Numbers that a layer holds for each token of a chunk: 5 H + k (4 H + 2 M) + 6 heads x head_dim, fitted to nine shapes."""
    q = model.attention.heads * max(model.attention.key_length, model.attention.value_length)
    experts = model.top_k * (4 * model.hidden_size + 2 * model.expert.size)
    others = 2 * max(model.dense_size, model.shared_size)
    return 5 * model.hidden_size + experts + others + 6 * q


def on_device(costs: Costs, device: Device) -> Costs:
    """The price list without formats in which a unit is larger than the largest buffer that Metal gives on the box.

    Raises:
        ModelError: a unit has no other format.
    """
    if device.backend != "Metal":
        return costs
    largest = BUFFER * device.pools[0].usable
    cost = np.where(costs.size > largest, np.inf, costs.cost)
    for u in np.flatnonzero(np.isinf(cost).all(axis=(0, 2))):
        least = int(costs.size[:, u][np.isfinite(costs.cost[:, u])].min())
        raise ModelError(
            f"{costs.units[u].name}: has {format_bytes(least)} at least, and Metal's largest buffer on {device.id} is "
            f"{format_bytes(int(largest))}",
            hint="choose a larger device, or --target gguf",
        )
    return dataclasses.replace(costs, cost=cost)
