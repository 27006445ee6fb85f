"""This module lists the units of targets that store the experts of a layer as one stack for each projection."""

from __future__ import annotations

from edgemoe.ir import Model, Unit, tensor_name


def list_units(model: Model) -> list[Unit]:
    """The units that get a format, in file order: one for each matrix and one for each expert stack."""
    sizes: dict[tuple[str, int, int], int] = {}
    for tensor in model.tensors:
        if tensor.planned:
            key = tensor.role, tensor.layer, tensor.shape[1]
            sizes[key] = sizes.get(key, 0) + tensor.n_weights
    return [Unit(name=tensor_name(role, layer), role=role, layer=layer, n_weights=n, cols=c) for (role, layer, c), n in sizes.items()]
