"""The integer program of planning, and ways to solve it: PuLP with HiGHS or CBC, exhaustive search, and bounds by Lagrange prices."""

from edgemoe.base.lazy import offer

_OFFERED = {"Program": "program", "solve": "search"}
__all__ = list(_OFFERED)
__getattr__ = offer(__name__, _OFFERED)
