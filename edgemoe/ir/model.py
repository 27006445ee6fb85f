"""What a checkpoint holds: every tensor as bytes in a file, and the shape of the whole."""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass
from typing import Any

PROJECTIONS = ("gate", "up", "down")

_DTYPE_BYTES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2}


@dataclass(frozen=True, slots=True, kw_only=True)
class Tensor:
    """One matrix or vector of the checkpoint, as bytes in a file; an expert inside a stacked tensor is a Tensor of its own."""

    name: str  # as in the checkpoint
    role: str  # the field's name, as llama.cpp spells it: attn_q, ffn_gate_exps, ffn_gate_inp (router), token_embd ...
    layer: int = -1  # -1: outside the layers
    expert: int = -1  # -1: not an expert's
    shape: tuple[int, ...]
    dtype: str  # BF16, F16, F32 or F64
    file: str
    offset: int  # of the first byte in the file
    packed: str = ""  # format of a target in which the file holds the rows already, ready to be copied; empty: plain `dtype`

    @property
    def n_weights(self) -> int:
        """Number of weights."""
        return math.prod(self.shape)

    @property
    def n_bytes(self) -> int:
        """Bytes in the checkpoint."""
        return self.n_weights * _DTYPE_BYTES[self.dtype]


@dataclass(frozen=True, kw_only=True)  # without slots: what it is asked for by role is indexed once
class Model:
    """What the headers of a checkpoint say.  `fingerprint` is a SHA-256 over config, tokenizer, headers and samples of the data."""

    folder: str
    name: str
    model_type: str
    config: dict[str, Any]
    n_layers: int
    hidden_size: int
    vocab_size: int
    n_heads: int
    n_kv_heads: int
    head_dim: int
    n_experts: int
    top_k: int
    expert_size: int
    renormalize: bool  # gates of the top-k are divided by their sum
    context_length: int
    tensors: tuple[Tensor, ...]
    fingerprint: str

    @property
    def own_top_k(self) -> int:
        """Experts that the checkpoint's router picks, where `top_k` says that fewer are wanted."""
        return int(self.config.get("num_experts_per_tok", self.top_k))

    @property
    def n_weights(self) -> int:
        """All weights of the model."""
        return sum(t.n_weights for t in self.tensors)

    @property
    def n_bytes(self) -> int:
        """Bytes of all tensors in the checkpoint."""
        return sum(t.n_bytes for t in self.tensors)

    def find(self, role: str, layer: int = -1, expert: int = -1) -> Tensor | None:
        """The tensor with this role, or None."""
        return self._layers.get(layer, {}).get((role, expert))

    def of_layer(self, layer: int) -> dict[tuple[str, int], Tensor]:
        """The tensors of one layer by (role, expert); layer -1 holds embedding, output and the last norm."""
        return self._layers.get(layer, {})

    @functools.cached_property
    def _layers(self) -> dict[int, dict[tuple[str, int], Tensor]]:
        """All tensors by layer, role and expert."""
        found: dict[int, dict[tuple[str, int], Tensor]] = {}
        for tensor in self.tensors:
            found.setdefault(tensor.layer, {})[tensor.role, tensor.expert] = tensor
        return found


def tensor_name(role: str, layer: int) -> str:
    """llama.cpp's name of a tensor."""
    return f"blk.{layer}.{role}.weight" if layer >= 0 else f"{role}.weight"


def is_planned(tensor: Tensor) -> bool:
    """Whether a tensor gets a format from the plan; vectors, routers, biases and convolutions stay F32, as in llama-quantize."""
    return len(tensor.shape) == 2 and tensor.role not in ("ffn_gate_inp", "ssm_conv1d") and not tensor.role.endswith(".bias")
