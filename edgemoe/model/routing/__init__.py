"""This package holds the router's rule without torch: the choice when experts are dropped, kept sets, and the cost of changed choices."""

from edgemoe.base.lazy import offer

_OFFERED = {
    "build_menu": "kept_sets",
    "fit_flips": "flips",
    "make_replay": "kept_sets",
    "offered_counts": "kept_sets",
    "open_experts": "rule",
    "weigh_scores": "rule",
}
__all__ = list(_OFFERED)
__getattr__ = offer(__name__, _OFFERED)
