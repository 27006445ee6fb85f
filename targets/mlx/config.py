"""This module writes the config.json and the index of an MLX folder."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from edgemoe import __version__
from edgemoe.ir import Model, Plan, Stats
from edgemoe.model.config import EXPERT_FIELDS
from edgemoe.targets.mlx.formats import FORMATS
from edgemoe.targets.mlx.names import module_of, tensor_names

FLOATS = {"f16": "float16", "bf16": "bfloat16"}
# Fields that loaders or transformers would misread: code that is not in the folder, the old type, and the place of rope_theta.
LEFT_OUT = ("auto_map", "dtype", "quantization_config", "rope_parameters")
ROUTERS = ("ffn_gate_inp", "ffn_gate_inp_shexp")  # matrices without a format, which mlx_lm could quantize
# What mlx_lm's classes want even where transformers has defaults.
DEFAULTS: Mapping[str, Any] = {
    "decoder_sparse_step": 1,
    "mlp_only_layers": [],
    "n_group": 1,
    "topk_group": 1,
    "first_k_dense_replace": 0,
    "attention_bias": False,
}
ENTRY = {"group_size": 64, "bits": 4, "mode": "affine"}  # for modules without an entry, of which there are none


def make_config(model: Model, stats: Stats, plan: Plan, dtype: str) -> dict[str, Any]:
    """The checkpoint's config.json for mlx_lm, with the format of every module and the plan's provenance.

    Older versions of mlx_lm infer no widths, so every module that could be quantized has an entry, and its mode is always said.
    """
    attention, router = model.attention, model.router
    config = {key: value for key, value in model.config.items() if key not in LEFT_OUT}
    config |= dict.fromkeys(EXPERT_FIELDS, plan.count)  # each class has its own name for it, and ignores the others
    config |= {key: value for key, value in DEFAULTS.items() if config.get(key) is None}
    config |= {
        "num_experts_per_tok": model.top_k,
        "torch_dtype": FLOATS[dtype],
        "rope_theta": attention.rope_theta,
        "rope_scaling": None,
        "head_dim": attention.key_length,
        "num_key_value_heads": attention.kv_heads,
        "partial_rotary_factor": attention.rotary / attention.key_length,
        "max_position_embeddings": model.context_length,
        "rms_norm_eps": model.norm_eps,
        "norm_topk_prob": router.renormalize,
        "routed_scaling_factor": router.scale,
        "tie_word_embeddings": model.is_tied,
        "use_qk_norm": any(tensor.role == "attn_q_norm" for tensor in model.tensors),
    }
    config["quantization"] = config["quantization_config"] = {**ENTRY, **module_entries(model, plan)}
    kept = [["1" if e in plan.kept_of.get(layer, ()) else "0" for e in range(model.n_experts)] for layer in range(model.n_layers)]
    config["edgemoe"] = {
        "version": __version__,
        "model": model.fingerprint,
        "stats": stats.key,
        "costs": plan.costs,
        "experts_original": model.n_experts,
        "experts_kept": ["".join(row) for row in kept],
        "repaired": plan.repair,
        "predicted_kl": plan.predicted_kl,
        "budget": plan.budget,
    }
    return config


def module_entries(model: Model, plan: Plan) -> dict[str, Any]:
    """What `quantization` says of each module that has a matrix; routers and 16-bit modules are `false`."""
    names, found = tensor_names(model), dict[str, Any]()
    formats = {(unit.role, unit.layer): plan.formats[unit.name] for unit in plan.units}
    for tensor in model.tensors:
        name = names[tensor.role, tensor.layer]
        if tensor.planned or tensor.role in ROUTERS:
            kind = FORMATS[formats.get((tensor.role, tensor.layer), "F16")]
            found[module_of(name)] = {"group_size": kind.group, "bits": kind.bits, "mode": "affine"} if kind.group else False
    return found


def make_index(places: Mapping[str, str], total_size: int, total_parameters: int) -> dict[str, Any]:
    """The content of model.safetensors.index.json: the file of each tensor, and the sums that the hub shows."""
    return {"metadata": {"total_size": total_size, "total_parameters": total_parameters}, "weight_map": dict(sorted(places.items()))}
