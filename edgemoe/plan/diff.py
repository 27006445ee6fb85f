"""Plans for other tools and other plans: what changed between two, and a plan as llama-quantize and pruning scripts read it."""

from __future__ import annotations

import json
import re
from pathlib import Path

from edgemoe.base.errors import MachineError, UsageError
from edgemoe.base.storage import write_text
from edgemoe.base.units import format_bytes
from edgemoe.ir import Plan

KEEP_LIST, TYPE_FILE, COMMAND = "keep.json", "tensor-types.txt", "README.txt"


def diff_plans(before: Plan, after: Plan) -> list[str]:
    """What is different, in words: bytes, KL, experts, formats.

    Raises:
        UsageError: plans of different models.
    """
    if before.model != after.model:
        raise UsageError("the two plans were made for different checkpoints")
    lines = [
        f"budget {format_bytes(before.budget)} -> {format_bytes(after.budget)}",
        f"file   {format_bytes(before.file_size)} -> {format_bytes(after.file_size)} ({after.file_size - before.file_size:+d} bytes)",
        f"KL     {before.predicted_kl:.4g} -> {after.predicted_kl:.4g} nats predicted ({after.predicted_kl - before.predicted_kl:+.4g})",
        f"kept   {_counts(before)} -> {_counts(after)} experts of a layer",
    ]
    for row, (old, new) in enumerate(zip(before.kept, after.kept, strict=True)):
        out, back = sorted(set(old) - set(new)), sorted(set(new) - set(old))
        if out or back:
            lines.append(
                f"  experts of layer {after.layers[row]}:" + (f" out {_list(out)}" if out else "") + (f" in {_list(back)}" if back else "")
            )
    changed = [n for n in (*before.formats, *after.formats) if before.formats.get(n) != after.formats.get(n)]
    for name in dict.fromkeys(changed):
        old_size, new_size = before.sizes.get(name, 0), after.sizes.get(name, 0)
        lines.append(f"  {name}: {before.formats.get(name, '-')} -> {after.formats.get(name, '-')} ({new_size - old_size:+d} bytes)")
    return lines if len(lines) > 4 else [*lines, "  the same experts and formats"]


def _counts(plan: Plan) -> str:
    return str(plan.count) if plan.has_one_count else f"{min(map(len, plan.kept))} to {plan.count}"


def _list(experts: list[int], most: int = 24) -> str:
    return " ".join(map(str, experts[:most])) + (f" and {len(experts) - most} more" if len(experts) > most else "")


def tensor_type_lines(plan: Plan) -> list[str]:
    """One anchored pattern for each tensor, as llama-quantize's --tensor-type-file wants them."""
    return [f"^{re.escape(name)}$={fmt.lower()}".replace("\\_", "_") for name, fmt in plan.formats.items()]


def export_plan(plan: Plan, folder: Path) -> list[Path]:
    """Write a keep list and a tensor-type file, and how to use them.

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
    contents = {KEEP_LIST: json.dumps(keep) + "\n", TYPE_FILE: "\n".join(tensor_type_lines(plan)) + "\n", COMMAND: text}
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for name, content in contents.items():
            write_text(folder / name, content)
    except OSError as error:
        raise MachineError(f"{folder}: cannot be written: {error.strerror}") from error
    return [folder / name for name in contents]


def gpu_flags(plan: Plan) -> list[str]:
    """llama.cpp flags that put a plan with a second pool where it was planned."""
    if not plan.vram:
        return []
    stacks = {name for name in plan.formats if re.fullmatch(r"blk\.\d+\.ffn_(gate|up|down)_exps\.weight", name)}
    in_ram = sorted((int(n.split(".")[1]), n.split(".")[2]) for n in stacks - set(plan.vram))
    by_role: dict[str, list[int]] = {}
    for layer, role in in_ram:
        by_role.setdefault(role, []).append(layer)
    flags = ["-ngl 999", "--no-mmap"]
    for role, layers in sorted(by_role.items()):
        numbers = "|".join(map(str, layers))
        flags.append(f'-ot "blk\\.({numbers})\\.{role}\\.weight=CPU"')
    return flags
