"""imatrix files: one by llama-imatrix, and others as it writes them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gguf
import numpy as np
from command import MODEL
from numpy.typing import NDArray

from edgemoe.ir import Model

REAL, OTHER = MODEL / "imatrix.gguf", MODEL.parent / "tiny-moe"  # by llama-imatrix of llama.cpp 0c1e570
Entries = dict[str, tuple[NDArray[Any], NDArray[Any]]]  # name -> sums [matrices, columns], counts [matrices]


def entries_of(model: Model, seed: int = 0) -> Entries:
    """What llama-imatrix would store: dense matrices with one count, stacks with one for each expert, the router too."""
    generator = np.random.default_rng(seed)
    tokens, entries = 4000, {}
    for layer in range(model.n_layers):
        shares = generator.dirichlet(np.full(model.n_experts, 2.0))
        count = np.floor(shares * tokens * model.top_k)
        for role, cols in (
            ("attn_q", model.hidden_size),
            ("attn_output", model.attention.heads * model.attention.key_length),
            ("ffn_gate_inp", model.hidden_size),
        ):
            entries[f"blk.{layer}.{role}.weight"] = generator.exponential(tokens, (1, cols)), np.array([tokens])
        inside = generator.exponential(size=(model.n_experts, model.hidden_size)) * count[:, None]
        for role in ("gate", "up"):
            entries[f"blk.{layer}.ffn_{role}_exps.weight"] = inside, count
        entries[f"blk.{layer}.ffn_down_exps.weight"] = (
            generator.exponential(size=(model.n_experts, model.expert.size)) * count[:, None],
            count,
        )
    return entries


def write(path: Path, entries: Entries, *, kind: str = "imatrix", extra: dict[str, NDArray[Any]] | None = None) -> Path:
    """The file as IMatrixCollector::save_imatrix writes it (tools/imatrix/imatrix.cpp)."""
    writer = gguf.GGUFWriter(path, "none")
    del writer.kv_data[0]["general.architecture"]
    writer.add_type(kind)
    writer.add_array("imatrix.datasets", ["some.txt"])
    writer.add_uint32("imatrix.chunk_count", 8)
    writer.add_uint32("imatrix.chunk_size", 512)
    for name, (sums, counts) in sorted(entries.items()):
        writer.add_tensor(f"{name}.in_sum2", np.asarray(sums, np.float32))
        writer.add_tensor(f"{name}.counts", np.asarray(counts, np.float32)[:, None])
    for name, values in (extra or {}).items():
        writer.add_tensor(name, values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path
