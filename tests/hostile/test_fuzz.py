"""Two thousand mutated inputs for every reader: nothing but an error of ours, soon, in little memory, on one line."""

from __future__ import annotations

from pathlib import Path

import pytest
from fuzz_readers import MOST_MEMORY, Readers, fuzz, peak_memory

COUNT = 2000


@pytest.fixture(scope="module")
def readers(tmp_path_factory: pytest.TempPathFactory) -> Readers:
    return Readers(tmp_path_factory.mktemp("fuzz"))


def test_readers_refuse_what_is_wrong_and_take_what_is_right(readers: Readers) -> None:
    before = peak_memory()
    found = fuzz(readers.all(), COUNT, seed=0)
    wrong = {name: result.wrong[:3] for name, result in found.items() if result.wrong}
    assert not wrong
    assert peak_memory() - before < MOST_MEMORY
    for name, result in found.items():  # a reader that takes nothing was given nothing that it could read
        assert result.taken and result.refused, name


def test_what_was_not_mutated_is_taken(readers: Readers, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fuzz_readers.mutate_value", lambda _, value: value)
    monkeypatch.setattr("fuzz_readers.mutate_bytes", lambda _, raw: raw)
    for name in ("config", "shape", "record", "rule", "device", "imatrix_file", "text", "saliency", "tokenizer_files"):
        result = fuzz({name: readers.all()[name]}, 20, seed=1)[name]
        assert result.taken == 20, name
