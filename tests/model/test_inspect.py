"""Checkpoints that cannot be what they say are refused by file and field."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import EXPERT_COUNTS, FAMILIES, edit_config, make_checkpoint

from edgemoe.base.errors import ModelError
from edgemoe.model.inspect import inspect_model
from edgemoe.stream.layers import LayerStream

REFUSED = [
    *((family, {"rope_parameters": {"rope_type": "yarn", "factor": 4.0, "rope_theta": 1e4}}, "rope_parameters") for family in FAMILIES),
    *((family, {"rope_scaling": {"type": "linear", "factor": 2.0}, "rope_parameters": None}, "linear") for family in FAMILIES),
    *((family, {"rope_scaling": {"type": "linear", "factor": 2.0}}, "rope_scaling") for family in FAMILIES),  # beside rope_parameters
    *((family, {"rope_parameters": None}, "rope_theta") for family in FAMILIES),  # every family has another default
    *((family, {"rms_norm_eps": None}, "rms_norm_eps") for family in FAMILIES),
    *((family, {"rms_norm_eps": "1e-5"}, "rms_norm_eps") for family in FAMILIES),
    *((family, {"head_dim": 64.0}, "head_dim") for family in FAMILIES),
    *((family, {"attention_bias": True}, "attention_bias") for family in FAMILIES if family != "glm4_moe"),
    *((family, {"hidden_act": "gelu"}, "hidden_act") for family in FAMILIES),
    *((family, {"quantization_config": {"quant_method": "fp8"}}, "quantization_config") for family in FAMILIES),
    *((family, {"num_experts_per_tok": 9}, "num_experts_per_tok") for family in FAMILIES),
    *((family, {"num_hidden_layers": "2"}, "num_hidden_layers") for family in FAMILIES),
    *((family, {"hidden_size": None}, "hidden_size") for family in FAMILIES),
    ("qwen3_moe", {"norm_topk_prob": False}, "norm_topk_prob"),
    ("qwen3_moe", {"norm_topk_prob": None}, "norm_topk_prob"),  # transformers' default is false
    ("qwen3_moe", {"decoder_sparse_step": 2}, "decoder_sparse_step"),
    ("qwen3_moe", {"mlp_only_layers": [0]}, "mlp_only_layers"),
    ("qwen3_moe", {"use_sliding_window": True, "sliding_window": 128}, "sliding_window"),
    ("olmoe", {"norm_topk_prob": True}, "norm_topk_prob"),
    ("olmoe", {"clip_qkv": 8.0}, "clip_qkv"),
    ("olmoe", {"tie_word_embeddings": True}, "tie_word_embeddings"),
    ("olmoe", {"num_key_value_heads": 2}, "num_key_value_heads"),
    ("mixtral", {"sliding_window": 128}, "sliding_window"),
    ("glm4_moe", {"partial_rotary_factor": None, "rope_parameters": {"rope_type": "default", "rope_theta": 1e4}}, "partial_rotary_factor"),
    ("dots1", {"num_key_value_heads": 2}, "num_key_value_heads"),
    ("mixtral", {"model_type": "mixtral_next"}, "model_type 'mixtral_next'"),
]


@pytest.mark.parametrize(("family", "changes", "field"), REFUSED, ids=[f"{f}-{next(iter(c))}-{w}" for f, c, w in REFUSED])
def test_a_config_that_a_family_was_not_written_for_is_refused(family: str, changes: dict[str, Any], field: str, copy: Any) -> None:
    with pytest.raises(ModelError) as caught:
        inspect_model(edit_config(copy(family), **changes))
    assert field in str(caught.value) and "config.json" in str(caught.value) and caught.value.exit_code == 4


# Fields that transformers does not use for this family, or not with these values, or that decide nothing about what the model computes.
IGNORED = [
    ("qwen3_moe", {"sliding_window": 4096}),
    ("qwen3_moe", {"sliding_window": 4096, "use_sliding_window": False}),
    ("qwen2_moe", {"sliding_window": 32768, "max_window_layers": 1}),
    ("olmoe", {"sliding_window": 128}),
    ("glm4_moe", {"sliding_window": 128}),
    ("dots1", {"sliding_window": 128, "max_window_layers": 3}),
    *(("mixtral", {name: value}) for name, value in {
        "router_aux_loss_coef": 0, "router_jitter_noise": "none", "initializer_range": "x", "use_cache": 1, "attention_dropout": "much",
        "auto_map": {"AutoConfig": "e.E"}, "torch_dtype": 16, "transformers_version": [], "pad_token_id": "none", "vision": {"a": 1},
        "output_router_logits": "yes", "architectures": 7, "_name_or_path": 3, "rms_norm_eps": 1,
    }.items()),
]  # fmt: skip


@pytest.mark.parametrize(("family", "changes"), IGNORED, ids=[f"{f}-{next(iter(c))}" for f, c in IGNORED])
def test_a_field_that_decides_nothing_is_ignored(family: str, changes: dict[str, Any], copy: Any) -> None:
    model = inspect_model(edit_config(copy(family), **changes))
    assert LayerStream(model).load_layer(0) is not None


def test_null_means_as_many_heads_of_keys_as_of_queries(copy: Any) -> None:
    folder = copy("olmoe")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "num_key_value_heads": None}))
    model = inspect_model(folder)
    assert model.attention.kv_heads == 4
    assert LayerStream(model).load_layer(0) is not None


WRONG = [
    {"hidden_act": 5}, {"attention_bias": "no"}, {"attention_bias": 1}, {"rms_norm_eps": "1e-5"}, {"rms_norm_eps": True},
    {"rope_theta": [1]}, {"rms_norm_eps": float("nan")}, {"mlp_only_layers": "none"}, {"mlp_only_layers": {}}, {"moe_layer_freq": "all"},
    {"rope_parameters": "default"}, {"rope_scaling": [1]}, {"hidden_size": 256.0}, {"vocab_size": True}, {"num_experts": "8"},
    {"head_dim": 10**400}, {"full_attention_interval": "4"}, {"decoder_sparse_step": [1]}, {"tie_word_embeddings": "false"},
]  # fmt: skip


@pytest.mark.parametrize("changes", WRONG, ids=[f"{n}-{type(v).__name__}" for c in WRONG for n, v in c.items()])
def test_a_field_of_another_type_is_named(changes: dict[str, Any], copy: Any) -> None:
    with pytest.raises(ModelError, match=r"config\.json") as caught:
        inspect_model(edit_config(copy("qwen3_moe"), **changes))
    assert next(iter(changes)) in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("count", [7, 9])
def test_a_wrong_number_of_experts_is_refused(family: str, count: int, copy: Any) -> None:
    folder = copy(family)
    names = [n for n in EXPERT_COUNTS if n in json.loads((folder / "config.json").read_text())]
    with pytest.raises(ModelError, match=r"experts|mlp\.gate|block_sparse_moe\.gate") as caught:
        inspect_model(edit_config(folder, **dict.fromkeys(names, count)))
    assert caught.value.exit_code == 4


@pytest.mark.parametrize("family", FAMILIES)
def test_missing_and_unknown_tensors_are_named(family: str, copy: Any) -> None:
    folder = copy(family)
    weights = load_file(folder / "model.safetensors")
    save_file({**weights, "model.layers.0.mlp.extra.weight": torch.zeros(2, 2)}, folder / "model.safetensors")
    with pytest.raises(ModelError, match=r"unexpected tensor model\.layers\.0\.mlp\.extra"):
        inspect_model(folder)
    name = next(n for n in weights if ".experts.3." in n)
    save_file({n: w for n, w in weights.items() if n != name}, folder / "model.safetensors")
    with pytest.raises(ModelError, match=f"{name} is missing"):
        inspect_model(folder)
    save_file({**weights, name: weights[name][:-1].clone()}, folder / "model.safetensors")
    with pytest.raises(ModelError, match=rf"{name} has shape \[255, 256\]"):
        inspect_model(folder)


def test_truncated_and_missing_files_are_refused(tmp_path: Path) -> None:
    folder = make_checkpoint(tmp_path / "in", "olmoe", sharded=True)
    shard = sorted(folder.glob("*.safetensors"))[1]
    whole = shard.read_bytes()
    shard.write_bytes(whole[:-5])
    with pytest.raises(ModelError, match=rf"{shard.name}: file ends at byte {len(whole) - 5}"):
        inspect_model(folder)
    shard.write_bytes(whole[:6])
    with pytest.raises(ModelError, match=f"{shard.name}: not a safetensors file"):
        inspect_model(folder)
    index = folder / "model.safetensors.index.json"
    entries = index.read_text()
    index.write_text(entries.replace(shard.name, "../elsewhere.safetensors"))
    with pytest.raises(ModelError, match="not a file of this folder"):
        inspect_model(folder)
    index.write_text(entries)
    shard.unlink()
    with pytest.raises(ModelError, match=f"{shard.name}: shard is missing"):
        inspect_model(folder)
    index.unlink()
    with pytest.raises(ModelError, match="shards"):
        inspect_model(folder)
    for other in folder.glob("*.safetensors"):
        other.unlink()
    with pytest.raises(ModelError, match=r"no model\.safetensors"):
        inspect_model(folder)
    (folder / "config.json").unlink()
    with pytest.raises(ModelError, match=r"config\.json: is missing"):
        inspect_model(folder)
