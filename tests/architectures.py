"""A tiny random GGUF of every architecture with experts that llama.cpp runs, made by llama.cpp itself from metadata alone.

    python tests/architectures.py FOLDER ARCHITECTURE ...

llama.cpp makes a model from metadata, with every tensor that the architecture can have, and saves it.  The metadata follow llama.cpp's own
test of its architectures (tests/test-llama-archs.cpp).  It stops the whole process on what it does not like, so it runs in a process of its
own.
"""

from __future__ import annotations

import ctypes
import subprocess
import sys
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import gguf
import numpy as np

N_EXPERTS, TOP_K, N_VOCAB, N_CTX = 8, 3, 384, 256
LATENT = ("deepseek2", "deepseek32", "glm-dsa", "dots3note", "kimi-linear", "bailingmoe3", "kimi-k3", "glm5-next", "mistral4", "hy_v4")
HYBRID = ("jamba", "nemotron_h_moe", "granitehybrid", "lfm2moe", "kimi-linear", "bailingmoe3", "kimi-k3", "glm5-next")
LISTED_WINDOWS = ("cohere2moe", "mimo2", "step35", "granite_swa", "dots3note", "maple")
ARCHITECTURES = (
    *("afmoe", "arctic", "bailingmoe", "bailingmoe2", "bailingmoe3", "cohere2moe", "dbrx", "deepseek", "deepseek2", "deepseek32"),
    *("deepseek4", "dots1", "dots3note", "ernie4_5-moe", "exaone-moe", "glm-dsa", "glm4moe", "glm5-next", "gpt-oss", "granite"),
    *("granitehybrid", "granitemoe", "granite_swa", "grok", "grovemoe", "hunyuan-moe", "hy_v3", "hy_v4", "jamba", "kimi-k3"),
    *("kimi-linear", "laguna", "lfm2moe", "llada-moe", "llama", "llama4", "maple", "mellum", "mimo2", "minicpm", "minimax-01"),
    *("minimax-m2", "minimax-m3", "mistral3", "mistral4", "nemotron_h_moe", "olmoe", "phimoe", "qwen2moe", "qwen35moe", "qwen3moe"),
    *("qwen3next", "qwen3vlmoe", "qwen4exp", "rnd1", "smallthinker"),
)
# Biases, latent attention, no gates, fused matrices with recurrent layers, no causality, several live values, gates in the inputs.
QUICK = ("gpt-oss", "deepseek2", "nemotron_h_moe", "qwen3next", "llada-moe", "kimi-k3", "llama4", "grovemoe", "granitehybrid", "hy_v3")


