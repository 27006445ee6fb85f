"""ONNX for onnxruntime: every expert is dropped or has a format of its own; each layer keeps as many experts as it likes."""

from edgemoe.targets.onnx.formats import OFFERED, round_inputs, round_rows
from edgemoe.targets.onnx.layout import FIXED_NAMES
from edgemoe.targets.onnx.writer import fixed_size, list_units, offered_formats, unit_size, write

FORM = "experts"

__all__ = [
    "FIXED_NAMES",
    "FORM",
    "OFFERED",
    "fixed_size",
    "list_units",
    "offered_formats",
    "round_inputs",
    "round_rows",
    "unit_size",
    "write",
]
