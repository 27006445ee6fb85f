"""This module writes a plan's safetensors for mlx_lm, in file order, with one expert stack in memory at a time.

The headers take the same bytes whatever the plan: room is counted for the longest entry of every tensor, and spaces at the end of the last
header fill it.  So the planner knows the bytes of all shards before anything is written.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgemoe.base.errors import ModelError, UsageError
from edgemoe.base.progress import Progress
from edgemoe.base.threads import count_cores
from edgemoe.ir import Artifact, Model, Plan, Stats, Tensor
from edgemoe.model.checkpoint import read_packed, read_tensor
from edgemoe.quantize.importance import importance_of
from edgemoe.targets import write_whole
from edgemoe.targets.copied_files import dump_json, read_copied
from edgemoe.targets.mlx.config import make_config, make_index
from edgemoe.targets.mlx.formats import FORMATS, HALF_BYTES, quantize_parallel, row_bytes, split_rows, to_half
from edgemoe.targets.mlx.names import module_of, tensor_names
from edgemoe.targets.stacks import list_units

SHARD = 5 * 2**30  # bytes of a file, as mlx_lm splits
PER_EXPERT = ("ffn_gate_inp", "exp_probs_b.bias")  # a row or number for each expert
WIDE = ("exp_probs_b.bias",)  # stay float32, as in mlx_lm's own conversions; no activation takes their type
CODES = {"f16": "F16", "bf16": "BF16"}  # of safetensors
METADATA = {"format": "mlx"}
LONGEST = 10**15  # bytes; no offset has more digits
WORD = 4  # bytes of the words that hold codes


@dataclass(frozen=True, slots=True, kw_only=True)
class Entry:
    """A tensor of the file."""

    name: str
    dtype: str  # U32, F32, F16, BF16
    shape: tuple[int, ...]

    @property
    def size(self) -> int:
        """Bytes."""
        return math.prod(self.shape) * (HALF_BYTES if self.dtype in CODES.values() else WORD)


# ------------------------------------------------------------------------------------------------------------------ sizes
def fixed_sizes(model: Model, counts: Sequence[int]) -> list[int]:
    """Bytes of headers, norms and routers for each kept count."""
    plain, room = [t for t in model.tensors if not t.planned], _header_room(model)
    return [room + sum(_plain_entry(model, t, "name", count, "f16").size for t in plain) for count in counts]


def least_shard(model: Model, sizes: Mapping[str, int]) -> tuple[int, str]:
    """Bytes of the largest file that no split can avoid, a module and its header, for units of these bytes; and the unit's name."""
    size, name = max((size, name) for name, size in sizes.items())
    return size + _header_room(model), name


