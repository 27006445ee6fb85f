"""This module defines the Model record: every tensor of a checkpoint as bytes in a file, and its part in the layer's computation.

Once the record is made, no module asks for the family again.  Tensors say what they read and write, layers name the kinds of their
attention and feed-forward parts, and the router holds its rule.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass, replace
from typing import Any

PROJECTIONS = ("gate", "up", "down")
_DTYPE_BYTES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2}


def bytes_of(dtype: str, n_weights: int) -> int:
    """Bytes of so many weights in a type of a checkpoint, or in a type of ggml, whose blocks they fill."""
    if dtype in _DTYPE_BYTES:
        return n_weights * _DTYPE_BYTES[dtype]
    import gguf

    block, size = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[dtype]]
    return int(n_weights // block * size)


@dataclass(frozen=True, slots=True, kw_only=True)
class Tensor:
    """One matrix or vector of the checkpoint, as bytes in a file; an expert inside a stacked tensor is a Tensor of its own.

    Activations have these names, in the order in which a layer makes them: stream (the layer's input), attn_norm, attn_mix (the mixed
    values), ffn_norm, expert_hidden, shared_hidden or dense_hidden (between up and down), and at the end output_norm.
    """

    name: str  # as in the checkpoint
    role: str  # the field's name, as llama.cpp spells it: attn_q, ffn_gate_exps, ffn_gate_inp (router), token_embd ...
    layer: int = -1  # -1: outside the layers
    expert: int = -1  # -1: not an expert's
    shape: tuple[int, ...]
    dtype: str  # BF16, F16, F32 or F64; in a GGUF any type of ggml
    file: str
    offset: int  # of the first byte in the file
    packed: str = ""  # the target's format in which the file holds the rows, ready to be copied; empty for plain `dtype`
    reads: str = ""  # the activation that this matrix multiplies; empty: none
    writes: str = ""  # of a norm, the activation that it makes; "stream": the product is added to the residual stream
    sha256: str = ""  # of its bytes, which every read checks; empty: not hashed yet
    planned: bool = False  # whether a plan gives it a format; vectors, routers, biases and convolutions stay F32, as in llama-quantize

    @property
    def n_weights(self) -> int:
        """Number of weights."""
        return math.prod(self.shape)

    @property
    def n_bytes(self) -> int:
        """Bytes in the checkpoint."""
        return bytes_of(self.dtype, self.n_weights)


@dataclass(frozen=True, slots=True, kw_only=True)
class Cache:
    """The cache of one layer, in numbers (not bytes)."""

    k: int = 0  # per token: KV heads x key length; latent attention (MLA): rank + rotary part, and no v
    v: int = 0  # per token: KV heads x value length
    window: int = 0  # sliding window in tokens; 0: the whole context
    state: int = 0  # recurrent layers: F32 numbers of a sequence of any length


@dataclass(frozen=True, slots=True, kw_only=True)
class Layer:
    """The kinds of a layer's attention and feed-forward parts."""

    attention: str  # gqa (grouped queries), mla (latent), delta (gated delta rule: recurrent)
    ffn: str  # moe (routed experts), dense
    cache: Cache


@dataclass(frozen=True, slots=True, kw_only=True)
class Attention:
    """The heads of attention, alike in all layers that attend."""

    heads: int
    kv_heads: int
    key_length: int  # of one head; latent attention: of an expanded head
    value_length: int
    rotary: int  # numbers of a head that are rotated by position
    rope_theta: float  # base of the rotary frequencies
    latent: int = 0  # latent attention (MLA): the rank of what is kept of keys and values
    q_latent: int = 0  # and the rank of the queries


@dataclass(frozen=True, slots=True, kw_only=True)
class Router:
    """The rule by which experts are chosen for a token and weighed.

    Scores are the softmax or sigmoid of the logits, and the `top_k` experts with the largest scores plus bias are chosen.  The scoring
    "chosen" is a softmax over the chosen experts' logits alone.
    """

    top_k: int
    scoring: str = "softmax"  # softmax, sigmoid, sqrtsoftplus or chosen; "unknown" if no rule of ours gives the choice that was seen
    biased: bool = False  # a bias is added to the scores for choosing, not for weighing
    renormalize: bool = True  # gates of the chosen are divided by their sum
    scale: float = 1.0  # and then multiplied by this
    groups: int = 1  # of consecutive experts, as many left in each
    top_groups: int = 1  # groups that a token may choose from
    group_best: int = 2  # a group counts with the sum of so many best scores


@dataclass(frozen=True, slots=True, kw_only=True)
class Expert:
    """The shape of a routed expert: W_down (act(W_gate x) * W_up x)."""

    size: int  # neurons
    activation: str = "silu"  # "unknown": the formula above does not give what was seen
    biased: bool = False  # the matrices have biases
    adds: bool = True  # the weighted outputs are added to the stream as they are

    @property
    def can_refit(self) -> bool:
        """Whether repair can compute with the experts: their formula is known, and what they give reaches the stream unchanged."""
        return self.activation == "silu" and self.adds


