"""ONNX for browsers: what the ONNX target offers but 3 bits, which WebAssembly has no kernel for, with files where transformers.js looks.

Prices, sizes, memory and the measuring run are those of onnxruntime's CPU build, which a host can measure; WebAssembly rounds less.
"""

from __future__ import annotations

from functools import partial

from edgemoe.ir import Model, Unit
from edgemoe.targets import onnx
from edgemoe.targets.onnx import (
    FIXED_NAMES,
    FORM,
    RUNS,
    SPLITS,
    check_tokenizer,
    descend_rows,
    feeds_back,
    fixed_size,
    input_block,
    list_units,
    memory_parts,
    on_device,
    pack_rows,
    round_rows,
    run,
    runtime,
    unit_extra,
    unit_size,
    unit_staging,
    unpack_rows,
)
from edgemoe.targets.onnx.files import allowed

LAYOUT = "transformers.js"
OFFERED = tuple(name for name in onnx.OFFERED if allowed(name, LAYOUT))
write = partial(onnx.write, layout=LAYOUT)


def offered_formats(model: Model, unit: Unit) -> tuple[str, ...]:
    """Formats that can store a unit and that WebAssembly runs.

    Raises:
        ModelError: no format fits.
    """
    return tuple(name for name in onnx.offered_formats(model, unit) if allowed(name, LAYOUT))
