"""Recipes give a model's units their ggml types and say which experts stay; each is one function with its source.

Where a recipe knows more than a GGUF can hold (bits of single experts, attention of another kind), its docstring says how it is projected.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

from edgemoe.base.types import F64
from edgemoe.ir import PROJECTIONS, Model, Stats, Unit, tensor_name
from edgemoe.model.checkpoint import read_tensor
from edgemoe.plan.pmq import allocate_bits
from edgemoe.price.saliency import score_experts
from edgemoe.targets.gguf.formats import FORMATS, WIDE, pad, row_bytes
from edgemoe.targets.gguf.writer import fixed_sizes
from edgemoe.targets.stacks import list_units
from peers.mixes import fall_back

Kept = tuple[tuple[int, ...], ...]
PMQ_BITS = (1, 2, 3)
PMQ_OVERHEAD = 0.25  # bits per weight: scale and zero point in F16 for each group of 128
PMQ_GROUP = 128
PMQ_ATTENTION = 4  # bits of everything outside the experts
PMQ_BATCH = 8 * 2048  # tokens whose error is one norm


# ------------------------------------------------------------------------------------------------------------------- sizes
def row_lengths(model: Model) -> dict[str, int]:
    """Columns of each unit, by name."""
    return {tensor_name(t.role, t.layer): t.shape[1] for t in model.tensors if t.expert <= 0 and t.planned}


def storable(model: Model, types: Mapping[str, str]) -> dict[str, str]:
    """The types that llama-quantize would use where the block does not divide a row."""
    cols = row_lengths(model)
    return {name: fall_back(kind, cols[name]) for name, kind in types.items()}


def unit_bytes(model: Model, unit: Unit, kind: str, count: int) -> int:
    """Bytes of a unit when `count` experts stay."""
    cols = row_lengths(model)[unit.name]
    weights = unit.n_weights * count // model.n_experts if unit.is_stack else unit.n_weights
    return pad(weights // cols * row_bytes(kind, cols))


def file_bytes(model: Model, types: Mapping[str, str], count: int) -> int:
    """Bytes of the whole file."""
    return fixed_sizes(model, [count])[0] + sum(unit_bytes(model, u, types[u.name], count) for u in list_units(model))


# ------------------------------------------------------------------------------------------------------------------- drops
def keep_best(score: F64, count: int) -> tuple[int, ...]:
    """The experts with the highest score, in order."""
    return tuple(sorted(int(e) for e in np.argsort(-score, kind="stable")[:count]))


def reap_count(model: Model, share: float) -> int:
    """Kept experts of each layer: int(E * ratio) go (REAP, prune.py of CerebrasResearch/reap), never more than the router can spare."""
    return max(model.top_k, model.n_experts - int(model.n_experts * (1 - share)))


def kept_sets(model: Model, stats: Stats, method: str, share: float) -> Kept:
    """Experts that stay in each layer by a score of edgemoe/price/saliency.py; "random0" and so on by lot.

    "reap" is the published mean over routed tokens of g |f| (arXiv 2510.13999, eq. 9), "reap-sum" its sum, "frequency" the count.
    """
    count, layers = reap_count(model, share), range(model.n_layers)
    if method.startswith("random"):
        return tuple(keep_best(np.random.default_rng([int(method[6:]), layer]).random(model.n_experts), count) for layer in layers)
    return tuple(keep_best(score_experts(stats, layer, method), count) for layer in layers)


def collaborative_score(count: F64, gate: F64, tokens: float) -> F64:
    """0.5 f + 0.5 s: share of the tokens that pick an expert, and its mean raw routing score when picked (arXiv 2509.25689)."""
    found: F64 = 0.5 * count / tokens + 0.5 * gate / np.maximum(count, 1)
    return found


def collaborative_sets(model: Model, stats: Stats, share: float, *, released: bool) -> Kept:
    """CC-MoE's drop: ceil(r E) experts stay, by the paper's score or by the sum of routing weights of moin-org/CC-MoE, moe_pruner.py."""
    count = max(model.top_k, int(np.ceil(share * model.n_experts)))
    if released:
        return tuple(keep_best(score_experts(stats, layer, "gate-sum"), count) for layer in range(model.n_layers))
    return tuple(keep_best(collaborative_score(*routing_sums(model, stats, layer)), count) for layer in range(model.n_layers))


def routing_sums(model: Model, stats: Stats, layer: int) -> tuple[F64, F64, float]:
    """Of the replay tokens: how many pick each expert, the sum of their raw softmax weights [E], and the number of tokens."""
    picked, probs = _routing(model, stats.arrays(layer)["replay_logits"])
    return picked.sum(axis=0).astype(np.float64), (picked * probs).sum(axis=0), float(len(probs))


def _routing(model: Model, logits: NDArray[np.floating]) -> tuple[NDArray[np.bool_], F64]:
    """Which experts each token picks, and the softmax over all [N, E]."""
    z = logits.astype(np.float64)
    probs = np.exp(z - z.max(axis=1, keepdims=True))
    probs /= probs.sum(axis=1, keepdims=True)
    picked = np.zeros(z.shape, bool)
    np.put_along_axis(picked, np.argsort(-z, axis=1, kind="stable")[:, : model.top_k], True, axis=1)
    return picked, probs


# --------------------------------------------------------------------------------------------------------------------- PMQ
def round_group(weights: NDArray[np.float32], bits: int, group: int = PMQ_GROUP) -> NDArray[np.float32]:
    """MC's round to nearest: min to max of each group of a row on 2^bits levels; 1 bit: sign times mean magnitude."""
    x = weights.reshape(-1, int(np.gcd(group, weights.shape[-1])))
    if bits == 1:
        return np.broadcast_to(np.abs(x).mean(axis=1, keepdims=True), x.shape).astype(np.float32).reshape(weights.shape) * np.sign(weights)
    low = x.min(axis=1, keepdims=True)
    step = np.maximum((x.max(axis=1, keepdims=True) - low) / (2**bits - 1), 1e-12)
    rounded: NDArray[np.float32] = (np.rint((x - low) / step) * step + low).astype(np.float32).reshape(weights.shape)
    return rounded


