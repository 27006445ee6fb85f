"""ONNX artifacts of any shape and plan with random weights: real graphs, bytes drawn and not quantized, so that large ones take seconds."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgemoe.ir import Model
from edgemoe.model.describe import describe
from edgemoe.quantize.bits import pack
from edgemoe.targets.onnx.decoder import build_decoder
from edgemoe.targets.onnx.experts import group_experts
from edgemoe.targets.onnx.formats import FORMATS, Format
from edgemoe.targets.onnx.graph_builder import DATA_FILE, Place, Sheet, make_model
from edgemoe.targets.onnx.writer import list_units

CONFIG: dict[str, Any] = {
    "model_type": "qwen3_moe",
    "hidden_size": 1024,
    "num_hidden_layers": 4,
    "num_attention_heads": 16,
    "num_key_value_heads": 4,
    "head_dim": 64,
    "vocab_size": 4096,
    "num_experts": 32,
    "num_experts_per_tok": 4,
    "moe_intermediate_size": 512,
    "intermediate_size": 1024,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000,
    "norm_topk_prob": True,
    "max_position_embeddings": 40960,
    "tie_word_embeddings": False,
}


def random_model(**config: Any) -> Model:
    """A Qwen3-MoE of which only the shapes are known."""
    return describe({**CONFIG, **config})


def spread_formats(model: Model, experts: Sequence[str], others: str = "INT8_32", ends: str = "INT8_32") -> dict[str, str]:
    """Formats by unit: the experts' in turn, one for attention, one for embedding and output."""
    formats = {}
    for unit in list_units(model):
        name = experts[unit.expert % len(experts)] if unit.expert >= 0 else others if unit.layer >= 0 else ends
        if name:  # "": dropped
            formats[unit.name] = name
    return formats


def write_random(model: Model, formats: Mapping[str, str], folder: Path) -> Path:
    """Write model.onnx and its data; experts without a format are dropped."""
    groups = []
    for layer in range(model.n_layers):
        kept = {e: formats[name] for e in range(model.n_experts) if (name := f"blk.{layer}.ffn_exps.{e}") in formats}
        groups.append([(name, len(experts)) for name, experts in group_experts(list(kept), kept)])
    sheet = Sheet()
    graph = make_model(sheet, *build_decoder(sheet, model, groups, formats), {})
    folder.mkdir(exist_ok=True)
    rng = np.random.default_rng(0)
    with (folder / DATA_FILE).open("wb") as file:
        for name, place in sheet.places.items():
            file.seek(place.offset)
            file.write(_draw(rng, model, name, _kind(name, formats), place).tobytes())
        file.truncate(sheet.end)
    path = folder / "model.onnx"
    path.write_bytes(graph.SerializeToString())
    return path


def _kind(name: str, formats: Mapping[str, str]) -> Format | None:
    """Format of a piece's matrix; None for norms and routers."""
    stem = name.rpartition(".")[0]
    return FORMATS[stem.split(".")[-2]] if ".fc" in stem else FORMATS.get(formats.get(f"{stem}.weight", ""))


def _draw(rng: np.random.Generator, model: Model, name: str, kind: Format | None, place: Place) -> NDArray[Any]:
    """Bytes with which states keep their size: norms of one, matrices of variance 1 / columns, zero points in the middle."""
    piece = name.rpartition(".")[2]
    if kind is None or not kind.block:
        n = place.size // 4
        return np.ones(n, np.float32) if "norm" in name else np.float32(model.hidden_size**-0.5) * rng.standard_normal(n, np.float32)
    half = kind.scale_bytes == 2
    if piece == "scales":
        scale = 0.3 * model.hidden_size**-0.5 / (2**kind.bits / 4)
        values = scale * (1 + 0.1 * rng.random(place.size // kind.scale_bytes, np.float32))
        # Codes reach further below zero than above it: with either sign, means cancel, and tokens go to different experts.
        return values.astype(np.float16) if half else values * rng.choice(np.array([-1, 1], np.float32), len(values))
    if piece == "zeros":
        return np.full(place.size, 0xAA if kind.bits == 2 else 0x88, np.uint8)
    if half:  # scales of 3 bits have no sign
        three = pack(rng.integers(1, 8, (1, 2**20), np.uint8), 3)[0]
        return np.resize(np.roll(three, 3 * int(rng.integers(len(three) // 3))), place.size)
    return rng.integers(0, 256, place.size, np.uint8)
