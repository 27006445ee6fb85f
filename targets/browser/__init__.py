"""The browser target is ONNX without 3 bits, for which WebAssembly has no kernel, with files in the places where transformers.js looks.

Prices, sizes, memory and the measuring run are those of onnxruntime's CPU build, which a host can measure.  That build also rounds inputs
of 8- and 2-bit products, which WebAssembly does not.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial

from edgemoe.ir import Model, Report, Unit
from edgemoe.targets import onnx
from edgemoe.targets.onnx.files import allowed
from edgemoe.targets.onnx.writer import write

__all__ = ["TARGET"]

LAYOUT = "transformers.js"


def _offered_formats(model: Model, unit: Unit) -> tuple[str, ...]:
    """Formats that can store a unit and that WebAssembly runs.

    Raises:
        ModelError: no format fits.
    """
    return tuple(name for name in onnx.TARGET.offered_formats(model, unit) if allowed(name, LAYOUT))


def _launch_lines(report: Report) -> list[str]:
    """JavaScript that runs the artifact."""
    return [
        'import path from "node:path";',
        'import { pipeline, env } from "@huggingface/transformers"; // npm install @huggingface/transformers@4',
        "",
        "env.localModelPath = path.dirname(import.meta.dirname);",
        'const generator = await pipeline("text-generation", path.basename(import.meta.dirname));',
        f'console.log(await generator("Once upon a time", {{ max_new_tokens: {min(report.plan.context, 512) - 8} }}));',
    ]


TARGET = replace(
    onnx.TARGET,
    name="browser",
    offered=tuple(name for name in onnx.TARGET.offered if allowed(name, LAYOUT)),
    offered_formats=_offered_formats,
    write=partial(write, layout=LAYOUT),
    words=replace(
        onnx.TARGET.words,
        library="transformers.js",
        language="js",
        launch_note="As a module in the folder of this file:",
        launch_lines=_launch_lines,
    ),
)
