"""This package turns Costs, a budget and rules into a Plan: it solves the integer program and counts the answer's bytes again."""

from edgemoe.base.lazy import offer

_OFFERED = {
    "describe_plan": "explain",
    "diff_plans": "diff",
    "least_budget": "infeasible",
    "plan_preset": "presets",
    "solve_plan": "solve",
    "sweep_budgets": "sweep",
}
__all__ = list(_OFFERED)
__getattr__ = offer(__name__, _OFFERED)
