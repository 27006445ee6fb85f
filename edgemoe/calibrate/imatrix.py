"""This module turns llama.cpp's imatrix file into Stats that hold an importance matrix and how often every expert was chosen, nothing else.

The file (GGUF, `llama-imatrix`) has two F32 tensors for each matrix W.  `W.in_sum2` [matrices, columns] holds sums of x^2 over the tokens
that reached each matrix, not weighted by gates.  `W.counts` [matrices, 1] holds the number of these tokens.  The reader does not trust the
file: it walks the header by hand within a limit (gguf-py's reader loops as often as a length in the file says), and reads only as many
bytes of data as the model's own shapes need.
"""

from __future__ import annotations

import re
import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgemoe.base.errors import ModelError
from edgemoe.base.storage import array_file, hash_file, save_arrays, save_record
from edgemoe.base.types import F64
from edgemoe.base.work import key_of, path_of
from edgemoe.ir import Domain, Model, Stats, is_stack, tensor_name
from edgemoe.model.routing.kept_sets import COLD_TOKENS

MAX_HEADER = 4 * 2**20  # bytes; two tensors for each of a thousand matrices take 0.2 MiB
NUMBERS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}  # GGUF value types (gguf.h)
STRING, ARRAY = 8, 9
GGML_F32 = 0  # ggml type
MAX_DIMS = 4  # GGML_MAX_DIMS
STACK_ARRAYS = {"ffn_norm": "expert_in_sq", "expert_hidden": "expert_mid_sq"}  # of Stats, by what the experts' stacks read


@dataclass(frozen=True, slots=True, kw_only=True)
class Entry:
    """Place of the sums [matrices, columns] and counts [matrices] of one matrix or stack in the file, in bytes from its start."""

    shape: tuple[int, int]
    sums_at: int
    counts_at: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Imatrix:
    """The header of an imatrix file, checked against a model; arrays are read when a caller asks for them."""

    path: Path
    datasets: tuple[str, ...]
    entries: Mapping[str, Entry]  # by name of the matrix, as llama.cpp spells it

    def arrays(self, name: str) -> tuple[F64, F64]:
        """Sums of x^2 [matrices, columns] and counts [matrices] of one matrix or stack.

        Raises:
            ModelError: a value that no sum of squares and no count can have.
        """
        entry = self.entries[name]
        sums = self._read(f"{name}.in_sum2", entry.shape[0] * entry.shape[1], entry.sums_at).reshape(entry.shape)
        counts = self._read(f"{name}.counts", entry.shape[0], entry.counts_at)
        if (counts != np.rint(counts)).any():
            raise ModelError(f"{self.path}: {name}.counts holds {counts[counts != np.rint(counts)][0]}, which is not a count")
        return sums, counts

    def _read(self, name: str, n: int, offset: int) -> F64:
        values = np.fromfile(self.path, "<f4", n, offset=offset).astype(np.float64)
        if len(values) < n:
            raise ModelError(f"{self.path}: file ends inside {name}")
        if not (np.isfinite(values) & (values >= 0)).all():
            raise ModelError(f"{self.path}: {name} holds NaN, infinite or negative values", hint="make the file again")
        return values


def read_imatrix(path: Path, model: Model) -> Imatrix:
    """Open an imatrix file and check that it can be this model's.

    Raises:
        ModelError: it is no imatrix in GGUF, is damaged, or belongs to a model of other shapes; the message names the tensor.
    """
    header = _read_header(path)
    if header.values.get("general.type") != "imatrix":
        raise ModelError(
            f"{path}: general.type is {header.values.get('general.type')!r}, not 'imatrix'", hint="give what llama-imatrix made"
        )
    entries = {}
    for name, (shape, at) in header.tensors.items():
        base = name.removesuffix(".in_sum2")
        if base == name:
            continue
        counts = header.tensors.get(f"{base}.counts")
        if counts is None or counts[0] != (shape[0], 1):
            found = "is missing" if counts is None else f"has shape {list(counts[0])}, expected {[shape[0], 1]}"
            raise ModelError(f"{path}: {base + '.counts'!r} {found}")
        entries[base] = Entry(shape=shape, sums_at=at, counts_at=counts[1])
    _check_model(path, entries, model)
    datasets = header.values.get("imatrix.datasets", [])
    names = tuple(str(d) for d in datasets) if isinstance(datasets, list) else ()
    return Imatrix(path=path, datasets=names, entries=entries)