@dataclass(frozen=True, slots=True, kw_only=True)
class Step:
    """Tensors of a layer that read the same activation; a stack of experts counts once, by its role."""

    reads: str
    roles: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)  # without slots, so that cached properties can hold its indices
class Model:
    """The content of a checkpoint's headers; `fingerprint` is a SHA-256 over config, tokenizer and every byte of every tensor.

    Before the tensors are hashed, `fingerprint` is all zeros, and nothing can be made from the model.
    """

    folder: str
    name: str
    model_type: str
    architecture: str = ""  # llama.cpp's name of it, if the source is a GGUF
    config: dict[str, Any]
    hidden_size: int
    vocab_size: int
    context_length: int
    norm_eps: float
    n_experts: int
    attention: Attention
    router: Router
    expert: Expert
    layers: tuple[Layer, ...]
    causal: bool = True  # tokens see those before them alone
    dense_size: int = 0  # neurons of layers without experts
    shared_size: int = 0  # neurons of the shared expert
    tensors: tuple[Tensor, ...]
    fingerprint: str

    @property
    def n_layers(self) -> int:
        """All layers."""
        return len(self.layers)

    @property
    def caches(self) -> list[Cache]:
        """The cache of each layer."""
        return [layer.cache for layer in self.layers]

    @property
    def top_k(self) -> int:
        """Experts that the router picks."""
        return self.router.top_k

    @property
    def own_top_k(self) -> int:
        """Experts that the checkpoint's own router picks; `top_k` is smaller if fewer are wanted."""
        return int(self.config.get("num_experts_per_tok", self.top_k))

    def with_top_k(self, top_k: int) -> Model:
        """The same model whose router picks another number of experts."""
        return replace(self, router=replace(self.router, top_k=top_k))

    @property
    def n_weights(self) -> int:
        """All weights of the model."""
        return sum(t.n_weights for t in self.tensors)

    @property
    def n_bytes(self) -> int:
        """Bytes of all tensors in the checkpoint."""
        return sum(t.n_bytes for t in self.tensors)

    @functools.cached_property
    def moe_layers(self) -> tuple[int, ...]:
        """Numbers of the layers that have experts."""
        return tuple(number for number, layer in enumerate(self.layers) if layer.ffn == "moe")

    @property
    def is_tied(self) -> bool:
        """Whether the embedding is the output matrix too."""
        return self.find("output") is None

    @property
    def output_matrix(self) -> Tensor:
        """The matrix that gives the logits, which is the embedding if there is no other."""
        return self.get("token_embd" if self.is_tied else "output")

    def find(self, role: str, layer: int = -1, expert: int = -1) -> Tensor | None:
        """The tensor with this role, or None."""
        return self._by_layer.get(layer, {}).get((role, expert))

    def get(self, role: str, layer: int = -1, expert: int = -1) -> Tensor:
        """The tensor with this role, which the model must have."""
        return self._by_layer[layer][role, expert]

    def of_layer(self, layer: int) -> dict[tuple[str, int], Tensor]:
        """The tensors of one layer by (role, expert); layer -1 holds embedding, output and the last norm."""
        return self._by_layer.get(layer, {})

    def planned_roles(self, layer: int) -> tuple[str, ...]:
        """Roles in a layer that get formats, in file order; a stack of experts once."""
        return tuple(dict.fromkeys(role for (role, _), tensor in self.of_layer(layer).items() if tensor.planned))

    def norm_of(self, layer: int, activation: str) -> Tensor:
        """The norm that makes an activation of a layer."""
        return next(tensor for tensor in self.of_layer(layer).values() if tensor.writes == activation)

    def steps(self, layer: int) -> tuple[Step, ...]:
        """The steps of a layer in the order of computation; matrices that read the same activation are in one step."""
        roles: dict[str, dict[str, None]] = {}
        for (role, _), tensor in self.of_layer(layer).items():
            if tensor.reads:
                roles.setdefault(tensor.reads, {})[role] = None
        return tuple(Step(reads=reads, roles=tuple(found)) for reads, found in roles.items())

    def plain_roles(self, layer: int, step: Step) -> tuple[str, ...]:
        """Roles of a step that get formats and belong to no routed expert."""
        return tuple(role for role in step.roles if not is_stack(role) and self.get(role, layer).planned)

    @functools.cached_property
    def _by_layer(self) -> dict[int, dict[tuple[str, int], Tensor]]:
        """All tensors by layer, role and expert."""
        found: dict[int, dict[tuple[str, int], Tensor]] = {}
        for tensor in self.tensors:
            found.setdefault(tensor.layer, {})[tensor.role, tensor.expert] = tensor
        return found


def is_stack(role: str) -> bool:
    """Whether a role is that of the experts' matrices, which a GGUF stacks."""
    return role.endswith("_exps")


def tensor_name(role: str, layer: int) -> str:
    """llama.cpp's name of a tensor."""
    name = role if role.endswith(".bias") else f"{role}.weight"
    return f"blk.{layer}.{name}" if layer >= 0 else name
