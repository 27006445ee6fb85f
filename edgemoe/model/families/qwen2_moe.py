"""Qwen2-MoE has biases of q, k and v, a softmax router without renormalised gates, and a shared expert behind a gate of its own."""

from __future__ import annotations

from collections.abc import Iterator

from edgemoe.model.blocks import Block, experts, gqa, norm, shared
from edgemoe.model.config import Config
from edgemoe.model.families import Family, asked_window, refuse_common, refuse_heads, refuse_tied, softmax_router


def layer(c: Config, _: int) -> Iterator[Block]:
    """Attention with biases, then experts beside the shared one."""
    yield norm(c, "attn_norm", "input_layernorm")
    yield gqa(c, biased=bool(c.get("qkv_bias", True)))
    yield norm(c, "ffn_norm", "post_attention_layernorm")
    yield experts(c, c["moe_intermediate_size"], "mlp.experts.{expert}.{}_proj.weight", router=("mlp.gate.weight",))
    size = c["shared_expert_intermediate_size"]
    yield shared(c, size, "mlp.shared_expert.{}_proj.weight", gate="mlp.shared_expert_gate.weight")


def refuse(c: Config) -> str | None:
    """Refuse configs that llama.cpp's qwen2moe would run otherwise than transformers."""
    if c.get("decoder_sparse_step", 1) != 1 or c.get("mlp_only_layers"):
        return "decoder_sparse_step / mlp_only_layers: dense layers are not supported by llama.cpp's qwen2moe"
    if c.get("norm_topk_prob", False):
        return "norm_topk_prob true: llama.cpp's qwen2moe never renormalises the gates"
    return refuse_common(c, window=asked_window(c))


def mlx_refuse(c: Config) -> str | None:
    """Refuse configs that mlx_lm's qwen2_moe would not load."""
    biases = None if c.get("qkv_bias", True) else "qkv_bias false: mlx_lm's qwen2_moe has biases"
    return biases or refuse_heads(c) or refuse_tied(c)


FAMILY = Family(
    model_types=("qwen2_moe",),
    gguf="qwen2moe",
    layer=layer,
    router=lambda c: softmax_router(c, renormalize=bool(c.get("norm_topk_prob", False))),
    refuse=refuse,
    gguf_keys=lambda c: {
        "feed_forward_length": c.first("intermediate_size", "shared_expert_intermediate_size"),
        "expert_feed_forward_length": c["moe_intermediate_size"],
        "expert_shared_feed_forward_length": c["shared_expert_intermediate_size"],
    },
    mlx_stacks="mlp.switch_mlp",
    mlx_refuse=mlx_refuse,
)
