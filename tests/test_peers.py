"""The benchmarks' peers: golden values, sizes that are kept, searches beside every possible choice, and who wins."""

from __future__ import annotations

import itertools
import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import gguf
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edgemoe.ir import Model, Unit
from edgemoe.model.describe import describe, load_shape
from edgemoe.model.inspect import inspect_model
from edgemoe.price.saliency import SCORES
from edgemoe.targets.gguf.formats import FORMATS
from edgemoe.targets.stacks import list_units

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))

import measure
from peers import recipes, searches, standings
from peers.mixes import MIXES, mix_types, pure_types, tensor_bytes, with_prediction_block

MODELS = Path(__file__).parents[1] / "examples"


@pytest.fixture(scope="module", params=["tiny-moe", "tiny-moe-b"])
def model(request: pytest.FixtureRequest) -> Model:
    return inspect_model(str(MODELS / request.param))


# ----------------------------------------------------------------------------------------------------------------- scores
# Six tokens of four experts, two each: z[t, e] = 2 sin(0.7 t + 1.3 e + 0.2), f[t, e, i] = (0.5 + 0.25 e) cos(0.9 t + 0.4 e + 1.1 i).
LOGITS = 2 * np.sin(0.7 * np.arange(6)[:, None] + 1.3 * np.arange(4) + 0.2)
COUNT = np.array([4.0, 3, 2, 3])


def test_the_scores_that_drop_experts_give_the_golden_values() -> None:
    sums = {"count": COUNT, "gate": np.array([2.442256, 1.481963, 0.339844, 1.735938])}
    sums["gate_norm"] = np.array([1.489379, 1.376260, 0.417523, 2.620120])
    assert SCORES["reap"](sums) == pytest.approx([0.372345, 0.458753, 0.208761, 0.873373], abs=1e-6)
    raw = np.array([2.270480, 1.322046, 0.300116, 1.606852])
    assert recipes.collaborative_score(COUNT, raw, 6) == pytest.approx([0.617143, 0.470341, 0.241696, 0.517809], abs=1e-6)


def test_routing_is_counted_as_by_hand() -> None:
    stats = SimpleNamespace(arrays=lambda layer: {"replay_logits": LOGITS})
    count, gate, tokens = recipes.routing_sums(SimpleNamespace(top_k=2), stats, 0)  # type: ignore[arg-type]
    assert count.tolist() == COUNT.tolist() and tokens == 6
    assert gate == pytest.approx([2.270480, 1.322046, 0.300116, 1.606852], abs=1e-6)


@pytest.mark.parametrize(("n", "share", "kept"), [(128, 0.75, 96), (128, 0.5, 64), (7, 0.75, 6), (7, 0.5, 4), (8, 0.1, 2)])
def test_reap_drops_as_many_as_its_own_code_and_leaves_the_router_enough(n: int, share: float, kept: int) -> None:
    assert recipes.reap_count(SimpleNamespace(n_experts=n, top_k=2), share) == kept  # type: ignore[arg-type]


def test_the_best_experts_stay_in_order() -> None:
    assert recipes.keep_best(np.array([0.1, 0.9, 0.5, 0.7]), 2) == (1, 3)


# -------------------------------------------------------------------------------------------------------------------- PMQ
def test_mcs_rounding_is_that_of_its_quantizer() -> None:
    weights = np.array([[0.0, 1.0, 2.2, 3.0], [-2.0, 1.0, 3.0, -5.0]], np.float32)
    assert recipes.round_group(weights, 2).tolist() == [[0, 1, 2, 3], [pytest.approx(x, abs=1e-5) for x in (-7 / 3, 1 / 3, 3, -5)]]
    assert recipes.round_group(weights[1:], 1).tolist() == [[-2.75, 2.75, 2.75, -2.75]]


@pytest.mark.parametrize(("bits", "kind"), [(1.75, "IQ1_M"), (2.0, "IQ2_XXS"), (2.25, "IQ2_XS"), (2.5, "IQ2_S"), (4.25, "IQ4_XS")])
def test_widths_go_to_the_nearest_type(bits: float, kind: str) -> None:
    assert recipes.nearest_type(bits) == kind


