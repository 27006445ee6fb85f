"""This module keeps the hidden states of all windows in a file between two layers."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Self

import numpy as np
import torch
from numpy.typing import NDArray

from edgemoe.base.errors import MachineError


class States:
    """Hidden states [windows, length, hidden] in a file, read and written a window at a time (pread/pwrite: safe from any thread).

    The file holds float32, or bfloat16 with `half`.
    """

    def __init__(self, path: Path, shape: tuple[int, int, int], *, half: bool = False) -> None:
        self.path, self.shape = path, shape
        self._dtype = torch.bfloat16 if half else torch.float32
        self._bytes = shape[1] * shape[2] * self._dtype.itemsize
        self._file = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)

    def read(self, index: NDArray[np.int64]) -> torch.Tensor:
        """States of these windows [len(index), length, hidden]."""
        out = torch.empty((len(index), *self.shape[1:]))
        for row, i in enumerate(index):
            read = bytearray(os.pread(self._file, self._bytes, int(i) * self._bytes))
            out[row] = torch.frombuffer(read, dtype=self._dtype).view(self.shape[1:])
        return out

    def write(self, index: NDArray[np.int64], values: torch.Tensor) -> None:
        """Replace the states of these windows."""
        rows = values.detach().to(self._dtype).cpu().contiguous().view(torch.uint8).numpy()
        for row, i in enumerate(index):
            if os.pwrite(self._file, rows[row].tobytes(), int(i) * self._bytes) < self._bytes:
                raise MachineError(f"{self.path.parent}: the disk is full", hint="free some space, or choose another --work")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self, *, delete: bool = False) -> None:
        """Close the file, and delete it if asked."""
        os.close(self._file)
        if delete:
            self.path.unlink(missing_ok=True)
