"""A checkpoint folder, or a bare config.json -> a Model: every tensor with its role, shape and place, and how the layers are made."""

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
