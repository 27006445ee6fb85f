"""What files of this folder share: a tiny model of every family and one with a tied embedding, with statistics."""

from __future__ import annotations

import pytest
from onnx_tiny import Case
from tiny import FAMILIES, flat_stats, make_checkpoint

from edgemoe.model.inspect import inspect_model


@pytest.fixture(scope="session")
def cases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Case]:
    folder = tmp_path_factory.mktemp("onnx")
    made = {}
    for family in (*FAMILIES, "tied"):
        checkpoint = make_checkpoint(folder / family, "qwen3_moe" if family == "tied" else family, tied=family == "tied")
        model = inspect_model(checkpoint)
        made[family] = model, flat_stats(model, folder / f"{family}-stats", seed=3)
    return made
