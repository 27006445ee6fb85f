"""Statistics from an imatrix file: files as llama.cpp writes them, and files that are wrong."""

from __future__ import annotations

import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from hostile_gguf import HOSTILE, header
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from imatrix_file import REAL, Entries, entries_of, write
from numpy.typing import NDArray
from tiny import make_checkpoint

from edgemoe.base.errors import ModelError
from edgemoe.calibrate.imatrix import MAX_HEADER, read_imatrix, save_imported_stats
from edgemoe.ir import Model, Stats
from edgemoe.model.inspect import inspect_model
from edgemoe.price.imported import price_imported
from edgemoe.quantize.importance import importance_of
from edgemoe.targets import find_target

TARGET = find_target("gguf")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Model:
    return inspect_model(str(make_checkpoint(tmp_path_factory.mktemp("random") / "model", "qwen3_moe")))


@pytest.fixture(scope="module")
def stats(model: Model, tmp_path_factory: pytest.TempPathFactory) -> Stats:
    folder = tmp_path_factory.mktemp("imported")
    return save_imported_stats(read_imatrix(write(folder / "i.gguf", entries_of(model)), model), model, folder)


def test_importance_is_the_files_mean_square_shrunk_to_the_layers_mean(model: Model, stats: Stats) -> None:
    entries = entries_of(model)
    for layer in range(model.n_layers):
        found = importance_of(model, stats, layer)
        for role in ("ffn_gate_exps", "ffn_up_exps", "ffn_down_exps"):
            sums, count = entries[f"blk.{layer}.{role}.weight"]
            everyone = sums.sum(axis=0) / count.sum()
            expected = (sums + 64 * everyone) / (count + 64)[:, None]
            for e in range(model.n_experts):
                assert found[role, e] == pytest.approx(expected[e], rel=1e-5)
        for role in ("attn_q", "attn_k", "attn_v"):  # the file has attn_q alone
            assert found[role, -1] == pytest.approx(entries[f"blk.{layer}.attn_q.weight"][0][0] / 4000, rel=1e-5)
        assert found["attn_output", -1] == pytest.approx(entries[f"blk.{layer}.attn_output.weight"][0][0] / 4000, rel=1e-5)
    (output,) = importance_of(model, stats, -1).values()
    assert len(set(output.tolist())) == 1


def test_a_file_of_llama_imatrix_reads_as_gguf_py_reads_it() -> None:
    small = inspect_model(str(REAL.parent))
    found = read_imatrix(REAL, small)
    assert found.datasets == ("calibration.txt",)
    for tensor in gguf.GGUFReader(REAL).tensors:
        sums, counts = found.arrays(tensor.name.rsplit(".", 1)[0])
        assert np.array_equal(np.ravel(tensor.data), np.ravel(sums if tensor.name.endswith(".in_sum2") else counts))
    for layer in range(small.n_layers):
        tokens, count = (found.arrays(f"blk.{layer}.{role}.weight")[1] for role in ("attn_q", "ffn_up_exps"))
        assert count.sum() == pytest.approx(tokens[0] * small.top_k, rel=1e-3)  # dense matrices skip batches of less than 16 tokens


def test_an_output_matrix_with_statistics_is_weighed_by_them(model: Model, tmp_path: Path) -> None:
    sums = np.arange(1.0, model.hidden_size + 1)[None]
    path = write(tmp_path / "i.gguf", {**entries_of(model), "output.weight": (sums, np.array([10.0]))})
    imported = save_imported_stats(read_imatrix(path, model), model, tmp_path)
    assert importance_of(model, imported, -1)["output", -1] == pytest.approx(sums[0] / 10)


def test_experts_that_saw_little_are_cold_and_need_not_go_first(model: Model, tmp_path: Path) -> None:
    entries = entries_of(model)
    for role in ("gate", "up", "down"):
        sums, count = entries[f"blk.1.ffn_{role}_exps.weight"]
        count = np.where(np.arange(len(count)) == 3, 0, np.maximum(count, 200))
        entries[f"blk.1.ffn_{role}_exps.weight"] = np.where(count[:, None] > 0, sums, 0), count
    imported = save_imported_stats(read_imatrix(write(tmp_path / "i.gguf", entries), model), model, tmp_path)
    assert (1, 3) in imported.cold
    assert all(layer == 0 for layer, _ in set(imported.cold) - {(1, 3)})
    kept = price_imported(model, imported, TARGET, 512).kept[-2, 1]
    assert kept[3]
    assert np.isfinite(importance_of(model, imported, 1)["ffn_down_exps", 3]).all()


