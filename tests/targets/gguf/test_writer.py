"""A GGUF is as large as predicted, holds what the quantizers made, and is the same every time or not there at all."""

from __future__ import annotations

import hashlib
import os
import shutil
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from parity import UNEVEN, emit, llama_logits
from safetensors.torch import load_file, save_file
from tiny import EXAMPLES, FAMILIES, flat_plan, flat_stats

from edgemoe.base.errors import MachineError, ModelError
from edgemoe.ir import Model, Plan, tensor_name
from edgemoe.model.checkpoint import read_tensor
from edgemoe.model.describe import describe, load_shape
from edgemoe.model.inspect import inspect_model
from edgemoe.quantize.importance import importance_of
from edgemoe.stream.texts import SHIPPED
from edgemoe.targets.gguf.formats import FORMATS, WIDE, dequantize, round_rows
from edgemoe.targets.gguf.run import check_tokenizer
from edgemoe.targets.gguf.writer import _open_writer, fixed_sizes, group_tensors, order_for_rotary, write
from edgemoe.targets.stacks import list_units


def test_query_and_key_rows_change_places_for_mixtral_only(sources: dict[str, Path]) -> None:
    for family in FAMILIES:
        model = inspect_model(sources[family])
        for role, heads in (("attn_q", model.attention.heads), ("attn_k", model.attention.kv_heads), ("attn_v", model.attention.kv_heads)):
            tensor = model.find(role, 1)
            assert tensor is not None
            weights = read_tensor(model.folder, tensor)
            rows = np.arange(len(weights)).reshape(heads, 2, -1).transpose(0, 2, 1).ravel()  # halves of a head -> pairs
            moved = family == "mixtral" and role != "attn_v"
            np.testing.assert_array_equal(order_for_rotary(model, tensor, weights), weights[rows] if moved else weights)


# --------------------------------------------------------------------------------------------------------- sizes, contents
def mixed_plan(model: Model, kept: list[tuple[int, ...]]) -> Plan:
    """Every offered format somewhere, gate, up and down of a layer differently."""
    names = ["F32", *WIDE, "Q5_1", "Q5_0", "Q4_1", "IQ4_NL", "Q4_0", "MXFP4"]
    units = list_units(model)
    return flat_plan(model, {unit.name: names[(7 * i + 3) % len(names)] for i, unit in enumerate(units)}, kept)


