"""This module reads headers and arrays of safetensors files by plain reads, without mapping them, and checks all of a header first."""

from __future__ import annotations

import hashlib
import json
import math
import stat
from collections.abc import Collection
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from edgemoe.base.errors import DamagedError, ModelError
from edgemoe.ir import Tensor

MAX_HEADER = 100 * 2**20  # the safetensors library's own limit
MAX_JSON = 64 * 2**20
PACKED = "U8"  # type of packed rows in our own files; checkpoints have no such tensors
DTYPES = {"BF16": ml_dtypes.bfloat16, "F16": np.float16, "F32": np.float32, "F64": np.float64}


def regular_size(path: Path) -> int:
    """Bytes of a file that can be read to its end: a pipe would make its reader wait for ever.

    Raises:
        ModelError: not a regular file.
        OSError: missing, or not to be looked at.
    """
    found = path.stat()
    if not stat.S_ISREG(found.st_mode):
        raise ModelError(f"{path}: not a regular file")
    return found.st_size


def read_json(path: Path, limit: int = MAX_JSON) -> dict[str, Any]:
    """A JSON object from a file whose size is checked first.

    Raises:
        ModelError: missing, too large, not JSON, or not an object.
    """
    try:
        if (size := regular_size(path)) > limit:
            raise ModelError(f"{path}: {size} bytes is too large for a JSON file")
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ModelError(f"{path}: cannot be read as JSON: {error}") from error
    if not isinstance(value, dict):
        raise ModelError(f"{path}: expected a JSON object, found {type(value).__name__}")
    return value


def list_shards(folder: Path) -> list[Path]:
    """The safetensors files of a checkpoint, by its index or its single file.

    Raises:
        ModelError: there is none, or the index names a file that is missing or lies elsewhere.
    """
    index = folder / "model.safetensors.index.json"
    if not index.exists():
        single = folder / "model.safetensors"
        if not single.exists():
            raise ModelError(f"{folder}: no model.safetensors and no model.safetensors.index.json", hint="is the download complete?")
        return [single]
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise ModelError(f"{index}: weight_map is missing or empty")
    names = sorted({str(name) for name in weight_map.values()})
    for name in names:
        if Path(name).name != name:
            raise ModelError(f"{index}: weight_map names {name!r}, which is not a file of this folder")
        if not (folder / name).is_file():
            raise ModelError(f"{folder / name}: shard is missing, but {index.name} names it", hint="finish the download")
    return [folder / name for name in names]


def read_header(path: Path, dtypes: Collection[str] = DTYPES) -> dict[str, tuple[str, tuple[int, ...], int]]:
    """Tensors of one safetensors file: name -> (dtype, shape, offset of its first byte in the file).

    Raises:
        ModelError: malformed, or shorter than its header says.
    """
    size = regular_size(path)
    with path.open("rb") as file:
        prefix = file.read(8)
        length = int.from_bytes(prefix, "little")
        if len(prefix) < 8 or length > min(size - 8, MAX_HEADER):
            raise ModelError(f"{path}: not a safetensors file (its header would take {length} of {size} bytes)")
        try:
            header = json.loads(file.read(length))
        except (ValueError, RecursionError) as error:
            raise ModelError(f"{path}: the header is not JSON: {error}") from error
    if not isinstance(header, dict):
        raise ModelError(f"{path}: the header is not a JSON object")
    found = {}
    for name, entry in header.items():
        if name == "__metadata__":
            continue
        found[name] = _check_entry(path, name, entry, 8 + length, size, dtypes)
    return found


def _check_entry(path: Path, name: str, entry: Any, start: int, size: int, dtypes: Collection[str]) -> tuple[str, tuple[int, ...], int]:
    try:
        dtype, shape, (begin, end) = entry["dtype"], tuple(int(n) for n in entry["shape"]), entry["data_offsets"]
        begin, end = int(begin), int(end)
    except (KeyError, TypeError, ValueError, OverflowError) as error:
        raise ModelError(f"{path}: the header entry of {name!r} is malformed: {error!r}") from error
    if not isinstance(dtype, str) or dtype not in dtypes:
        raise ModelError(f"{path}: {name} has dtype {dtype}, which is not supported", hint=f"supported: {', '.join(dtypes)}")
    expected = math.prod(shape) * (1 if dtype == PACKED else np.dtype(DTYPES[dtype]).itemsize)
    if any(n < 0 for n in shape) or begin < 0 or end - begin != expected:
        raise ModelError(f"{path}: {name} of shape {list(shape)} in {dtype} takes {expected} bytes, its data_offsets {begin}..{end} do not")
    if start + end > size:
        raise ModelError(f"{path}: file ends at byte {size}, but {name} needs bytes up to {start + end}", hint="finish the download")
    return dtype, shape, start + begin


def read_tensor(folder: str | Path, tensor: Tensor) -> NDArray[np.float32]:
    """One tensor as float32 (exact for bf16 and f16).

    Raises:
        ModelError: the file is too short, or a weight is NaN or infinite.
        DamagedError: the bytes are not those that were hashed.
    """
    path = Path(folder) / tensor.file
    if tensor.packed:
        raise ModelError(f"{path}: {tensor.name} is packed as {tensor.packed}, not plain", hint=f"delete {path.parent}")
    raw = np.empty(tensor.n_bytes, np.uint8)
    try:
        with path.open("rb") as file:
            file.seek(tensor.offset)
            got = file.readinto(raw.data)
    except OSError as error:
        raise ModelError(f"{path}: cannot be read: {error}") from error
    if got != tensor.n_bytes:
        raise ModelError(f"{path}: file ends inside {tensor.name}", hint="finish the download")
    _check_hash(path, tensor, raw)
    values: NDArray[np.float32] = raw.view(DTYPES[tensor.dtype]).reshape(tensor.shape).astype(np.float32, copy=False)
    if not np.isfinite(values).all():
        bad = int(values.size - np.isfinite(values).sum())
        raise ModelError(f"{path}: {tensor.name} holds {bad} NaN or infinite weights")
    return values


def read_packed(folder: str | Path, tensor: Tensor, row_bytes: int) -> NDArray[np.uint8]:
    """The packed rows of a packed tensor [R, row_bytes].

    Raises:
        DamagedError: the file is too short, or the bytes are not those that were hashed.
    """
    path = Path(folder) / tensor.file
    rows = np.empty((tensor.shape[0], row_bytes), np.uint8)
    with path.open("rb") as file:
        file.seek(tensor.offset)
        if file.readinto(rows.data) != rows.nbytes:
            raise DamagedError(path, f"ends inside {tensor.name}")
    _check_hash(path, tensor, rows)
    return rows


def _check_hash(path: Path, tensor: Tensor, raw: NDArray[np.uint8]) -> None:
    """Refuse bytes that are not those that were hashed when the model was opened, or when its new weights were written."""
    if tensor.sha256 and hashlib.sha256(raw.reshape(-1).data).hexdigest() != tensor.sha256:
        hint = "let nothing write there, and give the same command again"
        raise DamagedError(path, f"{tensor.name} changed while it was in use", hint=hint)
