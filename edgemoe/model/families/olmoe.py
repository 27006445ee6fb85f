"""OLMoE has a QK-norm over the whole width and a softmax router whose gates are NOT renormalised."""

from __future__ import annotations

from collections.abc import Iterator

from edgemoe.model.blocks import Block, experts, gqa, norm, qk_norms
from edgemoe.model.config import Config
from edgemoe.model.families import Family, refuse_common, softmax_router


def layer(c: Config, _: int) -> Iterator[Block]:
    """Attention, then experts."""
    yield norm(c, "attn_norm", "input_layernorm")
    yield gqa(c)
    yield norm(c, "ffn_norm", "post_attention_layernorm")
    yield qk_norms(c, wide=True)
    yield experts(c, c["intermediate_size"], "mlp.experts.{expert}.{}_proj.weight", router=("mlp.gate.weight",))


def refuse(c: Config) -> str | None:
    """Refuse configs that llama.cpp's olmoe would run otherwise than transformers."""
    if c.get("norm_topk_prob", False):
        return "norm_topk_prob true: llama.cpp's olmoe never renormalises the gates"
    if c.get("clip_qkv") is not None:
        return f"clip_qkv {c.get('clip_qkv')}: llama.cpp's olmoe does not clip"
    if c.get("tie_word_embeddings", False):
        return "tie_word_embeddings true: llama.cpp's olmoe needs an output matrix of its own"
    if c.kv_heads != c.heads:
        return "num_key_value_heads differs from num_attention_heads: llama.cpp's olmoe has one QK-norm width"
    return refuse_common(c)


FAMILY = Family(
    model_types=("olmoe",),
    gguf="olmoe",
    layer=layer,
    router=lambda c: softmax_router(c, renormalize=bool(c.get("norm_topk_prob", False))),
    expert_size="intermediate_size",
    refuse=refuse,
    gguf_keys=lambda c: {"feed_forward_length": c["intermediate_size"]},
    mlx_stacks="mlp.switch_mlp",
)
