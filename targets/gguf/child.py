"""This script runs in the child process: it loads a GGUF with llama.cpp and does one job (see child_main.py); logits go to stdout.

Jobs:
    {"windows": [[ids]], "exact": bool, "repack": bool}: the logits of every position of every window;
    {"reserve": n}: what llama.cpp says while it makes room for a context of n tokens, without loading weights;
    {"context": n, "tokens": [ids], "prompts": [text], "generate": n, "repack": bool}: decode a full context as a user would, measure, and
    continue the prompts greedily;
A job may carry other "settings" than a user's defaults: type_k, type_v, flash, ubatch, sequences, swa_full, outputs, threads, mmap.
"""

from __future__ import annotations

import ctypes
import importlib.util
import os
import sys
import time
import types
from collections.abc import Sequence
from typing import Any


def _bindings() -> Any:
    """llama-cpp-python's ctypes bindings alone, because the package around them would load numpy and 24 MiB outside llama.cpp."""
    spec = importlib.util.find_spec("llama_cpp")
    if spec is None or spec.submodule_search_locations is None:
        raise SystemExit("error: llama-cpp-python is not installed")
    package = types.ModuleType("llama_cpp")
    package.__path__ = list(spec.submodule_search_locations)
    sys.modules["llama_cpp"] = package
    return importlib.import_module("llama_cpp.llama_cpp")


lc = _bindings()
UBATCH = 512
LOAD_WITHOUT_MMAP, LOAD_WITH_MMAP, F32, F16, FLASH_OFF, FLASH_AUTO = 0, 1, 0, 1, 0, -1
EXACT = {"type_k": F32, "type_v": F32, "flash": FLASH_OFF}


def _count_cores() -> int:
    """Cores that this process may use (base/threads.py, of which a child holds nothing)."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


class Llama:
    """A loaded model with one context."""

    def __init__(self, path: str, context: int, settings: dict[str, Any], *, repack: bool = True, load: bool = True) -> None:
        self._log: list[str] = []
        self._callback = lc.llama_log_callback(lambda level, text, _: self._log.append(text.decode(errors="replace")))
        lc.llama_log_set(self._callback, ctypes.c_void_p(0))
        lc.llama_backend_init()
        params = lc.llama_model_default_params()
        params.n_gpu_layers, params.load_mode = 0, LOAD_WITH_MMAP if settings.get("mmap") else LOAD_WITHOUT_MMAP
        params.use_extra_bufts, params.no_alloc = repack, not load
        self.model = lc.llama_model_load_from_file(path.encode(), params)
        if not self.model:
            said = "".join(self._log).strip().splitlines() or ["the model does not load"]
            raise SystemExit("error: " + next((line for line in reversed(said) if "error loading" in line), said[-1]))
        self.open(context, settings)
        self.vocab = lc.llama_model_get_vocab(self.model)
        self.n_vocab = lc.llama_vocab_n_tokens(self.vocab)
        self.sampler = lc.llama_sampler_init_greedy()

    def open(self, context: int, settings: dict[str, Any]) -> None:
        """Make the context."""
        self.ubatch = min(context, settings.get("ubatch", UBATCH))
        options = lc.llama_context_default_params()
        options.n_ctx, options.n_batch, options.n_ubatch = context, self.ubatch, self.ubatch
        options.n_seq_max = settings.get("sequences", 1)
        options.n_threads = options.n_threads_batch = settings.get("threads", _count_cores())
        options.type_k, options.type_v = settings.get("type_k", F16), settings.get("type_v", F16)
        options.flash_attn_type = settings.get("flash", FLASH_AUTO)
        options.swa_full = settings.get("swa_full", True)
        options.n_outputs_max = settings.get("outputs", 0)
        self.context = lc.llama_init_from_model(self.model, options)
        if not self.context:
            raise SystemExit("error: " + ("".join(self._log).strip().splitlines() or ["no context"])[-1])

    def buffers(self) -> list[str]:
        """The lines of llama.cpp's log about its buffers."""
        return [line.strip() for line in "".join(self._log).splitlines() if "buffer size" in line or "size = " in line]

    @property
    def log(self) -> list[str]:
        """All that llama.cpp said."""
        return self._log

    def clear(self) -> None:
        """Forget the context."""
        lc.llama_memory_clear(lc.llama_get_memory(self.context), True)

    def decode(self, tokens: Sequence[int], start: int, *, every: bool) -> None:
        """Run tokens at positions from `start`, with the logits of every token or only of the last."""
        batch = lc.llama_batch_init(len(tokens), 0, 1)
        batch.n_tokens = len(tokens)
        for i, token in enumerate(tokens):
            batch.token[i], batch.pos[i], batch.n_seq_id[i], batch.seq_id[i][0] = int(token), start + i, 1, 0
            batch.logits[i] = every or i == len(tokens) - 1
        status = lc.llama_decode(self.context, batch)
        lc.llama_batch_free(batch)
        if status != 0:
            raise SystemExit(f"error: llama_decode gave {status}")

    def logits(self, n: int) -> bytes:
        """Logits [n, vocab] of the last decode, as float32."""
        return ctypes.string_at(lc.llama_get_logits(self.context), 4 * n * self.n_vocab)

    def most_likely(self) -> int:
        """The most likely next token after the last decode."""
        return int(lc.llama_sampler_sample(self.sampler, self.context, -1))

    def feed(self, tokens: Sequence[int], start: int = 0) -> None:
        """Run a long text in batches."""
        for i in range(0, len(tokens), self.ubatch):
            self.decode(tokens[i : i + self.ubatch], start + i, every=False)

    def tokenize(self, text: str) -> list[int]:
        """Tokens of a prompt, special tokens recognised."""
        raw = text.encode()
        out = (ctypes.c_int32 * (len(raw) + 16))()
        n = lc.llama_tokenize(self.vocab, raw, len(raw), out, len(out), True, True)
        return list(out[: max(n, 0)])

    def text(self, tokens: Sequence[int]) -> str:
        """Text of generated tokens."""
        raw = b""
        buffer = ctypes.create_string_buffer(512)
        for token in tokens:
            n = lc.llama_token_to_piece(self.vocab, int(token), buffer, len(buffer), 0, False)
            raw += buffer.raw[: max(n, 0)]
        return raw.decode(errors="replace")

    def greedy(self, prompt: Sequence[int], n: int) -> list[int]:
        """The most likely continuation, until its end or `n` tokens."""
        self.clear()
        self.feed(prompt)
        out: list[int] = []
        while len(out) < n:
            token = self.most_likely()
            if lc.llama_vocab_is_eog(self.vocab, token):
                break
            out.append(token)
            self.decode([token], len(prompt) + len(out) - 1, every=False)
        return out


