"""This module keeps results in work folders under keys that hash their inputs, and lets a killed job go on after its last step.

A key is a hash of everything that decides a result: its kind, the revision of this kind below, the version of edgemoe, and the values that
the caller names.  Every file that holds a result, or the state from which a killed run goes on, carries a hash.  A result of which
a file is damaged is made anew, and one line says so.
"""

from __future__ import annotations

import logging
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from edgemoe import __version__
from edgemoe.base.errors import DamagedError, EdgemoeError, ModelError
from edgemoe.base.files import alone, remove_parts
from edgemoe.base.storage import check_arrays, hash_json, load_sealed, save_sealed

# A revision is raised when the same inputs give another result of its kind, so that no older result is opened.
REVISIONS = {"stats": 2, "imatrix": 2, "gradients": 2, "costs": 8, "narrow": 2, "repair": 6, "rounded": 1, "reference": 2, "measured": 6}
UNHASHED = "0" * 64  # fingerprint of a model whose tensors were not hashed; it is as long as a hash, because sizes of files depend on that
T = TypeVar("T")


def key_of(kind: str, *parts: Any) -> str:
    """The key of a result of this kind: SHA-256 of plain values."""
    if UNHASHED in parts:
        raise EdgemoeError("nothing can be made from a model that was not hashed", hint="inspect it with hashed=True")
    return hash_json(kind, REVISIONS[kind], __version__, *parts)


def path_of(folder: Path, kind: str, key: str, suffix: str = "") -> Path:
    """The path of a result with this key; without a suffix, the path is that of a folder."""
    return folder / f"{kind}-{key[:16]}{suffix}"


def open_or_make(path: Path, read: Callable[[], T | None], make: Callable[[], T]) -> T:
    """The result at `path` if `read` finds it complete, else the result of `make`; other processes that want the same result wait.

    A result whose files are damaged is deleted and made anew, also if the damage is found while a killed run goes on.
    """
    with alone(path):
        try:
            found = read()
        except ModelError as error:  # the key says that this version wrote it from these inputs, so it can only be damaged
            _start_anew(path, error)
            found = None
        if found is not None:
            return found
        remove_parts(path)
        try:
            return make()
        except DamagedError as error:
            if not error.path.is_relative_to(path):
                raise
            _start_anew(path, error)
            return make()


def _start_anew(path: Path, error: ModelError) -> None:
    """Say that a result is made anew, and delete it with the arrays beside it."""
    logging.getLogger("edgemoe").warning("%s; this result is made anew", error)
    if path.is_dir():
        shutil.rmtree(path)
    for file in (path, path.with_suffix(".safetensors")):
        file.unlink(missing_ok=True)


@dataclass(frozen=True, slots=True)
class Steps:
    """The progress of a job in a folder, so that a killed run can go on; notes under another key are ignored."""

    folder: Path
    key: str

    def read(self) -> dict[str, Any]:
        """The last note: the steps "done", and the other values that the job needs to go on.

        Raises:
            DamagedError: the note, or the arrays of a step that is done, are not what was written.
        """
        path = self.folder / "progress.json"
        saved = load_sealed(path) if path.exists() else {}
        if saved.get("key") != self.key:
            return {"done": 0}
        for arrays in sorted(self.folder.glob("*.safetensors")):
            check_arrays(arrays)
        return saved

    def note(self, done: int, **more: Any) -> None:
        """Note that so many steps are done and on disk."""
        save_sealed(self.folder / "progress.json", {"key": self.key, "done": done, **more})
