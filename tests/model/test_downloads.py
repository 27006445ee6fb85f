"""Checkpoints as downloads and training tools leave them: what can be used is used, and else the real cause is named."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from edgemoe.base.errors import MachineError, ModelError
from edgemoe.model.inspect import inspect_model, resolve_source

Copy = Callable[[str], Path]


def rename(folder: Path, change: Callable[[str], str]) -> Path:
    weights = load_file(folder / "model.safetensors")
    save_file({change(name): value for name, value in weights.items()}, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def shard(folder: Path, count: int, *, index: bool) -> list[Path]:
    """The checkpoint's only file as several ones."""
    weights = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    files = [folder / f"model-{n + 1:05d}-of-{count:05d}.safetensors" for n in range(count)]
    weight_map = {}
    for n, file in enumerate(files):
        part = dict(sorted(weights.items())[n::count])
        save_file(part, file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(part, file.name)
    if index:
        (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return files


@pytest.mark.parametrize("prefix", ["_orig_mod.", "module.", "module._orig_mod.", "base_model."])
def test_names_that_a_training_tool_wrapped_are_unwrapped(copy: Copy, prefix: str) -> None:
    folder = copy("qwen2_moe")
    expected = inspect_model(folder)
    assert inspect_model(rename(folder, lambda name: prefix + name)).tensors == inspect_model(folder).tensors
    assert [t.name for t in inspect_model(folder).tensors] == [t.name for t in expected.tensors]


def test_names_without_their_first_part_are_completed(copy: Copy) -> None:
    folder = copy("olmoe")
    names = [t.name for t in inspect_model(folder).tensors]
    assert [t.name for t in inspect_model(rename(folder, lambda name: name.removeprefix("model."))).tensors] == names


def test_one_name_twice_is_refused(copy: Copy) -> None:
    folder = copy("olmoe")
    weights = load_file(folder / "model.safetensors")
    save_file({**weights, "module.lm_head.weight": weights["lm_head.weight"].clone()}, folder / "model.safetensors")
    with pytest.raises(ModelError, match=r"lm_head\.weight twice"):
        inspect_model(folder)


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight", "LoRA"),
        ("model.layers.0.self_attn.q_proj.base_layer.weight", "LoRA"),
        ("model.layers.0.self_attn.q_proj.bias", "bias"),
        ("model.layers.9.self_attn.q_proj.weight", "number of layers"),
        ("score.weight", "this family does not have it"),
    ],
)
def test_a_tensor_too_many_has_its_real_cause_named(copy: Copy, name: str, says: str) -> None:
    folder = copy("olmoe")
    weights = load_file(folder / "model.safetensors")
    save_file({**weights, name: torch.zeros(4, 4)}, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelError, match=says):
        inspect_model(folder)


def test_of_two_copies_of_a_tensor_the_one_in_the_index_counts(copy: Copy) -> None:
    folder = copy("mixtral")
    files = shard(folder, 2, index=True)
    weight_map = json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"]
    expected = inspect_model(folder)
    for file, other in (files, files[::-1]):
        name = next(n for n, f in weight_map.items() if f == file.name)
        weights = load_file(other)
        save_file({**weights, name: load_file(file)[name] + 1}, other, metadata={"format": "pt"})
    found = inspect_model(folder)
    assert [(t.name, t.file, t.sha256) for t in found.tensors] == [(t.name, t.file, t.sha256) for t in expected.tensors]


def test_shards_without_an_index_are_enough_if_all_are_there(copy: Copy) -> None:
    folder = copy("mixtral")
    weights = [(t.name, t.sha256) for t in inspect_model(folder).tensors]
    files = shard(folder, 3, index=False)
    assert [(t.name, t.sha256) for t in inspect_model(folder).tensors] == weights
    files[1].unlink()
    with pytest.raises(ModelError, match="of 3 shards 2 are there"):
        inspect_model(folder)


def test_an_index_that_was_left_beside_a_whole_file_is_passed_over(copy: Copy, caplog: pytest.LogCaptureFixture) -> None:
    folder = copy("mixtral")
    expected = inspect_model(folder)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"lm_head.weight": "model-00001-of-00002.safetensors"}}))
    with caplog.at_level(logging.WARNING):
        assert inspect_model(folder) == expected
    assert "files that are not there" in caplog.text


def test_overlapping_tensors_are_refused(copy: Copy) -> None:
    folder = copy("mixtral")
    raw = (folder / "model.safetensors").read_bytes()
    length = int.from_bytes(raw[:8], "little")
    header = json.loads(raw[8 : 8 + length])
    a, b = "model.layers.0.self_attn.k_proj.weight", "model.layers.0.self_attn.v_proj.weight"
    header[a]["data_offsets"] = header[b]["data_offsets"]
    text = json.dumps(header).encode().ljust(length)[: max(length, len(json.dumps(header)))]
    (folder / "model.safetensors").write_bytes(len(text).to_bytes(8, "little") + text + raw[8 + length :])
    with pytest.raises(ModelError, match="overlap"):
        inspect_model(folder)


def test_pipes_devices_and_giants_are_refused_at_once(copy: Copy) -> None:
    for name in ("config.json", "model.safetensors", "tokenizer.json", "generation_config.json"):
        for kind in ("pipe", "device", "giant", "folder"):
            folder = copy("mixtral")
            path = folder / name
            path.unlink()
            if kind == "pipe":
                os.mkfifo(path)
            elif kind == "device":
                path.symlink_to("/dev/zero")
            elif kind == "folder":
                path.mkdir()
            else:
                with path.open("wb") as file:
                    file.truncate(2**40)
            if name in ("config.json", "model.safetensors") or kind == "giant":
                with pytest.raises(ModelError, match=name.replace(".", r"\.")):
                    inspect_model(folder)
            import shutil

            shutil.rmtree(folder)


def test_json_that_would_fill_the_memory_is_refused(copy: Copy) -> None:
    folder = copy("mixtral")
    (folder / "config.json").write_text('{"a": [' + ",".join(["[]"] * 7_000_000) + "]}")
    with pytest.raises(ModelError, match="which is too many"):
        inspect_model(folder)


# ------------------------------------------------------------------------------------------------------------------- hub
@pytest.fixture
def cached(copy: Copy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A snapshot in a cache of the hub, with no network."""
    root = tmp_path / "hub"
    snapshot = root / "models--Someone--Some-MoE-8x7B" / "snapshots" / ("0" * 40)
    snapshot.parent.mkdir(parents=True)
    copy("mixtral").rename(snapshot)
    refs = snapshot.parent.parent / "refs"
    refs.mkdir()
    (refs / "main").write_text("0" * 40)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(root))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    return snapshot


def test_a_snapshot_has_the_name_of_the_model(cached: Path) -> None:
    assert resolve_source("Someone/Some-MoE-8x7B").resolve() == cached.resolve()
    assert inspect_model("Someone/Some-MoE-8x7B").name == inspect_model(cached).name == "Some-MoE-8x7B"


def test_a_snapshot_without_weights_is_not_taken_for_whole(cached: Path) -> None:
    (cached / "model.safetensors").unlink()
    with pytest.raises(MachineError, match="not in the hub cache") as caught:
        inspect_model("Someone/Some-MoE-8x7B")
    assert caught.value.exit_code == 5 and "hf download" in caught.value.hint


def test_a_name_that_is_too_long_for_files_is_cut(copy: Copy) -> None:
    folder = copy("mixtral")
    assert len(inspect_model(folder.rename(folder.with_name("m" * 250))).name) == 100
