"""This module opens the engine that computes a model's layers: llama.cpp for a GGUF, transformers for a checkpoint."""

from __future__ import annotations

from edgemoe.ir import Model
from edgemoe.stream.verbs import Stream
from edgemoe.stream.windows import CHUNK_TOKENS, WINDOW


def open_stream(model: Model) -> Stream:
    """What computes the layers of a model.

    Raises:
        MachineError: the engine is not installed.
        ModelError: the engine does not take the model.
    """
    if model.architecture:
        from edgemoe.stream.engine.rounding import open_engine

        length = min(WINDOW, model.context_length)
        return open_engine(model, windows=max(1, CHUNK_TOKENS // length), length=length)
    from edgemoe.stream.layers import LayerStream

    return LayerStream(model)
