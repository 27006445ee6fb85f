"""This module lays files of new weights over a Model: a pass over the layers leaves one file per layer, and tensors point into them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from edgemoe.base.errors import ModelError
from edgemoe.base.storage import array_file, check_arrays, load_record, save_record
from edgemoe.ir import Model, Tensor
from edgemoe.model.checkpoint import DTYPES, PACKED, read_header

Formats = Mapping[tuple[str, int, int], str]  # of packed matrices, by (role, layer, expert); expert -1 for a matrix or a whole stack


def save_overlay(base: Model, work: Path, formats: Formats) -> Model:
    """The record of `base`, in which tensors from files of `work` replace its own; it is saved as work/model.json."""
    made = replace(base, tensors=_overlay(base, work, formats))
    save_record(work / "model.json", made)
    for scratch in work.glob("*.bin"):
        scratch.unlink()
    return made


def open_overlay(base: Model, work: Path, formats: Formats) -> Model | None:
    """The record that `save_overlay` saved, or None if there is none.

    Raises:
        ModelError: the record belongs to another checkpoint, or its files were changed or damaged.
    """
    path = work / "model.json"
    if not path.exists():
        return None
    saved = load_record(path, Model)
    if saved.fingerprint != base.fingerprint:
        raise ModelError(f"{path}: was made from another checkpoint than {base.folder}", hint=f"delete {work}")
    tensors = _overlay(base, work, formats)  # wherever model and work folder lie now
    for old, fresh, found in zip(base.tensors, tensors, saved.tensors, strict=True):
        if (fresh.name, fresh.offset, fresh.dtype, fresh.packed) != (found.name, found.offset, found.dtype, found.packed):
            raise ModelError(f"{path}: {old.name} is not where the record says", hint=f"delete {work}")
    return replace(base, tensors=tensors)


def _overlay(base: Model, work: Path, formats: Formats) -> tuple[Tensor, ...]:
    """Every tensor: the new one, plain or packed, or the old one if no new one was made."""
    paths = {layer: work / array_file(layer) for layer in {t.layer for t in base.tensors}}
    headers = {layer: _read_sealed(path) for layer, path in paths.items() if path.exists()}
    return tuple(_overlay_tensor(t, paths[t.layer], headers.get(t.layer, {}), formats) for t in base.tensors)


def _read_sealed(path: Path) -> dict[str, tuple[str, tuple[int, ...], int, str]]:
    """The arrays of one of our files: name -> dtype, shape, offset, and the SHA-256 of the bytes, which are checked now."""
    seals = check_arrays(path)
    return {name: (*entry, seals[name].rpartition(" ")[2]) for name, entry in read_header(path, (*DTYPES, PACKED)).items()}


def _overlay_tensor(tensor: Tensor, path: Path, header: Mapping[str, tuple[str, tuple[int, ...], int, str]], formats: Formats) -> Tensor:
    found = header.get(_array_name(tensor))
    if found is None:
        return tensor
    dtype, shape, offset, sha256 = found
    if dtype == PACKED and shape[0] == tensor.shape[0]:
        place = (tensor.role, tensor.layer, tensor.expert)
        kind = formats[place if place in formats else (tensor.role, tensor.layer, -1)]
        return replace(tensor, packed=kind, file=str(path), offset=offset, sha256=sha256)
    if shape != tensor.shape:
        raise ModelError(
            f"{path}: {_array_name(tensor)} has shape {list(shape)}, expected {list(tensor.shape)}", hint=f"delete {path.parent}"
        )
    return replace(tensor, dtype=dtype, file=str(path), offset=offset, sha256=sha256)


def _array_name(tensor: Tensor) -> str:
    return f"{tensor.role}.{tensor.expert}"
