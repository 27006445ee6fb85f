"""MLX folders of every family: stock mlx_lm loads them strictly and computes what our own decoding gives in transformers."""

from __future__ import annotations

import json
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from mlx_folder import KINDS, decoded_checkpoint, hand_plan, mixed, stock_logits, write_folder
from parity import UNEVEN, heldout_tokens, judge, original_logits
from safetensors.numpy import load_file, save_file
from tiny import FAMILIES, edit_config, flat_stats, make_checkpoint

from edgemoe.base.errors import ModelError, UsageError, VerifyError
from edgemoe.model.inspect import inspect_model
from edgemoe.targets import find_target
from edgemoe.targets.mlx.formats import FORMATS
from edgemoe.targets.mlx.reader import float_types, read_values


def all_kept(source: Path) -> list[tuple[int, ...]]:
    model = inspect_model(source)
    return [tuple(range(model.n_experts))] * len(model.moe_layers)


# ---------------------------------------------------------------------------------------------------------------- families
@pytest.mark.parametrize("kept", [None, UNEVEN], ids=["all", "dropped"])
@pytest.mark.parametrize("family", [*FAMILIES, "tied"])
def test_stock_mlx_computes_what_our_decoding_gives(
    family: str, kept: list[tuple[int, ...]] | None, sources: dict[str, Path], tmp_path: Path
) -> None:
    source = make_checkpoint(tmp_path / "tied", "qwen3_moe", tied=True) if family == "tied" else sources[family]
    plan, artifact = write_folder(source, tmp_path / "out", mixed, kept)
    assert artifact.model_size == plan.file_size
    oracle = original_logits(decoded_checkpoint(source, tmp_path / "out", kept or all_kept(source), tmp_path / "oracle"))
    found = stock_logits(tmp_path / "out", heldout_tokens())
    figures = judge(oracle, found)
    relative = float(np.linalg.norm(found - oracle) / np.linalg.norm(oracle))
    print(f"mlx {family}, {'all' if kept is None else 'dropped'}: relative {relative:.2g}, {figures}")  # noqa: T201
    assert relative < 1e-5
    assert figures["kl"] < 1e-10
    assert figures["same"] > 0.995


def test_a_router_with_groups_keeps_as_many_experts_of_each(tmp_path: Path) -> None:
    source = edit_config(make_checkpoint(tmp_path / "glm4_moe", "glm4_moe", seed=3), n_group=2, topk_group=1)
    kept = [(0, 2, 3, 5, 6, 7), (0, 1, 2, 4, 5, 7)]
    write_folder(source, tmp_path / "out", mixed, kept)
    oracle = original_logits(decoded_checkpoint(source, tmp_path / "out", kept, tmp_path / "oracle"))
    figures = judge(oracle, stock_logits(tmp_path / "out", heldout_tokens()))
    assert figures["kl"] < 1e-9
    assert figures["max_diff"] < 1e-4


@pytest.mark.parametrize("name", [name for name, kind in FORMATS.items() if kind.group])
def test_stock_mlx_reads_every_format_in_every_module(name: str, tmp_path: Path) -> None:
    source = make_checkpoint(tmp_path / "in", "qwen3_moe", hidden=128, expert_size=128, n_experts=4)
    write_folder(source, tmp_path / "out", name)
    oracle = original_logits(decoded_checkpoint(source, tmp_path / "out", all_kept(source), tmp_path / "oracle"))
    assert judge(oracle, stock_logits(tmp_path / "out", heldout_tokens()))["kl"] < 1e-9


# -------------------------------------------------------------------------------------------------------------- the folder
@pytest.mark.parametrize("dtype", ["f16", "bf16"])
@pytest.mark.parametrize("family", FAMILIES)
def test_every_module_has_an_entry_and_all_floats_one_type(family: str, dtype: str, sources: dict[str, Path], tmp_path: Path) -> None:
    write_folder(sources[family], tmp_path / "out", mixed, target=f"mlx-{dtype}")
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert float_types(tmp_path / "out") == {dtype.upper()}
    from mlx_lm.utils import load_model

    model, _ = load_model(tmp_path / "out", strict=True)
    could = {path for path, module in model.named_modules() if hasattr(module, "to_quantized") or hasattr(module, "group_size")}
    entries = {name: entry for name, entry in config["quantization"].items() if "." in name or name == "lm_head"}
    assert could <= set(entries)
    assert all(entry is False or set(entry) == {"group_size", "bits", "mode"} for entry in entries.values())
    assert config["quantization_config"] == config["quantization"]
    routers = [name for name in entries if name.endswith(("mlp.gate", "block_sparse_moe.gate"))]
    assert all(entries[name] is False for name in routers)
    half = {"f16": mx.float16, "bf16": mx.bfloat16}[dtype]
    logits = model(mx.array([[1, 2, 3]])) if "F16" not in {mixed_stack for mixed_stack in _stack_kinds(entries)} else None
    assert logits is None or logits.dtype == half  # no float32 in the folder widens the activations


def _stack_kinds(entries: dict[str, object]) -> set[str]:
    """ "F16" if some stack of experts is not quantized, which mlx on the CPU computes in float32 only."""
    return {"F16" if entry is False else "" for name, entry in entries.items() if "switch_mlp" in name or "mlp.experts" in name}


def test_the_process_holds_what_the_plan_counts(sources: dict[str, Path], tmp_path: Path) -> None:
    plan, artifact = write_folder(sources["qwen3_moe"], tmp_path / "out", "INT4_64", UNEVEN)
    job = {"context": 64, "tokens": list(heldout_tokens()), "prompts": ["def f(x):"], "generate": 8}
    found = find_target(plan.target).run(artifact.path, job, None)
    tensors = sum(weight.nbytes for weight in load_file(artifact.path).values())
    assert 0 <= found["active"] - tensors <= 8  # beside the tensors, mlx holds the state of its random numbers
    headers = plan.file_size - tensors
    assert 0 < headers < 40_000
    assert found["peak"] == 0  # a CPU's says nothing of a Mac
    assert len(found["samples"]) == 1
    assert len(found["samples"][0]["tokens"]) <= 8


