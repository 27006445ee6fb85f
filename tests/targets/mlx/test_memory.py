"""The memory that Metal holds, from shapes: beside Apple's own table, and the settings of the cache."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from edgemoe.base.errors import ModelError, UsageError
from edgemoe.devices.profiles import find_device
from edgemoe.ir import Model
from edgemoe.model.describe import describe, load_shape
from edgemoe.price.priors import price_generic
from edgemoe.targets import count_bytes, find_target
from edgemoe.targets.mlx.memory import memory_parts
from edgemoe.targets.mlx.settings import KV_BITS, Settings, parse_settings

# mlx_lm/BENCHMARKS.md: `mx.get_peak_memory` in GB of Qwen3-30B-A3B on an M4 Max, a prompt of 2048 tokens and 128 new ones.
APPLE = {4: 18.20, 5: 22.01, 6: 25.82, 8: 33.46}


@pytest.fixture(scope="module")
def qwen() -> Model:
    return describe(load_shape("qwen3-30b-a3b"), "qwen3-30b-a3b")


@pytest.mark.parametrize("bits", APPLE)
def test_the_peak_is_that_of_apples_own_table(qwen: Model, bits: int) -> None:
    target = find_target("mlx-bf16")
    units, name = target.list_units(qwen), f"INT{bits}_64"
    sizes = count_bytes(qwen, target, units, (qwen.n_experts,))
    tensors = int(sizes.size[0, :, target.offered.index(name)].sum())
    parts = memory_parts(qwen, 2048 + 128, Settings())
    assert (tensors + sum(parts.values())) / 1e9 == pytest.approx(APPLE[bits], rel=0.01)


def test_the_cache_grows_in_steps_of_256_tokens(qwen: Model) -> None:
    kv = [memory_parts(qwen, context, Settings())["kv"] for context in (1, 256, 257, 512)]
    assert kv[0] == kv[1] == 2 * 48 * 4 * 128 * 2 * 256
    assert kv[2] == kv[3] == 2 * kv[1]


def test_a_quantized_cache_is_smaller_and_a_rotating_one_has_an_end(qwen: Model) -> None:
    context = 32_768
    plain, eight, rotating = (memory_parts(qwen, context, s) for s in (Settings(), Settings(kv_bits=8), Settings(max_kv=4096)))
    assert eight["kv"] == plain["kv"] * 17 // 32  # 8 bits, and 32 bits for each 64 numbers
    scores = 2 * 2 * 256 * context * qwen.attention.heads  # of attention, and their softmax: arrays of a chunk of 256 tokens
    assert eight["compute"] - scores == pytest.approx(plain["compute"] / 8, abs=1)
    assert rotating["kv"] == plain["kv"] * (4096 + 256) // context
    small = replace(qwen, attention=replace(qwen.attention, key_length=96))
    with pytest.raises(ModelError, match="heads of 96"):
        memory_parts(small, context, Settings(kv_bits=8))


@pytest.mark.parametrize(
    ("settings", "context", "said"),
    [
        (Settings(kv_bits=8), 32_768, "takes .* more than it saves at a context of 32768"),
        (Settings(max_kv=8000), 8192, "saves nothing at a context of 8192"),
        (Settings(max_kv=100_000), 8192, "saves nothing"),
    ],
)
def test_a_setting_of_the_cache_that_saves_nothing_is_refused(qwen: Model, settings: Settings, context: int, said: str) -> None:
    many = replace(qwen, attention=replace(qwen.attention, heads=128))  # whose scores take more than a cache
    with pytest.raises(UsageError, match=said):
        memory_parts(many, context, settings)


@pytest.mark.parametrize("heads", [64, 128, 192, 256])
@pytest.mark.parametrize("bits", KV_BITS)
def test_mlx_lm_can_hold_every_cache_that_is_offered(bits: int, heads: int) -> None:
    mx = pytest.importorskip("mlx.core")
    from mlx_lm.models.cache import QuantizedKVCache

    keys = mx.ones((1, 2, 5, heads))
    mx.eval(QuantizedKVCache(64, bits).update_and_fetch(keys, keys))


def test_a_tensor_is_not_larger_than_metals_largest_buffer(qwen: Model) -> None:
    target, box = find_target("mlx-bf16"), find_device("mac-16gb")
    costs = price_generic(qwen, target, 512)
    assert target.on_device(costs, box).cost.tolist() == costs.cost.tolist()
    stack = int(costs.size.max())  # of one projection of a layer's experts in 16 bits
    tight = replace(box, pools=(replace(box.pools[0], usable=stack, reserve=0),))
    offered = np.isfinite(target.on_device(costs, tight).cost)
    assert offered.any(axis=2).all()
    assert costs.size[offered].max() <= 0.75 * stack < costs.size[np.isfinite(costs.cost)].max()
    smaller = replace(box, pools=(replace(box.pools[0], usable=stack // 20, reserve=0),))
    with pytest.raises(ModelError, match=r"has .* at least, and Metal's largest buffer on mac-16gb is"):
        target.on_device(costs, smaller)


def test_the_order_of_settings_does_not_matter() -> None:
    assert find_target("mlx-kv8-bf16").name == "mlx-bf16-kv8"


@pytest.mark.parametrize("words", ["f16", "bf16", "kv8", "bf16-kv4", "f16-max4096", "max512"])
def test_a_plan_remembers_the_settings_in_its_targets_name(words: str) -> None:
    assert parse_settings(words).name == f"mlx-{words}"
    assert find_target(f"mlx-{words}").name == f"mlx-{words}"


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("mlx-f32", "is not known"),
        ("mlx-", "target 'mlx-' is not known"),
        ("mlx-f16-", "is not known"),
        ("mlx-kv7", "--kv-bits 7 is not known"),
        ("mlx-kv5", "--kv-bits 5 is not known"),
        ("mlx-f16-bf16", "is not known"),
        ("mlx-max4", "--max-kv-size 4: mlx_lm always keeps the first 4 tokens"),
        ("mlx-kv8-max512", "cannot quantize a cache that rotates"),
        ("gguf-f16", "gguf has no settings"),
        ("tflite", "known: gguf, onnx, browser, mlx"),
    ],
)
def test_unknown_settings_are_refused(name: str, said: str) -> None:
    with pytest.raises(UsageError) as error:
        find_target(name)
    assert said in f"{error.value} {error.value.hint}"
