"""The ONNX target is for onnxruntime: every expert is dropped or has a format of its own, and kept counts may differ between layers."""

from edgemoe.targets import Runs, Target
from edgemoe.targets.copied_files import COPIED
from edgemoe.targets.onnx.files import PLACES
from edgemoe.targets.onnx.formats import OFFERED, input_block, round_rows
from edgemoe.targets.onnx.memory import memory_parts, on_device, unit_extra, unit_staging
from edgemoe.targets.onnx.rounding import descend_rows, feeds_back, pack_rows, unpack_rows
from edgemoe.targets.onnx.run import run, runtime
from edgemoe.targets.onnx.words import WORDS
from edgemoe.targets.onnx.writer import fixed_sizes, list_units, offered_formats, unit_size, write
from edgemoe.targets.tokenizer.beside import check_tokenizer

__all__ = ["TARGET"]

TARGET = Target(
    name="onnx",
    form="experts",
    offered=OFFERED,
    runs=Runs(
        compared={"exact": False},  # as it runs, because our prices count the rounding of inputs
        beside={"exact": True},
    ),
    words=WORDS,
    least_shard=None,  # the graph is a file of its own, and the data lie in one
    fixed_names=(*(name for names in PLACES.values() for name in names), "config.json", "genai_config.json", *COPIED),
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
    unpack_rows=unpack_rows,
    write=write,
    run=run,
    check_tokenizer=check_tokenizer,
    runtime=runtime,
)
