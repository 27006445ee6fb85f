"""Qwen3.5 and 3.6 are Qwen3-Next with alpha and beta of the delta rule in matrices of their own; they are known by shape."""

from __future__ import annotations

from functools import partial

from edgemoe.model.families import Family, softmax_router
from edgemoe.model.families.qwen3_next import layer

FAMILY = Family(
    model_types=("qwen3_5_moe", "qwen3_5_moe_text"),
    gguf="qwen35moe",
    layer=partial(layer, joint=False),
    router=lambda c: softmax_router(c, renormalize=True),
    gguf_names={"ffn_norm": "post_attention_norm"},
)
