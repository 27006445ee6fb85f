"""Tiny GGUFs of every kind of attention, as llama.cpp's loader wants them, and their models written down by hand.

The files are sparse: metadata and tensor infos are real, the weights are a hole of the right length (zeros), which is all that memory
depends on.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from oracles import write_sparse_header

from edgemoe.ir import Model, Tensor
from edgemoe.ir.model import Attention, Cache, Expert, Layer, Router

Shapes = dict[str, tuple[int, ...]]
HIDDEN, VOCAB, LAYERS = 512, 1024, 4


@dataclass(frozen=True)
class Tiny:
    """One file to be: architecture, metadata, tensors in torch order, and the model that memory is predicted from."""

    arch: str
    keys: Mapping[str, Any]
    tensors: Shapes
    model: Model  # what memory is predicted from
    types: Mapping[str, str] = field(default_factory=dict)  # ggml type of a role's tensors; F32 otherwise
    bpe: bool = False  # a byte-pair vocabulary with merges instead of bare numbers

    def kind(self, name: str) -> str:
        """ggml type of a tensor."""
        return self.types.get(_role(name), "F32") if name.endswith(".weight") else "F32"

    def units(self) -> list[tuple[str, str, int]]:
        """(role, format, bytes) of every tensor."""
        import gguf

        found = []
        for name, shape in self.tensors.items():
            kind = self.kind(name)
            block, block_bytes = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[kind]]
            found.append((_role(name), kind, math.prod(shape) // block * block_bytes))
        return found


def _role(name: str) -> str:
    return name.removesuffix(".weight").split(".")[-1]


def write_sparse(tiny: Tiny, path: Path) -> Path:
    """The file, with a hole for the weights."""
    import gguf

    writer = gguf.GGUFWriter(path, tiny.arch)
    sizes = {"vocab_size": tiny.model.vocab_size, "context_length": 65536, "block_count": len(tiny.model.caches)}
    for key, value in {**tiny.keys, **sizes}.items():
        name = f"{tiny.arch}.{key}"
        if isinstance(value, list):
            writer.add_array(name, value)
        elif isinstance(value, bool):
            writer.add_bool(name, value)
        elif isinstance(value, float):
            writer.add_float32(name, value)
        else:
            writer.add_uint32(name, value)
    _add_tokens(writer, tiny)
    units = tiny.units()
    for (name, shape), (_, format_name, size) in zip(tiny.tensors.items(), units, strict=True):
        kind = gguf.GGMLQuantizationType[format_name]
        block, block_bytes = gguf.GGML_QUANT_SIZES[kind]
        if format_name == "F32":
            writer.add_tensor_info(name, shape, np.dtype(np.float32), size)
        elif format_name == "F16":
            writer.add_tensor_info(name, shape, np.dtype(np.float16), size)
        else:
            writer.add_tensor_info(name, (*shape[:-1], shape[-1] // block * block_bytes), np.dtype(np.uint8), size, kind)
    return write_sparse_header(writer, [size for _, _, size in units], path)


def _add_tokens(writer: Any, tiny: Tiny) -> None:
    """Tokens as long as real ones are (7 letters), and as many merges."""
    if not tiny.bpe:
        writer.add_string("tokenizer.ggml.model", "none")
        return
    tokens = [f"tok{i:05x}"[:8] for i in range(tiny.model.vocab_size)]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(tokens)
    writer.add_token_types([1] * len(tokens))
    writer.add_token_merges([f"{token[:4]} {token[4:]}" for token in tokens])


def bare_model(
    *,
    tensors: Shapes,
    caches: tuple[Cache, ...],
    hidden_size: int,
    n_heads: int,
    key_length: int,
    value_length: int,
    vocab_size: int,
    n_experts: int,
    top_k: int,
    expert_size: int,
    gating: str = "softmax",
    renormalize: bool = True,
    scale: float = 1.0,
    expert_bias: bool = False,
    dense_layers: int = 0,
    dense_size: int = 0,
    shared_size: int = 0,
    latent: int = 0,
    q_latent: int = 0,
) -> Model:
    """A model of which only what memory depends on is said; each tensor of the file is one of its tensors."""
    layers = tuple(
        Layer(attention="mla" if latent else "gqa", ffn="dense" if number < dense_layers else "moe", cache=cache)
        for number, cache in enumerate(caches)
    )
    heads = Attention(
        heads=n_heads, kv_heads=1, key_length=key_length, value_length=value_length, rotary=key_length, rope_theta=1e4,
        latent=latent, q_latent=q_latent,
    )  # fmt: skip
    return Model(
        folder="", name="bare", model_type="", config={}, hidden_size=hidden_size, vocab_size=vocab_size, context_length=65536,
        norm_eps=1e-6, n_experts=n_experts, attention=heads, layers=layers, dense_size=dense_size, shared_size=shared_size,
        router=Router(top_k=top_k, scoring=gating, renormalize=renormalize, scale=scale),
        expert=Expert(size=expert_size, biased=expert_bias), tensors=tuple(itertools.starmap(_tensor, tensors.items())), fingerprint="",
    )  # fmt: skip


def _tensor(name: str, shape: tuple[int, ...]) -> Tensor:
    layer, role = name.removeprefix("blk.").split(".", 1) if name.startswith("blk.") else ("-1", name)
    return Tensor(name=name, role=role.removesuffix(".weight"), layer=int(layer), shape=shape, dtype="F32", file="", offset=0)


def ends(hidden: int, vocab: int) -> Shapes:
    """Embedding, last norm, output."""
    return {"token_embd.weight": (vocab, hidden), "output_norm.weight": (hidden,), "output.weight": (vocab, hidden)}


def attention(hidden: int, heads: int, kv_heads: int, dim: int) -> Shapes:
    """The four matrices of grouped-query attention."""
    return {
        "attn_norm.weight": (hidden,),
        "attn_q.weight": (heads * dim, hidden),
        "attn_k.weight": (kv_heads * dim, hidden),
        "attn_v.weight": (kv_heads * dim, hidden),
        "attn_output.weight": (hidden, heads * dim),
    }


def experts(hidden: int, n: int, size: int, gate: bool = True) -> Shapes:
    """Router and stacks."""
    stacks: Shapes = {"ffn_gate_inp.weight": (n, hidden)}
    if gate:
        stacks["ffn_gate_exps.weight"] = (n, size, hidden)
    return stacks | {"ffn_up_exps.weight": (n, size, hidden), "ffn_down_exps.weight": (n, hidden, size)}


def in_layer(layer: int, shapes: Shapes) -> Shapes:
    """Names of one layer's tensors."""
    return {f"blk.{layer}.{name}": shape for name, shape in shapes.items()}


