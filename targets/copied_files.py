"""This module reads the files that a target copies unchanged beside its weights, and formats the JSON that it writes beside them."""

from __future__ import annotations

import json
import stat
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from edgemoe.base.errors import ModelError
from edgemoe.base.storage import read_json

# These files are copied unchanged: the files from which libraries load tokenizers, and the sampling settings; with the largest size that we
# accept (the largest known tokenizer.json has 34 MB).
COPIED = {
    "added_tokens.json": 2**24,
    "chat_template.jinja": 2**20,
    "chat_template.json": 2**20,
    "generation_config.json": 2**20,
    "merges.txt": 2**27,
    "special_tokens_map.json": 2**20,
    "tokenizer.json": 2**28,
    "tokenizer.model": 2**28,
    "tokenizer_config.json": 2**26,
    "vocab.json": 2**27,
    "vocab.txt": 2**27,
}


def dump_json(value: Mapping[str, Any]) -> bytes:
    """The content of a JSON file, with sorted keys, so that equal values give equal bytes."""
    return (json.dumps(value, indent=2, sort_keys=True, ensure_ascii=False) + "\n").encode()


def read_copied(folder: Path) -> dict[str, bytes]:
    """The files of a checkpoint that are to be copied, by name, as far as it has them.

    Raises:
        ModelError: a file is too large, malformed, or a link out of the checkpoint.
    """
    return {name: data for name, limit in COPIED.items() if (data := _read_bytes(folder, name, limit)) is not None}


def _read_bytes(folder: Path, name: str, limit: int) -> bytes | None:
    """A file of the checkpoint that is to be copied, or None if the checkpoint has no such file.

    Raises:
        ModelError: larger than `limit` bytes, or a .json that holds no object.
    """
    path = _locate(folder, name)
    if path is None:
        return None
    if path.stat().st_size > limit:
        raise ModelError(f"{folder / name}: {path.stat().st_size} bytes is too large to be copied, the limit is {limit}")
    if name.endswith(".json"):
        read_json(path, limit)
    try:
        return path.read_bytes()
    except OSError as error:
        raise ModelError(f"{folder / name}: cannot be read: {error}") from error


def _locate(folder: Path, name: str) -> Path | None:
    """The real place of a file of the checkpoint, or None if the checkpoint has no such file.

    Copied files may be published, so a link must not lead out of the checkpoint; the hub's cache links from snapshots/REVISION to its own
    blobs/.

    Raises:
        ModelError: a link out of the checkpoint, or no regular file.
    """
    try:
        path = (folder / name).resolve(strict=True)
        mode = path.stat().st_mode
    except FileNotFoundError:
        return None
    except (OSError, RuntimeError) as error:
        raise ModelError(f"{folder / name}: cannot be read: {error}") from error
    home = folder.resolve()
    blobs = home.parent.parent / "blobs" if home.parent.name == "snapshots" else home
    if path.parent not in (home, blobs):
        raise ModelError(f"{folder / name}: a link that leads out of the checkpoint, to {path}", hint="put a copy of the file there")
    if not stat.S_ISREG(mode):
        raise ModelError(f"{folder / name}: not a regular file")
    return path
