"""MLX folders of plans made by hand, what stock mlx_lm makes of them, and the checkpoints that they decode to."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from tiny import flat_plan, flat_stats, slice_experts

from edgemoe.base.types import F32
from edgemoe.ir import Artifact, Plan, Unit
from edgemoe.model.config import Config
from edgemoe.model.families import find_family
from edgemoe.model.inspect import inspect_model
from edgemoe.targets import find_target
from edgemoe.targets.mlx.reader import read_values

KINDS = ("INT2_64", "INT3_128", "INT4_64", "INT5_128", "INT6_64", "INT8_128", "F16")
hand_plan = partial(flat_plan, target="mlx-f16")


def mixed(unit: Unit) -> str:
    """Another format for every module."""
    return KINDS[sum(unit.name.encode()) % len(KINDS)]


def write_folder(
    source: Path,
    out: Path,
    choose: Callable[[Unit], str] | str = mixed,
    kept: Sequence[Sequence[int]] | None = None,
    *,
    target: str = "mlx-f16",
    shard_max: int = 0,
) -> tuple[Plan, Artifact]:
    """Write a checkpoint as a plan that nobody solved says."""
    model, to = inspect_model(source), find_target(target)
    plan = replace(flat_plan(model, choose, kept, target), context=model.context_length)
    out.mkdir(parents=True)
    return plan, to.write(model, flat_stats(model, out.with_name(out.name + "-stats"), seed=3), plan, out, shard_max, None)


def stock_logits(folder: Path, ids: Sequence[int]) -> F32:
    """Logits of stock mlx_lm with float32 activations, from a strict load."""
    import mlx.core as mx
    from mlx.utils import tree_map
    from mlx_lm.utils import load_model

    model, _ = load_model(folder, strict=True)
    model.update(tree_map(lambda a: a.astype(mx.float32) if mx.issubdtype(a.dtype, mx.floating) else a, model.parameters()))
    return np.array(model(mx.array([list(ids)]))[0])


def decoded_checkpoint(source: Path, folder: Path, kept: Sequence[Sequence[int]], out: Path) -> Path:
    """The checkpoint in float32 whose weights are those that our own reader finds in an MLX folder."""
    slice_experts(source, kept, out)
    config = json.loads((out / "config.json").read_text())
    values = {name: torch.from_numpy(np.ascontiguousarray(value)) for name, value in read_values(folder)}
    weights: dict[str, torch.Tensor] = {}
    for layer in range(config["num_hidden_layers"]):
        weights |= _layer_weights(config, layer, values)
    outer = {name: value for name, value in values.items() if not name.startswith("model.layers.")}
    save_file({**outer, **weights}, out / "model.safetensors", metadata={"format": "pt"})
    return out


def _layer_weights(config: Mapping[str, Any], layer: int, values: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """A layer's weights by the checkpoint's names; a stack becomes its experts."""
    family, prefix, found = find_family(config["model_type"]), f"model.layers.{layer}.", dict[str, torch.Tensor]()
    for block in family.layer(Config(config), layer):
        for spec in block.specs:
            if spec.role.endswith("_exps"):
                projection = spec.role.split("_")[1]
                stack = values[f"{prefix}{family.mlx_stacks}.{projection}_proj.weight"]
                found |= {prefix + spec.names[0].format(expert=e): part.clone() for e, part in enumerate(stack)}
            else:
                found[prefix + spec.names[0]] = values[prefix + spec.names[0]]
    return found
