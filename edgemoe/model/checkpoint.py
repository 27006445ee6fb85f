"""This module reads headers and arrays of safetensors files by plain reads, without mapping them, and checks all of a header first."""

from __future__ import annotations

import hashlib
import itertools
import logging
import math
import re
from collections.abc import Collection
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from edgemoe.base.errors import DamagedError, ModelError
from edgemoe.base.storage import parse_json, read_json, regular_size
from edgemoe.ir import Tensor

MAX_HEADER = 100 * 2**20  # the safetensors library's own limit
WRAPPERS = ("_orig_mod.", "module.", "base_model.")  # what torch.compile, data parallelism and peft put before names
_NUMBERED = re.compile(r"model-(\d{5})-of-(\d{5})\.safetensors")
Header = dict[str, tuple[str, tuple[int, ...], int, str]]  # name -> dtype, shape, offset, file
PACKED = "U8"  # type of packed rows in our own files; checkpoints have no such tensors
WORDS = "U32"  # type of the codes in MLX folders
DTYPES = {"BF16": ml_dtypes.bfloat16, "F16": np.float16, "F32": np.float32, "F64": np.float64}


def read_headers(folder: Path) -> Header:
    """Every tensor of a checkpoint: name -> (dtype, shape, offset, file), names without what training tools put before them.

    Where two files hold a tensor, the one that the index names counts.

    Raises:
        ModelError: a file is missing or malformed, or holds the adapters of a fine-tuning.
    """
    shards, index = list_shards(folder)
    found: Header = {}
    for shard in shards:
        for name, entry in read_header(shard).items():
            if index.get(name, shard.name) == shard.name:
                found[name] = (*entry, shard.name)
    return _plain_names(folder, found)


def _plain_names(folder: Path, header: Header) -> Header:
    """The header with the names that families use."""
    adapter = next((name for name in header if ".lora_" in name or ".base_layer." in name), None)
    if adapter is not None:
        raise ModelError(
            f"{folder / header[adapter][3]}: {adapter} belongs to a LoRA adapter", hint="merge the adapter into the model first"
        )
    bare = not any("model." in name for name in header)
    plain: Header = {}
    for name, entry in header.items():
        short = name
        while short.startswith(WRAPPERS):
            short = short.partition(".")[2]
        if bare and not short.startswith("lm_head."):
            short = f"model.{short}"
        if short in plain:
            raise ModelError(f"{folder / entry[3]}: holds {short} twice, once as {name}")
        plain[short] = entry
    return plain


def list_shards(folder: Path) -> tuple[list[Path], dict[str, str]]:
    """The safetensors files of a checkpoint, and the file of each tensor by the index, which is empty if there is none.

    If files that an index names are missing, model.safetensors is taken, and without an index, files named NUMBER-of-COUNT.

    Raises:
        ModelError: there is none, or the index names a file that is missing or lies elsewhere.
    """
    index, single = folder / "model.safetensors.index.json", folder / "model.safetensors"
    if not index.exists():
        return ([single] if single.exists() else _numbered(folder)), {}
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise ModelError(f"{index}: weight_map is missing or empty")
    places = {name: str(file) for name, file in weight_map.items()}
    names = sorted(set(places.values()))
    for name in names:
        if Path(name).name != name or name in ("", ".", ".."):
            raise ModelError(f"{index}: weight_map names {name!r}, which is not a file of this folder")
    missing = [name for name in names if not (folder / name).is_file()]
    if missing and single.is_file():
        logging.getLogger("edgemoe").warning("%s: names files that are not there, so %s is taken", index, single.name)
        return [single], {}
    if missing:
        raise ModelError(f"{folder / missing[0]}: shard is missing, but {index.name} names it", hint="finish the download")
    return [folder / name for name in names], places


