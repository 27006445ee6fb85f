"""What llama.cpp reserves and holds is what we say, for every kind of attention; the oracle is llama.cpp itself, in child processes."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from oracles import ask_llama_cpp, ask_nodes, child_settings, hear_llama_cpp, predict_peak, write_hollow
from shapes import Tiny, gqa, granite_hybrid, mla, short_convolution, sliding, write_sparse
from tiny import FAMILIES, make_checkpoint

from edgemoe.base.errors import EdgemoeError, UsageError, VerifyError
from edgemoe.ir.memory import Settings
from edgemoe.model.inspect import inspect_model
from edgemoe.targets.gguf.compute_graph import compute_bytes
from edgemoe.targets.gguf.kv_cache import kv_bytes, output_bytes, state_bytes
from edgemoe.targets.gguf.memory import PER_CELL, PER_NODE, PER_TOKEN, RUNTIME, memory_parts
from edgemoe.targets.gguf.run import run

MIB = 2**20
HALF = 0.0051 * MIB  # llama.cpp says sizes to 0.01 MiB

MODELS: dict[str, Callable[[], Tiny]] = {
    "qwen3moe": gqa,
    "qwen3moe wide heads": lambda: gqa(heads=16, kv_heads=4, dim=128, top_k=4),
    "qwen3moe wide experts": lambda: gqa(n_experts=32, top_k=8, size=768, layers=2),
    "qwen3moe one layer": lambda: gqa(layers=1, top_k=1, vocab=32768),
    "llama": lambda: gqa("llama", kv_heads=8),
    "olmoe": lambda: gqa("olmoe", kv_heads=8, hidden=768, heads=8, dim=96, top_k=3),
    "deepseek2": mla,
    "deepseek2 many heads": lambda: mla(heads=16, rank=512, nope=128, value=128, q_rank=384),
    "gpt-oss": sliding,
    "gpt-oss wide window": lambda: sliding(window=1024, heads=16, kv_heads=4),
    "granitehybrid": granite_hybrid,
    "lfm2moe": short_convolution,
}
RECURRENT = ("granitehybrid", "lfm2moe")
SETTINGS = {
    "default": Settings(context=4096),
    "odd context": Settings(context=1300),
    "short": Settings(context=200),
    "no flash": Settings(context=2048, flash=False),
    "F32": Settings(context=4096, kv_k="F32", kv_v="F32"),
    "BF16, no flash": Settings(context=2048, kv_k="BF16", kv_v="BF16", flash=False),
    "Q8_0": Settings(context=16384, kv_k="Q8_0", kv_v="Q8_0"),
    "Q4_0": Settings(context=16384, kv_k="Q4_0", kv_v="Q4_0"),
    "small batch": Settings(context=4096, ubatch=64),
    "two sequences": Settings(context=4096, sequences=2),
    "true windows": Settings(context=4096, swa_full=False, ubatch=128),
    "true windows of two": Settings(context=8192, swa_full=False, sequences=2, flash=False),
}


@pytest.fixture(scope="module")
def said(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, bool], dict[str, dict[str, int]]]:
    """What llama.cpp says about a model under all settings."""
    folder = tmp_path_factory.mktemp("sparse")

    @functools.cache
    def ask(model: str, one_output: bool) -> dict[str, dict[str, int]]:
        path = write_sparse(MODELS[model](), folder / f"{model}.gguf")
        chosen = {name: each for name, each in SETTINGS.items() if not one_output or each.sequences == 1}
        return dict(zip(chosen, ask_llama_cpp(path, list(chosen.values()), outputs=int(one_output)), strict=True))

    return ask


@pytest.mark.parametrize("name", SETTINGS)
@pytest.mark.parametrize("model", MODELS)
def test_caches_states_and_outputs_are_as_large_as_llama_cpp_says(said: Any, model: str, name: str) -> None:
    layout, each, real = MODELS[model]().model, SETTINGS[name], said(model, False)[name]
    assert abs(kv_bytes(layout, each) - real["kv"]) < (1 if kv_bytes(layout, each) % (MIB // 4) == 0 else 2 * HALF)
    assert abs(state_bytes(layout, each) - real["state"]) < HALF
    assert abs(output_bytes(layout, each) - real["output"]) < HALF


@pytest.mark.parametrize("name", SETTINGS)
@pytest.mark.parametrize("model", [m for m in MODELS if m not in RECURRENT])
def test_the_compute_buffer_is_as_large_as_llama_cpp_says(said: Any, model: str, name: str) -> None:
    layout, each = MODELS[model]().model, SETTINGS[name]
    assert abs(compute_bytes(layout, each) - said(model, False)[name]["compute"]) < HALF
    if each.sequences == 1:
        assert abs(compute_bytes(layout, each, outputs=1) - said(model, True)[name]["compute"]) < HALF


@pytest.mark.parametrize("model", RECURRENT)
def test_the_compute_buffer_of_recurrent_layers_is_only_asked_for(said: Any, model: str) -> None:
    assert said(model, False)["default"]["compute"] > MIB
    with pytest.raises(UsageError, match="recurrent") as caught:
        compute_bytes(MODELS[model]().model, SETTINGS["default"])
    assert caught.value.hint


@pytest.mark.parametrize("model", ["qwen3moe", "deepseek2", "gpt-oss", "granitehybrid"])
@pytest.mark.parametrize("mmap", [False, True])
def test_what_is_asked_for_is_what_a_real_process_reserves(tmp_path: Path, model: str, mmap: bool) -> None:
    path = write_sparse(MODELS[model](), tmp_path / "real.gguf")
    chosen = [SETTINGS[name] for name in ("odd context", "no flash", "two sequences", "true windows")]
    real = hear_llama_cpp(path, [{**child_settings(each), "mmap": mmap} for each in chosen], alloc=True)
    for lines, answer in zip(real, ask_llama_cpp(path, chosen), strict=True):
        sizes = [line.split("buffer size =")[1].split()[0] for line in lines if "KV buffer size" in line or "compute buffer size" in line]
        assert sum(map(float, sizes)) == pytest.approx((answer["kv"] + answer["compute"]) / MIB, abs=0.011)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_checkpoint_needs_what_the_file_made_from_it_needs(tmp_path: Path, family: str) -> None:
    model = inspect_model(make_checkpoint(tmp_path / family, family, hidden=512, expert_size=384, top_k=3))
    chosen = [SETTINGS[name] for name in ("default", "no flash", "Q8_0")]  # sizes that two decimals say exactly
    for count in (model.n_experts, 5):
        path = write_hollow(model, count, tmp_path / "hollow.gguf")
        kept = dataclasses.replace(model, n_experts=count)
        for each, real in zip(chosen, ask_llama_cpp(path, chosen), strict=True):
            assert kv_bytes(kept, each) == real["kv"]
            assert abs(compute_bytes(kept, each) - real["compute"]) < HALF
            assert compute_bytes(model, each) >= compute_bytes(kept, each)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_process_has_room_for_as_many_nodes_as_llama_cpp_says(tmp_path: Path, family: str) -> None:
    model = inspect_model(make_checkpoint(tmp_path / family, family, hidden=64, expert_size=64, n_experts=2, top_k=1, layers=16))
    nodes = ask_nodes(write_hollow(model, 2, tmp_path / "hollow.gguf"))
    assert nodes > 1024  # the least, which every file of few layers has
    assert memory_parts(model, 512)["runtime"] == RUNTIME + PER_TOKEN * model.vocab_size + PER_CELL * 512 + PER_NODE * nodes


@pytest.mark.parametrize(
    ("tiny", "each"),
    [
        (mla, Settings(context=512, kv_k="Q8_0")),
        (gqa, Settings(context=512, kv_v="Q8_0", flash=False)),
        (lambda: gqa(dim=48), Settings(context=512, kv_k="Q8_0")),
        (lambda: gqa(dim=48), Settings(context=512, kv_v="Q4_0")),
    ],
)
def test_settings_that_llama_cpp_refuses_are_refused_with_the_reason(tmp_path: Path, tiny: Callable[[], Tiny], each: Settings) -> None:
    with pytest.raises(UsageError) as caught:
        kv_bytes(tiny().model, each)
    assert caught.value.hint
    with pytest.raises(VerifyError):
        ask_llama_cpp(write_sparse(tiny(), tmp_path / "refused.gguf"), [each])


def test_a_type_that_no_cache_has_is_refused() -> None:
    with pytest.raises(EdgemoeError, match="Q4_K"):
        kv_bytes(gqa().model, Settings(context=512, kv_k="Q4_K"))


MATRICES = ("attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate_exps", "ffn_up_exps", "ffn_down_exps", "token_embd", "output")
SMALL = {"hidden": 512, "heads": 8, "kv_heads": 4, "dim": 64, "n_experts": 8, "size": 512, "layers": 3}
PROCESSES = {
    "F16": ("F16", Settings(context=1024)),
    "repacked": ("Q4_K", Settings(context=1024)),
    "repacked from a mapped file": ("Q4_K", Settings(context=1024, mmap=True)),
    "mapped, not repacked": ("Q4_K", Settings(context=1024, mmap=True, repack=False)),
    "no flash attention": ("Q8_0", Settings(context=1536, flash=False)),
    "quantized cache": ("Q8_0", Settings(context=2048, kv_k="Q8_0", kv_v="Q8_0")),
}


@pytest.mark.parametrize("name", PROCESSES)
def test_a_process_that_fills_its_context_holds_no_more_than_predicted_and_little_less(tmp_path: Path, name: str) -> None:
    kind, each = PROCESSES[name]
    tiny = gqa(**SMALL, types=dict.fromkeys(MATRICES, kind))
    path = write_sparse(tiny, tmp_path / "process.gguf")
    job = {"context": each.context, "tokens": list(range(1, 200)), "prompts": [], "generate": 0}
    measured = run(path, {**job, "repack": each.repack, "settings": child_settings(each)})["peak"]
    predicted = predict_peak(tiny.model, each, path.stat().st_size, tiny.units())
    assert measured <= predicted <= measured + 9 * MIB


def test_asking_for_every_logit_costs_what_the_vocabulary_says() -> None:
    layout = gqa(vocab=65536).model
    one, every = (memory_parts(layout, 1024, Settings(context=1024, every_logit=flag)) for flag in (False, True))
    assert every["output"] == 512 * one["output"]
    assert every["compute"] - one["compute"] > 0.8 * every["output"]  # logits lie where the experts' results lay
