"""This module prints plans, sweeps and reports as rich tables, with untrusted texts escaped."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from edgemoe.base.units import format_bytes, plain
from edgemoe.ir import Plan, Report, Round, counts_text
from edgemoe.report.words import (
    MEMORY_PARTS,
    allowed_size,
    billions,
    bound_words,
    dropped_experts,
    dropping,
    kept_words,
    mean_bits,
    nats,
    perplexities,
    picks,
    proof,
    ranges,
    shares_by_format,
    shares_by_group,
)
from edgemoe.targets import find_target

if TYPE_CHECKING:
    from rich.console import Group, RenderableType


def _pairs(rows: Iterable[tuple[str, str]]) -> RenderableType:
    from rich.table import Table
    from rich.text import Text

    table = Table.grid(padding=(0, 2))
    table.add_column(style="dim", no_wrap=True)
    table.add_column(overflow="fold")
    for label, value in rows:
        table.add_row(label, Text(plain(value)))
    return table


def _grid(columns: Iterable[str], rows: Iterable[Iterable[str]], *, justify: Literal["left", "right"] = "right") -> RenderableType:
    from rich import box
    from rich.table import Table
    from rich.text import Text

    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, collapse_padding=True, header_style="bold")
    for index, column in enumerate(columns):
        table.add_column(column, justify=justify if index else "left", overflow="fold")
    for row in rows:
        table.add_row(*(Text(plain(cell)) for cell in row))
    return table


def _common_facts(plan: Plan, own_top_k: int = 0) -> list[tuple[str, str]]:
    return [
        ("budget", f"{format_bytes(plan.budget)} at a context of {plan.context} tokens"),
        ("experts", f"{kept_words(plan)}, {picks(plan, own_top_k)}"),
        *([("width", f"every expert cut to its {plan.width} best neurons")] if plan.width else []),
        ("formats", ", ".join(f"{name} {size / max(plan.file_size, 1):.1%}" for name, size in shares_by_format(plan).items())),
    ]


def summarize_plan(plan: Plan) -> Group:
    """The plan as `edgemoe plan` prints it: kept experts, formats, bytes, nats, and the proven bound."""
    from rich.console import Group
    from rich.text import Text

    parts = [f"{word} {format_bytes(plan.memory[part])}" for part, word in MEMORY_PARTS.items() if plan.memory.get(part)]
    facts = [
        ("model", plan.model_name),
        *([("prices", plan.origin)] if plan.origin else []),
        *_common_facts(plan),
        ("file", f"{format_bytes(plan.file_size)}, {plan.file_size} bytes; the budget allows {allowed_size(plan)}"),
        ("peak memory", f"{format_bytes(plan.memory['peak'])}: {', '.join(parts)}"),
        ("KL", f"{nats(plan.predicted_kl)} nats per token predicted; cost {plan.q:.6g}, of it {nats(plan.drop_q)} for {dropping(plan)}"),
        ("bound", bound_words(plan)),
    ]
    n_layers = len(plan.kept)
    shown = range(n_layers) if n_layers <= 12 else [*range(6), n_layers - 2, n_layers - 1]
    if plan.drawn:
        layers = [(str(plan.layers[row]), f"{len(plan.kept[row])} of {plan.n_experts}", "") for row in shown]
    else:
        layers = [(str(plan.layers[row]), ranges(plan.kept[row], 40), ranges(dropped_experts(plan, row), 26)) for row in shown]
    roles = [(group, ", ".join(formats), format_bytes(sum(formats.values()))) for group, formats in shares_by_group(plan).items()]
    tables = [
        _grid(("bytes by role", "formats", "bytes"), roles),
        _grid(("layer", "kept", "" if plan.drawn else "dropped"), layers, justify="left"),
    ]
    said = [Text("which experts stay is known only after `edgemoe calibrate`", style="dim")] if plan.drawn else []
    more = [Text(f"and {n_layers - len(layers)} layers between", style="dim")] if len(layers) < n_layers else []
    return Group(_pairs(facts), *tables, *more, *said)


def summarize_sweep(points: Iterable[tuple[int, Plan | None, bool]]) -> RenderableType:
    """A sweep as `edgemoe plan --sweep` prints it, with one line for each (budget, plan, carried over from the budget below)."""
    points = list(points)
    large = max((budget for budget, *_ in points), default=0) >= 10**9
    (unit, ten, two) = ("G", 10**9, 2**30) if large else ("M", 10**6, 2**20)
    rows = []
    for budget, plan, carried_over in points:
        sizes = (f"{budget / ten:.2f}", f"{budget / two:.2f}")
        if plan is None:
            rows.append((*sizes, "nothing fits", "", "", "", ""))
            continue
        proof = "as above" if carried_over else f"{plan.gap:.3%}"
        kept = f"{counts_text(plan)} of {plan.n_experts}"
        rows.append((*sizes, f"{plan.file_size / ten:.2f}", f"{plan.file_size / two:.2f}", kept, nats(plan.predicted_kl), proof))
    heads = (f"budget {unit}B", f"{unit}iB", f"file {unit}B", f"{unit}iB", "kept", "KL predicted", "gap")
    return _grid(heads, rows)


def summarize_report(report: Report) -> Group:
    """The report as `edgemoe build` prints it at the end: promised beside measured figures, and the places of the files."""
    from rich.console import Group
    from rich.text import Text

    plan, model, words = report.plan, report.model, find_target(report.plan.target).words
    size = "as predicted" if report.artifact.model_size == plan.file_size else f"{plan.file_size} predicted"
    peak = f"{format_bytes(report.measured_peak)} measured" if report.measured_peak else "not measured"
    loss = f"{nats(report.measured_kl)} measured" if report.scores else "not measured"
    speed = f"{report.prompt_tokens_per_second:.1f} prompt, {report.decode_tokens_per_second:.1f} decode tokens per second"
    speed += f"; memory bandwidth would allow {report.decode_ceiling:.0f} (estimate)" if report.decode_ceiling else ""
    facts = [
        ("model", f"{model['name']} ({model['model_type']}, {billions(model['n_weights'])} weights)"),
        *_common_facts(plan, int(model["top_k"])),
        ("bits per weight", f"{mean_bits(report.plan.units, plan):.3f}"),
        ("file", f"{format_bytes(report.artifact.model_size)}, {report.artifact.model_size} bytes, {size}"),
        ("peak memory", f"{peak}, {format_bytes(plan.memory['peak'])} predicted"),
        ("KL", f"{loss}, {nats(plan.predicted_kl)} predicted (mean, nats per token)"),
        *([(f"KL {words.beside}", nats(report.beside_kl))] if report.beside_kl and words.beside_in_summary else []),
        ("speed", speed if report.decode_tokens_per_second else "not measured"),
        ("plan", f"{proof(plan)}, gap {plan.gap:.3%}" if plan.gap < 1 else proof(plan)),
        ("artifact", str(report.artifact.path)),
        ("report", str(Path(report.artifact.folder) / "report.html")),
    ]
    heads = ("held-out text", "tokens", "KL mean", "median", "99%", "max", "top-1", "ppl was", "is")
    rows = [
        (s.name, str(s.tokens), *map(nats, (s.kl_mean, s.kl_median, s.kl_p99, s.kl_max)), f"{s.top1_agreement:.1%}", *perplexities(s))
        for s in report.scores
    ]
    problems = [Text(f"problem: {plain(p)}", style="bold red") for p in report.problems]
    return Group(_pairs(facts), *([_grid(heads, rows)] if rows else []), *_refinement(report.rounds), *problems)


def _refinement(rounds: tuple[Round, ...]) -> list[RenderableType]:
    """KL of every round and of its drops alone, predicted and after a measurement."""
    if not rounds:
        return []
    heads = ("refinement", "kept", "KL predicted", "expected", "drops predicted", "expected")
    rows = [
        (str(n), str(r.count), *map(nats, (r.predicted, r.expected, r.predicted_drops, r.expected_drops))) for n, r in enumerate(rounds)
    ]
    return [_grid(heads, rows)]
