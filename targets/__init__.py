"""This package holds the targets of plans: each states its formats, exact bytes and rules, and writes and runs its files."""

from __future__ import annotations

import importlib
import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgemoe.base.errors import MachineError, UsageError
from edgemoe.base.progress import Progress
from edgemoe.base.storage import hash_file
from edgemoe.base.types import F32
from edgemoe.devices.profiles import Device
from edgemoe.ir import Artifact, ArtifactFile, Costs, Model, Plan, Report, Stats, Unit
from edgemoe.quantize.gptq import Hessian

MISSING = "unknown"  # a runtime that is not installed
TARGETS = ("gguf", "onnx", "browser", "mlx")


@dataclass(frozen=True, slots=True, kw_only=True)
class Runs:
    """The settings of a target's jobs (see its child.py) that verification asks for."""

    compared: Mapping[str, Any]  # settings of the KL that is compared with the prediction
    beside: Mapping[str, Any]  # settings of the second figure of KL
    fallback: Mapping[str, bool] | None = None  # settings to measure with if the runtime fails on this machine with its defaults
    fallback_note: str = ""  # note for the user in this case


@dataclass(frozen=True, slots=True, kw_only=True)
class Words:
    """The words of reports and cards that differ between targets."""

    library: str  # the front matter's library_name
    beside: str  # the second figure of KL
    beside_in_summary: bool  # the terminal shows it too
    beside_note: str
    launch_note: str
    language: str  # of the launch lines
    more: str = "; a longer text, or several at once, need more"  # ends the sentence on what the memory holds
    plain: str = "F32"  # what tensors without a format are stored as
    launch_lines: Callable[[Report], list[str]]  # commands or code that run the artifact
    modelfile: Callable[[Report], list[str]] | None = None  # Ollama's Modelfile, if Ollama loads such files


OnLogits = Callable[[int, F32], None]  # (window number, logits [tokens, vocab])


@dataclass(frozen=True, slots=True, kw_only=True)
class Target:
    """A kind of file that a plan can be written as: its formats, exact bytes and rules, and how to write and run it.

    The stages know a target by this record alone, so a new target is a folder that makes one.
    """

    name: str
    form: str  # "stacks" or "experts": see Costs
    offered: tuple[str, ...]  # formats
    runs: Runs
    words: Words
    # bytes of the largest file that a split cannot avoid, from the units' bytes, and the tensor in it; None: files cannot be split
    least_shard: Callable[[Model, Mapping[str, int]], tuple[int, str]] | None
    fixed_names: tuple[str, ...]  # names of files that are the same for all models, so that foreign files may have them too

    # -------------------------------------------------------------------------------------------------------- what it holds
    list_units: Callable[[Model], list[Unit]]  # units that get a format, in file order; in the experts form one for each expert
    offered_formats: Callable[[Model, Unit], tuple[str, ...]]  # that can store a unit
    unit_size: Callable[
        [Model, Unit, str, int], int
    ]  # bytes of a unit in the artifact in a format, padded; of a stack with so many experts
    unit_extra: Callable[[Model, Unit, str, int], int]  # bytes that the process holds for a unit beyond those of the file
    unit_staging: Callable[[Model, Unit, str, int], int]  # bytes of the copy that loading a unit of this size needs
    fixed_sizes: Callable[[Model, Sequence[int]], list[int]]  # bytes of everything without a format, for each kept count
    memory_parts: Callable[[Model, int], dict[str, int]]  # bytes of the process beside the weights, at a context (ir/memory.py)
    settle: Callable[[Model, Stats], Target] | None = None  # the target as the statistics want it, where something was left open
    on_device: Callable[[Costs, Device], Costs]  # a price list with the bytes that a box holds beyond the file's

    # ------------------------------------------------------------------------------------------------------------- rounding
    round_rows: Callable[[F32, str, F32 | None], F32]  # rows, format, importance of the columns -> rounded rows
    input_block: Callable[[str, str], int]  # format, role -> inputs of a product that kernels round to int8 together; 0: none
    feeds_back: Callable[[str], bool]  # whether `pack_rows` uses a Hessian in this format
    # rows, format, importance, Hessian of the inputs or None -> packed rows [R, bytes]: stock quantizer, or with feedback
    pack_rows: Callable[[F32, str, F32 | None, Hessian | None], NDArray[np.uint8]]
    # packed rows, format, values [R, C], Hessian, gradient (W - Q) H -> packed rows with new codes; values and gradient change in place
    descend_rows: Callable[[NDArray[np.uint8], str, F32, Hessian, F32], NDArray[np.uint8]]
    unpack_rows: Callable[[NDArray[np.uint8], str, int], F32]  # packed rows, format, columns -> decoded rows

    # ------------------------------------------------------------------------------------------------------------------ files
    write: Callable[[Model, Stats, Plan, Path, int, Progress | None], Artifact]  # model, stats, plan, folder, most bytes of a file or 0
    run: Callable[[Path, Mapping[str, Any], OnLogits | None], dict[str, Any]]  # a job in a child process (see child.py)
    check_tokenizer: Callable[[Path, Model, Sequence[str]], list[str]]  # lines that the artifact tokenizes otherwise than the original
    runtime: Callable[[], str]  # name and version of the runtime; MISSING if it is not installed
    # the model that an artifact's folder decodes to, where the runtime is missing: folder, original, plan, folder for the weights
    decode: Callable[[Path, Model, Plan, Path], Model] | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Sizes:
    """Bytes of every choice [C, U, F]: in the file, in the process beyond the file, of the staging copy; and offered formats [U, F]."""

    size: NDArray[np.int64]
    extra: NDArray[np.int64]
    staging: NDArray[np.int64]
    offered: NDArray[np.bool_]


