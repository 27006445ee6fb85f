"""Run the command line as users do, in a process of its own."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).parents[1]
MODEL = ROOT / "examples" / "tiny-moe-b"
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
