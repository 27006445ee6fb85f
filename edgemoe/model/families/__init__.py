"""Families of checkpoints live in this package, one file of data for each `model_type`; no other module knows a family by its name.

A family says which blocks a layer has (blocks.py), by which rule its router chooses, and what llama.cpp calls the family.  A family with
`refuse` can be built.  A family without `refuse` is known by shape, and can only be planned for.
"""

from __future__ import annotations

import functools
import importlib
import pkgutil
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from edgemoe.base.errors import ModelError
from edgemoe.ir.model import Attention, Router
from edgemoe.model.blocks import Block
from edgemoe.model.config import Config


@dataclass(frozen=True, slots=True, kw_only=True)
class Family:
    """The structure of checkpoints of one `model_type`, as functions of their config."""

    model_types: tuple[str, ...]  # the first is the name, the others are aliases
    gguf: str  # llama.cpp's name of the architecture
    layer: Callable[[Config, int], Iterable[Block]]
    router: Callable[[Config], Router]
    expert_size: str = "moe_intermediate_size"  # the config's field
    shared_count: str = ""  # the config's field, where a shared expert is so many times as wide as a routed one
    attention: Callable[[Config], Attention] = field(default_factory=lambda: grouped_queries)
    # ------------------------------------------------------------------------------------------------------- to be built
    refuse: Callable[[Config], str | None] | None = None  # a reason why this config is not supported, naming the field
    stacked: str = "mlp.experts."  # where "gate_up_proj" [E, 2M, H] and "down_proj" [E, H, M] live in a stacked checkpoint
    gguf_names: Mapping[str, str] = field(default_factory=dict)  # roles that llama.cpp calls otherwise in this architecture
    paired_rotary: bool = False  # llama.cpp rotates pairs, transformers halves: rows of q and k change places
    gguf_keys: Callable[[Config], Mapping[str, Any]] = field(default_factory=lambda: no_keys)  # beyond those of the block kinds
    mlx_stacks: str = ""  # where mlx_lm's class keeps the experts' stacks in a layer; empty: it has no such class
    mlx_refuse: Callable[[Config], str | None] = field(default_factory=lambda: no_reason)  # why its class would not load such a config
    extra_layers: bool = False  # layers after the last (next-token prediction) may be in the files and are left out


def no_reason(_: Config) -> str | None:
    """No reason to refuse a config."""
    return None


def no_keys(_: Config) -> Mapping[str, Any]:
    """No further keys."""
    return {}


def dense_first_keys(c: Config) -> Mapping[str, Any]:
    """Keys of models with dense first layers and shared experts."""
    return {
        "feed_forward_length": c["intermediate_size"],
        "expert_feed_forward_length": c["moe_intermediate_size"],
        "expert_shared_count": c["n_shared_experts"],
        "leading_dense_block_count": c.get("first_k_dense_replace", 0),
    }


def grouped_queries(c: Config) -> Attention:
    """Heads of grouped-query attention, of which a share of each is rotated."""
    head = c.head_size
    share = rotary_share(c)
    rotary = int(head * float(1.0 if share is None else share))
    theta = float(rope_theta(c) or 0.0)
    return Attention(heads=c.heads, kv_heads=c.kv_heads, key_length=head, value_length=head, rotary=rotary, rope_theta=theta)


def latent_queries(c: Config) -> Attention:
    """Heads of latent attention."""
    return Attention(
        heads=c.heads,
        kv_heads=1,
        key_length=c["qk_nope_head_dim"] + c["qk_rope_head_dim"],
        value_length=c["v_head_dim"],
        rotary=c["qk_rope_head_dim"],
        rope_theta=float(rope_theta(c) or 0.0),
        latent=c["kv_lora_rank"],
        q_latent=c["q_lora_rank"] if c.get("q_lora_rank") else 0,
    )


def softmax_router(c: Config, *, renormalize: bool) -> Router:
    """A router that chooses the experts with the largest softmax over all experts."""
    return Router(
        top_k=c.top_k,
        renormalize=renormalize,
        scale=float(c.get("routed_scaling_factor", 1.0)),
        groups=int(c.get("n_group", 1)),
        top_groups=int(c.get("topk_group", 1)),
    )


