"""This module describes any choice of kept experts and formats as a Plan, with its bytes, memory and nats."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

from edgemoe.base.types import F64
from edgemoe.ir import Costs, Plan
from edgemoe.ir.memory import peak

Mask = NDArray[np.bool_]
Memory = Mapping[str, int] | None  # parts of memory by name


def describe_choice(
    costs: Costs, budget: int, kept: Mask, formats: NDArray[np.int64], *, solver: str, in_vram: Mask | None = None, beside: Memory = None
) -> Plan:
    """Describe a choice as a plan with its bytes, memory and nats; no bound is proven for it.

    Args:
        costs: the price list.
        budget: for which the choice was made.
        kept: experts [L, E].
        formats: of every unit [U], by number; -1 marks a dropped expert.
        solver: name of the solver that made the choice.
        in_vram: units [U] in the second pool.
        beside: memory parts, if not the price list's.
    """
    c = 0 if costs.form == "experts" else costs.counts.index(int(kept[0].sum()))
    stored = np.flatnonzero(formats >= 0)
    in_vram = np.zeros(len(formats), bool) if in_vram is None else in_vram
    sizes, extra = costs.size[c, stored, formats[stored]], costs.extra[c, stored, formats[stored]]
    file_size = int(costs.fixed_size[c] + sizes.sum())
    staging = costs.staging[c, stored, formats[stored]][~in_vram[stored]].max(initial=0)
    held = file_size + int(extra[~in_vram[stored]].sum()) - int(sizes[in_vram[stored]].sum())
    memory = {**(costs.memory if beside is None else beside), "weights": held, "staging": int(staging)}
    context = memory.pop("context")
    memory["peak"] = peak(memory)
    by_domain, drop = price_choice(costs, c, kept, stored, formats[stored])
    q = float(costs.weights @ by_domain)
    return Plan(
        model=costs.model,
        model_name=costs.model_name,
        costs=costs.stats,
        target=costs.target,
        budget=budget,
        context=context,
        solver=solver,
        objective="mean",
        n_experts=costs.n_experts,
        top_k=costs.top_k,
        units=tuple(costs.units[u] for u in stored),
        kept=tuple(tuple(int(e) for e in np.flatnonzero(row)) for row in kept),
        formats={costs.units[u].name: costs.formats[formats[u]] for u in stored},
        sizes={costs.units[u].name: int(s) for u, s in zip(stored, sizes, strict=True)},
        vram=tuple(costs.units[u].name for u in stored if in_vram[u]),
        file_size=file_size,
        memory=memory,
        q=q,
        drop_q=float(costs.weights @ drop),
        predicted_kl=costs.predict_kl(q),
        domain_q={name: float(v) for name, v in zip(costs.domains, by_domain, strict=True)},
        bound=0.0,
        gap=1.0,
        proven=False,
        price=0.0,
        counts=(),
        rules=(),
        repair=costs.repair,
        origin=costs.origin,
        drawn=costs.drawn,
        width=costs.width,
    )


def price_choice(costs: Costs, c: int, kept: NDArray[np.bool_], stored: NDArray[np.int64], formats: NDArray[np.int64]) -> tuple[F64, F64]:
    """Nats of a choice by domain [D], and the part of its drops [D]; `stored` and `formats` are numbers of units and of their formats."""
    drop = drop_costs(costs, c, kept)
    inherited = (costs.inherited * ~kept).sum(axis=(1, 2))
    return costs.factor[:, stored] @ costs.cost[c, stored, formats] + inherited + drop, drop


def drop_costs(costs: Costs, c: int, kept: NDArray[np.bool_]) -> F64:
    """Nats of kept sets [L, E] by domain [D]: the price of the menu's sets of count `c`, corrected by the experts that differ."""
    if costs.form == "experts":
        gone = (~kept).sum(axis=1)
        curve = costs.drop_curve[np.arange(len(gone)), gone].sum()
        total = (costs.expert_drop * ~kept).sum(axis=(1, 2)) + curve
    else:
        menu = costs.kept[c]
        changed = (costs.expert_drop * (menu & ~kept)).sum(axis=(1, 2)) - (costs.expert_drop * (~menu & kept)).sum(axis=(1, 2))
        total = costs.drop_cost[:, c].sum(axis=1) + changed
    return np.asarray(total)
