"""This module writes the key-values that llama.cpp reads of a Model: common keys, the keys of its block kinds, and its family's own."""

from __future__ import annotations

from typing import Any

import gguf
import numpy as np

from edgemoe import __version__
from edgemoe.ir import Model, Plan, Router, Stats
from edgemoe.model.config import Config
from edgemoe.model.families import Family

NO_HASH = "0" * 64


def add_shape(writer: Any, model: Model, count: int) -> None:
    """Add sizes, heads and rotary frequencies of a model that keeps `count` experts in each layer."""
    heads = model.attention
    writer.add_context_length(model.context_length)
    writer.add_embedding_length(model.hidden_size)
    writer.add_block_count(model.n_layers)
    writer.add_head_count(heads.heads)
    writer.add_head_count_kv(heads.kv_heads)
    writer.add_key_length(heads.key_length)
    writer.add_value_length(heads.value_length)
    writer.add_rope_dimension_count(heads.rotary)
    writer.add_rope_freq_base(heads.rope_theta)
    writer.add_layer_norm_rms_eps(model.norm_eps)
    writer.add_vocab_size(model.vocab_size)
    writer.add_expert_count(count)
    writer.add_expert_used_count(model.top_k)
    _add_router(writer, model.router)


def _add_router(writer: Any, router: Router) -> None:
    """Add the router's rule, unless it is the softmax that llama.cpp assumes."""
    if router.scoring == "sigmoid":
        writer.add_expert_gating_func(gguf.ExpertGatingFuncType.SIGMOID)
        writer.add_expert_weights_norm(router.renormalize)
        writer.add_expert_weights_scale(router.scale)
        if router.groups > 1:
            writer.add_expert_group_count(router.groups)
            writer.add_expert_group_used_count(router.top_groups)


def add_own_keys(writer: Any, model: Model, family: Family) -> None:
    """Add the further keys of one architecture."""
    for key, value in family.gguf_keys(Config(model.config)).items():
        writer.add_uint32(f"{family.gguf}.{key}", value)


def add_provenance(writer: Any, model: Model, stats: Stats | None, plan: Plan | None, n_units: int) -> None:
    """Add the file's origin, and the expert map with one flag per (layer, expert), so that the length never changes."""
    kept = np.zeros((model.n_layers, model.n_experts), bool)
    for layer, experts in (plan.kept_of if plan else {}).items():
        kept[layer, list(experts)] = True
    writer.add_string("edgemoe.version", __version__)
    writer.add_string("edgemoe.model", model.fingerprint)
    writer.add_string("edgemoe.stats", stats.key if stats else NO_HASH)
    writer.add_string("edgemoe.costs", plan.costs if plan else NO_HASH)
    writer.add_uint32("edgemoe.expert_count_original", model.n_experts)
    if model.top_k != model.own_top_k:
        writer.add_uint32("edgemoe.expert_used_count_original", model.own_top_k)
    writer.add_array("edgemoe.experts_kept", [bool(flag) for flag in kept.ravel()])
    writer.add_bool("edgemoe.repaired", plan.repair if plan else False)
    writer.add_float64("edgemoe.predicted_kl", plan.predicted_kl if plan else 0.0)
    writer.add_uint64("edgemoe.budget", plan.budget if plan else 0)
    writer.add_uint32("quantize.imatrix.entries_count", n_units)
    writer.add_uint32("quantize.imatrix.chunks_count", 0 if stats is None else sum(d.tokens for d in stats.domains) // 512)
