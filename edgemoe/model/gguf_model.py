"""This module makes a Model of a GGUF from the headers of its files, for every architecture with experts that llama.cpp runs.

A header says what the tensors are called, where they lie, and how many experts there are.  It does not say which matrices read the same
values, or how the router weighs its choice.  `stream/engine/traced.py` finds that out by looking at a few tokens in llama.cpp.
"""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

from edgemoe.base.errors import ModelError
from edgemoe.base.work import UNHASHED
from edgemoe.ir import Model, Tensor
from edgemoe.ir.memory import DEFAULT_CONTEXT
from edgemoe.ir.model import Attention, Cache, Expert, Layer, Router, is_stack
from edgemoe.model.gguf_source import GgufSource, GgufTensor, read_gguf

BLOCK = 32  # weights of the smallest block of ggml's quantized types
PLAIN = ("F32", "F16", "BF16")
_IQ = ("IQ4_NL", "IQ4_XS", "IQ3_S", "IQ3_XXS", "IQ2_S", "IQ2_XS", "IQ2_XXS", "IQ1_M", "IQ1_S")
QUANTIZED = ("Q8_0", "Q6_K", "Q5_K", "Q4_K", "Q3_K", "Q2_K", "Q5_1", "Q5_0", "Q4_1", "Q4_0", "MXFP4", *_IQ)
# llama-quantize leaves these as they are, and ggml's kernels want some of them in F32 (tensor_allows_quantization in llama-quant.cpp).
_LEFT = re.compile(
    r"_norm|ffn_gate_inp|ssm_conv1d|shortconv\.conv|position_embd|token_types|attn_rel_b|time_mix_(?:first|w[012]|v[012]|a[012]|g[012]|lerp)"
    r"|altup|laurel|per_layer_model_proj|indexer|\bhc_|sinks|ffn_.*_chexps"
)
DIFFUSION = ("llada-moe", "rnd1")  # every token sees every other


def inspect_gguf(source: str | Path) -> Model:
    """The Model of a GGUF, from its headers alone.

    Raises:
        UsageError: there is no such file, or the folder holds several models.
        ModelError: a file is missing, damaged or malformed, or edgemoe cannot build from such a model.
    """
    found = read_gguf(source)
    where = found.files[0]
    layers = found.n_layers - _number(found, "nextn_predict_layers")  # blocks that predict further tokens are left out
    if not 0 < layers <= found.n_layers:
        raise ModelError(f"{where}: {found.architecture}.nextn_predict_layers contradicts block_count")
    tensors = [tensor for each in found.tensors if each.layer < layers for tensor in _tensors_of(found, each)]
    outer = [tensor for tensor in tensors if tensor.layer < 0]
    if not any(tensor.role == "token_embd" for tensor in outer):
        raise ModelError(f"{where}: token_embd.weight is missing")
    down = next((tensor for tensor in tensors if tensor.role == "ffn_down_exps" and tensor.expert >= 0), None)
    if down is None:
        raise ModelError(f"{where}: no layer has a stack ffn_down_exps.weight of {found.n_experts} experts")
    if found.n_experts % found.n_groups:
        raise ModelError(f"{where}: {found.architecture}.expert_group_count is {found.n_groups}, and there are {found.n_experts} experts")
    moe = {tensor.layer for tensor in tensors if tensor.expert >= 0}
    return Model(
        folder=str(where.parent),
        name=found.name,
        model_type=found.architecture,
        architecture=found.architecture,
        config={key: value for key, value in found.values.items() if not isinstance(value, list)},
        hidden_size=found.hidden_size,
        vocab_size=found.vocab_size,
        context_length=found.context_length or DEFAULT_CONTEXT,
        norm_eps=eps if isinstance(eps := found.of_architecture("attention.layer_norm_rms_epsilon"), float) else 1e-5,
        n_experts=found.n_experts,
        causal=found.architecture not in DIFFUSION,
        attention=Attention(heads=0, kv_heads=0, key_length=0, value_length=0, rotary=0, rope_theta=0.0),
        router=Router(
            top_k=found.top_k,
            biased=any(tensor.role == "exp_probs_b.bias" for tensor in tensors),
            groups=found.n_groups,
            top_groups=_number(found, "expert_group_used_count") or found.n_groups,
        ),
        expert=Expert(size=down.shape[1], activation="unknown"),
        layers=tuple(Layer(attention="", ffn="moe" if layer in moe else "dense", cache=Cache()) for layer in range(layers)),
        tensors=(*outer, *(tensor for tensor in tensors if tensor.layer >= 0)),
        fingerprint=UNHASHED,
    )


def first_file(model: Model) -> Path:
    """The file of a GGUF that llama.cpp is given; new weights lie in files of the work folder, by their whole paths."""
    return Path(model.folder) / min(tensor.file for tensor in model.tensors if not Path(tensor.file).is_absolute())


def _number(source: GgufSource, key: str) -> int:
    value: Any = source.of_architecture(key, 0)
    return value if isinstance(value, int) else 0


def _tensors_of(source: GgufSource, found: GgufTensor) -> list[Tensor]:
    """A tensor of the file; of a stack of matrices, one Tensor for each expert."""
    role = _role_of(found)
    planned = _is_planned(found, role)
    tensor = Tensor(
        name=found.name,
        role=role,
        layer=found.layer,
        shape=found.shape,
        dtype=found.kind,
        file=found.file,
        offset=found.offset,
        reads={"token_embd": "tokens", "output": "output_norm"}.get(role, role if planned else ""),
        planned=planned,
    )
    if not (found.expert_axis and is_stack(role)):
        return [tensor]
    return [_slice(tensor, found, expert) for expert in range(source.n_experts)]


def _slice(tensor: Tensor, found: GgufTensor, expert: int) -> Tensor:
    return replace(tensor, expert=expert, shape=found.shape[1:], offset=found.slice_of(expert)[0])


def _role_of(found: GgufTensor) -> str:
    name = found.name.removeprefix(f"blk.{found.layer}.").removesuffix(".weight")
    return "exp_probs_b.bias" if name == "exp_probs_b" else name


def _is_planned(found: GgufTensor, role: str) -> bool:
    """Whether a plan may give the tensor a format, as far as its name and shape say."""
    matrix = len(found.shape) == (3 if is_stack(role) and found.expert_axis else 2)
    known = found.kind in (*PLAIN, *QUANTIZED)
    named = not _LEFT.search(role) if found.layer >= 0 else role in ("token_embd", "output")
    return found.name.endswith(".weight") and matrix and known and found.shape[-1] % BLOCK == 0 and named
