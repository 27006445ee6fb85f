"""This module writes a plan's model.onnx and model.onnx.data: first the graph, then every weight at its place, expert by expert.

Sizes add up by unit: every expert is counted with its pieces padded and with its row of the router.  Stacking needs less padding, and the
bytes that it saves lie unused at the end of the data file.  The graph is padded to the size of the largest possible one (every format in
use in every layer).  So the planner knows both files to the byte before anything is written.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path, PurePath
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgemoe import __version__
from edgemoe.base.errors import ModelError
from edgemoe.base.progress import Progress
from edgemoe.base.threads import count_cores
from edgemoe.ir import PROJECTIONS, Artifact, Model, Plan, Stats, Tensor, Unit, tensor_name
from edgemoe.model.checkpoint import read_packed, read_tensor
from edgemoe.quantize.importance import importance_of
from edgemoe.targets import write_whole
from edgemoe.targets.onnx.decoder import build_decoder, widest_format
from edgemoe.targets.onnx.experts import group_experts
from edgemoe.targets.onnx.files import PLACES, check_layout, write_sidecars
from edgemoe.targets.onnx.formats import FORMATS, choose_menu, matrix_size, pad, piece_bytes, quantize_parallel
from edgemoe.targets.onnx.graph_builder import CONTRIB, Sheet, make_model, pad_model
from edgemoe.targets.onnx.rounding import split_rows

CONTRIB_OPERATORS = ("FusedMatMul", "GatherBlockQuantized", "GroupQueryAttention", "MatMulNBits", "MoE", "QMoE", "RotaryEmbedding")
GRAPH_PER_LAYER = 17_000  # bytes, of models of which only the shapes are known; tiny-moe takes 16 900
PER_EXPERT = ("ffn_gate_inp", "exp_probs_b.bias")  # a row or number for each expert, in the order of the groups
_SPARE = 64  # bytes, so that padding can always be added
_LONGEST = "9" * 32  # a number in the metadata, longer than any real one


# ------------------------------------------------------------------------------------------------------------------ sizes
def list_units(model: Model) -> list[Unit]:
    """The units that get a format, in file order: one for each expert (its three matrices), one for each other matrix."""
    sizes: dict[tuple[str, int, int], int] = {}
    for tensor in model.tensors:
        if tensor.planned:
            key = ("ffn_exps" if tensor.expert >= 0 else tensor.role, tensor.layer, tensor.expert)
            sizes[key] = sizes.get(key, 0) + tensor.n_weights
    return [
        Unit(name=unit_name(role, layer, expert), role=role, layer=layer, n_weights=n, expert=expert)
        for (role, layer, expert), n in sizes.items()
    ]


def unit_name(role: str, layer: int, expert: int = -1) -> str:
    """Name of a unit: as llama.cpp names the tensor, or `blk.3.ffn_exps.17`."""
    return f"blk.{layer}.{role}.{expert}" if expert >= 0 else tensor_name(role, layer)


def _shape(model: Model, unit: Unit) -> tuple[int, int]:
    """Rows and columns of a matrix outside the routed experts."""
    cols = model.get(unit.role, unit.layer).shape[-1]
    return unit.n_weights // cols, cols


def _expert_shapes(model: Model) -> tuple[tuple[int, int], tuple[int, int]]:
    """Rows and columns of gate and up together, and of down."""
    return (2 * model.expert.size, model.hidden_size), (model.hidden_size, model.expert.size)


def offered_formats(model: Model, unit: Unit) -> tuple[str, ...]:
    """Formats that can store a unit and that have fast kernels.

    Experts of 2 bits need rows and columns in multiples of 128, and other matrices of 2 bits need rows in multiples of 128 (onnxruntime's
    look-up kernel, core/mlas/lib/qlutgemm.cpp).  Only experts can have 3 bits.

    Raises:
        ModelError: no format fits.
    """
    shapes = _expert_shapes(model) if unit.expert >= 0 else (_shape(model, unit),)
    looked_up = (2,) if all(rows % 128 == 0 for rows, _ in shapes) else ()
    found = choose_menu([cols for _, cols in shapes], (8, 4, 3, *looked_up) if unit.expert >= 0 else (8, 4, *looked_up))
    if not found:
        lengths = " and ".join(str(cols) for _, cols in shapes)
        raise ModelError(f"{unit.name}: rows of {lengths} weights fit no ONNX format", hint="multiples of 32 from 64 on do")
    return found


def unit_size(model: Model, unit: Unit, name: str, count: int) -> int:
    """Bytes of a unit in the artifact, padding included; an expert's row of the router counts with it.  `count` does not matter here."""
    if unit.expert < 0:
        return matrix_size(name, *_shape(model, unit))
    return sum(matrix_size(name, rows, cols) for rows, cols in _expert_shapes(model)) + pad(4 * model.hidden_size)


