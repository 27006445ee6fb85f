"""The GGUF target is for stock llama.cpp: all layers share a kept count, and a tensor has one ggml type (an expert stack is one tensor)."""

from edgemoe.targets import Runs, Target
from edgemoe.targets.gguf.formats import COPIED, OFFERED, dequantize, input_block, round_rows
from edgemoe.targets.gguf.memory import memory_parts, offered_formats, on_device, unit_extra, unit_size, unit_staging
from edgemoe.targets.gguf.rounding import descend_rows, feeds_back, pack_rows
from edgemoe.targets.gguf.run import check_tokenizer, run, runtime
from edgemoe.targets.gguf.words import WORDS
from edgemoe.targets.gguf.writer import fixed_sizes, least_shard, write
from edgemoe.targets.stacks import list_units

__all__ = ["TARGET"]

TARGET = Target(
    name="gguf",
    form="stacks",
    offered=(*OFFERED, *COPIED),
    runs=Runs(
        compared={"exact": True, "repack": False},  # F32 KV, flash attention off, plain weights: only the error of the weights remains
        beside={"exact": False, "repack": True},
        fallback={"repack": False},  # seen with AMX
        fallback_note="llama.cpp fails on this machine with repacked weights ({error}); measured without (--no-repack)",
    ),
    words=WORDS,
    least_shard=least_shard,
    fixed_names=(),  # a GGUF is named after the model and the plan
    list_units=list_units,
    offered_formats=offered_formats,
    unit_size=unit_size,
    unit_extra=unit_extra,
    unit_staging=unit_staging,
    fixed_sizes=fixed_sizes,
    memory_parts=memory_parts,
    on_device=on_device,
    round_rows=round_rows,
    input_block=input_block,
    feeds_back=feeds_back,
    pack_rows=pack_rows,
    descend_rows=descend_rows,
    unpack_rows=dequantize,
    write=write,
    run=run,
    check_tokenizer=check_tokenizer,
    runtime=runtime,
)
