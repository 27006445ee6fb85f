"""This module turns llama.cpp's imatrix file into Stats that hold an importance matrix and how often every expert was chosen, nothing else.

The file (GGUF, `llama-imatrix`) has two F32 tensors for each matrix W.  `W.in_sum2` [matrices, columns] holds sums of x^2 over the tokens
that reached each matrix, not weighted by gates.  `W.counts` [matrices, 1] holds the number of these tokens.  The reader does not trust the
file, and reads only as many bytes of data as the model's own shapes need.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
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
from edgemoe.model.gguf_header import Entry as Tensor
from edgemoe.model.gguf_header import read_gguf_header
from edgemoe.model.routing.kept_sets import COLD_TOKENS

MAX_HEADER = 4 * 2**20  # bytes; two tensors for each of a thousand matrices take 0.2 MiB
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
    hint = "a .dat file has no counts of single experts: make it again with `llama-imatrix -m MODEL -f TEXT -o FILE.gguf`"
    header = read_gguf_header(path, MAX_HEADER, hint=hint)
    if header.values.get("general.type") != "imatrix":
        raise ModelError(
            f"{path}: general.type is {header.values.get('general.type')!r}, not 'imatrix'", hint="give what llama-imatrix made"
        )
    places = {name: (_matrix_shape(path, name, entry), entry.offset) for name, entry in header.tensors.items()}
    entries = {}
    for name, (shape, at) in places.items():
        base = name.removesuffix(".in_sum2")
        if base == name:
            continue
        counts = places.get(f"{base}.counts")
        if counts is None or counts[0] != (shape[0], 1):
            found = "is missing" if counts is None else f"has shape {list(counts[0])}, expected {[shape[0], 1]}"
            raise ModelError(f"{path}: {base + '.counts'!r} {found}")
        entries[base] = Entry(shape=shape, sums_at=at, counts_at=counts[1])
    _check_model(path, entries, model)
    datasets = header.values.get("imatrix.datasets", [])
    names = tuple(str(d) for d in datasets) if isinstance(datasets, list) else ()
    return Imatrix(path=path, datasets=names, entries=entries)


def _matrix_shape(path: Path, name: str, tensor: Tensor) -> tuple[int, int]:
    """Rows and columns of a tensor, which must be a matrix or a vector in F32.

    Raises:
        ModelError: it is not.
    """
    shape = tensor.shape[-2:] if len(tensor.shape) > 1 else (1, *tensor.shape)
    if tensor.kind != "F32" or any(n != 1 for n in tensor.shape[:-2]):
        raise ModelError(f"{path}: {name!r} of type {tensor.kind} and shape {list(tensor.shape)} is not an F32 matrix")
    return shape[0], shape[1]


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
