"""This module checks the fields of a config.json when they are read, and names a wrong one."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from edgemoe.base.errors import ModelError

# LLAMA_MAX_LAYERS and LLAMA_MAX_EXPERTS of llama.cpp 0c1e570 (src/llama-hparams.h)
EXPERT_FIELDS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")
LARGEST = {"num_hidden_layers": 512} | dict.fromkeys(EXPERT_FIELDS, 1024)
ANY = 2**24  # no count in a config is larger
MOST = 2**53  # no number is
ROPE_NUMBERS = ("rope_theta", "partial_rotary_factor", "factor", "original_max_position_embeddings")
# Fields that decide what a model computes, by what they hold.  No other reaches transformers, which refuses values that it never uses.
FIELDS = {
    "a text": "model_type hidden_act",
    "true or false": "attention_bias qkv_bias use_qk_norm tie_word_embeddings norm_topk_prob use_sliding_window",
    "a number": "rms_norm_eps rope_theta partial_rotary_factor routed_scaling_factor clip_qkv",
    "a list": "mlp_only_layers mlp_layer_types layer_types",
    "a number or a list": "moe_layer_freq",
    "an object": "rope_parameters rope_scaling",
    "a whole number": "vocab_size hidden_size intermediate_size moe_intermediate_size shared_expert_intermediate_size num_hidden_layers"
    " num_attention_heads num_key_value_heads head_dim max_position_embeddings num_experts num_local_experts n_routed_experts"
    " n_shared_experts num_experts_per_tok n_group topk_group first_k_dense_replace decoder_sparse_step moe_layer_interval"
    " moe_layer_start_index full_attention_interval max_window_layers sliding_window",
}
_TYPES: dict[str, tuple[type, ...]] = {
    "a text": (str,),
    "true or false": (bool,),
    "a number": (int, float),
    "a list": (list,),
    "a number or a list": (int, list),
    "an object": (dict,),
    "a whole number": (int,),
}


def inference_fields(values: Mapping[str, Any], where: str = "config.json") -> dict[str, Any]:
    """The fields of a config that decide what the model computes; null is no value, and numbers that may have a fraction are floats.

    Raises:
        ModelError: a field holds something else than it should; the message names it.
    """
    found: dict[str, Any] = {}
    for kind, names in FIELDS.items():
        for name in names.split():
            if (value := values.get(name)) is not None:
                _check_kind(f"{where}: {name}", kind, value)
                found[name] = float(value) if kind == "a number" else value
    for outer in ("rope_parameters", "rope_scaling"):
        for name in ROPE_NUMBERS:
            if (value := found.get(outer, {}).get(name)) is not None:
                _check_kind(f"{where}: {outer}.{name}", "a number", value)
    return found


def _check_kind(place: str, kind: str, value: Any) -> None:
    wrong = not isinstance(value, _TYPES[kind]) or (isinstance(value, bool) and kind != "true or false")
    if wrong or (isinstance(value, int | float) and not abs(value) <= MOST):  # NaN too
        raise ModelError(f"{place} is {str(value)[:80]!r}, expected {kind}")
    if isinstance(value, list) and not all(isinstance(entry, str | int) for entry in value):
        raise ModelError(f"{place} holds what is neither a text nor a whole number")


class Config:
    """The fields of a config.json; `where` is the file that errors name."""

    def __init__(self, values: Mapping[str, Any], where: str = "config.json") -> None:
        self.values, self.where = values, where

    def __getitem__(self, name: str) -> int:
        """A positive integer.

        Raises:
            ModelError: it is missing, or no such number.
        """
        value, most = self.values.get(name), LARGEST.get(name, ANY)
        if value is None:
            raise ModelError(f"{self.where}: {name} is missing")
        if isinstance(value, bool) or not isinstance(value, int) or not 0 < value <= most:
            raise ModelError(f"{self.where}: {name} is {value!r}, expected a positive integer of at most {most}")
        return value

    def first(self, *names: str) -> int:
        """The first of these fields that is set, which must be a positive integer.

        Raises:
            ModelError: none is set, or it is no such number.
        """
        for name in names:
            if self.values.get(name) is not None:
                return self[name]
        raise ModelError(f"{self.where}: {' / '.join(names)} is missing")

    def get(self, name: str, default: Any = None) -> Any:
        """Any field, unchecked; the default if the field is missing or null."""
        value = self.values.get(name)
        return default if value is None else value

    def nth(self, name: str, n: int, default: Any) -> Any:
        """Entry n of a list field; the default where there is none."""
        values = self.values.get(name)
        return values[n] if isinstance(values, list) and n < len(values) else default

    @property
    def experts(self) -> int:
        """Routed experts of a layer."""
        return self.first(*EXPERT_FIELDS)

    @property
    def top_k(self) -> int:
        """Experts that the router picks."""
        return self.first("num_experts_per_tok", "moe_k")

    @property
    def heads(self) -> int:
        """Attention heads."""
        return self["num_attention_heads"]

    @property
    def kv_heads(self) -> int:
        """Heads of keys and values; null means as many as of queries, as in transformers."""
        same = "num_key_value_heads" in self.values and self.values["num_key_value_heads"] is None
        return self.heads if same else self["num_key_value_heads"]

    @property
    def head_size(self) -> int:
        """Numbers of one head."""
        return self["hidden_size"] // self.heads if self.values.get("head_dim") is None else self["head_dim"]
