"""This package runs a Model on texts and collects Stats: inputs and outputs of every expert, routing choices, and the KL of probes."""

from edgemoe.base.lazy import offer

_OFFERED = {
    "collect_stats": "collect",
    "read_imatrix": "imatrix",
    "save_imported_stats": "imatrix",
}
__all__ = list(_OFFERED)
__getattr__ = offer(__name__, _OFFERED)