def give_logits(job: dict[str, Any]) -> dict[str, Any]:
    """Logits of every window to stdout."""
    settings = EXACT if job["exact"] else {}
    longest = max(len(w) for w in job["windows"])
    llama = Llama(job["path"], longest, settings, repack=job.get("repack", True) and not job["exact"])
    for window in job["windows"]:
        llama.clear()
        llama.decode(window, 0, every=True)
        sys.stdout.buffer.write(llama.logits(len(window)))
    sys.stdout.buffer.flush()
    return {"buffers": llama.buffers()}


def measure(job: dict[str, Any]) -> dict[str, Any]:
    """Fill the context as a user would; speed, samples."""
    context, generate = int(job["context"]), int(job["generate"])
    llama = Llama(job["path"], context, job.get("settings", {}), repack=job.get("repack", True))
    tokens = job["tokens"]
    new = min(32, max(1, context // 4))
    filled = (tokens * (context // len(tokens) + 1))[: context - new]
    begin = time.perf_counter()
    llama.feed(filled)
    llama.most_likely()
    prompt_seconds = time.perf_counter() - begin
    begin = time.perf_counter()
    for i in range(new):
        token = llama.most_likely()
        llama.decode([token], len(filled) + i, every=False)
    decode_seconds = time.perf_counter() - begin
    samples = []
    for prompt in job["prompts"]:
        ids = llama.tokenize(prompt)[: max(1, context - generate - 1)]
        if ids:
            out = llama.greedy(ids, min(generate, context - len(ids)))
            samples.append({"prompt": prompt, "text": llama.text(out), "tokens": out})
    return {
        "prompt_tokens_per_second": len(filled) / prompt_seconds,
        "decode_tokens_per_second": new / decode_seconds,
        "samples": samples,
        "buffers": llama.buffers(),
    }


def do(job: dict[str, Any]) -> dict[str, Any]:
    """The job of child_main.py."""
    if "reserve" in job:
        return {"log": Llama(job["path"], int(job["reserve"]), job["settings"], load=False).log}
    return give_logits(job) if "windows" in job else measure(job)
