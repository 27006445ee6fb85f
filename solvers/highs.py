"""This module hands programs to a HiGHS process (highs_child.py), and ends that process when time is over or the user interrupts.

A child is kept for the next program, because starting one takes a quarter of a second.  After a time limit, a failure or an interrupt,
the next program gets a new child.
"""

from __future__ import annotations

import atexit
import importlib.util
import os
import queue
import subprocess
import sys
import threading
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from edgemoe.base.errors import MachineError
from edgemoe.base.progress import GapProgress
from edgemoe.base.types import F64
from edgemoe.solvers.highs_child import read, write

GRACE = 2.0  # seconds that HiGHS gets to notice its time limit
TICK = 0.2  # seconds between two looks at the clock
_LOCK = threading.Lock()
_CHILDREN: dict[int, _Child] = {}  # key: id of the process that started the child, since a forked process must not use its parent's child


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """The answer to a job.

    `status` is HiGHS's model status, or "refused" (HiGHS took no such program), or "lost" (the child died).  `bound` holds for integer
    programs only; `values` are of columns, and `duals` of rows.
    """

    status: str
    objective: float = 0.0
    bound: float = -float("inf")
    values: F64 | None = None
    duals: F64 | None = None


@dataclass(frozen=True, slots=True)
class _Child:
    process: subprocess.Popen[bytes]
    inbox: queue.SimpleQueue[Any]


def is_installed() -> bool:
    """Whether HiGHS's package is there."""
    return importlib.util.find_spec("highspy") is not None


def solve(job: dict[str, Any], seconds: float | None, watch: GapProgress) -> Answer:
    """Solve the program of a job; when the time is over, return the best choice so far, if there is one.

    Args:
        job: the arrays that `_arrays_of` in engine.py makes, and HiGHS's options.
        seconds: wall-clock limit, or None.
        watch: told the gap a few times a second.

    Raises:
        MachineError: HiGHS is not installed.
    """
    if not is_installed():
        raise MachineError("the solver highs is not installed", hint="pip install highspy")
    with _LOCK:
        child = _CHILDREN.get(os.getpid())
        if child is None or child.process.poll() is not None:
            child = _CHILDREN[os.getpid()] = _start()
        try:
            assert child.process.stdin is not None  # `_start` asked for this pipe
            write(child.process.stdin, job)
            answer = _await(child, seconds, watch)
        except BrokenPipeError:  # the child died before it had read the job
            answer = Answer(status="lost")
        except BaseException:  # a signal or an error here: the answer is of no use
            _end(child)
            raise
        if answer.status in ("lost", "kTimeLimit"):
            _end(child)
        return answer


def _start() -> _Child:
    script = Path(__file__).with_name("highs_child.py")
    pipe, null = subprocess.PIPE, subprocess.DEVNULL
    process = subprocess.Popen([sys.executable, "-P", str(script)], stdin=pipe, stdout=pipe, stderr=null)
    inbox: queue.SimpleQueue[Any] = queue.SimpleQueue()

    def listen() -> None:
        with suppress(OSError, ValueError, EOFError):  # the pipe was closed here, or the process died in the middle of a message
            assert process.stdout is not None
            while (message := read(process.stdout)) is not None:
                inbox.put(message)
        inbox.put(("lost",))

    threading.Thread(target=listen, daemon=True).start()
    return _Child(process, inbox)


def _await(child: _Child, seconds: float | None, watch: GapProgress) -> Answer:
    """The answer to the job that was sent, or what is known of it when the time is over."""
    until = None if seconds is None else time.monotonic() + seconds + GRACE
    best, bound, gap = None, -float("inf"), float("inf")
    while until is None or time.monotonic() < until:
        try:
            kind, *told = child.inbox.get(timeout=TICK)
        except queue.Empty:
            watch(gap)
            continue
        if kind == "done":
            return Answer(**told[0])
        if kind == "lost":
            return Answer(status="lost", bound=bound, values=best)
        if kind == "better":
            best = told[0]
        else:
            gap, bound = told
            watch(gap)
    return Answer(status="kTimeLimit", bound=bound, values=best)


@atexit.register
def end_child() -> None:
    """End the child of this process, if it has one; the next program starts another child."""
    child = _CHILDREN.pop(os.getpid(), None)
    if child is not None:
        _end(child)


def _end(child: _Child) -> None:
    """End a process at once, whatever it does."""
    child.process.kill()
    child.process.wait()
    for pipe in (child.process.stdin, child.process.stdout):
        if pipe is not None:
            with suppress(OSError):
                pipe.close()
    _CHILDREN.pop(os.getpid(), None)
