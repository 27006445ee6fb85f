"""ONNX for onnxruntime: every expert is dropped or has a format of its own; each layer keeps as many experts as it likes."""

from edgemoe.targets import Runs
from edgemoe.targets.onnx.feedback import feeds_back, pack_rows, unpack_rows
from edgemoe.targets.onnx.formats import OFFERED, round_inputs, round_rows
from edgemoe.targets.onnx.layout import COPIED, PLACES
from edgemoe.targets.onnx.process import memory_parts, unit_extra, unit_staging
from edgemoe.targets.onnx.run import check_tokenizer, run, runtime
from edgemoe.targets.onnx.writer import fixed_size, list_units, offered_formats, unit_size, write

FORM = "experts"
FIXED_NAMES = (*(name for names in PLACES.values() for name in names), "config.json", "genai_config.json", *COPIED)
RUNS = Runs(
    compared={"exact": False},  # as it runs: what kernels round of their inputs is in our prices
    beside={"exact": True},
)

__all__ = [
    "FIXED_NAMES",
    "FORM",
    "OFFERED",
    "RUNS",
    "check_tokenizer",
    "feeds_back",
    "fixed_size",
    "list_units",
    "memory_parts",
    "offered_formats",
    "pack_rows",
    "round_inputs",
    "round_rows",
    "run",
    "runtime",
    "unit_extra",
    "unit_size",
    "unit_staging",
    "unpack_rows",
    "write",
]
