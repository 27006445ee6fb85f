"""Qwen3-MoE: QK-norm per head, softmax router."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from edgemoe.model.families import ATTENTION, QK_NORMS, Family, refuse_common


def _refuse(config: Mapping[str, Any]) -> str | None:
    if config.get("decoder_sparse_step", 1) != 1 or config.get("mlp_only_layers"):
        return "decoder_sparse_step / mlp_only_layers: dense layers are not supported by llama.cpp's qwen3moe"
    if not config.get("norm_topk_prob", False):
        return "norm_topk_prob false: llama.cpp's qwen3moe always renormalises the gates"
    return refuse_common(config)


FAMILY = Family(
    model_type="qwen3_moe",
    gguf_arch="qwen3moe",
    layer_names={**ATTENTION, **QK_NORMS, "ffn_gate_inp": "mlp.gate.weight"},
    expert_names={p: f"mlp.experts.{{expert}}.{p}_proj.weight" for p in ("gate", "up", "down")},
    stacked_prefix="mlp.experts.",
    permute_qk=False,
    expert_size_key="moe_intermediate_size",
    renormalize=lambda config: True,
    refuse=_refuse,
    gguf_keys=lambda config: {
        "feed_forward_length": int(config.get("intermediate_size", config["moe_intermediate_size"])),
        "expert_feed_forward_length": int(config["moe_intermediate_size"]),
    },
)
