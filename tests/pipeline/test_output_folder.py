"""OUT is made ours only where it is, and an unfinished build leaves nothing behind in it."""

from __future__ import annotations

from pathlib import Path

import pytest

from edgemoe.base.errors import UsageError
from edgemoe.base.ownership import seal_text
from edgemoe.base.storage import hash_file, save_record, save_sealed
from edgemoe.ir import Artifact, ArtifactFile
from edgemoe.pipeline.output_folder import MARKER, check_output, prepare_output


def record_artifact(path: Path, *names: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    root = path.parent.parent if path.parent.name == ".work" else path.parent
    found = [(name, root / name) for name in names]
    files = tuple(ArtifactFile(name=n, size=p.stat().st_size, sha256=hash_file(p) if p.is_file() else "") for n, p in found)
    save_record(path, Artifact(folder="", target="gguf", plan="", files=files))


def names(folder: Path) -> set[str]:
    return {p.name for p in folder.iterdir()}


@pytest.mark.parametrize("exists", [True, False])
def test_a_new_or_empty_folder_is_taken(tmp_path: Path, exists: bool) -> None:
    out = tmp_path / "deep" / "out"
    if exists:
        out.mkdir(parents=True)
    check_output(out, force=False)
    assert out.exists() == exists and not (exists and names(out))
    prepare_output(out, force=False)
    assert names(out) == {".work"} and names(out / ".work") == {MARKER}
    prepare_output(out, force=False)  # as a killed build is given again


def test_what_an_unfinished_build_emitted_goes_when_it_is_given_another_budget(tmp_path: Path) -> None:
    prepare_output(tmp_path, force=False)
    (tmp_path / "model-E5.gguf").write_text("of the first budget")
    record_artifact(tmp_path / ".work" / "artifact.json", "model-E5.gguf")
    (tmp_path / ".work" / "costs.json").write_text("dear")
    prepare_output(tmp_path, force=False)
    assert names(tmp_path) == {".work"}
    assert (tmp_path / ".work" / "costs.json").read_text() == "dear"


def test_force_replaces_our_files_and_no_others(tmp_path: Path) -> None:
    for name in ("model.gguf", "notes.txt", "other.gguf"):
        (tmp_path / name).write_text("here")
    (tmp_path / "report.html").write_text(seal_text("<html></html>"))
    save_sealed(tmp_path / "plan.json", {"record": "Plan"})
    record_artifact(tmp_path / "artifact.json", "model.gguf")
    with pytest.raises(UsageError, match="not empty"):
        prepare_output(tmp_path, force=False)
    check_output(tmp_path, force=True)
    assert "model.gguf" in names(tmp_path)
    prepare_output(tmp_path, force=True)
    assert names(tmp_path) == {"notes.txt", "other.gguf", ".work"}


@pytest.mark.parametrize("name", ["../victim", "sub/victim", "/victim", "..", "."])
def test_an_edited_record_cannot_delete_outside_the_folder(tmp_path: Path, name: str) -> None:
    out = tmp_path / "out"
    victims = [tmp_path / "victim", out / "sub" / "victim"]
    for victim in victims:
        victim.parent.mkdir(parents=True, exist_ok=True)
        victim.write_text("mine")
    record_artifact(out / "artifact.json", str(tmp_path / name[1:]) if name.startswith("/") else name)
    prepare_output(out, force=True)
    assert all(v.read_text() == "mine" for v in victims)


@pytest.mark.parametrize("name", ["README.md", "report.html", "report.json", "plan.json", "artifact.json"])
def test_a_page_or_record_that_somebody_else_wrote_or_changed_is_kept_even_with_force(tmp_path: Path, name: str) -> None:
    text = seal_text("ours").replace("ours", "mine") if name.endswith((".md", ".html")) else '{"record": "Plan", "sha256": "0"}'
    (tmp_path / name).write_text(text)
    with pytest.raises(UsageError, match=f"{name}: is there, and edgemoe did not write it") as caught:
        prepare_output(tmp_path, force=True)
    assert caught.value.exit_code == 2
    assert names(tmp_path) == {name} and (tmp_path / name).read_text() == text


def test_a_file_of_the_artifact_that_somebody_replaced_is_kept(tmp_path: Path) -> None:
    (tmp_path / "model.gguf").write_text("ours")
    record_artifact(tmp_path / "artifact.json", "model.gguf")
    (tmp_path / "model.gguf").write_text("mine")
    prepare_output(tmp_path, force=True)
    assert (tmp_path / "model.gguf").read_text() == "mine"


FIXED = ("model.onnx", "config.json", "onnx/model.onnx")


def test_a_file_that_the_target_would_write_and_somebody_else_wrote_is_kept_even_with_force(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("a checkpoint's")
    with pytest.raises(UsageError, match=r"config\.json"):
        prepare_output(tmp_path, force=True, names=FIXED)
    assert names(tmp_path) == {"config.json"}
    prepare_output(tmp_path, force=True, names=("model.onnx",))
    assert (tmp_path / "config.json").read_text() == "a checkpoint's"


def test_files_with_fixed_names_that_are_ours_are_replaced(tmp_path: Path) -> None:
    (tmp_path / "onnx").mkdir()
    for name in (*FIXED, "notes.txt"):
        (tmp_path / name).write_text("here")
    record_artifact(tmp_path / "artifact.json", *FIXED)
    prepare_output(tmp_path, force=True, names=FIXED)
    assert not any((tmp_path / name).exists() for name in FIXED)
    assert (tmp_path / "notes.txt").exists()
