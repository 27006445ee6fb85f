"""dots.llm1 has a QK-norm per head, a sigmoid router (bias for the choice, scaled gates), shared experts and dense first layers."""

from __future__ import annotations

from collections.abc import Iterator

from edgemoe.model.blocks import Block, attention_kind, dense, experts, gqa, is_moe, norm, qk_norms, shared
from edgemoe.model.config import Config
from edgemoe.model.families import Family, dense_first_keys, refuse_common, sigmoid_router


def layer(c: Config, number: int) -> Iterator[Block]:
    """Attention, then a dense part in the first layers, and experts beside the shared ones in the others."""
    yield norm(c, "attn_norm", "input_layernorm")
    yield gqa(c)
    yield norm(c, "ffn_norm", "post_attention_layernorm")
    yield qk_norms(c, wide=False)
    if not is_moe(c, number):
        yield dense(c)
        return
    size, router = c["moe_intermediate_size"], ("mlp.gate.weight",)
    yield experts(c, size, "mlp.experts.{expert}.{}_proj.weight", router=router, bias="mlp.gate.e_score_correction_bias")
    yield shared(c, c["n_shared_experts"] * size, "mlp.shared_experts.{}_proj.weight")


def refuse(c: Config) -> str | None:
    """Refuse configs that llama.cpp's dots1 would not load."""
    if c.kv_heads != c.heads:
        return "num_key_value_heads differs from num_attention_heads: llama.cpp's dots1 has as many heads of keys as of queries"
    windows = c.get("max_window_layers", 62) < c["num_hidden_layers"] or any(
        attention_kind(c, n) == "window" for n in range(c["num_hidden_layers"])
    )
    return refuse_common(c, window=c.values.get("sliding_window", 4096) if windows else None)


FAMILY = Family(
    model_types=("dots1",),
    gguf="dots1",
    layer=layer,
    router=lambda c: sigmoid_router(c, renormalize=bool(c.get("norm_topk_prob", False))),
    refuse=refuse,
    shared_count="n_shared_experts",
    gguf_keys=dense_first_keys,
    mlx_stacks="mlp.experts",
)
