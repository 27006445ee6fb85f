"""This module computes the importance of the columns of each matrix of a layer: the mean squares of its inputs, from the statistics."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from edgemoe.base.types import F32, F64
from edgemoe.ir import Model, Stats
from edgemoe.ir.model import is_stack


def importance_of(model: Model, stats: Stats, layer: int) -> dict[tuple[str, int], F32]:
    """Importance of the columns of each matrix of a layer by (role, expert); experts with few tokens are shrunk to the layer's mean."""
    arrays = stats.arrays(layer)
    if layer < 0:
        weights = stats.weights / np.maximum(arrays["token_count"].sum(axis=1), 1)
        output = (weights[:, None] * arrays["output_in_sq"]).sum(axis=0).astype(np.float32)
        return {("token_embd" if model.is_tied else "output", -1): output}
    share = (stats.weights / np.maximum(arrays["tokens"], 1))[:, None]
    found: dict[tuple[str, int], F32] = {}
    for step in model.steps(layer):
        for role in model.plain_roles(layer, step):
            found[role, -1] = (share * arrays[f"in_sq.{step.reads}"]).sum(axis=0).astype(np.float32)
    if layer not in model.moe_layers:
        return found
    count = arrays["count"].sum(axis=0)
    stacks = [role for role in model.planned_roles(layer) if is_stack(role)]
    inner = [role for role in stacks if role == "ffn_down_exps"]
    for roles, key in (([role for role in stacks if role not in inner], "expert_in_sq"), (inner, "expert_mid_sq")):
        shrunk = shrink(arrays[key], arrays["expert_importance"], count)
        found |= {(role, e): shrunk[e] for role in roles for e in range(model.n_experts)}
    return found


def shrink(sums: F64, weight: F64, count: NDArray[np.int64], tokens: float = 64.0) -> F32:
    """Mean squares [E, cols] from sums and their weights; an expert's own mean counts with its tokens, the layer's mean with `tokens`."""
    overall = sums.sum(axis=0) / max(float(weight.sum()), 1e-30)
    own = sums / np.maximum(weight, 1e-30)[:, None]
    trust = (count / (count + tokens))[:, None]
    mixed: F32 = (trust * own + (1 - trust) * overall).astype(np.float32)
    return mixed


def floor_importance(importance: NDArray[np.floating] | None, cols: int) -> F32:
    """Importance of mean 1 and at least a thousandth; ones if there is no importance or all of it is zero."""
    values = np.ones(cols, np.float32) if importance is None else np.asarray(importance, np.float32)
    mean = float(values.mean())
    if not mean > 0 or not np.isfinite(mean):
        return np.ones_like(values)
    return np.ascontiguousarray(np.maximum(values / mean, 1e-3))
