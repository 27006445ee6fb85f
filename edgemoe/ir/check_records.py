"""This module checks that plans and reports are coherent, so that whoever opens one can trust it even if another program wrote the file."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

from edgemoe.base.errors import ModelError

MOST = 2**53  # whole numbers up to here are exact in floats
MODEL_NUMBERS = ("n_layers", "n_experts", "top_k", "hidden_size", "n_weights", "n_bytes")  # what a report says of the original
SAMPLE_TEXTS = ("prompt", "text")


def check_plan(plan: Any) -> None:
    """Refuse a plan whose parts contradict each other.

    Raises:
        ModelError: names the field.
    """
    _counts("plan", plan, ("budget", "context", "file_size", "width"))
    _counts("plan", plan, ("n_experts", "top_k"), least=1)
    _numbers("plan", plan, ("q", "drop_q", "predicted_kl", "bound", "gap", "price"))
    _need(all(math.isfinite(v) for v in plan.domain_q.values()), "plan", "domain_q", "holds what is no finite number")
    _need("peak" in plan.memory, "plan", "memory", "has no 'peak'")
    _need(_all_counts(plan.memory.values()), "plan", "memory", "holds what is no number of bytes")
    _need(bool(plan.kept), "plan", "kept", "is empty")
    names = {unit.name for unit in plan.units}
    _need(len(names) == len(plan.units), "plan", "units", "one is there twice")
    for field in ("formats", "sizes"):
        _need(set(getattr(plan, field)) == names, "plan", field, "does not name exactly the units")
    _need(_all_counts(plan.sizes.values()), "plan", "sizes", "holds what is no number of bytes")
    _need(set(plan.vram) <= names, "plan", "vram", "names what is no unit")
    _need(_all_counts((u.n_weights for u in plan.units), 1), "plan", "units", "one has no weights")
    layers = {unit.layer for unit in plan.units if unit.of_experts}
    _need(len(layers) in (0, len(plan.kept)), "plan", "kept", f"has {len(plan.kept)} rows for {len(layers)} layers with experts")


def check_report(report: Any) -> None:
    """Refuse a report whose figures are no figures.

    Raises:
        ModelError: names the field.
    """
    _need(isinstance(report.model.get("name"), str), "report", "model", "has no name")
    for name in MODEL_NUMBERS:
        _need(_all_counts([report.model.get(name)], 1), "report", f"model.{name}", "is no positive number")
    _counts("report", report, ("measured_peak",))
    speeds = ("prompt_tokens_per_second", "decode_tokens_per_second", "decode_ceiling")
    _numbers("report", report, ("measured_kl", "beside_kl", *speeds))
    for n, point in enumerate(report.frontier):
        _need({"file_size", "predicted_kl"} <= set(point), "report", f"frontier[{n}]", "lacks file_size or predicted_kl")
        _need(all(math.isfinite(v) and abs(v) <= MOST for v in point.values()), "report", f"frontier[{n}]", "holds what is no number")
    for n, score in enumerate(report.scores):
        values = [getattr(score, name) for name in score.__slots__ if name != "name"]
        _need(all(math.isfinite(v) and abs(v) <= MOST for v in values), "report", f"scores[{n}]", "holds what is no finite number")
    for n, round_ in enumerate(report.rounds):
        values = [getattr(round_, name) for name in round_.__slots__]
        _need(all(math.isfinite(v) and abs(v) <= MOST for v in values), "report", f"rounds[{n}]", "holds what is no finite number")
    for n, sample in enumerate(report.samples):
        found = all(isinstance(sample.get(name), str) for name in SAMPLE_TEXTS)
        _need(found, "report", f"samples[{n}]", f"lacks {' or '.join(SAMPLE_TEXTS)}")


def check_artifact(artifact: Any) -> None:
    """Refuse an artifact without files.

    Raises:
        ModelError: names the field.
    """
    _need(bool(artifact.files), "artifact", "files", "is empty")
    _need(_all_counts(f.size for f in artifact.files), "artifact", "files", "one has no size")


def _need(holds: bool, record: str, field: str, message: str) -> None:
    if not holds:
        raise ModelError(f"{record}: {field}: {message}", hint="make it again")


def _all_counts(values: Iterable[Any], least: int = 0) -> bool:
    return all(isinstance(v, int) and not isinstance(v, bool) and least <= v <= MOST for v in values)


def _counts(record: str, values: Any, names: Iterable[str], least: int = 0) -> None:
    for name in names:
        value = getattr(values, name)
        _need(_all_counts([value], least), record, name, f"is {str(value)[:40]}, which is no number from {least} to {MOST}")


def _numbers(record: str, values: Any, names: Iterable[str]) -> None:
    for name in names:
        _need(math.isfinite(getattr(values, name)), record, name, "is no finite number")
