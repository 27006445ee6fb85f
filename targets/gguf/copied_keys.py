"""This module copies the key-values of a source GGUF, apart from those that count experts or say how the file was made."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gguf

from edgemoe.ir import Model
from edgemoe.model.gguf_model import first_file
from edgemoe.model.gguf_source import GgufSource, read_gguf

# The writer adds these anew; edgemoe's own are those of an earlier run.
_MADE_ANEW = ("general.architecture", "general.file_type", "general.quantization_version", "general.alignment", "GGUF.")
_OWN = ("edgemoe.", "quantize.imatrix.", "split.")
TOKENIZER = "tokenizer."


def source_of(model: Model) -> GgufSource:
    """The source of a GGUF's Model, read again."""
    return read_gguf(first_file(model))


def add_copied(writer: Any, model: Model, count: int) -> None:
    """Add all key-values of the source, with `count` experts in each layer and without blocks that predict further tokens."""
    source = source_of(model)
    arch = source.architecture
    changed = {"expert_count": count, "block_count": model.n_layers, "nextn_predict_layers": 0, "expert_used_count": model.top_k}
    for key, value in source.values.items():
        kind, item = source.kinds[key]
        if key.startswith((*_MADE_ANEW, *_OWN)) or value == []:
            continue
        own = key.removeprefix(f"{arch}.")
        if own != key and own in changed and not isinstance(value, list):
            value = changed[own]
        if own != key and isinstance(value, list) and len(value) == source.n_layers:
            value = value[: model.n_layers]
        writer.add_key_value(key, value, gguf.GGUFValueType(kind), sub_type=gguf.GGUFValueType(item) if isinstance(value, list) else None)


def tokenizer_values(path: Path) -> dict[str, Any]:
    """All that a GGUF says of its tokenizer and template; empty lists say nothing, and are not copied."""
    return {key: value for key, value in read_gguf(path).values.items() if key.startswith(TOKENIZER) and value != []}
