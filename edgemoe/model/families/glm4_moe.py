"""GLM-4.5 to 4.7 have a sigmoid router (bias for the choice, scaled gates), a shared expert, dense first layers and half-rotated heads."""

from __future__ import annotations

from collections.abc import Iterator

from edgemoe.model.blocks import Block, dense, experts, gqa, is_moe, norm, qk_norms, shared
from edgemoe.model.config import Config
from edgemoe.model.families import Family, dense_first_keys, refuse_common, refuse_tied, rotary_share, sigmoid_router


def layer(c: Config, number: int) -> Iterator[Block]:
    """Attention, then a dense part in the first layers, and experts beside a shared one in the others."""
    yield norm(c, "attn_norm", "input_layernorm")
    yield gqa(c, biased=bool(c.get("attention_bias", False)))
    yield norm(c, "ffn_norm", "post_attention_layernorm")
    if c.get("use_qk_norm", False):
        yield qk_norms(c, wide=False)
    if not is_moe(c, number):
        yield dense(c)
        return
    size, router = c["moe_intermediate_size"], ("mlp.gate.weight",)
    yield experts(c, size, "mlp.experts.{expert}.{}_proj.weight", router=router, bias="mlp.gate.e_score_correction_bias")
    yield shared(c, c["n_shared_experts"] * size, "mlp.shared_experts.{}_proj.weight")


def refuse(c: Config) -> str | None:
    """Refuse also a config without the rotated share of a head, because its default differs by version of transformers."""
    reason = refuse_common(c, biases=True)
    if reason is None and rotary_share(c) is None:
        return "partial_rotary_factor is missing, and its default differs by version of transformers"
    return reason


FAMILY = Family(
    model_types=("glm4_moe",),
    gguf="glm4moe",
    layer=layer,
    router=lambda c: sigmoid_router(c, renormalize=bool(c.get("norm_topk_prob", True))),
    refuse=refuse,
    shared_count="n_shared_experts",
    gguf_names={"ffn_norm": "post_attention_norm"},
    gguf_keys=dense_first_keys,
    extra_layers=True,
    mlx_stacks="mlp.switch_mlp",
    mlx_refuse=refuse_tied,
)
