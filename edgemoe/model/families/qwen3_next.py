"""Qwen3-Next has a recurrent state in three of four layers, gated queries, and a shared expert behind a gate; it is known by shape."""

from __future__ import annotations

from collections.abc import Iterator

from edgemoe.model.blocks import Block, attention_kind, delta, dense, experts, gqa, is_moe, pre_norms, qk_norms, shared
from edgemoe.model.config import Config
from edgemoe.model.families import Family, softmax_router


def layer(c: Config, number: int, *, joint: bool = True) -> Iterator[Block]:
    """Gated delta rule or gated attention, then experts beside a shared one."""
    yield from pre_norms(c)
    if attention_kind(c, number) == "linear":
        yield delta(c, joint=joint)
    else:
        yield gqa(c, gated=True)
        yield qk_norms(c, wide=False)
    if not is_moe(c, number):
        yield dense(c)
        return
    yield experts(c, c["moe_intermediate_size"], "mlp.experts.{expert}.{}_proj.weight", router=("mlp.gate.weight",))
    size = c["shared_expert_intermediate_size"]
    yield shared(c, size, "mlp.shared_expert.{}_proj.weight", gate="mlp.shared_expert_gate.weight")


FAMILY = Family(
    model_types=("qwen3_next",),
    gguf="qwen3next",
    layer=layer,
    router=lambda c: softmax_router(c, renormalize=bool(c.get("norm_topk_prob", False))),
    gguf_names={"ffn_norm": "post_attention_norm"},
)
