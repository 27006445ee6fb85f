"""This module keeps results in work folders under keys that hash their inputs, and lets a killed job go on after its last step.

A key is a hash of everything that decides a result: its kind, the revision of this kind below, the version of edgemoe, and the values that
the caller names.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from edgemoe import __version__
from edgemoe.base.storage import alone, hash_json, write_text

# A revision is raised when the same inputs give another result of its kind, so that no older result is opened.
REVISIONS = {"stats": 1, "imatrix": 1, "gradients": 1, "costs": 7, "narrow": 1, "repair": 5, "reference": 1, "measured": 5}
T = TypeVar("T")


def key_of(kind: str, *parts: Any) -> str:
    """The key of a result of this kind: SHA-256 of plain values."""
    return hash_json(kind, REVISIONS[kind], __version__, *parts)


def path_of(folder: Path, kind: str, key: str, suffix: str = "") -> Path:
    """The path of a result with this key; without a suffix, the path is that of a folder."""
    return folder / f"{kind}-{key[:16]}{suffix}"


def open_or_make(path: Path, read: Callable[[], T | None], make: Callable[[], T]) -> T:
    """The result at `path` if `read` finds it complete, else the result of `make`; other processes that want the same result wait."""
    with alone(path):
        found = read()
        return make() if found is None else found


@dataclass(frozen=True, slots=True)
class Steps:
    """The progress of a job in a folder, so that a killed run can go on; notes under another key are ignored."""

    folder: Path
    key: str

    def read(self) -> dict[str, Any]:
        """The last note: the steps "done", and the other values that the job needs to go on."""
        path = self.folder / "progress.json"
        saved: dict[str, Any] = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
        return saved if saved.get("key") == self.key else {"done": 0}

    def note(self, done: int, **more: Any) -> None:
        """Note that so many steps are done and on disk."""
        write_text(self.folder / "progress.json", json.dumps({"key": self.key, "done": done, **more}))
