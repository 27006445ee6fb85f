"""GGUFs of checkpoints with something special keep transformers' logits, and a mistake in them would be seen."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from parity import MAX_KL, agrees, emit, judge, llama_logits, original_logits, tensor_hashes
from safetensors.torch import load_file, save_file
from tiny import EXAMPLES, edit_config, make_checkpoint

from edgemoe.ir import Tensor
from edgemoe.model.checkpoint import read_tensor
from edgemoe.model.inspect import inspect_model
from edgemoe.targets.gguf import writer


@pytest.mark.parametrize("name", ["tiny-moe", "tiny-moe-b"])
def test_the_bundled_models_keep_their_logits(name: str, tmp_path: Path) -> None:
    model = inspect_model(EXAMPLES / name)
    figures = judge(original_logits(EXAMPLES / name), llama_logits(emit(model, tmp_path).path, model))
    print(f"parity of {name}: {figures}")  # noqa: T201
    assert agrees(figures), figures


@pytest.mark.parametrize("family", ["qwen3_moe", "mixtral"])  # olmoe refuses: test_inspect.py
def test_a_tied_checkpoint_keeps_its_logits(family: str, tmp_path: Path) -> None:
    model = inspect_model(make_checkpoint(tmp_path / "tied", family, tied=True))
    assert model.find("output") is None
    artifact = emit(model, tmp_path / "out")
    assert "output.weight" not in tensor_hashes(artifact.path)
    assert agrees(figures := judge(original_logits(tmp_path / "tied"), llama_logits(artifact.path, model))), figures


@pytest.mark.parametrize("copied", [True, False])
def test_an_output_matrix_beside_a_tied_embedding_is_used_if_it_differs(copied: bool, copy: Any, tmp_path: Path) -> None:
    folder = edit_config(copy("qwen3_moe"), tie_word_embeddings=True)
    weights = load_file(folder / "model.safetensors")
    if copied:
        weights["lm_head.weight"] = weights["model.embed_tokens.weight"].clone()
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    model = inspect_model(folder)
    assert (model.find("output") is None) == copied
    assert agrees(figures := judge(original_logits(folder), llama_logits(emit(model, tmp_path / "out").path, model))), figures


def test_the_older_rope_field_wins_as_in_transformers(copy: Any, tmp_path: Path) -> None:
    folder = edit_config(copy("qwen3_moe"), rope_scaling={"rope_type": "default", "rope_theta": 1000.0})  # rope_parameters says 50000
    model = inspect_model(folder)
    assert agrees(figures := judge(original_logits(folder), llama_logits(emit(model, tmp_path / "out").path, model))), figures


@pytest.mark.parametrize(("one", "other"), [("ffn_gate_exps", "ffn_up_exps"), ("attn_norm", "ffn_norm"), ("attn_q_norm", "attn_k_norm")])
def test_swapping_two_roles_would_be_seen(one: str, other: str, sources: dict[str, Path], tmp_path: Path) -> None:
    model = inspect_model(sources["qwen3_moe"])
    other_role = {one: other, other: one}
    places = {(t.role, t.layer, t.expert): t for t in model.tensors}
    swapped = tuple(
        dataclasses.replace(places[other_role.get(t.role, t.role), t.layer, t.expert], role=t.role) if t.layer == 0 else t
        for t in model.tensors
    )
    assert swapped != model.tensors
    spoilt = dataclasses.replace(model, tensors=swapped)
    figures = judge(original_logits(sources["qwen3_moe"]), llama_logits(emit(spoilt, tmp_path).path, model))
    assert figures["kl"] > 100 * MAX_KL and not agrees(figures)


@pytest.mark.parametrize("role", ["ffn_down_exps", "attn_output"])
def test_a_transposed_square_matrix_would_be_seen(
    role: str, sources: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def read(folder: str, tensor: Tensor) -> NDArray[np.float32]:
        weights = read_tensor(folder, tensor)
        return np.ascontiguousarray(weights.T) if (tensor.role, tensor.layer) == (role, 0) else weights

    model = inspect_model(sources["qwen3_moe"])
    monkeypatch.setattr(writer, "read_tensor", read)
    figures = judge(original_logits(sources["qwen3_moe"]), llama_logits(emit(model, tmp_path).path, model))
    assert figures["kl"] > 100 * MAX_KL and not agrees(figures)
