"""Boxes and this machine: which memory a process may hold, how fast it can decode, and what is missing to run a stage."""

from edgemoe.base.lazy import offer

_OFFERED = {
    "Device": "profiles",
    "detect_device": "detect",
    "estimate_speed": "profiles",
    "examine_machine": "doctor",
    "find_device": "profiles",
    "load_devices": "profiles",
}
__all__ = list(_OFFERED)
__getattr__ = offer(__name__, _OFFERED)
