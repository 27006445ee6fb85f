"""Bytes that a llama.cpp process holds, from shapes alone (docs/decisions/0003-memory.md has the measurements).

Settings: no mmap (what is held cannot be given back), repacking on, KV in F16, flash attention as llama.cpp chooses, ubatch 512.
"""

from __future__ import annotations

from edgemoe.ir import Model, Unit
from edgemoe.memory import RETAINED
from edgemoe.targets.gguf.formats import FORMATS, pad, row_bytes

UBATCH = 512
RUNTIME = 29 * 2**20  # a process that has loaded llama.cpp and no model, with the loader's and the graph's own memory
PER_TOKEN = 400  # bytes of one vocabulary entry in llama.cpp's tables


def unit_size(unit: Unit, cols: int, name: str, n_weights: int) -> int:
    """Bytes of a tensor in the file, padded."""
    return pad(n_weights // cols * row_bytes(name, cols))


def unit_staging(size: int, name: str, role: str) -> int:
    """Bytes of the copy that is made while a tensor is repacked.

    The embedding is only looked up, never repacked; the output matrix is loaded before the layers, so its copy can only matter for what the
    C library retains of it.
    """
    if not FORMATS[name].repacked or role == "token_embd" or (role == "output" and size > RETAINED):
        return 0
    return size


def memory_parts(model: Model, context: int) -> dict[str, int]:
    """KV cache, touched compute buffer, output buffer and runtime in bytes, for one sequence of `context` tokens."""
    cells = -(-context // 256) * 256
    kv = model.n_layers * cells * 2 * model.n_kv_heads * model.head_dim * 2
    rows = min(UBATCH, context)
    hidden, heads = model.hidden_size, model.n_heads * model.head_dim
    expert = model.top_k * (2 * model.expert_size + 2 * hidden)
    # what decoding touches; logits of a whole batch are reserved too (vocab x 512 x 4 bytes) but only the last row is ever written
    compute = 4 * rows * max(expert + 3 * hidden, 4 * heads + 3 * hidden) + 3 * rows * cells
    return {"kv": kv, "compute": compute, "output": 4 * model.vocab_size, "runtime": RUNTIME + PER_TOKEN * model.vocab_size}