def gqa(
    arch: str = "qwen3moe",
    *,
    hidden: int = HIDDEN,
    heads: int = 8,
    kv_heads: int = 2,
    dim: int = 64,
    n_experts: int = 8,
    top_k: int = 2,
    size: int = 256,
    vocab: int = VOCAB,
    layers: int = LAYERS,
    types: Mapping[str, str] | None = None,
) -> Tiny:
    """Grouped-query attention: the three families that we write (qwen3moe, olmoe, llama = Mixtral)."""
    keys: dict[str, Any] = {
        "embedding_length": hidden,
        "feed_forward_length": size,
        "attention.head_count": heads,
        "attention.head_count_kv": kv_heads,
        "attention.key_length": dim,
        "attention.value_length": dim,
        "attention.layer_norm_rms_epsilon": 1e-6,
        "rope.dimension_count": dim,
        "expert_count": n_experts,
        "expert_used_count": top_k,
    }
    norms: Shapes = {"ffn_norm.weight": (hidden,)}
    if arch == "qwen3moe":
        keys["expert_feed_forward_length"] = size
        norms |= {"attn_q_norm.weight": (dim,), "attn_k_norm.weight": (dim,)}
    if arch == "olmoe":
        norms |= {"attn_q_norm.weight": (hidden,), "attn_k_norm.weight": (hidden,)}
    tensors = ends(hidden, vocab)
    for layer in range(layers):
        tensors |= in_layer(layer, {**attention(hidden, heads, kv_heads, dim), **norms, **experts(hidden, n_experts, size)})
    model = bare_model(
        tensors=tensors,
        caches=(Cache(k=kv_heads * dim, v=kv_heads * dim),) * layers,
        hidden_size=hidden,
        n_heads=heads,
        key_length=dim,
        value_length=dim,
        vocab_size=vocab,
        n_experts=n_experts,
        top_k=top_k,
        expert_size=size,
        renormalize=arch != "olmoe",
    )
    return Tiny(arch, keys, tensors, model, types or {})


