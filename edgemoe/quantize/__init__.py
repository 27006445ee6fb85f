"""Rounding that belongs to no file format: importance of columns, feedback of errors on the Hessian of the inputs, compiled loops."""

from edgemoe.base.lazy import offer

_OFFERED = {
    "descend_columns": "gptq",
    "descend_outputs": "gptq",
    "factor_hessian": "gptq",
    "importance_of": "importance",
    "round_to_nearest": "reference",
}
__all__ = list(_OFFERED)
__getattr__ = offer(__name__, _OFFERED)