def test_pmq_stores_the_mean_width_of_each_layer(model: Model) -> None:
    widths = [np.array([1, 1, 2, 2]), *[np.array([2, 2, 2, 3])] * (model.n_layers - 1)]
    types = recipes.pmq_types(model, widths)
    assert types["blk.0.ffn_down_exps.weight"] == "IQ1_M" and types["blk.1.ffn_gate_exps.weight"] == "IQ2_S"
    assert types["output.weight"] == types["blk.0.attn_q.weight"] == "IQ4_XS"


# ---------------------------------------------------------------------------------------------------------------- recipes
def shape(layers: int) -> Model:
    """Only what recipes ask of a model: experts and attention of some layers, rows of 256."""
    roles = ("attn_q", "attn_output", "ffn_gate_exps", "ffn_up_exps", "ffn_down_exps")
    places = [("token_embd", -1), ("output", -1), *((role, layer) for layer in range(layers) for role in roles)]
    tensors = tuple(
        SimpleNamespace(role=r, layer=n, expert=0 if "exps" in r else -1, shape=(256, 256), n_weights=65536, dtype="BF16", planned=True)
        for r, n in places
    )
    return SimpleNamespace(n_layers=layers, n_experts=1, top_k=1, tensors=tensors)  # type: ignore[return-value]


def test_apex_gives_a_model_of_forty_layers_what_its_script_writes() -> None:
    """generate_config.sh --profile quality: layers 0-4 and 35-39 Q6_K, 5-9 and 30-34 Q5_K, the others IQ4_XS."""
    types = recipes.apex_types(shape(40), "quality")
    got = [types[f"blk.{layer}.ffn_up_exps.weight"] for layer in range(40)]
    assert got == ["Q6_K"] * 5 + ["Q5_K"] * 5 + ["IQ4_XS"] * 20 + ["Q5_K"] * 5 + ["Q6_K"] * 5
    attention = [recipes.apex_types(shape(40), "mini")[f"blk.{layer}.attn_q.weight"] for layer in range(40)]
    assert attention == ["Q4_K"] * 3 + ["Q3_K"] * 34 + ["Q4_K"] * 3


def test_ccmoe_raises_the_outer_eighths() -> None:
    types = recipes.ccmoe_types(shape(16), "IQ1_S")
    assert [types[f"blk.{n}.ffn_down_exps.weight"] for n in range(16)] == ["IQ2_XXS"] * 2 + ["IQ1_M"] * 12 + ["IQ2_XXS"] * 2
    assert [types[f"blk.{n}.ffn_gate_exps.weight"] for n in range(16)] == ["IQ1_M"] * 2 + ["IQ1_S"] * 12 + ["IQ1_M"] * 2
    assert types["output.weight"] == "Q5_K" and types["token_embd.weight"] == "Q2_K" and types["blk.0.attn_output.weight"] == "IQ4_XS"


def test_every_recipe_names_a_type_for_every_tensor_that_can_hold_its_rows(model: Model) -> None:
    cols = recipes.row_lengths(model)
    found = [recipes.apex_types(model, tier) for tier in recipes.APEX]
    found += [recipes.published_types(model, name) for name in recipes.PUBLISHED]
    found += [recipes.dq3_types(model), recipes.ccmoe_types(model, "IQ1_S"), recipes.ccmoe_types(model, "IQ1_M")]
    for types in found:
        assert types.keys() == cols.keys()
        assert all(cols[name] % FORMATS[kind].block == 0 for name, kind in types.items())


# ------------------------------------------------------------------------------------------------------- llama-quantize's mixes
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


def shipped(name: str) -> Model:
    return describe(load_shape(name), name)


@pytest.mark.parametrize(("name", "elements"), ELEMENTS.items())
def test_with_the_prediction_block_the_gguf_has_exactly_these_weights(name: str, elements: int) -> None:
    assert with_prediction_block(name).n_weights == elements