def glu(hidden: int, size: int, suffix: str = "") -> Shapes:
    """The three matrices of a feed-forward part."""
    found: Shapes = {f"ffn_{n}{suffix}.weight": (size, hidden) for n in ("gate", "up")}
    return found | {f"ffn_down{suffix}.weight": (hidden, size)}


def with_shared(hidden: int, n_experts: int, size: int) -> Shapes:
    """Experts with a bias for the choice, beside a shared one."""
    return {**experts(hidden, n_experts, size), "exp_probs_b.bias": (n_experts,), **glu(hidden, size, "_shexp")}


def latent_attention(hidden: int, heads: int, rank: int, rope: int, nope: int, value: int, q_rank: int) -> Shapes:
    """The tensors of latent attention and the norms of its layer."""
    return {
        "attn_norm.weight": (hidden,),
        "attn_q_a_norm.weight": (q_rank,),
        "attn_kv_a_norm.weight": (rank,),
        "attn_q_a.weight": (q_rank, hidden),
        "attn_q_b.weight": (heads * (nope + rope), q_rank),
        "attn_kv_a_mqa.weight": (rank + rope, hidden),
        "attn_k_b.weight": (heads, rank, nope),
        "attn_v_b.weight": (heads, value, rank),
        "attn_output.weight": (hidden, heads * value),
        "ffn_norm.weight": (hidden,),
    }


def latent_lengths(rank: int, rope: int, nope: int, value: int) -> dict[str, Any]:
    """Lengths of the cached row, and of an expanded head."""
    return {
        "attention.key_length": rank + rope,
        "attention.value_length": rank,
        "attention.key_length_mla": nope + rope,
        "attention.value_length_mla": value,
    }


def mla(
    *,
    hidden: int = HIDDEN,
    heads: int = 8,
    rank: int = 192,
    rope: int = 64,
    nope: int = 64,
    value: int = 64,
    q_rank: int = 256,
    n_experts: int = 8,
    size: int = 256,
    layers: int = LAYERS,
    types: Mapping[str, str] | None = None,
) -> Tiny:
    """Latent attention (DeepSeek V2/V3): one row of rank + rotary part per token, whatever the heads; no V."""
    top_k, dense = 2, 1024
    keys: dict[str, Any] = {
        "embedding_length": hidden,
        "feed_forward_length": dense,
        "attention.head_count": heads,
        "attention.head_count_kv": 1,
        **latent_lengths(rank, rope, nope, value),
        "attention.q_lora_rank": q_rank,
        "attention.kv_lora_rank": rank,
        "attention.layer_norm_rms_epsilon": 1e-6,
        "rope.dimension_count": rope,
        "leading_dense_block_count": 1,
        "expert_count": n_experts,
        "expert_used_count": top_k,
        "expert_feed_forward_length": size,
        "expert_shared_count": 1,
        "expert_weights_scale": 2.5,
        "expert_weights_norm": True,
        "expert_gating_func": 2,
    }
    mixer = latent_attention(hidden, heads, rank, rope, nope, value, q_rank)
    tensors = ends(hidden, VOCAB)
    for layer in range(layers):
        part = with_shared(hidden, n_experts, size) if layer else glu(hidden, dense)
        tensors |= in_layer(layer, {**mixer, **part})
    model = bare_model(
        tensors=tensors,
        caches=(Cache(k=rank + rope),) * layers,
        hidden_size=hidden,
        n_heads=heads,
        key_length=nope + rope,
        value_length=value,
        latent=rank,
        q_latent=q_rank,
        vocab_size=VOCAB,
        n_experts=n_experts,
        top_k=top_k,
        expert_size=size,
        gating="sigmoid",
        scale=2.5,
        dense_layers=1,
        dense_size=dense,
        shared_size=size,
    )
    return Tiny("deepseek2", keys, tensors, model, types or {})


