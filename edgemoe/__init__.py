"""edgemoe: a Mixture-of-Experts checkpoint and a memory budget go in, the best model file that really fits comes out."""

from edgemoe.base.lazy import offer

__version__ = "0.1.0"

_PUBLIC = {  # name -> module; imported when first used, so that `edgemoe --help` stays fast
    "BuildRequest": "pipeline.build",
    "EdgemoeError": "base.errors",
    "build_artifact": "pipeline.build",
    "choose_texts": "stream.texts",
    "collect_stats": "calibrate.collect",
    "emit_artifact": "pipeline.emit",
    "find_target": "targets",
    "inspect_model": "model.inspect",
    "load_recipe": "rules.recipe",
    "load_record": "base.storage",
    "parse_bytes": "base.units",
    "price_choices": "price.choices",
    "price_model": "pipeline.build",
    "repair_survivors": "repair.survivors",
    "save_record": "base.storage",
    "solve_plan": "plan.solve",
    "sweep_budgets": "plan.sweep",
    "verify_artifact": "verify.artifact",
    "write_report": "report.page",
}
__all__ = [*_PUBLIC, "__version__"]
__getattr__ = offer(__name__, _PUBLIC)
