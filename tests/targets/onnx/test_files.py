"""The files beside an ONNX graph: what each runtime reads there, and what a checkpoint cannot smuggle in."""

from __future__ import annotations

import json
import os
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from onnx_folder import write_folder
from tiny import EXAMPLES, edit_config, flat_plan

from edgemoe.base.errors import ModelError
from edgemoe.ir import Model, Plan
from edgemoe.model.inspect import inspect_model
from edgemoe.targets import find_target
from edgemoe.targets.onnx import TARGET
from edgemoe.targets.onnx.files import write_sidecars

TINY = EXAMPLES / "tiny-moe"


def plan_for(model: Model, *, kept: tuple[int, ...] = (16, 16, 16, 16), fmt: str = "INT4_32") -> Plan:
    """A plan that keeps the first experts of each layer, every unit in one format."""
    return replace(
        flat_plan(model, "INT4_32", target="onnx"),
        context=200,
        kept=tuple(tuple(range(n)) for n in kept),
        formats={**flat_plan(model, "INT4_32", target="onnx").formats, "blk.0.ffn_exps.0": fmt},
    )


def copy_of_tiny(folder: Path) -> Path:
    """The bundled checkpoint, its weights linked."""
    folder.mkdir()
    for path in TINY.iterdir():
        if path.suffix == ".safetensors":
            os.link(path, folder / path.name)
        else:
            shutil.copyfile(path, folder / path.name)
    return folder


def written(model: Model, folder: Path, **options: Any) -> dict[str, Any]:
    """Every JSON file that `write_sidecars` leaves, by name."""
    folder.mkdir()
    names = write_sidecars(model, plan_for(model), folder, **options)
    assert names == sorted(p.name for p in folder.iterdir())
    assert set(names) <= set(TARGET.fixed_names)
    return {name: json.loads((folder / name).read_text()) for name in names if name.endswith(".json")}


