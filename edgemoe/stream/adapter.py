"""This module maps roles of tensors to the names of transformers' modules; no other module knows these names.

Every class that we run keeps attention in `self_attn` and the feed-forward part in `mlp`.  Experts are stacked there, even if the
checkpoint holds them one by one.  If classes name a role differently, the role has several names, and a module has one of them.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from edgemoe.base.errors import ModelError
from edgemoe.ir import is_stack

_GLU = ("gate", "up", "down")
NAMES: dict[str, tuple[str, ...]] = {
    "attn_norm": ("input_layernorm.weight",),
    "ffn_norm": ("post_attention_layernorm.weight",),
    **{f"attn_{p}": (f"self_attn.{p}_proj.weight",) for p in ("q", "k", "v")},
    **{f"attn_{p}.bias": (f"self_attn.{p}_proj.bias",) for p in ("q", "k", "v")},
    "attn_output": ("self_attn.o_proj.weight",),
    **{f"attn_{p}_norm": (f"self_attn.{p}_norm.weight",) for p in ("q", "k")},
    "ffn_gate_inp": ("mlp.gate.weight",),
    "exp_probs_b.bias": ("mlp.gate.e_score_correction_bias",),
    **{f"ffn_{p}_shexp": (f"mlp.shared_expert.{p}_proj.weight", f"mlp.shared_experts.{p}_proj.weight") for p in _GLU},
    "ffn_gate_inp_shexp": ("mlp.shared_expert_gate.weight",),
    **{f"ffn_{p}": (f"mlp.{p}_proj.weight",) for p in _GLU},
}


def name_of(module: Any, role: str) -> str:
    """Name of the parameter or buffer that holds a role's weights in a decoder layer.

    Raises:
        ModelError: this version of transformers has no such parameter.
    """
    known = {*dict(module.named_parameters()), *dict(module.named_buffers())}
    for name in NAMES.get(role, ()):
        if name in known:
            return name
    raise ModelError(f"this version of transformers has no place for {role} in {type(module).__name__}")


def weights_of(module: Any, role: str, expert: int | slice = slice(None)) -> torch.Tensor:
    """View of a role's weights in a decoder layer, for one expert or for all experts."""
    if not is_stack(role):
        owner, _, leaf = name_of(module, role).rpartition(".")
        values: torch.Tensor = getattr(module.get_submodule(owner), leaf).data
        return values
    experts = experts_of(module)
    if role == "ffn_down_exps":
        view: torch.Tensor = experts.down_proj.data[expert]
        return view
    both: torch.Tensor = experts.gate_up_proj.data
    half = both.shape[1] // 2
    return both[expert, slice(0, half) if role == "ffn_gate_exps" else slice(half, 2 * half)]


def linear_of(module: Any, role: str) -> Any:
    """The module that multiplies by a role's matrix or norm."""
    return module.get_submodule(name_of(module, role).rpartition(".")[0])


def experts_of(module: Any) -> Any:
    """The module of a decoder layer that runs the routed experts."""
    return module.mlp.experts


def router_of(module: Any) -> Any:
    """The module of a decoder layer that holds the router's matrix."""
    return module.mlp.gate


def ffn_of(module: Any) -> Any:
    """The module of a decoder layer that is its feed-forward part."""
    return module.mlp


def layer_of(whole: Any, number: int) -> Any:
    """A decoder layer of a whole model."""
    return whole.model.layers[number]


def make_rotary(whole: Any) -> Any:
    """The rotary embedding of a whole model, with weights though the model itself has none."""
    return type(whole.model.rotary_emb)(config=whole.config)


# ---------------------------------------------------------------------------------------------------------------- experts
def count_experts(experts: Any) -> int:
    """Number of experts whose weights a module of experts holds."""
    return int(experts.gate_up_proj.shape[0])


def run_expert(experts: Any, expert: int, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Hidden activations [tokens, M] and outputs [tokens, H] of one expert for inputs [tokens, H]."""
    h: torch.Tensor = experts._apply_gate(nn.functional.linear(x, experts.gate_up_proj[expert]))
    return h, nn.functional.linear(h, experts.down_proj[expert])


class only_experts:
    """Let the router see only some experts, as if the checkpoint had no others; it chooses among them by its own rule."""

    def __init__(self, module: Any, kept: NDArray[np.int64]) -> None:
        self.router, self.experts, self.kept = router_of(module), experts_of(module), torch.from_numpy(kept)

    def __enter__(self) -> None:
        self.weight, self.number = self.router.weight, getattr(self.router, "num_experts", 0)
        self.bias = getattr(self.router, "e_score_correction_bias", None)
        self.router.weight = nn.Parameter(self.weight.data[self.kept], requires_grad=False)
        self.router.num_experts = len(self.kept)
        if self.bias is not None:
            self.router.e_score_correction_bias = self.bias[self.kept]
        self.experts.kept = self.kept

    def __exit__(self, *_: object) -> None:
        self.router.weight, self.router.num_experts = self.weight, self.number
        if self.bias is not None:
            self.router.e_score_correction_bias = self.bias
        self.experts.kept = None