def _check_model(path: Path, entries: Mapping[str, Entry], model: Model) -> None:
    """Refuse a file whose matrices are not the model's."""
    expected: dict[str, tuple[int, int]] = {}
    for tensor in model.tensors:
        if tensor.planned or tensor.role == "ffn_gate_inp":
            expected[tensor_name(tensor.role, tensor.layer)] = (model.n_experts if tensor.expert >= 0 else 1, tensor.shape[1])
    for name, entry in entries.items():
        layer = re.match(r"blk\.(\d+)\.", name)
        if layer and int(layer[1][:9]) >= model.n_layers:
            raise ModelError(f"{path}: holds {name!r}, but {model.name} has {model.n_layers} layers", hint="is it of another model?")
        if name in expected and entry.shape != expected[name]:
            hint = "is it of another model? files converted from .dat have one count for all experts: make those again"
            raise ModelError(f"{path}: {name}.in_sum2 has shape {list(entry.shape)}, {model.name} needs {list(expected[name])}", hint=hint)
    for layer_number in range(model.n_layers):
        for roles in read_together(model, layer_number).values():
            if not any(tensor_name(role, layer_number) in entries for role in roles):
                name = tensor_name(roles[0], layer_number)
                raise ModelError(f"{path}: {name}.in_sum2 is missing", hint="is it of another model, or cut short?")


def read_together(model: Model, layer: int) -> dict[str, tuple[str, ...]]:
    """For each array of Stats, the roles of a layer's matrices that read this input; the sums of any of these roles can be used."""
    found: dict[str, tuple[str, ...]] = {}
    for step in model.steps(layer):
        plain, stacks = model.plain_roles(layer, step), tuple(role for role in step.roles if is_stack(role))
        found |= {f"in_sq.{step.reads}": plain} if plain else {}
        found |= {STACK_ARRAYS[step.reads]: stacks} if stacks else {}
    return found


# ----------------------------------------------------------------------------------------------------------------- header
@dataclass(frozen=True, slots=True)
class _Header:
    values: dict[str, Any]
    tensors: dict[str, tuple[tuple[int, int], int]]  # name -> ([rows, columns], first byte in the file)


class _Cursor:
    """Takes bytes from the front of a header, and refuses to take more than are left."""

    def __init__(self, data: bytes) -> None:
        self.data, self.at = data, 0

    def take(self, n: int) -> bytes:
        """The next n bytes."""
        if n > len(self.data) - self.at:
            raise ValueError(f"it ends at byte {len(self.data)}, or asks for more than {MAX_HEADER}")
        self.at += n
        return self.data[self.at - n : self.at]

    def number(self, kind: str) -> Any:
        """One number, by its letter in `struct`."""
        return struct.unpack(f"<{kind}", self.take(struct.calcsize(f"<{kind}")))[0]

    def text(self) -> str:
        """A string, after its length."""
        return self.take(self.number("Q")).decode("utf-8")

    def value(self) -> Any:
        """A value, after its type; every item of an array takes at least a byte, so no array has more items than the header has bytes."""
        kind = self.number("I")
        if kind != ARRAY:
            return self._item(kind)
        kind, n = self.number("I"), self.number("Q")
        if n > len(self.data):
            raise ValueError(f"an array claims {n} items")
        return [self._item(kind) for _ in range(n)]

    def _item(self, kind: int) -> Any:
        if kind == STRING:
            return self.text()
        if kind not in NUMBERS:
            raise ValueError(f"a value has type {kind}")
        return self.number(NUMBERS[kind])


