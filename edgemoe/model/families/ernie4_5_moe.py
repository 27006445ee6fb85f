"""ERNIE 4.5 has a softmax router with a bias for the choice, optional shared experts and dense first layers; it is known by shape."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from edgemoe.model.blocks import Block, dense, experts, gqa, is_moe, pre_norms, shared
from edgemoe.model.config import Config
from edgemoe.model.families import Family, softmax_router


def layer(c: Config, number: int) -> Iterator[Block]:
    """Attention, then a dense part, or experts beside shared ones."""
    yield from pre_norms(c)
    yield gqa(c)
    if not is_moe(c, number):
        yield dense(c)
        return
    yield experts(c, c["moe_intermediate_size"], "", router=(), bias="mlp.moe_statics.e_score_correction_bias")
    if c.get("moe_num_shared_experts"):
        yield shared(c, c["moe_num_shared_experts"] * c["moe_intermediate_size"], "")


FAMILY = Family(
    model_types=("ernie4_5_moe",),
    gguf="ernie4_5-moe",
    layer=layer,
    router=lambda c: replace(softmax_router(c, renormalize=True), biased=True),
)
