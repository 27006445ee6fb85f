"""What a llama.cpp process holds beside the weights, in parts, from shapes alone (docs/decisions/0003-memory.md has the measurements).

A budget is promised for the defaults of `Settings`: no mmap (what is held cannot be given back), repacking on, KV in F16, flash attention,
ubatch 512, logits of the last token only.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

import numpy as np

from edgemoe.devices.profiles import Device
from edgemoe.ir import Costs, Model, Unit
from edgemoe.ir.memory import RETAINED, Settings, peak
from edgemoe.targets.gguf.compute_graph import compute_bytes, touched_bytes, work_bytes
from edgemoe.targets.gguf.formats import formats_of_rows, pad, row_bytes
from edgemoe.targets.gguf.kv_cache import cells_of, kv_bytes, output_bytes, state_bytes
from edgemoe.targets.gguf.repack import ANY_CPU, X86, held_twice_on, repacked_on

# Measured on two installations, docs/decisions/0003-memory.md
RUNTIME = 27 * 2**20  # bindings, libraries, tokenizer's tables, 2 threads: 24 MiB; 3 MiB for 20 threads more or another installation
PER_TOKEN = 270  # bytes of one vocabulary entry with its merge in llama.cpp's tables: 245
PER_CELL = 128  # bytes of one token's entry in the caches' tables: 123
PER_NODE = 1600  # bytes of one place for a graph's node, three times its tensor and the scheduler's tables: 1526 to 1603
TENSORS, LATENT_TENSORS = 12, 18  # of a layer, at most, in the families that are written and in DeepSeek's


def offered_formats(model: Model, unit: Unit) -> tuple[str, ...]:
    """Formats that can store a unit."""
    return formats_of_rows(unit.cols)


def unit_size(model: Model, unit: Unit, name: str, count: int) -> int:
    """Bytes of a tensor in the file, padded; of a stack with `count` experts."""
    n_weights = unit.n_weights * count // model.n_experts if unit.is_stack else unit.n_weights
    return pad(n_weights // unit.cols * row_bytes(name, unit.cols))


def unit_extra(model: Model, unit: Unit, name: str, count: int) -> int:
    """Bytes beyond the file's: the second copy of a tied embedding, in any format that some CPU repacks for the output's product."""
    if unit.role != "token_embd" or not model.is_tied:
        return 0
    return unit_size(model, unit, name, count) if _repacks(ANY_CPU, name, unit) else 0


def unit_staging(model: Model, unit: Unit, name: str, size: int) -> int:
    """Bytes of the copy that is made while a tensor is repacked.

    The output matrix is loaded before the layers, so its copy can only matter for what the C library retains of it.
    """
    return staged_bytes(is_repacked(name, unit.role, tied=model.is_tied), size, unit.role)


def staged_bytes(repacked: bool, size: int, role: str) -> int:
    """Bytes of the copy while a tensor of this size is repacked, if it is."""
    return 0 if not repacked or (role in ("token_embd", "output") and size > RETAINED) else size


def is_repacked(name: str, role: str, *, tied: bool) -> bool:
    """Whether llama.cpp keeps a copy of a tensor in an order that an x86 CPU's vectors like; an embedding only if it is the output too."""
    return name in X86 and (role != "token_embd" or tied)


def _repacks(repacked: Mapping[str, int], name: str, unit: Unit) -> bool:
    return name in repacked and unit.n_weights // unit.cols % repacked[name] == 0