def test_a_folder_of_several_float_types_is_refused(sources: dict[str, Path], tmp_path: Path) -> None:
    plan, artifact = write_folder(sources["qwen3_moe"], tmp_path / "out", "INT4_64")
    weights = load_file(artifact.path)
    save_file({name: w.astype(np.float32) if name.endswith("norm.weight") else w for name, w in weights.items()}, artifact.path)
    job = {"context": 64, "tokens": list(heldout_tokens()), "prompts": [], "generate": 0}
    with pytest.raises(VerifyError, match="floats are F16 and F32"):
        find_target(plan.target).run(artifact.path, job, None)


def test_shards_of_another_plan_are_not_left_beside_new_ones(sources: dict[str, Path], tmp_path: Path) -> None:
    write_folder(sources["olmoe"], tmp_path / "split", "INT4_64", shard_max=700_000)
    model, target, plan = inspect_model(sources["olmoe"]), find_target("mlx-f16"), hand_plan(inspect_model(sources["olmoe"]), "INT8_64")
    before = sorted(path.name for path in (tmp_path / "split").iterdir())
    with pytest.raises(UsageError, match=r"of-0000\d.safetensors: is there, and mlx would load it as well"):
        target.write(model, flat_stats(model, tmp_path / "stats"), plan, tmp_path / "split", 0, None)
    assert sorted(path.name for path in (tmp_path / "split").iterdir()) == before


def test_shards_hold_the_same_tensors_and_load(sources: dict[str, Path], tmp_path: Path) -> None:
    _, whole = write_folder(sources["olmoe"], tmp_path / "whole", "INT4_64")
    _, split = write_folder(sources["olmoe"], tmp_path / "split", "INT4_64", shard_max=700_000)
    shards = [file.name for file in split.files if file.holds_model]
    assert shards == [f"model-{i + 1:05}-of-{len(shards):05}.safetensors" for i in range(len(shards))]
    assert len(shards) > 2
    assert all(file.size <= 700_000 for file in split.files if file.holds_model)
    index = json.loads((tmp_path / "split" / "model.safetensors.index.json").read_text())
    one = load_file(whole.path)
    assert index["metadata"]["total_size"] == sum(weight.nbytes for weight in one.values())
    for shard in shards:
        for name, weight in load_file(tmp_path / "split" / shard).items():
            assert index["weight_map"].pop(name) == shard
            np.testing.assert_array_equal(weight, one[name])
    assert not index["weight_map"]
    np.testing.assert_array_equal(stock_logits(tmp_path / "split", [1, 2, 3]), stock_logits(tmp_path / "whole", [1, 2, 3]))


def test_the_same_bytes_on_every_run_and_number_of_threads(
    sources: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hashes = []
    for number, threads in enumerate((1, 3, 1)):
        monkeypatch.setattr("edgemoe.targets.mlx.writer.count_cores", lambda threads=threads: threads)
        _, artifact = write_folder(sources["dots1"], tmp_path / str(number), mixed)
        hashes.append([(file.name, file.sha256) for file in artifact.files])
    assert hashes[0] == hashes[1] == hashes[2]


def test_tokenizer_and_generation_files_are_copied_byte_for_byte(sources: dict[str, Path], tmp_path: Path) -> None:
    write_folder(sources["mixtral"], tmp_path / "out", "INT4_64")
    copied = [path for path in sources["mixtral"].iterdir() if path.name.startswith(("tokenizer", "generation"))]
    assert len(copied) > 1
    for path in copied:
        assert (tmp_path / "out" / path.name).read_bytes() == path.read_bytes()


# ---------------------------------------------------------------------------------------------------------------- refusals
def test_what_mlx_cannot_load_is_refused_by_field(tmp_path: Path) -> None:
    source = make_checkpoint(tmp_path / "qwen2", "qwen2_moe", tied=True, hidden=128, expert_size=128)
    target, model = find_target("mlx"), inspect_model(source)
    unit = target.list_units(model)[0]
    with pytest.raises(ModelError, match="tie_word_embeddings true"):
        target.offered_formats(model, unit)
    good = inspect_model(make_checkpoint(tmp_path / "qwen3", "qwen3_moe", hidden=128, expert_size=128, n_experts=4))
    stats, plan = flat_stats(good, tmp_path / "stats"), hand_plan(good, "INT4_64", [(0, 1, 2), (0, 1)])
    with pytest.raises(ModelError, match="different numbers of experts"):
        target.write(good, stats, plan, tmp_path, 0, None)


def test_the_reader_refuses_a_folder_whose_entries_do_not_match(sources: dict[str, Path], tmp_path: Path) -> None:
    write_folder(sources["olmoe"], tmp_path / "out", "INT4_64")
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    config["quantization"]["lm_head"]["bits"] = 3
    (tmp_path / "out" / "config.json").write_text(json.dumps(config))
    with pytest.raises(VerifyError, match="lm_head"):
        list(read_values(tmp_path / "out"))
    del config["quantization"]["lm_head"]
    (tmp_path / "out" / "config.json").write_text(json.dumps(config))
    with pytest.raises(VerifyError, match="no entry"):
        list(read_values(tmp_path / "out"))


def test_kinds_of_the_mixed_plan_cover_every_width() -> None:
    assert {FORMATS[kind].bits for kind in KINDS} == {2, 3, 4, 5, 6, 8, 16}
