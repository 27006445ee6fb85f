"""Shapes from a bare config.json: against published parameter counts and file sizes, inspect_model, and llama-quantize itself."""

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import yaml

from edgemoe.base.errors import ModelError, UsageError
from edgemoe.ir import Model, is_planned
from edgemoe.model import shapes
from edgemoe.model.inspect import inspect_model
from edgemoe.model.shapes import layout_of_config, load_shape, model_of_config
from edgemoe.targets.gguf.mixes import MIXES, mix_types, pure_types, tensor_bytes
from edgemoe.targets.gguf.writer import fixed_size, list_units
from tests.tiny import FAMILIES, make_checkpoint

# All weights and those of routed experts, in units of 10^9: transformers 5.23 builds of the released configs on the meta device.
# GLM-4.5-Air and GLM-5.2, whose config classes differ from the checkpoints, are held against their GGUFs below instead.
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

# Elements of published GGUFs with their next-token-prediction block (sums over Thireus/GGUF-Tool-Suite's tensor maps, commit 384c1f85).
ELEMENTS = {"GLM-4.5-Air": 110_468_824_832, "GLM-4.5": 358_337_791_296, "GLM-4.6": 356_785_898_816, "GLM-5.2": 753_329_940_480}

# Bytes of all tensors in one type (same source; "pure": vectors and routers F32, rows that 256 does not divide in the fallback type).
PURE = [
    ("Qwen3-235B-A22B", False, {"Q8_0": 249_934_100_480, "Q4_K": 132_412_323_840, "Q2_K": 77_323_991_040}),  # text model of Qwen3-VL-235B
    ("Qwen3.5-35B-A3B", False, {"Q8_0": 36_892_150_272, "Q6_K": 28_503_163_392, "Q4_K": 19_572_951_552, "IQ4_XS": 18_490_501_632}),
    ("Qwen3.5-35B-A3B", False, {"Q3_K": 14_972_539_392, "Q2_K": 11_454_577_152, "IQ2_XXS": 9_019_064_832, "IQ1_M": 7_666_002_432}),
    ("Qwen3.5-122B-A10B", False, {"Q8_0": 129_860_935_680, "Q6_K": 100_296_732_672, "IQ4_XS": 65_010_425_856}),
    ("Qwen3.5-397B-A17B", False, {"Q8_0": 421_496_351_744, "IQ4_XS": 211_005_778_944}),
    ("GLM-4.7-Flash", False, {"Q8_0": 31_833_324_032, "Q4_K": 16_876_321_280, "Q2_K": 9_869_918_720}),
    ("GLM-4.5-Air", True, {"Q8_0": 117_447_146_496, "Q4_K": 66_508_733_440, "Q2_K": 44_371_483_648, "IQ1_M": 36_039_687_168}),
    ("GLM-4.6", True, {"Q8_0": 379_308_479_744, "Q4_K": 200_953_566_464, "Q2_K": 117_349_700_864}),
    ("DeepSeek-V3", False, {"Q4_K": 377_885_689_856, "Q2_K": 220_695_024_640, "IQ1_M": 147_369_230_336}),  # V3.1-Terminus
    ("Kimi-K2", False, {"Q4_K": 577_957_857_280, "Q2_K": 337_460_360_192}),  # Thinking
    ("GLM-5.2", True, {"Q8_0": 800_767_795_200, "Q4_K": 424_225_333_248, "IQ2_XXS": 194_821_220_352}),
]

# Published files.  Mixtral-8x7B: Chinese-Mixtral (same shape), ymcui/Chinese-Mixtral #26; Q6_K and Q8_0 in GiB from llama.cpp #4406; 8x22B
# and Qwen3-30B: bartowski's cards.
MIXED = [
    ("Mixtral-8x7B", 1e9, {"IQ1_S": 9.8, "Q2_K": 17.3, "IQ3_XXS": 18.3, "Q3_K_M": 22.5, "IQ4_XS": 25.1, "Q4_K_M": 28.4, "Q5_K_M": 33.2}),
    ("Mixtral-8x7B", 2**30, {"Q6_K": 35.74, "Q8_0": 46.22}),
    ("Mixtral-8x22B", 1e9, {"Q2_K": 52.10, "IQ3_XS": 58.22, "Q3_K_M": 67.78, "Q4_K_S": 80.47, "Q4_K_M": 85.58, "Q5_K_M": 99.96}),
    ("Qwen3-30B-A3B", 1e9, {"Q8_0": 32.48, "Q6_K": 25.10, "Q5_K_M": 21.74, "Q5_K_S": 21.10}),
]


def shape(name: str, mtp: bool = False) -> Model:
    return model_of_config(load_shape(name), name, mtp=mtp)


@pytest.mark.parametrize("name", PARAMETERS)
def test_parameter_counts_are_those_of_the_released_models(name: str) -> None:
    total, routed = PARAMETERS[name]
    model = shape(name)
    assert model.n_weights / 1e9 == pytest.approx(total, abs=6e-4)
    if routed is not None:
        assert sum(t.n_weights for t in model.tensors if t.expert >= 0) / 1e9 == pytest.approx(routed, abs=6e-4)