def _numbered(folder: Path) -> list[Path]:
    """All of the files model-NUMBER-of-COUNT.safetensors."""
    found = {path: match for path in sorted(folder.glob("*.safetensors")) if (match := _NUMBERED.fullmatch(path.name))}
    if not found:
        raise ModelError(f"{folder}: no model.safetensors and no model.safetensors.index.json", hint="is the download complete?")
    counts = {int(match[2]) for match in found.values()}
    numbers = {int(match[1]) for match in found.values()}
    if len(counts) != 1 or numbers != set(range(1, max(counts) + 1)):
        raise ModelError(f"{folder}: of {max(counts)} shards {len(found)} are there, and no index", hint="finish the download")
    return list(found)


def read_header(path: Path, dtypes: Collection[str] = DTYPES) -> dict[str, tuple[str, tuple[int, ...], int]]:
    """Tensors of one safetensors file: name -> (dtype, shape, offset of its first byte in the file).

    Raises:
        ModelError: malformed, or shorter than its header says.
    """
    try:
        size = regular_size(path)
        with path.open("rb") as file:
            prefix = file.read(8)
            length = int.from_bytes(prefix, "little")
            if len(prefix) < 8 or length > min(size - 8, MAX_HEADER):
                raise ModelError(f"{path}: not a safetensors file (its header would take {length} of {size} bytes)")
            header = parse_json(path, file.read(length))
    except OSError as error:
        raise ModelError(f"{path}: cannot be read: {error}") from error
    found: dict[str, tuple[str, tuple[int, ...], int]] = {}
    places: list[tuple[int, int, str]] = []
    for name, entry in header.items():
        if name != "__metadata__":
            found[name] = _check_entry(path, name, entry, 8 + length, size, dtypes)
            begin, end = entry["data_offsets"]
            places.append((int(begin), int(end), name))
    for (_, end, first), (begin, last, second) in itertools.pairwise(sorted(places)):
        if begin < end and last > begin:
            raise ModelError(f"{path}: {first} and {second} overlap", hint="the file is damaged: download it again")
    return found


def _check_entry(path: Path, name: str, entry: Any, start: int, size: int, dtypes: Collection[str]) -> tuple[str, tuple[int, ...], int]:
    try:
        dtype, shape, (begin, end) = entry["dtype"], tuple(int(n) for n in entry["shape"]), entry["data_offsets"]
        begin, end = int(begin), int(end)
    except (KeyError, TypeError, ValueError, OverflowError) as error:
        raise ModelError(f"{path}: the header entry of {name!r} is malformed: {error!r}") from error
    if not isinstance(dtype, str) or dtype not in dtypes:
        raise ModelError(f"{path}: {name} has dtype {dtype}, which is not supported", hint=f"supported: {', '.join(dtypes)}")
    expected = math.prod(shape) * np.dtype({**DTYPES, PACKED: np.uint8, WORDS: np.uint32}[dtype]).itemsize
    if any(n < 0 for n in shape) or begin < 0 or end - begin != expected:
        raise ModelError(f"{path}: {name} of shape {list(shape)} in {dtype} takes {expected} bytes, its data_offsets {begin}..{end} do not")
    if start + end > size:
        raise ModelError(f"{path}: file ends at byte {size}, but {name} needs bytes up to {start + end}", hint="finish the download")
    return dtype, shape, start + begin


def read_tensor(folder: str | Path, tensor: Tensor) -> NDArray[np.float32]:
    """One tensor as float32 (exact for bf16 and f16); one of a GGUF as its type decodes.

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
    values = _decode(raw, tensor).reshape(tensor.shape)
    if not np.isfinite(values).all():
        bad = int(values.size - np.isfinite(values).sum())
        raise ModelError(f"{path}: {tensor.name} holds {bad} NaN or infinite weights")
    return values


def _decode(raw: NDArray[np.uint8], tensor: Tensor) -> NDArray[np.float32]:
    if tensor.dtype in DTYPES:
        plain: NDArray[np.float32] = raw.view(DTYPES[tensor.dtype]).astype(np.float32, copy=False)
        return plain
    import gguf

    decoded: NDArray[np.float32] = gguf.quants.dequantize(raw, gguf.GGMLQuantizationType[tensor.dtype])
    return decoded


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
