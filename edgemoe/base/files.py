"""This module writes files that appear whole or not at all, and locks files and folders against other runs.

No symbolic link is followed on the way: a new file gets a name that nobody else has, and a lock that is a link is refused.
"""

from __future__ import annotations

import errno
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from edgemoe.base.errors import UsageError

_UMASK = os.umask(0)  # can only be read by setting it
os.umask(_UMASK)


@contextmanager
def new_file(path: Path) -> Iterator[Path]:
    """A new, empty file beside `path`, which takes the name `path` when the block ends; if the block fails, nothing is left."""
    handle, name = tempfile.mkstemp(prefix=_part_prefix(path), suffix=".part", dir=path.parent)
    os.close(handle)
    part = Path(name)
    try:
        part.chmod(0o666 & ~_UMASK)  # as any file that the user makes; mkstemp lets only its owner read it
        yield part
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)


def remove_parts(path: Path) -> None:
    """Delete what killed runs left of `path`, or of files in the folder `path`; call it only while no other run writes there."""
    for old in (*path.parent.glob(f"{_part_prefix(path)}*.part"), *path.glob(".*.part")):
        if not old.is_dir():
            old.unlink(missing_ok=True)


def _part_prefix(path: Path) -> str:
    return f".{path.name[:100]}-"


def write_text(path: Path, text: str) -> None:
    """Write a text file that appears whole or not at all."""
    with new_file(path) as part:
        part.write_text(text, encoding="utf-8")


@contextmanager
def alone(path: Path) -> Iterator[None]:
    """Lock `path` for this process, so that other processes wait for it.  On a system without file locks, nothing is locked.

    Raises:
        UsageError: the lock's name is a symbolic link, which somebody else made.
    """
    try:
        import fcntl

        path.parent.mkdir(parents=True, exist_ok=True)
        lock = path.with_name(f".{path.name}.lock")
        handle = os.open(lock, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o666)
    except (ImportError, OSError) as error:
        if getattr(error, "errno", None) == errno.ELOOP:
            raise UsageError(f"{lock}: is a symbolic link, which edgemoe did not make", hint="delete it") from error
        yield
        return
    try:
        with suppress(OSError):
            fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)


@contextmanager
def hold(folder: Path) -> Iterator[None]:
    """Lock a folder for this process until the block ends.  On a system without file locks, nothing is locked.

    Raises:
        UsageError: another process holds it.
    """
    try:
        import fcntl

        handle = os.open(folder, os.O_RDONLY)
    except (ImportError, OSError):
        yield
        return
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise UsageError(f"{folder}: another edgemoe is at work there", hint="wait for it, or choose another folder") from error
        except OSError:
            pass  # a file system without locks
        yield
    finally:
        os.close(handle)
