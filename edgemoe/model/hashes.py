"""This module hashes every tensor of a checkpoint, so that its identity covers every byte and each later read can be checked.

Hashes are kept in the user's cache folder with the size, times and inode of each file, and a file of which none of these changed is not
hashed again here.
"""

from __future__ import annotations

import hashlib
import os
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

from edgemoe.base.errors import ModelError
from edgemoe.base.progress import Progress
from edgemoe.base.storage import hash_json, load_sealed, regular_size, save_sealed
from edgemoe.base.threads import count_cores
from edgemoe.ir import Model, Tensor

PIECE = 2**23  # bytes read at a time
SETTLED = 2.0  # seconds: a file that was changed less than that before it was hashed may change again without a new time stamp
MAX_SMALL = 256 * 2**20  # bytes of one of the small files; the largest known tokenizer has 34 MB
SMALL_FILES = ("config.json", "generation_config.json", "tokenizer", "special_tokens", "added_tokens", "chat_template", "vocab", "merges")


def hash_model(model: Model, progress: Progress | None = None) -> Model:
    """The model with the hash of every tensor and a fingerprint over all of them, the config and the tokenizer.

    Args:
        model: from headers alone.
        progress: called with (bytes hashed, all bytes) as files are read; not at all if every hash is known.

    Raises:
        ModelError: a file ends inside a tensor, cannot be read, or changes while it is read, or a file of the tokenizer is too large.
    """
    try:
        return _hash_model(model, progress)
    except OSError as error:
        raise ModelError(f"{model.folder}: cannot be read: {error}") from error


def _hash_model(model: Model, progress: Progress | None) -> Model:
    folder, found = Path(model.folder), dict[Tensor, str]()
    missing: dict[str, list[Tensor]] = {}
    for name in sorted({t.file for t in model.tensors}):
        mine = [t for t in model.tensors if t.file == name]
        known = _recall(folder / name)
        found |= {t: known[_place(t)] for t in mine if _place(t) in known}
        if any(t not in found for t in mine):
            missing[name] = mine
    count = _Count(sum(t.n_bytes for mine in missing.values() for t in mine), progress)
    for name, mine in missing.items():
        found |= _hash_file(folder / name, mine, count)
    tensors = tuple(replace(t, sha256=found[t]) for t in model.tensors)
    return replace(model, tensors=tensors, fingerprint=_fingerprint(folder, model, tensors))


def _fingerprint(folder: Path, model: Model, tensors: Sequence[Tensor]) -> str:
    content = [(t.role, t.layer, t.expert, t.name, t.dtype, t.shape, t.sha256) for t in tensors]
    digest = hashlib.sha256(hash_json(model.config, content).encode())
    if model.architecture:  # keys and vocabulary stand before the first tensor of each file
        for name in sorted({tensor.file for tensor in tensors}):
            with (folder / name).open("rb") as file:
                digest.update(file.read(min(tensor.offset for tensor in tensors if tensor.file == name)))
        return digest.hexdigest()
    for path in sorted(folder.iterdir()):
        if path.name.startswith(SMALL_FILES) and path.is_file():
            if (size := regular_size(path)) > MAX_SMALL:
                raise ModelError(f"{path}: {size} bytes is too large for a file of a tokenizer")
            digest.update(path.name.encode() + path.read_bytes())
    return digest.hexdigest()


# -------------------------------------------------------------------------------------------------------------- one file
def _hash_file(path: Path, tensors: Sequence[Tensor], count: _Count) -> dict[Tensor, str]:
    """Hashes of the tensors of a file, on all cores; they are kept if the file has settled."""
    began, before = time.time(), _identity(path)
    with path.open("rb", buffering=0) as file, ThreadPoolExecutor(count_cores()) as pool:
        ordered = sorted(tensors, key=lambda t: t.offset)
        hashes = list(pool.map(lambda t: _hash_range(path, file.fileno(), t, count), ordered))
    if {**_identity(path), "ctime_ns": before["ctime_ns"]} != before:  # a new hard link changes ctime, and no byte
        raise ModelError(f"{path}: changed while it was read", hint="wait until nothing writes to it, and give the same command again")
    found = dict(zip(ordered, hashes, strict=True))
    if max(before["mtime_ns"], before["ctime_ns"]) / 1e9 < began - SETTLED:
        with suppress(OSError):  # a machine without a place for caches hashes anew each time
            kept = _cache_file(path)
            kept.parent.mkdir(parents=True, exist_ok=True)
            save_sealed(kept, {"file": before, "hashes": {_place(t): sha256 for t, sha256 in found.items()}})
    return found


def _hash_range(path: Path, file: int, tensor: Tensor, count: _Count) -> str:
    digest = hashlib.sha256()
    for size, data in _pieces(file, tensor.offset, tensor.n_bytes):
        if len(data) != size:
            raise ModelError(f"{path}: file ends inside {tensor.name}", hint="finish the download")
        digest.update(data)
        count.add(size)
    return digest.hexdigest()


def _pieces(file: int, offset: int, n_bytes: int) -> Iterator[tuple[int, bytes]]:
    for start in range(0, n_bytes, PIECE):
        size = min(PIECE, n_bytes - start)
        yield size, os.pread(file, size, offset + start)


class _Count:
    """Bytes done by all threads, told to a Progress."""

    def __init__(self, total: int, progress: Progress | None) -> None:
        self.total, self.progress, self.done, self.lock = total, progress, 0, threading.Lock()

    def add(self, size: int) -> None:
        """Some more bytes are done."""
        with self.lock:
            self.done += size
            if self.progress:
                self.progress(self.done, self.total)


# ----------------------------------------------------------------------------------------------------------- what is known
def _recall(path: Path) -> dict[str, str]:
    """The hashes of a file by place, if it is still the file that was hashed."""
    try:
        kept = load_sealed(_cache_file(path))
        return dict(kept["hashes"]) if kept["file"] == _identity(path) else {}
    except (ModelError, KeyError):  # none, damaged, or of another version
        return {}


def _identity(path: Path) -> dict[str, Any]:
    """Everything that changes when somebody writes to a file; its owner can set mtime back, but not ctime."""
    found = path.stat()
    return {
        "path": str(path.resolve()),
        "size": found.st_size,
        "mtime_ns": found.st_mtime_ns,
        "ctime_ns": found.st_ctime_ns,
        "inode": found.st_ino,
        "device": found.st_dev,
    }


def _cache_file(path: Path) -> Path:
    root = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return root / "edgemoe" / "hashes" / f"{hash_json(str(path.resolve()))[:32]}.json"


def _place(tensor: Tensor) -> str:
    return f"{tensor.offset}+{tensor.n_bytes}"
