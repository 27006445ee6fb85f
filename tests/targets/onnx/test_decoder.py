"""The ONNX decoder against transformers: the trained models in floats, as rounded where it rounds, with its cache and in batches."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from onnx_tiny import KEPT, MIX, Case, Runner, emit, hand_plan, mean_kl, mixed, reference, reference_logits, token_errors
from tiny import EXAMPLES, FAMILIES, VOCAB_SIZE, flat_stats

from edgemoe.ir import Unit
from edgemoe.model.inspect import inspect_model
from edgemoe.targets.onnx.decoder import build_decoder
from edgemoe.targets.onnx.graph_builder import Sheet
from edgemoe.targets.onnx.writer import list_units


def only_experts(name: str) -> Callable[[Unit], str]:
    return lambda unit: name if unit.expert >= 0 else "F32"


@pytest.fixture(scope="module")
def ids() -> NDArray[np.int64]:
    return np.random.default_rng(0).integers(0, VOCAB_SIZE, (2, 40))


@pytest.mark.parametrize("name", ["tiny-moe", "tiny-moe-b"])
def test_in_floats_it_is_the_trained_model(tmp_path: Path, name: str) -> None:
    from transformers import AutoTokenizer

    model = inspect_model(EXAMPLES / name)
    stats, plan = flat_stats(model, tmp_path / "stats"), hand_plan(model, "F32")
    artifact = emit(model, stats, plan, tmp_path / "out")
    text = (EXAMPLES.parent / "README.md").read_text()[:1500]
    tokens = np.array([AutoTokenizer.from_pretrained(model.folder)(text)["input_ids"][:256]])
    want = reference_logits(reference(model, stats, plan), tokens)
    assert mean_kl(want, Runner(artifact.path, model).step(tokens)) <= 1e-6


# 2 bits round sums of inputs otherwise than the reference; int8 inputs differ where a half is rounded the other way.
WIDTHS = {"INT2_128": 4e-2, "INT3_128": 2e-3, "INT4_32": 1e-5, "INT8_32": 1e-2, "INT8_128": 1e-2}


@pytest.mark.parametrize("name", WIDTHS)
def test_experts_of_one_width_are_those_of_the_rounded_model(
    cases: dict[str, Case], ids: NDArray[np.int64], tmp_path: Path, name: str
) -> None:
    model, stats = cases["qwen3_moe"]
    plan = hand_plan(model, only_experts(name), KEPT)
    artifact = emit(model, stats, plan, tmp_path / "out")
    errors = token_errors(reference_logits(reference(model, stats, plan), ids), Runner(artifact.path, model).step(ids))
    assert np.median(errors) < WIDTHS[name]
    assert np.quantile(errors, 0.9) < 2 * WIDTHS[name]


@pytest.mark.parametrize("family", [*FAMILIES, "tied"])
def test_every_format_at_once_is_the_rounded_model(cases: dict[str, Case], ids: NDArray[np.int64], tmp_path: Path, family: str) -> None:
    model, stats = cases[family]
    plan = hand_plan(model, mixed, (tuple(range(8)), KEPT[0]))
    artifact = emit(model, stats, plan, tmp_path / "out")
    errors = token_errors(reference_logits(reference(model, stats, plan), ids), Runner(artifact.path, model).step(ids))
    assert np.median(errors) < 4e-2


@pytest.mark.parametrize("family", FAMILIES)
def test_decoding_with_the_cache_is_the_whole_sequence_at_once(
    cases: dict[str, Case], ids: NDArray[np.int64], tmp_path: Path, family: str
) -> None:
    model, stats = cases[family]
    artifact = emit(model, stats, hand_plan(model, only_experts("INT4_32"), KEPT), tmp_path / "out")
    whole = Runner(artifact.path, model).step(ids[:1])
    runner = Runner(artifact.path, model)
    parts = [runner.step(ids[:1, :5]), runner.step(ids[:1, 5:12]), *(runner.step(ids[:1, i : i + 1]) for i in range(12, 40))]
    assert np.abs(np.concatenate(parts, axis=1) - whole).max() < 1e-3


def test_a_shorter_row_of_a_batch_may_be_padded_on_the_right(cases: dict[str, Case], ids: NDArray[np.int64], tmp_path: Path) -> None:
    model, stats = cases["qwen3_moe"]
    artifact = emit(model, stats, hand_plan(model, "F32"), tmp_path / "out")
    alone = Runner(artifact.path, model).step(ids[1:, :25])
    mask = np.ones_like(ids)
    mask[1, 25:] = 0
    both = Runner(artifact.path, model).step(ids, mask)
    assert np.abs(both[1:, :25] - alone).max() < 1e-3


def test_positions_reach_beyond_the_trained_context(tmp_path: Path, cases: dict[str, Case]) -> None:
    model, stats = cases["mixtral"]
    artifact = emit(model, stats, hand_plan(model, "F32"), tmp_path / "out")
    ids = np.random.default_rng(1).integers(0, VOCAB_SIZE, (1, model.context_length + 60))
    want = reference_logits(reference(model, stats, hand_plan(model, "F32")), ids)
    assert mean_kl(want[:, -60:], Runner(artifact.path, model).step(ids)[:, -60:]) <= 1e-6


def test_attributes_and_inputs_of_contrib_operators_are_in_the_schema(cases: dict[str, Case]) -> None:
    from onnxruntime.capi.onnxruntime_pybind11_state import get_all_operator_schema

    schemas = {s.name: s for s in get_all_operator_schema() if s.domain == "com.microsoft"}
    model, _ = cases["qwen3_moe"]
    sheet = Sheet()
    dense = {u.name: "INT4_32" for u in list_units(model) if u.expert < 0} | {"blk.0.attn_q.weight": "F32"}
    build_decoder(sheet, model, [[(name, 2) for name in MIX]] * 2, dense)
    used = [node for node in sheet.nodes if node.domain]
    assert {node.op_type for node in used} >= {"QMoE", "MoE", "MatMulNBits", "GroupQueryAttention", "FusedMatMul", "GatherBlockQuantized"}
    for node in used:  # onnxruntime ignores an attribute that it does not know
        schema = schemas[node.op_type]
        assert {a.name for a in node.attribute} <= set(schema.attributes), node.op_type
        assert len(node.input) <= len(schema.inputs)
