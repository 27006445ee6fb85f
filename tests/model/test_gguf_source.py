"""GGUF files as sources: what their headers say, beside gguf-py's reader, and files that are damaged, split or of another kind."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import gguf
import numpy as np
import pytest
from architectures import make_all
from command import error_of, run_cli
from hostile_gguf import HOSTILE
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tiny import make_checkpoint

from edgemoe.base.errors import EdgemoeError, ModelError, UsageError
from edgemoe.model.gguf_header import read_gguf_header
from edgemoe.model.gguf_source import GgufSource, is_gguf, read_gguf
from edgemoe.model.inspect import inspect_model

# Fused, biased, latent, without gates, with dense layers, grouped.
SOME = ("qwen3moe", "gpt-oss", "deepseek2", "nemotron_h_moe", "llama4", "qwen3next")


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return make_all(tmp_path_factory.mktemp("architectures"), SOME)


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(tmp_path_factory.mktemp("small") / "small.gguf")


def write(path: Path, *, n_experts: int = 4, kind: str = "F32", stacks: int = 4, split: int = 0, **values: int) -> Path:
    """One layer with experts."""
    writer = gguf.GGUFWriter(path, "olmoe", split_max_tensors=split)
    own = {"block_count": 1, "expert_count": n_experts, "expert_used_count": 2, "embedding_length": 64, "context_length": 32, **values}
    for key, value in own.items():
        writer.add_uint32(f"olmoe.{key}", value)
    rng, raw = np.random.default_rng(0), {"F32": None}.get(kind, gguf.GGMLQuantizationType[kind])
    for name, shape in {"token_embd.weight": (96, 64), "blk.0.ffn_gate_inp.weight": (n_experts, 64)}.items():
        writer.add_tensor(name, rng.standard_normal(shape, np.float32))
    for part in ("gate", "up", "down"):
        rows = rng.standard_normal((stacks, 32, 64), np.float32)
        packed = rows if raw is None else gguf.quants.quantize(rows, raw)
        writer.add_tensor(f"blk.0.ffn_{part}_exps.weight", packed, raw_dtype=raw)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.mark.parametrize("architecture", SOME)
def test_places_and_slices_are_those_of_gguf_py(files: dict[str, Path], architecture: str) -> None:
    source, data = read_gguf(files[architecture]), files[architecture].read_bytes()
    reader = gguf.GGUFReader(files[architecture])
    assert [t.name for t in source.tensors] == [t.name for t in reader.tensors]
    for tensor, theirs in zip(source.tensors, reader.tensors, strict=True):
        assert (tensor.kind, tensor.shape, tensor.n_bytes) == (theirs.tensor_type.name, tuple(theirs.shape[::-1]), theirs.n_bytes)
        assert data[tensor.offset : tensor.offset + tensor.n_bytes] == theirs.data.tobytes()
        if tensor.expert_axis:
            at, size = tensor.slice_of(5)
            assert data[at : at + size] == theirs.data[5].tobytes()
    stacks = [t for t in source.tensors if "_exps.weight" in t.name and "norm" not in t.name]
    assert stacks and all(t.expert_axis for t in stacks)
    header = read_gguf_header(files[architecture])
    for key, kinds in header.kinds.items():
        assert header.values[key] == [] or kinds == tuple(map(int, (*reader.fields[key].types, 0)))[:2]
    assert header.start == min(t.offset for t in source.tensors)
    assert header.values[f"{architecture}.expert_count"] == source.n_experts == 8


def test_a_quantized_stack_is_cut_between_experts(tmp_path: Path) -> None:
    path = write(tmp_path / "q.gguf", kind="Q8_0")
    (stack,) = (t for t in read_gguf(path).tensors if t.name == "blk.0.ffn_up_exps.weight")
    theirs = next(t for t in gguf.GGUFReader(path).tensors if t.name == stack.name)
    at, size = stack.slice_of(3)
    assert path.read_bytes()[at : at + size] == theirs.data[3].tobytes()
    assert list(read_gguf(path).bytes_by_type) == ["Q8_0", "F32"]


def test_a_split_set_is_read_as_one_model(tmp_path: Path) -> None:
    whole = read_gguf(write(tmp_path / "m.gguf"))
    folder = tmp_path / "split"
    folder.mkdir()
    write(folder / "m.gguf", split=2)
    names = sorted(path.name for path in folder.iterdir())
    assert names == [f"m-0000{i}-of-00003.gguf" for i in (1, 2, 3)]
    for source in (folder, folder / names[0]):
        found = read_gguf(source)
        assert [(t.name, t.shape) for t in found.tensors] == [(t.name, t.shape) for t in whole.tensors]
        assert (found.name, found.n_experts, len(found.files)) == ("m", 4, 3)
    with pytest.raises(UsageError, match=r"is file 2 of 3") as error:
        read_gguf(folder / names[1])
    assert names[0] in error.value.hint
    (folder / names[2]).unlink()
    with pytest.raises(ModelError, match=r"m-00003-of-00003\.gguf: is missing"):
        read_gguf(folder)


WRONG: dict[str, tuple[dict[str, int], str]] = {
    "dense": ({"expert_count": 0}, "has no experts"),
    "fewer experts than the stacks have": ({"expert_count": 3}, "ffn_gate_exps.weight' has shape"),
    "more chosen than there are": ({"expert_used_count": 5}, "expert_used_count is 5, expected 1 to 4"),
    "none chosen": ({"expert_used_count": 0}, "expert_used_count is 0"),
    "no end of layers": ({"block_count": 2**32 - 1}, "block_count is 4294967295"),
}


@pytest.mark.parametrize(("values", "said"), WRONG.values(), ids=WRONG)
def test_metadata_that_cannot_be_are_refused_by_key(tmp_path: Path, values: dict[str, int], said: str) -> None:
    with pytest.raises(ModelError, match=said) as error:
        read_gguf(write(tmp_path / "m.gguf", **values))
    assert "m.gguf" in str(error.value)


@pytest.mark.parametrize("data", HOSTILE.values(), ids=HOSTILE)
def test_hostile_headers_are_refused(data: bytes, tmp_path: Path) -> None:
    (tmp_path / "h.gguf").write_bytes(data)
    with pytest.raises(ModelError, match=r"h\.gguf"):
        read_gguf(tmp_path / "h.gguf")


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None, max_examples=60)
@given(data=st.data())
def test_a_file_cut_or_changed_anywhere_is_refused_or_read(small: Path, tmp_path: Path, data: st.DataObject) -> None:
    raw = bytearray(small.read_bytes())
    header = len(raw) - 4 * (96 * 64 + 4 * 64 + 3 * 4 * 32 * 64)
    path = tmp_path / "m.gguf"
    path.write_bytes(raw[: data.draw(st.integers(0, len(raw) - 1))])
    with pytest.raises(ModelError, match=r"m\.gguf"):
        read_gguf(path)
    raw[data.draw(st.integers(0, header - 1))] = data.draw(st.integers(0, 255))
    path.write_bytes(raw)
    try:
        assert isinstance(read_gguf(path), GgufSource)
        inspect_model(path, hashed=False)
    except EdgemoeError as error:
        assert str(error).isprintable()


def test_inspect_shows_a_gguf_and_other_commands_say_what_they_take(small: Path, tmp_path: Path) -> None:
    shown = run_cli("inspect", small, "--json")
    facts = json.loads(shown.stdout)
    assert (facts["architecture"], facts["n_experts"], facts["with experts"], facts["types"]) == ("olmoe", 4, 1, "F32 100.0%")
    refused = run_cli("build", small, "--memory", "1GB", "-o", tmp_path / "out")  # it lacks attention
    assert refused.returncode == 4 and "llama.cpp stopped" in error_of(refused.stderr)
    other = run_cli("build", small, "--memory", "1GB", "--target", "onnx", "-o", tmp_path / "out")
    assert other.returncode == 2 and "a GGUF is all that can be made of it" in error_of(other.stderr)
    broken = run_cli("inspect", small.parent / "gone.gguf")
    assert broken.returncode == 2 and "no such file" in error_of(broken.stderr)


def test_a_folder_with_a_config_is_a_checkpoint_whatever_lies_beside_it(small: Path, tmp_path: Path) -> None:
    source = make_checkpoint(tmp_path / "both", "olmoe", n_experts=2, hidden=64, expert_size=64, layers=1)
    shutil.copy(small, source)
    assert not is_gguf(source)
    assert inspect_model(source, hashed=False).model_type == "olmoe"
