"""Small random checkpoints of every family, their oracles with experts cut away, and plans and statistics that ask for nothing special."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import load_file, save_file
from torch import nn

from edgemoe.base.storage import array_file, save_arrays
from edgemoe.ir import Domain, Model, Plan, Stats, Unit
from edgemoe.model.blocks import Spec
from edgemoe.model.config import Config
from edgemoe.model.families import find_family
from edgemoe.targets import find_target

EXAMPLES = Path(__file__).parents[1] / "examples"
WHOLE_VOCAB = 4096  # of the bundled model
VOCAB_SIZE = 1024  # of random checkpoints, because probes and heads take most of a small build's time
EXPERT_COUNTS = ("num_experts", "num_local_experts", "n_routed_experts")  # what configs call it
STACK = {"gate": "gate_up_proj", "up": "gate_up_proj", "down": "down_proj"}


# -------------------------------------------------------------------------------------------------------------- families
@dataclass(frozen=True, kw_only=True)
class Sizes:
    """The shape of a checkpoint."""

    n_experts: int
    top_k: int
    hidden: int
    expert_size: int
    layers: int
    tied: bool
    vocab: int


# Everything that is parametrised by family tests each of these: model_type -> what its config has beside what all have (_config).
FAMILIES: dict[str, Callable[[Sizes], dict[str, Any]]] = {
    "qwen3_moe": lambda sizes: {
        "intermediate_size": 3 * sizes.expert_size,
        "moe_intermediate_size": sizes.expert_size,
        "head_dim": 64,  # heads need not fill the width
        "num_experts": sizes.n_experts,
        "norm_topk_prob": True,
    },
    "olmoe": lambda sizes: {
        "num_key_value_heads": 4,
        "intermediate_size": sizes.expert_size,
        "num_experts": sizes.n_experts,
        "norm_topk_prob": False,
    },
    "mixtral": lambda sizes: {"intermediate_size": sizes.expert_size, "num_local_experts": sizes.n_experts},
    "qwen2_moe": lambda sizes: {
        "intermediate_size": 3 * sizes.expert_size,
        "moe_intermediate_size": sizes.expert_size,
        "shared_expert_intermediate_size": 2 * sizes.expert_size,
        "num_experts": sizes.n_experts,
        "norm_topk_prob": False,
    },
    "glm4_moe": lambda sizes: {
        "intermediate_size": 3 * sizes.expert_size,
        "moe_intermediate_size": sizes.expert_size,
        "n_routed_experts": sizes.n_experts,
        "n_shared_experts": 3,
        "n_group": 1,
        "topk_group": 1,
        "num_hidden_layers": 1 + sizes.layers,  # the first has no experts
        "first_k_dense_replace": 1,
        "routed_scaling_factor": 1.5,
        "norm_topk_prob": True,
        "use_qk_norm": True,
        "attention_bias": True,
        "head_dim": 64,
        "partial_rotary_factor": 0.5,
        "rope_parameters": {"rope_type": "default", "rope_theta": 50000.0, "partial_rotary_factor": 0.5},
    },
    "dots1": lambda sizes: {
        "num_key_value_heads": 4,
        "intermediate_size": 3 * sizes.expert_size,
        "moe_intermediate_size": sizes.expert_size,
        "n_routed_experts": sizes.n_experts,
        "n_shared_experts": 3,
        "num_hidden_layers": 1 + sizes.layers,  # the first has no experts
        "first_k_dense_replace": 1,
        "routed_scaling_factor": 2.5,
        "norm_topk_prob": True,
        "sliding_window": None,
    },
}


# ----------------------------------------------------------------------------------------------------------- checkpoints
def make_checkpoint(
    folder: Path,
    family: str,
    *,
    seed: int = 0,
    stacked: bool = False,
    sharded: bool = False,
    tied: bool = False,
    n_experts: int = 8,
    top_k: int = 2,
    hidden: int = 256,
    expert_size: int = 256,
    layers: int = 2,
    vocab: int = VOCAB_SIZE,
) -> Path:
    """A random checkpoint in bf16 with the tokenizer of the bundled model: logits of std about 1, routers that make up their minds.

    Args:
        folder: made; the checkpoint goes right into it.
        family: one of FAMILIES.
        seed: of the weights, which do not depend on `stacked` and `sharded`.
        stacked: experts as `mlp.experts.gate_up_proj` [E, 2M, H] and `down_proj` [E, H, M].
        sharded: several files with an index.
        tied: no output matrix of its own.
        n_experts, top_k, hidden, expert_size, layers, vocab: the shape.
    """
    from transformers import AutoModelForCausalLM

    sizes = Sizes(n_experts=n_experts, top_k=top_k, hidden=hidden, expert_size=expert_size, layers=layers, tied=tied, vocab=vocab)
    module = AutoModelForCausalLM.from_config(_config(family, sizes), dtype=torch.float32)
    _enliven(module, seed)
    module.to(torch.bfloat16).save_pretrained(folder, max_shard_size="2MB" if sharded else "1GB")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(EXAMPLES / "tiny-moe" / name, folder)
    if vocab < WHOLE_VOCAB:
        (folder / "tokenizer.json").write_text(json.dumps(small_tokenizer(vocab), ensure_ascii=False), encoding="utf-8")
    if stacked:
        _stack(folder, family, n_experts)
    return folder


def small_tokenizer(vocab: int = VOCAB_SIZE) -> dict[str, Any]:
    """The bundled model's tokenizer as training would have given it with fewer tokens: the content of tokenizer.json."""
    tokenizer: dict[str, Any] = json.loads((EXAMPLES / "tiny-moe" / "tokenizer.json").read_text(encoding="utf-8"))
    bpe = tokenizer["model"]
    bpe["vocab"] = {token: number for token, number in bpe["vocab"].items() if number < vocab}
    bpe["merges"] = [merge for merge in bpe["merges"] if "".join(merge) in bpe["vocab"]]
    return tokenizer


