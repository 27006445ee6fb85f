"""config.json alone -> a Model of shapes and its memory Layout: what a model would take, before any weight is downloaded.

The tensors of each family are data (`data/shapes/families.yaml`); this module only unfolds them.  Such a Model has no files: it can be
planned for, not built.  One Tensor per expert and projection, as in a Model from `inspect_model`; a trillion weights unfold in well under
a second.
"""

from __future__ import annotations

import functools
import math
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from edgemoe.base.errors import ModelError, UsageError
from edgemoe.base.storage import hash_json
from edgemoe.ir import PROJECTIONS, Model, Tensor
from edgemoe.ir.memory import DEFAULT_CONTEXT, Cache, Layout

_DATA = Path(__file__).parent / "shapes_data"
_EXPERT_ROLES = tuple(f"ffn_{p}_exps" for p in PROJECTIONS)
# LLAMA_MAX_LAYERS and LLAMA_MAX_EXPERTS of llama.cpp 0c1e570 (src/llama-hparams.h)
_LARGEST = {"num_hidden_layers": 512} | dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"), 1024)
Config = Mapping[str, Any]


@functools.cache
def _read_data(name: str) -> dict[str, Any]:
    import yaml

    data: dict[str, Any] = yaml.safe_load((_DATA / name).read_text(encoding="utf-8"))
    return data


def load_shape(name: str) -> dict[str, Any]:
    """The config of a shipped model, in the fields of its config.json that shapes depend on.

    Raises:
        UsageError: no such model.
    """
    models = _read_data("models.yaml")
    known = {model.lower(): model for model in models}
    if name.lower() not in known:
        raise UsageError(f"shape {name!r} is not known", hint=f"known: {', '.join(models)}; or give a config.json")
    return dict(models[known[name.lower()]])


class _Sizes:
    """The numbers of a config, under one name each."""

    def __init__(self, config: Config, own: Mapping[str, list[str]]) -> None:
        self.config, self.names = config, {**_read_data("families.yaml")["sizes"], **own}

    def get(self, expression: str) -> int:
        """The value of a sum of products of numbers, sizes and config fields.

        Raises:
            ModelError: a field is missing or not a positive integer.
        """
        return sum(math.prod(map(self._factor, term.split("*"))) for term in expression.split("+"))

    def _factor(self, name: str) -> int:
        if name not in self.names:
            return self._field(name)
        for alias in self.names[name]:
            if all(field.isdigit() or self.config.get(field) is not None for field in re.split("[*/]", alias)):
                over, _, under = alias.partition("/")
                return math.prod(map(self._field, over.split("*"))) // self._field(under or "1")
        raise ModelError(f"config.json: {' / '.join(self.names[name])} is missing")

    def _field(self, name: str) -> int:
        value = int(name) if name.isdigit() else self.config.get(name)
        if isinstance(value, bool) or not isinstance(value, int) or not 0 < value <= _LARGEST.get(name, 2**24):
            raise ModelError(f"config.json: {name} is {value!r}, expected a positive integer of at most {_LARGEST.get(name, 2**24)}")
        return value


def _find_family(config: Config) -> dict[str, Any]:
    families = _read_data("families.yaml")["families"]
    name = config.get("model_type")
    if name not in families:
        raise ModelError(f"config.json: the shapes of model_type {name!r} are not known", hint=f"known: {', '.join(families)}")
    family: dict[str, Any] = families[name]
    return family


def text_config(config: Config) -> Config:
    """The language model's part of a config that also describes vision or audio."""
    inner = config.get("text_config")
    return inner if isinstance(inner, Mapping) else config


def layer_tags(config: Config, family: Mapping[str, Any]) -> list[set[str]]:
    """What each layer is, as families.yaml spells it."""
    n_layers = _Sizes(config, {}).get("num_hidden_layers")
    flags = {tag if config.get(field) else f"no-{tag}" for tag, field in family.get("flags", {}).items()}
    result = []
    for layer in range(n_layers):
        tags = {"all", "moe" if _is_moe(config, layer) else "dense", _attention(config, layer), *flags}
        if _nth(config.get("indexer_types"), layer, "full") == "full":
            tags |= {"indexer"}
        result.append(tags)
    return result


def _nth(values: Any, n: int, default: Any) -> Any:
    return values[n] if isinstance(values, list) and n < len(values) else default


def _is_moe(config: Config, layer: int) -> bool:
    """Whether a layer routes: the four ways in which configs say so."""
    if layer < (config.get("first_k_dense_replace") or config.get("moe_layer_start_index") or 0):
        return False
    if layer in (config.get("mlp_only_layers") or ()):
        return False
    step = config.get("decoder_sparse_step") or config.get("moe_layer_freq") or config.get("moe_layer_interval") or 1
    regular = (layer + 1) % step == 0 if isinstance(step, int) else bool(_nth(step, layer, 1))
    return bool(_nth(config.get("mlp_layer_types"), layer, "sparse" if regular else "dense") == "sparse")


def _attention(config: Config, layer: int) -> str:
    interval = config.get("full_attention_interval")
    kind = "linear_attention" if interval and (layer + 1) % interval else "full_attention"
    kind = _nth(config.get("layer_types"), layer, kind)
    return {"linear_attention": "linear", "sliding_attention": "window"}.get(kind, "full")


