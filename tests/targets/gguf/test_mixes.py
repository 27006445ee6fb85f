"""Shapes from a bare config.json: against published parameter counts, inspect_model, and llama.cpp's caches."""

import pytest

from edgemoe.ir import Model
from edgemoe.model.describe import describe, list_shapes, load_shape
from edgemoe.targets.gguf.writer import fixed_sizes

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


def test_a_shape_has_a_fixed_size_though_it_has_no_tokenizer() -> None:
    model = shape("GLM-5.2")
    routers = 75 * 4 * (6144 + 1)  # bytes for each expert: its router row and its selection bias
    assert fixed_sizes(model, [256])[0] - fixed_sizes(model, [128])[0] == 128 * routers
    assert 5e6 < fixed_sizes(model, [256])[0] - 256 * routers < 2e7  # header, vocabulary and norms: published files have 5 to 20 MB
