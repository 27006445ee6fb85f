"""What reports and cards say differently of each target: how to run it, and what its second figure is."""

from __future__ import annotations

import shlex
from dataclasses import dataclass, replace

from edgemoe.base.units import plain
from edgemoe.ir import Report


@dataclass(frozen=True, slots=True, kw_only=True)
class Words:
    """What is said differently of each target."""

    library: str  # the front matter's library_name
    beside: str  # the second figure of KL
    beside_note: str
    launch_note: str
    language: str  # of the launch lines


WORDS = {
    "gguf": Words(
        library="gguf",
        beside="as deployed",
        beside_note='"As deployed" includes the runtime\'s own half-precision KV cache and flash attention.',
        launch_note="The lines that this plan is for: one sequence, F16 KV cache, micro-batch of 512, no memory mapping.",
        language="sh",
    ),
    "onnx": Words(
        library="onnxruntime",
        beside="8-bit experts in floats",
        beside_note='"Measured" is the file as it runs, inputs rounded to int8 where kernels do so, as in the prediction; '
        '"8-bit experts in floats" is the same file with ORT_QMOE_CPU_QNBIT_GEMM=fp32.',
        launch_note="In the folder of this file: one sequence, F32 KV cache.",
        language="python",
    ),
}
WORDS["browser"] = replace(WORDS["onnx"], library="transformers.js", language="js", launch_note="As a module in the folder of this file:")


def launch_lines(report: Report) -> list[str]:
    """How to run what the plan is for: commands for llama.cpp, Python for onnxruntime."""
    name, context = plain(report.artifact.files[0].name), report.plan.context
    if report.plan.target == "gguf":
        return [f"{tool} -m {shlex.quote(name)} -c {context} --no-mmap -ub 512" for tool in ("llama-server", "llama-cli")]
    if report.plan.target == "browser":
        return [
            'import path from "node:path";',
            'import { pipeline, env } from "@huggingface/transformers"; // npm install @huggingface/transformers@4',
            "",
            "env.localModelPath = path.dirname(import.meta.dirname);",
            'const generator = await pipeline("text-generation", path.basename(import.meta.dirname));',
            f'console.log(await generator("Once upon a time", {{ max_new_tokens: {min(context, 512) - 8} }}));',
        ]
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
