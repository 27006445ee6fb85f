"""One file per Hugging Face `model_type`, holding what differs: names, router rule, GGUF keys, refusals.

A family is found by its file name, so a new one is a new file and nothing else.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from edgemoe.base.errors import ModelError
from edgemoe.ir import Model

# Parameter names in memory (transformers 5, where experts are stacked), by role; equal in all families so far.
MODULE_NAMES = {
    "attn_norm": "input_layernorm.weight",
    "attn_q": "self_attn.q_proj.weight",
    "attn_k": "self_attn.k_proj.weight",
    "attn_v": "self_attn.v_proj.weight",
    "attn_output": "self_attn.o_proj.weight",
    "attn_q_norm": "self_attn.q_norm.weight",
    "attn_k_norm": "self_attn.k_norm.weight",
    "ffn_norm": "post_attention_layernorm.weight",
    "ffn_gate_inp": "mlp.gate.weight",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Family:
    """How one `model_type` names, routes and stores what every MoE model has."""

    model_type: str
    gguf_arch: str
    layer_names: Mapping[str, str]  # role -> name after "model.layers.N."
    expert_names: Mapping[str, str]  # gate, up, down -> name after "model.layers.N." with {expert}
    stacked_prefix: str  # where "gate_up_proj" [E, 2M, H] and "down_proj" [E, H, M] live in a stacked checkpoint
    permute_qk: bool  # llama.cpp rotates pairs, transformers halves: rows of q and k change places
    expert_size_key: str
    renormalize: Callable[[Mapping[str, Any]], bool]
    refuse: Callable[[Mapping[str, Any]], str | None]  # a reason why this config is not supported, naming the field
    gguf_keys: Callable[[Mapping[str, Any]], Mapping[str, Any]]  # arch keys beyond the common ones


OUTER_NAMES = {"token_embd": "model.embed_tokens.weight", "output_norm": "model.norm.weight", "output": "lm_head.weight"}
ATTENTION = {role: name for role, name in MODULE_NAMES.items() if role not in ("ffn_gate_inp", "attn_q_norm", "attn_k_norm")}
QK_NORMS = {role: MODULE_NAMES[role] for role in ("attn_q_norm", "attn_k_norm")}


def known_families() -> list[str]:
    """All supported model types."""
    return sorted(m.name for m in pkgutil.iter_modules(__path__))


def find_family(model_type: str) -> Family:
    """The family of a `model_type`.

    Raises:
        ModelError: not supported.
    """
    if model_type not in known_families():
        raise ModelError(f"config.json: model_type {model_type!r} is not supported", hint=f"supported: {', '.join(known_families())}")
    family: Family = importlib.import_module(f"edgemoe.model.families.{model_type}").FAMILY
    return family


def resize_experts(model: Model, width: int) -> Model:
    """The record of the model with `width` neurons in every expert: config and shapes are those of such a checkpoint.

    It says where no weights are that were cut: `narrow.py` puts files of its own in place.
    """
    if width == model.expert_size:
        return model
    gate, down = (width, model.hidden_size), (model.hidden_size, width)
    tensors = tuple(replace(t, shape=down if t.role == "ffn_down_exps" else gate) if t.expert >= 0 else t for t in model.tensors)
    config = {**model.config, find_family(model.model_type).expert_size_key: width}
    return replace(model, config=config, expert_size=width, tensors=tensors)


def refuse_common(config: Mapping[str, Any]) -> str | None:
    """Reasons that hold for every family so far: what neither our calibration nor the GGUF architectures carry."""
    for name in ("rope_parameters", "rope_scaling"):
        rope = config.get(name) or {}
        kind = rope.get("rope_type", rope.get("type", "default")) if isinstance(rope, Mapping) else rope
        if kind != "default":
            return f"rope type {kind!r} ({name}) is not supported"
    numbers = {"rms_norm_eps": config.get("rms_norm_eps"), "rope_theta": _find_theta(config)}
    for name, value in numbers.items():  # their defaults differ by family and version: better none than a wrong one
        if isinstance(value, bool) or not isinstance(value, int | float) or not value > 0:
            return f"{name} is {value!r}, expected a positive number"
    if config.get("hidden_act", "silu") != "silu":
        return f"hidden_act {config['hidden_act']!r} is not supported, only 'silu'"
    if config.get("attention_bias"):
        return "attention_bias true is not supported"
    if config.get("sliding_window") and config.get("use_sliding_window", True):
        return f"sliding_window {config['sliding_window']} is not supported"
    if config.get("quantization_config"):
        return "quantization_config: quantized checkpoints of this family are not supported; give the original weights"
    return None


def rope_theta(config: Mapping[str, Any]) -> float:
    """Base of the rotary frequencies, wherever this version of the config keeps it."""
    return float(_find_theta(config))


def _find_theta(config: Mapping[str, Any]) -> Any:
    rope = config.get("rope_scaling") or config.get("rope_parameters") or {}  # the older field wins, as in transformers 5
    return rope.get("rope_theta", config.get("rope_theta"))