def fixed_sizes(model: Model, counts: Sequence[int]) -> list[int]:
    """Bytes of everything without a format (graph, norms and biases) for each kept count; they are the same for all counts."""
    rest = sum(pad(4 * t.n_weights) for t in model.tensors if not t.planned and t.role != "ffn_gate_inp")
    return [graph_size(model) + rest] * len(counts)


def graph_size(model: Model) -> int:
    """Bytes of the graph's file, from building the largest graph; an estimate for a model of which only the shapes are known."""
    if not model.folder:
        return GRAPH_PER_LAYER * model.n_layers
    sheet = Sheet(hollow=True)
    units = list_units(model)
    widths = {unit.name: widest_format(_shape(model, unit)[1]) for unit in units if unit.expert < 0}
    menu = offered_formats(model, next(unit for unit in units if unit.expert >= 0))
    every = [(name, model.n_experts) for name in ("F32", *menu)]
    groups = [every if layer.ffn == "moe" else [] for layer in model.layers]
    interface = build_decoder(sheet, model, groups, widths)
    return int(make_model(sheet, *interface, _metadata(model, None, None)).ByteSize()) + _SPARE


def _metadata(model: Model, stats: Stats | None, plan: Plan | None) -> dict[str, str]:
    """The file's origin and its least runtime; without a plan, placeholders that are at least as long."""
    kept = plan.kept_of if plan else {}
    flags = [["1" if e in kept.get(layer, ()) else "0" for e in range(model.n_experts)] for layer in range(model.n_layers)]
    three_bits = plan is not None and any(FORMATS[name].bits == 3 for name in plan.formats.values())
    none = "0" * 64
    return {
        "edgemoe.version": __version__,
        "edgemoe.model": model.fingerprint,
        "edgemoe.stats": stats.key if stats else none,
        "edgemoe.costs": plan.costs if plan else none,
        "edgemoe.expert_count_original": str(model.n_experts),
        **({"edgemoe.expert_used_count_original": str(model.own_top_k)} if model.top_k != model.own_top_k else {}),
        "edgemoe.experts_kept": " ".join("".join(row) for row in flags),  # a flag for each expert, layer by layer
        "edgemoe.repaired": ("true" if plan.repair else "false") if plan else "false",
        "edgemoe.predicted_kl": repr(plan.predicted_kl) if plan else _LONGEST,
        "edgemoe.budget": str(plan.budget) if plan else _LONGEST,
        "edgemoe.least_onnxruntime": "1.32" if three_bits else "1.31",
        "edgemoe.contrib_operators": f"{CONTRIB} 1: {', '.join(CONTRIB_OPERATORS)}",
    }


# ---------------------------------------------------------------------------------------------------------------- writing
def write(
    model: Model,
    stats: Stats,
    plan: Plan,
    folder: Path,
    shard_max: int = 0,
    progress: Progress | None = None,
    *,
    layout: str = "onnx",
) -> Artifact:
    """Write the plan's graph, its data file and the small files beside them into `folder`; files get their names only when complete.

    Args:
        model: whose weights are stored.
        stats: they hold the importance matrix.
        plan: says which experts stay, and in which formats.
        folder: must exist.
        shard_max: not used, because such files are not split.
        progress: called with (bytes written, all bytes).
        layout: decides the names of the files (see files.py).

    Raises:
        UsageError: the layout is unknown, or cannot hold the plan's formats.
        ModelError: a file of the checkpoint is damaged or holds NaN, or one of its small files is malformed.
        MachineError: the disk is full or not writable, or onnx is not installed.
    """
    check_layout(plan.formats.values(), layout)
    model_file, data_file = PLACES[layout]
    groups = _layer_groups(plan)
    sheet = Sheet(data_file=PurePath(data_file).name)
    counts = [[(name, len(experts)) for name, experts in groups.get(layer, ())] for layer in range(model.n_layers)]
    interface = build_decoder(sheet, model, counts, plan.formats)
    size = graph_size(model)
    graph = pad_model(make_model(sheet, *interface, _metadata(model, stats, plan)), size)

    def fill(scratch: Path) -> list[str]:
        (scratch / model_file).parent.mkdir(exist_ok=True)
        names = [model_file, data_file, *write_sidecars(model, plan, scratch, layout)]
        (scratch / model_file).write_bytes(graph.SerializeToString(deterministic=True))
        _fill(scratch / data_file, sheet, plan.file_size - size, _contents(model, stats, plan), progress)
        return names

    return write_whole(folder, plan, fill)


