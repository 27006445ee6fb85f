"""This package reads a checkpoint folder or a bare config.json into a Model, which holds every tensor's role, shape and place."""

from edgemoe.base.lazy import offer

_OFFERED = {
    "inspect_model": "inspect",
    "list_shapes": "describe",
    "load_shape": "describe",
    "read_tensor": "checkpoint",
    "resolve_source": "inspect",
}
__all__ = list(_OFFERED)
__getattr__ = offer(__name__, _OFFERED)