def on_device(costs: Costs, device: Device) -> Costs:
    """The price list for one box: what is held twice or copied while loading there, not on some CPU.

    A tied embedding is held twice in every format where a GPU computes the output.
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
    """KV cache (with recurrent states), touched compute buffer, output buffer and runtime in bytes.

    Args:
        model: or its model.
        context: tokens, shared out among the sequences.
        settings: of the run, if they are not the default; their context is not looked at.

    Raises:
        UsageError: llama.cpp would refuse these settings.
    """
    settings = dataclasses.replace(settings, context=context) if settings else Settings(context=context)
    return {
        "kv": kv_bytes(model, settings) + state_bytes(model, settings),
        "compute": touched_bytes(model, settings) + work_bytes(model, settings),
        "output": output_bytes(model, settings),
        "runtime": _runtime(model, settings),
    }


def _runtime(model: Model, settings: Settings) -> int:
    """Bytes of the process without weights, caches and buffers."""
    tensors = len(model.caches) * (LATENT_TENSORS if model.attention.latent else TENSORS)
    nodes = max(1024, 8 * tensors)  # graph_max_nodes in llama-context.cpp
    cells = settings.sequences * cells_of(settings)
    return RUNTIME + PER_TOKEN * model.vocab_size + PER_CELL * cells + PER_NODE * nodes


def predict_peak(model: Model, settings: Settings, file_size: int, units: Sequence[tuple[str, str, int]]) -> int:
    """The most that a process holds which loads a file and decodes a full context.

    From a mapped file, what was repacked is held twice, and needs no staging; when all is loaded, the ends of the file that hold nothing
    but repacked tensors are unmapped.

    Args:
        model: of the model.
        settings: of the run.
        file_size: of the GGUF in bytes.
        units: (role, format, bytes) of its tensors, in file order.
    """
    tied = all(role != "output" for role, _, _ in units)
    repacked = [settings.repack and is_repacked(name, role, tied=tied) for role, name, _ in units]
    second = sum(size for (role, _, size), copied in zip(units, repacked, strict=True) if copied and role == "token_embd")
    parts = memory_parts(model, settings.context, settings)
    if not settings.mmap:
        staging = [staged_bytes(copied, size, role) for (role, _, size), copied in zip(units, repacked, strict=True)]
        retained = max((size for size in staging if size <= RETAINED), default=0)
        if parts["kv"] <= retained:  # then the cache is made where the last copies were
            retained -= parts["kv"]
        return peak({**parts, "weights": file_size + second, "staging": max(staging, default=0), "retained": retained})
    copies = sum(size for (_, _, size), copied in zip(units, repacked, strict=True) if copied)
    stays = [number for number, copied in enumerate(repacked) if not copied or units[number][0] == "token_embd"]
    ends = sum(size for number, (_, _, size) in enumerate(units) if not stays or not stays[0] <= number <= stays[-1])
    return max(peak({**parts, "weights": file_size - ends + copies, "staging": 0}), parts["runtime"] + file_size + copies)


def split_parts(
    model: Model, settings: Settings, *, experts: int, embedding: int, others: int, largest_stack: int
) -> dict[str, dict[str, int]]:
    """The parts in two pools when expert stacks stay in RAM and all else is in VRAM (`-ngl 99 --cpu-moe`).

    NOT verified on a GPU.  KV cache and states follow the attention into VRAM; the embedding is looked up on the CPU.  A GPU's buffers are
    held in full, so the whole compute buffer counts there, and with it a copy of one expert stack, because llama.cpp multiplies large
    batches on the GPU (`op_offload`).  The experts' intermediate results for small batches are in RAM.

    Args:
        model: of the model.
        settings: of the run.
        experts: bytes of all expert stacks.
        embedding: bytes of the embedding.
        others: bytes of all other tensors.
        largest_stack: bytes of the largest expert stack.
    """
    parts = memory_parts(model, settings.context, settings)
    outputs = 0 if settings.every_logit else settings.sequences
    on_device = {
        "weights": others,
        "kv": parts["kv"],
        "compute": compute_bytes(model, settings, outputs=0) + largest_stack,
    }
    in_ram = {
        "weights": experts + embedding,
        "compute": compute_bytes(model, settings, outputs=outputs) + work_bytes(model, settings),
        "output": parts["output"],
        "runtime": parts["runtime"],
    }
    return {"ram": in_ram, "vram": on_device}