def sliding(
    *,
    window: int = 128,
    hidden: int = HIDDEN,
    heads: int = 8,
    kv_heads: int = 2,
    dim: int = 64,
    n_experts: int = 8,
    size: int = 256,
    layers: int = LAYERS,
    types: Mapping[str, str] | None = None,
) -> Tiny:
    """Sliding windows in every other layer (gpt-oss)."""
    top_k = 2
    keys: dict[str, Any] = {
        "embedding_length": hidden,
        "feed_forward_length": size,
        "attention.head_count": heads,
        "attention.head_count_kv": kv_heads,
        "attention.key_length": dim,
        "attention.value_length": dim,
        "attention.sliding_window": window,
        "attention.layer_norm_rms_epsilon": 1e-6,
        "rope.dimension_count": dim,
        "expert_count": n_experts,
        "expert_used_count": top_k,
        "expert_feed_forward_length": size,
    }
    tensors = ends(hidden, VOCAB)
    for layer in range(layers):
        part = {**attention(hidden, heads, kv_heads, dim), **experts(hidden, n_experts, size)}
        part |= {"post_attention_norm.weight": (hidden,), "attn_sinks.weight": (heads,), "attn_output.bias": (hidden,)}
        part |= {"ffn_gate_inp.bias": (n_experts,), "ffn_down_exps.bias": (n_experts, hidden)}
        part |= {f"ffn_{n}_exps.bias": (n_experts, size) for n in ("gate", "up")}
        tensors |= in_layer(layer, part)
    model = bare_model(
        tensors=tensors,
        caches=tuple(Cache(k=kv_heads * dim, v=kv_heads * dim, window=window if layer % 2 == 0 else 0) for layer in range(layers)),
        hidden_size=hidden,
        n_heads=heads,
        key_length=dim,
        value_length=dim,
        vocab_size=VOCAB,
        n_experts=n_experts,
        top_k=top_k,
        expert_size=size,
        gating="chosen",
        renormalize=False,
        expert_bias=True,
    )
    return Tiny("gpt-oss", keys, tensors, model, types or {})


