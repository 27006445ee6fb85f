"""This module exports a plan as files and flags for llama.cpp's own tools."""

from __future__ import annotations

import re
from pathlib import Path

from edgemoe.base.errors import MachineError
from edgemoe.base.files import write_text
from edgemoe.base.storage import save_sealed
from edgemoe.ir import Plan

FILES = KEEP_LIST, TYPE_FILE, COMMAND = "keep.json", "tensor-types.txt", "README.txt"


def tensor_type_lines(plan: Plan) -> list[str]:
    """One anchored pattern for each tensor, as llama-quantize's --tensor-type-file wants them."""
    return [f"^{re.escape(name)}$={fmt.lower()}".replace("\\_", "_") for name, fmt in plan.formats.items()]


def export_plan(plan: Plan, folder: Path) -> list[Path]:
    """Write a keep list, a tensor-type file, and a text that says how to use them.

    Raises:
        MachineError: the folder cannot be written.
    """
    output = {"token_embd.weight": "--token-embedding-type", "output.weight": "--output-tensor-type"}
    own = " ".join(f"{flag} {plan.formats[name].lower()}" for name, flag in output.items() if name in plan.formats)
    keep = {
        "model": plan.model_name,
        "n_experts": plan.n_experts,
        "top_k": plan.top_k,
        "layers": plan.layers,
        "keep": [list(k) for k in plan.kept],
    }
    text = (
        f"{KEEP_LIST}: experts to keep, a list for each of its layers (numbers of the original model).\n"
        f"{TYPE_FILE}: the type of every tensor, for a GGUF from which the other experts are gone:\n\n"
        f"llama-quantize --imatrix IMATRIX --tensor-type-file {TYPE_FILE} {own} PRUNED-F16.gguf OUT.gguf Q8_0\n"
    )
    contents = {TYPE_FILE: "\n".join(tensor_type_lines(plan)) + "\n", COMMAND: text}
    try:
        folder.mkdir(parents=True, exist_ok=True)
        save_sealed(folder / KEEP_LIST, keep)
        for name, content in contents.items():
            write_text(folder / name, content)
    except OSError as error:
        raise MachineError(f"{folder}: cannot be written: {error.strerror}") from error
    return [folder / name for name in FILES]


def gpu_flags(plan: Plan) -> list[str]:
    """llama.cpp flags that place the tensors of a plan with a second pool as planned."""
    if not plan.vram:
        return []
    by_role: dict[str, list[int]] = {}
    for unit in plan.units:
        if unit.is_stack and unit.name not in plan.vram:
            by_role.setdefault(unit.role, []).append(unit.layer)
    flags = ["-ngl 999", "--no-mmap"]
    for role, layers in sorted(by_role.items()):
        numbers = "|".join(map(str, sorted(layers)))
        flags.append(f'-ot "blk\\.({numbers})\\.{role}\\.weight=CPU"')
    return flags
