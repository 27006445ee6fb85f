"""Model and texts -> Stats: what every expert receives and gives, whom the router chooses, and what probes of the model cost in nats."""

from edgemoe.base.lazy import offer

_OFFERED = {
    "collect_stats": "collect",
    "read_imatrix": "imatrix",
    "save_imported_stats": "imatrix",
}
__all__ = list(_OFFERED)
__getattr__ = offer(__name__, _OFFERED)
