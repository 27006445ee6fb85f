"""Qwen3-MoE has a QK-norm per head and a softmax router."""

from __future__ import annotations

from collections.abc import Iterator

from edgemoe.model.blocks import Block, dense, experts, gqa, is_moe, norm, qk_norms
from edgemoe.model.config import Config
from edgemoe.model.families import Family, asked_window, refuse_common, softmax_router


def layer(c: Config, number: int) -> Iterator[Block]:
    """Attention, then experts or a dense part."""
    yield norm(c, "attn_norm", "input_layernorm")
    yield gqa(c)
    yield norm(c, "ffn_norm", "post_attention_layernorm")
    yield qk_norms(c, wide=False)
    if is_moe(c, number):
        yield experts(c, c["moe_intermediate_size"], "mlp.experts.{expert}.{}_proj.weight", router=("mlp.gate.weight",))
    else:
        yield dense(c)


def refuse(c: Config) -> str | None:
    """Refuse configs that llama.cpp's qwen3moe would run otherwise than transformers."""
    if c.get("decoder_sparse_step", 1) != 1 or c.get("mlp_only_layers"):
        return "decoder_sparse_step / mlp_only_layers: dense layers are not supported by llama.cpp's qwen3moe"
    if not c.get("norm_topk_prob", False):
        return "norm_topk_prob false: llama.cpp's qwen3moe always renormalises the gates"
    return refuse_common(c, window=asked_window(c))


FAMILY = Family(
    model_types=("qwen3_moe",),
    gguf="qwen3moe",
    layer=layer,
    router=lambda c: softmax_router(c, renormalize=bool(c.get("norm_topk_prob", False))),
    refuse=refuse,
    gguf_keys=lambda c: {
        "feed_forward_length": c.first("intermediate_size", "moe_intermediate_size"),
        "expert_feed_forward_length": c["moe_intermediate_size"],
    },
    mlx_stacks="mlp.switch_mlp",
)
