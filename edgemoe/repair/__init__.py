"""This package turns a Plan into new weights: kept experts make up for dropped ones, and each rounding makes up for earlier errors."""

from edgemoe.base.lazy import offer

_OFFERED = {
    "narrow_experts": "width",
    "plan_quantization": "quantize_layer",
    "repair_survivors": "survivors",
}
__all__ = list(_OFFERED)
__getattr__ = offer(__name__, _OFFERED)
