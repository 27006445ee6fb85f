"""This module counts the bytes of weights in a GGUF and in a process of llama.cpp, and predicts the process's other bytes.

It needs shapes alone (docs/decisions/0003-memory.md).  Without `settings`, the prediction is for their defaults: no mmap (so all memory
is held and cannot be reclaimed), repacking on, KV in F16, flash attention, ubatch 512, and logits of the last token only.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import numpy as np

from edgemoe.devices.profiles import Device
from edgemoe.ir import Costs, Model, Unit
from edgemoe.ir.memory import RETAINED, Settings
from edgemoe.targets.gguf.compute_graph import touched_bytes, work_bytes
from edgemoe.targets.gguf.formats import FORMATS, formats_of_rows, pad, row_bytes
from edgemoe.targets.gguf.kv_cache import cells_of, kv_bytes, output_bytes, state_bytes
from edgemoe.targets.gguf.repack import ANY_CPU, X86, held_twice_on, repacked_on
from edgemoe.targets.gguf.reserved import ask_llama, most_nodes

# The constants were measured on two installations (docs/decisions/0003-memory.md).
# Bindings, libraries, tokenizer's tables and 2 threads took 24 MiB; 16 threads took 26 MiB, and another installation 27 MiB.
RUNTIME = 27 * 2**20
PER_TOKEN = 270  # bytes of one vocabulary entry with its merge in llama.cpp's tables (245 measured)
PER_CELL = 128  # bytes of one token's entry in the caches' tables (123 measured)
PER_NODE = 1600  # bytes of one place for a graph's node: three times its tensor, and the scheduler's tables (1526 to 1603 measured)


def offered_formats(model: Model, unit: Unit) -> tuple[str, ...]:
    """Formats that can store a unit; of a GGUF's tensor, the type that it has and those with fewer bits."""
    formats = formats_of_rows(unit.cols)
    if not model.architecture:
        return formats
    own = model.get(unit.role, unit.layer, 0 if unit.is_stack else -1).dtype
    return (own, *(name for name in formats if name != own and FORMATS[name].bpw < FORMATS[own].bpw))


def unit_size(model: Model, unit: Unit, name: str, count: int) -> int:
    """Bytes of a tensor in the file, with padding; a stack has `count` experts."""
    n_weights = unit.n_weights * count // model.n_experts if unit.is_stack else unit.n_weights
    return pad(n_weights // unit.cols * row_bytes(name, unit.cols))


def unit_extra(model: Model, unit: Unit, name: str, count: int) -> int:
    """Bytes beyond the file's: the second copy of a tied embedding, if some CPU repacks its format for the product that gives logits."""
    if unit.role != "token_embd" or not model.is_tied:
        return 0
    return unit_size(model, unit, name, count) if _repacks(ANY_CPU, name, unit) else 0


def unit_staging(model: Model, unit: Unit, name: str, size: int) -> int:
    """Bytes of the copy that is made while a tensor is repacked.

    The output matrix is loaded before the layers.  Its copy is freed before they take memory, so it raises the peak only if the C library
    keeps it, which it does up to 32 MiB.
    """
    return staged_bytes(is_repacked(name, unit.role, tied=model.is_tied), size, unit.role)


def staged_bytes(repacked: bool, size: int, role: str) -> int:
    """Bytes of the copy that repacking a tensor of this size makes.

    They are 0 if the tensor is not repacked, or if it is an embedding or output matrix of more than 32 MiB.
    """
    return 0 if not repacked or (role in ("token_embd", "output") and size > RETAINED) else size


def is_repacked(name: str, role: str, *, tied: bool) -> bool:
    """Whether llama.cpp repacks a tensor for the vector instructions of an x86 CPU; an embedding is repacked only if it is tied."""
    return name in X86 and (role != "token_embd" or tied)


def _repacks(repacked: Mapping[str, int], name: str, unit: Unit) -> bool:
    return name in repacked and unit.n_weights // unit.cols % repacked[name] == 0


def on_device(costs: Costs, device: Device) -> Costs:
    """The price list for one box, with the bytes that this box's processor holds twice, or copies while it loads a file.

    `costs` as given counts a second copy wherever an x86 or an ARM CPU would hold one, and the copies that an x86 CPU makes. If a GPU
    computes the product that gives the logits, a tied embedding is held twice in every format.
    """
    tied = all(unit.role != "output" for unit in costs.units)
    twice, repacked = held_twice_on(device), repacked_on(device)
    extra, staging = np.zeros_like(costs.extra), np.zeros_like(costs.staging)
    for u, unit in enumerate(costs.units):
        for f, name in enumerate(costs.formats):
            if unit.role == "token_embd" and tied and _repacks(twice, name, unit):
                extra[:, u, f] = costs.size[:, u, f]
            for c, size in enumerate(costs.size[:, u, f].tolist()):
                staging[c, u, f] = staged_bytes(name in repacked and (unit.role != "token_embd" or tied), size, unit.role)
    return dataclasses.replace(costs, extra=extra, staging=staging)


def memory_parts(model: Model, context: int, settings: Settings | None = None) -> dict[str, int]:
    """KV cache (with recurrent states), compute buffers, output buffer and runtime in bytes; of a GGUF's model as llama.cpp says.

    "compute" is the touched part of llama.cpp's compute buffer, which decoding writes and the process therefore holds, and all of ggml's
    work buffer.

    Args:
        model: the shapes.
        context: tokens, which the sequences share.
        settings: of the run, if they are not the default; their context is ignored.

    Raises:
        UsageError: llama.cpp would refuse these settings.
    """
    settings = dataclasses.replace(settings, context=context) if settings else Settings(context=context)
    if model.architecture:
        asked, output = ask_llama(model, settings), output_bytes(model, settings)
        return {"kv": asked.kv, "compute": asked.compute, "output": output, "runtime": _runtime(model, settings)}
    return {
        "kv": kv_bytes(model, settings) + state_bytes(model, settings),
        "compute": touched_bytes(model, settings) + work_bytes(model, settings),
        "output": output_bytes(model, settings),
        "runtime": _runtime(model, settings),
    }


def _runtime(model: Model, settings: Settings) -> int:
    """Bytes of the process without weights, caches and buffers."""
    cells = settings.sequences * cells_of(settings)
    return RUNTIME + PER_TOKEN * model.vocab_size + PER_CELL * cells + PER_NODE * most_nodes(model, settings)
