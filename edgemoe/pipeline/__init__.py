"""This package runs the stages in their order, from the user's request to the folder with the finished artifact."""

from edgemoe.base.lazy import offer

_OFFERED = {
    "BuildRequest": "request",
    "build_artifact": "build",
    "emit_artifact": "emit",
    "estimate_needs": "estimate",
    "price_model": "build",
}
__all__ = list(_OFFERED)
__getattr__ = offer(__name__, _OFFERED)