@pytest.mark.parametrize(("name", "mtp", "published"), PURE)
def test_bytes_of_one_type_for_everything_are_exactly_those_published(name: str, mtp: bool, published: dict[str, int]) -> None:
    model = with_prediction_block(name) if mtp else shipped(name)
    assert {kind: tensor_bytes(model, pure_types(model, kind)) for kind in published} == published


@pytest.mark.parametrize(("name", "unit", "published"), MIXED)
def test_bytes_of_llama_quantize_mixes_are_those_published_to_half_a_percent(name: str, unit: float, published: dict[str, float]) -> None:
    model = shipped(name)
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
    common |= {
        "expert_used_count": model.top_k,
        "attention.head_count": model.attention.heads,
        "attention.head_count_kv": model.attention.kv_heads,
    }
    common |= {"feed_forward_length": 4096, "expert_feed_forward_length": model.expert.size, "vocab_size": model.vocab_size}
    common |= {
        "rope.dimension_count": model.attention.key_length,
        "attention.key_length": model.attention.key_length,
        "attention.value_length": model.attention.key_length,
    }
    for key, value in {**common, "attention.layer_norm_rms_epsilon": 1e-6, "expert_weights_scale": 1.0, **keys}.items():
        (writer.add_float32 if isinstance(value, float) else writer.add_uint32)(f"{arch}.{key}", value)
    end = 0
    units = {unit.name: unit for unit in list_units(model)}
    for tensor in (t for t in model.tensors if t.expert <= 0):
        name = (f"blk.{tensor.layer}." if tensor.layer >= 0 else "") + tensor.role
        name = name if name.endswith(".bias") else name + ".weight"
        dims = (model.n_experts, *tensor.shape) if tensor.expert == 0 else tensor.shape
        dtype = np.float16 if tensor.planned else np.float32
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
    model = with_prediction_block(name) if "nextn_predict_layers" in keys else shipped(name)
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


# --------------------------------------------------------------------------------------------------------------- searches
def random_shelf(seed: int, n: int = 4) -> tuple[searches.Shelf, np.ndarray]:
    """Units of different sizes, four types, errors that mostly fall with bits."""
    rng = np.random.default_rng(seed)
    types = ("Q8_0", "Q4_K", "Q2_K", "IQ1_S")
    roles = ["output", "attn_v", "ffn_gate_exps", "ffn_up_exps", "ffn_down_exps"][:n]
    units = tuple(Unit(name=f"u{i}", role=role, layer=-1 if role == "output" else 0, n_weights=1) for i, role in enumerate(roles))
    weights = rng.integers(1, 9, n) * 1000
    size = np.array([[int(w * FORMATS[t].bpw / 8) for t in types] for w in weights], np.int64)
    errors = rng.lognormal(0, 1, (n, 1)) * np.array([0.01, 0.1, 0.5, 1.0]) * rng.lognormal(0, 0.3, (n, 4))
    return searches.Shelf(units=units, types=types, size=size, offered=np.ones(size.shape, bool), fixed=100), errors