def model_of_config(config: Config, name: str = "model") -> Model:
    """A Model of shapes from a config.json, without next-token-prediction blocks; its tensors have no file.

    Args:
        config: the parsed config.json.
        name: of the model.

    Raises:
        ModelError: the family is not known or a field is missing; names it.
    """
    config = text_config(config)
    family = _find_family(config)
    sizes = _Sizes(config, family.get("sizes", {}))
    n_layers = sizes.get("num_hidden_layers")
    latent = family.get("cache") == "latent"
    tensors = tuple(_list_tensors(sizes, family, layer_tags(config, family)))
    n_experts, top_k = sizes.get("experts"), sizes.get("top_k")
    if top_k > n_experts:
        raise ModelError(f"config.json: num_experts_per_tok is {top_k}, but there are {n_experts} experts")
    return Model(
        folder="",
        name=name,
        model_type=str(config["model_type"]),
        config=dict(config),
        n_layers=n_layers,
        hidden_size=sizes.get("hidden"),
        vocab_size=sizes.get("vocab"),
        n_heads=sizes.get("heads"),
        n_kv_heads=1 if latent else sizes.get("kv_heads"),
        head_dim=sizes.get("qk_nope_head_dim+qk_rope_head_dim" if latent else "head_size"),
        n_experts=n_experts,
        top_k=top_k,
        expert_size=sizes.get("expert_size"),
        renormalize=_renormalizes(config, family) or family.get("gating") == "chosen",
        context_length=int(config.get("max_position_embeddings") or DEFAULT_CONTEXT),
        tensors=tensors,
        fingerprint=hash_json("shapes", config, name),
    )


def _list_tensors(sizes: _Sizes, family: Mapping[str, Any], tags: list[set[str]]) -> Iterator[Tensor]:
    """Every tensor, the ends first."""
    vocab, hidden = sizes.get("vocab"), sizes.get("hidden")
    ends = {"token_embd": (vocab, hidden), "output_norm": (hidden,), "output": (vocab, hidden)}
    for role, shape in ends.items():
        if role != "output" or not sizes.config.get("tie_word_embeddings", False):
            yield _tensor(role, shape, -1)
    n_experts = sizes.get("experts")
    for layer, own in enumerate(tags):
        roles = {role: tuple(map(sizes.get, shape)) for part in _parts(family, own) for role, shape in part.items()}
        yield from (_tensor(role, shape, layer) for role, shape in roles.items() if role not in _EXPERT_ROLES)
        for expert in range(n_experts):
            yield from (_tensor(role, roles[role], layer, expert) for role in _EXPERT_ROLES if role in roles)


def _parts(family: Mapping[str, Any], tags: set[str]) -> Iterator[dict[str, list[str]]]:
    parts = _read_data("families.yaml")["parts"]
    for wanted, names in family["layers"].items():
        if set(wanted.split()) <= tags:
            yield from (parts[name] for name in names)


def _tensor(role: str, shape: tuple[int, ...], layer: int, expert: int = -1) -> Tensor:
    return Tensor(name=role, role=role, layer=layer, expert=expert, shape=shape, dtype="BF16", file="", offset=0)


def layout_of_config(config: Config) -> Layout:
    """What memory beside the weights depends on, from a config.json.

    Latent attention (MLA) keeps one row of rank + rotary numbers per token and no values.  A layer with a sparse-attention indexer keeps
    its key of `index_head_dim` numbers besides, counted into `k`.  Gated delta layers hold a convolution window and a state matrix per head
    (llama-hparams.cpp, n_embd_r and n_embd_s).

    Raises:
        ModelError: the family is not known or a field is missing; names it.
    """
    config = text_config(config)
    family = _find_family(config)
    sizes = _Sizes(config, family.get("sizes", {}))
    tags = layer_tags(config, family)
    latent = family.get("cache") == "latent"
    roles = {role: shape for own in tags for part in _parts(family, own) for role, shape in part.items()}
    return Layout(
        caches=tuple(_cache(sizes, family, own) for own in tags),
        hidden_size=sizes.get("hidden"),
        n_heads=sizes.get("heads"),
        key_length=sizes.get("qk_nope_head_dim+qk_rope_head_dim" if latent else "head_size"),
        value_length=sizes.get("v_head_dim" if latent else "head_size"),
        vocab_size=sizes.get("vocab"),
        n_experts=sizes.get("experts"),
        top_k=sizes.get("top_k"),
        expert_size=sizes.get("expert_size"),
        gating=family.get("gating", "softmax"),
        renormalize=_renormalizes(config, family),
        scale=float(config.get("routed_scaling_factor") or 1.0),
        expert_bias="ffn_down_exps.bias" in roles,
        dense_layers=next((layer for layer, own in enumerate(tags) if "moe" in own), len(tags)),
        dense_size=sizes.get("dense_size") if "ffn_up" in roles else 0,
        shared_size=sizes.get("shared_size") if "ffn_up_shexp" in roles else 0,
        latent=sizes.get("kv_lora_rank") if latent else 0,
        q_latent=sizes.get("q_lora_rank") if "attn_q_a" in roles else 0,
    )


def _renormalizes(config: Config, family: Mapping[str, Any]) -> bool:
    """Whether gates of the chosen experts are divided by their sum."""
    rule = family["renormalize"]
    return rule == "always" or (rule != "never" and bool(config.get(rule)))


def _cache(sizes: _Sizes, family: Mapping[str, Any], tags: set[str]) -> Cache:
    if "linear" in tags:
        inner = sizes.get("linear_num_value_heads*linear_value_head_dim")
        window = inner + sizes.get("2*linear_num_key_heads*linear_key_head_dim")
        return Cache(state=(sizes.get("linear_conv_kernel_dim") - 1) * window + sizes.get("linear_key_head_dim") * inner)
    if family.get("cache") == "latent":
        has_indexer = any("indexer.attn_k" in part for part in _parts(family, tags))
        return Cache(k=sizes.get("kv_lora_rank+qk_rope_head_dim") + (sizes.get("index_head_dim") if has_indexer else 0))
    width = sizes.get("kv_heads*head_size")
    return Cache(k=width, v=width, window=sizes.get("sliding_window") if "window" in tags else 0)
