"""This module tells files that edgemoe wrote from files of the user, which are never replaced.

JSON records and array files carry hashes of what they hold.  Pages end with a comment that holds the SHA-256 of all before it, so a page
that somebody edited is the user's.  Files for other tools can carry no comment, and are known by their name and first line.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable
from pathlib import Path

from edgemoe.base.errors import ModelError, UsageError
from edgemoe.base.storage import check_arrays, read_sealed

_FIRST_LINES = {
    "tensor-types.txt": r"\^\S+\$=\w+",
    "README.txt": r"keep\.json: experts to keep, a list for each of its layers",
    "sweep.csv": r"budget,file_size,peak,kept,predicted_kl,",
}
_SEAL = re.compile(r"\A(.*)<!-- edgemoe ([0-9a-f]{64}) -->\n\Z", re.DOTALL)


def seal_text(text: str) -> str:
    """A page in HTML or Markdown with the comment by which `is_ours` knows it."""
    return f"{text}<!-- edgemoe {hashlib.sha256(text.encode()).hexdigest()} -->\n"


def is_ours(path: Path, record: str = "") -> bool:
    """Whether edgemoe wrote this file, and nobody changed it since; `record` names the kind of record that it must hold."""
    if path.is_symlink() or not path.is_file():
        return False
    try:
        if path.suffix == ".json" or record:
            body, whole = read_sealed(path)
            return whole and (not record or body.get("record") == record)
        if path.suffix == ".safetensors":
            return bool(check_arrays(path))
        text = path.read_text(encoding="utf-8")
        if path.name in _FIRST_LINES:
            return re.match(_FIRST_LINES[path.name], text) is not None
        found = _SEAL.match(text)
        return found is not None and hashlib.sha256(found[1].encode()).hexdigest() == found[2]
    except (ModelError, OSError, ValueError):
        return False


def check_replaceable(paths: Iterable[Path], *, force: bool, record: str = "") -> None:
    """Refuse to replace a file that edgemoe did not write, or another kind of record, and without `force` any file.

    Raises:
        UsageError: names the file.
    """
    for path in paths:
        if not path.exists() and not path.is_symlink():
            continue
        if not is_ours(path, record):
            what = f"it holds no {record} that edgemoe wrote" if record else "edgemoe did not write it"
            raise UsageError(f"{path}: is there, and {what}", hint="choose another name, or move the file away")
        if not force:
            raise UsageError(f"{path}: is there already", hint="choose another name, or add --force to replace what edgemoe wrote")


def check_outside(model: str | Path, *outputs: Path | None) -> None:
    """Refuse outputs that are the folder of the checkpoint or lie in it, where they would mix with files of the user.

    Raises:
        UsageError: names the output.
    """
    folder = Path(model)
    if not folder.is_dir():
        return  # a hub id
    for output in filter(None, outputs):
        if output.resolve().is_relative_to(folder.resolve()):
            raise UsageError(f"{output}: lies in the folder of the checkpoint, {folder}", hint="choose a folder outside it")
