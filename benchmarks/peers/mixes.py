"""Mixes are llama-quantize's rules for the ggml type of every tensor, and the bytes of the file follow from shapes alone.

Users take them where they have no planner, hence a plan has to beat them.  A port as data of llama_tensor_get_type_impl and
tensor_type_fallback in src/llama-quant.cpp of llama.cpp 0c1e570 (dense 70B and Falcon rules left out: no such MoE).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace

from edgemoe.ir import Model, Tensor, Unit, tensor_name
from edgemoe.model.describe import describe, load_shape
from edgemoe.targets.gguf.formats import FORMATS, row_bytes
from edgemoe.targets.stacks import list_units

# Type for rows that the block of 256 does not divide; F16 where 32 does not either.
FALLBACK = {"Q2_K": "Q4_0", "Q3_K": "Q4_0", "Q4_K": "Q5_0", "Q5_K": "Q5_1", "Q6_K": "Q8_0"}

# Each rule is "condition:type ...": the first condition that holds decides, a bare type always holds, none leaves the base type.
# Conditions: gqa4 (4 or more heads share a KV head), moe4 (that, or 4 or more experts), x8 (exactly 8 experts), blind (no imatrix), first2
# and first4 (of the attention tensors), eighth and sixteenth (of the layers), early (an eighth of the layers, counted in tensors), middle
# (three quarters of the layers), more and more_v (use_more_bits of the layer, of the attention tensor).
_LOWEST = {"output": "Q5_K", "embedding": "Q2_K", "v": "moe4:Q4_K Q2_K", "k": "x8:Q4_K", "o": "x8:Q5_K", "down": "early:Q2_K"}
_LOWER = _LOWEST | {"embedding": "IQ3_S", "v": "moe4:Q4_K IQ3_S", "o": "x8:Q5_K IQ3_S", "down": "early:IQ3_S"}
MIXES: dict[str, dict[str, str]] = {
    "Q8_0": {"base": "Q8_0"},
    "Q6_K": {"base": "Q6_K", "v": "x8:Q8_0", "k": "x8:Q8_0"},
    "Q5_K_S": {"base": "Q5_K", "v": "x8:Q8_0", "k": "x8:Q8_0"},
    "Q5_K_M": {"base": "Q5_K", "v": "x8:Q8_0 more_v:Q6_K", "k": "x8:Q8_0", "down": "more:Q6_K"},
    "Q4_K_S": {"base": "Q4_K", "v": "x8:Q8_0 first4:Q5_K", "k": "x8:Q8_0", "o": "x8:Q5_K", "down": "eighth:Q5_K"},
    "Q4_K_M": {"base": "Q4_K", "v": "x8:Q8_0 more_v:Q6_K", "k": "x8:Q8_0", "o": "x8:Q5_K", "down": "more:Q6_K"},
    "Q3_K_S": {"base": "Q3_K", "v": "x8:Q8_0", "k": "x8:Q8_0", "o": "x8:Q5_K"},
    "Q3_K_M": {"base": "Q3_K", "v": "x8:Q8_0 first2:Q5_K Q4_K", "k": "x8:Q8_0", "o": "x8:Q5_K Q4_K", "down": "sixteenth:Q5_K Q4_K"},
    "Q3_K_L": {"base": "Q3_K", "v": "x8:Q8_0 Q5_K", "k": "x8:Q8_0", "o": "x8:Q3_K Q5_K", "down": "Q5_K"},
    "Q2_K": {"base": "Q2_K", "v": "x8:Q8_0 gqa4:Q4_K Q3_K", "k": "x8:Q8_0", "o": "x8:Q5_K Q3_K", "down": "Q3_K"},
    "Q2_K_S": {"base": "Q2_K", "v": "x8:Q8_0 gqa4:Q4_K", "k": "x8:Q8_0", "down": "eighth:Q4_K"},
    "IQ4_XS": {"base": "IQ4_XS", "v": "x8:Q8_0 gqa4:Q5_K", "k": "x8:Q8_0", "o": "x8:Q5_K", "down": "blind-eighth:Q5_K"},
    "IQ4_NL": {"base": "IQ4_NL", "v": "x8:Q8_0 gqa4:Q5_K", "k": "x8:Q8_0", "o": "x8:Q5_K", "down": "blind-eighth:Q5_K"},
    "IQ3_M": {"base": "IQ3_S", "v": "x8:Q8_0 Q4_K", "k": "x8:Q8_0", "o": "x8:Q5_K Q4_K", "down": "eighth:Q4_K x8-more:Q4_K"},
    "IQ3_S": {"base": "IQ3_S", "v": "x8:Q8_0 gqa4:Q4_K", "k": "x8:Q8_0", "o": "x8:Q5_K"},
    "IQ3_XS": {
        "base": "IQ3_S",
        "v": "x8:Q8_0 gqa4:Q4_K",
        "k": "x8:Q8_0 IQ3_XXS",
        "q": "IQ3_XXS",
        "o": "x8:Q5_K",
        "gate": "middle:IQ3_XXS",
        "up": "middle:IQ3_XXS",
    },
    "IQ3_XXS": {
        "base": "IQ3_XXS",
        "output": "Q5_K",
        "embedding": "IQ3_S",
        "v": "x8:Q8_0 gqa4:Q4_K blind:IQ3_S",
        "k": "x8:Q8_0 IQ2_S",
        "q": "IQ2_S",
        "o": "x8:Q5_K IQ3_S",
        "down": "blind-eighth:Q4_K blind:Q3_K",
    },
    "IQ2_M": _LOWER | {"base": "IQ2_S"},
    "IQ2_S": _LOWER | {"base": "IQ2_XS"},
    "IQ2_XS": _LOWEST | {"base": "IQ2_XS"},
    "IQ2_XXS": _LOWEST | {"base": "IQ2_XXS"},
    "IQ1_M": _LOWEST | {"base": "IQ1_M", "o": "x8:Q5_K IQ2_XXS"},
    "IQ1_S": _LOWEST | {"base": "IQ1_S", "o": "x8:Q5_K IQ2_XXS"},
}

# Models whose published GGUFs carry a next-token-prediction block after the last layer, which plain decoding never loads: whether the block
# has an embedding and an output matrix of its own (no field of config.json says it).
PREDICTION_BLOCKS = {"GLM-4.5-Air": True, "GLM-4.5": True, "GLM-4.6": False, "GLM-5.2": False}

# Kind of a tensor by its role (tensor_get_category: the first name found inside).
_KINDS = {"output": "output", "token_embd": "embedding", "attn_qkv": "v", "attn_kv_b": "v", "attn_v": "v", "attn_k": "k", "attn_q": "q"}
_KINDS |= {"attn_output": "o"}


@dataclass(frozen=True, slots=True)
class _Place:
    """Where a tensor stands, for the conditions of the rules."""

    layer: int
    n_layers: int
    n_v: int  # attention values seen before it
    all_v: int
    n_down: int  # down projections seen before it


def with_prediction_block(name: str) -> Model:
    """A shipped shape with the next-token-prediction block of its published GGUFs: one more layer, and what joins it to the others."""
    config = load_shape(name)
    n_layers = config["num_hidden_layers"]
    longer = describe({**config, "num_hidden_layers": n_layers + 1}, name)
    hidden, vocab = longer.hidden_size, longer.vocab_size
    shapes: dict[str, tuple[int, ...]] = {"nextn.eh_proj": (hidden, 2 * hidden)}
    shapes |= dict.fromkeys(("nextn.enorm", "nextn.hnorm", "nextn.shared_head_norm"), (hidden,))
    if PREDICTION_BLOCKS[name]:
        shapes |= dict.fromkeys(("nextn.embed_tokens", "nextn.shared_head_head"), (vocab, hidden))
    block = [
        Tensor(name=r, role=r, layer=n_layers, expert=-1, shape=s, dtype="BF16", file="", offset=0, planned=len(s) > 1)
        for r, s in shapes.items()
    ]
    return replace(longer, layers=longer.layers[:-1], tensors=(*longer.tensors, *block))


def pure_types(model: Model, base: str) -> dict[str, str]:
    """One type for everything (llama-quantize --pure), fallbacks where rows do not divide: unit name -> type."""
    cols = _row_lengths(model)
    return {unit.name: fall_back(base, cols[unit.name]) for unit in list_units(model)}


def mix_types(model: Model, mix: str, *, imatrix: bool = True) -> dict[str, str]:
    """The type that llama-quantize gives each tensor: unit name -> type.

    Args:
        model: its shapes.
        mix: a llama-quantize type such as Q4_K_M.
        imatrix: whether an importance matrix is used; some rules ask.
    """
    rules = MIXES[mix]
    cols = _row_lengths(model)
    units = list_units(model)
    tied = not any(unit.role == "output" for unit in units)
    types = {}
    for unit, place in _places(units):
        width = cols[unit.name]
        kind = "output" if tied and unit.role == "token_embd" else _kind(unit.role)
        chosen = _apply(rules.get(kind, ""), rules["base"], model, place, imatrix)
        if kind == "output":
            chosen = "Q8_0" if width % FORMATS[rules["base"]].block or rules["base"] == "Q8_0" else rules.get("output", "Q6_K")
        types[unit.name] = fall_back(chosen, width)
    return types


def fall_back(base: str, cols: int) -> str:
    """The type that llama-quantize really uses for rows of this length."""
    if cols % FORMATS[base].block == 0:
        return base
    smaller = FALLBACK.get(base, "IQ4_NL")
    return smaller if cols % FORMATS[smaller].block == 0 else "F16"


def tensor_bytes(model: Model, types: Mapping[str, str]) -> int:
    """Bytes of all tensors when the units have these types, without padding; a file adds padding, header and vocabulary."""
    cols = _row_lengths(model)
    planned = sum(unit.n_weights // cols[unit.name] * row_bytes(types[unit.name], cols[unit.name]) for unit in list_units(model))
    return planned + sum(4 * tensor.n_weights for tensor in model.tensors if not tensor.planned)


def _row_lengths(model: Model) -> dict[str, int]:
    """Columns of each unit, by name."""
    return {tensor_name(t.role, t.layer): t.shape[1] for t in model.tensors if t.expert <= 0 and t.planned}


def _kind(role: str) -> str:
    if role in _KINDS:
        return _KINDS[role]
    return next((kind for kind in ("up", "gate", "down") if role.startswith(f"ffn_{kind}")), "")


def _places(units: list[Unit]) -> Iterator[tuple[Unit, _Place]]:
    """Units as llama-quantize walks them: layer by layer, by name inside."""
    n_layers = 1 + max(unit.layer for unit in units)
    all_v = sum(_kind(unit.role) == "v" for unit in units)
    n_v = n_down = 0
    for unit in sorted(units, key=lambda u: (u.layer, u.name)):
        yield unit, _Place(unit.layer, n_layers, n_v, all_v, n_down)
        n_v += _kind(unit.role) == "v"
        n_down += _kind(unit.role) == "down"


def _apply(rule: str, base: str, model: Model, place: _Place, imatrix: bool) -> str:
    for clause in rule.split():
        condition, _, kind = clause.rpartition(":")
        if all(_holds(word, model, place, imatrix) for word in condition.split("-") if word):
            return kind
    return base


def _holds(word: str, model: Model, place: _Place, imatrix: bool) -> bool:
    gqa4 = model.attention.heads // model.attention.kv_heads >= 4
    eighth = place.n_layers // 8
    return {
        "gqa4": gqa4,
        "moe4": gqa4 or model.n_experts >= 4,
        "x8": model.n_experts == 8,
        "blind": not imatrix,
        "first2": place.n_v < 2,
        "first4": place.n_v < 4,
        "eighth": place.layer < eighth,
        "early": place.n_down < eighth,
        "sixteenth": place.layer < place.n_layers // 16,
        "middle": eighth <= place.layer < 7 * place.n_layers // 8,
        "more": _more_bits(place.layer, place.n_layers),
        "more_v": _more_bits(place.n_v, place.all_v),
    }[word]


def _more_bits(i: int, n: int) -> bool:
    """The first and last eighth, and every third in between."""
    return i < n // 8 or i >= 7 * n // 8 or (i - n // 8) % 3 == 2
