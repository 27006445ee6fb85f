"""The ONNX decoder against transformers: exact in floats, exact where it drops, as rounded where it rounds; bytes as planned."""

from __future__ import annotations

import dataclasses
import itertools
import json
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from numpy.typing import NDArray
from onnx_tiny import Runner, emit, hand_plan, mean_kl, reference, reference_logits, token_errors
from tiny import EXAMPLES, FAMILIES, VOCAB_SIZE, flat_stats, make_checkpoint

from edgemoe.base.errors import MachineError, ModelError
from edgemoe.base.types import F32
from edgemoe.ir import Model, Stats, Unit
from edgemoe.model.inspect import inspect_model
from edgemoe.targets.onnx import fixed_size, list_units, offered_formats, unit_size, write
from edgemoe.targets.onnx.decoder import build_decoder
from edgemoe.targets.onnx.graph_builder import Sheet, make_model
from edgemoe.targets.onnx.router import Router, add_router

KEPT = ((0, 1, 3, 4, 6, 7), (2, 5))  # other experts and another number in each layer
MIX = ("INT2_128", "INT3_128", "INT4_32", "INT8_128", "F32", "INT4_64", "INT8_32", "INT3_64")
Case = tuple[Model, Stats]


def mixed(unit: Unit) -> str:
    """Another format for every expert; matrices in 4 and 8 bits."""
    if unit.expert >= 0:
        return MIX[unit.expert]
    return {"attn_k": "INT8_128", "token_embd": "INT4_64", "output": "INT8_32"}.get(unit.role, "INT4_32")


def only_experts(name: str) -> Callable[[Unit], str]:
    return lambda unit: name if unit.expert >= 0 else "F32"


@pytest.fixture(scope="module")
def cases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Case]:
    folder = tmp_path_factory.mktemp("onnx")
    made = {}
    for family in (*FAMILIES, "tied"):
        checkpoint = make_checkpoint(folder / family, "qwen3_moe" if family == "tied" else family, tied=family == "tied")
        model = inspect_model(checkpoint)
        made[family] = model, flat_stats(model, folder / f"{family}-stats", seed=3)
    return made


@pytest.fixture(scope="module")
def ids() -> NDArray[np.int64]:
    return np.random.default_rng(0).integers(0, VOCAB_SIZE, (2, 40))


# ------------------------------------------------------------------------------------------------------------- the result
@pytest.mark.parametrize("kept", [None, KEPT], ids=["all", "dropped"])
@pytest.mark.parametrize("family", [*FAMILIES, "tied"])
def test_in_floats_it_is_the_transformers_model(
    cases: dict[str, Case], ids: NDArray[np.int64], tmp_path: Path, family: str, kept: Sequence[Sequence[int]] | None
) -> None:
    model, stats = cases[family]
    plan = hand_plan(model, "F32", kept)
    artifact = emit(model, stats, plan, tmp_path / "out")
    want = reference_logits(reference(model, stats, plan), ids)
    got = Runner(artifact.path, model).step(ids)
    assert np.abs(got - want).max() <= 1e-3
    assert mean_kl(want, got) <= 1e-6


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


# -------------------------------------------------------------------------------------------------------------- the files
PLANS: dict[str, tuple[str | Callable[[Unit], str], Any]] = {
    "floats": ("F32", None),
    "8 bits": ("INT8_32", None),
    "4 bits, dropped": ("INT4_128", KEPT),
    "3 bits": (lambda unit: "INT3_128" if unit.expert >= 0 else "INT2_128", None),
    "mixed": (mixed, None),
    "mixed, dropped": (mixed, KEPT),
}


@pytest.mark.parametrize("family", ["olmoe", "mixtral", "tied"])
@pytest.mark.parametrize("case", PLANS)
def test_the_files_have_the_planned_bytes_and_pass_the_checker(cases: dict[str, Case], tmp_path: Path, family: str, case: str) -> None:
    model, stats = cases[family]
    choose, kept = PLANS[case]
    plan = hand_plan(model, choose, kept)
    artifact = emit(model, stats, plan, tmp_path / "out")
    assert [file.name for file in artifact.files[:2]] == ["model.onnx", "model.onnx.data"]
    assert sum(file.size for file in artifact.files[:2]) == plan.file_size
    assert {p.name: p.stat().st_size for p in (tmp_path / "out").iterdir()} == {file.name: file.size for file in artifact.files}
    onnx.checker.check_model(str(artifact.path), full_check=True)


def test_weights_do_not_overlap_and_lie_at_multiples_of_64(cases: dict[str, Case], tmp_path: Path) -> None:
    model, stats = cases["olmoe"]
    artifact = emit(model, stats, hand_plan(model, mixed, KEPT), tmp_path / "out")
    graph = onnx.load(artifact.path, load_external_data=False).graph
    places = [{e.key: e.value for e in t.external_data} for t in graph.initializer if t.external_data]
    spans = sorted((int(p["offset"]), int(p["offset"]) + int(p["length"])) for p in places)
    assert all(start % 64 == 0 for start, _ in spans)
    assert all(end <= start for (_, end), (start, _) in itertools.pairwise(spans))
    assert spans[-1][1] <= artifact.files[1].size