def _header_room(model: Model) -> int:
    """Bytes of all headers together."""
    names = tensor_names(model)
    units = {(unit.role, unit.layer): unit for unit in list_units(model)}
    entries: list[Entry] = []
    most = 0
    for tensor in _groups(model):
        unit, name = units.get((tensor.role, tensor.layer)), names[tensor.role, tensor.layer]
        if unit is None:
            entries.append(_plain_entry(model, tensor, name, model.n_experts, "bf16"))
            most += entries[-1].size
        else:
            entries += [Entry(name=f"{module_of(name)}.{part}", dtype="BF16", shape=_shape(model, tensor)) for part in _PARTS]
            most += max(unit.n_weights // unit.cols * row_bytes(kind, unit.cols) for kind in FORMATS if _divides(kind, unit.cols))
    shards = 1 + 2 * (most // SHARD)  # a shard and the one after it hold more than SHARD together
    whole = len(_header([(entry, LONGEST) for entry in entries]))
    return whole + shards * (len(_header([])) + WORD * 4)


_PARTS = ("weight", "scales", "biases")


def _divides(kind: str, cols: int) -> bool:
    return not FORMATS[kind].group or cols % FORMATS[kind].group == 0


def _header(entries: Sequence[tuple[Entry, int]], room: int = 0) -> bytes:
    """A header of these tensors at these offsets, with its length before it, and spaces at the end: a multiple of 8, at least `room`."""
    told: dict[str, Any] = {"__metadata__": METADATA}
    for entry, offset in entries:
        told[entry.name] = {"dtype": entry.dtype, "shape": list(entry.shape), "data_offsets": [offset, offset + entry.size]}
    text = json.dumps(told, separators=(",", ":")).encode()
    text = text.ljust(max(-(-len(text) // 8) * 8, room - 8))
    return len(text).to_bytes(8, "little") + text


def _shape(model: Model, tensor: Tensor) -> tuple[int, ...]:
    return (model.n_experts, *tensor.shape) if tensor.expert >= 0 else tensor.shape


def _plain_entry(model: Model, tensor: Tensor, name: str, count: int, dtype: str) -> Entry:
    """A tensor without a format: rows of dropped experts are left out."""
    shape = (count, *tensor.shape[1:]) if tensor.role in PER_EXPERT else tensor.shape
    if tensor.role == "ffn_gate_inp_shexp":
        shape = (1, *tensor.shape)
    return Entry(name=name, dtype="F32" if tensor.role in WIDE else CODES[dtype], shape=shape)


def _groups(model: Model) -> list[Tensor]:
    """The tensors in file order, of each stack the first expert's."""
    return [tensor for tensor in model.tensors if tensor.expert <= 0]


# ---------------------------------------------------------------------------------------------------------------- writing
def write(
    model: Model, stats: Stats, plan: Plan, folder: Path, shard_max: int = 0, progress: Progress | None = None, *, dtype: str
) -> Artifact:
    """Write the plan's shards, config.json and the copied files into `folder`; files get their names only when complete.

    Args:
        model: whose weights are stored.
        stats: the importance of columns.
        plan: says which experts stay, and in which formats.
        folder: must exist.
        shard_max: most bytes of a file, with its header (0: 5 GiB, as mlx_lm splits).
        progress: called with (bytes written, all bytes).
        dtype: of all floats, "f16" or "bf16".

    Raises:
        ModelError: a shard is damaged or holds NaN, or the plan keeps more experts in some layers than in others.
        MachineError: the disk is full or not writable.
        UsageError: another file of weights is in `folder`.
    """
    if not plan.has_one_count:
        raise ModelError("the plan keeps different numbers of experts in different layers: mlx_lm has one count", hint="make another plan")
    modules = list(_modules(model, plan, dtype))
    room = _header_room(model)
    shards = _split(modules, (shard_max or SHARD) - (room if shard_max else 0))
    names = ["model.safetensors"] if len(shards) == 1 else [f"model-{i + 1:05}-of-{len(shards):05}.safetensors" for i in range(len(shards))]
    total = sum(entry.size for _, entries in modules for entry in entries)
    if strays := sorted({path.name for path in folder.glob("model*.safetensors")} - set(names)):
        raise UsageError(f"{folder / strays[0]}: is there, and mlx would load it as well", hint="move it away, and go on")

    def fill(scratch: Path) -> list[str]:
        contents, written, spent = _contents(model, stats, plan, dtype), 0, 0
        for number, (name, shard) in enumerate(zip(names, shards, strict=True)):
            entries = [entry for _, entries in shard for entry in entries]
            offsets = np.cumsum([0, *(entry.size for entry in entries)]).tolist()
            header = _header(list(zip(entries, offsets, strict=False)), room - spent if number == len(shards) - 1 else 0)
            spent += len(header)
            with (scratch / name).open("wb") as file:
                file.write(header)
                for _ in shard:
                    for values in next(contents):
                        file.write(np.ascontiguousarray(values).reshape(-1).view(np.uint8).data)
                        written += values.nbytes
                        if progress:
                            progress(written, total)
        places = {entry.name: name for name, shard in zip(names, shards, strict=True) for _, entries in shard for entry in entries}
        small = read_copied(Path(model.folder))
        small["config.json"] = dump_json(make_config(model, stats, plan, dtype))
        small["model.safetensors.index.json"] = dump_json(make_index(places, total, _count_weights(model, plan)))
        for name, data in small.items():
            (scratch / name).write_bytes(data)
        return [*names, *sorted(small)]

    return write_whole(folder, plan, fill)


def _count_weights(model: Model, plan: Plan) -> int:
    kept = plan.kept_of
    return sum(t.n_weights for t in model.tensors if t.expert < 0 or t.expert in kept[t.layer])


def _modules(model: Model, plan: Plan, dtype: str) -> Iterator[tuple[Tensor, list[Entry]]]:
    """Every module's tensors, in file order."""
    names = tensor_names(model)
    kinds = {(unit.role, unit.layer): plan.formats[unit.name] for unit in plan.units}
    for tensor in _groups(model):
        name = names[tensor.role, tensor.layer]
        if not tensor.planned:
            yield tensor, [_plain_entry(model, tensor, name, plan.count, dtype)]
            continue
        kind = FORMATS[kinds[tensor.role, tensor.layer]]
        lead, cols = (*((plan.count,) if tensor.expert >= 0 else ()), tensor.shape[0]), tensor.shape[1]
        if not kind.group:
            yield tensor, [Entry(name=name, dtype=CODES[dtype], shape=(*lead, cols))]
            continue
        module, halves = module_of(name), (*lead, cols // kind.group)
        weight = Entry(name=f"{module}.weight", dtype="U32", shape=(*lead, cols * kind.bits // (8 * WORD)))
        yield tensor, [weight, *(Entry(name=f"{module}.{part}", dtype=CODES[dtype], shape=halves) for part in _PARTS[1:])]


def _split(modules: Sequence[tuple[Tensor, list[Entry]]], most: int) -> list[list[tuple[Tensor, list[Entry]]]]:
    """Modules by file: the next file begins where a module would not fit."""
    shards: list[list[tuple[Tensor, list[Entry]]]] = [[]]
    filled = 0
    for module in modules:
        size = sum(entry.size for entry in module[1])
        if shards[-1] and filled + size > most:
            shards.append([])
            filled = 0
        shards[-1].append(module)
        filled += size
    return shards


def _contents(model: Model, stats: Stats, plan: Plan, dtype: str) -> Iterator[list[NDArray[Any]]]:
    """Every module's arrays, in file order."""
    layer, importance, kept_of = -2, {}, plan.kept_of
    kinds = {(unit.role, unit.layer): plan.formats[unit.name] for unit in plan.units}
    with ThreadPoolExecutor(count_cores()) as pool:
        for first in _groups(model):
            if first.layer != layer:
                layer, importance = first.layer, importance_of(model, stats, first.layer)
            if not first.planned:
                values = read_tensor(model.folder, first)
                values = values[list(kept_of[layer])] if first.role in PER_EXPERT else values
                values = _above_zero(values) if first.role in WIDE and model.router.groups > 1 else values
                yield [values if first.role in WIDE else _checked_half(model, first, values, dtype)]
                continue
            kind, cols = kinds[first.role, first.layer], first.shape[1]
            rows: list[NDArray[np.uint8]] = []
            for e in kept_of[layer] if first.expert >= 0 else (-1,):  # one expert is in float32 at a time, and the packed stack grows
                tensor = model.get(first.role, layer, e)
                if tensor.packed == kind:
                    rows.append(read_packed(model.folder, tensor, row_bytes(kind, cols)))
                else:
                    rows.append(quantize_parallel(read_tensor(model.folder, tensor), kind, importance.get((tensor.role, e)), dtype, pool))
            parts = split_rows(np.concatenate(rows), kind, cols, dtype)
            yield [parts.codes, *(part for part in (parts.scales, parts.offsets) if part is not None)]


def _above_zero(bias: NDArray[np.float32]) -> NDArray[np.float32]:
    """A bias of the choice of experts, moved so that no score with it is negative.

    mlx_lm gives experts of groups that were not chosen the score 0, where transformers leaves them out.  Scores are sigmoids, and a
    constant that is added to all of them changes no choice.
    """
    moved: NDArray[np.float32] = bias - np.minimum(bias.min(), np.float32(0))
    return moved


def _checked_half(model: Model, tensor: Tensor, values: NDArray[np.float32], dtype: str) -> NDArray[Any]:
    """Values as 16-bit floats.

    Raises:
        ModelError: float16 cannot hold one of them.
    """
    found = to_half(values, dtype)
    if not np.isfinite(found.astype(np.float32)).all():
        raise ModelError(f"{model.folder}: {tensor.name} holds a number that float16 cannot", hint="give --dtype bf16")
    return found
