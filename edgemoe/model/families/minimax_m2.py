"""MiniMax-M2 has a QK-norm over the whole width and a sigmoid router with a bias for the choice; it is known by shape."""

from __future__ import annotations

from collections.abc import Iterator

from edgemoe.model.blocks import Block, experts, gqa, pre_norms, qk_norms
from edgemoe.model.config import Config
from edgemoe.model.families import Family, sigmoid_router


def layer(c: Config, _: int) -> Iterator[Block]:
    """Attention, then experts."""
    yield from pre_norms(c)
    yield gqa(c)
    yield qk_norms(c, wide=True)
    yield experts(c, c["intermediate_size"], "", router=(), bias="block_sparse_moe.e_score_correction_bias")


FAMILY = Family(
    model_types=("minimax_m2",),
    gguf="minimax-m2",
    layer=layer,
    router=lambda c: sigmoid_router(c, renormalize=True),
    expert_size="intermediate_size",
)
