"""Where a plan can go: each target states its formats, exact bytes and rules, and can write and run its files."""

from __future__ import annotations

import importlib
import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, cast

import numpy as np
from numpy.typing import NDArray

from edgemoe.base.errors import MachineError, UsageError
from edgemoe.base.progress import Progress
from edgemoe.base.storage import hash_file
from edgemoe.base.types import F32
from edgemoe.devices.profiles import Device
from edgemoe.ir import Artifact, ArtifactFile, Costs, Model, Plan, Stats, Unit
from edgemoe.ir.memory import Layout
from edgemoe.quantize.gptq import Hessian

TARGETS = ("gguf", "onnx", "browser")


@dataclass(frozen=True, slots=True, kw_only=True)
class Runs:
    """The settings of a target's jobs (see its child.py) that verification asks for."""

    compared: Mapping[str, bool]  # under which KL is held against the prediction
    beside: Mapping[str, bool]  # under which the second figure of KL is measured
    fallback: Mapping[str, bool] | None = None  # what to measure with where the runtime fails on this machine with its defaults
    fallback_note: str = ""  # what to tell then


class Target(Protocol):
    """What the stages need of a target; a module with these names is one."""

    FORM: str  # "stacks" or "experts": see Costs
    OFFERED: tuple[str, ...]
    RUNS: Runs
    SPLITS: bool  # whether `write` can split its file
    FIXED_NAMES: tuple[str, ...]  # of files that every artifact has, whatever the model: a folder of other files may have them too

    def list_units(self, model: Model) -> list[Unit]:
        """Everything that gets a format, in file order; in the experts form one unit for each expert, all three matrices."""
        ...

    def offered_formats(self, model: Model, unit: Unit) -> tuple[str, ...]:
        """Formats that can store a unit."""
        ...

    def unit_size(self, model: Model, unit: Unit, name: str, count: int) -> int:
        """Bytes of a unit in the artifact, padding included; of a stack with `count` kept experts."""
        ...

    def unit_extra(self, model: Model, unit: Unit, name: str, count: int) -> int:
        """Bytes that the process holds for a unit beyond those of the file."""
        ...

    def unit_staging(self, model: Model, unit: Unit, name: str, size: int) -> int:
        """Bytes of the temporary copy that loading a unit of this size needs."""
        ...

    def on_device(self, costs: Costs, device: Device) -> Costs:
        """A price list of this target with the bytes that a box holds beyond the file's."""
        ...

    def fixed_size(self, model: Model, count: int) -> int:
        """Bytes of everything that gets no format: header, metadata, norms, routers."""
        ...

    def memory_parts(self, model: Model | Layout, context: int) -> dict[str, int]:
        """What the process needs beside the weights (see memory.py); a layout is enough."""
        ...

    def round_rows(self, rows: F32, name: str, importance: F32 | None) -> F32:
        """What rows become when stored in a format."""
        ...

    def input_block(self, name: str, role: str) -> int:
        """How many inputs of a product with a matrix of this role and format kernels round to int8 together; 0: none (`round_to_int8`)."""
        ...

    def feeds_back(self, name: str) -> bool:
        """Whether `pack_rows` uses Hessian in this format."""
        ...

    def pack_rows(self, rows: F32, name: str, importance: F32 | None, hessian: Hessian | None) -> NDArray[np.uint8]:
        """Rows as the artifact stores them [R, bytes], by the stock quantizer or, with Hessian of the inputs, with feedback."""
        ...

    def descend_rows(self, packed: NDArray[np.uint8], name: str, values: F32, hessian: Hessian, gradient: F32) -> NDArray[np.uint8]:
        """Packed rows with every code chosen again, given the gradient (W - Q) H; values [R, C] and gradient change in place."""
        ...

    def unpack_rows(self, packed: NDArray[np.uint8], name: str, cols: int) -> F32:
        """What packed rows stand for [R, cols]."""
        ...

    def write(self, model: Model, stats: Stats, plan: Plan, folder: Path, shard_max: int, progress: Progress | None) -> Artifact:
        """Write the artifact into a folder."""
        ...

    def run(self, path: Path, job: Mapping[str, Any], on_logits: Callable[[int, F32], None] | None) -> dict[str, Any]:
        """Run the artifact in a child process."""
        ...

    def check_tokenizer(self, path: Path, model: Model, lines: Sequence[str]) -> list[str]:
        """Lines that the artifact tokenizes otherwise than the original."""
        ...

    def runtime(self) -> str:
        """Name and version of what runs the artifact."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Sizes:
    """Bytes of every choice [C, U, F]: in the file, beyond it in the process, of the copy while loading; and what is offered [U, F]."""

    size: NDArray[np.int64]
    extra: NDArray[np.int64]
    staging: NDArray[np.int64]
    offered: NDArray[np.bool_]


def count_bytes(model: Model, target: Target, units: Sequence[Unit], counts: Sequence[int]) -> Sizes:
    """What every unit takes in every format, for each kept count; 0 where a format is not offered."""
    size = np.zeros((len(counts), len(units), len(target.OFFERED)), np.int64)
    extra, staging, offered = np.zeros_like(size), np.zeros_like(size), np.zeros(size.shape[1:], bool)
    for u, unit in enumerate(units):
        for name in target.offered_formats(model, unit):
            f = target.OFFERED.index(name)
            offered[u, f] = True
            for c, count in enumerate(counts if unit.is_stack else counts[:1]):
                where = c if unit.is_stack else slice(None)
                size[where, u, f] = bytes_ = target.unit_size(model, unit, name, count)
                extra[where, u, f] = target.unit_extra(model, unit, name, count)
                staging[where, u, f] = target.unit_staging(model, unit, name, bytes_)
    return Sizes(size=size, extra=extra, staging=staging, offered=offered)


def write_whole(folder: Path, plan: Plan, fill: Callable[[Path], Sequence[str]]) -> Artifact:
    """What `fill` writes into a scratch folder and names, the file to load first; files get their own names only when all are complete.

    Raises:
        MachineError: the disk is full or not writable.
    """
    scratch = folder / ".part"
    try:
        shutil.rmtree(scratch, ignore_errors=True)
        scratch.mkdir()
        names = fill(scratch)
        for name in names:
            (folder / name).parent.mkdir(exist_ok=True)
            os.replace(scratch / name, folder / name)
    except OSError as error:
        raise MachineError(f"{folder}: {error.strerror or error}", hint=f"the artifact needs {plan.file_size} bytes") from error
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    files = tuple(ArtifactFile(name=n, size=(folder / n).stat().st_size, sha256=hash_file(folder / n)) for n in names)
    return Artifact(folder=str(folder), target=plan.target, plan="", files=files)


def find_target(name: str) -> Target:
    """A target by name.

    Raises:
        UsageError: no such target.
    """
    if name not in TARGETS:
        raise UsageError(f"target {name!r} is not known", hint=f"known: {', '.join(TARGETS)}")
    return cast(Target, importlib.import_module(f"edgemoe.targets.{name}"))
