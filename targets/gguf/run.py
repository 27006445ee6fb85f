"""This module runs a GGUF in a child process with stock llama.cpp; a crash of the child becomes an error, and its peak is its own."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from edgemoe.ir import Model
from edgemoe.targets import MISSING
from edgemoe.targets.child_process import OnLogits, run_job
from edgemoe.targets.gguf.formats import INSTALL, library_folder

CHILD = Path(__file__).with_name("child.py")


def run(path: Path, job: Mapping[str, Any], on_logits: OnLogits | None = None) -> dict[str, Any]:
    """Run one job (see child.py) and return its result.

    Args:
        path: first file of the GGUF.
        job: the job as plain values.
        on_logits: called with (window number, logits [tokens, vocab]) as the logits come.

    Raises:
        VerifyError: the file does not load, or llama.cpp stopped; the message has llama.cpp's last output.
        MachineError: llama-cpp-python is missing.
    """
    library_folder()
    return run_job(CHILD, path, job, on_logits, runtime="llama.cpp", hint=INSTALL, environment={"GGML_NO_BACKTRACE": "1"})


def check_tokenizer(path: Path, model: Model, lines: Sequence[str]) -> list[str]:
    """Lines that llama.cpp tokenizes otherwise than the original tokenizer."""
    if model.architecture:  # tokenizer and template are copied
        from edgemoe.targets.gguf.copied_keys import source_of, tokenizer_values

        kept = tokenizer_values(path) == tokenizer_values(source_of(model).files[0])
        return [] if kept else list(lines)
    from edgemoe.targets.gguf.vocabulary import check_vocabulary

    return check_vocabulary(path, Path(model.folder), lines)


def runtime() -> str:
    """Name and version of the runtime that runs a GGUF here."""
    try:
        return f"llama.cpp in llama-cpp-python {version('llama-cpp-python')}"
    except PackageNotFoundError:
        return MISSING
