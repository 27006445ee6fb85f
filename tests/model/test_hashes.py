"""The identity of a checkpoint covers every byte of every tensor, and each read is checked against it."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from edgemoe.base.errors import EdgemoeError, ModelError
from edgemoe.base.work import UNHASHED, key_of
from edgemoe.ir import Tensor
from edgemoe.model import hashes
from edgemoe.model.checkpoint import read_tensor
from edgemoe.model.inspect import inspect_model

Copy = Callable[[str], Path]


def flip(path: Path, at: int) -> None:
    with path.open("r+b") as file:
        file.seek(at)
        byte = file.read(1)[0]
        file.seek(at)
        file.write(bytes([byte ^ 1]))


def age(path: Path, seconds: float = 3600) -> None:
    """Let a file look old; the test cannot set ctime back, so `SETTLED` is patched where that matters."""
    found = path.stat()
    os.utime(path, (found.st_atime - seconds, found.st_mtime - seconds))


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(share=st.floats(0, 1, exclude_max=True), tensor=st.integers(0, 10_000))
def test_any_flipped_bit_of_any_tensor_gives_another_fingerprint(sources: dict[str, Path], share: float, tensor: int) -> None:
    folder = sources["qwen3_moe"]
    model = inspect_model(folder)
    chosen: Tensor = model.tensors[tensor % len(model.tensors)]
    at = chosen.offset + int(share * chosen.n_bytes)
    flip(folder / chosen.file, at)
    try:
        assert inspect_model(folder).fingerprint != model.fingerprint
        with pytest.raises(ModelError, match="changed while it was in use"):
            read_tensor(model.folder, chosen)
    finally:
        flip(folder / chosen.file, at)
    assert inspect_model(folder).fingerprint == model.fingerprint


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json", "config.json", "generation_config.json"])
def test_the_small_files_belong_to_the_identity(copy: Copy, name: str) -> None:
    folder = copy("olmoe")
    before = inspect_model(folder).fingerprint
    values = json.loads((folder / name).read_text(encoding="utf-8"))
    (folder / name).write_text(json.dumps({**values, "added": 1}), encoding="utf-8")
    assert inspect_model(folder).fingerprint != before


def test_hashes_are_kept_for_files_that_have_settled(copy: Copy, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, read = copy("mixtral"), []
    monkeypatch.setattr(hashes, "SETTLED", -1e9)  # a new file is settled at once
    first = inspect_model(folder, progress=lambda done, total: read.append(done))
    assert read and read[-1] == first.n_bytes
    read.clear()
    assert inspect_model(folder, progress=lambda done, total: read.append(done)) == first
    assert not read  # nothing was hashed
    flip(folder / "model.safetensors", first.tensors[5].offset)
    found = folder / "model.safetensors"
    age(found, 0)  # mtime as it was, but ctime is new
    assert inspect_model(folder).fingerprint != first.fingerprint


def test_a_file_that_was_just_written_is_hashed_again(copy: Copy) -> None:
    folder, read = copy("mixtral"), []
    inspect_model(folder)
    inspect_model(folder, progress=lambda done, total: read.append(done))
    assert read  # somebody may write to it within the same tick of the clock


@pytest.mark.parametrize("damage", ["flip", "cut", "empty", "other"])
def test_damaged_notes_of_hashes_are_not_believed(copy: Copy, damage: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(hashes, "SETTLED", -1e9)
    folder = copy("mixtral")
    first = inspect_model(folder)
    (note,) = (tmp_path / "cache").rglob("*.json")
    text = note.read_text(encoding="utf-8")
    spoilt = {"flip": text.replace(first.tensors[3].sha256, "0" * 64), "cut": text[:100], "empty": "", "other": "[]"}[damage]
    note.write_text(spoilt, encoding="utf-8")
    assert inspect_model(folder) == first


def test_a_machine_without_a_place_for_caches_hashes_each_time(copy: Copy, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", "/dev/null")
    monkeypatch.setattr(hashes, "SETTLED", -1e9)
    folder = copy("mixtral")
    assert inspect_model(folder) == inspect_model(folder)


def test_without_hashes_there_is_no_fingerprint(sources: dict[str, Path]) -> None:
    model = inspect_model(sources["olmoe"], hashed=False)
    assert model.fingerprint == UNHASHED and not any(t.sha256 for t in model.tensors)
    with pytest.raises(EdgemoeError, match="not hashed"):
        key_of("stats", model.fingerprint)
    assert hashes.hash_model(model) == inspect_model(sources["olmoe"])
