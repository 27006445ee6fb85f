"""Shapes from a bare config.json: against published parameter counts and inspect_model."""

import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from tiny import FAMILIES, make_checkpoint

from edgemoe.base.errors import ModelError, UsageError
from edgemoe.ir import Model
from edgemoe.model.describe import describe, list_shapes, load_shape
from edgemoe.model.families import shape_families
from edgemoe.model.inspect import inspect_model

# All weights and those of routed experts, in units of 10^9: transformers 5.23 builds of the released configs on the meta device.
# GLM-4.5-Air and GLM-5.2, whose config classes differ from the checkpoints, are held against their GGUFs in test_peers.py instead.
PARAMETERS = {
    "Mixtral-8x7B": (46.703, 45.097),
    "Mixtral-8x22B": (140.630, 135.291),
    "Qwen1.5-MoE-A2.7B": (14.316, 12.457),
    "Qwen2-57B-A14B": (57.409, 49.325),
    "Qwen3-30B-A3B": (30.532, 28.991),
    "Qwen3-235B-A22B": (235.094, 227.096),
    "Qwen3-Coder-480B-A35B": (480.155, 468.084),
    "Qwen3-Next-80B-A3B": (79.674, 77.309),
    "Qwen3.5-35B-A3B": (34.661, 32.212),
    "Qwen3.5-122B-A10B": (122.112, 115.964),
    "Qwen3.5-397B-A17B": (396.346, 386.547),
    "OLMoE-1B-7B": (6.919, 6.442),
    "DeepSeek-V2-Lite": (15.706, 14.395),
    "DeepSeek-V3": (671.026, 653.909),
    "Kimi-K2": (1026.408, 1014.686),
    "GLM-4.5": (352.798, 335.964),
    "GLM-4.6": (352.798, 335.964),
    "GLM-4.7-Flash": (29.943, 27.783),
    "ERNIE-4.5-21B-A3B": (21.825, 20.384),
    "ERNIE-4.5-300B-A47B": (299.484, 287.494),
    "Granite-3.0-1B-A400M": (1.335, 1.208),
    "Granite-3.0-3B-A800M": (3.299, 3.020),
    "MiniMax-M2": (228.690, 224.680),
    "gpt-oss-20b": (20.915, None),  # the published figure counts biases as experts'
    "gpt-oss-120b": (116.829, None),
}


def shape(name: str) -> Model:
    return describe(load_shape(name), name)


@pytest.mark.parametrize("name", PARAMETERS)
def test_parameter_counts_are_those_of_the_released_models(name: str) -> None:
    total, routed = PARAMETERS[name]
    model = shape(name)
    assert model.n_weights / 1e9 == pytest.approx(total, abs=6e-4)
    if routed is not None:
        assert sum(t.n_weights for t in model.tensors if t.expert >= 0) / 1e9 == pytest.approx(routed, abs=6e-4)


def test_every_shipped_shape_is_checked_against_a_published_count() -> None:
    assert set(list_shapes()) == set(PARAMETERS) | {"GLM-4.5-Air", "GLM-5.2"}  # these with their prediction blocks, in test_peers.py
    assert {load_shape(name)["model_type"] for name in list_shapes()} <= set(shape_families())


# ------------------------------------------------------------------------------------------------------------------- the same as headers
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("tied", [False, True])
def test_a_config_alone_gives_the_tensors_that_its_checkpoint_has(family: str, tied: bool, tmp_path: Path) -> None:
    if family == "olmoe" and tied:
        pytest.skip("llama.cpp's olmoe has no tied embeddings")
    folder = make_checkpoint(tmp_path / family, family, n_experts=6, tied=tied)
    real = inspect_model(folder)
    found = describe(json.loads((folder / "config.json").read_text()), "x")

    def keys(model: Model) -> Iterator[tuple[Any, ...]]:
        return ((t.role, t.layer, t.expert, t.shape) for t in model.tensors)

    assert sorted(keys(found)) == sorted(keys(real))
    told = {"folder", "name", "tensors", "fingerprint"}
    for field in dataclasses.fields(Model):
        if field.name not in told:
            assert getattr(found, field.name) == getattr(real, field.name), field.name


# --------------------------------------------------------------------------------------------------------------------------- memory layouts
# KV cache at F16, bytes per token over all layers, as llama.cpp allocates it (src/llama-kv-cache.cpp).
KV_BYTES = {"Mixtral-8x7B": 131_072, "Qwen3-30B-A3B": 98_304, "Qwen3-235B-A22B": 192_512, "GLM-4.5-Air": 188_416, "MiniMax-M2": 253_952}
KV_BYTES |= {"DeepSeek-V3": 70_272, "Kimi-K2": 70_272, "DeepSeek-V2-Lite": 31_104, "Qwen3.5-35B-A3B": 20_480, "Qwen3-Next-80B-A3B": 24_576}


@pytest.mark.parametrize("name", KV_BYTES)
def test_models_cache_what_llama_cpp_caches_per_token(name: str) -> None:
    model = describe(load_shape(name))
    assert sum(2 * (c.k + c.v) for c in model.caches) == KV_BYTES[name]


def test_models_know_windows_indexers_and_recurrent_states() -> None:
    oss = describe(load_shape("gpt-oss-20b"))
    assert [c.window for c in oss.caches] == [128, 0] * 12
    glm = describe(load_shape("GLM-5.2"))
    assert sum(c.k for c in glm.caches) == 78 * (512 + 64) + 21 * 128  # the indexer's keys in every fourth layer, and in the first three
    assert (glm.attention.latent, glm.attention.q_latent, glm.moe_layers[0], glm.dense_size, glm.shared_size) == (512, 2048, 3, 12288, 2048)
    qwen = describe(load_shape("Qwen3.5-35B-A3B"))
    assert [bool(c.state) for c in qwen.caches] == [True, True, True, False] * 10
    assert qwen.caches[0].state == 3 * (4096 + 2 * 2048) + 128 * 4096  # llama-hparams.cpp: n_embd_r + n_embd_s


# -------------------------------------------------------------------------------------------------------------------------------- bad input
@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"model_type": "bert"}, "model_type"),
        ({"hidden_size": None}, "hidden_size"),
        ({"hidden_size": "4096"}, "hidden_size"),
        ({"num_hidden_layers": 10**9}, "num_hidden_layers"),
        ({"num_local_experts": 10**9}, "num_local_experts"),
        ({"num_experts_per_tok": 0}, "num_experts_per_tok"),
        ({"num_experts_per_tok": 9}, "num_experts_per_tok"),
        ({"intermediate_size": True}, "intermediate_size"),
    ],
)
def test_a_bad_field_is_named(change: dict[str, Any], field: str) -> None:
    with pytest.raises(ModelError, match=field):
        describe({**load_shape("Mixtral-8x7B"), **change})


def test_an_unknown_shape_is_refused_with_the_known_ones() -> None:
    with pytest.raises(UsageError) as caught:
        load_shape("GPT-9")
    assert "GLM-5.2" in caught.value.hint