@pytest.mark.parametrize(("family", "kept"), [*((family, UNEVEN) for family in FAMILIES), ("qwen3_moe", None)])
def test_a_file_has_the_predicted_bytes_and_holds_what_rounding_says(
    family: str, kept: list[tuple[int, ...]] | None, sources: dict[str, Path], tmp_path: Path
) -> None:
    model = inspect_model(sources[family])
    plan = mixed_plan(model, kept or [tuple(range(model.n_experts))] * model.n_layers)
    artifact = emit(model, tmp_path, plan, seed=5)
    stats = flat_stats(model, tmp_path / "stats", seed=5)
    assert artifact.size == artifact.path.stat().st_size == plan.file_size
    assert hashlib.sha256(artifact.path.read_bytes()).hexdigest() == artifact.files[0].sha256

    reader = gguf.GGUFReader(artifact.path)
    stored = {t.name: t for t in reader.tensors}
    groups = group_tensors(model)
    assert list(stored) == [name for name, _ in groups]
    for name, group in groups:
        first, tensor = group[0], stored[name]
        experts = plan.kept_of.get(first.layer, ())
        if not first.planned:  # norms and routers
            values = read_tensor(model.folder, first)
            assert tensor.tensor_type == gguf.GGMLQuantizationType.F32
            np.testing.assert_array_equal(
                tensor.data, values[list(experts)] if first.role in ("ffn_gate_inp", "exp_probs_b.bias") else values
            )
            continue
        kind, importance = plan.formats[name], importance_of(model, stats, first.layer)
        assert tensor.tensor_type == FORMATS[kind].id
        assert tensor.n_bytes == len(tensor.data.tobytes()) <= plan.sizes[name] < tensor.n_bytes + 32
        packed = tensor.data.view(np.uint8).reshape(-1, first.shape[0], tensor.n_bytes // np.prod(tensor.shape[1:], dtype=int))
        for i, source in enumerate([group[e] for e in experts] if first.expert >= 0 else group):
            weights = order_for_rotary(model, source, read_tensor(model.folder, source))
            expected = round_rows(weights, kind, importance.get((source.role, source.expert)))
            np.testing.assert_array_equal(dequantize(packed[i], kind, first.shape[1]), expected, err_msg=f"{name} {kind} {source.expert}")
            if kind == "F32":
                np.testing.assert_array_equal(expected, weights)
            else:
                assert kind == "F16" or np.abs(expected - weights).max() > 0
    assert reader.get_field(f"{reader.get_field('general.architecture').contents()}.expert_count").contents() == plan.count
    flags = np.array(reader.get_field("edgemoe.experts_kept").contents()).reshape(model.n_layers, model.n_experts)
    assert [tuple(np.flatnonzero(row)) for row in flags] == [plan.kept_of.get(layer, ()) for layer in range(model.n_layers)]
    assert reader.get_field("edgemoe.model").contents() == model.fingerprint


def test_a_models_name_counts_in_the_predicted_bytes(sources: dict[str, Path], tmp_path: Path) -> None:
    for name in ("m", "m" * 40):
        model = inspect_model(shutil.copytree(sources["mixtral"], tmp_path / name))  # the same fingerprint
        plan = flat_plan(model, "Q4_K")
        assert emit(model, tmp_path / "out", plan).size == plan.file_size


def test_the_file_type_names_the_format_that_holds_most(sources: dict[str, Path], tmp_path: Path) -> None:
    model = inspect_model(sources["mixtral"])
    for name in FORMATS:
        kinds = {unit.name: "IQ1_S" if unit.role.startswith("attn") else name for unit in list_units(model)}
        writer = _open_writer(tmp_path / "x.gguf", model, None, flat_plan(model, kinds), 0)
        found = gguf.LlamaFileType(writer.kv_data[0]["general.file_type"].value).name
        assert found in {f"{start}_{name}{end}" for start in ("ALL", "MOSTLY") for end in ("", "_M", "_MOE")}


# ------------------------------------------------------------------------------------------------------- files, repetition
def test_split_files_load_and_give_the_same_logits(sources: dict[str, Path], tmp_path: Path) -> None:
    model = inspect_model(sources["olmoe"])
    plan = flat_plan(model, "Q8_0")
    whole = emit(model, tmp_path / "whole", plan)
    split = emit(model, tmp_path / "split", plan, shard_max=2_000_000)
    assert all(file.size <= 2_000_000 for file in split.files)  # with their headers
    assert len(split.files) > 2 and len(whole.files) == 1
    assert split.path.name.endswith(f"-00001-of-{len(split.files):05d}.gguf")
    assert sorted(p.name for p in (tmp_path / "split").glob("*.gguf")) == [f.name for f in split.files]
    np.testing.assert_array_equal(llama_logits(split.path, model), llama_logits(whole.path, model))


def test_writing_twice_gives_identical_bytes(sources: dict[str, Path], tmp_path: Path) -> None:
    model = inspect_model(sources["qwen3_moe"])
    first, second = (emit(model, tmp_path / name, mixed_plan(model, UNEVEN)) for name in ("a", "b"))
    assert first.files == second.files
    assert first.path.read_bytes() == second.path.read_bytes()


def test_progress_ends_at_the_whole_and_no_scratch_is_left(sources: dict[str, Path], tmp_path: Path) -> None:
    model, seen = inspect_model(sources["mixtral"]), []
    (tmp_path / ".part").mkdir()
    (tmp_path / ".part" / "from-a-killed-run.gguf").write_bytes(b"half")
    stats = flat_stats(model, tmp_path / "stats")
    artifact = write(model, stats, flat_plan(model, "Q4_K"), tmp_path, progress=lambda *at: seen.append(at))
    assert seen == sorted(seen) and seen[-1][0] == seen[-1][1]
    assert {p.name for p in tmp_path.iterdir()} == {"stats", artifact.path.name}


def test_a_full_disk_leaves_nothing_behind(sources: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any) -> None:
        raise OSError(28, os.strerror(28))

    model = inspect_model(sources["mixtral"])
    plan, stats = flat_plan(model), flat_stats(model, tmp_path / "stats")
    monkeypatch.setattr(gguf.GGUFWriter, "write_tensor_data", fail)
    with pytest.raises(MachineError, match="No space left"):
        write(model, stats, plan, tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ["stats"]


@pytest.mark.parametrize("name", ["tiny-moe", "tiny-moe-b"])
def test_heldout_lines_tokenize_as_with_the_original_tokenizer(name: str, tmp_path: Path) -> None:
    model = inspect_model(EXAMPLES / name)
    lines = [line for path in sorted((SHIPPED / "heldout").glob("*.txt")) for line in path.read_text("utf-8").splitlines() if line.strip()]
    assert check_tokenizer(emit(model, tmp_path, flat_plan(model, "Q4_K")).path, model, lines[:: len(lines) // 200][:200]) == []


# --------------------------------------------------------------------------------------------------------------- refusals
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_no_numbers_stop_the_writer(value: float, copy: Any, tmp_path: Path) -> None:
    folder = copy("qwen3_moe")
    weights = load_file(folder / "model.safetensors")
    name = "model.layers.1.mlp.experts.2.up_proj.weight"
    weights[name][3, 4] = value
    save_file(weights, folder / "model.safetensors")
    model = inspect_model(folder)  # headers only: nothing is read yet
    with pytest.raises(ModelError, match=f"{name} holds 1 NaN or infinite weights"):
        emit(model, tmp_path / "out")
    assert [p.name for p in (tmp_path / "out").iterdir()] == ["stats"]  # nor half a file


def test_units_are_every_matrix_but_the_routers(sources: dict[str, Path]) -> None:
    model = inspect_model(sources["olmoe"])
    roles = ("attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate_exps", "ffn_up_exps", "ffn_down_exps")
    assert {u.name for u in list_units(model)} == {
        tensor_name(role, layer) for role, layer in [("token_embd", -1), ("output", -1), *((r, i) for i in range(2) for r in roles)]
    }
    flat = sum(t.n_weights for t in model.tensors if not t.planned)
    assert sum(u.n_weights for u in list_units(model)) + flat == model.n_weights


def test_a_shape_has_a_fixed_size_though_it_has_no_tokenizer() -> None:
    model = describe(load_shape("GLM-5.2"))
    routers = 75 * 4 * (6144 + 1)  # bytes for each expert: its router row and its selection bias
    assert fixed_sizes(model, [256])[0] - fixed_sizes(model, [128])[0] == 128 * routers
    assert 5e6 < fixed_sizes(model, [256])[0] - 256 * routers < 2e7  # header, vocabulary and norms: published files have 5 to 20 MB
