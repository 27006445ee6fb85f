"""This module checks a price list, so that the planner can trust it even if another program wrote the file.

A size that is not a number would pass every comparison with a budget.  So prices are checked when a `Costs` is made, not when it is used.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from edgemoe.base.errors import ModelError

MOST_BYTES = 2**53  # whole numbers up to here are exact in the solvers' floats
PARTS = ("context", "runtime", "kv", "compute", "output")  # parts of memory beside the weights (ir/memory.py)
FORMS = ("stacks", "experts")


def check_costs(costs: Any) -> None:
    """Refuse a price list with impossible numbers, shapes or names.

    Raises:
        ModelError: a value is impossible; the message names the field.
    """
    _check_names(costs)
    _check_shapes(costs)
    for name in ("input_cost", "factor", "drop_cost", "expert_drop", "drop_curve", "usage"):
        _need(np.isfinite(getattr(costs, name)).all(), name, "holds what is no finite number")
    _need((costs.factor >= 0).all() and (costs.usage >= 0).all(), "factor, usage", "hold negative numbers")
    _need(not np.isnan(costs.cost).any() and not (costs.cost == -np.inf).any(), "cost", "holds what is no number")
    for name in ("size", "extra", "staging", "fixed_size"):
        values = getattr(costs, name)
        _need(values.dtype.kind in "iu", name, "is not in whole bytes")
        _need((values >= 0).all() and (values <= MOST_BYTES).all(), name, "holds negative or absurd bytes")
    offered = np.isfinite(costs.cost)
    _need((costs.size[offered] > 0).all(), "size", "has a format that is offered and takes no bytes")
    lost = np.argwhere(~offered.any(axis=2))
    _need(not len(lost), "cost", f"offers no format for {costs.units[lost[0][1]].name}" if len(lost) else "")
    _check_kept(costs)


def _need(holds: object, field: str, message: str) -> None:
    if not holds:
        raise ModelError(f"costs: {field}: {message}", hint="make the price list again")


def _check_names(costs: Any) -> None:
    _need(costs.form in FORMS, "form", f"is {costs.form!r}, not {' or '.join(FORMS)}")
    for field, values in (("units", [u.name for u in costs.units]), ("formats", costs.formats), ("domains", costs.domains)):
        _need(len(values) > 0, field, "is empty")
        twice = sorted({v for v in values if list(values).count(v) > 1}) if len(set(values)) < len(values) else []
        _need(not twice, field, f"{twice[0] if twice else ''!r} is there twice")
    _need(all(u.n_weights > 0 for u in costs.units), "units", "one has no weights")
    weights = costs.domain_weights
    _need(len(weights) == len(costs.domains) and all(math.isfinite(w) and w >= 0 for w in weights), "domain_weights", "are no weights")
    _need(abs(sum(weights) - 1) < 1e-6, "domain_weights", f"add up to {sum(weights)}, not 1")
    _need(math.isfinite(costs.kappa), "kappa", "is no finite number")
    _need(all(part in costs.memory for part in PARTS), "memory", f"needs {', '.join(PARTS)}")
    _need(all(0 <= v <= MOST_BYTES for v in costs.memory.values()), "memory", "holds negative or absurd bytes")


def _check_shapes(costs: Any) -> None:
    c, u, f, d, e = len(costs.counts), len(costs.units), len(costs.formats), len(costs.domains), costs.n_experts
    layers = len(costs.expert_layers)
    _need(layers > 0 and e > 0, "units", "no layer has experts")
    shapes = {
        "cost": (c, u, f),
        "input_cost": (c, u, f),
        "size": (c, u, f),
        "extra": (c, u, f),
        "staging": (c, u, f),
        "fixed_size": (c,),
        "factor": (d, u),
        "kept": (c, layers, e),
        "drop_cost": (d, c, layers),
        "expert_drop": (d, layers, e),
        "drop_curve": (layers, e + 1),
        "usage": (d, layers, e),
    }
    for name, shape in shapes.items():
        found = getattr(costs, name).shape
        _need(found == shape, name, f"has the shape {found}, expected {shape}")


def _check_kept(costs: Any) -> None:
    counts = list(costs.counts)
    _need(counts == sorted(set(counts)) and counts, "counts", f"{counts} are not rising numbers")
    _need(1 <= costs.top_k <= counts[0] and counts[-1] <= costs.n_experts, "counts", f"are not between top_k and {costs.n_experts}")
    _need((costs.kept.sum(axis=2) == np.array(counts)[:, None]).all(), "kept", "a set of the menu has not as many experts as its count")
    if costs.form == "experts":
        _need(counts == [costs.n_experts], "counts", "the experts form has one count, with every expert kept")
        found = sorted((u.layer, u.expert) for u in costs.units if u.expert >= 0)
        wanted = [(layer, e) for layer in costs.expert_layers for e in range(costs.n_experts)]
        _need(found == wanted, "units", "do not hold every expert of every layer once")