def spent(shelf: searches.Shelf, types: dict[str, str]) -> int:
    return shelf.fixed + sum(int(shelf.size[u, shelf.types.index(types[unit.name])]) for u, unit in enumerate(shelf.units))


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 10**6), share=st.floats(0.0, 1.0))
def test_every_search_keeps_its_byte_target(seed: int, share: float) -> None:
    shelf, errors = random_shelf(seed, 5)
    least, most = int(shelf.size.min(axis=1).sum()), int(shelf.size.max(axis=1).sum())
    room = shelf.fixed + round(least + share * (most - least))
    curve = dict(zip(shelf.types, (0.001, 0.02, 0.3, 1.0), strict=True))
    found = [
        searches.search_target(shelf, errors, np.ones(5), room),
        searches.search_greedy(shelf, errors[:, -1], curve, room, 100_000, pinned=False),
        searches.raise_most_sensitive(shelf, errors[:, -1], room),
    ]
    assert all(types is not None and spent(shelf, types) <= room for types in found)
    pinned = searches.search_greedy(shelf, errors[:, -1], curve, room, 100_000, pinned=True)
    assert pinned is None or (spent(shelf, pinned) <= room and pinned["u0"] == "Q8_0")
    assert searches.search_target(shelf, errors, np.ones(5), shelf.fixed + least - 1) is None


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 10**6), share=st.floats(0.05, 0.95))
def test_the_target_size_search_is_no_worse_than_the_best_price_of_a_bit(seed: int, share: float) -> None:
    """Of all choices with one price for all units (found by trying every one that matters), none that fits has less error."""
    shelf, errors = random_shelf(seed)
    least, most = int(shelf.size.min(axis=1).sum()), int(shelf.size.max(axis=1).sum())
    room = shelf.fixed + round(least + share * (most - least))
    types = searches.search_target(shelf, errors, np.ones(4), room)
    assert types is not None
    mine = sum(errors[u, shelf.types.index(types[unit.name])] for u, unit in enumerate(shelf.units))
    prices = [0.0]
    for u in range(4):
        for f, g in itertools.combinations(range(4), 2):
            bits = 8 * (shelf.size[u, f] - shelf.size[u, g])
            prices.append(max((errors[u, g] - errors[u, f]) / bits, 0.0) * (1 + 1e-9))
    for price in prices:
        picks = np.argmin(errors + price * 8 * shelf.size, axis=1)
        if shelf.fixed + searches.total(shelf.size, picks) <= room:
            assert mine <= errors[np.arange(4), picks].sum() * (1 + 1e-6)


def test_the_greedy_search_takes_the_cheapest_steps_down_and_ties_gate_and_up() -> None:
    """By hand: of damage per byte, the experts' first step costs least, then their second; output stays."""
    units = tuple(
        Unit(name=n, role=r, layer=layer, n_weights=100)
        for n, r, layer in (("o", "output", -1), ("g", "ffn_gate_exps", 0), ("u", "ffn_up_exps", 0))
    )
    size = np.array([[85, 45, 26]] * 3, np.int64)
    shelf = searches.Shelf(units=units, types=("Q8_0", "Q4_K", "Q2_K"), size=size, offered=np.ones((3, 3), bool), fixed=0)
    curve = {"Q8_0": 0.0, "Q4_K": 0.1, "Q2_K": 1.0}
    sensitivity = np.array([10.0, 1.0, 1.0])
    down_once = searches.search_greedy(shelf, sensitivity, curve, 175, 300, pinned=False)
    assert down_once == {"o": "Q8_0", "g": "Q4_K", "u": "Q4_K"}
    # Output's step to Q4_K costs 1 for 40 bytes, the experts' to Q2_K 1.8 for 38.
    assert searches.search_greedy(shelf, sensitivity, curve, 174, 300, pinned=False) == {"o": "Q4_K", "g": "Q4_K", "u": "Q4_K"}
    assert searches.search_greedy(shelf, sensitivity, curve, 174, 300, pinned=True) == {"o": "Q8_0", "g": "Q2_K", "u": "Q2_K"}


def test_collaborative_compression_raises_the_most_sensitive_that_fit() -> None:
    shelf, _ = random_shelf(1, 3)
    base, above = shelf.size[:, 2], shelf.size[:, 1]
    room = shelf.fixed + int(base.sum()) + int(above[1] - base[1])
    gain = np.array([0.0, 0.2, 0.1])
    assert searches.raise_most_sensitive(shelf, gain, room) == {"u0": "Q2_K", "u1": "Q4_K", "u2": "Q2_K"}


