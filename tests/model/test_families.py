"""Every family of tiny.py in five ways: read, streamed, with experts gone, as GGUF and as ONNX, each against transformers."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx_tiny
import pytest
import torch
from numpy.typing import NDArray
from onnx_tiny import KEPT, Runner, hand_plan, mean_kl, reference, reference_logits
from parity import UNEVEN, agrees, emit, heldout_tokens, judge, llama_logits, original_logits, stream_logits, tensor_hashes
from safetensors.torch import load_file
from tiny import FAMILIES, VOCAB_SIZE, edit_config, flat_plan, flat_stats, make_checkpoint, slice_experts

from edgemoe.model.checkpoint import read_tensor
from edgemoe.model.inspect import inspect_model
from edgemoe.stream.adapter import name_of
from edgemoe.stream.passes import final_states
from edgemoe.stream.windows import Windows


def name_in(module: Any, layer: int, role: str) -> str:
    """Name of a role's weights in the whole transformers model."""
    return f"model.layers.{layer}.{name_of(module.model.layers[layer], role)}"


@pytest.fixture(scope="module")
def ids() -> NDArray[np.int64]:
    return np.random.default_rng(0).integers(0, VOCAB_SIZE, (2, 40))


# ------------------------------------------------------------------------------------------------------------------- read
@pytest.mark.parametrize("family", FAMILIES)
def test_inspect_finds_every_weight_of_the_transformers_model(family: str, sources: dict[str, Path]) -> None:
    from transformers import AutoModelForCausalLM

    model = inspect_model(sources[family])
    module: Any = AutoModelForCausalLM.from_pretrained(sources[family], dtype=torch.float32)
    biases = {name: b for name, b in module.named_buffers() if name.endswith("e_score_correction_bias")}
    weights, config = (
        {name: weight.detach().numpy() for name, weight in {**dict(module.named_parameters()), **biases}.items()},
        module.config,
    )
    assert (model.model_type, model.n_weights) == (family, sum(weight.size for weight in weights.values()))
    assert (model.n_layers, model.top_k, model.context_length) == (
        config.num_hidden_layers,
        config.num_experts_per_tok,
        config.max_position_embeddings,
    )
    assert (model.attention.heads, model.attention.kv_heads) == (config.num_attention_heads, config.num_key_value_heads)
    assert weights["model.embed_tokens.weight"].shape == (model.vocab_size, model.hidden_size)
    for layer in range(model.n_layers):
        prefix = f"model.layers.{layer}."
        assert weights[f"{prefix}self_attn.q_proj.weight"].shape == (model.attention.heads * model.attention.key_length, model.hidden_size)
        halves: dict[str, NDArray[np.float32]] = {}
        if layer in model.moe_layers:
            gate_up, down = (weights[f"{prefix}mlp.experts.{name}"] for name in ("gate_up_proj", "down_proj"))
            assert down.shape == (model.n_experts, model.hidden_size, model.expert.size)
            halves = {
                "ffn_gate_exps": gate_up[:, : model.expert.size],
                "ffn_up_exps": gate_up[:, model.expert.size :],
                "ffn_down_exps": down,
            }
        for (role, e), tensor in model.of_layer(layer).items():
            expected = halves[role][e] if e >= 0 else weights[name_in(module, layer, role)].reshape(tensor.shape)
            np.testing.assert_array_equal(read_tensor(model.folder, tensor), expected, err_msg=tensor.name)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("layout", ["stacked", "sharded"])
def test_every_layout_of_a_checkpoint_gives_the_same_bytes(family: str, layout: str, sources: dict[str, Path], tmp_path: Path) -> None:
    folder = make_checkpoint(tmp_path / "in", family, seed=list(FAMILIES).index(family), **{layout: True})  # type: ignore[arg-type]
    assert len(list(folder.glob("*.safetensors"))) > 1 if layout == "sharded" else not (folder / "model.safetensors.index.json").exists()
    plain, other = inspect_model(sources[family]), inspect_model(folder)
    assert [(t.role, t.layer, t.expert, t.shape) for t in plain.tensors if t.expert < 0] == [
        (t.role, t.layer, t.expert, t.shape) for t in other.tensors if t.expert < 0
    ]
    assert (other.find("ffn_up_exps", 1, 7).name == plain.find("ffn_up_exps", 1, 7).name) == (layout == "sharded")  # type: ignore[union-attr]
    kept = flat_plan(plain, "Q8_0", UNEVEN)
    first = emit(plain, tmp_path / "a", kept)
    second = emit(other, tmp_path / "b", flat_plan(other, "Q8_0", UNEVEN))
    assert tensor_hashes(first.path) == tensor_hashes(second.path)