def test_every_shipped_shape_is_checked_against_a_published_count() -> None:
    shipped = yaml.safe_load((Path(shapes.__file__).parent / "shapes_data" / "models.yaml").read_text(encoding="utf-8"))
    assert set(shipped) == set(PARAMETERS) | set(ELEMENTS)


@pytest.mark.parametrize(("name", "elements"), ELEMENTS.items())
def test_with_the_prediction_block_the_gguf_has_exactly_these_weights(name: str, elements: int) -> None:
    assert shape(name, mtp=True).n_weights == elements


@pytest.mark.parametrize(("name", "mtp", "published"), PURE)
def test_bytes_of_one_type_for_everything_are_exactly_those_published(name: str, mtp: bool, published: dict[str, int]) -> None:
    model = shape(name, mtp)
    assert {kind: tensor_bytes(model, pure_types(model, kind)) for kind in published} == published


@pytest.mark.parametrize(("name", "unit", "published"), MIXED)
def test_bytes_of_llama_quantize_mixes_are_those_published_to_half_a_percent(name: str, unit: float, published: dict[str, float]) -> None:
    model = shape(name)
    for mix, size in published.items():
        assert tensor_bytes(model, mix_types(model, mix)) / unit == pytest.approx(size, rel=5e-3), mix


# ---------------------------------------------------------------------------------------- llama-quantize itself, on files that hold no data
DRY_RUN = """
import ctypes, json, re, sys
import llama_cpp as lc
lines = []
log = lc.llama_log_callback(lambda level, text, data: lines.append(text.decode(errors="replace")))
lc.llama_log_set(log, ctypes.c_void_p(0))
ones = (ctypes.c_float * 1)(1.0)
found = {}
for mix in sys.argv[2:]:
    params = lc.llama_model_quantize_default_params()
    params.ftype, params.dry_run = getattr(lc, f"LLAMA_FTYPE_MOSTLY_{mix.split('/')[0]}"), True
    entries = (lc.llama_model_imatrix_data * 2)()
    entries[0].name, entries[0].data, entries[0].size = b"none", ones, 1
    if mix.endswith("/imatrix"):
        params.imatrix = ctypes.cast(entries, ctypes.POINTER(lc.llama_model_imatrix_data))
    lines.clear()
    assert lc.llama_model_quantize(sys.argv[1].encode(), b"/dev/null", ctypes.byref(params)) == 0, "".join(lines)[-2000:]
    text = "".join(lines)
    found[mix] = dict(re.findall(r"\\] +(\\S+) +- \\[[^]]*\\], type = +f16, size = +[0-9.]+ MiB -> +[0-9.]+ MiB \\((\\w+)\\)", text))
print(json.dumps(found))
"""
DRY_MODELS = {  # name -> architecture, and the keys that its loader insists on
    "Mixtral-8x7B": ("llama", {}),
    "Qwen3-30B-A3B": ("qwen3moe", {}),
    "Qwen1.5-MoE-A2.7B": ("qwen2moe", {}),
    "OLMoE-1B-7B": ("olmoe", {}),
    "DeepSeek-V2-Lite": ("deepseek2", {"leading_dense_block_count": 1, "attention.kv_lora_rank": 512, "expert_shared_count": 2}),
    "GLM-4.5-Air": ("glm4moe", {"leading_dense_block_count": 1, "expert_shared_count": 1, "nextn_predict_layers": 1}),
    "Granite-3.0-1B-A400M": ("granitemoe", {"logit_scale": 6.0}),
}


