"""This script runs in the child process: it loads model.onnx with ONNX Runtime on the CPU and does one job (see child_main.py).

Logits go to stdout as float32.

Jobs:
    {"windows": [[ids]], "exact": bool}: the logits of every position of every window; exact: 8-bit experts compute in floats;
    {"context": n, "tokens": [ids], "prompts": [[ids]], "generate": n, "ends": [ids]}: decode a full context as a user would, and continue
    the prompts greedily.
A job may carry "settings": chunk (tokens that are computed at once), threads.

Keys and values lie in one buffer per layer, which is the past and the present of every call, so nothing is copied or held twice.  The
runtime computes all outputs even if no caller asks for them, the logits of every token included, so chunks are small.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Iterator, Sequence
from typing import Any

LACKING = 5  # exit code: this machine lacks something
CHUNK, THREADS = 64, 4  # see docs/decisions/0008-onnx-memory.md
WARNINGS_OFF = 3  # ONNX Runtime's log level: errors
DTYPES = {"tensor(float)": "float32", "tensor(float16)": "float16"}


def _runtime(needs: Sequence[int], exact: bool) -> Any:
    """Import onnxruntime with the wanted exactness, which it reads from the environment."""
    if exact:
        os.environ["ORT_QMOE_CPU_QNBIT_GEMM"] = "fp32"
    try:
        import onnxruntime
    except ImportError as error:
        sys.stderr.write(f"onnxruntime cannot be imported: {error}\n")
        raise SystemExit(LACKING) from None
    found = onnxruntime.__version__
    if [int(part) for part in found.split(".")[:2]] < list(needs):
        sys.stderr.write(f"onnxruntime {found} is too old for this file: {'.'.join(map(str, needs))} or newer is needed\n")
        raise SystemExit(LACKING)
    return onnxruntime


class Decoder:
    """A session with a cache for `context` tokens."""

    def __init__(self, job: dict[str, Any], context: int) -> None:
        ort = _runtime(job["needs"], job.get("exact", False))
        import numpy as np  # onnxruntime has imported it

        self.np = np
        settings = job.get("settings", {})
        self.chunk = settings.get("chunk", CHUNK)
        options = ort.SessionOptions()
        options.log_severity_level = WARNINGS_OFF
        options.intra_op_num_threads = settings.get("threads", min(THREADS, os.cpu_count() or 1))
        options.enable_mem_pattern = False  # a pattern is kept for each shape of input, and decoding has as many shapes as tokens
        self.session = ort.InferenceSession(job["path"], options, providers=["CPUExecutionProvider"])
        inputs = {i.name: i for i in self.session.get_inputs()}
        self.cache = {}
        for name, tensor in inputs.items():
            if name.startswith("past_key_values."):
                _, heads, _, length = tensor.shape
                self.cache[name] = np.zeros((1, heads, context, length), DTYPES[tensor.type])
        self.logits = np.empty((1, min(self.chunk, context), self.session.get_outputs()[0].shape[-1]), np.float32)

    def run(self, tokens: Sequence[int], start: int) -> Any:
        """Run tokens at positions from `start`, and return their logits [1, tokens, vocab], which are valid until the next run."""
        np, logits = self.np, self.logits[:, : len(tokens)]
        binding = self.session.io_binding()
        binding.bind_cpu_input("input_ids", np.array([tokens], np.int64))
        binding.bind_cpu_input("attention_mask", np.ones((1, start + len(tokens)), np.int64))
        for name, buffer in self.cache.items():
            place = ("cpu", 0, buffer.dtype, buffer.shape, buffer.ctypes.data)
            binding.bind_input(name, *place)
            binding.bind_output(name.replace("past_key_values", "present"), *place)
        binding.bind_output("logits", "cpu", 0, logits.dtype, logits.shape, logits.ctypes.data)
        self.session.run_with_iobinding(binding)
        return logits

    def every(self, tokens: Sequence[int], start: int = 0) -> Iterator[Any]:
        """Logits of a text, chunk by chunk [1, chunk, vocab]."""
        for begin in range(0, len(tokens), self.chunk):
            yield self.run(tokens[begin : begin + self.chunk], start + begin)

    def last(self, tokens: Sequence[int], start: int = 0) -> int:
        """Run tokens in chunks, and return the most likely token after the last one."""
        *_, last = (logits[0, -1] for logits in self.every(tokens, start))
        return int(last.argmax())

    def greedy(self, prompt: Sequence[int], n: int, eos_ids: Sequence[int]) -> list[int]:
        """The most likely continuation, until its end or `n` tokens."""
        out: list[int] = []
        token = self.last(prompt) if n else -1
        while len(out) < n and token not in eos_ids:
            out.append(token)
            if len(out) < n:
                token = self.last([token], len(prompt) + len(out) - 1)
        return out


def give_logits(job: dict[str, Any]) -> dict[str, Any]:
    """Logits of every window to stdout."""
    decoder = Decoder(job, max(len(w) for w in job["windows"]))
    for window in job["windows"]:
        for logits in decoder.every(window):
            sys.stdout.buffer.write(logits)
    sys.stdout.buffer.flush()
    return {}


def measure(job: dict[str, Any]) -> dict[str, Any]:
    """Fill the context as a user would; speed, samples."""
    context, generate, tokens = int(job["context"]), int(job["generate"]), job["tokens"]
    decoder = Decoder(job, context)
    new = min(32, max(1, context // 4))
    filled = (tokens * (context // len(tokens) + 1))[: context - new]
    begin = time.perf_counter()
    token = decoder.last(filled)
    prompt_seconds = time.perf_counter() - begin
    begin = time.perf_counter()
    for i in range(new):
        token = decoder.last([token], len(filled) + i)
    decode_seconds = time.perf_counter() - begin
    samples = []
    for prompt in job["prompts"]:
        ids = prompt[: max(1, context - generate - 1)]
        samples.append(decoder.greedy(ids, min(generate, context - len(ids)), job["ends"]))
    return {
        "prompt_tokens_per_second": len(filled) / prompt_seconds,
        "decode_tokens_per_second": new / decode_seconds,
        "samples": samples,
    }


def do(job: dict[str, Any]) -> dict[str, Any]:
    """The job of child_main.py."""
    return give_logits(job) if "windows" in job else measure(job)
