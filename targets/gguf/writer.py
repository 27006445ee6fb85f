"""This module writes a plan's GGUF by gguf-py's writer, in file order, with one expert stack in memory at a time.

Rows that are packed already, by repair and rounding with feedback, are copied.  Only what is not packed yet goes through ggml's quantizers.
The header's length does not depend on the plan, because the expert map has one flag per expert and hashes have a fixed length.  So the
planner knows the file's size to the byte before anything is written.
"""

from __future__ import annotations

import logging
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from edgemoe.base.errors import ModelError
from edgemoe.base.progress import Progress
from edgemoe.base.threads import count_cores
from edgemoe.ir import Artifact, Model, Plan, Stats, Tensor, Unit, tensor_name
from edgemoe.ir.model import bytes_of
from edgemoe.model.checkpoint import read_packed, read_tensor
from edgemoe.model.families import find_family
from edgemoe.quantize.importance import importance_of
from edgemoe.targets import write_whole
from edgemoe.targets.gguf.copied_keys import add_copied
from edgemoe.targets.gguf.formats import ALIGNMENT, pad, quantize_parallel, row_bytes
from edgemoe.targets.gguf.metadata import add_own_keys, add_provenance, add_shape
from edgemoe.targets.gguf.vocabulary import add_vocabulary, read_vocabulary
from edgemoe.targets.stacks import list_units

Packable = TypeVar("Packable", np.float32, np.uint8)
# File types (enum llama_ftype in llama.h) by the format that holds most bytes of a file; Q3_K, Q4_K and Q5_K have those of the M mixes.
FILE_TYPES = {
    "F32": 0,
    "F16": 1,
    "BF16": 32,
    "Q8_0": 7,
    "Q6_K": 18,
    "Q5_K": 17,
    "Q4_K": 15,
    "IQ4_XS": 30,
    "Q3_K": 12,
    "IQ3_S": 26,
    "IQ3_XXS": 23,
}
FILE_TYPES |= {"Q2_K": 10, "IQ2_S": 28, "IQ2_XS": 20, "IQ2_XXS": 19, "IQ1_M": 31, "IQ1_S": 24, "IQ4_NL": 25, "Q4_0": 2, "MXFP4": 38}
FILE_TYPES |= {"Q4_1": 3, "Q5_0": 8, "Q5_1": 9}

# These tensors keep their type and have a row or number for each expert.
_OF_EXPERTS = [f"ffn_{p}_exps.{part}" for p in ("gate", "up", "gate_up", "down") for part in ("bias", "scale", "input_scale")]
PER_EXPERT = ("ffn_gate_inp", "ffn_gate_inp.bias", "exp_probs_b.bias", "exp_probs_b_vl.bias", *_OF_EXPERTS)
# Bytes of header for each vocabulary entry (token, type, merges): 22 to 61 in the vocabularies that llama.cpp ships (llama-spm, llama-bpe).
HEADER_PER_ENTRY = 64
SPLIT_KEYS = 256  # bytes of the three keys that number the files of a split, and more