def _layer_groups(plan: Plan) -> dict[int, list[tuple[str, tuple[int, ...]]]]:
    """Kept experts of each layer by format."""
    return {
        layer: group_experts(kept, {e: plan.formats[unit_name("ffn_exps", layer, e)] for e in kept}) for layer, kept in plan.kept_of.items()
    }


def _fill(path: Path, sheet: Sheet, size: int, contents: Iterator[tuple[str, int, NDArray[Any]]], progress: Progress | None) -> None:
    """Write every piece at its place; holes and the end are zero."""
    total, written = sum(place.size for place in sheet.places.values()), 0
    with path.open("wb") as file:
        file.truncate(size)
        for name, offset, values in contents:
            file.seek(sheet.places[name].offset + offset)
            file.write(np.ascontiguousarray(values).view(np.uint8).data)
            written += values.nbytes
            if progress:
                progress(written, total)


def _contents(model: Model, stats: Stats, plan: Plan) -> Iterator[tuple[str, int, NDArray[Any]]]:
    """Every weight: the name of its place, the offset in this place, and the values to write."""
    groups = _layer_groups(plan)
    with ThreadPoolExecutor(count_cores()) as pool:
        for layer in range(-1, model.n_layers):
            importance = importance_of(model, stats, layer)
            tensors = model.of_layer(layer)
            for (role, expert), tensor in tensors.items():
                name = tensor_name(role, layer).removesuffix(".weight")
                if expert >= 0:
                    continue
                if tensor.planned:
                    kind = plan.formats[f"{name}.weight"]
                    yield from _pieces(name, 0, _stored(model, [tensor], kind, importance.get((role, -1)), pool))
                    continue
                values = read_tensor(model.folder, tensor)
                order = [e for _, experts in groups.get(layer, ()) for e in experts]
                if role in PER_EXPERT:
                    values = values[order].T
                elif role == "ffn_gate_inp_shexp":
                    values = values[:, None]
                yield name, 0, np.ascontiguousarray(values)
            if layer in groups:
                yield from _experts(model, layer, groups[layer], tensors, importance, pool)


def _experts(
    model: Model,
    layer: int,
    groups: list[tuple[str, tuple[int, ...]]],
    tensors: Mapping[tuple[str, int], Tensor],
    importance: Mapping[tuple[str, int], NDArray[np.float32]],
    pool: ThreadPoolExecutor,
) -> Iterator[tuple[str, int, NDArray[Any]]]:
    """The contents of a layer's experts, one after the other; gate and up rows are interleaved."""
    for kind, experts in groups:
        for number, e in enumerate(experts):
            gate, up, down = (tensors[f"ffn_{p}_exps", e] for p in PROJECTIONS)
            name = f"blk.{layer}.ffn_exps.{kind}"
            yield from _pieces(f"{name}.fc1", number, _stored(model, [gate, up], kind, importance["ffn_gate_exps", e], pool))
            yield from _pieces(f"{name}.fc2", number, _stored(model, [down], kind, importance["ffn_down_exps", e], pool))


def _stored(
    model: Model, tensors: Sequence[Tensor], kind: str, importance: NDArray[np.float32] | None, pool: ThreadPoolExecutor
) -> dict[str, NDArray[np.uint8]]:
    """The pieces of matrices of one shape with interleaved rows; packed matrices are copied, others are quantized now."""
    found = []
    for tensor in tensors:
        rows, cols = tensor.shape
        if tensor.packed == kind:
            row_bytes = sum(piece_bytes(kind, 1, cols).values())
            found.append(split_rows(read_packed(model.folder, tensor, row_bytes), kind, cols).pieces())
        else:
            parts = [part.pieces() for part in quantize_parallel(read_tensor(model.folder, tensor), kind, importance, pool)]
            found.append({piece: np.concatenate([part[piece] for part in parts]) for piece in parts[0]})
    return {piece: np.stack([part[piece] for part in found], axis=1).reshape(rows * len(tensors), -1) for piece in found[0]}


def _pieces(name: str, number: int, pieces: Mapping[str, NDArray[np.uint8]]) -> Iterator[tuple[str, int, NDArray[Any]]]:
    """Places and contents of the pieces of the `number`-th matrix of a stack."""
    for piece, values in pieces.items():
        yield f"{name}.{piece}", number * values.nbytes, values
