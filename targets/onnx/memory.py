"""This module predicts the bytes that an ONNX Runtime process holds beside the file (docs/decisions/0008-onnx-memory.md).

The prediction needs shapes alone.  The promise holds for a process that works as child.py does: on the CPU, in chunks of CHUNK tokens, with
one F32 cache as past and present, and with up to THREADS threads.  The file is mapped.  Kernels repack codes into memory of their own and
release the mapped ones, so a weight is held once, plus the bytes that its repacked form adds.
"""

from __future__ import annotations

from edgemoe.devices.profiles import Device
from edgemoe.ir import Costs, Model, Unit
from edgemoe.targets.onnx.child import CHUNK, THREADS
from edgemoe.targets.onnx.formats import FORMATS, piece_bytes

# The constants were measured (docs/decisions/0008-onnx-memory.md).
# Python, numpy, onnxruntime and an empty session take 61.6 MiB in one installation and 72.2 in another of the same files.  The number of
# untouched library pages that are mapped as well depends on the pieces in which the page cache holds them.
RUNTIME = 73 * 2**20
PER_LAYER = 360 * 2**10  # nodes of a layer with their kernels: 250 KiB, and 47 for each further format of its experts
PER_TOKEN = 64  # bytes of the context's tokens in the child's own lists
SUMS = 8  # bytes that a block adds when kernels of int8 inputs repack it, for a second copy of its scale and a sum
GROUPS = 4  # formats of a layer's experts that the prediction assumes; more are rare
F32 = 4  # bytes


def memory_parts(model: Model, context: int) -> dict[str, int]:
    """KV cache (with recurrent states), intermediate results, logits and runtime in bytes.

    Args:
        model: the shapes.
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

    The arena leaves gaps when it gives attention's memory to the experts, so both are counted.  The expert operator holds for each thread
    an output and the rows of one expert, which all tokens may choose (moe_quantization_cpu.cc of onnxruntime 1.32).  Each further format of
    a layer is another operator, whose pieces have other sizes and leave gaps of about the memory of one thread (measured).
    """
    cache = max(model.caches, key=lambda each: each.k + each.v)
    q = model.attention.heads * max(model.attention.key_length, model.attention.value_length)
    attention = 2 * model.hidden_size + 3 * q + 2 * (cache.k + cache.v)
    experts = 4 * model.hidden_size
    thread = 3 * model.hidden_size + 3 * max(model.expert.size, model.dense_size, model.shared_size)
    return F32 * tokens * (attention + experts + (THREADS + GROUPS - 1) * thread)


def unit_extra(model: Model, unit: Unit, name: str, count: int) -> int:
    """Bytes that the process holds for a unit beyond the file's own; `count` does not matter here.

    Experts of 4 and 3 bits are multiplied in floats, and all other matrices with int8 inputs (see formats.input_block).  A tied embedding
    stays mapped for look-ups, and is held a second time in the order that the matrix product needs.
    """
    kind = FORMATS[name]
    if unit.role == "token_embd" and not model.is_tied:
        return 0
    floats = not kind.block or (unit.expert >= 0 and kind.bits in (3, 4))
    sums = 0 if floats else SUMS * unit.n_weights // kind.block
    return sums + (piece_bytes(name, model.vocab_size, model.hidden_size)["codes"] if unit.role == "token_embd" else 0)


def unit_staging(model: Model, unit: Unit, name: str, size: int) -> int:
    """Bytes of the staging copy: 0, because a mapped original is released before the next is repacked, and the run takes more later."""
    return 0


def on_device(costs: Costs, device: Device) -> Costs:
    """The price list unchanged, because the bytes that onnxruntime holds do not depend on the box."""
    return costs
