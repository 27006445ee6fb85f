"""This package holds rounding that belongs to no file format: importance of columns, error feedback on a Hessian, compiled loops."""

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
