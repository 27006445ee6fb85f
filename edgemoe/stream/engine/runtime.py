"""This module loads a GGUF in llama.cpp, with a context whose every node is told to a callback, and decodes windows."""

from __future__ import annotations

import ctypes
import functools
import importlib
from collections import deque
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgemoe.base.errors import MachineError, ModelError
from edgemoe.stream.engine.layout import open_ggml

INSTALL = "pip install 'edgemoe[llama]'"
LINES = 500  # of llama.cpp's log that are kept
_CALLBACKS: list[Any] = []
F32, NO_FLASH, MMAP = 0, 0, 1  # ggml's type of the cache, llama.cpp's flash attention, its way to load


class Runtime:
    """A loaded model with one context; windows are sequences of one batch."""

    def __init__(self, path: Path, windows: int, length: int, threads: int, on_node: Callable[[int, bool, Any], bool]) -> None:
        """Load the file with room for so many windows of so many tokens at a time.

        Raises:
            MachineError: llama-cpp-python is missing, or its ggml is another.
            ModelError: llama.cpp does not load the file.
        """
        self.llama, libraries = load_bindings()
        listen().clear()
        self.llama.llama_backend_init()
        params = self.llama.llama_model_default_params()
        params.n_gpu_layers, params.load_mode, params.use_extra_bufts = 0, MMAP, False
        self.model = self.llama.llama_model_load_from_file(str(path).encode(), params)
        if not self.model:
            raise ModelError(f"{path}: llama.cpp does not load it: {last_words()}")
        self.ggml = open_ggml(libraries, self.llama.GGML_TYPE_COUNT)
        self.n_vocab: int = self.llama.llama_vocab_n_tokens(self.llama.llama_model_get_vocab(self.model))
        self._on_node = self.llama.ggml_backend_sched_eval_callback(on_node)  # kept, because llama.cpp keeps its address
        self._open(windows, length, threads)

    def _open(self, windows: int, length: int, threads: int) -> None:
        options = self.llama.llama_context_default_params()
        options.n_ctx = options.n_batch = options.n_ubatch = windows * length
        options.n_seq_max, options.n_threads, options.n_threads_batch = windows, threads, threads
        options.type_k = options.type_v = F32
        options.flash_attn_type, options.op_offload, options.kv_unified = NO_FLASH, False, False
        options.cb_eval = self._on_node
        self.context = self.llama.llama_init_from_model(self.model, options)
        if not self.context:
            raise ModelError(f"llama.cpp makes no context: {last_words()}")

    def decode(self, windows: NDArray[np.int64], *, logits: bool) -> None:
        """Decode windows [windows, length] from empty caches and states, with logits of every token, or of the last alone.

        Raises:
            ModelError: llama.cpp fails.
        """
        self.llama.llama_memory_clear(self.llama.llama_get_memory(self.context), True)
        batch = self.llama.llama_batch_init(windows.size, 0, 1)
        batch.n_tokens = windows.size
        for i, token in enumerate(windows.reshape(-1).tolist()):
            sequence, position = divmod(i, windows.shape[1])
            batch.token[i], batch.pos[i], batch.n_seq_id[i], batch.seq_id[i][0] = token, position, 1, sequence
            batch.logits[i] = logits or i == windows.size - 1
        result = self.llama.llama_decode(self.context, batch)
        self.llama.llama_batch_free(batch)
        if result:
            raise ModelError(f"llama.cpp fails to decode ({result}): {last_words()}")

    def logits(self, tokens: int) -> NDArray[np.float32]:
        """The logits of the last decode [tokens, vocab]."""
        return np.ctypeslib.as_array(self.llama.llama_get_logits(self.context), shape=(tokens, self.n_vocab)).copy()

    def close(self) -> None:
        """Give the memory back."""
        self.llama.llama_free(self.context)
        self.llama.llama_model_free(self.model)


@functools.cache
def listen() -> deque[str]:
    """What llama.cpp says in this process from now on, the last lines; it keeps the address of the callback for good."""
    llama, said = load_bindings()[0], deque[str](maxlen=LINES)
    callback = llama.llama_log_callback(lambda _, text, __: said.append(text.decode(errors="replace")))
    _CALLBACKS.append(callback)
    llama.llama_log_set(callback, ctypes.c_void_p(0))
    return said


def last_words() -> str:
    """What llama.cpp said last of an error; else what it said last."""
    lines = "".join(listen()).strip().splitlines() or ["it says nothing"]
    return next((line for line in reversed(lines) if "error" in line), lines[-1])[:300]


def load_bindings() -> tuple[Any, Path]:
    """llama-cpp-python's ctypes bindings, and the folder of its shared libraries.

    Raises:
        MachineError: it is not installed, or cannot be loaded.
    """
    try:
        bindings = importlib.import_module("llama_cpp.llama_cpp")
    except (ImportError, OSError, RuntimeError) as error:
        raise MachineError(f"llama-cpp-python cannot be used: {error}", hint=INSTALL) from error
    return bindings, Path(str(bindings.__file__)).parent / "lib"