def sigmoid_router(c: Config, *, renormalize: bool) -> Router:
    """A router with sigmoid scores that chooses by score plus bias, perhaps among the best groups only (DeepSeek-V3, arXiv 2412.19437)."""
    return Router(
        top_k=c.top_k,
        scoring="sigmoid",
        biased=True,
        renormalize=renormalize,
        scale=float(c.get("routed_scaling_factor", 1.0)),
        groups=int(c.get("n_group", 1)),
        top_groups=int(c.get("topk_group", 1)),
    )


# --------------------------------------------------------------------------------------------------------------- finding one
@functools.cache
def load_families() -> dict[str, Family]:
    """All families by model_type."""
    modules = [importlib.import_module(f"{__name__}.{m.name}") for m in pkgutil.iter_modules(__path__)]
    return {model_type: module.FAMILY for module in modules for model_type in module.FAMILY.model_types}


def known_families() -> list[str]:
    """All model types that can be built."""
    return sorted(name for name, family in load_families().items() if family.refuse is not None)


def shape_families() -> list[str]:
    """All model types that can be planned for."""
    return sorted(load_families())


def find_family(model_type: str) -> Family:
    """The family of a `model_type` that can be built.

    Raises:
        ModelError: not supported.
    """
    if model_type not in known_families():
        raise ModelError(f"config.json: model_type {model_type!r} is not supported", hint=f"supported: {', '.join(known_families())}")
    return load_families()[model_type]


def find_shape(model_type: Any) -> Family:
    """The family of a `model_type` that can be planned for.

    Raises:
        ModelError: not known.
    """
    if not isinstance(model_type, str) or model_type not in load_families():
        known = ", ".join(shape_families())
        raise ModelError(f"config.json: the shapes of model_type {model_type!r} are not known", hint=f"known: {known}")
    return load_families()[model_type]


# ------------------------------------------------------------------------------------------------------------------ refusals
def refuse_common(c: Config, *, biases: bool = False, window: Any = None) -> str | None:
    """Reasons to refuse a config of any family: fields that our calibration or the GGUF architectures do not support.

    Args:
        c: the config.
        biases: whether q, k and v may have biases.
        window: of sliding attention, in tokens, where transformers uses it for this family; many configs have one that is never used.
    """
    for name in ("rope_parameters", "rope_scaling"):
        rope = c.get(name) or {}
        kind = rope.get("rope_type", rope.get("type", "default")) if isinstance(rope, Mapping) else rope
        if kind != "default":
            return f"rope type {kind!r} ({name}) is not supported"
    numbers = {"rms_norm_eps": c.get("rms_norm_eps"), "rope_theta": rope_theta(c)}
    for name, value in numbers.items():  # their defaults differ by family and version, so a missing number is refused
        if isinstance(value, bool) or not isinstance(value, int | float) or not value > 0:
            return f"{name} is {value!r}, expected a positive number"
    if c.get("hidden_act", "silu") != "silu":
        return f"hidden_act {c.get('hidden_act')!r} is not supported, only 'silu'"
    if c.get("attention_bias") and not biases:
        return "attention_bias true is not supported"
    if window is not None:
        return f"sliding_window {window} is not supported"
    if c.get("quantization_config"):
        return "quantization_config: quantized checkpoints of this family are not supported; give the original weights"
    return None


def refuse_heads(c: Config) -> str | None:
    """Reasons for which mlx_lm's older classes would not load a config: they divide the hidden size among the heads."""
    if c.head_size * c.heads != c["hidden_size"]:
        return f"head_dim {c.head_size} is not hidden_size / num_attention_heads, which mlx_lm takes"
    return None


def refuse_tied(c: Config) -> str | None:
    """A reason for which some of mlx_lm's classes would not load a config."""
    return "tie_word_embeddings true: mlx_lm wants an output matrix of its own" if c.get("tie_word_embeddings", False) else None


def asked_window(c: Config) -> Any:
    """The window of sliding attention in families that use it only if the config says so."""
    return c.get("sliding_window", 4096) if c.get("use_sliding_window", False) else None


def rotary_share(c: Config) -> Any:
    """Share of each head that is rotated, from the place where this version of the config keeps it; None if the config does not say."""
    return c.get("partial_rotary_factor", _rope(c).get("partial_rotary_factor"))


def rope_theta(c: Config) -> Any:
    """Base of the rotary frequencies, from the place where this version of the config keeps it."""
    return _rope(c).get("rope_theta", c.get("rope_theta"))


def _rope(c: Config) -> Mapping[str, Any]:
    rope = c.get("rope_scaling") or c.get("rope_parameters") or {}  # the older field wins, as in transformers 5
    return rope if isinstance(rope, Mapping) else {}
