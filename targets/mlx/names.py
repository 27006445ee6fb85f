"""This module names tensors as mlx_lm's classes do after `sanitize`, and refuses families and configs that it has no class for."""

from __future__ import annotations

from edgemoe.base.errors import ModelError
from edgemoe.ir import Model
from edgemoe.ir.model import is_stack
from edgemoe.model.config import Config
from edgemoe.model.describe import list_tensors
from edgemoe.model.families import Family, find_shape, load_families


def check_family(model: Model) -> Family:
    """The family of a model that mlx_lm can load.

    Raises:
        ModelError: mlx_lm has no such class, or its class would not load this config; names the field.
    """
    family, where = find_shape(model.model_type), f"{model.folder or model.name}/config.json"
    if not family.mlx_stacks:
        known = sorted(name for name, each in load_families().items() if each.mlx_stacks)
        raise ModelError(f"{where}: model_type {model.model_type!r} cannot be written for MLX", hint=f"known: {', '.join(known)}")
    reason = family.mlx_refuse(Config(model.config))
    if reason:
        raise ModelError(f"{where}: {reason}", hint="use --target gguf")
    return family


def tensor_names(model: Model) -> dict[tuple[str, int], str]:
    """The name of each tensor by (role, layer): that of the checkpoint, but for the experts, of which each projection is one stack.

    Raises:
        ModelError: as `check_family`.
    """
    family = check_family(model)
    found: dict[tuple[str, int], str] = {}
    for spec, tensor in list_tensors(family, Config(model.config)):
        prefix = f"model.layers.{tensor.layer}." if tensor.layer >= 0 else ""
        name = f"{family.mlx_stacks}.{spec.role.split('_')[1]}_proj.weight" if is_stack(spec.role) else spec.names[0]
        found[spec.role, tensor.layer] = prefix + name
    if not model.is_tied:
        found["output", -1] = "lm_head.weight"  # of a checkpoint that says it is tied, but holds another matrix
    return found


def module_of(name: str) -> str:
    """The module that owns a weight."""
    return name.removesuffix(".weight")
