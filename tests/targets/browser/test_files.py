"""What the browser target lays out and offers: what transformers.js knows, and no three bits."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
from tiny import EXAMPLES, flat_plan

from edgemoe.base.errors import UsageError
from edgemoe.ir import Model, Plan
from edgemoe.model.inspect import inspect_model
from edgemoe.targets import find_target
from edgemoe.targets.onnx.files import allowed, write_sidecars

TINY = EXAMPLES / "tiny-moe"


def plan_for(model: Model, *, kept: tuple[int, ...] = (16, 16, 16, 16), fmt: str = "INT4_32") -> Plan:
    """A plan that keeps the first experts of each layer, every unit in one format."""
    plan = flat_plan(model)
    return replace(plan, context=200, kept=tuple(tuple(range(n)) for n in kept), formats=dict.fromkeys(plan.formats, fmt))


def test_transformers_js_gets_a_type_that_it_knows_and_the_shape_of_the_cache(tmp_path: Path) -> None:
    model = inspect_model(EXAMPLES / "tiny-moe-b")
    for layout in ("onnx", "transformers.js"):
        (tmp_path / layout).mkdir()
        write_sidecars(model, plan_for(model, kept=(7, 7)), tmp_path / layout, layout)
    plain, web = (json.loads((tmp_path / layout / "config.json").read_text()) for layout in ("onnx", "transformers.js"))
    assert plain["model_type"] == web["edgemoe"]["model_type"] == "mixtral"
    shape = {"model_type": "qwen3_moe", "num_hidden_layers": 2, "num_key_value_heads": 1, "head_dim": 64, "hidden_size": 256}
    assert {key: web[key] for key in shape} == shape
    assert web["transformers.js_config"] == {"dtype": "fp32", "use_external_data_format": True}


def test_the_web_layout_refuses_three_bits_and_says_which(tmp_path: Path) -> None:
    model = inspect_model(TINY)
    assert allowed("INT3_64", "onnx")
    assert [name for name in ("INT2_32", "INT3_64", "INT4_32", "INT8_32", "F32") if not allowed(name, "transformers.js")] == ["INT3_64"]
    with pytest.raises(UsageError, match="INT3_64") as caught:
        write_sidecars(model, plan_for(model, fmt="INT3_64"), tmp_path, layout="transformers.js")
    assert "--target browser" in caught.value.hint
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(UsageError, match="tflite"):
        write_sidecars(model, plan_for(model), tmp_path, layout="tflite")


def test_the_browser_target_offers_what_onnx_offers_but_three_bits() -> None:
    model = inspect_model(TINY)
    plain, browser = find_target("onnx"), find_target("browser")
    for unit in plain.list_units(model):
        offered = plain.offered_formats(model, unit)
        assert browser.offered_formats(model, unit) == tuple(name for name in offered if not name.startswith("INT3"))
    assert set(browser.offered) == {name for name in plain.offered if not name.startswith("INT3")} < set(plain.offered)