def pmq_widths(model: Model, stats: Stats, layer: int, average: float) -> NDArray[np.int64]:
    """Bits of every expert of a layer: PMQ, the allocation of MC (arXiv 2410.06270, precision_solver.py), on the replay tokens.

    eps is the norm of the layer's output error with one expert at 1, 2 or 3 bits, its other inputs original; phi and w are shares of
    tokens and of raw routing weight.
    """
    arrays = stats.arrays(layer)
    picked, probs = _routing(model, arrays["replay_logits"])
    gates = np.where(picked, probs, 0.0)
    if model.router.renormalize:
        gates /= gates.sum(axis=1, keepdims=True)
    tensors, x = model.of_layer(layer), arrays["replay_x"].astype(np.float32)
    errors = np.zeros((model.n_experts, len(PMQ_BITS)))
    for expert in range(model.n_experts):
        rows = np.flatnonzero(picked[:, expert])
        stack = [read_tensor(model.folder, tensors[f"ffn_{p}_exps", expert]) for p in PROJECTIONS]
        exact = _expert(x[rows], *stack)
        for j, bits in enumerate(PMQ_BITS):
            delta = (_expert(x[rows], *(round_group(w, bits) for w in stack)) - exact) * gates[rows, expert][:, None]
            errors[expert, j] = sum(float(np.linalg.norm(delta[rows // PMQ_BATCH == b])) for b in range(len(x) // PMQ_BATCH + 1))
    count, weight, _ = routing_sums(model, stats, layer)
    return allocate_bits(count, weight, errors, round(average * model.n_experts))[0]


def _expert(x: NDArray[np.float32], gate: NDArray[np.float32], up: NDArray[np.float32], down: NDArray[np.float32]) -> NDArray[np.float32]:
    a = x @ gate.T
    found: NDArray[np.float32] = (a / (1 + np.exp(-a)) * (x @ up.T)) @ down.T
    return found


def nearest_type(bits: float) -> str:
    """The ggml type with the nearest bits per weight, the larger of two."""
    return min((name for name in WIDE if name != "F16"), key=lambda name: (abs(FORMATS[name].bpw - bits), -FORMATS[name].bpw))


def pmq_types(model: Model, widths: list[NDArray[np.int64]]) -> dict[str, str]:
    """PMQ's bits as a GGUF can hold them: a stack gets the type nearest to its layer's mean width plus 0.25 for scales.

    PMQ gives every layer the same total, so what is projected away is all that it decides: which experts of a layer get more.  The rest is
    at 4 bits as in MC, embedding and output too, which MC leaves in 16 bits (better for the peer at equal bytes).
    """
    rest = nearest_type(PMQ_ATTENTION + PMQ_OVERHEAD)
    types = {u.name: nearest_type(float(widths[u.layer].mean()) + PMQ_OVERHEAD) if u.is_stack else rest for u in list_units(model)}
    return storable(model, types)


# ------------------------------------------------------------------------------------------------------------- fixed recipes
def more_bits(layer: int, n_layers: int) -> bool:
    """use_more_bits of llama-quant.cpp: the first and last eighth, and every third layer in between."""
    return layer < n_layers // 8 or layer >= 7 * n_layers // 8 or (layer - n_layers // 8) % 3 == 2


def ccmoe_types(model: Model, base: str) -> dict[str, str]:
    """The llama.cpp patch of moin-org/CC-MoE for IQ1_S and IQ1_M (arXiv 2509.25689).

    Experts: down IQ2_XXS in the first and last eighth of the layers, else IQ1_M; gate and up one step above `base` in the same layers, else
    `base`.  Attention output IQ4_XS where llama.cpp uses more bits, else IQ3_S; query, key and value stand for MLA's q_a and kv_a: Q4_K.
    Output Q5_K, embedding Q2_K.  The smaller number of active experts is not in the released code, hence not here.
    """
    step = {"IQ1_S": "IQ1_M", "IQ1_M": "IQ2_XXS"}[base]

    def choose(unit: Unit) -> str:
        outer = unit.layer < model.n_layers // 8 or unit.layer >= 7 * model.n_layers // 8
        if unit.role == "ffn_down_exps":
            return "IQ2_XXS" if outer else "IQ1_M"
        if unit.is_stack:
            return step if outer else base
        if unit.role == "attn_output":
            return "IQ4_XS" if more_bits(unit.layer, model.n_layers) else "IQ3_S"
        return {"output": "Q5_K", "token_embd": "Q2_K"}.get(unit.role, "Q4_K")

    return storable(model, {u.name: choose(u) for u in list_units(model)})


# Types of routed experts at the ends, next to them and in the middle, of attention at the ends and in the middle.
APEX = {
    "quality": ("Q6_K", "Q5_K", "IQ4_XS", "Q6_K", "Q6_K"),
    "balanced": ("Q6_K", "Q5_K", "Q5_K", "Q6_K", "Q6_K"),
    "compact": ("Q4_K", "Q3_K", "Q3_K", "Q4_K", "Q4_K"),
    "mini": ("Q3_K", "Q3_K", "IQ2_S", "Q4_K", "Q3_K"),
    "nano": ("Q3_K", "IQ2_S", "IQ2_XXS", "Q4_K", "Q3_K"),
    "micro": ("Q3_K", "IQ2_XS", "IQ1_M", "Q4_K", "Q3_K"),
}
APEX_LAYERS = 40  # of the model that the tiers were made for: 5 layers at each end, 5 next to them, 3 for attention


def apex_types(model: Model, tier: str) -> dict[str, str]:
    """A tier of APEX (mudler/apex-quant, generate_config.sh): better types for the first and last layers.

    The published counts of layers are those of a model of 40; they are scaled to this model's depth, at least one layer at each end.  The
    output gets Q6_K as llama-quantize gives it, the embedding what attention has in the middle.
    """
    edge, near, middle, attn_edge, attn = APEX[tier]
    outer, inner, attn_outer = (max(1, round(n / APEX_LAYERS * model.n_layers)) for n in (5, 10, 3))

    def choose(unit: Unit) -> str:
        depth = min(unit.layer, model.n_layers - 1 - unit.layer)
        if unit.is_stack:
            return edge if depth < outer else near if depth < inner else middle
        if unit.layer < 0:
            return "Q6_K" if unit.role == "output" else attn
        return attn_edge if depth < attn_outer else attn

    return storable(model, {u.name: choose(u) for u in list_units(model)})


# Gate and up, down, everything else: recipes that their authors describe in full (Unsloth's dynamic types are not published).
PUBLISHED = {
    "antirez ds4": ("IQ2_XXS", "Q2_K", "Q8_0"),  # antirez/ds4, README
    "AesSedai": ("IQ2_S", "IQ3_S", "Q6_K"),  # AesSedai/GLM-4.5-GGUF, model card
    "hyperspaceai": ("IQ2_S", "IQ3_S", "Q4_K"),  # hyperspaceai Qwen3-30B-A3B, model card: the rest Q4_K and Q6_K
}


def published_types(model: Model, name: str) -> dict[str, str]:
    """A publisher's recipe by role."""
    gate_up, down, rest = PUBLISHED[name]
    types = {u.name: (down if "down" in u.role else gate_up) if u.is_stack else rest for u in list_units(model)}
    return storable(model, types)


def dq3_types(model: Model) -> dict[str, str]:
    """DQ3_K_M (arXiv 2505.02390): down of the first two expert layers Q6_K, then Q3_K with Q4_K in every fourth; the rest as Q3_K_M."""
    types = {}
    for unit in list_units(model):
        types[unit.name] = "Q3_K" if unit.is_stack else {"output": "Q6_K", "token_embd": "Q3_K"}.get(unit.role, "Q4_K")
        if unit.role == "ffn_down_exps":
            types[unit.name] = "Q6_K" if unit.layer < 2 else "Q4_K" if unit.layer % 4 == 3 else "Q3_K"
    return storable(model, types)