def spoil(name: str, change: Callable[[NDArray[Any], NDArray[Any]], tuple[NDArray[Any], NDArray[Any]] | None]) -> Callable[[Entries], None]:
    """Change the sums and counts of one matrix; None takes it away."""

    def apply(entries: Entries) -> None:
        changed = change(*entries.pop(name))
        if changed is not None:
            entries[name] = changed

    return apply


DOWN, QUERY = "blk.1.ffn_down_exps.weight", "blk.0.attn_q.weight"
WRONG = {
    "fewer experts": (spoil(DOWN, lambda s, c: (s[:-1], c[:-1])), DOWN),
    "narrower": (spoil(QUERY, lambda s, c: (s[:, :-1], c)), QUERY),
    "one count for a stack, as from .dat": (spoil(DOWN, lambda s, c: (s.reshape(1, -1), c[:1])), DOWN),
    "gone": (spoil(DOWN, lambda s, c: None), DOWN),
    "another layer": (lambda e: e.update({"blk.2.attn_q.weight": e[QUERY]}), r"blk\.2\."),
    "a layer of many digits": (lambda e: e.update({f"blk.{'9' * 40}.attn_q.weight": e[QUERY]}), "blk"),
    "NaN": (spoil(DOWN, lambda s, c: (s * np.nan, c)), DOWN),
    "infinite": (spoil(QUERY, lambda s, c: (s * np.inf, c)), QUERY),
    "negative": (spoil(QUERY, lambda s, c: (-s, c)), QUERY),
    "half a token": (spoil(DOWN, lambda s, c: (s, c + 0.5)), "count"),
    "no token": (spoil(QUERY, lambda s, c: (s, c * 0)), "layer 0 saw no token"),
}


@pytest.mark.parametrize(("change", "named"), WRONG.values(), ids=WRONG)
def test_a_file_of_another_model_or_with_impossible_values_is_refused(
    change: Callable[[Entries], None], named: str, model: Model, tmp_path: Path
) -> None:
    entries = entries_of(model)
    change(entries)
    path = write(tmp_path / "i.gguf", entries)
    with pytest.raises(ModelError, match=named) as error:
        save_imported_stats(read_imatrix(path, model), model, tmp_path)
    assert str(path) in str(error.value)


def test_other_kinds_of_files_are_refused_with_a_reason(model: Model, tmp_path: Path) -> None:
    entries = entries_of(model)
    with pytest.raises(ModelError, match=r"general\.type is 'model'"):
        read_imatrix(write(tmp_path / "model.gguf", entries, kind="model"), model)
    with pytest.raises(ModelError, match="F32 matrix"):
        read_imatrix(write(tmp_path / "half.gguf", entries, extra={"x.in_sum2": np.ones((1, 4), np.float16)}), model)
    with pytest.raises(ModelError, match="counts' is missing"):
        read_imatrix(write(tmp_path / "alone.gguf", entries, extra={"x.in_sum2": np.ones((1, 4), np.float32)}), model)
    (tmp_path / "old.dat").write_bytes(struct.pack("<i", 3) + b"\0" * 100)
    with pytest.raises(ModelError, match="not a GGUF") as error:
        read_imatrix(tmp_path / "old.dat", model)
    assert ".dat" in error.value.hint
    with pytest.raises(ModelError, match="cannot be read"):
        read_imatrix(tmp_path, model)


@pytest.mark.parametrize("data", HOSTILE.values(), ids=HOSTILE)
def test_hostile_headers_are_refused(data: bytes, model: Model, tmp_path: Path) -> None:
    path = tmp_path / "i.gguf"
    path.write_bytes(data)
    with pytest.raises(ModelError, match=r"i\.gguf"):
        read_imatrix(path, model)


def test_a_header_that_fills_a_large_file_is_not_read_to_its_end(model: Model, tmp_path: Path) -> None:
    path = tmp_path / "i.gguf"
    with path.open("wb") as file:
        file.write(header(struct.pack("<Q", 2**35), values=1))
        file.truncate(2**36)  # a hole
    with pytest.raises(ModelError, match=str(MAX_HEADER)):
        read_imatrix(path, model)


@given(data=st.data())
@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_damaged_files_are_refused_or_read_but_never_crash(data: st.DataObject, tmp_path: Path) -> None:
    small, raw = inspect_model(str(REAL.parent)), bytearray(REAL.read_bytes())
    if data.draw(st.booleans()):
        del raw[data.draw(st.integers(0, len(raw) - 1)) :]
    for place in data.draw(st.lists(st.integers(0, 4000), max_size=3)):
        if place < len(raw):
            raw[place] = data.draw(st.integers(0, 255))
    path = tmp_path / "i.gguf"
    path.write_bytes(raw)
    try:
        found = read_imatrix(path, small)
        for name in found.entries:
            found.arrays(name)
    except ModelError as error:
        assert str(path) in str(error)
