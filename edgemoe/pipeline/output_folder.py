"""This module guards the folder OUT: it decides what may be replaced, and leaves the finished result there.

OUT holds the result.  OUT/.work (or --work) holds the state from which a killed run goes on.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path

from edgemoe.base.errors import MachineError, ModelError, UsageError
from edgemoe.base.files import hold, write_text
from edgemoe.base.ownership import is_ours
from edgemoe.base.storage import hash_file, load_record, save_record
from edgemoe.ir import Artifact, Report
from edgemoe.report.page import PAGES, write_report

MARKER = "build.json"
RECORDS = ("artifact.json", "plan.json")  # beside the PAGES of report/page.py


def check_output(out: Path, *, force: bool, names: Sequence[str] = ()) -> None:
    """Refuse an OUT that holds files of somebody else; change nothing.

    An OUT is accepted if it is new, empty, or our unfinished work, and with `force` if it is any folder.

    Args:
        out: the folder.
        force: accept a folder that holds other files.
        names: of the target's files.  A file of such a name, or of a report's, that somebody else wrote or changed is never overwritten,
            even with `force`.

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
    ours = {str(path.relative_to(out)) for path in _our_files(out, names)}
    foreign = [name for name in (*names, *RECORDS, *PAGES) if os.path.lexists(out / name) and name not in ours]
    if foreign and not ((out / ".work" / MARKER).exists() and foreign[0] in names):  # an unfinished build may not have recorded its files
        raise UsageError(f"{out / foreign[0]}: is there, and edgemoe did not write it", hint="choose another -o, or move the file away")


def _our_files(out: Path, names: Sequence[str]) -> list[Path]:
    """Files that a build or emit left in OUT, or where the target may put them below it, and nobody changed since."""
    found = [out / name for name in (*RECORDS, *PAGES) if is_ours(out / name)]
    for folder in (out, out / ".work"):
        with suppress(ModelError):  # no record, or one that is not ours or of another version: its files are not known to be ours
            for file in find_artifact(folder).files:
                path = out / file.name
                if Path(file.name).name != file.name and file.name not in names:
                    continue  # a record may come from anybody
                if path.is_file() and not path.is_symlink() and path.stat().st_size == file.size and hash_file(path) == file.sha256:
                    found.append(path)
    return list(dict.fromkeys(found))


def prepare_output(out: Path, *, force: bool, names: Sequence[str] = ()) -> None:
    """Make OUT, or clear it of our last result or of the files of an unfinished build; the arguments are those of `check_output`.

    Raises:
        UsageError: the folder is not accepted.
        MachineError: it cannot be made.
    """
    check_output(out, force=force, names=names)
    try:
        for path in _our_files(out, names):
            path.unlink()
        (out / ".work").mkdir(parents=True, exist_ok=True)
        write_text(out / ".work" / MARKER, json.dumps({"unfinished": True}) + "\n")
    except OSError as error:
        raise MachineError(f"{out}: cannot be written: {error.strerror}") from error


@contextmanager
def hold_output(out: Path) -> Iterator[None]:
    """Make OUT if it is not there, and keep other runs out of it until the block ends.

    Raises:
        UsageError: another run is at work there.
        MachineError: it cannot be made.
    """
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise MachineError(f"{out}: cannot be made: {error.strerror}") from error
    with hold(out):
        yield


def check_built(out: Path) -> None:
    """Refuse a folder that neither `emit` nor `build` finished.

    Raises:
        ModelError: no folder, or none with a plan.
    """
    if (out / "plan.json").exists():
        return
    what = "has no plan.json, so edgemoe did not finish it" if out.is_dir() else "is a file" if out.exists() else "no such folder"
    raise ModelError(f"{out}: {what}", hint="give the folder that build or emit made")


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
