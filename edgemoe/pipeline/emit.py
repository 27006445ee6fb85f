"""This module emits an Artifact from Model, Stats, Plan and target: it checks them, lets the target write, and counts every byte."""

from __future__ import annotations

import hashlib
import os
import shutil
from dataclasses import replace
from pathlib import Path

from edgemoe.base.errors import EdgemoeError, MachineError, ModelError, UsageError
from edgemoe.base.files import new_file
from edgemoe.base.progress import Progress
from edgemoe.base.units import format_bytes
from edgemoe.ir import Artifact, ArtifactFile, Model, Plan, Stats
from edgemoe.model.licence import licence_files
from edgemoe.targets import Target


def emit_artifact(
    model: Model,
    stats: Stats,
    plan: Plan,
    target: Target,
    folder: Path,
    *,
    shard_max: int = 0,
    progress: Progress | None = None,
) -> Artifact:
    """Write the artifact of a plan.

    Args:
        model: whose weights are stored.
        stats: the importance matrix.
        plan: made for this model.
        target: made for this target.
        folder: where the files go; made if needed.
        shard_max: split files larger than this many bytes (0: one file).
        progress: called with (bytes written, all bytes).

    Raises:
        ModelError: the plan belongs to another model, or the checkpoint is damaged.
        MachineError: not enough disk space, or the folder is not writable.
        UsageError: the target's files cannot be split.
    """
    check_split(target, shard_max)
    if plan.model != model.fingerprint:
        raise ModelError(f"the plan was made for another checkpoint than {model.folder}", hint="make a new plan, or give the right folder")
    plan.check_experts(model)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        free = shutil.disk_usage(folder).free
    except OSError as error:
        raise MachineError(f"{folder}: cannot be made: {error.strerror}") from error
    if free < plan.file_size:
        raise MachineError(
            f"{folder}: {format_bytes(free)} free, the artifact needs {format_bytes(plan.file_size)}",
            hint="free some space or choose another OUT",
        )
    artifact = target.write(model, stats, plan, folder, shard_max, progress)
    if shard_max == 0 and artifact.model_size != plan.file_size:
        raise EdgemoeError(f"{artifact.path} has {artifact.model_size} bytes, the plan promised {plan.file_size}: please report this")
    return artifact


def copy_licences(artifact: Artifact, model: Model) -> Artifact:
    """The artifact with the checkpoint's licence files beside it, without which nobody may publish it.

    Raises:
        UsageError: another file of this name is there.
        MachineError: the disk is full or not writable.
    """
    copied = []
    for source in licence_files(Path(model.folder)):
        place, data = Path(artifact.folder) / source.name, source.read_bytes()
        if os.path.lexists(place) and (place.is_symlink() or place.read_bytes() != data):
            raise UsageError(f"{place}: is there, and is not the checkpoint's", hint="move it away, and go on")
        try:
            with new_file(place) as part:
                part.write_bytes(data)
        except OSError as error:
            raise MachineError(f"{place}: cannot be written: {error.strerror}") from error
        copied.append(ArtifactFile(name=source.name, size=len(data), sha256=hashlib.sha256(data).hexdigest()))
    return replace(artifact, files=(*artifact.files, *copied))


def fixed_names(target: Target, model: Model) -> tuple[str, ...]:
    """Names of files in OUT that are known before anything is written."""
    return (*target.fixed_names, *(path.name for path in licence_files(Path(model.folder))))


def check_split(target: Target, shard_max: int) -> None:
    """Refuse `shard_max` if the target cannot split its files, before hours of work.

    Raises:
        UsageError: names the option.
    """
    if shard_max and target.least_shard is None:
        raise UsageError(
            f"--shard-max: {target.name} writes a graph and one data file, which cannot be split", hint="leave --shard-max out"
        )
