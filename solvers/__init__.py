"""This package defines the integer program of planning and solves it: PuLP with HiGHS or CBC, exhaustive search, Lagrangian bounds."""

from edgemoe.base.lazy import offer

_OFFERED = {"Program": "program", "solve": "search"}
__all__ = list(_OFFERED)
__getattr__ = offer(__name__, _OFFERED)
