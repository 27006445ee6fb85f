"""This module writes the lines of reports and cards that say how llama.cpp and Ollama run a GGUF."""

from __future__ import annotations

import shlex

from edgemoe.base.units import plain
from edgemoe.ir import Report
from edgemoe.targets import Words


def launch_lines(report: Report) -> list[str]:
    """Commands of llama.cpp that run the artifact."""
    name, context = plain(report.artifact.files[0].name), report.plan.context
    return [f"{tool} -m {shlex.quote(name)} -c {context} --no-mmap -ub 512" for tool in ("llama-server", "llama-cli")]


def modelfile(report: Report) -> list[str]:
    """Lines of Ollama's Modelfile."""
    settings = (f"num_ctx {report.plan.context}", "num_batch 512", "use_mmap false")
    return [f"FROM ./{report.artifact.files[0].name}", *(f"PARAMETER {setting}" for setting in settings)]


WORDS = Words(
    library="gguf",
    beside="as deployed",
    beside_in_summary=False,
    beside_note='"As deployed" includes the runtime\'s own half-precision KV cache and flash attention.',
    launch_note="The lines that this plan is for: one sequence, F16 KV cache, micro-batch of 512, no memory mapping.",
    more=" without memory mapping; more context, more slots or a GPU need more",
    language="sh",
    launch_lines=launch_lines,
    modelfile=modelfile,
)
