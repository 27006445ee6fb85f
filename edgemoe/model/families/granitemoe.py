"""Granite-MoE is known by shape."""

from __future__ import annotations

from collections.abc import Iterator

from edgemoe.model.blocks import Block, experts, gqa, pre_norms
from edgemoe.model.config import Config
from edgemoe.model.families import Family, softmax_router


def layer(c: Config, _: int) -> Iterator[Block]:
    """Attention, then experts."""
    yield from pre_norms(c)
    yield gqa(c)
    yield experts(c, c["intermediate_size"], "", router=())


FAMILY = Family(
    model_types=("granitemoe",),
    gguf="granitemoe",
    layer=layer,
    router=lambda c: softmax_router(c, renormalize=True),
    expert_size="intermediate_size",
)
