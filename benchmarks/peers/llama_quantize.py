"""llama-quantize makes a peer's file from one in F16, with our importance matrix."""

from __future__ import annotations

import ctypes
from pathlib import Path

import llama_cpp as lc
import numpy as np

from edgemoe.ir import Model, Stats, tensor_name
from edgemoe.quantize.importance import importance_of
from edgemoe.targets.gguf.formats import floor_importance
from peers.recipes import Kept


def imatrix_entries(model: Model, stats: Stats, kept: Kept) -> dict[str, np.ndarray]:
    """Importance by tensor name, experts in the order of the file."""
    entries: dict[str, np.ndarray] = {}
    for layer in range(-1, model.n_layers):
        found = importance_of(model, stats, layer)
        for role in {role for role, _ in found}:
            experts = [-1] if (role, -1) in found else kept[layer]
            entries[tensor_name(role, layer)] = np.concatenate([floor_importance(found[role, e]) for e in experts])
    return entries


@lc.llama_log_callback
def _silence(level: int, text: bytes, data: object) -> None:
    """llama-quantize tells a line of each tensor."""


def llama_quantize(source: Path, out: Path, mix: str, entries: dict[str, np.ndarray]) -> Path:
    """llama-quantize with an importance matrix."""
    lc.llama_log_set(_silence, ctypes.c_void_p(0))
    params = lc.llama_model_quantize_default_params()
    params.ftype = getattr(lc, f"LLAMA_FTYPE_MOSTLY_{mix}")
    params.nthread = 2
    array = (lc.llama_model_imatrix_data * (len(entries) + 1))()
    for slot, (name, values) in zip(array, sorted(entries.items()), strict=False):
        slot.name, slot.size = name.encode(), values.size
        slot.data = values.ctypes.data_as(ctypes.POINTER(ctypes.c_float))
    params.imatrix = ctypes.cast(array, ctypes.POINTER(lc.llama_model_imatrix_data))
    if lc.llama_model_quantize(str(source).encode(), str(out).encode(), ctypes.byref(params)) != 0:
        raise SystemExit(f"llama-quantize failed for {mix}")
    return out
