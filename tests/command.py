"""Run the command line as users do, in a process of its own."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

ROOT = Path(__file__).parents[1]
MODEL = ROOT / "examples" / "tiny-moe-b"
TOKENS = 4096  # of the shipped calibration texts, for the statistics and prices that files share (conftest.py)
PATIENCE = 300  # seconds for a stage to begin
COMMAND = [sys.executable, "-m", "edgemoe"]


def environment(**extra: str) -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(ROOT), "COLUMNS": "100", **extra}


def run_cli(*arguments: object, prefix: Sequence[str] = (), cwd: Path | None = None, **extra: str) -> subprocess.CompletedProcess[str]:
    command = [*prefix, *COMMAND, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, cwd=cwd, env=environment(**extra), timeout=600, check=False)


def error_of(stderr: str) -> str:
    """The one error line of a failed command; nothing but progress may be beside it and its hint."""
    assert "Traceback" not in stderr, stderr
    errors = [line for line in stderr.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1, stderr
    rest = stderr.splitlines()[stderr.splitlines().index(errors[0]) + 1 :]
    assert len(rest) <= 1 and all(line.startswith("hint: ") for line in rest), stderr
    return errors[0]


def _hear_interrupts() -> None:
    """A shell that starts a test run in the background lets it ignore SIGINT; the command under test must not inherit that."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def stop_when(command: list[object], begun: Callable[[], bool], delay: float, number: int) -> tuple[int, str]:
    """Send a signal to the whole group of a command `delay` seconds after something has begun; its exit status and stderr."""
    full = [*COMMAND, *map(str, command)]
    with subprocess.Popen(
        full,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        env=environment(),
        start_new_session=True,
        preexec_fn=_hear_interrupts,
    ) as child:
        deadline = time.monotonic() + PATIENCE
        while not begun() and child.poll() is None and time.monotonic() < deadline:
            time.sleep(0.002)
        time.sleep(delay)
        if child.poll() is None:
            os.killpg(child.pid, number)
        _, errors = child.communicate(timeout=PATIENCE)
    return child.returncode, errors
