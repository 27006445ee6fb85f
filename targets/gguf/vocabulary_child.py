"""This script is check_vocabulary's child process: it loads a GGUF's vocabulary, tokenizes lines from stdin, and prints ids as JSON."""

from __future__ import annotations

import ctypes
import json
import sys

import llama_cpp as lc

_ERROR = 4  # ggml.h: GGML_LOG_LEVEL_ERROR


def main() -> None:
    """Read {"path": ..., "lines": [...]} from stdin, print [[ids of a line], ...]."""
    job = json.load(sys.stdin)
    errors: list[str] = []
    callback = lc.llama_log_callback(lambda level, text, _: errors.append(text.decode(errors="replace")) if level == _ERROR else None)
    lc.llama_log_set(callback, ctypes.c_void_p(0))
    lc.llama_backend_init()
    params = lc.llama_model_default_params()
    params.vocab_only = True
    model = lc.llama_model_load_from_file(job["path"].encode(), params)
    if not model:
        raise SystemExit("error: " + (errors or ["the vocabulary does not load"])[0].strip())
    vocab = lc.llama_model_get_vocab(model)
    found = []
    for line in job["lines"]:
        raw = line.encode()
        ids = (ctypes.c_int32 * (len(raw) + 16))()  # a token is at least a byte, but for the blank before the text
        n = lc.llama_tokenize(vocab, raw, len(raw), ids, len(ids), False, False)
        found.append(list(ids[: max(n, 0)]))
    json.dump(found, sys.stdout)


if __name__ == "__main__":
    main()
