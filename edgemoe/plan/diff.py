"""This module says in words what differs between two plans."""

from __future__ import annotations

from edgemoe.base.errors import UsageError
from edgemoe.base.units import format_bytes
from edgemoe.ir import Plan


def diff_plans(before: Plan, after: Plan) -> list[str]:
    """The differences between two plans in words: bytes, KL, experts, formats.

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
    drawn = before.drawn or after.drawn  # then how many stay is meant, not which
    for row, (old, new) in enumerate(zip(before.kept, after.kept, strict=True)):
        if drawn:
            if len(old) != len(new):
                lines.append(f"  experts of layer {after.layers[row]}: {len(old)} -> {len(new)}")
            continue
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
