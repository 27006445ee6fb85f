"""This module reads the header of a GGUF file: its values, and the place of every tensor.

The reader does not trust the file.  It walks the header by hand within a limit (gguf-py's reader loops as often as a length in the file
says), and every tensor must lie inside the file.
"""

from __future__ import annotations

import functools
import math
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from edgemoe.base.errors import ModelError

MAX_HEADER = 64 * 2**20  # bytes; a vocabulary of 256,000 tokens with its merges takes 16 MiB, and a list in memory 8 bytes for each
NUMBERS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}  # GGUF value types (gguf.h)
STRING, ARRAY = 8, 9
VERSIONS = (2, 3)
MAX_DIMS = 4  # GGML_MAX_DIMS
MAX_ALIGNMENT = 2**20


@dataclass(frozen=True, slots=True)
class Entry:
    """A tensor: ggml's name of its type, its shape with rows before columns, and its bytes in the file."""

    kind: str
    shape: tuple[int, ...]
    offset: int
    n_bytes: int


@dataclass(frozen=True, slots=True)
class GgufHeader:
    """Values by key, and tensors by name, in the order of the file.

    `kinds` are the numbers of the values' types, and of the types of an array's items (0 if it is no array); `start` is the first byte
    behind the header.
    """

    path: Path
    values: dict[str, Any]
    kinds: dict[str, tuple[int, int]]
    tensors: dict[str, Entry]
    start: int


class _Cursor:
    """Takes bytes from the front of a file, and refuses to take more than are left within the limit."""

    def __init__(self, file: BinaryIO, size: int, limit: int) -> None:
        self.file, self.end, self.limit, self.at = file, min(size, limit), limit, 0

    def take(self, n: int) -> bytes:
        """The next n bytes."""
        if n > self.end - self.at:
            raise ValueError(f"it ends at byte {self.end}, or asks for more than {self.limit}")
        self.at += n
        return self.file.read(n)

    def number(self, kind: str) -> Any:
        """One number, by its letter in `struct`."""
        return struct.unpack(f"<{kind}", self.take(struct.calcsize(f"<{kind}")))[0]

    def text(self) -> str:
        """A string, after its length."""
        return self.take(self.number("Q")).decode("utf-8")

    def value(self) -> tuple[Any, tuple[int, int]]:
        """A value and its types; every item of an array takes at least a byte, so no array has more items than bytes are left."""
        kind = self.number("I")
        if kind != ARRAY:
            return self.text() if kind == STRING else self.number(_letter(kind)), (kind, 0)
        item, n = self.number("I"), self.number("Q")
        if n > self.end - self.at:
            raise ValueError(f"an array claims {n} items")
        if item == STRING:
            return [self.text() for _ in range(n)], (kind, item)
        width = struct.calcsize(f"<{_letter(item)}")
        return list(struct.unpack(f"<{n}{_letter(item)}", self.take(n * width))), (kind, item)


def _letter(kind: int) -> str:
    if kind not in NUMBERS:
        raise ValueError(f"a value has type {kind}")
    return NUMBERS[kind]


def read_gguf_header(path: Path, limit: int = MAX_HEADER, *, hint: str = "") -> GgufHeader:
    """Values and tensors of a GGUF file whose header has at most `limit` bytes; `hint` is for whoever gave a file of another kind.

    Raises:
        ModelError: the file cannot be read, is not GGUF, is damaged, or ends before its last tensor does.
    """
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            cursor = _Cursor(file, size, limit)
            if size < len(b"GGUF") or cursor.take(4) != b"GGUF":
                raise ModelError(f"{path}: is not a GGUF file", hint=hint)
            return _read(path, cursor, size)
    except OSError as error:
        raise ModelError(f"{path}: cannot be read: {error.strerror}") from error
    except (ValueError, struct.error) as error:
        raise ModelError(f"{path}: the header is malformed: {error}") from error


def _read(path: Path, cursor: _Cursor, size: int) -> GgufHeader:
    version, n_tensors, n_values = (cursor.number(kind) for kind in "IQQ")
    if version not in VERSIONS:
        raise ValueError(f"GGUF version {version} is not supported")
    values: dict[str, Any] = {}
    kinds: dict[str, tuple[int, int]] = {}
    for _ in range(n_values):
        name = cursor.text()
        values[name], kinds[name] = cursor.value()
    infos = list(_tensor_infos(cursor, n_tensors))
    alignment = values.get("general.alignment", 32)
    if not isinstance(alignment, int) or not 0 < alignment <= MAX_ALIGNMENT:
        raise ValueError(f"general.alignment is {alignment!r}")
    start = -(-cursor.at // alignment) * alignment
    tensors: dict[str, Entry] = {}
    for name, kind, shape, offset in infos:
        if name in tensors:
            raise ModelError(f"{path}: {name!r} is there twice")
        entry = Entry(block_sizes()[kind][0], shape, start + offset, _n_bytes(name, kind, shape))
        if entry.offset + entry.n_bytes > size:
            raise ModelError(f"{path}: file ends at byte {size}, inside {name!r} of shape {list(shape)}", hint="copy or make it again")
        tensors[name] = entry
    return GgufHeader(path, values, kinds, tensors, start)


def _tensor_infos(cursor: _Cursor, n_tensors: int) -> Iterator[tuple[str, int, tuple[int, ...], int]]:
    """Name, number of the type, shape and offset in the data of every tensor."""
    for _ in range(n_tensors):
        name, n_dims = cursor.text(), cursor.number("I")
        if not 1 <= n_dims <= MAX_DIMS:
            raise ValueError(f"{name!r} has {n_dims} dimensions")
        shape = tuple(cursor.number("Q") for _ in range(n_dims))[::-1]
        kind, offset = cursor.number("I"), cursor.number("Q")
        if kind not in block_sizes():
            raise ValueError(f"{name!r} has type {kind}, which is not known")
        yield name, kind, shape, offset


def _n_bytes(name: str, kind: int, shape: tuple[int, ...]) -> int:
    known, block, size = block_sizes()[kind]
    if shape[-1] % block:
        raise ValueError(f"{name!r} has rows of {shape[-1]}, and {known} stores blocks of {block}")
    return math.prod(shape) // block * size


@functools.cache
def block_sizes() -> dict[int, tuple[str, int, int]]:
    """Types of ggml by number: name, numbers in a block, and bytes of a block."""
    import gguf

    return {int(kind): (kind.name, block, size) for kind, (block, size) in gguf.GGML_QUANT_SIZES.items()}
