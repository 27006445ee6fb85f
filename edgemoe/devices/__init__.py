"""This package knows boxes and this machine: the memory of a process, the speed of decoding, and missing software."""

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
