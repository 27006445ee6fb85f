"""This module reads an MLX folder without mlx: the tensors of its shards, and the values that they decode to by config.json."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from edgemoe.base.errors import VerifyError
from edgemoe.base.storage import read_json
from edgemoe.base.types import F32
from edgemoe.model.checkpoint import WORDS, read_header
from edgemoe.targets.mlx.formats import Packed, dequantize

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


def float_types(folder: Path) -> set[str]:
    """Types of the floats in a folder's shards, but for biases of the choice of experts, which mlx_lm itself leaves in float32."""
    found = {name: entry[0] for path in shards_of(folder) for name, entry in read_header(path, tuple(TYPES)).items()}
    return {dtype for name, dtype in found.items() if dtype in FLOAT_TYPES and not name.endswith("e_score_correction_bias")}


def _read(path: Path, dtype: str, shape: tuple[int, ...], offset: int) -> NDArray[Any]:
    kind = TYPES[dtype]
    with path.open("rb") as file:
        file.seek(offset)
        values = np.fromfile(file, kind, int(np.prod(shape)))
    if values.size != np.prod(shape):
        raise VerifyError(f"{path}: ends inside a tensor", hint="build or emit it again")
    return values.reshape(shape)
