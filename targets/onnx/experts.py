"""This module builds one MoE layer as nodes: a router, then one expert node for each format in use, and the sum of these.

A node mixes its own experts by their columns of the gates, so any assignment of formats is exact, and experts with a gate of zero cost
nothing.  An expert holds gate and up rows interleaved in one matrix, as the operators want them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from edgemoe.ir import Model
from edgemoe.targets.onnx.formats import FORMATS
from edgemoe.targets.onnx.graph_builder import CONTRIB, FLOAT, FLOAT16, UINT8, Sheet
from edgemoe.targets.onnx.router import add_router

Group = tuple[str, int]  # format, and how many experts have it
_LEAST_LOG = -1e4  # the logarithm that stands for a gate of zero, since its exp is zero


def group_experts(kept: Sequence[int], formats: Mapping[int, str]) -> list[tuple[str, tuple[int, ...]]]:
    """Kept experts of a layer by format, in the order of their rows in the router: first by FORMATS, then by their numbers."""
    found = [(name, tuple(e for e in kept if formats[e] == name)) for name in FORMATS]
    return [(name, experts) for name, experts in found if experts]


def code_dims(kind: str, cols: int) -> tuple[int, int]:
    """Blocks of a row, and bytes of a block's codes."""
    fmt = FORMATS[kind]
    return cols // fmt.block, fmt.block * fmt.bits // 8


def add_weights(sheet: Sheet, name: str, kind: str, lead: tuple[int, ...], cols: int, *, by_block: bool = False) -> dict[str, str]:
    """Announce the pieces of a matrix or stack with `lead` rows, and return the names by piece.

    The bytes are the same for all operators; `by_block` shapes the codes as MatMulNBits wants them.
    """
    fmt = FORMATS[kind]
    if not fmt.block:
        return {"codes": sheet.weight(f"{name}.codes", FLOAT, (*lead, cols))}
    blocks, each = code_dims(kind, cols)
    pieces = {
        "codes": sheet.weight(f"{name}.codes", UINT8, (*lead, blocks, each) if by_block else (*lead, blocks * each)),
        "scales": sheet.weight(f"{name}.scales", FLOAT16 if fmt.scale_bytes == 2 else FLOAT, (*lead, blocks)),
    }
    if fmt.zeros:
        pieces["zeros"] = sheet.weight(f"{name}.zeros", UINT8, (*lead, -(-blocks * fmt.bits // 8)))
    return pieces


def add_moe(sheet: Sheet, model: Model, layer: int, x: str, groups: Sequence[Group]) -> str:
    """The routed experts' output for `x` [batch, sequence, hidden]."""
    prefix, router = f"blk.{layer}", model.router
    n = sum(count for _, count in groups)
    flat = sheet.op("Reshape", [x, sheet.constant("const.rows", [-1, model.hidden_size])], f"{prefix}.ffn_rows")
    weight = sheet.weight(f"{prefix}.ffn_gate_inp", FLOAT, (model.hidden_size, n))
    bias = sheet.weight(f"{prefix}.exp_probs_b.bias", FLOAT, (n,)) if router.biased else ""
    gates = add_router(sheet, flat, weight, n, router, f"{prefix}.router", bias)
    parts = [gates]
    if len(groups) > 1:
        parts = [f"{prefix}.gates.{kind}" for kind, _ in groups]
        sheet.op("Split", [gates, sheet.constant(f"{prefix}.counts", [count for _, count in groups])], parts, axis=1)
    outputs = []
    for (kind, count), part in zip(groups, parts, strict=True):
        name = f"{prefix}.ffn_exps.{kind}"
        fc1 = add_weights(sheet, f"{name}.fc1", kind, (count, 2 * model.expert.size), model.hidden_size)
        fc2 = add_weights(sheet, f"{name}.fc2", kind, (count, model.hidden_size), model.expert.size)
        add_node = _quantized if FORMATS[kind].block else _plain
        outputs.append(add_node(sheet, name, kind, min(router.top_k, count), flat, part, fc1, fc2))
    total = sheet.op("Sum", outputs, f"{prefix}.ffn_sum") if len(outputs) > 1 else outputs[0]
    return sheet.op("Reshape", [total, sheet.op("Shape", [x], f"{prefix}.ffn_shape")], f"{prefix}.ffn_out")


def _quantized(sheet: Sheet, name: str, kind: str, k: int, x: str, gates: str, fc1: dict[str, str], fc2: dict[str, str]) -> str:
    """A QMoE node, which mixes by the given `router_weights` without changing them."""
    fmt = FORMATS[kind]
    attributes: dict[str, int | str] = {"expert_weight_bits": fmt.bits, "block_size": fmt.block, "k": k}
    attributes |= {"activation_type": "swiglu", "swiglu_fusion": 1, "normalize_routing_weights": 0}
    half = fmt.scale_bytes == 2
    if half:  # the CPU's 3 bits run in float16
        x, gates = (sheet.op("Cast", [value], f"{name}.{what}", to=FLOAT16) for value, what in ((x, "rows"), (gates, "half")))
        attributes["weights_prepacked"] = 0
    zeros = ["", fc1.get("zeros", ""), fc2.get("zeros", ""), ""]
    inputs = [x, gates, fc1["codes"], fc1["scales"], "", fc2["codes"], fc2["scales"], "", "", "", *zeros, gates]
    out = sheet.op("QMoE", inputs, name, domain=CONTRIB, **attributes)
    return sheet.op("Cast", [out], f"{name}.float", to=FLOAT) if half else out


def _plain(sheet: Sheet, name: str, _: str, k: int, x: str, gates: str, fc1: dict[str, str], fc2: dict[str, str]) -> str:
    """A MoE node, which has no `router_weights`: it takes the softmax of the gates' logarithms, and the gates' sum is multiplied back."""
    logs = sheet.op("Log", [gates], f"{name}.log")
    logits = sheet.op("Max", [logs, sheet.constant("const.least_log", _LEAST_LOG)], f"{name}.logits")
    attributes = {"activation_type": "swiglu", "swiglu_fusion": 1, "normalize_routing_weights": 0, "k": k}
    out = sheet.op("MoE", [x, logits, fc1["codes"], "", fc2["codes"]], f"{name}.mixed", domain=CONTRIB, **attributes)
    total = sheet.op("ReduceSum", [gates, sheet.constant("const.last", [-1])], f"{name}.total", keepdims=1)
    return sheet.op("Mul", [out, total], name)
