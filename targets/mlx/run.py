"""This module runs an MLX folder in a child process with stock mlx_lm; a crash of the child becomes an error.

Prompts are tokenized here, with the tokenizer that lies in the folder.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from edgemoe.base.errors import MachineError, VerifyError
from edgemoe.targets import MISSING
from edgemoe.targets.child_process import OnLogits, run_job
from edgemoe.targets.mlx.reader import float_types, tensor_bytes
from edgemoe.targets.mlx.settings import Settings
from edgemoe.targets.tokenizer.beside import eos_ids, open_tokenizer

CHILD = Path(__file__).with_name("child.py")
SLACK = 4096  # bytes; mlx itself holds 8 for the state of its random numbers
INSTALL = "pip install 'edgemoe[mlx]'"


def run(path: Path, job: Mapping[str, Any], on_logits: OnLogits | None = None, *, settings: Settings) -> dict[str, Any]:
    """Run one job (see child.py, but prompts are texts) and return its result; "peak" is the most that Metal held, or 0.

    Args:
        path: a shard of the folder.
        job: the job as plain values.
        on_logits: called with (window number, logits [tokens, vocab]) as the logits come.
        settings: of the cache, with which a job that generates text runs; a job of windows says itself whether it wants them.

    Raises:
        VerifyError: the folder does not load, mlx_lm stopped (the message has its last output), or it holds other bytes than planned.
        MachineError: mlx or mlx_lm is missing or too old.
    """
    if importlib.util.find_spec("mlx_lm") is None:
        raise MachineError("mlx_lm is not installed", hint=INSTALL)
    prompts = list(job.get("prompts", ()))
    encode, decode = open_tokenizer(path) if prompts else (None, None)
    ids = {prompt: tokens for prompt in prompts if (tokens := encode(prompt))} if encode else {}
    cache = {} if "windows" in job else settings.job
    full = {**job, **cache, "prompts": list(ids.values()), "ends": eos_ids(path)}
    result = run_job(CHILD, path, full, on_logits, runtime="mlx_lm", hint=INSTALL, environment={})
    _check_loaded(path.parent, result["active"])
    if decode:
        answers = zip(ids, result["samples"], strict=True)
        result["samples"] = [{"prompt": prompt, "text": decode(tokens), "tokens": tokens} for prompt, tokens in answers]
    if "metal_peak" in result:
        result["peak"] = result["metal_peak"]
    return result


def _check_loaded(folder: Path, active: int) -> None:
    """Refuse a folder whose floats have several types, and a runtime that holds other bytes than the tensors have; plans count these.

    Raises:
        VerifyError: names the types, or both numbers.
    """
    if len(found := float_types(folder)) > 1:
        raise VerifyError(
            f"{folder}: floats are {' and '.join(sorted(found))}: mlx would widen all activations", hint="build or emit it again"
        )
    if abs(active - (tensors := tensor_bytes(folder))) > SLACK:
        raise VerifyError(f"{folder}: mlx holds {active} bytes, but the tensors have {tensors}", hint="please report this")


def runtime() -> str:
    """Name and version of the runtime that runs an MLX folder here."""
    try:
        return f"mlx {version('mlx')}, mlx-lm {version('mlx-lm')}"
    except PackageNotFoundError:
        return MISSING