def test_tokenizer_and_sampling_defaults_are_copied_to_the_byte(tmp_path: Path) -> None:
    source = copy_of_tiny(tmp_path / "model")
    (source / "chat_template.jinja").write_text("{{ messages[0].content }}\n\u00e4")
    model = inspect_model(source)
    found = written(model, tmp_path / "out")
    assert set(found) == {"config.json", "genai_config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json"}
    for name in ("generation_config.json", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        assert (tmp_path / "out" / name).read_bytes() == (source / name).read_bytes()


def test_the_same_plan_gives_the_same_bytes_wherever_the_checkpoint_lies(tmp_path: Path) -> None:
    folders = []
    for name in ("one", "two"):
        model = inspect_model(copy_of_tiny(tmp_path / name))
        folders.append(tmp_path / f"{name}-out")
        written(model, folders[-1], layout="transformers.js")
    for path in folders[0].iterdir():
        assert path.read_bytes() == (folders[1] / path.name).read_bytes()
        assert str(tmp_path).encode() not in path.read_bytes()


@pytest.mark.parametrize(("kept", "count", "note"), [((9, 9, 9, 9), 9, None), ((9, 2, 16, 5), 16, [9, 2, 16, 5])])
def test_config_says_how_many_experts_are_left(kept: tuple[int, ...], count: int, note: list[int] | None, tmp_path: Path) -> None:
    model = inspect_model(TINY)
    write_sidecars(model, plan_for(model, kept=kept), tmp_path)
    config, original = json.loads((tmp_path / "config.json").read_text()), json.loads((TINY / "config.json").read_text())
    assert config.pop("num_experts") == count
    assert config.pop("edgemoe").get("experts_per_layer") == note
    assert config.pop("torch_dtype") == "float32"
    assert config == {key: value for key, value in original.items() if key not in ("num_experts", "torch_dtype")}


def test_genai_config_takes_its_limits_from_model_and_plan_and_its_sampling_from_the_checkpoint(tmp_path: Path) -> None:
    found = written(inspect_model(TINY), tmp_path / "out")["genai_config.json"]
    assert (found["model"]["context_length"], found["search"]["max_length"]) == (512, 200)
    assert (found["search"]["do_sample"], found["search"]["temperature"], found["search"]["top_k"]) == (True, 0.8, 40)
    assert found["search"]["top_p"] == 1.0
    assert found["model"]["decoder"]["filename"] == "model.onnx"


@pytest.mark.parametrize(
    ("generation", "config", "eos", "pad"),
    [
        ({"eos_token_id": [5, 7]}, {"eos_token_id": 9}, [5, 7], 5),
        ({"eos_token_id": 5, "pad_token_id": 3}, {"eos_token_id": 9}, 5, 3),
        ({"eos_token_id": -1}, {"eos_token_id": 9}, 9, 9),
        (None, {"eos_token_id": 9}, 9, 9),
        (None, {"eos_token_id": None, "pad_token_id": None}, None, None),
    ],
)
def test_every_end_of_text_is_told(
    generation: dict[str, Any] | None, config: dict[str, Any], eos: list[int] | int | None, pad: int | None, tmp_path: Path
) -> None:
    source = edit_config(copy_of_tiny(tmp_path / "model"), **config)
    (source / "generation_config.json").unlink()
    if generation is not None:
        (source / "generation_config.json").write_text(json.dumps(generation))
    found = written(inspect_model(source), tmp_path / "out")["genai_config.json"]["model"]
    assert (found.get("eos_token_id"), found.get("pad_token_id")) == (eos, pad)


@pytest.mark.parametrize(
    ("name", "body", "field"),
    [
        ("generation_config.json", {"eos_token_id": 4096}, "eos_token_id"),
        ("generation_config.json", {"eos_token_id": ["a"]}, "eos_token_id"),
        ("generation_config.json", {"temperature": "hot"}, "temperature"),
        ("generation_config.json", {"do_sample": 1}, "do_sample"),
        ("special_tokens_map.json", [], "special_tokens_map.json"),
    ],
)
def test_a_bad_file_of_the_checkpoint_is_named(name: str, body: Any, field: str, tmp_path: Path) -> None:
    source = copy_of_tiny(tmp_path / "model")
    (source / name).write_text(json.dumps(body))
    model = inspect_model(source)
    with pytest.raises(ModelError, match=field):
        write_sidecars(model, plan_for(model), tmp_path)


def test_code_that_is_not_there_is_not_referred_to(tmp_path: Path) -> None:
    source = edit_config(copy_of_tiny(tmp_path / "model"), auto_map={"AutoModelForCausalLM": "evil--modeling.Model"})
    assert "auto_map" not in written(inspect_model(source), tmp_path / "out")["config.json"]


def test_links_out_of_the_checkpoint_are_not_followed(tmp_path: Path) -> None:
    source = copy_of_tiny(tmp_path / "model")
    model = inspect_model(source)
    secret = tmp_path / "secret"
    secret.write_text("{}")
    (source / "special_tokens_map.json").symlink_to(secret)
    with pytest.raises(ModelError, match=r"special_tokens_map\.json: a link that leads out"):
        write_sidecars(model, plan_for(model), tmp_path)


@pytest.mark.parametrize("name", ["chat_template.jinja", "tokenizer.model"])
def test_a_pipe_or_a_huge_file_is_refused_before_it_is_read(name: str, tmp_path: Path) -> None:
    source = copy_of_tiny(tmp_path / "model")
    model = inspect_model(source)
    if name == "tokenizer.model":
        with (source / name).open("wb") as file:
            file.truncate(2**28 + 1)  # a hole: takes no room
    else:
        os.mkfifo(source / name)
    with pytest.raises(ModelError, match=name):
        write_sidecars(model, plan_for(model), tmp_path)


def test_the_hub_cache_may_link_to_its_own_blobs(tmp_path: Path) -> None:
    snapshot = tmp_path / "models--a--b" / "snapshots" / "c0ffee"
    snapshot.parent.mkdir(parents=True)
    copy_of_tiny(snapshot)
    blob = tmp_path / "models--a--b" / "blobs" / "0123"
    blob.parent.mkdir()
    shutil.move(snapshot / "tokenizer.json", blob)
    (snapshot / "tokenizer.json").symlink_to(Path("..") / ".." / "blobs" / "0123")
    written(inspect_model(snapshot), tmp_path / "out")
    assert (tmp_path / "out" / "tokenizer.json").read_bytes() == (TINY / "tokenizer.json").read_bytes()


@pytest.mark.parametrize("target", ["onnx", "browser"])
def test_an_artifact_lists_its_files_and_finds_its_tokenizer_even_in_a_folder_called_onnx(target: str, tmp_path: Path) -> None:
    _, artifact = write_folder(TINY, tmp_path / "onnx", "INT4_64", target=target)
    assert artifact.target == target
    assert find_target(target).check_tokenizer(artifact.path, inspect_model(TINY), ["The little dog", "\u00e4 3.14\n"]) == []
    assert {f.name for f in artifact.files} == {str(p.relative_to(tmp_path / "onnx")) for p in (tmp_path / "onnx").rglob("*.*")}