def metadata(arch: str) -> dict[str, Any]:
    """Keys and values of an architecture's tiny model; keys that it does not read do no harm."""
    hidden, heads, inner, layers = _sizes(arch)
    head = hidden // heads
    each = [0 if layer == 1 else heads for layer in range(layers)] if arch in HYBRID else heads
    own: dict[str, Any] = {
        "vocab_size": N_VOCAB,
        "context_length": N_CTX,
        "embedding_length": hidden,
        "block_count": layers,
        "leading_dense_block_count": 1,
        "feed_forward_length": [0 if layer <= 1 else inner for layer in range(layers)] if arch == "nemotron_h_moe" else inner,
        "use_parallel_residual": False,
        "logit_scale": 1.0,
        "full_attention_interval": 2,
        "attention.head_count": heads if arch == "glm5-next" else each,
        "attention.head_count_kv": {"deepseek4": 1, "afmoe": 2}.get(arch, each),
        "attention.max_alibi_bias": 8.0,
        "attention.clamp_kqv": 1.0,
        "attention.layer_norm_epsilon": 1e-5,
        "attention.layer_norm_rms_epsilon": 1e-5,
        "attention.q_lora_rank": 64 if arch == "deepseek4" else 512,
        "attention.kv_lora_rank": 512,
        "attention.sliding_window": N_CTX // 8,
        "attention.sliding_window_pattern": [layer % 2 for layer in range(layers)] if arch in LISTED_WINDOWS else 2,
        "attention.indexer.head_count": heads if arch == "minimax-m3" else 64,
        "attention.indexer.key_length": head if arch == "qwen4exp" else 128,
        "attention.indexer.top_k": 131072,
        "attention.indexer.block_size": 4,
        "attention.indexer.kpool": 4,
        "attention.indexer.kpool_select_tail": True,
        "attention.indexer.local_blocks": 1,
        "rope.dimension_sections": [8, 12, 12, 0] if arch == "bailingmoe3" else [head // 4] * 4,
        "expert_feed_forward_length": inner,
        "expert_shared_feed_forward_length": inner // 2,
        "expert_latent_length": inner,
        "interleave_moe_layer_step": 2,
        "expert_count": N_EXPERTS,
        "expert_used_count": TOP_K,
        "expert_shared_count": 1,
        "expert_gating_func": 4 if arch == "deepseek4" else 2,
        "expert_group_scale": 1.0,
        "experts_per_group": 1,
        **_recurrent(arch, hidden, heads),
        "residual_scale": 3.5565588200778455,
        "attn_res.block_size": 12,
        "activation.situ_beta": 4.0,
        "activation.situ_linear_beta": 25.0,
    }
    own |= _latent(arch, layers) if arch in LATENT else {}
    own |= _special(arch, hidden, head, layers)
    return {**{f"{arch}.{key}": value for key, value in own.items()}, **_vocabulary()}


def _vocabulary() -> dict[str, Any]:
    """A tokenizer in the manner of SentencePiece: control tokens, every byte, and pairs of letters."""
    control, unknown, byte, normal = 3, 2, 6, 1
    pieces = [("<unk>", unknown), ("<s>", control), ("</s>", control), *((f"<0x{n:02X}>", byte) for n in range(256))]
    letters = "▁etaoinshrdlu"
    pieces += [(letter, normal) for letter in letters] + [(a + b, normal) for a in letters for b in letters if a != b]
    pieces = pieces[:N_VOCAB]
    return {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": [text for text, _ in pieces],
        "tokenizer.ggml.scores": [-float(i) for i in range(N_VOCAB)],
        "tokenizer.ggml.token_type": [kind for _, kind in pieces],
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
    }


def _sizes(arch: str) -> tuple[int, int, int, int]:
    """Hidden size, heads, neurons and layers."""
    size = {"embd": 256, "head": 2, "ff": 384, "layer": 2}
    size |= {"llama4": {"layer": 4}, "nemotron_h_moe": {"layer": 3}, "laguna": {"embd": 160}, "afmoe": {"head": 4}}.get(arch, {})
    size |= {"deepseek4": {"embd": 512, "head": 8, "ff": 1024, "layer": 4}}.get(arch, {})
    size |= {"embd": 128, "head": 1, "ff": 192} if arch in LATENT else {}
    return size["embd"], size["head"], size["ff"], size["layer"]


def _recurrent(arch: str, hidden: int, heads: int) -> dict[str, Any]:
    """State spaces, delta rules and short convolutions."""
    return {
        "ssm.inner_size": 256 if arch in ("qwen3next", "qwen35moe", "qwen4exp") else 2 * hidden,
        "ssm.conv_kernel": 4,
        "ssm.state_size": 128,
        "ssm.time_step_rank": heads,
        "ssm.group_count": 2,
        "kda.head_dim": 128,
        "kda.safe_gate": True,
        "kda.gate_lower_bound": -5.0,
        "shortconv.l_cache": 3,
    }


def _latent(arch: str, layers: int) -> dict[str, Any]:
    """Latent attention; of GLM-5-next it has no rotary part."""
    rotary = 0 if arch == "glm5-next" else 64
    lengths = {"key_length": 512 + rotary, "value_length": 512, "key_length_mla": 192, "value_length_mla": 128}
    found: dict[str, Any] = {f"attention.{key}": value for key, value in lengths.items()} | {"rope.dimension_count": rotary}
    if arch == "dots3note":
        found |= {f"attention.{key}_swa": value for key, value in {**lengths, "kv_lora_rank": 512}.items()}
        found |= {"rope.freq_base_swa": 10000.0}
    if arch in ("dots3note", "hy_v4"):
        found["attention.indexer.types"] = [0 if layer % 2 else 1 for layer in range(layers)]
    return found


def _special(arch: str, hidden: int, head: int, layers: int) -> dict[str, Any]:
    """What one or two architectures alone have."""
    weights = {"expert_weights_scale": 1.0, "expert_weights_norm": True}
    streams = {"hyper_connection.count": 4, "hyper_connection.epsilon": 1e-6}
    sinkhorn = {**streams, "hyper_connection.sinkhorn_iterations": 2}
    if arch in ("qwen4exp", "glm5-next"):
        grams, per = 3, 2
        n = (grams - 1) * per
        return {
            **sinkhorn,
            "hyper_connection.low_rank": 8,
            "attention.compress_ratios": [4] * layers,
            "ple.layers": [0],
            "ple.ngram_size": grams,
            "ple.heads_per_ngram": per,
            "ple.conv_kernel": 4,
            "ple.eos_token_id": 0,
            "embedding_length_per_layer_input": hidden // n,
            "ple.layer_multipliers": np.array([1, 3, 5], np.uint64),
            "ple.head_offsets": np.arange(n, dtype=np.uint64) * N_VOCAB,
            "ple.head_vocab_sizes": np.full(n, N_VOCAB, np.uint64),
        }
    return {
        "deepseek4": {
            **sinkhorn,
            **weights,
            "attention.key_length": head,
            "attention.value_length": head,
            "rope.dimension_count": head // 2,
            "attention.output_group_count": 8,
            "attention.output_lora_rank": 32,
            "attention.compress_ratios": [0, 0, 4, 128],
            "attention.compress_rope_freq_base": 160000.0,
            "hash_layer_count": 0,
            "swiglu_clamp_exp": 10.0,
        },
        "hy_v4": {**streams, **weights, "hyper_connection.magnitude": 2.0, "swiglu_clamp_exp": 10.0},
        "minimax-m3": {"rope.dimension_count": 64},
        "maple": {"swiglu_clamp_exp": 7.0},
        "bailingmoe3": {"swiglu_clamp_exp": [0.0, 4.0], "swiglu_clamp_shexp": [0.0, 5.0]},
    }.get(arch, {})


def make_all(folder: Path, architectures: Sequence[str] = ARCHITECTURES) -> dict[str, Path]:
    """The files by architecture; one that llama.cpp stops at is left out."""
    folder.mkdir(parents=True, exist_ok=True)
    left = list(architectures)
    while left:
        subprocess.run([sys.executable, __file__, str(folder), *left], capture_output=True, check=False)
        done = [arch for arch in left if (folder / f"{arch}.gguf").exists()]
        stopped = next((arch for arch in left if arch not in done), None)
        left = left[left.index(stopped) + 1 :] if stopped else []
    return {arch: folder / f"{arch}.gguf" for arch in architectures if (folder / f"{arch}.gguf").exists()}


def _write_metadata(arch: str, path: Path) -> Path:
    kinds = {
        bool: gguf.GGUFValueType.BOOL,
        int: gguf.GGUFValueType.UINT32,
        float: gguf.GGUFValueType.FLOAT32,
        str: gguf.GGUFValueType.STRING,
    }
    writer = gguf.GGUFWriter(path, arch)
    for key, value in metadata(arch).items():
        if isinstance(value, np.ndarray):
            writer.add_key_value(key, value.tolist(), gguf.GGUFValueType.ARRAY, sub_type=gguf.GGUFValueType.UINT64)
        elif isinstance(value, list):
            sub_type = gguf.GGUFValueType.INT32 if key.endswith("token_type") else kinds[type(value[0])]
            writer.add_key_value(key, value, gguf.GGUFValueType.ARRAY, sub_type=sub_type)
        else:
            writer.add_key_value(key, value, kinds[type(value)])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    return path


def add_predicting_block(source: Path, path: Path) -> Path:
    """The same model with one more block, which predicts a further token and which llama.cpp does not run: a copy of the last."""
    reader = gguf.GGUFReader(source)
    arch = reader.fields["general.architecture"].contents()
    n, hidden = (int(reader.fields[f"{arch}.{key}"].contents()) for key in ("block_count", "embedding_length"))
    tensors = {tensor.name: tensor.data for tensor in reader.tensors}
    last = {name: data for name, data in tensors.items() if name.startswith(f"blk.{n - 1}.") and "scale" not in name}
    more = {name.replace(f"blk.{n - 1}.", f"blk.{n}."): data for name, data in last.items()}
    for name, shape in {"eh_proj": (hidden, 2 * hidden), "enorm": (hidden,), "hnorm": (hidden,)}.items():
        more[f"blk.{n}.nextn.{name}.weight"] = np.ones(shape, np.float32)
    return change(source, path, {"block_count": n + 1, "nextn_predict_layers": 1}, more)


def change(source: Path, path: Path, values: dict[str, Any], more: dict[str, Any] | None = None) -> Path:
    """The same file with other values of keys, those of the architecture by their short names, and more tensors."""
    reader = gguf.GGUFReader(source)
    arch = reader.fields["general.architecture"].contents()
    writer = gguf.GGUFWriter(path, arch)
    for key, field in reader.fields.items():
        value = values.get(key.removeprefix(f"{arch}."), field.contents())
        if not key.startswith("GGUF.") and key != "general.architecture" and field.contents() != []:
            writer.add_key_value(key, value, field.types[0], sub_type=field.types[-1] if isinstance(value, list) else None)
    for name, data in ({tensor.name: tensor.data for tensor in reader.tensors} | (more or {})).items():
        writer.add_tensor(name, data)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def _values(name: str, n: int) -> np.ndarray[Any, np.dtype[np.float32]]:
    """Random values that depend on the name: norms and scales near 1, decays below 0, matrices that keep the stream's size."""
    drawn = np.random.default_rng(zlib.crc32(name.encode())).standard_normal(n, np.float32)
    if "norm" in name or name.endswith("scale"):
        return 1 + 0.1 * drawn
    return -np.abs(0.1 * drawn) if "ssm_a" in name else 0.1 * drawn


class _InitParams(ctypes.Structure):
    _fields_ = [("no_alloc", ctypes.c_bool), ("ctx", ctypes.c_void_p)]


def main(folder: Path, architectures: Sequence[str]) -> None:
    from edgemoe.stream.engine.layout import loaded_library
    from edgemoe.stream.engine.runtime import load_bindings

    llama, libraries = load_bindings()
    base = ctypes.CDLL(str(loaded_library(libraries)))
    base.gguf_init_from_file.restype, base.gguf_init_from_file.argtypes = ctypes.c_void_p, [ctypes.c_char_p, _InitParams]
    base.ggml_get_name.restype, base.ggml_get_name.argtypes = ctypes.c_char_p, [ctypes.c_void_p]
    base.ggml_nelements.restype, base.ggml_nelements.argtypes = ctypes.c_int64, [ctypes.c_void_p]
    base.ggml_backend_tensor_set.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t, ctypes.c_size_t]

    def fill(tensor: int, _: Any) -> None:
        values = _values(base.ggml_get_name(tensor).decode(), base.ggml_nelements(tensor))
        base.ggml_backend_tensor_set(tensor, values.ctypes.data, 0, values.nbytes)

    for arch in architectures:
        metadata_file = _write_metadata(arch, folder / f"{arch}.metadata")
        context = base.gguf_init_from_file(str(metadata_file).encode(), _InitParams(True, None))
        on_tensor = llama.llama_model_set_tensor_data_t(fill)
        params = llama.llama_model_default_params()
        params.n_gpu_layers = 0
        model = llama.llama_model_init_from_user(context, on_tensor, None, params)
        llama.llama_model_save_to_file(model, str(folder / f"{arch}.part").encode())
        (folder / f"{arch}.part").rename(folder / f"{arch}.gguf")
        metadata_file.unlink()
        llama.llama_model_free(model)


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
