"""This package runs an artifact in its real runtime, compares KL, bytes and peak memory with the promise, and makes a Report."""

from edgemoe.base.lazy import offer

_OFFERED = {
    "compare_logits": "logits",
    "verify_artifact": "artifact",
}
__all__ = list(_OFFERED)
__getattr__ = offer(__name__, _OFFERED)
