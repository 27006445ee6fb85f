"""This module guards the folder OUT: it decides what may be replaced, and leaves the finished result there.

OUT holds the result.  OUT/.work (or --work) holds the state from which a killed run goes on.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

from edgemoe.base.errors import MachineError, ModelError, UsageError
from edgemoe.base.storage import load_record, save_record, write_text
from edgemoe.ir import Artifact, Report
from edgemoe.report.page import write_report

MARKER = "build.json"


def check_output(out: Path, *, force: bool, names: Sequence[str] = ()) -> None:
    """Refuse an OUT that holds files of somebody else; change nothing.

    An OUT is accepted if it is new, empty, or our unfinished work, and with `force` if it is any folder.

    Args:
        out: the folder.
        force: accept a folder that holds other files.
        names: of the target's files; a file of such a name that somebody else wrote is never overwritten, even with `force`.

    Raises:
        UsageError: the folder is not accepted.
    """
    for parent in (out, *out.parents):
        if parent.exists() and not parent.is_dir():
            raise UsageError(f"{out}: {parent} is a file, not a folder", hint="choose another -o")
        if parent.exists():
            break
    if out.is_dir() and any(out.iterdir()) and not force and not (out / ".work" / MARKER).exists():
        raise UsageError(f"{out} is not empty", hint="choose another -o, or add --force to replace what edgemoe wrote there")
    if (out / ".work" / MARKER).exists():
        return
    ours: set[str] = set()
    with suppress(ModelError):
        ours = {f.name for f in find_artifact(out).files}
    foreign = [name for name in names if (out / name).exists() and name not in ours]
    if foreign:
        raise UsageError(f"{out / foreign[0]}: is there, and edgemoe did not write it", hint="choose another -o, or move the file away")


def prepare_output(out: Path, *, force: bool, names: Sequence[str] = ()) -> None:
    """Make OUT, or clear it of our last result or of the files of an unfinished build; the arguments are those of `check_output`.

    Raises:
        UsageError: the folder is not accepted.
        MachineError: it cannot be made.
    """
    check_output(out, force=force, names=names)
    try:
        for folder in (out, out / ".work"):
            with suppress(ModelError):  # if there is no record, or one that is not ours or of another version, its files stay
                _remove_result(out, find_artifact(folder), names)
        (out / ".work").mkdir(parents=True, exist_ok=True)
        write_text(out / ".work" / MARKER, json.dumps({"unfinished": True}) + "\n")
    except OSError as error:
        raise MachineError(f"{out}: cannot be written: {error.strerror}") from error


def find_artifact(out: Path) -> Artifact:
    """The artifact that `emit` or `build` left in a folder.

    Raises:
        ModelError: there is none.
    """
    if (out / "artifact.json").exists():
        return replace(load_record(out / "artifact.json", Artifact), folder=str(out))
    if (out / "report.json").exists():
        return replace(load_record(out / "report.json", Report).artifact, folder=str(out))
    raise ModelError(f"{out}: neither artifact.json nor report.json is there", hint="give the folder that emit or build made")


def _remove_result(out: Path, artifact: Artifact, names: Sequence[str]) -> None:
    """Delete the files that a record lists, if they lie directly in OUT or where the target may put them below it."""
    for name in (*(f.name for f in artifact.files), "artifact.json", "plan.json", "report.json", "report.html", "README.md"):
        if (Path(name).name == name or name in names) and (out / name).is_file():
            (out / name).unlink()


def open_work(out: Path, work: Path | None) -> Path:
    """The folder for Stats and Costs: OUT/.work, or a folder that builds share."""
    folder = work or out / ".work"
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise MachineError(f"{folder}: cannot be made: {error.strerror}") from error
    return folder


def finish_output(out: Path, report: Report) -> None:
    """Write plan and report beside the artifact, and delete the work folder inside OUT."""
    save_record(out / "plan.json", report.plan)
    write_report(replace(report, artifact=replace(report.artifact, folder=".")), out)  # no path of this machine is published
    shutil.rmtree(out / ".work", ignore_errors=True)
