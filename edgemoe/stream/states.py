"""This module keeps the hidden states of all windows in a file between two layers."""

from __future__ import annotations

import hashlib
import os
import weakref
from pathlib import Path
from typing import Self

import numpy as np
import torch
from numpy.typing import NDArray

from edgemoe.base.errors import DamagedError, MachineError

HASH_BYTES = 16  # behind the states of each window


class States:
    """Hidden states [windows, length, hidden] in a file, read and written a window at a time (pread/pwrite: safe from any thread).

    The file holds float32, or bfloat16 with `half`.  Behind each window stands a hash of its states, which every read checks.
    """

    def __init__(self, path: Path, shape: tuple[int, int, int], *, half: bool = False) -> None:
        self.path, self.shape = path, shape
        self._dtype = torch.bfloat16 if half else torch.float32
        self._bytes = shape[1] * shape[2] * self._dtype.itemsize
        self._file = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        self._close = weakref.finalize(self, os.close, self._file)  # also where an interrupt ends the owner without `close`

    def read(self, index: NDArray[np.int64]) -> torch.Tensor:
        """States of these windows [len(index), length, hidden].

        Raises:
            DamagedError: these windows are not what was written.
        """
        out = torch.empty((len(index), *self.shape[1:]))
        for row, i in enumerate(index):
            out[row] = torch.frombuffer(self._read(int(i)), dtype=self._dtype).view(self.shape[1:])
        return out

    def check(self) -> None:
        """Read every window and check its hash.

        Raises:
            DamagedError: a window is not what was written.
        """
        for i in range(self.shape[0]):
            self._read(i)

    def write(self, index: NDArray[np.int64], values: torch.Tensor) -> None:
        """Replace the states of these windows."""
        rows = values.detach().to(self._dtype).cpu().contiguous().view(torch.uint8).numpy()
        step = self._bytes + HASH_BYTES
        for row, i in enumerate(index):
            data = rows[row].tobytes()
            if os.pwrite(self._file, data + _hash(data), int(i) * step) < step:
                raise MachineError(f"{self.path.parent}: the disk is full", hint="free some space, or choose another --work")

    def _read(self, window: int) -> bytearray:
        step = self._bytes + HASH_BYTES
        found = os.pread(self._file, step, window * step)
        data = bytearray(found[: self._bytes])
        if found[self._bytes :] != _hash(data):
            raise DamagedError(self.path)
        return data

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self, *, delete: bool = False) -> None:
        """Close the file, and delete it if asked."""
        self._close()
        if delete:
            self.path.unlink(missing_ok=True)


def _hash(data: bytes | bytearray) -> bytes:
    return hashlib.blake2b(data, digest_size=HASH_BYTES).digest()
