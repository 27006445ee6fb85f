"""This module tokenizes with the tokenizer of a GGUF, as llama.cpp reads it; no weight is loaded."""

from __future__ import annotations

import ctypes
from pathlib import Path

from edgemoe.base.errors import ModelError
from edgemoe.model.tokenizer import Encode
from edgemoe.stream.engine.runtime import last_words, listen, load_bindings

ROOM = 16  # tokens beyond one for each byte


def load_encoder(path: Path) -> Encode:
    """The function from a text to its tokens, without BOS; texts of special tokens become these tokens.

    Raises:
        MachineError: llama-cpp-python is missing.
        ModelError: llama.cpp does not load the vocabulary, or it has no tokenizer.
    """
    llama, _ = load_bindings()
    listen().clear()
    llama.llama_backend_init()
    params = llama.llama_model_default_params()
    params.vocab_only, params.n_gpu_layers = True, 0
    model = llama.llama_model_load_from_file(str(path).encode(), params)
    if not model:
        raise ModelError(f"{path}: llama.cpp does not load its tokenizer: {last_words()}")
    vocabulary = llama.llama_model_get_vocab(model)
    if llama.llama_vocab_type(vocabulary) == llama.LLAMA_VOCAB_TYPE_NONE:
        raise ModelError(f"{path}: has no tokenizer", hint="convert the checkpoint again, with its tokenizer")

    def encode(text: str) -> list[int]:
        raw = text.encode()
        out = (ctypes.c_int32 * (len(raw) + ROOM))()
        n = llama.llama_tokenize(vocabulary, raw, len(raw), out, len(out), False, True)
        return list(out[: max(n, 0)])

    return encode
