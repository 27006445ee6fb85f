"""This module runs model.onnx in a child process with ONNX Runtime; a crash of the child becomes an error, and its peak memory is its own.

Prompts are tokenized here, with the tokenizer that lies beside the model, so that the child holds only the runtime.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from edgemoe.base.errors import MachineError
from edgemoe.targets import MISSING
from edgemoe.targets.child_process import OnLogits, run_job
from edgemoe.targets.onnx.graph_builder import import_onnx
from edgemoe.targets.tokenizer.beside import eos_ids, open_tokenizer

CHILD = Path(__file__).with_name("child.py")
INSTALL = "pip install 'edgemoe[onnx]'"
NEEDS = "edgemoe.least_onnxruntime"  # metadata entry of the file: the least version that runs it
LEAST = (1, 31)  # earlier versions dequantize block-wise experts of 4 and 8 bits at every call, which is 50 times slower


def run(path: Path, job: Mapping[str, Any], on_logits: OnLogits | None = None) -> dict[str, Any]:
    """Run one job (see child.py, but prompts are texts) and return its result.

    Args:
        path: model.onnx, with its data file and tokenizer beside it.
        job: the job as plain values.
        on_logits: called with (window number, logits [tokens, vocab]) as the logits come.

    Raises:
        VerifyError: the model does not load, or ONNX Runtime stopped; the message has its last output.
        MachineError: onnxruntime is missing or too old.
    """
    if importlib.util.find_spec("onnxruntime") is None:
        raise MachineError("onnxruntime is not installed", hint=INSTALL)
    prompts = list(job.get("prompts", ()))
    encode, decode = open_tokenizer(path) if prompts else (None, None)
    ids = {prompt: tokens for prompt in prompts if (tokens := encode(prompt))} if encode else {}
    full = {**job, "prompts": list(ids.values()), "ends": eos_ids(path), "needs": list(_needs(path))}
    result = run_job(CHILD, path, full, on_logits, runtime="onnxruntime", hint=INSTALL, environment={})
    if decode:
        answers = zip(ids, result["samples"], strict=True)
        result["samples"] = [{"prompt": prompt, "text": decode(tokens), "tokens": tokens} for prompt, tokens in answers]
    return result


def runtime() -> str:
    """Name and version of the runtime that runs an ONNX model here."""
    try:
        return f"onnxruntime {version('onnxruntime')}"
    except PackageNotFoundError:
        return MISSING


def _needs(path: Path) -> tuple[int, ...]:
    """The least version of onnxruntime that runs the file."""
    onnx = import_onnx()
    from google.protobuf.message import DecodeError

    try:
        entries = onnx.load(str(path), load_external_data=False).metadata_props
        said = next(entry.value for entry in entries if entry.key == NEEDS)
        return max(LEAST, tuple(int(part) for part in said.split(".")[:2]))
    except (OSError, DecodeError, StopIteration, ValueError):  # onnxruntime itself then says what is wrong with the file
        return LEAST
