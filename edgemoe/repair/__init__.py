"""A Plan -> new weights: survivors make up for dropped experts, and every matrix is rounded with all errors before it in view."""

from edgemoe.base.lazy import offer

_OFFERED = {
    "narrow_experts": "width",
    "plan_quantization": "quantize_layer",
    "repair_survivors": "survivors",
}
__all__ = list(_OFFERED)
__getattr__ = offer(__name__, _OFFERED)
