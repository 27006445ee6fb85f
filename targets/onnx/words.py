"""This module writes the lines of reports and cards that say how onnxruntime-genai and onnxruntime run an ONNX folder."""

from __future__ import annotations

from edgemoe.base.units import plain
from edgemoe.ir import Report
from edgemoe.targets import Words


def launch_lines(report: Report) -> list[str]:
    """Python code that runs the artifact."""
    name, context = plain(report.artifact.files[0].name), report.plan.context
    return [
        "import onnxruntime_genai as og  # pip install onnxruntime-genai 'onnxruntime>=1.32'",
        "",
        'model = og.Model(".")',
        "tokenizer = og.Tokenizer(model)",
        "params = og.GeneratorParams(model)",
        f"params.set_search_options(max_length={min(context, 512)})  # at most {context}",
        "generator = og.Generator(model, params)",
        'generator.append_tokens(tokenizer.encode("Once upon a time"))',
        "while not generator.is_done():",
        "    generator.generate_next_token()",
        "print(tokenizer.decode(generator.get_sequence(0)))",
        "",
        "# or the graph itself:",
        f'# onnxruntime.InferenceSession({name!r}, providers=["CPUExecutionProvider"])',
    ]


WORDS = Words(
    library="onnxruntime",
    beside="8-bit experts in floats",
    beside_in_summary=True,
    beside_note='"Measured" is the file as it runs, inputs rounded to int8 where kernels do so, as in the prediction; '
    '"8-bit experts in floats" is the same file with ORT_QMOE_CPU_QNBIT_GEMM=fp32.',
    launch_note="In the folder of this file: one sequence, F32 KV cache.",
    language="python",
    launch_lines=launch_lines,
)