def test_errors_are_relative_weighted_and_trimmed() -> None:
    assert searches.trimmed_mean(np.array([1.0, 2.0, 6.0])) == 3.0
    assert searches.trimmed_mean(np.concatenate([[1e9, -1e9], np.full(98, 2.0)])) == 2.0
    rows = np.tile(np.linspace(-1, 1, 256, dtype=np.float32), (3, 1))
    assert searches.row_error(rows, "F16", None, 30) < 1e-5
    importance = np.zeros(256, np.float32)
    importance[:128] = 1
    worse, better = (searches.row_error(rows, "Q2_K", v, 30) for v in (np.ones(256, np.float32), importance))
    assert better < worse


# ------------------------------------------------------------------------------------------------------------- who stands where
def fake_reference() -> SimpleNamespace:
    """Two domains of three windows."""
    return SimpleNamespace(names=("a", "b"), split=lambda values: [np.array(values[:3]), np.array(values[3:])])


def entry(kind: str, recipe: str, size: int, kl: float, budget: int = -1) -> standings.Entry:
    score = measure.Score(size=size, kl=(kl,) * 6, same=(1.0,) * 6, nll=(1.0,) * 6, p99=(kl,) * 2)
    return standings.Entry(kind=kind, recipe=recipe, name=f"{size}", score=score, budget=budget)


def test_a_peer_stands_with_its_smallest_file_that_is_not_smaller_or_with_that_for_the_budget() -> None:
    mine = standings.Ours(budget=3, count=4, predicted=0.1, score=entry("", "", 100, 0.1).score)
    peers = [entry("mix", "all", 99, 0.01), entry("mix", "all", 101, 0.3), entry("mix", "all", 120, 0.2)]
    peers += [entry("target size", "all", 98, 0.15, budget=3), entry("target size", "all", 300, 0.001, budget=1)]
    reference = fake_reference()
    mix, search = (standings.best_of(reference, peers, kind, mine, [0, 1]) for kind in ("mix", "target size"))  # type: ignore[arg-type]
    assert mix is not None and mix.score.size == 101
    assert search is not None and search.score.size == 98


def test_random_drops_stand_with_the_middle_seed() -> None:
    mine = standings.Ours(budget=0, count=4, predicted=0.1, score=entry("", "", 100, 0.1).score)
    peers = [entry("random", f"{seed} keep 75%", 110, kl) for seed, kl in enumerate((0.2, 0.9, 0.4))]
    found = standings.best_of(fake_reference(), peers, "random", mine, [0, 1])  # type: ignore[arg-type]
    assert found is not None and found.score.kl[0] == 0.4


@pytest.mark.parametrize(("shift", "mark"), [(-0.02, standings.WIN), (0.02, standings.LOSS), (-0.0004, standings.TIE)])
def test_a_difference_within_two_standard_errors_of_the_pairs_is_a_tie(shift: float, mark: str) -> None:
    noise = np.array([0.001, -0.001, 0.0, 0.001, -0.001, 0.0])
    peer = measure.Score(size=1, kl=(0.1, 0.5, 0.3, 0.2, 0.7, 0.9), same=(), nll=(), p99=())
    mine = measure.Score(size=1, kl=tuple(np.array(peer.kl) + shift + noise), same=(), nll=(), p99=())
    found, difference, error = standings.verdict(fake_reference(), mine, peer, [0, 1], 1e-6)  # type: ignore[arg-type]
    assert found == mark and difference == pytest.approx(shift)
    assert error == pytest.approx(np.sqrt(2 * 1e-6 / 3) / 2)  # each domain: variance 1e-6 over three windows


def test_a_window_is_compared_as_the_definitions_say() -> None:
    """softmax of 2, 1, 0, -1 against the same logits with 0.05, -0.1, 0.02, 0.08 added: KL 0.001977354."""
    original = np.tile(np.array([[2.0, 1, 0, -1]], np.float32), (2, 1))
    other = original + np.array([0.05, -0.1, 0.02, 0.08], np.float32)
    kl, same, nll = measure.compare_window(original, other, np.array([0, 1]))
    assert kl == pytest.approx([0.001977354] * 2, abs=1e-7) and same.tolist() == [1, 1]
    assert nll == pytest.approx([np.log(np.exp(other[0] - other[0, 1]).sum())], rel=1e-6)