def fixed_sizes(model: Model, counts: Sequence[int]) -> list[int]:
    """Bytes of header, metadata, norms and routers for each kept count of the MoE layers."""
    header, fixed = header_size(model), [t for t in model.tensors if not t.planned]

    def size(tensor: Tensor, count: int) -> int:
        return pad(fixed_bytes(model, tensor) * (count if is_per_expert(model, tensor) else model.n_experts) // model.n_experts)

    return [header + sum(size(tensor, count) for tensor in fixed) for count in counts]


def is_per_expert(model: Model, tensor: Tensor) -> bool:
    """Whether a tensor has a row or number for each expert; other axes of the same length are none of experts."""
    return tensor.role in PER_EXPERT and tensor.shape[0] == model.n_experts


def fixed_bytes(model: Model, tensor: Tensor) -> int:
    """Bytes of a tensor without a format: F32, or as it is in a GGUF."""
    return tensor.n_bytes if model.architecture else 4 * tensor.n_weights


def header_size(model: Model) -> int:
    """Bytes before the first tensor, from writing the header; an estimate for a model of which only the shapes are known."""
    if not model.folder:
        return pad(HEADER_PER_ENTRY * model.vocab_size)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "header.gguf"
        writer = _open_writer(path, model, None, None, 0)
        _add_infos(writer, model, lambda unit: "F16", model.n_experts)
        _write_header(writer)
        writer.close()
        return pad(path.stat().st_size)


def least_shard(model: Model, sizes: Mapping[str, int]) -> tuple[int, str]:
    """Bytes of the largest file that no split can avoid, a tensor and its header, for units of these bytes; and the tensor's name."""
    fixed = {t.name: fixed_bytes(model, t) for t in model.tensors if not t.planned and not is_per_expert(model, t)}
    largest = max((size, name) for name, size in {**fixed, **sizes}.items())
    return largest[0] + _beside_data(model), largest[1]


def _beside_data(model: Model) -> int:
    """Bytes that a file of a split has beside its tensors: at most the whole header, the keys of the split, and the gaps."""
    return header_size(model) + SPLIT_KEYS + ALIGNMENT * len({(t.role, t.layer) for t in model.tensors})


def write(model: Model, stats: Stats, plan: Plan, folder: Path, shard_max: int = 0, progress: Progress | None = None) -> Artifact:
    """Write the plan's GGUF into `folder`; it appears under its own name only when complete.

    Args:
        model: whose weights are stored.
        stats: they hold the importance matrix.
        plan: says which experts stay, and in which formats.
        folder: must exist.
        shard_max: most bytes of a file, with its header (0: one file).
        progress: called with (bytes written, all bytes).

    Raises:
        ModelError: a file of the checkpoint is damaged or holds NaN, or the plan keeps more experts in some layers than in others.
        MachineError: the disk is full or not writable.
    """
    if not plan.has_one_count:
        raise ModelError("the plan keeps different numbers of experts in different layers: no GGUF can hold that", hint="make another plan")
    width = f"-W{plan.width}" if plan.width else ""
    active = f"-K{plan.top_k}" if plan.top_k != model.own_top_k else ""
    stem = f"{model.name}-E{plan.count}{active}{width}-{_bits_per_weight(model, plan):.2f}bpw"

    def fill(scratch: Path) -> list[str]:
        most = max(1, shard_max - _beside_data(model)) if shard_max else 0  # the writer counts tensors alone
        writer = _open_writer(scratch / f"{stem}.gguf", model, stats, plan, most)
        infos = _add_infos(writer, model, lambda unit: plan.formats[unit.name], plan.count)
        _write_header(writer)
        written, total = 0, sum(infos.values())
        with ThreadPoolExecutor(count_cores()) as pool:
            for name, data in _tensor_data(model, stats, plan, pool):
                writer.write_tensor_data(data)
                written += infos[name]
                if progress:
                    progress(written, total)
        writer.close()
        return sorted(p.name for p in scratch.iterdir())

    return write_whole(folder, plan, fill)


def _bits_per_weight(model: Model, plan: Plan) -> float:
    """Bits of the file divided by the number of weights that are left."""
    kept = plan.kept_of
    gone = sum(t.n_weights for t in model.tensors if t.expert >= 0 and t.expert not in kept[t.layer])
    return 8 * plan.file_size / (model.n_weights - gone)


def _dominant(plan: Plan) -> str:
    """The format that holds most bytes."""
    bytes_by: dict[str, int] = {}
    for name, kind in plan.formats.items():
        bytes_by[kind] = bytes_by.get(kind, 0) + plan.sizes[name]
    return max(sorted(bytes_by), key=lambda kind: bytes_by[kind])


def _open_writer(path: Path, model: Model, stats: Stats | None, plan: Plan | None, shard_max: int) -> Any:
    """A GGUFWriter with all metadata; without stats and plan, it has placeholders of the same length and all experts."""
    import gguf

    logging.getLogger("gguf.gguf_writer").setLevel(logging.ERROR)
    count = plan.count if plan else model.n_experts
    writer = gguf.GGUFWriter(path, model.architecture or find_family(model.model_type).gguf, split_max_size=shard_max)
    if not model.architecture:
        writer.add_name(model.name)
    writer.add_file_type(FILE_TYPES.get(_dominant(plan), 0) if plan else 0)
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    if model.architecture:
        add_copied(writer, model, count)
    else:
        add_shape(writer, model, count)
        add_own_keys(writer, model, find_family(model.model_type))
        add_vocabulary(writer, read_vocabulary(Path(model.folder), model.vocab_size), arch_vocab_key=False)
    add_provenance(writer, model, stats, plan, len(list_units(model)))
    return writer


def _add_infos(writer: Any, model: Model, choose: Callable[[Unit], str], count: int) -> dict[str, int]:
    """Announce every tensor in file order, and return the bytes by name."""
    import gguf

    units = {unit.name: unit for unit in list_units(model)}
    infos: dict[str, int] = {}
    for name, group in group_tensors(model):
        first = group[0]
        if name in units:
            kind = choose(units[name])
            shape = (*((count,) if first.expert >= 0 else ()), first.shape[0], row_bytes(kind, first.shape[1]))
        else:
            kind = first.dtype if model.architecture else "F32"
            rows = (count, *first.shape[1:]) if is_per_expert(model, first) else first.shape
            shape = (*rows[:-1], bytes_of(kind, rows[-1]))
        infos[name] = int(np.prod(shape))  # gguf-py takes shapes in bytes where the data are bytes
        writer.add_tensor_info(name, shape, np.dtype(np.uint8), infos[name], gguf.GGMLQuantizationType[kind])
    return infos


def _write_header(writer: Any) -> None:
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()


def group_tensors(model: Model) -> list[tuple[str, list[Tensor]]]:
    """The checkpoint's tensors by the GGUF tensor that they become, in file order; an expert stack is one group."""
    names = {} if model.architecture else find_family(model.model_type).gguf_names
    groups: dict[str, list[Tensor]] = {}
    for tensor in model.tensors:
        name = tensor.name if model.architecture else tensor_name(names.get(tensor.role, tensor.role), tensor.layer)
        groups.setdefault(name, []).append(tensor)
    return list(groups.items())


def _tensor_data(model: Model, stats: Stats, plan: Plan, pool: ThreadPoolExecutor) -> Iterator[tuple[str, NDArray[Any]]]:
    """Every tensor's bytes, in file order."""
    layer, importance, kept_of = -2, {}, plan.kept_of  # -2 is no layer; layer -1 holds the embedding and the output matrix
    for name, group in group_tensors(model):
        first = group[0]
        if first.layer != layer:
            layer, importance = first.layer, importance_of(model, stats, first.layer)
        if not first.planned:
            values = read_fixed(model, first)
            yield name, values[list(kept_of[first.layer])] if is_per_expert(model, first) else values
            continue
        kept = [group[e] for e in kept_of[first.layer]] if first.expert >= 0 else group
        kind = plan.formats[name]
        rows: list[NDArray[np.uint8]] = []
        for tensor in kept:  # one expert is in float32 at a time, and only the packed stack grows
            if kind == (tensor.packed or (tensor.dtype if model.architecture else "")):
                rows.append(order_for_rotary(model, tensor, read_packed(model.folder, tensor, row_bytes(kind, tensor.shape[1]))))
                continue
            weights = order_for_rotary(model, tensor, read_tensor(model.folder, tensor))
            rows.append(quantize_parallel([(weights, importance.get((tensor.role, tensor.expert)))], kind, pool))
        yield name, np.concatenate(rows)


def read_fixed(model: Model, tensor: Tensor) -> NDArray[Any]:
    """A tensor without a format: float32, or the rows of bytes of a GGUF's."""
    if not model.architecture:
        return read_tensor(model.folder, tensor)
    flat, size = replace(tensor, shape=(tensor.n_weights // tensor.shape[-1],)), bytes_of(tensor.dtype, tensor.shape[-1])
    rows = read_packed(model.folder, flat, size)
    return rows.reshape(*(tensor.shape[:-1] or tensor.shape), -1)


def order_for_rotary(model: Model, tensor: Tensor, weights: NDArray[Packable]) -> NDArray[Packable]:
    """Rows of a query or key matrix, weights or packed, in the order in which llama.cpp's rotary embedding reads them.

    Rotary embedding turns pairs of rows of a head.  In transformers, a row of the first half and a row of the second half are a pair.
    llama.cpp's architecture `llama` takes neighbours instead, so the halves of each head are interleaved for it.  All other tensors, and
    those of other architectures, stay as they are.
    """
    heads = {"attn_q": model.attention.heads, "attn_k": model.attention.kv_heads}.get(tensor.role)
    if heads is None or model.architecture or not find_family(model.model_type).paired_rotary:
        return weights
    rows, cols = weights.shape
    paired = weights.reshape(heads, 2, rows // heads // 2, cols).swapaxes(1, 2)  # [heads, pairs, 2, cols]
    return np.ascontiguousarray(paired.reshape(rows, cols))
