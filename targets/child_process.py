"""This module runs a runtime in a child process: a crash of the child becomes an error here, and its peak memory is its own."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from edgemoe.base.errors import MachineError, VerifyError
from edgemoe.base.types import F32

FRAME = Path(__file__).with_name("child_main.py")
LACKING = MachineError.exit_code  # exit code of a child that misses something on this machine

OnLogits = Callable[[int, F32], None]


def run_job(
    script: Path,
    path: Path,
    job: Mapping[str, Any],
    on_logits: OnLogits | None,
    *,
    runtime: str,
    hint: str,
    environment: Mapping[str, str],
) -> dict[str, Any]:
    """Do one job and return its result, with the process's peak memory in bytes as "peak".

    Args:
        script: has `do(job)`; see child_main.py.
        path: the artifact's first file.
        job: the job as plain values; for "windows", float32 logits come through standard output, "vocab_size" for each token.
        on_logits: called with (window number, logits [tokens, vocab]) as the logits come.
        runtime: its name, for messages.
        hint: how to install it.
        environment: variables that it reads.

    Raises:
        VerifyError: the runtime stopped; with its own last words.
        MachineError: the child says that this machine lacks something, or was killed for want of memory.
    """
    with tempfile.TemporaryDirectory() as folder:
        log, result, job_file = (Path(folder) / name for name in ("log", "result.json", "job.json"))
        job_file.write_text(json.dumps({"path": str(path), "result": str(result), **job}), encoding="utf-8")
        command = [sys.executable, "-P", str(FRAME), str(script), str(job_file)]  # plain scripts: the child holds nothing of edgemoe
        with (
            log.open("wb") as errors,
            subprocess.Popen(command, stdout=subprocess.PIPE, stderr=errors, env={**os.environ, **environment}) as child,
        ):
            try:
                _read_logits(child, job, on_logits)
                code = child.wait()
            except BaseException:  # a signal or an error here must leave no child behind
                child.kill()
                raise
        words = log.read_text(encoding="utf-8", errors="replace").strip().splitlines()
        if code == LACKING:
            raise MachineError("\n".join(words[-1:]) or f"{runtime} does not start", hint=hint)
        if code == -signal.SIGKILL:
            what = f"{path.name}: {runtime} was killed by the system, as happens when memory runs out"
            raise MachineError(what, hint="close other programs, or use a machine with more memory")
        if code != 0 or not result.exists():
            asserted = [w for w in words if "GGML_ASSERT" in w or "error" in w.lower()]
            last = (asserted or words or ["it said nothing"])[-1]
            raise VerifyError(f"{path.name}: {runtime} stopped (exit status {code}): {last.strip()[:500]}")
        found: dict[str, Any] = json.loads(result.read_text(encoding="utf-8"))
        return found


def _read_logits(child: subprocess.Popen[bytes], job: Mapping[str, Any], on_logits: OnLogits | None) -> None:
    """Hand on the logits of the job's windows, until the child stops."""
    assert child.stdout is not None  # asked for above
    for number, window in enumerate(job.get("windows", ())):
        shape = (len(window), int(job["vocab_size"]))
        raw = child.stdout.read(4 * shape[0] * shape[1])
        if len(raw) < 4 * shape[0] * shape[1]:
            break
        if on_logits:
            on_logits(number, np.frombuffer(raw, np.float32).reshape(shape))
    child.stdout.read()
