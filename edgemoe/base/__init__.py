"""This package holds what all others use: the exception tree, records and arrays on disk, work folders, sizes, threads, progress."""

from edgemoe.base.lazy import offer

_OFFERED = {
    "BudgetError": "errors",
    "ConflictError": "errors",
    "EdgemoeError": "errors",
    "MachineError": "errors",
    "ModelError": "errors",
    "UsageError": "errors",
    "VerifyError": "errors",
    "format_bytes": "units",
    "hash_file": "storage",
    "load_record": "storage",
    "parse_bytes": "units",
    "save_record": "storage",
}
__all__ = list(_OFFERED)
__getattr__ = offer(__name__, _OFFERED)
