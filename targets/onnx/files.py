"""This module writes the small files beside an ONNX graph, so that each runtime finds the folder that it expects.

Two layouts hold the same graph.  "onnx" puts model.onnx and model.onnx.data side by side, for ONNX Runtime, onnxruntime-genai and
onnxruntime-web.  "transformers.js" puts both under onnx/ with the names that this library expects.  Bytes depend on checkpoint and plan
alone.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from edgemoe.base.errors import MachineError, ModelError, UsageError
from edgemoe.ir import Model, Plan
from edgemoe.targets.copied_files import dump_json, read_copied

# For each layout, the graph and its weights, relative to the folder.  The graph's `location` is the second name without its directory.
# transformers.js 4.3.1 takes the data file's name from the graph's: "model.onnx" + "_data".
PLACES = {"onnx": ("model.onnx", "model.onnx.data"), "transformers.js": ("onnx/model.onnx", "onnx/model.onnx_data")}
# Bit widths that a layout's runtimes cannot run: QMoE in wasm refuses 3 bits ("must be 2, 4, or 8"; onnxruntime-web 1.30 and 1.31-dev).
REFUSED_BITS = {"onnx": (), "transformers.js": (3,)}
# transformers.js 4.3.1 learns from `model_type` which keys hold the shape of the cache, and refuses types that it does not list ("mixtral",
# "olmoe").  The graph needs nothing else from the field, so all our families use this type, which has the same keys.
TRANSFORMERS_JS_TYPE = "qwen3_moe"
# genai's own defaults of what a generation_config.json may set (models/builders/base.py of onnxruntime-genai 0.18).
SEARCH = {
    "do_sample": False,
    "temperature": 1.0,
    "top_k": 50,
    "top_p": 1.0,
    "repetition_penalty": 1.0,
}


def allowed(name: str, layout: str) -> bool:
    """Whether a format ("INT4_32", "F32") runs in every runtime that a layout is for."""
    return not any(name.startswith(f"INT{bits}_") for bits in REFUSED_BITS[_check_name(layout)])


def check_layout(formats: Iterable[str], layout: str) -> None:
    """Refuse a plan's formats that the layout's runtimes cannot run.

    Raises:
        UsageError: the layout is unknown, or its runtimes have no kernel for a bit width.
    """
    refused = sorted({name for name in formats if not allowed(name, layout)})
    if refused:
        raise UsageError(
            f"the plan stores tensors as {', '.join(refused)}: the wasm runtime behind layout {layout!r} has no kernel for 3 bits",
            hint="make the plan with --target browser",
        )


def _check_name(layout: str) -> str:
    if layout not in PLACES:
        raise UsageError(f"layout {layout!r} is not known", hint=f"known: {', '.join(PLACES)}")
    return layout


def write_sidecars(model: Model, plan: Plan, folder: Path, layout: str = "onnx") -> list[str]:
    """Write everything beside the graph: configs and tokenizer.

    Args:
        model: whose folder the files come from.
        plan: with the kept experts and the planned context.
        folder: where the graph lies, or will lie, as `PLACES` says; must exist.
        layout: a name in `PLACES`.

    Returns:
        The names written, sorted.

    Raises:
        UsageError: the layout is unknown, or the plan has a bit width that it cannot run.
        ModelError: a file of the checkpoint is too large, is no JSON, or leads out of the folder.
        MachineError: the disk is full or not writable.
    """
    check_layout(plan.formats.values(), layout)
    files = read_copied(Path(model.folder))
    generation = json.loads(files.get("generation_config.json", b"{}"))
    files["config.json"] = dump_json(make_config(model, plan, layout))
    files["genai_config.json"] = dump_json(make_genai_config(model, generation, plan.context, layout))
    try:
        for name, data in files.items():
            (folder / name).write_bytes(data)
    except OSError as error:
        raise MachineError(f"{folder}: {error.strerror or error}", hint="free some space, or choose another folder") from error
    return sorted(files)


def make_config(model: Model, plan: Plan, layout: str = "onnx") -> dict[str, Any]:
    """The checkpoint's config.json, changed to describe the compressed model.

    If layers keep different numbers of experts, the expert count is that of the fullest layer, and `edgemoe` says how many each layer has.
    The type of values is float32, because the graph computes in float32 for every checkpoint.  `auto_map` is removed, because it would send
    loaders to code that is not in the folder.  In the layout of transformers.js, `model_type` is a type that this library knows, and
    `edgemoe` has the true one.
    """
    config = {key: value for key, value in model.config.items() if key not in ("auto_map", "dtype", "torch_dtype", "quantization_config")}
    counts = [len(kept) for kept in plan.kept]
    config |= {key: plan.count for key in ("num_experts", "num_local_experts", "n_routed_experts") if key in config}
    config |= {"num_experts_per_tok": min(model.top_k, plan.count), "torch_dtype": "float32"}
    config["edgemoe"] = {"experts_original": model.n_experts}
    if not plan.has_one_count:
        config["edgemoe"]["experts_per_layer"] = counts
    if layout == "transformers.js":
        config["transformers.js_config"] = {"dtype": "fp32", "use_external_data_format": True}
        config["edgemoe"]["model_type"] = model.model_type
        config |= {
            "model_type": TRANSFORMERS_JS_TYPE,
            "head_dim": model.attention.key_length,
            "num_key_value_heads": model.attention.kv_heads,
        }
    return config


def make_genai_config(model: Model, generation: Mapping[str, Any], context: int, layout: str = "onnx") -> dict[str, Any]:
    """The configuration of onnxruntime-genai; its type "decoder" is for graphs that the library need not recognize.

    The library allocates the cache of `max_length` tokens at once (`past_present_share_buffer`), so this is the planned context; a user may
    set more if there is memory for it.

    Args:
        model: with its shape, and its special tokens if `generation` has none.
        generation: of generation_config.json, may be empty.
        context: the planned context in tokens.
        layout: says where the graph lies.
    """
    ids = {key: _token_ids(model, generation, f"{key}_token_id") for key in ("bos", "eos", "pad")}
    special: dict[str, Any] = {f"{key}_token_id": found[0] if len(found) == 1 else found for key, found in ids.items() if found}
    if ids["eos"]:
        special.setdefault("pad_token_id", ids["eos"][0])
    decoder = {
        "session_options": {"log_id": "onnxruntime-genai", "provider_options": []},
        "filename": PLACES[layout][0],
        "head_size": model.attention.key_length,
        "hidden_size": model.hidden_size,
        "num_attention_heads": model.attention.heads,
        "num_hidden_layers": model.n_layers,
        "num_key_value_heads": model.attention.kv_heads,
        "inputs": {
            "input_ids": "input_ids",
            "attention_mask": "attention_mask",
            "past_key_names": "past_key_values.%d.key",
            "past_value_names": "past_key_values.%d.value",
        },
        "outputs": {"logits": "logits", "present_key_names": "present.%d.key", "present_value_names": "present.%d.value"},
    }
    search = {key: _setting(model, generation, key, default) for key, default in SEARCH.items()}
    search |= {"max_length": min(context, model.context_length), "past_present_share_buffer": True}
    described = {"type": "decoder", "context_length": model.context_length, "vocab_size": model.vocab_size, "decoder": decoder}
    return {"model": described | special, "search": search}


def _token_ids(model: Model, generation: Mapping[str, Any], key: str) -> list[int]:
    """The ids of a special token, from generation_config.json or else config.json.

    Raises:
        ModelError: an id that the embedding has no row for.
    """
    for name, values in (("generation_config.json", generation), ("config.json", model.config)):
        value = values.get(key)
        found = value if isinstance(value, list) else [] if value is None else [value]
        for token in found:
            if isinstance(token, bool) or not isinstance(token, int) or token >= model.vocab_size:
                raise ModelError(f"{Path(model.folder) / name}: {key} is {token!r}, which is no token of {model.vocab_size}")
        if known := [token for token in found if token >= 0]:  # -1 means none
            return known
    return []


def _setting(model: Model, generation: Mapping[str, Any], key: str, default: float) -> float:
    """A number or flag of generation_config.json, or genai's own default."""
    value = generation.get(key)
    if value is None:
        return default
    if isinstance(value, bool) != isinstance(default, bool) or not isinstance(value, int | float):
        raise ModelError(f"{Path(model.folder) / 'generation_config.json'}: {key} is {value!r}, expected such a value as {default!r}")
    return value
