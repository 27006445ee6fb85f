"""A solve ends when its time is over or the user interrupts, whatever HiGHS does, and leaves no process behind."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import psutil
import pulp
import pytest

from edgemoe.solvers import highs
from edgemoe.solvers.effort import Effort, deadline
from edgemoe.solvers.engine import is_available, run

SOLVE = """
import sys
from test_highs import market_split
from edgemoe.solvers.effort import Effort
from edgemoe.solvers.engine import run
print("ready", flush=True)
run(market_split(), Effort(solver=sys.argv[1]))
"""


def market_split(n: int = 60, rows: int = 6) -> pulp.LpProblem:
    """A market split problem (Cornuejols and Dawande 1998), which no branch and bound solves in an hour; a choice is found at once."""
    rng = np.random.default_rng(0)
    problem = pulp.LpProblem("split", pulp.LpMinimize)
    x = [problem.add_variable(f"x{i:02d}", 0, 1, pulp.LpInteger) for i in range(n)]
    over = [problem.add_variable(f"s{r}", 0) for r in range(rows)]
    under = [problem.add_variable(f"t{r}", 0) for r in range(rows)]
    problem += pulp.LpAffineExpression([(v, 1.0) for v in (*over, *under)])
    for r in range(rows):
        weights = rng.integers(0, 100, n)
        terms = [*zip(x, weights.tolist(), strict=True), (over[r], 1.0), (under[r], -1.0)]
        problem += pulp.LpConstraint(pulp.LpAffineExpression(terms), 0, rhs=int(weights.sum()) // 2)
    return problem


def child() -> int:
    """The process that solves for this one."""
    return highs._CHILDREN[os.getpid()].process.pid


def test_a_time_limit_ends_a_hard_program_with_the_best_choice_and_its_bound() -> None:
    told: list[float] = []
    problem = market_split()
    began = time.monotonic()
    outcome = run(problem, Effort(gap=0.0, until=deadline(1.0), watch=told.append))
    assert time.monotonic() - began < 1.0 + highs.GRACE + 5
    assert outcome.solved and 0 <= outcome.bound < problem.objective.value()
    assert told and all(gap >= 0 for gap in told)


def test_a_solver_that_hangs_is_ended_and_the_next_program_is_solved() -> None:
    """HiGHS 1.16.0 looped for ever, without a look at its time limit, on programs of plans with a speed rule."""
    run(market_split(), Effort(gap=10.0))
    hung = child()
    threading.Timer(0.5, os.kill, (hung, signal.SIGSTOP)).start()
    outcome = run(market_split(), Effort(gap=0.0, until=deadline(1.0)))
    assert outcome.solved  # the choice that it had sent before it hung
    assert not psutil.pid_exists(hung)
    assert run(market_split(), Effort(gap=10.0)).solved
    assert child() != hung


def test_a_solver_that_dies_gives_no_answer_and_the_next_program_is_solved() -> None:
    run(market_split(), Effort(gap=10.0))
    threading.Timer(0.5, os.kill, (child(), signal.SIGKILL)).start()
    assert run(market_split(), Effort(gap=0.0, until=deadline(30.0))).bound < np.inf
    assert run(market_split(), Effort(gap=10.0)).solved


def test_a_solver_that_dies_while_it_is_given_a_program_is_no_closed_pipe(monkeypatch: pytest.MonkeyPatch) -> None:
    """`edgemoe ... | head` ends in silence at a BrokenPipeError; one of the solver's pipe must not look like that."""

    def broken(*_: object) -> None:
        raise BrokenPipeError

    with monkeypatch.context() as patch:
        patch.setattr(highs, "write", broken)
        assert not run(market_split(), Effort(gap=10.0)).solved
    assert run(market_split(), Effort(gap=10.0)).solved


@pytest.mark.parametrize(
    ("solver", "stop"), [("highs", signal.SIGINT), ("highs", signal.SIGKILL), *([("cbc", signal.SIGINT)] if is_available("cbc") else [])]
)
def test_ctrl_c_or_a_kill_of_the_parent_alone_ends_the_search_and_its_process(solver: str, stop: signal.Signals) -> None:
    paths = os.pathsep.join([str(Path(__file__).parent), *filter(None, sys.path)])
    environment = {**os.environ, "PYTHONPATH": paths}
    command = [sys.executable, "-c", SOLVE, solver]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, env=environment) as parent:
        assert parent.stdout is not None
        assert parent.stdout.readline() == "ready\n"
        time.sleep(1)
        solving = psutil.Process(parent.pid).children(recursive=True)
        assert solving
        parent.send_signal(stop)
        try:
            parent.wait(timeout=5)
        except subprocess.TimeoutExpired:  # the suite ends all the same, also where SIGINT was ignored from the start (nohup, &)
            parent.kill()
            raise
    assert not psutil.wait_procs(solving, timeout=5)[1]