def write_hollow_gguf(path: Path, model: Model, arch: str, keys: dict[str, Any]) -> None:
    """A GGUF whose header announces every tensor in F16 (F32 where nothing is quantized) and whose data is a hole."""
    writer = gguf.GGUFWriter(path, arch)
    layers = 1 + max(t.layer for t in model.tensors)
    common = {"block_count": layers, "context_length": 4096, "embedding_length": model.hidden_size, "expert_count": model.n_experts}
    common |= {"expert_used_count": model.top_k, "attention.head_count": model.n_heads, "attention.head_count_kv": model.n_kv_heads}
    common |= {"feed_forward_length": 4096, "expert_feed_forward_length": model.expert_size, "vocab_size": model.vocab_size}
    common |= {"rope.dimension_count": model.head_dim, "attention.key_length": model.head_dim, "attention.value_length": model.head_dim}
    for key, value in {**common, "attention.layer_norm_rms_epsilon": 1e-6, "expert_weights_scale": 1.0, **keys}.items():
        (writer.add_float32 if isinstance(value, float) else writer.add_uint32)(f"{arch}.{key}", value)
    end = 0
    units = {unit.name: unit for unit in list_units(model)}
    for tensor in (t for t in model.tensors if t.expert <= 0):
        name = (f"blk.{tensor.layer}." if tensor.layer >= 0 else "") + tensor.role
        name = name if name.endswith(".bias") else name + ".weight"
        dims = (model.n_experts, *tensor.shape) if tensor.expert == 0 else tensor.shape
        dtype = np.float16 if is_planned(tensor) else np.float32
        size = int(np.prod(dims)) * np.dtype(dtype).itemsize
        assert name not in units or units[name].n_weights == np.prod(dims)
        writer.add_tensor_info(name, dims, np.dtype(dtype), size)
        end += -(-size // 32) * 32
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    writer.close()
    with path.open("r+b") as file:
        file.truncate(-(-path.stat().st_size // 32) * 32 + end)


@pytest.mark.parametrize("name", DRY_MODELS)
def test_mixes_give_every_tensor_the_type_that_llama_quantize_gives_it(name: str, tmp_path: Path) -> None:
    arch, keys = DRY_MODELS[name]
    model = shape(name, mtp="nextn_predict_layers" in keys)
    path = tmp_path / "hollow.gguf"
    write_hollow_gguf(path, model, arch, keys)
    jobs = [f"{mix}/{which}" for mix in MIXES for which in ("imatrix", "blind")]
    run = subprocess.run([sys.executable, "-c", DRY_RUN, str(path), *jobs], capture_output=True, text=True, check=False)
    path.unlink()
    assert run.returncode == 0, run.stderr[-3000:]
    for job, found in json.loads(run.stdout).items():
        mix, _, which = job.partition("/")
        expected = {unit: kind for unit, kind in mix_types(model, mix, imatrix=which == "imatrix").items() if kind != "F16"}
        assert {unit: kind.upper() for unit, kind in found.items()} == expected, job


# ------------------------------------------------------------------------------------------------------------------- the same as headers
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("tied", [False, True])
def test_a_config_alone_gives_the_tensors_that_its_checkpoint_has(family: str, tied: bool, tmp_path: Path) -> None:
    if family == "olmoe" and tied:
        pytest.skip("llama.cpp's olmoe has no tied embeddings")
    folder = make_checkpoint(tmp_path / family, family, n_experts=6, tied=tied)
    real = inspect_model(folder)
    found = model_of_config(json.loads((folder / "config.json").read_text()), "x")

    def keys(model: Model) -> Iterator[tuple[Any, ...]]:
        return ((t.role, t.layer, t.expert, t.shape) for t in model.tensors)

    assert sorted(keys(found)) == sorted(keys(real))
    for field in (
        "n_layers",
        "hidden_size",
        "vocab_size",
        "n_heads",
        "n_kv_heads",
        "head_dim",
        "n_experts",
        "top_k",
        "expert_size",
        "renormalize",
    ):
        assert getattr(found, field) == getattr(real, field), field


def test_a_shape_has_a_fixed_size_though_it_has_no_tokenizer() -> None:
    model = shape("GLM-5.2")
    routers = 75 * 4 * (6144 + 1)  # bytes for each expert: its router row and its selection bias
    assert fixed_size(model, 256) - fixed_size(model, 128) == 128 * routers
    assert 5e6 < fixed_size(model, 256) - 256 * routers < 2e7  # header, vocabulary and norms: published files have 5 to 20 MB


# --------------------------------------------------------------------------------------------------------------------------- memory layouts
# KV cache at F16, bytes per token over all layers, as llama.cpp allocates it (src/llama-kv-cache.cpp).
KV_BYTES = {"Mixtral-8x7B": 131_072, "Qwen3-30B-A3B": 98_304, "Qwen3-235B-A22B": 192_512, "GLM-4.5-Air": 188_416, "MiniMax-M2": 253_952}
KV_BYTES |= {"DeepSeek-V3": 70_272, "Kimi-K2": 70_272, "DeepSeek-V2-Lite": 31_104, "Qwen3.5-35B-A3B": 20_480, "Qwen3-Next-80B-A3B": 24_576}


@pytest.mark.parametrize("name", KV_BYTES)
def test_layouts_cache_what_llama_cpp_caches_per_token(name: str) -> None:
    layout = layout_of_config(load_shape(name))
    assert sum(2 * (c.k + c.v) for c in layout.caches) == KV_BYTES[name]


def test_layouts_know_windows_indexers_and_recurrent_states() -> None:
    oss = layout_of_config(load_shape("gpt-oss-20b"))
    assert [c.window for c in oss.caches] == [128, 0] * 12
    glm = layout_of_config(load_shape("GLM-5.2"))
    assert sum(c.k for c in glm.caches) == 78 * (512 + 64) + 21 * 128  # the indexer's keys in every fourth layer, and in the first three
    assert (glm.latent, glm.q_latent, glm.dense_layers, glm.dense_size, glm.shared_size) == (512, 2048, 3, 12288, 2048)
    qwen = layout_of_config(load_shape("Qwen3.5-35B-A3B"))
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
        model_of_config({**load_shape("Mixtral-8x7B"), **change})


def test_an_unknown_shape_is_refused_with_the_known_ones() -> None:
    with pytest.raises(UsageError) as caught:
        load_shape("GPT-9")
    assert "GLM-5.2" in caught.value.hint
