"""This module solves a PuLP problem by HiGHS or CBC, and returns an exact status and the proven bound.

PuLP hands a model to HiGHS column by column, which takes 50 microseconds each.  This module hands it over as a whole (HiGHS's passModel),
with a known solution as a start.  PuLP reports a time-limited or failed solve with all values 0.0, so callers must look at
`Outcome.solved`.
"""

from __future__ import annotations

import functools
import os
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np

from edgemoe.base.errors import MachineError

ENGINES = ("highs", "cbc")


@dataclass(frozen=True, slots=True)
class Outcome:
    """The end of a solve: `solved` says that the variables hold a feasible solution, `infeasible` that there is none."""

    solved: bool
    infeasible: bool
    bound: float  # of the objective; -inf if nothing was proven


def run(
    problem: Any,
    engine: str,
    *,
    gap: float = 0.0,
    mip: bool = True,
    start: Any = None,
    seconds: float | None = None,
    target: float | None = None,
) -> Outcome:
    """Solve a minimisation.

    Args:
        problem: a pulp.LpProblem.
        engine: "highs" or "cbc".
        gap: relative distance to the optimum at which to stop.
        mip: False for the linear relaxation.
        start: values of all variables in the order of `problem.variables()`, to start from (HiGHS).
        seconds: wall-clock limit.
        target: an objective at which to stop even if the gap is larger (HiGHS).

    Raises:
        MachineError: the engine is not installed.
    """
    import pulp

    with warnings.catch_warnings(), _silence():
        warnings.simplefilter("ignore", DeprecationWarning)  # PuLP 3.3 announces 4.0
        try:
            status = problem.solve(_make(engine, gap, mip=mip, start=start, seconds=seconds, target=target))
        except (KeyError, pulp.PulpSolverError):  # PuLP does not know the status, or the engine crashed
            return Outcome(solved=False, infeasible=False, bound=-np.inf)
    solved = problem.sol_status in (pulp.LpSolutionOptimal, pulp.LpSolutionIntegerFeasible) and status == pulp.LpStatusOptimal
    if not solved:
        # if CBC proved that no whole units fit, only the status says so
        nothing = problem.sol_status == pulp.LpSolutionInfeasible or (engine == "cbc" and status == pulp.LpStatusInfeasible)
        return Outcome(solved=False, infeasible=nothing, bound=-np.inf)
    value = float(problem.objective.value())
    if start is not None and engine == "highs" and _contradicts_itself(problem):
        return run(problem, engine, gap=gap, mip=mip, seconds=seconds, target=target)
    if engine == "highs":
        bound = float(problem.solverModel.getInfo().mip_dual_bound) + problem.objective.constant if mip else value
    else:  # CBC gives no bound; if it ended by itself, the gap that was asked for holds
        bound = value - gap * abs(value) if problem.sol_status == pulp.LpSolutionOptimal else -np.inf
    return Outcome(solved=True, infeasible=False, bound=bound)


def _contradicts_itself(problem: Any) -> bool:
    """Whether HiGHS reports an objective that its values do not have; with a start, highspy 1.16.0 does so on some tiny programs."""
    told = float(problem.solverModel.getInfo().objective_function_value)
    value = float(problem.objective.value()) - problem.objective.constant
    return bool(abs(told - value) > 1e-6 * max(1.0, abs(value)))


def is_available(engine: str) -> bool:
    """Whether an engine is installed."""
    return bool(_make(engine, 0.0, mip=True, start=None, seconds=None, check=False).available())


def _make(engine: str, gap: float, *, mip: bool, start: Any, seconds: float | None, target: float | None = None, check: bool = True) -> Any:
    import pulp

    if engine == "highs":
        extra = {} if target is None or not mip else {"objective_target": target}
        made = _fast_highs()(msg=False, mip=mip, threads=1, gapRel=gap, gapAbs=0.0, timeLimit=seconds, random_seed=0, **extra)
        made.start = start
    elif engine == "cbc":
        path = getattr(pulp.apis.PULP_CBC_CMD, "pulp_cbc_path", "cbc")  # the engine that PuLP 3 brings, else one on the PATH
        made = pulp.COIN_CMD(path=path, msg=False, mip=mip, threads=1, gapRel=gap, timeLimit=seconds)
    else:
        raise MachineError(f"solver {engine!r} is not known", hint=f"use {' or '.join(ENGINES)}")
    if check and not made.available():
        raise MachineError(f"the solver {engine} is not installed", hint="pip install highspy" if engine == "highs" else "install cbc")
    return made


@functools.cache
def _fast_highs() -> Any:
    """PuLP's HiGHS with the model handed over at once and an optional start."""
    import pulp

    try:
        import highspy
    except ImportError as error:
        raise MachineError("the solver highs is not installed", hint="pip install highspy") from error

    class FastHiGHS(pulp.HiGHS):  # type: ignore[misc]
        """HiGHS through passModel."""

        start: Any = None

        def buildSolverModel(self, lp: Any) -> None:
            """All columns and rows in one call."""
            variables, constraints = lp.variables(), lp.constraints() if callable(lp.constraints) else list(lp.constraints.values())
            for i, variable in enumerate(variables):
                variable.index = i
            model, infinite = highspy.HighsLp(), highspy.kHighsInf
            model.num_col_, model.num_row_ = len(variables), len(constraints)
            model.col_cost_ = np.array([lp.objective.get(v, 0.0) for v in variables], np.float64)
            model.col_lower_ = np.array([-infinite if v.lowBound is None else v.lowBound for v in variables], np.float64)
            model.col_upper_ = np.array([infinite if v.upBound is None else v.upBound for v in variables], np.float64)
            starts, index, value, lower, upper = [0], [], [], [], []
            for i, constraint in enumerate(constraints):
                constraint.index = i
                for variable, coefficient in constraint.items():
                    index.append(variable.index)
                    value.append(coefficient)
                starts.append(len(index))
                low, high = constraint.getLb(), constraint.getUb()
                lower.append(-infinite if low is None else low)
                upper.append(infinite if high is None else high)
            model.row_lower_, model.row_upper_ = np.array(lower, np.float64), np.array(upper, np.float64)
            model.a_matrix_.format_ = highspy.MatrixFormat.kRowwise
            model.a_matrix_.start_, model.a_matrix_.index_ = np.array(starts, np.int32), np.array(index, np.int32)
            model.a_matrix_.value_ = np.array(value, np.float64)
            if self.mip:
                kinds = {True: highspy.HighsVarType.kInteger, False: highspy.HighsVarType.kContinuous}
                model.integrality_ = [kinds[v.cat == pulp.LpInteger] for v in variables]
            if lp.solverModel.passModel(model) == highspy.HighsStatus.kError:
                raise MachineError("HiGHS refused the program", hint="please report this")

        def callSolver(self, lp: Any) -> None:
            """Run, from the start if there is one."""
            if self.start is not None:
                solution = highspy.HighsSolution()
                solution.col_value = [float(v) for v in self.start]
                lp.solverModel.setSolution(solution)
            lp.solverModel.run()

    return FastHiGHS


@contextmanager
def _silence() -> Iterator[None]:
    """Keep the solver's banner off stdout, which is for results."""
    sys.stdout.flush()
    saved, null = os.dup(1), os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(null, 1)
        yield
    finally:
        os.dup2(saved, 1)
        os.close(saved)
        os.close(null)
