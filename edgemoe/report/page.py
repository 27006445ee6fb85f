"""This module writes a Report as report.json and report.html, and through model_card.py as the model card.

This file turns the record into geometry, and `report.html.j2` draws it; neither measures or decides anything.  The page is one file that
loads nothing from the network.  Sizes are bytes, KL is nats per token.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterable
from importlib.resources import files
from pathlib import Path
from typing import Any

from edgemoe.base.errors import MachineError
from edgemoe.base.files import write_text
from edgemoe.base.ownership import is_ours, seal_text
from edgemoe.base.storage import save_record
from edgemoe.base.units import format_bytes, plain
from edgemoe.ir import Plan, Report, Unit, counts_text
from edgemoe.report.model_card import render_card
from edgemoe.report.words import (
    MEMORY_PARTS,
    agreement,
    allowed_size,
    billions,
    dropped_experts,
    dropping,
    find_runs,
    kept_words,
    mean_bits,
    nats,
    perplexities,
    proof,
    ranges,
    shares_by_format,
    shares_by_group,
    surprise,
)
from edgemoe.targets import find_target

# The colour of a format follows the logarithm of its bits per weight, from the fewest in use to the most; the range ends at _TOP_BITS, so
# that 16-bit formats do not make the others look alike.  Few bits are closest to the paper's colour, in light and in dark.
_TOP_BITS = 9.0
_LIGHT = ("#f9cb5a", "#f0875a", "#c0508a", "#6b3a9c", "#28225e")
_DARK = ("#463f8f", "#8f48a3", "#d6587f", "#f59660", "#fde080")
_LETTER = 7  # units of the map for each letter beside it, an upper limit of the average
_CHART = {"width": 480, "height": 300, "left": 56, "right": 12, "top": 10, "bottom": 44}


def _mix(stops: tuple[str, ...], t: float) -> str:
    """The colour at `t` in [0, 1] along `stops`."""
    position = min(max(t, 0.0), 1.0) * (len(stops) - 1)
    i = min(int(position), len(stops) - 2)
    low, high = ([int(s[k : k + 2], 16) for k in (1, 3, 5)] for s in stops[i : i + 2])
    return "#" + "".join(f"{round(a + (b - a) * (position - i)):02x}" for a, b in zip(low, high, strict=True))


def _format_keys(report: Report) -> dict[str, dict[str, Any]]:
    """Every format in use, fewest bits first: its class in the page, bits per weight, bytes, and its colour on light and dark paper."""
    plan, totals = report.plan, shares_by_format(report.plan)
    bits = {name: max(mean_bits([u for u in report.plan.units if plan.formats[u.name] == name], plan), 0.1) for name in totals}
    low, high = min(bits.values(), default=1.0), min(max(bits.values(), default=1.0), _TOP_BITS)
    keys = {}
    for index, name in enumerate(sorted(totals, key=lambda n: (bits[n], n))):
        t = math.log(bits[name] / low) / math.log(max(high / low, 2.0))
        stacked = any(plan.formats[u.name] == name for u in report.plan.units if u.role.endswith("_exps"))
        key = {"css": f"f{index}", "bpw": bits[name], "size": totals[name], "stacked": stacked}
        keys[name] = {**key, "light": _mix(_LIGHT, t), "dark": _mix(_DARK, t)}
    return keys


def _map_row(units: list[Unit], plan: Plan, keys: dict[str, dict[str, Any]], row: int, box: dict[str, Any]) -> dict[str, Any]:
    """One layer of the map: a path for each band of kept cells, one for the holes, and a rectangle with a tooltip for each cell or run."""
    dropped, y, step = dropped_experts(plan, row), row * box["pitch"], box["step"]

    def find(ids: Iterable[int]) -> list[tuple[int, int]]:
        return find_runs(ids) if box["merged"] else [(e, e) for e in ids]

    def cells(runs: Iterable[tuple[int, int]], top: float, tall: float) -> str:
        widths = [(a * step, (b - a + 1) * step - box["gap"]) for a, b in runs]
        return "".join(f"M{x} {top:g}h{w}v{tall:g}h{-w}z" for x, w in widths)

    def words(unit: Unit) -> str:
        part = unit.role.removeprefix("ffn_").removesuffix("_exps")
        return f"{'' if unit.expert >= 0 else part + ' '}{plan.formats[unit.name]} {mean_bits([unit], plan):.2f}"

    holes = find(dropped)
    if units and units[0].expert >= 0:  # every expert has a format of its own, so a cell has one colour
        by_format: dict[str, list[Unit]] = {}
        for unit in units:
            by_format.setdefault(plan.formats[unit.name], []).append(unit)
        groups = [(f, find(sorted(u.expert for u in by_format[f])), words(by_format[f][0])) for f in keys if f in by_format]
        bands = [(keys[f]["css"], cells(runs, y, box["cell"])) for f, runs, _ in groups]
        hits = [(a, b, text) for _, runs, text in groups for a, b in runs]
        told = ", ".join(f"{f} x {len(by_format[f])}" for f, _, _ in groups)
    else:
        height, runs = box["cell"] / max(len(units), 1), find(plan.kept[row])
        bands = [(keys[plan.formats[u.name]]["css"], cells(runs, y + k * height, height)) for k, u in enumerate(units)]
        told = ", ".join(map(words, units)) or "kept"
        hits = [(a, b, told) for a, b in runs]
    hits = sorted([*hits, *((a, b, "dropped") for a, b in holes)])
    return {
        "y": y,
        "bands": bands,
        "holes": cells(holes, y, box["cell"]),
        "hits": [(a * step, (b - a + 1) * step, f"expert {a}" if a == b else f"experts {a}-{b}", text) for a, b, text in hits],
        "words": told,
        "dropped": ranges(dropped),
    }


def _expert_map(report: Report, keys: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """Geometry of the layer x expert map: a row for each layer, a band for each projection; large maps merge equal neighbours."""
    plan, n_layers, n_experts = report.plan, len(report.plan.kept), report.plan.n_experts
    step, band = min(max(1152 // n_experts, 2), 36), min(max(640 // (3 * n_layers), 2), 10)
    pitch = 3 * band + (4 if band > 6 else 1)
    alone = any(unit.expert >= 0 for unit in report.plan.units)  # in this case colours say more than a row of words can
    beside = pitch >= 13 and n_experts * step <= 760 and not alone
    box = {
        "step": step,
        "gap": 2 if step >= 10 else int(step >= 5),
        "cell": 3 * band,
        "pitch": pitch,
        "merged": n_experts * n_layers > 10_000,
        "beside": beside,  # room for the formats at the right of each row
        "width": n_experts * step,
        "height": n_layers * pitch,
        "columns": range(0, n_experts, next(s for s in (1, 2, 4, 8, 16, 32, 64, n_experts) if s * step >= 26 or s >= n_experts)),
        "labelled": next(s for s in (1, 2, 5, 10, 20, n_layers) if s * pitch >= 13 or s >= n_layers),
    }
    stacks: dict[int, list[Unit]] = {}
    for unit in report.plan.units:
        if unit.role.endswith("_exps"):
            stacks.setdefault(unit.layer, []).append(unit)
    layers = sorted(stacks) if len(stacks) == n_layers else range(n_layers)
    rows = [{"layer": layer, **_map_row(stacks.get(layer, []), plan, keys, i, box)} for i, layer in enumerate(layers)]
    words = _LETTER * max(len(row["words"]) for row in rows) + 20 if beside else 8
    return {**box, "total": n_experts * step + 44 + words, "rows": rows, "alone": alone}


def _ticks(low: float, high: float) -> list[float]:
    """About five round numbers from low to high."""
    raw = (high - low) / 5
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(m * power for m in (1, 2, 2.5, 5, 10) if m * power >= raw)
    return [k * step for k in range(math.ceil(low / step), math.floor(high / step) + 1)]


def _log_ticks(low: float, high: float) -> list[float]:
    exponents = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    fine = [m * 10.0**e for e in exponents for m in (1, 2, 5) if low <= m * 10.0**e <= high]
    return fine if len(fine) <= 7 else [10.0**e for e in exponents if low <= 10.0**e <= high]


def _kl_chart(report: Report) -> dict[str, Any] | None:
    """Geometry of the chart of KL against size, or None if there is no positive KL to draw."""
    plan, allowed = report.plan, allowed_size(report.plan)
    curve = sorted((p["file_size"], p["predicted_kl"]) for p in report.frontier if p["predicted_kl"] > 0)
    marks = {"predicted": (plan.file_size, plan.predicted_kl), "measured": (report.artifact.model_size, report.measured_kl)}
    marks = {name: point for name, point in marks.items() if point[1] > 0}
    points = [*curve, *marks.values()]
    if not points:
        return None
    sizes, losses = [float(p[0]) for p in points], [math.log10(p[1]) for p in points]
    sizes += [allowed] if min(sizes) / 2 < allowed < max(sizes) * 1.6 else []
    pad_x, pad_y = (
        max((max(sizes) - min(sizes)) * 0.05, max(sizes) * 0.01),
        max((max(losses) - min(losses)) * 0.1, (0.8 - max(losses) + min(losses)) / 2),
    )
    x0, x1, y0, y1 = max(min(sizes) - pad_x, 0.0), max(sizes) + pad_x, min(losses) - pad_y, max(losses) + pad_y
    box = _CHART

    def x(size: float) -> float:
        return round(box["left"] + (size - x0) / (x1 - x0) * (box["width"] - box["left"] - box["right"]), 1)

    def y(loss: float) -> float:
        return round(box["height"] - box["bottom"] - (math.log10(loss) - y0) / (y1 - y0) * (box["height"] - box["top"] - box["bottom"]), 1)

    unit, name = next((u, n) for u, n in ((10**9, "GB"), (10**6, "MB"), (10**3, "kB"), (1, "B")) if x1 >= 2 * u or u == 1)
    return {
        **box,
        "curve": [(x(s), y(k), f"{format_bytes(round(s))}: {nats(k)} nats per token predicted") for s, k in curve],
        "marks": {m: (x(s), y(k)) for m, (s, k) in marks.items()},
        "allowed": x(allowed) if x0 <= allowed <= x1 else None,
        "x_ticks": [(x(t * unit), f"{t:g}") for t in _ticks(x0 / unit, x1 / unit)],
        "y_ticks": [(y(t), f"{t:g}") for t in _log_ticks(10**y0, 10**y1)],
        "unit": name,
    }


def render_html(report: Report) -> str:
    """The report as one HTML page with inline SVG pictures, which loads nothing and runs no script."""
    from jinja2 import Environment, StrictUndefined

    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    environment.filters.update(
        bytes=format_bytes,
        sum_values=lambda sizes: sum(sizes.values()),
        nats=nats,
        plain=plain,
        billions=billions,
        perplexities=perplexities,
    )
    template = environment.from_string(files("edgemoe.report").joinpath("report.html.j2").read_text(encoding="utf-8"))
    plan, keys = report.plan, _format_keys(report)
    page = template.render(
        report=report,
        plan=plan,
        model=report.model,
        keys=keys,
        map=_expert_map(report, keys),
        groups=shares_by_group(plan),
        chart=_kl_chart(report),
        allowed=allowed_size(plan),
        memory=[(word, plan.memory[part]) for part, word in MEMORY_PARTS.items() if plan.memory.get(part)],
        tensors=[(u, plan.formats[u.name], plan.sizes[u.name], mean_bits([u], plan)) for u in report.plan.units],
        bpw=mean_bits(report.plan.units, plan),
        agreement=agreement(report),
        surprise=surprise(report),
        proof=proof(plan),
        dropping=dropping(plan, int(report.model["top_k"])),
        launch=find_target(plan.target).words.launch_lines(report),
        words=find_target(plan.target).words,
        kept=kept_words(plan),
        counts=counts_text(plan),
        whole=min(map(len, plan.kept)) == plan.n_experts,
    )
    return page.encode("utf-8", "replace").decode("utf-8")


PAGES = ("report.json", "report.html", "README.md")  # what write_report writes


def write_report(report: Report, folder: Path) -> None:
    """Write report.json, report.html and README.md, each whole or not at all; a file that is not ours stays, and a warning says so.

    Raises:
        MachineError: the folder cannot be written.
    """
    page, card = render_html(report), render_card(report)
    try:
        if _is_free(folder / "report.json"):
            save_record(folder / "report.json", report)
        for path, text in ((folder / "report.html", page), (folder / "README.md", card)):
            if _is_free(path):
                write_text(path, seal_text(text))
    except OSError as error:
        raise MachineError(f"{folder}: the report cannot be written: {error}", hint="check the folder and the space left") from error


def _is_free(path: Path) -> bool:
    if not path.exists() or is_ours(path):
        return True
    logging.getLogger("edgemoe").warning("%s: was left as it is, because edgemoe did not write it or somebody changed it", path)
    return False
