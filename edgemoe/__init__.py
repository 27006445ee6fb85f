"""edgemoe: a Mixture-of-Experts checkpoint and a memory budget go in, the best model file that really fits comes out."""

from __future__ import annotations

import importlib
from typing import Any

__version__ = "0.1.0"

_PUBLIC = {  # name -> module; imported when first used, so that `edgemoe --help` stays fast
    "BuildRequest": "pipeline.build",
    "build_artifact": "pipeline.build",
    "price_model": "pipeline.build",
    "inspect_model": "model.inspect",
    "collect_stats": "calibrate.collect",
    "price_choices": "price.choices",
    "solve_plan": "plan.solve",
    "sweep_budgets": "plan.sweep",
    "load_recipe": "rules.recipe",
    "repair_survivors": "repair.survivors",
    "emit_artifact": "pipeline.emit",
    "verify_artifact": "verify.artifact",
    "write_report": "report.page",
    "choose_texts": "stream.texts",
    "find_target": "targets",
    "load_record": "base.storage",
    "save_record": "base.storage",
    "parse_bytes": "base.units",
    "EdgemoeError": "base.errors",
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
