"""The curve of a report is the lower envelope over everything that was priced."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from edgemoe.pipeline.build import frontier_of
from edgemoe.plan.solve import sweep_sizes
from edgemoe.price.priors import price_config


def test_no_point_of_the_curve_is_above_a_plan_of_any_width_or_of_a_smaller_size() -> None:
    wide = price_config("olmoe-1b-7b")
    narrow = replace(
        wide, cost=0.2 * wide.cost, drop_cost=wide.drop_cost + 0.05 / wide.n_layers
    )  # better where bits are few, worse where they are many
    weights = int((wide.size[-1] + wide.extra[-1]).max(axis=1).sum() * 0.3)
    curve = frontier_of((wide, narrow), weights)
    sizes, losses = (np.array([p[name] for p in curve]) for name in ("file_size", "predicted_kl"))
    assert (np.diff(sizes) > 0).all() and (np.diff(losses) < 0).all()
    alone = [sweep_sizes(costs, [round(weights * f) for f in np.geomspace(0.34, 2.1, 12)]) for costs in (wide, narrow)]
    for point in (p for points in alone for p in points):
        near = losses[sizes <= point["file_size"] * 1.1]  # the curve has other sizes
        assert not len(near) or near.min() <= point["predicted_kl"] * 1.05
    from_each = [{p["predicted_kl"] for p in frontier_of((costs,), weights)} for costs in (wide, narrow)]
    assert all(any(kl in own for kl in losses) for own in from_each)  # each is better somewhere