def granite_hybrid(*, hidden: int = HIDDEN, heads: int = 8, kv_heads: int = 2, dim: int = 64) -> Tiny:
    """Mamba-2 in three of four layers, attention in the last (granitehybrid)."""
    n_experts, top_k, size = 8, 2, 256
    conv, state, groups, inner, ranks = 4, 64, 1, 2 * hidden, 16
    recurrent = [layer % 4 != 3 for layer in range(LAYERS)]
    keys: dict[str, Any] = {
        "embedding_length": hidden,
        "feed_forward_length": size,
        "attention.head_count": heads,
        "attention.head_count_kv": [0 if r else kv_heads for r in recurrent],
        "attention.key_length": dim,
        "attention.value_length": dim,
        "attention.layer_norm_rms_epsilon": 1e-6,
        "rope.dimension_count": dim,
        "ssm.conv_kernel": conv,
        "ssm.inner_size": inner,
        "ssm.state_size": state,
        "ssm.time_step_rank": ranks,
        "ssm.group_count": groups,
        "expert_count": n_experts,
        "expert_used_count": top_k,
    }
    mamba: Shapes = {
        "attn_norm.weight": (hidden,),
        "ssm_in.weight": (2 * inner + 2 * groups * state + ranks, hidden),
        "ssm_conv1d.weight": (inner + 2 * groups * state, conv),
        "ssm_conv1d.bias": (inner + 2 * groups * state,),
        "ssm_dt.bias": (ranks,),
        "ssm_a": (ranks, 1),
        "ssm_d": (ranks, 1),
        "ssm_norm.weight": (groups, inner // groups),
        "ssm_out.weight": (hidden, inner),
    }
    tensors = ends(hidden, VOCAB)
    for layer in range(LAYERS):
        mixer = mamba if recurrent[layer] else attention(hidden, heads, kv_heads, dim)
        tensors |= in_layer(layer, {**mixer, "ffn_norm.weight": (hidden,), **experts(hidden, n_experts, size)})
    one = Cache(state=(conv - 1) * (inner + 2 * groups * state) + state * inner)
    model = bare_model(
        tensors=tensors,
        caches=tuple(one if r else Cache(k=kv_heads * dim, v=kv_heads * dim) for r in recurrent),
        hidden_size=hidden,
        n_heads=heads,
        key_length=dim,
        value_length=dim,
        vocab_size=VOCAB,
        n_experts=n_experts,
        top_k=top_k,
        expert_size=size,
    )
    return Tiny("granitehybrid", keys, tensors, model)


def short_convolution(*, hidden: int = HIDDEN, heads: int = 8, kv_heads: int = 2) -> Tiny:
    """Short convolutions and attention by turns (lfm2moe)."""
    n_experts, top_k, size, dense, length, dim = 8, 2, 256, 1024, 3, hidden // heads
    recurrent = [layer % 2 == 0 for layer in range(LAYERS)]
    keys: dict[str, Any] = {
        "embedding_length": hidden,
        "feed_forward_length": dense,
        "attention.head_count": heads,
        "attention.head_count_kv": [0 if r else kv_heads for r in recurrent],
        "attention.layer_norm_rms_epsilon": 1e-6,
        "shortconv.l_cache": length,
        "leading_dense_block_count": 1,
        "expert_count": n_experts,
        "expert_used_count": top_k,
        "expert_feed_forward_length": size,
        "expert_gating_func": 2,
    }
    conv: Shapes = {
        "attn_norm.weight": (hidden,),
        "shortconv.conv.weight": (hidden, length),
        "shortconv.in_proj.weight": (3 * hidden, hidden),
        "shortconv.out_proj.weight": (hidden, hidden),
    }
    heads_norms: Shapes = {"attn_q_norm.weight": (dim,), "attn_k_norm.weight": (dim,)}
    tensors = {"token_embd.weight": (VOCAB, hidden), "token_embd_norm.weight": (hidden,)}
    for layer in range(LAYERS):
        part = dict(conv) if recurrent[layer] else {**attention(hidden, heads, kv_heads, dim), **heads_norms}
        part["ffn_norm.weight"] = (hidden,)
        if layer == 0:
            part |= {"ffn_gate.weight": (dense, hidden), "ffn_up.weight": (dense, hidden), "ffn_down.weight": (hidden, dense)}
        else:
            part |= {**experts(hidden, n_experts, size), "exp_probs_b.bias": (n_experts,)}
        tensors |= in_layer(layer, part)
    model = bare_model(
        tensors=tensors,
        caches=tuple(Cache(state=(length - 1) * hidden) if r else Cache(k=kv_heads * dim, v=kv_heads * dim) for r in recurrent),
        hidden_size=hidden,
        n_heads=heads,
        key_length=dim,
        value_length=dim,
        vocab_size=VOCAB,
        n_experts=n_experts,
        top_k=top_k,
        expert_size=size,
        gating="sigmoid",
        dense_layers=1,
        dense_size=dense,
    )
    return Tiny("lfm2moe", keys, tensors, model)
