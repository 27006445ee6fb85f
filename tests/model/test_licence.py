"""What is made from a checkpoint carries the checkpoint's licence, and says what it was made from."""

from __future__ import annotations

import json
import os
from dataclasses import replace
from pathlib import Path

import pytest
from reports import make_report
from tiny import make_checkpoint

from edgemoe.base.errors import UsageError
from edgemoe.ir import Artifact, ArtifactFile
from edgemoe.model.inspect import inspect_model
from edgemoe.model.licence import licence_files, read_card
from edgemoe.pipeline.emit import copy_licences
from edgemoe.report.model_card import render_card

CARD = """---
license: other
license_name: tongyi-qianwen
license_link: https://example.org/LICENSE
language:
- en
- de
base_model: Somebody/Grandparent
tags: [moe]
---
# A model
"""


def test_licence_fields_come_from_the_card_and_the_base_model_is_the_checkpoint_itself(tmp_path: Path) -> None:
    snapshot = tmp_path / "models--Qwen--Qwen3-30B-A3B" / "snapshots" / "0a1b"
    snapshot.mkdir(parents=True)
    (snapshot / "config.json").write_text("{}")
    (snapshot / "README.md").write_text(CARD)
    card = read_card(snapshot)
    assert card["base_model"] == "Qwen/Qwen3-30B-A3B"
    assert (card["license"], card["license_name"], card["language"]) == ("other", "tongyi-qianwen", ["en", "de"])
    assert "tags" not in card


def test_a_plain_folder_names_the_base_model_that_transformers_saved(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"_name_or_path": "allenai/OLMoE-1B-7B-0924"}))
    assert read_card(tmp_path) == {"base_model": "allenai/OLMoE-1B-7B-0924"}
    (tmp_path / "config.json").write_text(json.dumps({"_name_or_path": "/home/me/model"}))
    assert read_card(tmp_path) == {}


BAD_CARDS = ("", "no front matter", "---\n[1, 2\n---\n", "---\n- a\n---\n", "---\nlicense: [[[\n---", "---\n!!python/object:os.x {}\n---")


@pytest.mark.parametrize("text", BAD_CARDS)
def test_a_card_that_says_nothing_gives_nothing(tmp_path: Path, text: str) -> None:
    (tmp_path / "README.md").write_text(text)
    assert read_card(tmp_path) == {}


def test_licence_files_are_found_by_name_and_pipes_links_to_devices_and_giants_are_not(tmp_path: Path) -> None:
    for name in ("LICENSE", "License.txt", "NOTICE", "USE_POLICY.md", "COPYING", "licenses.json", "LICENSE.safetensors"):
        (tmp_path / name).write_text("text")
    os.mkfifo(tmp_path / "LICENSE.fifo")
    (tmp_path / "LICENSE.md").symlink_to("/dev/zero")
    with (tmp_path / "NOTICE.txt").open("wb") as file:
        file.truncate(2**33)
    assert [p.name for p in licence_files(tmp_path)] == ["COPYING", "LICENSE", "License.txt", "NOTICE", "USE_POLICY.md"]


def test_licences_are_copied_recorded_and_never_replace_another_file(tmp_path: Path) -> None:
    source = make_checkpoint(tmp_path / "model", "mixtral")
    (source / "LICENSE").write_text("all wrongs reserved\n")
    (tmp_path / "out").mkdir()
    written = ArtifactFile(name="m.gguf", size=5, sha256="0" * 64)
    artifact = Artifact(folder=str(tmp_path / "out"), target="gguf", plan="", files=(written,))
    model = inspect_model(source, hashed=False)
    copied = copy_licences(artifact, model)
    assert (tmp_path / "out" / "LICENSE").read_text() == "all wrongs reserved\n"
    assert [f.name for f in copied.files] == ["m.gguf", "LICENSE"] and copied.model_size == 5
    assert copy_licences(artifact, model) == copied  # a killed run is repeated
    (tmp_path / "out" / "LICENSE").write_text("the user's own\n")
    with pytest.raises(UsageError, match="LICENSE: is there"):
        copy_licences(artifact, model)
    assert (tmp_path / "out" / "LICENSE").read_text() == "the user's own\n"


def test_the_model_card_carries_licence_and_relation() -> None:
    report = make_report()
    card = render_card(replace(report, model={**report.model, "license": "apache-2.0", "base_model": "a/b"}))
    assert "license: apache-2.0\nbase_model: a/b\nbase_model_relation: quantized\n" in card
