"""A weight beyond half floats takes formats away, and is named only where no format is left."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import make_checkpoint

from edgemoe.base.errors import ModelError
from edgemoe.calibrate.collect import collect_stats
from edgemoe.ir import Costs
from edgemoe.model.inspect import inspect_model
from edgemoe.price.choices import price_choices
from edgemoe.stream.texts import SHIPPED, read_text
from edgemoe.targets import find_target

LARGE = {
    "model.layers.0.self_attn.q_proj.weight": "blk.0.attn_q.weight",
    "model.layers.1.block_sparse_moe.experts.2.w1.weight": "blk.1.ffn_gate_exps.weight",
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = make_checkpoint(tmp_path_factory.mktemp("large") / "m", "mixtral", n_experts=4, hidden=128, expert_size=64)
    weights = load_file(folder / "model.safetensors")
    for name in LARGE:
        weights[name][3, 5] = torch.tensor(2.0**17, dtype=torch.bfloat16)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


@pytest.mark.parametrize("target", ["gguf", "onnx"])
def test_formats_that_cannot_hold_a_tensor_are_left_out(folder: Path, target: str, tmp_path: Path) -> None:
    model = inspect_model(folder)
    stats = collect_stats(model, [read_text(str(SHIPPED / "calibration" / "english.txt"))], tmp_path, max_tokens=1024)
    costs: Costs = price_choices(model, stats, find_target(target), 512)
    assert not np.isnan(costs.cost).any()
    offered = {
        u.name: {f for f, nats in zip(costs.formats, costs.cost[-1, n], strict=True) if np.isfinite(nats)}
        for n, u in enumerate(costs.units)
    }
    if target == "gguf":
        for name, found in offered.items():
            assert ("F16" not in found) == (name in LARGE.values())
            assert "Q8_0" in found


def test_a_tensor_that_no_format_holds_is_named(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = inspect_model(folder)
    stats = collect_stats(model, [read_text(str(SHIPPED / "calibration" / "english.txt"))], tmp_path, max_tokens=1024)
    monkeypatch.setattr("edgemoe.price.matrices.formats_too_small", lambda target, matrix, formats, importance: list(formats))
    with pytest.raises(ModelError, match="no format can hold the weights of token_embd"):
        price_choices(model, stats, find_target("gguf"), 512)