def _config(family: str, sizes: Sizes) -> Any:
    from transformers import AutoConfig

    common: dict[str, Any] = {
        "vocab_size": sizes.vocab,
        "hidden_size": sizes.hidden,
        "num_hidden_layers": sizes.layers,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "num_experts_per_tok": sizes.top_k,
        "max_position_embeddings": 1024,
        "rope_parameters": {"rope_type": "default", "rope_theta": 50000.0},  # no family's default
        "rms_norm_eps": 3e-5,
        "tie_word_embeddings": sizes.tied,
        "bos_token_id": 0,
        "eos_token_id": 0,
        "pad_token_id": None,
    }
    return AutoConfig.for_model(family, **common | FAMILIES[family](sizes))


def _enliven(module: nn.Module, seed: int) -> None:
    """Weights with which every part matters: matrices keep the size of what they are given, norms differ by channel."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        biases = [(name, buffer) for name, buffer in module.named_buffers() if name.endswith("e_score_correction_bias")]
        for name, weight in sorted([*module.named_parameters(), *biases]):
            values = torch.randn(weight.shape, generator=generator)
            if weight.dim() == 1:
                weight.copy_(0.2 * values if name.endswith("bias") else 1 + 0.2 * values)
            else:
                gain = 3.0 if name.endswith("mlp.gate.weight") else 1.0
                weight.copy_(values * gain / math.sqrt(weight.shape[-1]))


def _specs(config: Mapping[str, Any], layer: int) -> dict[str, Spec]:
    """The tensors of one layer by role."""
    return {spec.role: spec for block in find_family(config["model_type"]).layer(Config(config), layer) for spec in block.specs}


def _stack(folder: Path, family: str, n_experts: int) -> None:
    """Rewrite the experts in the stacked layout, which is transformers' own in memory, names included."""
    config, file = json.loads((folder / "config.json").read_text()), folder / "model.safetensors"
    weights = load_file(file)
    for layer in range(config["num_hidden_layers"]):
        prefix, specs = f"model.layers.{layer}.", _specs(config, layer)
        if "ffn_gate_inp" not in specs:
            continue
        names = {p: prefix + specs[f"ffn_{p}_exps"].names[0] for p in STACK}
        take = {p: [weights.pop(name.format(expert=e)) for e in range(n_experts)] for p, name in names.items()}
        both = [torch.cat(pair) for pair in zip(take["gate"], take["up"], strict=True)]
        weights[f"{prefix}mlp.experts.gate_up_proj"] = torch.stack(both)
        weights[f"{prefix}mlp.experts.down_proj"] = torch.stack(take["down"])
        weights[f"{prefix}mlp.gate.weight"] = weights.pop(prefix + specs["ffn_gate_inp"].names[0])
    save_file(weights, file, metadata={"format": "pt"})


def slice_experts(source: Path, kept: Sequence[Sequence[int]], out: Path) -> Path:
    """The checkpoint without the experts that are not in `kept` [MoE layers][count]: what dropping them means, for transformers to run."""
    config = json.loads((source / "config.json").read_text())
    weights = load_file(source / "model.safetensors")
    layers = [layer for layer in range(config["num_hidden_layers"]) if "ffn_gate_inp" in _specs(config, layer)]
    for layer, experts in zip(layers, kept, strict=True):
        prefix, specs = f"model.layers.{layer}.", _specs(config, layer)
        router = prefix + specs["ffn_gate_inp"].names[0]
        total = len(weights[router])
        for role in ("ffn_gate_inp", "exp_probs_b.bias"):
            if role in specs:
                name = prefix + specs[role].names[0]
                weights[name] = weights[name][list(experts)].clone()
        for projection in STACK:
            name = prefix + specs[f"ffn_{projection}_exps"].names[0]
            old = [weights.pop(name.format(expert=e)) for e in range(total)]
            weights |= {name.format(expert=new): old[e] for new, e in enumerate(experts)}
    config |= {key: len(kept[0]) for key in EXPERT_COUNTS if key in config}
    out.mkdir()
    save_file(weights, out / "model.safetensors", metadata={"format": "pt"})
    (out / "config.json").write_text(json.dumps(config))
    for path in source.glob("tokenizer*"):
        shutil.copy(path, out)
    return out


