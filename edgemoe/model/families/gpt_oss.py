"""gpt-oss has attention sinks, sliding windows, a softmax over the chosen experts, and biases everywhere; it is known by shape."""

from __future__ import annotations

from collections.abc import Iterator

from edgemoe.ir.model import Router
from edgemoe.model.blocks import Block, attention_kind, experts, gqa, pre_norms
from edgemoe.model.config import Config
from edgemoe.model.families import Family


def layer(c: Config, number: int) -> Iterator[Block]:
    """Attention, which has a window in every other layer, then experts."""
    yield from pre_norms(c)
    window = c["sliding_window"] if attention_kind(c, number) == "window" else 0
    yield gqa(c, biased=True, output_biased=True, sinks=True, window=window)
    yield experts(c, c["intermediate_size"], "", router=(), biased=True)


FAMILY = Family(
    model_types=("gpt_oss",),
    gguf="gpt-oss",
    layer=layer,
    router=lambda c: Router(top_k=c.top_k, scoring="chosen", renormalize=False),
    expert_size="intermediate_size",
    gguf_names={"ffn_norm": "post_attention_norm"},
)
