"""This module writes records and arrays to files and reads them back: plain values as JSON, arrays as safetensors beside the JSON file.

Files appear whole or not at all, and each carries the SHA-256 of what it holds.  A file of another format version, of another kind of
record, or with another content than it was written with, is refused.
"""

from __future__ import annotations

import hashlib
import json
import stat
from collections.abc import Iterator, Mapping
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar, get_origin, get_type_hints

import numpy as np
from numpy.typing import NDArray

from edgemoe.base.errors import DamagedError, MachineError, ModelError
from edgemoe.base.files import new_file, write_text

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

FORMAT_VERSION = 6
MAX_JSON = 64 * 2**20  # bytes
MAX_VALUES = 6_000_000  # in a JSON file; the largest tokenizers have 2 million
SEALS = "edgemoe.sha256"  # in the metadata of our array files: type, shape and SHA-256 of each array
R = TypeVar("R", bound="DataclassInstance")


def array_file(layer: int) -> str:
    """Name of the file that holds one layer's arrays."""
    return f"layer-{layer:04d}.safetensors" if layer >= 0 else "ends.safetensors"


def save_arrays(path: Path, arrays: Mapping[str, NDArray[Any]]) -> dict[str, str]:
    """Write arrays to safetensors; the file appears whole or not at all.

    Returns:
        What the file's metadata holds: for each array its type, its shape and the SHA-256 of its bytes.

    Raises:
        MachineError: the disk is full or not writable.
    """
    from safetensors import SafetensorError
    from safetensors.numpy import save_file

    whole = {name: np.ascontiguousarray(a) for name, a in sorted(arrays.items())}
    seals = {name: seal_array(a) for name, a in whole.items()}
    try:
        with new_file(path) as part:
            save_file(whole, part, metadata={SEALS: json.dumps(seals, sort_keys=True)})  # one entry: the library orders several by lot
    except SafetensorError as error:  # an OSError in disguise
        raise MachineError(f"{path}: cannot be written: {error}", hint="free some space, or choose another folder") from error
    return seals


def seal_array(array: NDArray[Any]) -> str:
    """Type, shape and SHA-256 of the bytes of an array, as a file's metadata holds them."""
    digest = hashlib.sha256(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data).hexdigest()
    return f"{array.dtype.name} {list(array.shape)} {digest}"


def load_arrays(path: Path, seals: Mapping[str, str] | None = None) -> dict[str, NDArray[Any]]:
    """Read arrays that `save_arrays` wrote, whose `seals` are known where another file holds them too.

    Raises:
        DamagedError: the file is missing, cut, or not what was written.
    """
    return dict(_read_arrays(path, seals))


def check_arrays(path: Path) -> dict[str, str]:
    """Check the arrays of a file, one in memory at a time, and return their seals.

    Raises:
        DamagedError: the file is missing, cut, or not what was written.
    """
    return {name: seal_array(array) for name, array in _read_arrays(path, None)}


def _read_arrays(path: Path, seals: Mapping[str, str] | None) -> Iterator[tuple[str, NDArray[Any]]]:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, "np") as file:
            told, names = json.loads((file.metadata() or {}).get(SEALS, "{}")), sorted(file.keys())
            if set(told) != set(names) or (seals is not None and told != dict(seals)):
                raise DamagedError(path)
            for name in names:
                array = file.get_tensor(name)
                if seal_array(array) != told[name]:
                    raise DamagedError(path)
                yield name, array
    except (OSError, SafetensorError, ValueError, TypeError) as error:
        raise DamagedError(path, f"cannot be read as arrays: {error}") from error


def save_record(path: Path, record: DataclassInstance) -> None:
    """Save a record as JSON; its arrays go beside it as `<stem>.safetensors`."""
    from pydantic import TypeAdapter

    values = {f.name: getattr(record, f.name) for f in fields(record)}
    arrays = {n: v for n, v in values.items() if isinstance(v, np.ndarray)}
    seals = {"arrays": save_arrays(path.with_suffix(".safetensors"), arrays)} if arrays else {}
    plain = {n: TypeAdapter(Any).dump_python(v, mode="json") for n, v in values.items() if n not in arrays}
    save_sealed(path, {"format_version": FORMAT_VERSION, "record": type(record).__name__, **seals, **plain})


