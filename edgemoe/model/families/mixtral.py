"""Mixtral: no QK-norm, softmax router with renormalised gates; lives in llama.cpp's `llama` architecture."""

from __future__ import annotations

from edgemoe.model.families import ATTENTION, Family, refuse_common

FAMILY = Family(
    model_type="mixtral",
    gguf_arch="llama",
    layer_names={**ATTENTION, "ffn_gate_inp": "block_sparse_moe.gate.weight"},
    expert_names={p: f"block_sparse_moe.experts.{{expert}}.{w}.weight" for p, w in (("gate", "w1"), ("up", "w3"), ("down", "w2"))},
    stacked_prefix="mlp.experts.",
    permute_qk=True,
    expert_size_key="intermediate_size",
    renormalize=lambda config: True,
    refuse=refuse_common,
    gguf_keys=lambda config: {"feed_forward_length": int(config["intermediate_size"])},
)