def _read_header(path: Path) -> _Header:
    """Values and tensors of a GGUF file of F32 matrices.

    Raises:
        ModelError: the file is not GGUF, is damaged, or has other tensors.
    """
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            cursor = _Cursor(file.read(MAX_HEADER))
    except OSError as error:
        raise ModelError(f"{path}: cannot be read: {error.strerror}") from error
    if cursor.data[:4] != b"GGUF":
        hint = "a .dat file has no counts of single experts: make it again with `llama-imatrix -m MODEL -f TEXT -o FILE.gguf`"
        raise ModelError(f"{path}: is not a GGUF file", hint=hint)
    try:
        cursor.take(4)
        version, n_tensors, n_values = (cursor.number(kind) for kind in "IQQ")
        if version not in (2, 3):
            raise ValueError(f"GGUF version {version} is not supported")
        values: dict[str, Any] = {}
        for _ in range(n_values):
            name = cursor.text()
            values[name] = cursor.value()
        infos = list(_tensor_infos(cursor, n_tensors))
        alignment = values.get("general.alignment", 32)
        if not isinstance(alignment, int) or not 0 < alignment <= MAX_HEADER:
            raise ValueError(f"general.alignment is {alignment!r}")
    except (ValueError, struct.error) as error:
        raise ModelError(f"{path}: the header is malformed: {error}") from error
    start = -(-cursor.at // alignment) * alignment
    tensors: dict[str, tuple[tuple[int, int], int]] = {}
    for name, shape, offset in infos:
        if name in tensors:
            raise ModelError(f"{path}: {name!r} is there twice")
        if start + offset + 4 * shape[0] * shape[1] > size:
            raise ModelError(f"{path}: file ends at byte {size}, inside {name!r} of shape {list(shape)}", hint="copy or make it again")
        tensors[name] = shape, start + offset
    return _Header(values, tensors)


def _tensor_infos(cursor: _Cursor, n_tensors: int) -> Iterator[tuple[str, tuple[int, int], int]]:
    """Name, [rows, columns] and offset in the data of every tensor."""
    for _ in range(n_tensors):
        name, n_dims = cursor.text(), cursor.number("I")
        if not 1 <= n_dims <= MAX_DIMS:
            raise ValueError(f"{name!r} has {n_dims} dimensions")
        dims = [cursor.number("Q") for _ in range(n_dims)]
        kind, offset = cursor.number("I"), cursor.number("Q")
        if kind != GGML_F32 or any(n != 1 for n in dims[2:]):
            raise ValueError(f"{name!r} of type {kind} and dimensions {dims} is not an F32 matrix")
        yield name, (dims[1] if n_dims > 1 else 1, dims[0]), offset


# ------------------------------------------------------------------------------------------------------------------ Stats
def save_imported_stats(imatrix: Imatrix, model: Model, work: Path) -> Stats:
    """Write the part of Stats that an imatrix file holds, which is enough for `emit` and for `price_imported`.

    There is one domain, "imatrix", and no probe.  Sums are not weighted by gates.  The columns of the output matrix count alike if the file
    lacks this matrix (llama-imatrix without --process-output).

    Args:
        imatrix: from `read_imatrix` for this model.
        model: to which the file belongs.
        work: the result goes into a subfolder, named by a hash of the inputs.

    Raises:
        ModelError: the file holds an impossible value.
    """
    digest = hash_file(imatrix.path)
    key = key_of("imatrix", model.fingerprint, digest)
    folder = path_of(work, "stats", key)
    folder.mkdir(parents=True, exist_ok=True)
    cold: list[tuple[int, int]] = []
    tokens = 0
    for layer in range(model.n_layers):
        arrays = _layer_arrays(imatrix, model, layer)
        save_arrays(folder / array_file(layer), arrays)
        cold += [(layer, int(e)) for e in np.flatnonzero(arrays["count"][0] < COLD_TOKENS)] if "count" in arrays else []
        tokens = max(tokens, int(arrays["tokens"][0]))
    output = imatrix.arrays("output.weight") if "output.weight" in imatrix.entries else (np.ones((1, model.hidden_size)), np.ones(1))
    seen = np.ones((1, model.vocab_size), np.int64)  # the file does not say which tokens were read
    save_arrays(folder / array_file(-1), {"token_count": seen, "output_in_sq": output[0] / max(output[1][0], 1.0) * model.vocab_size})
    stats = Stats(
        folder=str(folder),
        model=model.fingerprint,
        key=key,
        settings={"imatrix": imatrix.path.name, "datasets": list(imatrix.datasets)},
        domains=(Domain(name="imatrix", weight=1.0, tokens=tokens, sha256=digest),),
        probes=(),
        cold=tuple(cold),
    )
    save_record(folder / "stats.json", stats)
    return stats


def _layer_arrays(imatrix: Imatrix, model: Model, layer: int) -> dict[str, NDArray[Any]]:
    """Arrays of Stats of one layer.  `expert_importance` is the number of routed tokens, as no gates weigh the sums."""
    found = {}
    for key, roles in read_together(model, layer).items():
        names = (tensor_name(role, layer) for role in roles)
        found[key] = imatrix.arrays(next(name for name in names if name in imatrix.entries))
    tokens = next(counts for key, (_, counts) in found.items() if key.startswith("in_sq."))
    count = found["expert_in_sq"][1] if "expert_in_sq" in found else tokens
    if not tokens[0] > 0 or not count.any():
        raise ModelError(f"{imatrix.path}: layer {layer} saw no token", hint="make the file again, with more text")

    def sums(key: str) -> F64:  # as if over the same tokens; files can be put together from runs that differ
        weight = tokens if key.startswith("in_sq.") else count
        return found[key][0] * (weight / np.maximum(found[key][1], 1.0))[:, None]

    arrays: dict[str, NDArray[Any]] = {"tokens": tokens, **{key: sums(key) for key in found}}
    if "expert_in_sq" in found:
        arrays |= {"count": count.astype(np.int64)[None], "expert_importance": count}
    return arrays