def load_record(path: Path, kind: type[R]) -> R:
    """Open a record that `save_record` wrote.

    Raises:
        ModelError: not such a record, of another format version, or malformed.
        DamagedError: a ModelError for a record whose values, or arrays, are not those that were written.
    """
    from pydantic import TypeAdapter, ValidationError

    try:
        body, whole = read_sealed(path)
    except ModelError as error:
        hint = f"give a {kind.__name__} that edgemoe wrote, or make it again"
        raise ModelError(str(error), hint=error.hint or hint) from error
    if body.pop("record", None) != kind.__name__:
        raise ModelError(f"{path}: is not a {kind.__name__} record of edgemoe", hint=f"give a {kind.__name__} that edgemoe wrote")
    version, seals = body.pop("format_version", None), body.pop("arrays", None)
    if version != FORMAT_VERSION:
        raise ModelError(f"{path}: format_version is {version}, this edgemoe reads {FORMAT_VERSION}", hint="make it again")
    hints = get_type_hints(kind)
    array_names = [n for n, hint in hints.items() if get_origin(hint) in (np.ndarray, NDArray)]  # numpy 2.5 keeps the alias
    arrays = load_arrays(path.with_suffix(".safetensors"), seals if isinstance(seals, dict) else {}) if array_names else {}
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
        made = kind(**values)
    except ModelError as error:
        raise ModelError(f"{path}: {error}", hint="make it again") from error
    if not whole:  # told last, because a wrong field says more
        raise DamagedError(path, hint="make it again")
    return made


def save_sealed(path: Path, body: Mapping[str, Any]) -> None:
    """Write a JSON object with the SHA-256 of its values."""
    text = json.dumps(body, allow_nan=False, sort_keys=True)
    write_text(path, json.dumps({**json.loads(text), "sha256": hash_json(json.loads(text))}, indent=1, sort_keys=True) + "\n")


def load_sealed(path: Path) -> dict[str, Any]:
    """A JSON object that `save_sealed` wrote.

    Raises:
        DamagedError: missing, no JSON, or not what was written.
    """
    try:
        body, whole = read_sealed(path)
    except ModelError as error:
        raise DamagedError(path, str(error).removeprefix(f"{path}: ")) from error
    if not whole:
        raise DamagedError(path)
    return body


def read_sealed(path: Path) -> tuple[dict[str, Any], bool]:
    """A JSON object without its hash, and whether the hash is that of its values.

    Raises:
        ModelError: cannot be read, or is no JSON object.
    """
    body = read_json(path)
    seal = body.pop("sha256", None)
    return body, seal == hash_json(body)


def regular_size(path: Path) -> int:
    """Bytes of a file that can be read to its end: a pipe would make its reader wait for ever.

    Raises:
        ModelError: not a regular file.
        OSError: missing, or not to be looked at.
    """
    found = path.stat()
    if not stat.S_ISREG(found.st_mode):
        raise ModelError(f"{path}: not a regular file")
    return found.st_size


def read_json(path: Path, limit: int = MAX_JSON) -> dict[str, Any]:
    """A JSON object from a file whose size is checked first.

    Raises:
        ModelError: missing, too large, not JSON, or not an object.
    """
    try:
        if (size := regular_size(path)) > limit:
            raise ModelError(f"{path}: {size} bytes is too large for a JSON file")
        return parse_json(path, path.read_bytes())
    except OSError as error:
        raise ModelError(f"{path}: cannot be read: {error.strerror or error}") from error


def parse_json(path: Path, raw: bytes) -> dict[str, Any]:
    """A JSON object from bytes of a file, whose values are counted first: in memory they take up to a hundred times as many bytes.

    Raises:
        ModelError: too many values, not JSON, not an object, or one name twice.
    """
    if sum(raw.count(mark) for mark in (b",", b"[", b"{")) > MAX_VALUES:
        raise ModelError(f"{path}: holds more than {MAX_VALUES} values, which is too many")
    try:
        value = json.loads(raw, object_pairs_hook=_unique)
    except (ValueError, RecursionError) as error:
        raise ModelError(f"{path}: cannot be read as JSON: {str(error)[:200]}") from error
    if not isinstance(value, dict):
        raise ModelError(f"{path}: expected a JSON object, found {type(value).__name__}")
    return value


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"the name {next(n for n in names if names.count(n) > 1)!r:.80} is there twice")
    return found


def hash_json(*parts: Any) -> str:
    """SHA-256 of plain values, independent of dict order."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()


def hash_file(path: Path) -> str:
    """SHA-256 of a file's bytes."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
