"""GGUF for stock llama.cpp: one kept count for all layers, one ggml type per tensor (an expert stack is one tensor)."""

from edgemoe.targets import Runs
from edgemoe.targets.gguf.formats import OFFERED, input_block, round_rows
from edgemoe.targets.gguf.formats import dequantize as unpack_rows
from edgemoe.targets.gguf.memory import memory_parts, offered_formats, on_device, unit_extra, unit_size, unit_staging
from edgemoe.targets.gguf.rounding import descend_rows, feeds_back, pack_rows
from edgemoe.targets.gguf.run import check_tokenizer, run, runtime
from edgemoe.targets.gguf.writer import fixed_size, list_units, write

FORM = "stacks"
SPLITS = True
FIXED_NAMES: tuple[str, ...] = ()  # a GGUF is named after the model and the plan
RUNS = Runs(
    compared={"exact": True, "repack": False},  # F32 KV, flash attention off, plain weights: what is left is the weights' own error
    beside={"exact": False, "repack": True},
    fallback={"repack": False},  # seen with AMX
    fallback_note="llama.cpp fails on this machine with repacked weights ({error}); measured without (--no-repack)",
)
