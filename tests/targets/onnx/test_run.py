"""Running ONNX artifacts in a child process: the same numbers as onnxruntime itself gives, its own last words, and the memory promised."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from onnx_folder import open_session, regrets, write_folder
from onnx_random import random_model, spread_formats, write_random
from tiny import VOCAB_SIZE, make_checkpoint

from edgemoe.base.errors import MachineError, VerifyError
from edgemoe.ir import Model, Unit
from edgemoe.ir.memory import peak
from edgemoe.model.inspect import inspect_model
from edgemoe.targets.onnx.memory import memory_parts, unit_extra
from edgemoe.targets.onnx.run import run
from edgemoe.targets.onnx.writer import list_units
from edgemoe.targets.tokenizer.beside import check_tokenizer

LONG = 150  # tokens: more than two chunks, and a rest
PROMPTS = ["The old river ", "def main("]


def mix(unit: Unit) -> str:
    """Experts of all widths, 8 bits elsewhere."""
    return ("INT8_32", "INT4_32", "INT3_32", "INT2_32")[unit.expert % 4] if unit.expert >= 0 else "INT8_32"


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("source") / "model", "qwen3_moe")


@pytest.fixture(scope="module")
def folders(source: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The checkpoint in floats, and in all widths with dropped experts."""
    root = tmp_path_factory.mktemp("artifacts")
    write_folder(source, root / "floats", "F32")
    write_folder(source, root / "mixed", mix, kept=[[0, 1, 2, 3, 5], [0, 2, 4, 5, 6, 7]])
    return {name: root / name / "model.onnx" for name in ("floats", "mixed")}


def tokens(n: int, seed: int = 0) -> list[int]:
    return np.random.default_rng(seed).integers(1, VOCAB_SIZE, n).tolist()


def child_logits(path: Path, windows: Sequence[Sequence[int]], **job: Any) -> list[NDArray[np.float32]]:
    found: dict[int, NDArray[np.float32]] = {}
    run(path, {"windows": windows, "vocab_size": VOCAB_SIZE, "exact": False, **job}, lambda n, logits: found.__setitem__(n, logits.copy()))
    return [found[n] for n in range(len(windows))]


@pytest.mark.parametrize(("name", "bound"), [("floats", 1e-5), ("mixed", 3e-3)])
def test_logits_of_windows_are_those_of_onnxruntime_itself_whatever_came_before(folders: dict[str, Path], name: str, bound: float) -> None:
    windows = [tokens(LONG), tokens(7, 1), tokens(64, 2)]
    ours = child_logits(folders[name], windows)
    session, cache = open_session(folders[name])
    for window, logits in zip(windows, ours, strict=True):
        ids = np.array([window])
        expected = session.run(["logits"], {"input_ids": ids, "attention_mask": np.ones_like(ids), **cache})[0][0]
        assert logits.shape == expected.shape
        assert np.linalg.norm(logits - expected) < bound * np.linalg.norm(expected)


def test_exact_runs_compute_8_bit_experts_in_floats(source: Path, tmp_path: Path) -> None:
    write_folder(source, tmp_path / "eight", lambda unit: "INT8_32" if unit.expert >= 0 else "F32")
    path, window = tmp_path / "eight" / "model.onnx", [tokens(40)]
    rounded, floats = (child_logits(path, window, exact=flag)[0] for flag in (False, True))
    difference = np.linalg.norm(rounded - floats) / np.linalg.norm(floats)
    assert 1e-4 < difference < 5e-2


@pytest.mark.parametrize("name", ["floats", "mixed"])
def test_a_continuation_with_the_shared_cache_is_the_likeliest_without_any(folders: dict[str, Path], name: str) -> None:
    job = {"context": 256, "tokens": tokens(100), "prompts": [*PROMPTS, "word " * 70], "generate": 12}
    measured = run(folders[name], job)
    assert [sample["prompt"] for sample in measured["samples"]] == job["prompts"]
    encode = json_tokenizer(folders[name])
    for sample in measured["samples"]:
        assert 0 < len(sample["tokens"]) <= 12 and sample["text"]
        worst = regrets(folders[name], encode(sample["prompt"]), sample["tokens"]).max()
        assert worst <= (1e-3 if name == "floats" else 0.15)  # near ties may turn with the size of a chunk
    assert measured["prompt_tokens_per_second"] > 0 and measured["decode_tokens_per_second"] > 0


def json_tokenizer(path: Path) -> Any:
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(path.with_name("tokenizer.json")))
    return lambda text: tokenizer.encode(text).ids


