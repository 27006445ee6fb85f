"""edgemoe: a Mixture-of-Experts checkpoint and a memory budget go in, the best model file that really fits comes out."""

from __future__ import annotations

import importlib
from typing import Any

__version__ = "0.1.0"

_PUBLIC = {  # name -> module; imported when first used, so that `edgemoe --help` stays fast
    "BuildRequest": "pipeline",
    "build_artifact": "pipeline",
    "price_model": "pipeline",
    "inspect_model": "inspect",
    "collect_stats": "calibrate",
    "price_choices": "price",
    "solve_plan": "plan",
    "sweep_budgets": "sweep",
    "load_recipe": "recipe",
    "repair_survivors": "repair",
    "emit_artifact": "emit",
    "verify_artifact": "verify",
    "write_report": "report",
    "choose_texts": "texts",
    "find_target": "targets",
    "load_record": "storage",
    "save_record": "storage",
    "parse_bytes": "units",
    "EdgemoeError": "errors",
}
__all__ = ["__version__", *_PUBLIC]


def __getattr__(name: str) -> Any:
    """Import a public name when it is first asked for."""
    if name not in _PUBLIC:
        raise AttributeError(f"module 'edgemoe' has no attribute {name!r}")
    return getattr(importlib.import_module(f"edgemoe.{_PUBLIC[name]}"), name)


def __dir__() -> list[str]:
    """Public names."""
    return sorted(__all__)
