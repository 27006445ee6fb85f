"""This module defines the kinds of blocks that layers consist of: their tensors, what these read and write, and their caches.

A family (a file of families/) says which blocks a layer has, and this module says which tensors a block has.  Names are those in the
checkpoint, without the prefix "model.layers.N.".  Shapes have rows first, and quantization runs along rows.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from edgemoe.ir.model import Cache
from edgemoe.model.config import Config


@dataclass(frozen=True, slots=True)
class Spec:
    """One tensor that a layer has.

    A Spec whose role ends in _exps stands for one tensor of each expert, and {expert} in its `names` is the number of the expert.
    """

    role: str
    shape: tuple[int, ...]
    names: tuple[str, ...] = ()  # names in the checkpoint; the first that exists is used.  Empty: the tensor is known by its shape only
    reads: str = ""
    writes: str = ""
    planned: bool = False


@dataclass(frozen=True, slots=True)
class Block:
    """A part of a layer: its kind, its tensors, and its cache of past tokens."""

    kind: str  # norm, gqa, mla, delta, moe, shared, dense
    specs: tuple[Spec, ...]
    cache: Cache | None = None


def matrix(role: str, rows: int, cols: int, name: str, reads: str, writes: str = "") -> Spec:
    """A matrix that a plan gives a format."""
    return Spec(role, (rows, cols), (name,) if name else (), reads, writes, planned=True)


def norm(c: Config, makes: str, name: str) -> Block:
    """A norm of the residual stream; `makes` names its role and the activation that it writes."""
    return Block("norm", (Spec(makes, (c["hidden_size"],), (f"{name}.weight",), "", makes),))


# -------------------------------------------------------------------------------------------------------------- attention
def gqa(
    c: Config, *, biased: bool = False, output_biased: bool = False, gated: bool = False, sinks: bool = False, window: int = 0
) -> Block:
    """Grouped-query attention (arXiv 2305.13245).

    Args:
        c: the config.
        biased: whether attn_q, attn_k and attn_v have biases.
        output_biased: whether attn_output has a bias.
        gated: whether attn_q also gives a gate for each mixed value.
        sinks: whether each head has one more logit.
        window: tokens that a token attends to, itself included; 0: all before it.
    """
    hidden, head, kv = c["hidden_size"], c.head_size, c.kv_heads
    rows = {"q": (2 if gated else 1) * c.heads * head, "k": kv * head, "v": kv * head}
    specs = [matrix(f"attn_{p}", n, hidden, f"self_attn.{p}_proj.weight", "attn_norm") for p, n in rows.items()]
    specs.append(matrix("attn_output", hidden, c.heads * head, "self_attn.o_proj.weight", "attn_mix", "stream"))
    if biased:
        specs += [Spec(f"attn_{p}.bias", (n,), (f"self_attn.{p}_proj.bias",)) for p, n in rows.items()]
    if output_biased:
        specs.append(Spec("attn_output.bias", (hidden,), ("self_attn.o_proj.bias",)))
    if sinks:
        specs.append(Spec("attn_sinks", (c.heads,), ("self_attn.sinks",)))
    return Block("gqa", tuple(specs), Cache(k=kv * head, v=kv * head, window=window))


def qk_norms(c: Config, *, wide: bool) -> Block:
    """Norms of queries and keys: one over each head, or (`wide`) one over all heads together."""
    sizes = {p: c.head_size * (n if wide else 1) for p, n in (("q", c.heads), ("k", c.kv_heads))}
    return Block("norm", tuple(Spec(f"attn_{p}_norm", (size,), (f"self_attn.{p}_norm.weight",)) for p, size in sizes.items()))


def mla(c: Config, *, indexer: bool = False) -> Block:
    """Latent attention (DeepSeek-V2, arXiv 2405.04434), with matrices absorbed as in llama.cpp.

    `indexer` adds the indexer of DeepSeek's sparse attention.
    """
    hidden, heads, rank, rope = c["hidden_size"], c.heads, c["kv_lora_rank"], c["qk_rope_head_dim"]
    nope, value = c["qk_nope_head_dim"], c["v_head_dim"]
    low = c["q_lora_rank"] if c.get("q_lora_rank") else 0
    specs = [Spec("attn_kv_a_norm", (rank,), ("self_attn.kv_a_layernorm.weight",))]
    specs.append(matrix("attn_kv_a_mqa", rank + rope, hidden, "self_attn.kv_a_proj_with_mqa.weight", "attn_norm"))
    specs += [matrix("attn_k_b", heads * rank, nope, "", "q_nope"), matrix("attn_v_b", heads * value, rank, "", "latent_mix")]
    specs.append(matrix("attn_output", hidden, heads * value, "self_attn.o_proj.weight", "attn_mix", "stream"))
    q = heads * (nope + rope)
    if low:
        specs.append(Spec("attn_q_a_norm", (low,), ("self_attn.q_a_layernorm.weight",)))
        specs.append(matrix("attn_q_a", low, hidden, "self_attn.q_a_proj.weight", "attn_norm"))
        specs.append(matrix("attn_q_b", q, low, "self_attn.q_b_proj.weight", "q_latent"))
    else:
        specs.append(matrix("attn_q", q, hidden, "self_attn.q_proj.weight", "attn_norm"))
    kept = rank + rope
    if indexer:
        size, n = c["index_head_dim"], c["index_n_heads"]
        specs += [Spec("indexer.k_norm", (size,)), Spec("indexer.k_norm.bias", (size,)), matrix("indexer.proj", n, hidden, "", "attn_norm")]
        specs += [matrix("indexer.attn_k", size, hidden, "", "attn_norm"), matrix("indexer.attn_q_b", n * size, low, "", "q_latent")]
        kept += size
    return Block("mla", tuple(specs), Cache(k=kept))


def delta(c: Config, *, joint: bool) -> Block:
    """Gated delta rule (arXiv 2412.06464), with one convolution window and, for each head, a state matrix.

    For each token, alpha is the share of the state that stays (the decay), and beta is the step size by which the token changes the state.
    `joint` puts the matrices that give alpha and beta into one.
    """
    hidden, heads = c["hidden_size"], c["linear_num_value_heads"]
    inner = heads * c["linear_value_head_dim"]
    keys = 2 * c["linear_num_key_heads"] * c["linear_key_head_dim"]
    conv = c["linear_conv_kernel_dim"]
    specs = [matrix("attn_qkv", keys + inner, hidden, "", "attn_norm"), matrix("attn_gate", inner, hidden, "", "attn_norm")]
    specs += [Spec("ssm_conv1d", (keys + inner, conv)), Spec("ssm_dt.bias", (heads,)), Spec("ssm_a", (heads,))]
    specs += [Spec("ssm_norm", (c["linear_value_head_dim"],)), matrix("ssm_out", hidden, inner, "", "delta_out", "stream")]
    rows = {"ssm_ba": 2 * heads} if joint else {"ssm_alpha": heads, "ssm_beta": heads}
    specs += [matrix(role, n, hidden, "", "attn_norm") for role, n in rows.items()]
    state = (conv - 1) * (inner + keys) + c["linear_key_head_dim"] * inner
    return Block("delta", tuple(specs), Cache(state=state))


# ----------------------------------------------------------------------------------------------------------- feed-forward
def experts(
    c: Config,
    size: int,
    names: str,
    *,
    router: tuple[str, ...],
    bias: str = "",
    biased: bool = False,
    letters: Mapping[str, str] | None = None,
) -> Block:
    """Routed experts behind a router.

    Args:
        c: the config.
        size: neurons of an expert.
        names: pattern for the names of the experts' matrices in the checkpoint; {expert} stands for the number, {} for gate, up or down.
        router: names of the router's matrix, of which the first that exists counts.
        bias: name of the vector that is added to scores when experts are chosen; empty if there is none.
        biased: whether the router and all matrices of the experts have biases; `bias` is another vector, and does not count here.
        letters: what replaces {} for gate, up and down; None: these three words.
    """
    hidden, n = c["hidden_size"], c.experts
    specs = [Spec("ffn_gate_inp", (n, hidden), router, "ffn_norm")]
    if bias:
        specs.append(Spec("exp_probs_b.bias", (n,), (bias,)))
    shapes = {"gate": (size, hidden), "up": (size, hidden), "down": (hidden, size)}
    for p, (rows, cols) in shapes.items():
        reads, writes = ("expert_hidden", "stream") if p == "down" else ("ffn_norm", "")
        specs.append(matrix(f"ffn_{p}_exps", rows, cols, names.replace("{}", (letters or {}).get(p, p)), reads, writes))
    if biased:
        specs.append(Spec("ffn_gate_inp.bias", (n,)))
        specs += [Spec(f"ffn_{p}_exps.bias", (n, rows)) for p, (rows, _) in shapes.items()]
    return Block("moe", tuple(specs))


def shared(c: Config, size: int, names: str, *, gate: str = "") -> Block:
    """An expert that computes every token; `gate` names the vector whose product with a token, through a sigmoid, scales its output."""
    specs = _glu(c, size, names, "shexp", "shared_hidden")
    if gate:
        specs = (*specs, Spec("ffn_gate_inp_shexp", (c["hidden_size"],), (gate,), "ffn_norm"))
    return Block("shared", specs)


def dense(c: Config, names: str = "mlp.{}_proj.weight") -> Block:
    """The feed-forward part of a layer without experts."""
    return Block("dense", _glu(c, c["intermediate_size"], names, "", "dense_hidden"))


def _glu(c: Config, size: int, names: str, suffix: str, hidden: str) -> tuple[Spec, ...]:
    width, end = c["hidden_size"], f"_{suffix}" if suffix else ""
    gate, up = (matrix(f"ffn_{p}{end}", size, width, names.replace("{}", p), "ffn_norm") for p in ("gate", "up"))
    return (gate, up, matrix(f"ffn_down{end}", width, size, names.replace("{}", "down"), hidden, "stream"))


# --------------------------------------------------------------------------------------------------- what a config says of layers
def is_moe(c: Config, layer: int) -> bool:
    """Whether a layer has routed experts, from the fields by which configs say so."""
    if layer < c.get("first_k_dense_replace", c.get("moe_layer_start_index", 0)):
        return False
    if layer in c.get("mlp_only_layers", ()):
        return False
    step = c.get("decoder_sparse_step") or c.get("moe_layer_freq") or c.get("moe_layer_interval") or 1
    regular = (layer + 1) % step == 0 if isinstance(step, int) else bool(step[layer] if layer < len(step) else 1)
    return bool(c.nth("mlp_layer_types", layer, "sparse" if regular else "dense") == "sparse")


def attention_kind(c: Config, layer: int) -> str:
    """The kind of a layer's attention, "linear", "window" or "full", from layer_types or full_attention_interval."""
    interval = c.get("full_attention_interval")
    kind = "linear_attention" if interval and (layer + 1) % interval else "full_attention"
    return {"linear_attention": "linear", "sliding_attention": "window"}.get(c.nth("layer_types", layer, kind), "full")


def pre_norms(c: Config) -> Iterator[Block]:
    """The two norms of a layer, one after the other in the list of tensors.

    A family whose norms must stand apart calls `norm` itself.
    """
    yield norm(c, "attn_norm", "input_layernorm")
    yield norm(c, "ffn_norm", "post_attention_layernorm")
