"""This script is the frame of every child process: it reads a job, lets a plain script do it, and writes the result and peak memory.

    python -P child_main.py SCRIPT JOB.json

The plain script has `do(job) -> dict`.  The child imports nothing of edgemoe, so that the peak is the runtime's alone.
"""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path


def peak_bytes() -> int:
    """The most that this process ever held (VmHWM)."""
    try:
        status = Path("/proc/self/status").read_text()
        return int(next(line for line in status.splitlines() if line.startswith("VmHWM")).split()[1]) * 1024
    except (OSError, StopIteration):
        import resource

        used = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return used if sys.platform == "darwin" else used * 1024


def end_with_parent() -> None:
    """Let Linux end this process when its parent ends in any way."""
    if sys.platform == "linux":
        import ctypes

        ctypes.CDLL(None).prctl(1, 15)  # PR_SET_PDEATHSIG, SIGTERM


def main() -> None:
    """Do the job in the second file with the script in the first file."""
    end_with_parent()
    spec = importlib.util.spec_from_file_location("child", sys.argv[1])
    assert spec is not None  # a path that ends in .py
    assert spec.loader is not None
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    job = json.loads(Path(sys.argv[2]).read_text(encoding="utf-8"))
    result = script.do(job)
    Path(job["result"]).write_text(json.dumps({**result, "peak": peak_bytes()}), encoding="utf-8")


if __name__ == "__main__":
    main()
