"""ONNX for onnxruntime: every expert is dropped or has a format of its own; each layer keeps as many experts as it likes."""

from edgemoe.targets import Runs
from edgemoe.targets.onnx.files import COPIED, PLACES
from edgemoe.targets.onnx.formats import OFFERED, input_block, round_rows
from edgemoe.targets.onnx.memory import memory_parts, on_device, unit_extra, unit_staging
from edgemoe.targets.onnx.rounding import descend_rows, feeds_back, pack_rows, unpack_rows
from edgemoe.targets.onnx.run import check_tokenizer, run, runtime
from edgemoe.targets.onnx.writer import fixed_size, list_units, offered_formats, unit_size, write

FORM = "experts"
SPLITS = False  # the graph is a file of its own, and the data lie in one
FIXED_NAMES = (*(name for names in PLACES.values() for name in names), "config.json", "genai_config.json", *COPIED)
RUNS = Runs(
    compared={"exact": False},  # as it runs: what kernels round of their inputs is in our prices
    beside={"exact": True},
)