def settle(target: Target, model: Model, stats: Stats) -> Target:
    """The target as the statistics want it.

    Raises:
        UsageError: the statistics show that the target cannot have the settings that it was asked for.
    """
    return target.settle(model, stats) if target.settle else target


def count_bytes(model: Model, target: Target, units: Sequence[Unit], counts: Sequence[int]) -> Sizes:
    """Bytes of every unit in every format, for each kept count; 0 if a format is not offered."""
    size = np.zeros((len(counts), len(units), len(target.offered)), np.int64)
    extra, staging, offered = np.zeros_like(size), np.zeros_like(size), np.zeros(size.shape[1:], bool)
    for u, unit in enumerate(units):
        for name in target.offered_formats(model, unit):
            f = target.offered.index(name)
            offered[u, f] = True
            for c, count in enumerate(counts if unit.is_stack else counts[:1]):
                where = c if unit.is_stack else slice(None)
                size[where, u, f] = bytes_ = target.unit_size(model, unit, name, count)
                extra[where, u, f] = target.unit_extra(model, unit, name, count)
                staging[where, u, f] = target.unit_staging(model, unit, name, bytes_)
    return Sizes(size=size, extra=extra, staging=staging, offered=offered)


def write_whole(folder: Path, plan: Plan, fill: Callable[[Path], Sequence[str]]) -> Artifact:
    """Let `fill` write files into a scratch folder and name them, the file to load first; they get their names when all are complete.

    Raises:
        MachineError: the disk is full or not writable.
        UsageError: another file has one of the names.
    """
    scratch = folder / ".part"
    try:
        shutil.rmtree(scratch, ignore_errors=True)
        scratch.mkdir()
        names = fill(scratch)
        for name in names:
            (folder / name).parent.mkdir(exist_ok=True)
            if os.path.lexists(folder / name) and not _is_same(scratch / name, folder / name):
                raise UsageError(f"{folder / name}: is there, and is not what would be written", hint="move it away, and go on")
            os.replace(scratch / name, folder / name)
    except OSError as error:
        raise MachineError(f"{folder}: {error.strerror or error}", hint=f"the artifact needs {plan.file_size} bytes") from error
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    files = tuple(ArtifactFile(name=n, size=(folder / n).stat().st_size, sha256=hash_file(folder / n)) for n in names)
    return Artifact(folder=str(folder), target=plan.target, plan="", files=files)


def _is_same(new: Path, old: Path) -> bool:
    """Whether a file has the bytes that would be written anyway: a run that was killed here left it."""
    return not old.is_symlink() and old.is_file() and old.stat().st_size == new.stat().st_size and hash_file(old) == hash_file(new)


def find_target(name: str) -> Target:
    """A target by name; what follows a dash are settings of the target, as in "mlx-bf16".

    Raises:
        UsageError: no such target, or no such settings.
    """
    stem, dash, settings = name.partition("-")
    if stem not in TARGETS:
        raise UsageError(f"target {name!r} is not known", hint=f"known: {', '.join(TARGETS)}")
    module = importlib.import_module(f"edgemoe.targets.{stem}")
    if dash and not hasattr(module, "with_settings"):
        raise UsageError(f"target {name!r} is not known: {stem} has no settings", hint=f"give --target {stem}")
    target: Target = module.with_settings(settings) if dash else module.TARGET
    return target
