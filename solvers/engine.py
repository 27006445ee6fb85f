"""This module solves a PuLP problem by HiGHS or CBC, and returns an exact status and the proven bound.

PuLP hands a model to HiGHS column by column, which takes 50 microseconds each, and solves it in this process, where some programs run into
a loop that nothing can end.  This module hands it over as a whole, to a process that can be ended (highs.py).  PuLP reports a
time-limited or failed solve with all values 0.0, so callers must look at `Outcome.solved`.
"""

from __future__ import annotations

import functools
import os
import subprocess
import sys
import traceback
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np

from edgemoe.base.errors import MachineError
from edgemoe.solvers import highs
from edgemoe.solvers.effort import Effort

ENGINES = ("highs", "cbc")
_PROVEN = ("kInfeasible", "kUnboundedOrInfeasible")  # HiGHS's model statuses; no program here is unbounded


@dataclass(frozen=True, slots=True)
class Outcome:
    """The end of a solve: `solved` says that the variables hold a feasible solution, `infeasible` that there is none."""

    solved: bool
    infeasible: bool
    bound: float  # of the objective; -inf if nothing was proven


def run(problem: Any, effort: Effort, *, mip: bool = True, target: float | None = None) -> Outcome:
    """Solve a minimisation.

    Args:
        problem: a pulp.LpProblem.
        effort: engine, relative distance to the optimum at which to stop, and time limit.
        mip: False for the linear relaxation.
        target: an objective at which to stop even if the gap is larger (HiGHS).

    Raises:
        MachineError: the engine is not installed.
    """
    if effort.solver == "highs":
        return _run_highs(problem, effort, mip=mip, target=target)
    import pulp

    made = _make_cbc(effort, mip=mip)
    with warnings.catch_warnings(), _silence(), TemporaryDirectory() as folder:
        warnings.simplefilter("ignore", DeprecationWarning)  # PuLP 3.3 announces 4.0
        made.tmpDir = folder
        try:
            status = problem.solve(made)
        except (KeyError, pulp.PulpSolverError):  # PuLP does not know the status, or the engine crashed
            return Outcome(solved=False, infeasible=False, bound=-np.inf)
        except BaseException as error:  # PuLP leaves its child running
            for frame, _ in traceback.walk_tb(error.__traceback__):
                child = frame.f_locals.get("cbc")
                if isinstance(child, subprocess.Popen):
                    child.kill()
                    child.wait()
            raise
    solved = problem.sol_status in (pulp.LpSolutionOptimal, pulp.LpSolutionIntegerFeasible) and status == pulp.LpStatusOptimal
    if not solved:  # if CBC proved that no whole units fit, only the status says so
        nothing = pulp.LpSolutionInfeasible == problem.sol_status or status == pulp.LpStatusInfeasible
        return Outcome(solved=False, infeasible=nothing, bound=-np.inf)
    value = float(problem.objective.value())  # CBC gives no bound; if it ended by itself, the gap that was asked for holds
    ended = problem.sol_status == pulp.LpSolutionOptimal
    return Outcome(solved=True, infeasible=False, bound=value - effort.gap * abs(value) if ended else -np.inf)


def _run_highs(problem: Any, effort: Effort, *, mip: bool, target: float | None) -> Outcome:
    options: dict[str, float] = {"mip_rel_gap": effort.gap, "mip_abs_gap": 0.0}
    options |= {} if effort.seconds is None else {"time_limit": effort.seconds}
    options |= {} if target is None or not mip else {"objective_target": target}
    found = highs.solve({**_arrays_of(problem, mip=mip), "options": options}, effort.seconds, effort.watch)
    if found.status == "refused":
        raise MachineError("HiGHS refused the program", hint="please report this")
    if found.status in _PROVEN:
        return Outcome(solved=False, infeasible=True, bound=-np.inf)
    constant = float(problem.objective.constant)
    bound = found.bound + constant if mip else -np.inf
    if found.values is None or not len(found.values) or not np.isfinite(found.objective) or (not mip and found.status != "kOptimal"):
        return Outcome(solved=False, infeasible=False, bound=bound)
    for variable, value in zip(problem.variables(), found.values.tolist(), strict=True):
        variable.varValue = value
    if found.duals is not None:
        for constraint, dual in zip(_constraints(problem), found.duals.tolist(), strict=True):
            constraint.pi = dual
    return Outcome(solved=True, infeasible=False, bound=bound if mip else found.objective + constant)


def _constraints(problem: Any) -> list[Any]:
    """The rows of a problem, with PuLP 3 and 4."""
    return list(problem.constraints() if callable(problem.constraints) else problem.constraints.values())


def _arrays_of(problem: Any, *, mip: bool) -> dict[str, Any]:
    """A problem as the arrays of highs_child.py; columns and rows have PuLP's order."""
    import pulp

    variables = problem.variables()
    place = {id(v): i for i, v in enumerate(variables)}
    starts, index, value, low, high = [0], [], [], [], []
    for constraint in _constraints(problem):
        for variable, coefficient in constraint.items():
            index.append(place[id(variable)])
            value.append(coefficient)
        starts.append(len(index))
        least, most = constraint.getLb(), constraint.getUb()
        low.append(-np.inf if least is None else least)
        high.append(np.inf if most is None else most)
    return {
        "cost": np.array([problem.objective.get(v, 0.0) for v in variables], np.float64),
        "lower": np.array([-np.inf if v.lowBound is None else v.lowBound for v in variables], np.float64),
        "upper": np.array([np.inf if v.upBound is None else v.upBound for v in variables], np.float64),
        "row_lower": np.array(low, np.float64),
        "row_upper": np.array(high, np.float64),
        "start": np.array(starts, np.int32),
        "index": np.array(index, np.int32),
        "value": np.array(value, np.float64),
        "integer": np.array([v.cat == pulp.LpInteger for v in variables]) if mip else None,
    }


def is_available(engine: str) -> bool:
    """Whether an engine is installed."""
    return highs.is_installed() if engine == "highs" else bool(_cbc()().available())


def _make_cbc(effort: Effort, *, mip: bool) -> Any:
    if effort.solver != "cbc":
        raise MachineError(f"solver {effort.solver!r} is not known", hint=f"use {' or '.join(ENGINES)}")
    made = _cbc()(msg=False, mip=mip, threads=1, gapRel=effort.gap, timeLimit=effort.seconds)
    if not made.available():
        raise MachineError("the solver cbc is not installed", hint="install cbc")
    return made


@functools.cache
def _cbc() -> Any:
    """PuLP's CBC: the engine that PuLP 3 brings, else one on the PATH."""
    import pulp

    return functools.partial(pulp.COIN_CMD, path=getattr(pulp.apis.PULP_CBC_CMD, "pulp_cbc_path", "cbc"))


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
