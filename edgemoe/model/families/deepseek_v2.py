"""DeepSeek-V2 has latent attention, a softmax router, shared experts and dense first layers; it is known by shape."""

from __future__ import annotations

from collections.abc import Iterator

from edgemoe.model.blocks import Block, dense, experts, is_moe, mla, pre_norms, shared
from edgemoe.model.config import Config
from edgemoe.model.families import Family, latent_queries, softmax_router


def layer(c: Config, number: int, *, bias: str = "", indexer: bool = False) -> Iterator[Block]:
    """Latent attention, then a dense part, or experts beside shared ones."""
    yield from pre_norms(c)
    yield mla(c, indexer=indexer)
    if not is_moe(c, number):
        yield dense(c)
        return
    size, router = c["moe_intermediate_size"], ("mlp.gate.weight",)
    yield experts(c, size, "mlp.experts.{expert}.{}_proj.weight", router=router, bias=bias)
    yield shared(c, c["n_shared_experts"] * size, "mlp.shared_experts.{}_proj.weight")


FAMILY = Family(
    model_types=("deepseek_v2",),
    gguf="deepseek2",
    layer=layer,
    router=lambda c: softmax_router(c, renormalize=bool(c.get("norm_topk_prob", False))),
    attention=latent_queries,
)
