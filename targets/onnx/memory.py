"""What an ONNX Runtime process holds beside the file, in parts, from shapes alone (measured in docs/decisions/0008-onnx-memory.md).

A budget is promised for what child.py does: CPU, chunks of CHUNK tokens, one F32 cache that is past and present at once, up to THREADS
threads.  The file is mapped; kernels repack codes into memory of their own and let go of the mapped ones, so a weight is held once, but
for what the repacked form adds.
"""

from __future__ import annotations

from edgemoe.devices.profiles import Device
from edgemoe.ir import Costs, Model, Unit
from edgemoe.targets.onnx.child import CHUNK, THREADS
from edgemoe.targets.onnx.formats import FORMATS, piece_bytes

# Measured, docs/decisions/0008-onnx-memory.md
# Python, numpy, onnxruntime and an empty session: 61.6 MiB in one installation, 72.2 in another of the same files.  How much of the
# libraries is mapped beside what is touched depends on how the page cache holds them.
RUNTIME = 73 * 2**20
PER_LAYER = 360 * 2**10  # nodes of a layer with their kernels: 250 KiB, and 47 for each further format of its experts
PER_TOKEN = 64  # bytes of the context's tokens in the child's own lists
SUMS = 8  # bytes that a block adds when kernels of int8 inputs repack it: its scale again, and a sum
GROUPS = 4  # formats of a layer's experts that are counted on; more of them are rare
F32 = 4  # bytes


def memory_parts(model: Model, context: int) -> dict[str, int]:
    """KV cache (with recurrent states), intermediate results, logits and runtime in bytes.

    Args:
        model: or its model.
        context: tokens.
    """
    return {
        "kv": sum(F32 * (context * (cache.k + cache.v) + cache.state) for cache in model.caches),
        "compute": _compute(model, min(CHUNK, context)),
        "output": F32 * min(CHUNK, context) * model.vocab_size,
        "runtime": RUNTIME + PER_LAYER * len(model.caches) + PER_TOKEN * context,
    }


def _compute(model: Model, tokens: int) -> int:
    """Intermediate results of a chunk.

    The arena does not give attention's memory to the experts without gaps, so both are counted.  The expert operator holds for each thread
    an output and the rows of one expert, which all tokens may choose (moe_quantization_cpu.cc of onnxruntime 1.32); each further format of
    a layer is another operator, whose pieces have other sizes and leave gaps of about as much as one thread holds (measured).
    """
    cache = max(model.caches, key=lambda each: each.k + each.v)
    q = model.attention.heads * max(model.attention.key_length, model.attention.value_length)
    attention = 2 * model.hidden_size + 3 * q + 2 * (cache.k + cache.v)
    experts = 4 * model.hidden_size
    thread = 3 * model.hidden_size + 3 * max(model.expert.size, model.dense_size, model.shared_size)
    return F32 * tokens * (attention + experts + (THREADS + GROUPS - 1) * thread)


def unit_extra(model: Model, unit: Unit, name: str, count: int) -> int:
    """Bytes that the process holds for a unit beyond the file's own; `count` does not matter here.

    Experts of 4 and 3 bits are multiplied in floats, everything else with int8 inputs (see formats.input_block).  An embedding that is the
    output matrix too stays mapped for look-ups, and is held a second time as the matrix product wants it.
    """
    kind = FORMATS[name]
    if unit.role == "token_embd" and not model.is_tied:
        return 0
    floats = not kind.block or (unit.expert >= 0 and kind.bits in (3, 4))
    sums = 0 if floats else SUMS * unit.n_weights // kind.block
    return sums + (piece_bytes(name, model.vocab_size, model.hidden_size)["codes"] if unit.role == "token_embd" else 0)


def unit_staging(model: Model, unit: Unit, name: str, size: int) -> int:
    """Bytes of the copy while loading: none; a mapped original goes before the next one is repacked, and what comes later is more."""
    return 0


def on_device(costs: Costs, device: Device) -> Costs:
    """The price list as it is: what onnxruntime holds does not depend on the box."""
    return costs
