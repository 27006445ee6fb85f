"""This module reads an MLX folder without mlx: the tensors of its shards, and the values that they decode to by config.json."""

from __future__ import annotations

import math
import shutil
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from edgemoe.base.errors import VerifyError
from edgemoe.base.storage import array_file, read_json, save_arrays
from edgemoe.base.types import F32
from edgemoe.ir import Model, Plan
from edgemoe.ir.model import is_stack
from edgemoe.model.checkpoint import WORDS, read_header
from edgemoe.model.describe import resize_experts
from edgemoe.model.overlay import save_overlay
from edgemoe.targets.mlx.formats import Packed, dequantize
from edgemoe.targets.mlx.names import tensor_names
from edgemoe.targets.mlx.writer import PER_EXPERT

FLOAT_TYPES: dict[str, Any] = {"F16": np.dtype(np.float16), "BF16": np.dtype(ml_dtypes.bfloat16), "F32": np.dtype(np.float32)}
NAMES = {"F16": "f16", "BF16": "bf16"}
TYPES = {**FLOAT_TYPES, WORDS: np.dtype(np.uint32)}
PARTS = ("scales", "biases")


def shards_of(folder: Path) -> list[Path]:
    """The files that mlx_lm would load."""
    return sorted(folder.glob("model*.safetensors"))


def read_values(folder: Path) -> Iterator[tuple[str, F32]]:
    """Every weight by the name of its tensor, in the order of the files, decoded to float32 [.., rows, cols].

    Raises:
        VerifyError: a module has no entry in config.json, or its tensors are not what its entry says.
    """
    entries = read_json(folder / "config.json").get("quantization", {})
    headers = {name: (path, *entry) for path in shards_of(folder) for name, entry in read_header(path, tuple(TYPES)).items()}
    for name, (path, dtype, shape, offset) in headers.items():
        module, _, part = name.rpartition(".")
        if part in PARTS and dtype in NAMES and f"{module}.weight" in headers:
            continue
        values = _read(path, dtype, shape, offset)
        if dtype != WORDS:
            yield name, values.astype(np.float32)
            continue
        entry = entries.get(module)
        if not isinstance(entry, dict) or any(f"{module}.{one}" not in headers for one in PARTS):
            raise VerifyError(f"{path}: {module} is quantized, but config.json has no entry for it, or scales or biases are missing")
        scales, offsets = (_read(*headers[f"{module}.{one}"]) for one in PARTS)
        kind, cols = f"INT{entry['bits']}_{entry['group_size']}", scales.shape[-1] * entry["group_size"]
        if 32 * shape[-1] != cols * entry["bits"] or scales.shape[:-1] != shape[:-1] or offsets.shape != scales.shape:
            raise VerifyError(f"{path}: {name} has the shape {list(shape)}, which {entry['bits']} bits for {cols} columns do not give")
        rows = Packed(
            codes=values.reshape(-1, shape[-1]).view(np.uint8),
            scales=scales.reshape(-1, scales.shape[-1]),
            offsets=offsets.reshape(-1, scales.shape[-1]),
        )
        yield name, dequantize(rows, kind, cols, NAMES[headers[f"{module}.scales"][1]]).reshape(*shape[:-1], cols)


def decode_folder(folder: Path, model: Model, plan: Plan, work: Path) -> Model:
    """The model that a folder decodes to, with its weights in `work`; it has all experts, and those that the plan drops are zero.

    Args:
        folder: with config.json and shards.
        model: the original.
        plan: of the folder.
        work: folder for the weights in float32; what lies there is replaced.

    Raises:
        VerifyError: a tensor is missing, or not what its entry in config.json says.
    """
    base = resize_experts(model.with_top_k(plan.top_k), plan.width or model.expert.size)
    return lay_over(base, dict(read_values(folder)), plan.kept_of, work)


def lay_over(base: Model, values: Mapping[str, F32], kept_of: Mapping[int, Sequence[int]], work: Path) -> Model:
    """The model whose weights are these values, by the names of an MLX folder that keeps these experts of each layer.

    Raises:
        VerifyError: a tensor is missing, or has another shape.
    """
    names = tensor_names(base)
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir(parents=True)
    for layer in range(-1, base.n_layers):
        arrays: dict[str, F32] = {}
        for (role, expert), tensor in base.of_layer(layer).items():
            name, kept = names[role, layer], list(kept_of.get(layer, ()))
            if name not in values:
                raise VerifyError(f"{name} is missing from the folder", hint="build or emit it again")
            value = values[name]
            if is_stack(role):
                value = value[kept.index(expert)] if expert in kept else np.zeros(tensor.shape, np.float32)
            elif role in PER_EXPERT:
                whole = np.zeros(tensor.shape, np.float32)
                whole[kept] = value
                value = whole
            if value.size != tensor.n_weights:
                raise VerifyError(f"{name} has the shape {list(value.shape)}, expected {list(tensor.shape)}", hint="build or emit it again")
            arrays[f"{role}.{expert}"] = value.reshape(tensor.shape)
        save_arrays(work / array_file(layer), arrays)
    return save_overlay(base, work, {})


def tensor_bytes(folder: Path) -> int:
    """Bytes of all tensors of a folder, without headers."""
    headers = [entry for path in shards_of(folder) for entry in read_header(path, tuple(TYPES)).values()]
    return sum(math.prod(shape) * TYPES[dtype].itemsize for dtype, shape, _ in headers)


def float_types(folder: Path) -> set[str]:
    """Types of the floats in a folder's shards, but for biases of the choice of experts, which mlx_lm itself leaves in float32."""
    found = {name: entry[0] for path in shards_of(folder) for name, entry in read_header(path, tuple(TYPES)).items()}
    return {dtype for name, dtype in found.items() if dtype in FLOAT_TYPES and not name.endswith("e_score_correction_bias")}


def _read(path: Path, dtype: str, shape: tuple[int, ...], offset: int) -> NDArray[Any]:
    kind = TYPES[dtype]
    with path.open("rb") as file:
        file.seek(offset)
        values = np.fromfile(file, kind, math.prod(shape))
    if values.size != math.prod(shape):
        raise VerifyError(f"{path}: ends inside a tensor", hint="build or emit it again")
    return values.reshape(shape)
