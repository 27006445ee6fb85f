"""The files of an ONNX artifact: bytes as planned and always the same, and what can be written in which format."""

from __future__ import annotations

import dataclasses
import itertools
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnx
import pytest
from onnx_tiny import KEPT, Case, emit, hand_plan, mixed
from tiny import EXAMPLES, make_checkpoint

from edgemoe.base.errors import MachineError, ModelError
from edgemoe.ir import Unit
from edgemoe.model.inspect import inspect_model
from edgemoe.targets.onnx.graph_builder import Sheet
from edgemoe.targets.onnx.writer import fixed_sizes, list_units, offered_formats, unit_size, write

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
    assert fixed_sizes(model, [2])[0] == fixed_sizes(model, [8])[0]


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