@pytest.mark.parametrize("family", FAMILIES)
def test_our_stacked_layout_is_the_one_that_transformers_writes(family: str, sources: dict[str, Path], tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    made = make_checkpoint(tmp_path / "ours", family, seed=list(FAMILIES).index(family), stacked=True)
    ours = load_file(made / "model.safetensors")
    module = AutoModelForCausalLM.from_pretrained(sources[family], dtype=torch.bfloat16)
    module.save_pretrained(tmp_path / "theirs", save_original_format=False)
    theirs = load_file(tmp_path / "theirs" / "model.safetensors")
    assert set(ours) == set(theirs)
    assert all(torch.equal(weight, theirs[name]) for name, weight in ours.items())


# ----------------------------------------------------------------------------------------------------------- layer stream
@pytest.mark.parametrize("family", FAMILIES)
def test_the_layer_stream_gives_the_logits_of_transformers(family: str, sources: dict[str, Path], tmp_path: Path) -> None:
    figures = judge(original_logits(sources[family]), stream_logits(inspect_model(sources[family]), tmp_path))
    assert agrees(figures), figures


@pytest.mark.parametrize("family", FAMILIES)
def test_streamed_states_are_those_of_transformers(family: str, sources: dict[str, Path], tmp_path: Path) -> None:
    from transformers import AutoModel

    model, lengths = inspect_model(sources[family]), (64, 37)
    tokens = np.array([heldout_tokens()[start : start + 64] for start in (0, 256)])
    found = final_states(model, Windows(tokens=tokens, lengths=np.array(lengths), domain=np.array([0, 1])), tmp_path)
    assert found.shape == (2, 64, model.hidden_size)
    module = AutoModel.from_pretrained(sources[family], dtype=torch.float32, attn_implementation="eager").eval()
    for row, states, length in zip(tokens, found, lengths, strict=True):  # what is padding is not compared
        with torch.inference_mode():
            expected = module(torch.from_numpy(row[None, :length])).last_hidden_state[0].numpy()
        worst = np.sort(np.abs(states[:length] - expected).max(axis=1))
        assert worst[-2] < 1e-4  # of values of size 1; one token's router may tie
    assert not list(tmp_path.iterdir())


# ----------------------------------------------------------------------------------------------------------- experts gone
@pytest.mark.parametrize("family", FAMILIES)
def test_the_router_among_the_experts_that_are_left_is_that_of_the_sliced_original(
    family: str, sources: dict[str, Path], tmp_path: Path
) -> None:
    oracle = original_logits(slice_experts(sources[family], UNEVEN, tmp_path / "oracle"))
    figures = judge(oracle, stream_logits(inspect_model(sources[family]), tmp_path, UNEVEN))
    assert agrees(figures), figures


@pytest.mark.parametrize("family", FAMILIES)
def test_dropping_experts_equals_cutting_them_out_of_the_original(family: str, sources: dict[str, Path], tmp_path: Path) -> None:
    model = inspect_model(sources[family])
    oracle = original_logits(slice_experts(sources[family], UNEVEN, tmp_path / "oracle"))
    figures = judge(oracle, llama_logits(emit(model, tmp_path / "out", flat_plan(model, kept=UNEVEN)).path, model))
    print(f"parity of {family} with dropped experts: {figures}")  # noqa: T201
    assert agrees(figures), figures
    assert not agrees(judge(oracle, original_logits(sources[family])))  # dropping them matters


# ------------------------------------------------------------------------------------------------------------- GGUF, ONNX
@pytest.mark.parametrize("family", FAMILIES)
def test_llama_cpp_gives_the_logits_of_transformers(family: str, sources: dict[str, Path], tmp_path: Path) -> None:
    model = inspect_model(sources[family])
    expected = original_logits(sources[family])
    figures = judge(expected, llama_logits(emit(model, tmp_path).path, model))
    print(f"parity of {family}: {figures}")  # noqa: T201
    assert 0.5 < figures["std"] < 2  # else the thresholds mean nothing
    assert agrees(figures), figures


@pytest.mark.parametrize("kept", [None, KEPT], ids=["all", "dropped"])
@pytest.mark.parametrize("family", [*FAMILIES, "tied"])
def test_onnxruntime_in_floats_gives_the_logits_of_transformers(
    sources: dict[str, Path], ids: NDArray[np.int64], tmp_path: Path, family: str, kept: Sequence[Sequence[int]] | None
) -> None:
    folder = make_checkpoint(tmp_path / "tied", "qwen3_moe", tied=True) if family == "tied" else sources[family]
    model = inspect_model(folder)
    stats, plan = flat_stats(model, tmp_path / "stats", seed=3), hand_plan(model, "F32", kept)
    artifact = onnx_tiny.emit(model, stats, plan, tmp_path / "out")
    want = reference_logits(reference(model, stats, plan), ids)
    got = Runner(artifact.path, model).step(ids)
    assert np.abs(got - want).max() <= 1e-3
    assert mean_kl(want, got) <= 1e-6


def test_a_router_with_groups_chooses_everywhere_as_in_transformers(ids: NDArray[np.int64], tmp_path: Path) -> None:
    """GLM-4.5's class can choose groups of experts first, as DeepSeek-V3's does; as many of each group stay."""
    folder = edit_config(make_checkpoint(tmp_path / "glm4_moe", "glm4_moe", seed=3), n_group=2, topk_group=1)
    model, kept = inspect_model(folder), [(0, 2, 3, 5, 6, 7), (0, 1, 2, 4, 5, 7)]
    assert (model.router.groups, model.router.top_groups) == (2, 1)
    whole = original_logits(folder)
    sliced = original_logits(slice_experts(folder, kept, tmp_path / "sliced"))
    ungrouped = original_logits(edit_config(Path(shutil.copytree(folder, tmp_path / "ungrouped")), n_group=1))
    assert not agrees(judge(whole, ungrouped))  # groups matter
    for expected, sets in ((whole, None), (sliced, kept)):
        assert agrees(judge(expected, stream_logits(model, tmp_path / "work", sets)))
        artifact = emit(model, tmp_path / f"gguf-{sets is None}", flat_plan(model, kept=sets))
        assert agrees(judge(expected, llama_logits(artifact.path, model)))
        stats, plan = flat_stats(model, tmp_path / "stats"), hand_plan(model, "F32", sets)
        onnx = onnx_tiny.emit(model, stats, plan, tmp_path / f"onnx-{sets is None}")
        assert mean_kl(reference_logits(reference(model, stats, plan), ids), Runner(onnx.path, model).step(ids)) <= 1e-6
