"""GLM-5 is DeepSeek-V3 with the indexer of sparse attention in some layers; it is known by shape."""

from __future__ import annotations

from collections.abc import Iterator

from edgemoe.model.blocks import Block
from edgemoe.model.config import Config
from edgemoe.model.families import Family, deepseek_v2, latent_queries, sigmoid_router


def layer(c: Config, number: int) -> Iterator[Block]:
    """Latent attention, with an indexer in the layers that the config calls "full"."""
    indexer = c.nth("indexer_types", number, "full") == "full"
    return deepseek_v2.layer(c, number, bias="mlp.gate.e_score_correction_bias", indexer=indexer)


FAMILY = Family(
    model_types=("glm_moe_dsa",),
    gguf="glm-dsa",
    layer=layer,
    router=lambda c: sigmoid_router(c, renormalize=bool(c.get("norm_topk_prob", False))),
    attention=latent_queries,
)
