"""Price lists that cannot be are refused by field."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from strategies import changed, make_costs

from edgemoe.base.errors import ModelError
from edgemoe.base.storage import load_record, save_record
from edgemoe.ir import Costs


def _put(name: str, value: float) -> dict[str, Any]:
    array = getattr(make_costs(1, "stacks"), name).copy()
    array.reshape(-1)[0] = value
    return {name: array}


BAD: list[tuple[str, dict[str, Any]]] = [
    ("cost", _put("cost", np.nan)),
    ("cost", _put("cost", -np.inf)),
    ("cost", {"cost": np.full_like(make_costs(1, "stacks").cost, np.inf)}),
    ("size", _put("size", -1)),
    ("size", {"size": np.zeros_like(make_costs(1, "stacks").size)}),
    ("staging", _put("staging", -5)),
    ("fixed_size", _put("fixed_size", -1)),
    ("fixed_size", _put("fixed_size", 2**60)),
    ("size", {"size": make_costs(1, "stacks").size.astype(np.float64)}),
    ("factor", _put("factor", np.nan)),
    ("factor", _put("factor", -1)),
    ("drop_cost", _put("drop_cost", np.inf)),
    ("expert_drop", _put("expert_drop", np.nan)),
    ("drop_curve", _put("drop_curve", np.nan)),
    ("usage", _put("usage", np.inf)),
    ("kept", _put("kept", False) if make_costs(1, "stacks").kept.reshape(-1)[0] else _put("kept", True)),
    ("counts", {"counts": (2, 2, 4)}),
    ("counts", {"top_k": 3}),
    ("formats", {"formats": ("Q8_0", "Q8_0", "IQ2_S")}),
    ("formats", {"formats": ()}),
    ("domains", {"domains": ("d0", "d0")}),
    ("domain_weights", {"domain_weights": (0.5, 0.6)}),
    ("domain_weights", {"domain_weights": (np.nan, 1.0)}),
    ("units", {"units": ()}),
    ("units", {"units": (*make_costs(1, "stacks").units[:-1], make_costs(1, "stacks").units[0])}),
    ("memory", {"memory": {}}),
    ("memory", {"memory": {**make_costs(1, "stacks").memory, "kv": -1}}),
    ("kappa", {"kappa": np.nan}),
    ("form", {"form": "layers"}),
]


@pytest.mark.parametrize(("field", "values"), BAD)
def test_an_impossible_price_list_is_refused_by_field(field: str, values: dict[str, Any]) -> None:
    with pytest.raises(ModelError, match=rf"costs: [a-z, _]*{field}"):
        changed(make_costs(1, "stacks"), **values)


def test_an_expert_that_is_missing_or_there_twice_is_refused() -> None:
    costs = make_costs(1, "experts")
    units = (dataclasses.replace(costs.units[0], expert=1), *costs.units[1:])
    with pytest.raises(ModelError, match="every expert"):
        changed(costs, units=units)


def test_a_price_list_that_was_tampered_with_is_refused_with_its_path(tmp_path: Path) -> None:
    path = tmp_path / "costs.json"
    save_record(path, make_costs(1, "stacks"))
    path.write_text(path.read_text(encoding="utf-8").replace('"top_k": 1', '"top_k": 9'), encoding="utf-8")
    with pytest.raises(ModelError, match=r"costs\.json: costs: counts"):
        load_record(path, Costs)
