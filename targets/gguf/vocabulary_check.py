"""This module proves that a GGUF tokenizes as its checkpoint does: it compares llama.cpp in a child process with the original tokenizer."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from edgemoe.base.errors import VerifyError
from edgemoe.model.tokenizer import load_tokenizer
from edgemoe.targets.gguf.formats import library_folder

CHILD = Path(__file__).with_name("vocabulary_child.py")


def check_vocabulary(gguf_path: Path, folder: Path, lines: Sequence[str]) -> list[str]:
    """Lines that llama.cpp tokenizes otherwise than the checkpoint's tokenizer, without BOS and with special tokens read as plain text.

    Raises:
        VerifyError: llama.cpp does not load the GGUF's vocabulary, or stopped; the message has its last output.
        ModelError: there is no tokenizer to compare with, or it does not load.
        MachineError: a package is missing.
    """
    expected = tokenize_original(folder, lines)
    library_folder()
    job = json.dumps({"path": str(gguf_path), "lines": list(lines)})
    done = subprocess.run(
        [sys.executable, "-P", str(CHILD)],
        input=job.encode(),
        capture_output=True,
        env={**os.environ, "GGML_NO_BACKTRACE": "1"},
        check=False,
    )
    if done.returncode != 0:
        words = done.stderr.decode(errors="replace").strip().splitlines()
        last = [word for word in words if "GGML_ASSERT" in word or "error" in word.lower()] or words or ["it said nothing"]
        raise VerifyError(f"{gguf_path.name}: llama.cpp stopped (exit status {done.returncode}): {last[-1].strip()[:500]}")
    return [line for line, ours, theirs in zip(lines, json.loads(done.stdout), expected, strict=True) if ours != theirs]


def tokenize_original(folder: Path, lines: Sequence[str]) -> list[list[int]]:
    """Tokens of lines by the tokenizer in a folder, without BOS and with special tokens read as plain text.

    Raises:
        ModelError: there is no tokenizer, or it does not load.
        MachineError: a package is missing.
    """
    return list(map(load_tokenizer(folder, special=False), lines))
