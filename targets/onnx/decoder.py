"""This module builds the decoder's graph node by node from a Model and formats; it announces weights and does not read them.

Inputs and outputs have the names that onnxruntime-genai, transformers.js and optimum know.  Inputs are input_ids, attention_mask (padding
on the right) and past_key_values.N.key / .value; outputs are logits and present.N.key / .value.  A token's position is the number of tokens
before it.  The graph computes the rotary angles, so no table takes bytes or limits the context.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from edgemoe.ir import Model
from edgemoe.targets.onnx.experts import Group, add_moe, add_weights, code_dims
from edgemoe.targets.onnx.formats import FORMATS, fits
from edgemoe.targets.onnx.graph_builder import CONTRIB, FLOAT, INT32, INT64, UINT8, Sheet, import_onnx

# Inputs of matrix products are rounded to int8 by block.  With float inputs, 8 and 2 bits are 50 to 400 times slower and 4 bits 3 to 7
# times, and the squared error is half a per cent smaller (docs/decisions/0007-onnx-formats.md).
INT8_INPUTS = 4  # MatMulNBits' accuracy_level


def widest_format(cols: int) -> str:
    """The format whose node takes most bytes in the graph: all pieces, and the largest block."""
    return next((name for name in reversed(FORMATS) if fits(name, cols)), "F32")


def build_decoder(sheet: Sheet, model: Model, groups: Sequence[Sequence[Group]], formats: Mapping[str, str]) -> tuple[list[Any], list[Any]]:
    """Fill a sheet with the whole decoder, and return its inputs and outputs.

    Args:
        sheet: an empty one.
        model: whose shapes count.
        groups: of each layer, formats of experts with their counts (see experts.group_experts).
        formats: of every other matrix, by unit name.
    """
    x = _embedding(sheet, model, formats["token_embd.weight"])
    shared = _positions(sheet, model)
    for layer in range(model.n_layers):
        normed = _norm(sheet, model, x, f"blk.{layer}.attn_norm", model.hidden_size)
        x = sheet.op("Add", [x, _attention(sheet, model, layer, normed, shared, formats)], f"blk.{layer}.attn_residual")
        normed = _norm(sheet, model, x, f"blk.{layer}.ffn_norm", model.hidden_size)
        x = sheet.op("Add", [x, _feed_forward(sheet, model, layer, normed, groups[layer], formats)], f"blk.{layer}.ffn_residual")
    x = _norm(sheet, model, x, "output_norm", model.hidden_size)
    name = "token_embd" if model.is_tied else "output"
    _linear(sheet, x, name, model.vocab_size, model.hidden_size, formats[f"{name}.weight"], "logits")
    return _interface(model)


def _interface(model: Model) -> tuple[list[Any], list[Any]]:
    info = import_onnx().helper.make_tensor_value_info
    parts = [f"{layer}.{part}" for layer in range(model.n_layers) for part in ("key", "value")]
    cache = ["batch_size", model.attention.kv_heads, "past_sequence_length", model.attention.key_length]
    longer = ["batch_size", model.attention.kv_heads, "total_sequence_length", model.attention.key_length]
    inputs = [
        info("input_ids", INT64, ["batch_size", "sequence_length"]),
        info("attention_mask", INT64, ["batch_size", "total_sequence_length"]),
        *(info(f"past_key_values.{part}", FLOAT, cache) for part in parts),
    ]
    logits = info("logits", FLOAT, ["batch_size", "sequence_length", model.vocab_size])
    outputs = [logits, *(info(f"present.{part}", FLOAT, longer) for part in parts)]
    return inputs, outputs


def _positions(sheet: Sheet, model: Model) -> dict[str, str]:
    """The inputs that all attention nodes share: lengths, and rotary cosines and sines [batch * sequence, head / 2] of the call's tokens.

    inv_freq_i = theta^(-2i/d), angles = position * inv_freq, as in transformers' rotary embedding (arXiv 2104.09864).
    """
    op, const = sheet.op, sheet.constant
    lengths = op("ReduceSum", ["attention_mask", const("const.last", [-1])], "lengths", keepdims=1)
    last = op("Sub", [op("Squeeze", [lengths, const("const.last", [-1])], "lengths_flat"), const("const.int_one", 1)], "last")
    seqlens = op("Cast", [last], "seqlens_k", to=INT32)
    total_long = op("Gather", [op("Shape", ["attention_mask"], "mask_shape"), const("const.int_one", 1)], "total_long")
    total = op("Cast", [total_long], "total_sequence_length_i32", to=INT32)
    shape = op("Shape", ["input_ids"], "ids_shape")
    sequence = op("Gather", [shape, const("const.int_one", 1)], "sequence")
    start = op("Max", [op("Sub", [lengths, sequence], "before"), const("const.zero", 0)], "start")
    steps = op("Range", [const("const.zero", 0), sequence, const("const.int_one", 1)], "steps")
    positions = op("Cast", [op("Add", [start, steps], "positions_long")], "positions", to=FLOAT)
    column = op("Reshape", [positions, const("const.column", [-1, 1])], "positions_column")
    pairs = np.arange(0, model.attention.rotary, 2, dtype=np.float64) / model.attention.rotary
    angles = op("Mul", [column, const("inv_freq", model.attention.rope_theta**-pairs)], "angles")
    count = op("ReduceProd", [shape], "token_count", keepdims=0)
    slots = op("Range", [const("const.zero", 0), count, const("const.int_one", 1)], "slots_flat")
    return {
        "seqlens": seqlens,
        "total": total,
        "cos": op("Cos", [angles], "cos"),
        "sin": op("Sin", [angles], "sin"),
        "slots": op("Reshape", [slots, shape], "slots"),
    }


def _partial_rotary(model: Model, heads: int) -> dict[str, int]:
    """Attributes of the rotary operator if only a part of each head is rotated."""
    heads_attributes = {"rotary_embedding_dim": model.attention.rotary, "num_heads": heads}
    return heads_attributes if model.attention.rotary < model.attention.key_length else {}


def _attention(sheet: Sheet, model: Model, layer: int, x: str, shared: Mapping[str, str], formats: Mapping[str, str]) -> str:
    """Grouped-query attention with its cache, and norms of queries and keys if the checkpoint has them."""
    prefix, heads = f"blk.{layer}", {"q": model.attention.heads, "k": model.attention.kv_heads, "v": model.attention.kv_heads}
    part = {}
    for letter, n in heads.items():
        unit = f"{prefix}.attn_{letter}"
        rows = n * model.attention.key_length
        value = _linear(sheet, x, unit, rows, model.hidden_size, formats[f"{unit}.weight"], f"{unit}.out")
        if model.find(f"attn_{letter}.bias", layer):
            value = sheet.op("Add", [value, sheet.weight(f"{unit}.bias", FLOAT, (rows,))], f"{unit}.biased")
        norm = model.find(f"attn_{letter}_norm", layer)
        if norm is not None:
            value = _head_norm(sheet, model, value, f"{unit}_norm", norm.shape[0])
        if letter != "v":
            inputs = [value, shared["slots"], shared["cos"], shared["sin"]]
            value = sheet.op("RotaryEmbedding", inputs, f"{unit}.rotated", domain=CONTRIB, **_partial_rotary(model, n))
        part[letter] = value
    past, present = ([f"{name}.{layer}.{kind}" for kind in ("key", "value")] for name in ("past_key_values", "present"))
    inputs = [part["q"], part["k"], part["v"], *past, shared["seqlens"], shared["total"]]
    attributes = {"num_heads": model.attention.heads, "kv_num_heads": model.attention.kv_heads, "scale": model.attention.key_length**-0.5}
    mixed = sheet.op("GroupQueryAttention", inputs, [f"{prefix}.attn", *present], domain=CONTRIB, **attributes)
    unit = f"{prefix}.attn_output"
    return _linear(
        sheet, mixed, unit, model.hidden_size, model.attention.heads * model.attention.key_length, formats[f"{unit}.weight"], f"{unit}.out"
    )


def _feed_forward(sheet: Sheet, model: Model, layer: int, x: str, groups: Sequence[Group], formats: Mapping[str, str]) -> str:
    """A dense part, or routed experts with the shared expert beside them."""
    if model.layers[layer].ffn == "dense":
        return _glu(sheet, model, layer, x, "", model.dense_size, formats)
    out = add_moe(sheet, model, layer, x, groups)
    if not model.find("ffn_up_shexp", layer):
        return out
    shared = _glu(sheet, model, layer, x, "_shexp", model.shared_size, formats)
    if model.find("ffn_gate_inp_shexp", layer):
        name = f"blk.{layer}.ffn_gate_inp_shexp"
        logit = sheet.op("MatMul", [x, sheet.weight(name, FLOAT, (model.hidden_size, 1))], f"{name}.logit")
        shared = sheet.op("Mul", [shared, sheet.op("Sigmoid", [logit], f"{name}.gate")], f"{name}.out")
    return sheet.op("Add", [out, shared], f"blk.{layer}.ffn_both")


def _glu(sheet: Sheet, model: Model, layer: int, x: str, suffix: str, size: int, formats: Mapping[str, str]) -> str:
    """W_down (silu(W_gate x) * W_up x) of one expert that every token passes."""
    names = {p: f"blk.{layer}.ffn_{p}{suffix}" for p in ("gate", "up", "down")}

    def multiply(value: str, p: str, rows: int, cols: int) -> str:
        return _linear(sheet, value, names[p], rows, cols, formats[f"{names[p]}.weight"], f"{names[p]}.out")

    gate, up = (multiply(x, p, size, model.hidden_size) for p in ("gate", "up"))
    act = sheet.op("Mul", [gate, sheet.op("Sigmoid", [gate], f"{names['gate']}.sigmoid")], f"{names['gate']}.silu")
    return multiply(sheet.op("Mul", [act, up], f"{names['up']}.gated"), "down", model.hidden_size, size)


def _norm(sheet: Sheet, model: Model, x: str, name: str, width: int) -> str:
    """RMS norm over the last axis."""
    weight = sheet.weight(name, FLOAT, (width,))
    return sheet.op("RMSNormalization", [x, weight], f"{name}.out", axis=-1, epsilon=model.norm_eps)


def _head_norm(sheet: Sheet, model: Model, x: str, name: str, width: int) -> str:
    """Norm of queries or keys, over the whole width (OLMoE), or over each head (Qwen3) if the weight is as long as a head."""
    if width != model.attention.key_length:
        return _norm(sheet, model, x, name, width)
    heads = sheet.op("Reshape", [x, sheet.constant("const.heads", [0, 0, -1, width])], f"{name}.heads")
    normed = _norm(sheet, model, heads, name, width)
    return sheet.op("Reshape", [normed, sheet.constant("const.joined", [0, 0, -1])], f"{name}.joined")


def _linear(sheet: Sheet, x: str, name: str, rows: int, cols: int, kind: str, out: str) -> str:
    """Product of x [.., cols] and a transposed matrix [rows, cols]; a matrix that was announced before (a tied embedding) is used again."""
    fmt = FORMATS[kind]
    if f"{name}.codes" in sheet.places:
        pieces = {piece: f"{name}.{piece}" for piece in ("codes", "scales", "zeros") if f"{name}.{piece}" in sheet.places}
        if fmt.block:
            pieces["codes"] = sheet.alias(f"{name}.blocks", pieces["codes"], UINT8, (rows, *code_dims(kind, cols)))
    else:
        pieces = add_weights(sheet, name, kind, (rows,), cols, by_block=True)
    if not fmt.block:
        return sheet.op("FusedMatMul", [x, pieces["codes"]], out, domain=CONTRIB, transB=1)
    attributes = {"K": cols, "N": rows, "bits": fmt.bits, "block_size": fmt.block, "accuracy_level": INT8_INPUTS}
    return sheet.op("MatMulNBits", [x, *pieces.values()], out, domain=CONTRIB, **attributes)


def _embedding(sheet: Sheet, model: Model, kind: str) -> str:
    """First states [batch, sequence, hidden]."""
    fmt = FORMATS[kind]
    pieces = add_weights(sheet, "token_embd", kind, (model.vocab_size,), model.hidden_size)
    if not fmt.block:
        return sheet.op("Gather", [pieces["codes"], "input_ids"], "embedded", axis=0)
    codes, *others = pieces.values()
    inputs = [codes, "input_ids", *others]
    attributes = {"bits": fmt.bits, "block_size": fmt.block, "gather_axis": 0, "quantize_axis": 1}
    return sheet.op("GatherBlockQuantized", inputs, "embedded", domain=CONTRIB, **attributes)
