"""DeepSeek-V3, Kimi-K2 and GLM-4.7-Flash are DeepSeek-V2 with a sigmoid router and a bias for the choice; they are known by shape."""

from __future__ import annotations

from functools import partial

from edgemoe.model.families import Family, latent_queries, sigmoid_router
from edgemoe.model.families.deepseek_v2 import layer

FAMILY = Family(
    model_types=("deepseek_v3", "kimi_k2", "glm4_moe_lite"),
    gguf="deepseek2",
    layer=partial(layer, bias="mlp.gate.e_score_correction_bias"),
    router=lambda c: sigmoid_router(c, renormalize=bool(c.get("norm_topk_prob", False))),
    attention=latent_queries,
)
