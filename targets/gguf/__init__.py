"""GGUF for stock llama.cpp: one kept count for all layers, one ggml type per tensor (an expert stack is one tensor)."""

from edgemoe.targets.gguf.feedback import feeds_back, pack_rows
from edgemoe.targets.gguf.formats import OFFERED, offered_formats, round_rows
from edgemoe.targets.gguf.formats import dequantize as unpack_rows
from edgemoe.targets.gguf.process import memory_parts, unit_size, unit_staging
from edgemoe.targets.gguf.run import check_tokenizer, run
from edgemoe.targets.gguf.writer import fixed_size, list_units, write

__all__ = [
    "OFFERED",
    "check_tokenizer",
    "feeds_back",
    "fixed_size",
    "list_units",
    "memory_parts",
    "offered_formats",
    "pack_rows",
    "round_rows",
    "run",
    "unit_size",
    "unit_staging",
    "unpack_rows",
    "write",
]