def test_a_continuation_stops_at_the_end_token(folders: dict[str, Path], tmp_path: Path) -> None:
    folder = tmp_path / "copy"
    shutil.copytree(folders["floats"].parent, folder)
    job = {"context": 128, "tokens": tokens(50), "prompts": PROMPTS[:1], "generate": 8}
    (full,) = run(folder / "model.onnx", job)["samples"]
    end = full["tokens"][3]
    for name in ("config.json", "generation_config.json"):
        if (folder / name).exists():
            config = json.loads((folder / name).read_text())
            (folder / name).write_text(json.dumps({**config, "eos_token_id": [VOCAB_SIZE + 1, end]}))
    (stopped,) = run(folder / "model.onnx", job)["samples"]
    assert stopped["tokens"] == full["tokens"][: full["tokens"].index(end)]


# ------------------------------------------------------------------------------------------------------------------ failures
def damage(folder: Path, name: str, how: str) -> None:
    path = folder / name
    if how == "gone":
        path.unlink()
    elif how == "truncated":
        os.truncate(path, path.stat().st_size // 2)
    else:
        path.write_bytes(os.urandom(1000))


@pytest.mark.parametrize("name", ["model.onnx", "model.onnx.data"])
@pytest.mark.parametrize("how", ["gone", "truncated", "garbage"])
def test_a_damaged_artifact_is_told_in_the_words_of_onnxruntime(folders: dict[str, Path], tmp_path: Path, name: str, how: str) -> None:
    shutil.copytree(folders["mixed"].parent, tmp_path / "copy")
    damage(tmp_path / "copy", name, how)
    with pytest.raises(VerifyError, match=r"onnxruntime stopped.*ONNXRuntimeError"):
        child_logits(tmp_path / "copy" / "model.onnx", [tokens(5)])


def test_a_file_that_needs_a_newer_runtime_says_which(folders: dict[str, Path], tmp_path: Path) -> None:
    import onnx
    import onnxruntime

    shutil.copytree(folders["mixed"].parent, tmp_path / "copy")
    path = tmp_path / "copy" / "model.onnx"
    model = onnx.load(str(path), load_external_data=False)
    next(entry for entry in model.metadata_props if entry.key == "edgemoe.least_onnxruntime").value = "99.1"
    path.write_bytes(model.SerializeToString())
    with pytest.raises(MachineError, match=rf"{onnxruntime.__version__}.*99\.1") as caught:
        child_logits(path, [tokens(5)])
    assert "pip install" in caught.value.hint


def test_a_tokenizer_that_reads_otherwise_is_noticed(source: Path, folders: dict[str, Path], tmp_path: Path) -> None:
    model, lines = inspect_model(source), ["Rivers, stones and 12 numbers.", "grüne Wälder", "x = [1, 2]"]
    assert check_tokenizer(folders["floats"], model, lines) == []
    shutil.copytree(folders["floats"].parent, tmp_path / "copy")
    file = tmp_path / "copy" / "tokenizer.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "normalizer": {"type": "Lowercase"}}))
    assert check_tokenizer(tmp_path / "copy" / "model.onnx", model, lines) == lines[:2]
    file.unlink()
    with pytest.raises(VerifyError, match="tokenizer"):
        check_tokenizer(tmp_path / "copy" / "model.onnx", model, lines)


# -------------------------------------------------------------------------------------------------------------------- memory
def predict_and_measure(model: Model, formats: dict[str, str], folder: Path, context: int) -> tuple[int, int]:
    path = write_random(model, formats, folder)
    size = sum(file.stat().st_size for file in folder.iterdir())
    extra = sum(unit_extra(model, u, formats[u.name], 0) for u in list_units(model) if u.name in formats)
    predicted = peak({**memory_parts(model, context), "weights": size + extra, "staging": 0})
    job = {"context": context, "tokens": np.random.default_rng(0).permutation(model.vocab_size).tolist(), "prompts": [], "generate": 0}
    return predicted, run(path, job)["peak"]


LIBRARIES = 12 * 2**20  # bytes that the runtime's libraries take more or less, from installation to installation (decision 8)
MEMORY = {
    "mixed widths, dropped experts": ({"num_hidden_layers": 3}, ["INT2_32", "INT3_32", "INT4_32", "INT8_32", ""], "INT8_32", 512),
    "a longer context": ({"num_hidden_layers": 2}, ["INT4_64", "INT2_64", "INT3_64"], "INT4_32", 1500),
    "a tied embedding": ({"num_hidden_layers": 1, "vocab_size": 32768, "tie_word_embeddings": True}, ["INT4_32"], "INT8_32", 600),
}


@pytest.mark.parametrize("name", MEMORY)
def test_a_process_that_fills_its_context_holds_no_more_than_predicted_and_little_less(tmp_path: Path, name: str) -> None:
    config, experts, others, context = MEMORY[name]
    model = random_model(**config)
    predicted, measured = predict_and_measure(model, spread_formats(model, experts, others, others), tmp_path / "random", context)
    assert measured <= predicted <= 1.05 * measured + LIBRARIES
