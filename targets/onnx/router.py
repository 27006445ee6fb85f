"""This module builds the router from standard operators in float32: hidden states give a dense matrix of gates [tokens, experts].

The result is exact for every router rule that we know.  One function covers softmax routers (Mixtral, Qwen, OLMoE) and sigmoid routers with
a correction bias and groups (DeepSeek-V3, GLM-4.5).  Dropped experts have no row: the rule runs over the kept experts, as prices assume
(docs/pricing.md, 3).
"""

from __future__ import annotations

from edgemoe.base.errors import ModelError
from edgemoe.ir import Router
from edgemoe.targets.onnx.graph_builder import Sheet

_MASKED = -3.4e38  # near the least float32: never chosen while anything else is there


def add_router(sheet: Sheet, x: str, weight: str, n: int, router: Router, prefix: str, bias: str = "") -> str:
    """Gates [tokens, n] of hidden states `x` [tokens, hidden]; the gate of an expert that was not chosen is zero.

    Args:
        sheet: where the nodes go.
        x: name of the input.
        weight: name of the router's matrix [hidden, n].
        n: experts that are left.
        router: the rule.
        prefix: of the nodes' names.
        bias: name of a vector [n] that counts in choosing and not in weighing, if there is one.

    Raises:
        ModelError: groups keep different numbers of experts, or the open groups hold fewer experts than a token chooses.
    """
    k = min(router.top_k, n)
    logits = sheet.op("MatMul", [x, weight], f"{prefix}.logits")
    if router.scoring == "softmax":
        scores = sheet.op("Softmax", [logits], f"{prefix}.scores", axis=-1)
    else:
        scores = sheet.op("Sigmoid", [logits], f"{prefix}.scores")
    choice = sheet.op("Add", [scores, bias], f"{prefix}.biased") if bias else scores
    if router.groups > router.top_groups:
        choice = _mask_groups(sheet, choice, n, router, prefix)
    index = f"{prefix}.index"
    sheet.op("TopK", [choice, sheet.constant(f"const.{k}", [k])], [f"{prefix}.top", index], axis=-1)
    gates = f"{prefix}.top" if choice == scores else sheet.op("GatherElements", [scores, index], f"{prefix}.chosen", axis=1)
    if router.renormalize:
        total = sheet.op("ReduceSum", [gates, sheet.constant("const.last", [-1])], f"{prefix}.sum", keepdims=1)
        total = sheet.op("Add", [total, sheet.constant("const.tiny", 1e-20)], f"{prefix}.total")  # transformers' own guard
        gates = sheet.op("Div", [gates, total], f"{prefix}.shares")
    if router.scale != 1.0:
        gates = sheet.op("Mul", [gates, sheet.constant("const.router_scale", router.scale)], f"{prefix}.scaled")
    zeros = sheet.op("Sub", [logits, logits], f"{prefix}.zeros")
    return sheet.op("ScatterElements", [zeros, index, gates], f"{prefix}.gates", axis=1)


def _mask_groups(sheet: Sheet, choice: str, n: int, router: Router, prefix: str) -> str:
    """Scores in which all experts outside the best groups are masked."""
    each, last = n // router.groups, sheet.constant("const.last", [-1])
    if n % router.groups or router.top_groups * each < router.top_k:
        raise ModelError(
            f"{prefix}: {n} experts cannot be {router.groups} groups of which {router.top_groups} hold {router.top_k}",
            hint="keep as many experts of each group",
        )
    grouped = sheet.op("Reshape", [choice, sheet.constant(f"{prefix}.groups", [-1, router.groups, each])], f"{prefix}.grouped")
    best = min(router.group_best, each)
    sheet.op("TopK", [grouped, sheet.constant(f"const.{best}", [best])], [f"{prefix}.bests", f"{prefix}.bests_index"], axis=-1)
    totals = sheet.op("ReduceSum", [f"{prefix}.bests", last], f"{prefix}.group_scores", keepdims=0)
    k = sheet.constant(f"const.{router.top_groups}", [router.top_groups])
    sheet.op("TopK", [totals, k], [f"{prefix}.group_top", f"{prefix}.group_index"], axis=-1)
    zeros = sheet.op("Sub", [totals, totals], f"{prefix}.group_zeros")
    picked = sheet.op("Sub", [f"{prefix}.group_top", f"{prefix}.group_top"], f"{prefix}.group_picked")
    ones = sheet.op("Add", [picked, sheet.constant("const.one", 1.0)], f"{prefix}.group_ones")
    mask = sheet.op("ScatterElements", [zeros, f"{prefix}.group_index", ones], f"{prefix}.group_mask", axis=1)
    wide = sheet.op("Unsqueeze", [sheet.op("Cast", [mask], f"{prefix}.group_open", to=9), last], f"{prefix}.group_wide")
    kept = sheet.op("Where", [wide, grouped, sheet.constant("const.masked", _MASKED)], f"{prefix}.group_kept")
    return sheet.op("Reshape", [kept, sheet.constant(f"{prefix}.flat", [-1, n])], f"{prefix}.group_choice")
