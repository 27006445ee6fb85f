"""Run a GGUF in a child process with stock llama.cpp: a crash there is an error here, and its peak memory is its own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgemoe.errors import VerifyError
from edgemoe.ir import Model
from edgemoe.targets.gguf.formats import library_folder

CHILD = Path(__file__).with_name("child.py")


def run(path: Path, job: Mapping[str, Any], on_logits: Callable[[int, NDArray[np.float32]], None] | None = None) -> dict[str, Any]:
    """Run one job (see child.py) and return its result.

    Args:
        path: first file of the GGUF.
        job: what to do, plain values.
        on_logits: called with (window number, logits [tokens, vocab]) as they come.

    Raises:
        VerifyError: it does not load, or llama.cpp stopped; with llama.cpp's own last words.
        MachineError: llama-cpp-python is missing.
    """
    library_folder()
    with tempfile.TemporaryDirectory() as folder:
        log, result = Path(folder) / "log", Path(folder) / "result.json"
        job_file = Path(folder) / "job.json"
        job_file.write_text(json.dumps({"path": str(path), "result": str(result), **job}), encoding="utf-8")
        environment = {**os.environ, "GGML_NO_BACKTRACE": "1"}
        with log.open("wb") as errors:
            command = [sys.executable, "-P", str(CHILD), str(job_file)]  # a plain script: nothing of edgemoe is in its memory
            with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=errors, env=environment) as child:
                assert child.stdout is not None  # asked for above
                for number, window in enumerate(job.get("windows", ())):
                    shape = (len(window), int(job["vocab_size"]))
                    raw = child.stdout.read(4 * shape[0] * shape[1])
                    if len(raw) < 4 * shape[0] * shape[1]:
                        break
                    if on_logits:
                        on_logits(number, np.frombuffer(raw, np.float32).reshape(shape))
                child.stdout.read()
                code = child.wait()
        words = log.read_text(encoding="utf-8", errors="replace").strip().splitlines()
        if code != 0 or not result.exists():
            asserted = [w for w in words if "GGML_ASSERT" in w or "error" in w.lower()]
            last = (asserted or words or ["it said nothing"])[-1]
            raise VerifyError(f"{path.name}: llama.cpp stopped (exit status {code}): {last.strip()[:500]}")
        found: dict[str, Any] = json.loads(result.read_text(encoding="utf-8"))
        return found


def check_tokenizer(path: Path, model: Model, lines: Sequence[str]) -> list[str]:
    """Lines that llama.cpp tokenizes otherwise than the original tokenizer."""
    from edgemoe.targets.gguf.tokenizer import check_vocabulary

    return check_vocabulary(path, Path(model.folder), lines)


def runtime() -> str:
    """What runs a GGUF here."""
    try:
        return f"llama.cpp in llama-cpp-python {version('llama-cpp-python')}"
    except PackageNotFoundError:
        return "unknown"
