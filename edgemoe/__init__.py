"""edgemoe: a Mixture-of-Experts checkpoint and a memory budget go in, the best model file that really fits comes out."""

from edgemoe.base.lazy import offer

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
__getattr__ = offer(__name__, _PUBLIC)
