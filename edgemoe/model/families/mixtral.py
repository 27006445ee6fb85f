"""Mixtral has no QK-norm and a softmax router with renormalised gates; llama.cpp runs it as its `llama` architecture."""

from __future__ import annotations

from collections.abc import Iterator

from edgemoe.model.blocks import Block, experts, gqa, norm
from edgemoe.model.config import Config
from edgemoe.model.families import Family, refuse_common, refuse_heads, softmax_router

LETTERS = {"gate": "w1", "up": "w3", "down": "w2"}


def layer(c: Config, _: int) -> Iterator[Block]:
    """Attention, then experts."""
    yield norm(c, "attn_norm", "input_layernorm")
    yield gqa(c)
    yield norm(c, "ffn_norm", "post_attention_layernorm")
    routers = ("block_sparse_moe.gate.weight", "mlp.gate.weight")  # a stacked checkpoint keeps transformers' names in memory
    yield experts(c, c["intermediate_size"], "block_sparse_moe.experts.{expert}.{}.weight", router=routers, letters=LETTERS)


FAMILY = Family(
    model_types=("mixtral",),
    gguf="llama",
    layer=layer,
    router=lambda c: softmax_router(c, renormalize=True),
    expert_size="intermediate_size",
    refuse=lambda c: refuse_common(c, window=c.get("sliding_window")),
    paired_rotary=True,
    gguf_keys=lambda c: {"feed_forward_length": c["intermediate_size"]},
    mlx_stacks="block_sparse_moe.switch_mlp",
    mlx_refuse=refuse_heads,
)