def test_a_second_time_and_on_one_core_the_bytes_are_the_same(
    cases: dict[str, Case], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, stats = cases["qwen3_moe"]
    plan = hand_plan(model, mixed, KEPT)
    found = []
    for number, cores in enumerate((2, 2, 1)):
        monkeypatch.setattr("edgemoe.targets.onnx.writer.count_cores", lambda cores=cores: cores)
        found.append([f.sha256 for f in emit(model, stats, plan, tmp_path / str(number)).files])
    assert found[0] == found[1] == found[2]


def test_an_interrupted_write_leaves_nothing(cases: dict[str, Case], tmp_path: Path) -> None:
    model, stats = cases["qwen3_moe"]

    def stop(done: int, total: int) -> None:
        assert 0 < done <= total
        if done > total // 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write(model, stats, hand_plan(model, "INT8_32"), tmp_path, progress=stop)
    assert not list(tmp_path.iterdir())


def test_what_it_was_made_from_is_in_the_file(cases: dict[str, Case], tmp_path: Path) -> None:
    model, stats = cases["qwen3_moe"]
    for folder, choose, least in (("three", mixed, "1.32"), ("none", "INT8_32", "1.31")):
        plan = dataclasses.replace(hand_plan(model, choose, KEPT), repair=folder == "three")
        loaded = onnx.load(emit(model, stats, plan, tmp_path / folder).path, load_external_data=False)
        found = {p.key.removeprefix("edgemoe."): p.value for p in loaded.metadata_props}
        assert (found["model"], found["stats"], found["costs"]) == (model.fingerprint, stats.key, plan.costs)
        assert (float(found["predicted_kl"]), int(found["budget"])) == (0.125, 2**30)
        assert found["repaired"] == str(plan.repair).lower()
        rows = found["experts_kept"].split()
        assert tuple(tuple(e for e, flag in enumerate(row) if flag == "1") for row in rows) == KEPT
        assert found["least_onnxruntime"] == least
        assert {n.op_type for n in loaded.graph.node if n.domain == "com.microsoft"} <= set(
            found["contrib_operators"].split(": ")[1].split(", ")
        )
        assert [(o.domain, o.version) for o in loaded.opset_import] == [("", 23), ("com.microsoft", 1)]


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


# ---------------------------------------------------------------------------------------------------------------- routers
def run_router(
    weight: NDArray[np.float32], bias: NDArray[np.float32] | None, router: Router, x: NDArray[np.float32]
) -> NDArray[np.float32]:
    import onnxruntime

    sheet = Sheet()
    add_router(sheet, "x", "w", len(weight), router, "r", "b" if bias is not None else "")
    feeds = {"x": x, "w": np.ascontiguousarray(weight.T)} | ({"b": bias} if bias is not None else {})
    inputs = [onnx.helper.make_tensor_value_info(k, 1, v.shape) for k, v in feeds.items()]
    model = make_model(sheet, inputs, [onnx.helper.make_tensor_value_info("r.gates", 1, None)], {})
    gates: F32 = onnxruntime.InferenceSession(model.SerializeToString()).run(None, feeds)[0]
    return gates


@pytest.mark.parametrize("renormalize", [True, False])
@pytest.mark.parametrize("groups", [(1, 1), (4, 2)])
@pytest.mark.parametrize("family", ["deepseek_v3", "glm4_moe"])
def test_routers_with_groups_and_a_correction_bias_are_transformers_own(family: str, groups: tuple[int, int], renormalize: bool) -> None:
    from transformers import DeepseekV3Config, Glm4MoeConfig
    from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3TopkRouter
    from transformers.models.glm4_moe.modeling_glm4_moe import Glm4MoeTopkRouter

    config, router = {"deepseek_v3": (DeepseekV3Config, DeepseekV3TopkRouter), "glm4_moe": (Glm4MoeConfig, Glm4MoeTopkRouter)}[family]
    shape: dict[str, Any] = {"n_routed_experts": 16, "num_experts_per_tok": 3, "hidden_size": 64, "norm_topk_prob": renormalize}
    module: Any = router(config(**shape, n_group=groups[0], topk_group=groups[1], routed_scaling_factor=2.5))
    generator = torch.Generator().manual_seed(1)
    module.weight.data = torch.randn(16, 64, generator=generator) / 8
    module.e_score_correction_bias = torch.randn(16, generator=generator) / 4
    x = torch.randn(200, 64, generator=generator)
    with torch.no_grad():
        _, weights, index = module(x)
        want = torch.zeros(200, 16).scatter_(1, index, weights).numpy()
    rule = Router(top_k=3, scoring="sigmoid", renormalize=renormalize, scale=2.5, groups=groups[0], top_groups=groups[1])
    got = run_router(module.weight.detach().numpy(), module.e_score_correction_bias.numpy(), rule, x.numpy())
    assert np.abs(got - want).max() < 1e-6


GROUPED = np.array([0.9, 0.1, 0.5, 0.45, 0.3, 0.6, 0.2, 0.7])  # scores of one token, in four groups of two


@pytest.mark.parametrize(
    ("left", "groups", "chosen"),
    [
        ([0, 1, 2, 3, 4, 5, 6, 7], 4, [0, 2]),  # group sums 1.0, 0.95, 0.9, 0.9: the first two
        ([0, 2, 3, 5, 6, 7], 3, [0, 5]),  # 1 and 4 gone, numbered anew: 0 and 2 are still there, and 2 is not chosen any more
    ],
)
def test_numbering_experts_anew_across_groups_changes_the_choice_of_a_token_that_lost_none(
    left: list[int], groups: int, chosen: list[int]
) -> None:
    scores = GROUPED[left]
    logits = np.log(scores / (1 - scores)).astype(np.float32)[:, None]
    rule = Router(top_k=2, scoring="sigmoid", groups=groups, top_groups=2)
    gates = run_router(logits, None, rule, np.ones((1, 1), np.float32))[0]
    assert [left[i] for i in np.flatnonzero(gates)] == chosen


@pytest.mark.parametrize(("n", "groups", "top_groups"), [(6, 4, 2), (7, 4, 2), (4, 4, 1)])
def test_experts_that_are_not_as_many_of_each_group_are_refused(n: int, groups: int, top_groups: int) -> None:
    with pytest.raises(ModelError, match="groups"):
        add_router(Sheet(), "x", "w", n, Router(top_k=2, groups=groups, top_groups=top_groups), "r")


@pytest.mark.parametrize("renormalize", [True, False])
@pytest.mark.parametrize("n", [1, 2, 7])
def test_softmax_routers_run_over_the_rows_that_are_left(n: int, renormalize: bool) -> None:
    generator = np.random.default_rng(n)
    weight, x = generator.standard_normal((n, 32)).astype(np.float32), generator.standard_normal((50, 32)).astype(np.float32)
    logits = (x @ weight.T).astype(np.float64)
    p = np.exp(logits - logits.max(axis=1, keepdims=True))
    p /= p.sum(axis=1, keepdims=True)
    chosen = np.argsort(-p, axis=1)[:, :3]
    want = np.zeros_like(p)
    np.put_along_axis(want, chosen, np.take_along_axis(p, chosen, 1), 1)
    if renormalize:
        want /= want.sum(axis=1, keepdims=True)
    assert np.abs(run_router(weight, None, Router(top_k=3, renormalize=renormalize), x) - want).max() < 1e-6


# ----------------------------------------------------------------------------------------------------------------- limits
def test_every_unit_is_offered_formats_that_it_can_be_written_in(cases: dict[str, Case]) -> None:
    model, _ = cases["qwen3_moe"]
    units = list_units(model)
    assert [u.name for u in units if u.expert >= 0][:2] == ["blk.0.ffn_exps.0", "blk.0.ffn_exps.1"]
    assert sum(u.n_weights for u in units) == sum(t.n_weights for t in model.tensors if len(t.shape) == 2 and t.role != "ffn_gate_inp")
    for unit in units:
        names = offered_formats(model, unit)
        sizes = [unit_size(model, unit, name, 8) for name in names]
        assert sizes == sorted(sizes, reverse=True)
        assert any(name.startswith("INT3") for name in names) == (unit.expert >= 0)
    assert fixed_size(model, 2) == fixed_size(model, 8)


NARROW = {"INT8_32", "INT4_32", "INT4_64", "INT3_64", "INT3_32"}


@pytest.mark.parametrize(("size", "expected"), [(192, NARROW | {"INT2_64", "INT2_32"}), (160, {"INT8_32", "INT4_32", "INT3_32"})])
def test_shapes_that_wide_blocks_do_not_fit_are_offered_others(tmp_path: Path, size: int, expected: set[str]) -> None:
    model = inspect_model(make_checkpoint(tmp_path / "model", "olmoe", expert_size=size))
    expert = next(u for u in list_units(model) if u.expert >= 0)
    assert set(offered_formats(model, expert)) == expected


def test_shapes_that_no_format_stores_are_refused(tmp_path: Path) -> None:
    model = inspect_model(make_checkpoint(tmp_path / "model", "mixtral", expert_size=80))
    expert = next(u for u in list_units(model) if u.expert >= 0)
    with pytest.raises(ModelError, match=r"blk\.0\.ffn_exps\.0: rows of 256 and 80 weights"):
        offered_formats(model, expert)


def test_without_onnx_the_remedy_is_named(cases: dict[str, Case], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "onnx", None)
    with pytest.raises(MachineError, match="onnx is not installed") as error:
        Sheet().constant("one", [1])
    assert "edgemoe[onnx]" in error.value.hint


def test_the_target_imports_neither_onnx_nor_torch() -> None:
    code = "import json, sys, edgemoe.targets.onnx; print(json.dumps(sorted({m.split('.')[0] for m in sys.modules})))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=EXAMPLES.parent)
    assert not {"onnx", "onnxruntime", "torch"} & set(json.loads(done.stdout))
