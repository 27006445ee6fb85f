"""This module maps roles of tensors to the names of transformers' modules; no other module knows these names.

Every class that we run keeps attention in `self_attn` and the feed-forward part in `mlp`.  Experts are stacked there, even if the
checkpoint holds them one by one.  If classes name a role differently, the role has several names, and a module has one of them.
"""

from __future__ import annotations

from typing import Any

import torch

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
    """The module that multiplies by a role's matrix."""
    return module.get_submodule(name_of(module, role).rpartition(".")[0])


def experts_of(module: Any) -> Any:
    """The module of a decoder layer that runs the routed experts."""
    return module.mlp.experts


def router_of(module: Any) -> Any:
    """The module of a decoder layer that holds the router's matrix."""
    return module.mlp.gate
