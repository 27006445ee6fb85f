"""Where a plan can go: each target states its formats, exact bytes and rules, and can write and run its files."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol, cast

import numpy as np
from numpy.typing import NDArray

from edgemoe.errors import UsageError
from edgemoe.feedback import Moments
from edgemoe.ir import Artifact, Model, Plan, Stats, Unit
from edgemoe.memory import Layout

TARGETS = ("gguf",)


class Target(Protocol):
    """What the stages need of a target; a module with these names is one."""

    OFFERED: tuple[str, ...]

    def list_units(self, model: Model) -> list[Unit]:
        """Everything that gets a format, in file order."""
        ...

    def offered_formats(self, cols: int) -> tuple[str, ...]:
        """Formats that can store rows of this length."""
        ...

    def unit_size(self, unit: Unit, cols: int, name: str, n_weights: int) -> int:
        """Bytes of a unit in the artifact, padding included."""
        ...

    def unit_staging(self, size: int, name: str, role: str) -> int:
        """Bytes of the temporary copy that loading the unit needs."""
        ...

    def fixed_size(self, model: Model, count: int) -> int:
        """Bytes of everything that gets no format: header, metadata, norms, routers."""
        ...

    def memory_parts(self, model: Model | Layout, context: int) -> dict[str, int]:
        """What the process needs beside the weights (see memory.py); a layout is enough."""
        ...

    def round_rows(self, rows: NDArray[np.float32], name: str, importance: NDArray[np.float32] | None) -> NDArray[np.float32]:
        """What rows become when stored in a format."""
        ...

    def feeds_back(self, name: str) -> bool:
        """Whether `pack_rows` uses second moments in this format."""
        ...

    def pack_rows(
        self, rows: NDArray[np.float32], name: str, importance: NDArray[np.float32] | None, moments: Moments | None
    ) -> NDArray[np.uint8]:
        """Rows as the artifact stores them [R, bytes], by the stock quantizer or, with second moments of the inputs, with feedback."""
        ...

    def unpack_rows(self, packed: NDArray[np.uint8], name: str, cols: int) -> NDArray[np.float32]:
        """What packed rows stand for [R, cols]."""
        ...

    def write(
        self, model: Model, stats: Stats, plan: Plan, folder: Path, shard_max: int, progress: Callable[[int, int], None] | None
    ) -> Artifact:
        """Write the artifact into a folder."""
        ...

    def run(self, path: Path, job: Mapping[str, Any], on_logits: Callable[[int, NDArray[np.float32]], None] | None) -> dict[str, Any]:
        """Run the artifact in a child process."""
        ...

    def check_tokenizer(self, path: Path, model: Model, lines: Sequence[str]) -> list[str]:
        """Lines that the artifact tokenizes otherwise than the original."""
        ...


def find_target(name: str) -> Target:
    """A target by name.

    Raises:
        UsageError: no such target.
    """
    if name not in TARGETS:
        raise UsageError(f"target {name!r} is not known", hint=f"known: {', '.join(TARGETS)}")
    return cast(Target, importlib.import_module(f"edgemoe.targets.{name}"))
