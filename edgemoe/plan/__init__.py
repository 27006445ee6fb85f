"""Costs, a budget and rules -> a Plan: the integer program is built, solved and proven, and every byte of the answer is counted again."""

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