def edit_config(folder: Path, **changes: Any) -> Path:
    """Change fields of config.json; None removes one."""
    path = folder / "config.json"
    config = {**json.loads(path.read_text()), **changes}
    path.write_text(json.dumps({key: value for key, value in config.items() if value is not None}))
    return folder


# -------------------------------------------------------------------------------------------------------- plan, statistics
def flat_plan(
    model: Model,
    fmt: str | Mapping[str, str] | Callable[[Unit], str] = "F32",
    kept: Sequence[Sequence[int]] | None = None,
    target: str = "gguf",
) -> Plan:
    """A plan that nobody solved: every unit in one format, or in that which a dict gives its name, or a function the unit."""
    to, sets = find_target(target), tuple(map(tuple, kept)) if kept else (tuple(range(model.n_experts)),) * len(model.moe_layers)
    kept_of = dict(zip(model.moe_layers, sets, strict=True))
    count, units = len(sets[0]), [u for u in to.list_units(model) if u.expert < 0 or u.expert in kept_of[u.layer]]
    formats = {u.name: fmt if isinstance(fmt, str) else fmt(u) if callable(fmt) else fmt[u.name] for u in units}
    sizes = {u.name: to.unit_size(model, u, formats[u.name], count) for u in units}
    return Plan(
        model=model.fingerprint,
        model_name=model.name,
        costs="c" * 64,
        target=target,
        budget=2**30,
        context=512,
        solver="highs",
        objective="mean",
        n_experts=model.n_experts,
        top_k=model.top_k,
        kept=sets,
        units=tuple(units),
        formats=formats,
        sizes=sizes,
        file_size=to.fixed_sizes(model, [count])[0] + sum(sizes.values()),
        memory={"peak": 2**30},
        q=0.0,
        drop_q=0.0,
        predicted_kl=0.125,
        bound=0.0,
        gap=0.0,
        proven=True,
        price=0.0,
        counts=(),
        vram=(),
        domain_q={},
        rules=(),
        repair=False,
        origin="",
    )


def flat_stats(model: Model, folder: Path, *, seed: int | None = None) -> Stats:
    """Statistics that are enough to write an artifact: uniform importance, or, with a seed, one that differs by column and expert."""
    generator = np.random.default_rng(seed)

    def sums(*shape: int) -> NDArray[np.float64]:
        return np.ones(shape) if seed is None else generator.exponential(size=shape)

    folder.mkdir(exist_ok=True)
    experts = model.n_experts
    save_arrays(
        folder / array_file(-1), {"token_count": np.ones((1, model.vocab_size), np.int64), "output_in_sq": sums(1, model.hidden_size)}
    )
    for layer in range(model.n_layers):
        arrays: dict[str, NDArray[Any]] = {"tokens": np.ones(1)}
        for step in model.steps(layer):
            plain = model.plain_roles(layer, step)
            if plain:
                arrays[f"in_sq.{step.reads}"] = sums(1, model.get(plain[0], layer).shape[1])
        if layer in model.moe_layers:
            arrays |= {"count": np.full((1, experts), 100, np.int64), "expert_importance": np.ones(experts)}
            arrays |= {"expert_in_sq": sums(experts, model.hidden_size), "expert_mid_sq": sums(experts, model.expert.size)}
        save_arrays(folder / array_file(layer), arrays)
    domain = Domain(name="none", weight=1.0, tokens=model.vocab_size, sha256="d" * 64)
    return Stats(folder=str(folder), model=model.fingerprint, key="a" * 64, settings={}, domains=(domain,), probes=(), cold=())


def backpropagate_draws(whole: Any, windows: Any, chunk: Any) -> Any:
    """Gradients of the cross-entropy of tokens that a whole model draws, as stream/gradients.py does; which positions are no padding."""
    draw = torch.Generator().manual_seed(int(chunk[0]))
    logits = whole(torch.from_numpy(windows.tokens[chunk])).logits
    picked = torch.multinomial(logits.detach().flatten(0, 1).softmax(-1), 1, generator=draw)[:, 0].view(logits.shape[:2])
    real = torch.from_numpy(np.arange(logits.shape[1])[None] < windows.lengths[chunk][:, None])
    torch.nn.functional.cross_entropy(logits[real], picked[real], reduction="sum").backward()
    return real
