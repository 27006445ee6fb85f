"""This module writes records and arrays to files and reads them back: plain values as JSON, arrays as safetensors beside the JSON file.

Files appear whole or not at all.  A file of another format version, or of another kind of record, is refused.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar, get_origin, get_type_hints

import numpy as np
from numpy.typing import NDArray

from edgemoe.base.errors import MachineError, ModelError

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

FORMAT_VERSION = 5
R = TypeVar("R", bound="DataclassInstance")


def array_file(layer: int) -> str:
    """Name of the file that holds one layer's arrays."""
    return f"layer-{layer:04d}.safetensors" if layer >= 0 else "ends.safetensors"


def save_arrays(path: Path, arrays: dict[str, NDArray[Any]]) -> None:
    """Write arrays to safetensors; the file appears whole or not at all.

    Raises:
        MachineError: the disk is full or not writable.
    """
    from safetensors import SafetensorError
    from safetensors.numpy import save_file

    part = path.with_name(path.name + ".part")
    try:
        save_file({name: np.ascontiguousarray(a) for name, a in sorted(arrays.items())}, part)
    except SafetensorError as error:  # an OSError in disguise
        raise MachineError(f"{path}: cannot be written: {error}", hint="free some space, or choose another folder") from error
    os.replace(part, path)


def load_arrays(path: Path) -> dict[str, NDArray[Any]]:
    """Read arrays that `save_arrays` wrote.

    Raises:
        ModelError: missing or damaged file.
    """
    from safetensors import SafetensorError
    from safetensors.numpy import load_file

    try:
        return dict(load_file(path))
    except (OSError, SafetensorError) as error:
        raise ModelError(f"{path}: cannot be read as arrays: {error}", hint="delete it and run the command again") from error


@contextmanager
def alone(path: Path) -> Iterator[None]:
    """Lock `path` for this process, so that other processes wait for it.  On a system without file locks, nothing is locked."""
    try:
        import fcntl

        path.parent.mkdir(parents=True, exist_ok=True)
        lock = path.with_name(f".{path.name}.lock").open("w")
    except (ImportError, OSError):
        yield
        return
    with lock:
        with suppress(OSError):
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def write_text(path: Path, text: str) -> None:
    """Write a text file that appears whole or not at all."""
    part = path.with_name(path.name + ".part")
    part.write_text(text, encoding="utf-8")
    os.replace(part, path)


def save_record(path: Path, record: DataclassInstance) -> None:
    """Save a record as JSON; its arrays go beside it as `<stem>.safetensors`."""
    from pydantic import TypeAdapter

    values = {f.name: getattr(record, f.name) for f in fields(record)}
    arrays = {n: v for n, v in values.items() if isinstance(v, np.ndarray)}
    if arrays:
        save_arrays(path.with_suffix(".safetensors"), arrays)
    plain = {n: TypeAdapter(Any).dump_python(v, mode="json") for n, v in values.items() if n not in arrays}
    body = {"format_version": FORMAT_VERSION, "record": type(record).__name__, **plain}
    write_text(path, json.dumps(body, indent=1, allow_nan=False, sort_keys=True) + "\n")


def load_record(path: Path, kind: type[R]) -> R:
    """Open a record that `save_record` wrote.

    Raises:
        ModelError: not such a record, of another format version, or malformed.
    """
    from pydantic import TypeAdapter, ValidationError

    try:
        body = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ModelError(f"{path}: cannot be read as a {kind.__name__}: {error}") from error
    if not isinstance(body, dict) or body.pop("record", None) != kind.__name__:
        raise ModelError(f"{path}: is not a {kind.__name__} record of edgemoe")
    version = body.pop("format_version", None)
    if version != FORMAT_VERSION:
        raise ModelError(f"{path}: format_version is {version}, this edgemoe reads {FORMAT_VERSION}", hint="make it again")
    hints = get_type_hints(kind)
    array_names = [n for n, hint in hints.items() if get_origin(hint) in (np.ndarray, NDArray)]  # numpy 2.5 keeps the alias
    arrays = load_arrays(path.with_suffix(".safetensors")) if array_names else {}
    values: dict[str, Any] = {n: arrays[n] for n in array_names if n in arrays}
    for name, hint in hints.items():
        if name not in (body if name not in array_names else values):
            raise ModelError(f"{path}: the field {name!r} is missing", hint="make it again")
        if name not in array_names:
            try:
                values[name] = TypeAdapter(hint).validate_python(body[name])
            except ValidationError as invalid:
                problem: Any = invalid.errors()[0]
                place = ".".join([name, *map(str, problem["loc"])])
                raise ModelError(f"{path}: {place}: {problem['msg']}", hint="make it again") from invalid
    unknown = sorted(set(body) - set(hints))
    if unknown:
        raise ModelError(f"{path}: the field {unknown[0]!r} is not known", hint="make it again")
    try:
        return kind(**values)
    except ModelError as error:
        raise ModelError(f"{path}: {error}", hint="make it again") from error


def hash_json(*parts: Any) -> str:
    """SHA-256 of plain values, independent of dict order."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()


def hash_file(path: Path) -> str:
    """SHA-256 of a file's bytes."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
