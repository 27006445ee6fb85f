"""OLMoE: QK-norm over the whole width, softmax router whose gates are NOT renormalised."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from edgemoe.model.families import ATTENTION, QK_NORMS, Family, refuse_common


def _refuse(config: Mapping[str, Any]) -> str | None:
    if config.get("norm_topk_prob", False):
        return "norm_topk_prob true: llama.cpp's olmoe never renormalises the gates"
    if config.get("clip_qkv") is not None:
        return f"clip_qkv {config['clip_qkv']}: llama.cpp's olmoe does not clip"
    if config.get("tie_word_embeddings", False):
        return "tie_word_embeddings true: llama.cpp's olmoe needs an output matrix of its own"
    if config.get("num_key_value_heads") != config.get("num_attention_heads"):
        return "num_key_value_heads differs from num_attention_heads: llama.cpp's olmoe has one QK-norm width"
    return refuse_common(config)


FAMILY = Family(
    model_type="olmoe",
    gguf_arch="olmoe",
    layer_names={**ATTENTION, **QK_NORMS, "ffn_gate_inp": "mlp.gate.weight"},
    expert_names={p: f"mlp.experts.{{expert}}.{p}_proj.weight" for p in ("gate", "up", "down")},
    stacked_prefix="mlp.experts.",
    permute_qk=False,
    expert_size_key="intermediate_size",
    renormalize=lambda config: False,
    refuse=_refuse,
    gguf_keys=lambda config: {"feed_forward_length": int(config["intermediate_size"])},
)
