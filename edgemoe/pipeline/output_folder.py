"""The folder OUT: whose it is, what may be replaced, and what lies there when a build is done.

OUT holds the result; OUT/.work (or --work) what a killed run goes on from.
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
    """Refuse an OUT that is not new, empty, our unfinished work or, with `force`, any folder; nothing is changed.

    Args:
        out: the folder.
        force: take a folder that holds other files.
        names: that the target's files will have; no file of this name that somebody else wrote is overwritten, `force` or not.

    Raises:
        UsageError: something else is there.
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
    """Make OUT ours, cleared of our last result or of what an unfinished build emitted; arguments as for `check_output`.

    Raises:
        UsageError: something else is there.
        MachineError: it cannot be made.
    """
    check_output(out, force=force, names=names)
    try:
        for folder in (out, out / ".work"):
            with suppress(ModelError):  # nothing there, not ours, or of another version: it stays
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
    """Delete what a record lists: files right in OUT, or those that the target may put below it."""
    for name in (*(f.name for f in artifact.files), "artifact.json", "plan.json", "report.json", "report.html", "README.md"):
        if (Path(name).name == name or name in names) and (out / name).is_file():
            (out / name).unlink()


def open_work(out: Path, work: Path | None) -> Path:
    """The folder for Stats and Costs: OUT/.work, or one that is shared between builds."""
    folder = work or out / ".work"
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise MachineError(f"{folder}: cannot be made: {error.strerror}") from error
    return folder


def finish_output(out: Path, report: Report) -> None:
    """Write plan and report beside the artifact; the work folder inside OUT goes."""
    save_record(out / "plan.json", report.plan)
    write_report(replace(report, artifact=replace(report.artifact, folder=".")), out)  # no path of this machine is published
    shutil.rmtree(out / ".work", ignore_errors=True)
