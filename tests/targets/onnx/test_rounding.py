"""Rounding with feedback onto ONNX grids: packed rows say what the kernels read, and the writer copies them as they are."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest
from correlated import correlated, weights
from onnx import numpy_helper
from onnx_tiny import emit, hand_plan
from tiny import EXAMPLES

from edgemoe.base.errors import ModelError
from edgemoe.calibrate.collect import collect_stats
from edgemoe.model.checkpoint import read_packed
from edgemoe.model.inspect import inspect_model
from edgemoe.pipeline.store import store_weights
from edgemoe.quantize.gptq import factor_hessian, objective
from edgemoe.stream.texts import SHIPPED, read_text
from edgemoe.targets.onnx.formats import OFFERED, dequantize, piece_bytes, quantize, round_rows
from edgemoe.targets.onnx.rounding import feeds_back, pack_rows, split_rows, unpack_rows

TOKENS = 2048


@pytest.mark.parametrize("name", [*OFFERED, "F32"])
def test_packed_rows_stand_for_what_the_stock_search_gives(name: str) -> None:
    rows = weights(0, 5, 384)
    packed = pack_rows(rows, name, None, None)
    assert packed.shape == (5, sum(piece_bytes(name, 1, 384).values()))
    np.testing.assert_array_equal(unpack_rows(packed, name, 384), round_rows(rows, name))
    again = split_rows(packed, name, 384).pieces()
    for piece, values in quantize(rows, name).pieces().items():
        np.testing.assert_array_equal(again[piece], values)


@pytest.mark.parametrize("name", OFFERED)
def test_feedback_beats_the_stock_search_on_its_own_objective(name: str) -> None:
    assert feeds_back(name)
    for seed, cols in ((0, 256), (1, 384)):  # a last chunk that is shorter
        rows, hessian = weights(seed, cols=cols), factor_hessian(correlated(seed, cols))
        stock = dequantize(quantize(rows, name, hessian.importance), name, cols)
        ours = unpack_rows(pack_rows(rows, name, None, hessian), name, cols)
        assert objective(rows, ours, hessian).sum() < 0.6 * objective(rows, stock, hessian).sum()


def test_floats_and_odd_weights() -> None:
    assert not feeds_back("F32")
    rows = weights(6, 3)
    rows[0] = 0
    assert not unpack_rows(pack_rows(rows, "INT3_128", None, factor_hessian(correlated(6))), "INT3_128", 256)[0].any()
    rows[1, 3] = np.nan
    with pytest.raises(ModelError, match="NaN"):
        pack_rows(rows, "INT4_32", None, None)


def test_the_artifact_holds_the_packed_rows(tmp_path: Path) -> None:
    model = inspect_model(EXAMPLES / "tiny-moe-b")
    texts = [read_text(str(path)) for path in sorted((SHIPPED / "calibration").glob("*.txt"))][:2]
    stats = collect_stats(model, texts, tmp_path / "stats", max_tokens=TOKENS)
    kept = [(0, 1, 4), (2, 3, 6, 5)]
    kept = [tuple(sorted(k)) for k in kept]
    widths = {0: "INT3_128", 1: "INT2_128", 4: "INT3_128", 2: "INT4_64", 3: "INT4_64", 5: "INT2_128", 6: "INT4_64"}
    plan = replace(hand_plan(model, lambda u: widths[u.expert] if u.expert >= 0 else "INT4_32", kept), repair=True)
    stored = store_weights(model, texts, stats, plan, tmp_path / "work", max_tokens=TOKENS)
    for tensor in stored.tensors:
        survives = tensor.expert < 0 or tensor.expert in plan.kept_of[tensor.layer]
        planned = len(tensor.shape) == 2 and tensor.role != "ffn_gate_inp"
        assert tensor.packed == ((widths[tensor.expert] if tensor.expert >= 0 else "INT4_32") if survives and planned else "")
    artifact = emit(stored, stats, plan, tmp_path / "out")
    assert artifact.model_size == plan.file_size
    found = {t.name: numpy_helper.to_array(t) for t in onnx.load(artifact.path).graph.initializer}

    def pieces(role: str, layer: int, expert: int = -1) -> dict[str, np.ndarray]:
        tensor = stored.find(role, layer, expert)
        assert tensor is not None
        rows = read_packed(stored.folder, tensor, sum(piece_bytes(tensor.packed, 1, tensor.shape[1]).values()))
        return split_rows(rows, tensor.packed, tensor.shape[1]).pieces()

    for piece, values in pieces("attn_v", 1).items():
        np.testing.assert_array_equal(found[f"blk.1.attn_v.{piece}"].view(np.uint8).reshape(values.shape), values)
    for number, expert in enumerate((0, 4)):  # the INT3 experts of layer 0, in the order of their numbers
        gate, up, down = (pieces(f"ffn_{p}_exps", 0, expert) for p in ("gate", "up", "down"))
        for piece, values in down.items():
            here = found[f"blk.0.ffn_exps.INT3_128.fc2.{piece}"][number].view(np.uint8).reshape(values.shape)
            np.testing.assert_array_equal(here, values)
        for piece, values in gate.items():
            both = found[f"blk.0.ffn_exps.INT3_128.fc1.{piece}"][number].view(np.uint8).reshape(2 * len(values), -1)
            np.testing.assert_array_equal(both[0::2], values)
            np.testing.assert_array_equal(both[1::2], up[piece])
