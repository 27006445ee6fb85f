"""Report -> terminal summary, report.json, report.html and the model card.

One idea: this file turns the record into numbers and geometry, `report.html.j2` draws them; nothing is measured or decided here.
Every text of the model, the samples and the machine is untrusted: escaped in the page, in Markdown, in YAML and in the terminal.
The page is one file that asks the network for nothing.  Sizes are bytes, KL is nats per token.
"""

from __future__ import annotations

import math
import re
import shlex
from collections.abc import Iterable, Iterator
from importlib.resources import files
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from edgemoe.errors import MachineError
from edgemoe.ir import Plan, Report, TextScore, Unit, save_record, write_text
from edgemoe.units import format_bytes

if TYPE_CHECKING:
    from rich.console import Group, RenderableType

_GROUPS = {
    "ffn_gate_exps": "experts, gate",
    "ffn_up_exps": "experts, up",
    "ffn_down_exps": "experts, down",
    "token_embd": "embedding",
    "output": "output",
}
_GROUP_ORDER = (*_GROUPS.values(), "attention", "dense and shared", "router, norms, header")
_REST = _GROUP_ORDER[-1]
_MEMORY_PARTS = {"weights": "weights", "kv": "KV", "compute": "compute", "output": "logits", "staging": "staging", "runtime": "runtime"}
# Bits per weight -> colour, logarithmic, from the fewest in use to the most (but 16-bit formats must not squeeze the others together);
# few bits are closest to the paper, in light and in dark.
_TOP_BITS = 9.0
_LIGHT = ("#f9cb5a", "#f0875a", "#c0508a", "#6b3a9c", "#28225e")
_DARK = ("#463f8f", "#8f48a3", "#d6587f", "#f59660", "#fde080")
_OLLAMA = "PARAMETER num_ctx {context}\nPARAMETER num_batch 512\nPARAMETER use_mmap false"
_CHART = {"width": 480, "height": 300, "left": 56, "right": 12, "top": 10, "bottom": 44}


# ---------------------------------------------------------------------------------------------------------------- words
def _plain(text: object) -> str:
    """One printable line: no control, escape or direction characters, which a hostile name could carry into a terminal."""
    return " ".join("".join(c if c.isprintable() else " " for c in str(text)).split())


def _nats(value: float) -> str:
    return f"{value:.4f}" if value == 0 or abs(value) >= 1e-3 else f"{value:.2e}"


def _billions(n_weights: int) -> str:
    return f"{n_weights / 1e9:.3g} billion" if n_weights >= 10**9 else f"{n_weights / 1e6:.3g} million"


def _runs(ids: Iterable[int]) -> list[tuple[int, int]]:
    """Ascending numbers as (first, last) of each unbroken run."""
    groups = ([e for _, e in run] for _, run in groupby(enumerate(ids), key=lambda pair: pair[1] - pair[0]))
    return [(run[0], run[-1]) for run in groups]


def _ranges(ids: Iterable[int], width: int = 0) -> str:
    """Numbers as text, "0-3 5 7-9"; cut after `width` characters if that is given."""
    text = " ".join(str(a) if a == b else f"{a}-{b}" for a, b in _runs(ids))
    return text if not width or len(text) <= width else text[: width - 3].rsplit(" ", 1)[0] + " ..."


def _dropped(plan: Plan, layer: int) -> list[int]:
    return sorted(set(range(plan.n_experts)) - set(plan.kept[layer]))


def _launch_lines(report: Report) -> list[str]:
    """The commands whose memory the plan predicts; none for a target that llama.cpp does not run."""
    name, context = shlex.quote(_plain(report.artifact.files[0].name)), report.plan.context
    tools = ("llama-server", "llama-cli") if report.plan.target == "gguf" else ()
    return [f"{tool} -m {name} -c {context} --no-mmap -ub 512" for tool in tools]


# -------------------------------------------------------------------------------------------------------------- numbers
def _group_of(name: str) -> str:
    role = name.removesuffix(".weight").rsplit(".", 1)[-1]
    return _GROUPS.get(role) or ("attention" if role.startswith("attn") else "dense and shared")


def _kept_weights(unit: Unit, plan: Plan) -> int:
    """Weights of a unit that are left after the drop."""
    return unit.n_weights * plan.count // plan.n_experts if unit.role.endswith("_exps") else unit.n_weights


def _bpw(units: Iterable[Unit], plan: Plan) -> float:
    """Bits per weight, scales and padding included."""
    pairs = [(plan.sizes[u.name], _kept_weights(u, plan)) for u in units]
    return 8 * sum(s for s, _ in pairs) / max(sum(n for _, n in pairs), 1)


def _shares_by_group(plan: Plan) -> dict[str, dict[str, int]]:
    """Bytes of the file by group of roles, then by format; `_REST` holds what no unit does."""
    shares: dict[str, dict[str, int]] = {group: {} for group in _GROUP_ORDER}
    for name, size in plan.sizes.items():
        formats = shares[_group_of(name)]
        formats[plan.formats[name]] = formats.get(plan.formats[name], 0) + size
    shares[_REST]["F32"] = plan.file_size - sum(plan.sizes.values())
    return {group: dict(sorted(formats.items())) for group, formats in shares.items() if sum(formats.values()) > 0}


def _shares_by_format(plan: Plan) -> dict[str, int]:
    """Bytes by format over all units, largest first."""
    totals: dict[str, int] = {}
    for name, size in plan.sizes.items():
        totals[plan.formats[name]] = totals.get(plan.formats[name], 0) + size
    return dict(sorted(totals.items(), key=lambda pair: (-pair[1], pair[0])))


def _allowed_size(plan: Plan) -> int:
    """Largest file that the budget allows: the budget less everything in memory that is not weights."""
    return plan.budget - (plan.memory["peak"] - plan.memory["weights"])


def _agreement(report: Report) -> float:
    """Share of held-out tokens where both models have the same first choice."""
    return sum(s.top1_agreement * s.tokens for s in report.scores) / max(sum(s.tokens for s in report.scores), 1)


# ------------------------------------------------------------------------------------------------------------- terminal
def _pairs(rows: Iterable[tuple[str, str]]) -> RenderableType:
    from rich.table import Table
    from rich.text import Text

    table = Table.grid(padding=(0, 2))
    table.add_column(style="dim", no_wrap=True)
    table.add_column(overflow="fold")
    for label, value in rows:
        table.add_row(label, Text(_plain(value)))
    return table


def _grid(columns: Iterable[str], rows: Iterable[Iterable[str]], *, justify: Literal["left", "right"] = "right") -> RenderableType:
    from rich import box
    from rich.table import Table
    from rich.text import Text

    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, collapse_padding=True, header_style="bold")
    for index, column in enumerate(columns):
        table.add_column(column, justify=justify if index else "left", overflow="fold")
    for row in rows:
        table.add_row(*(Text(_plain(cell)) for cell in row))
    return table


def _common_facts(plan: Plan) -> list[tuple[str, str]]:
    return [
        ("budget", f"{format_bytes(plan.budget)} at a context of {plan.context} tokens"),
        ("experts", f"{plan.count} of {plan.n_experts} kept in each of {len(plan.kept)} layers, the router picks {plan.top_k}"),
        ("formats", ", ".join(f"{name} {size / max(plan.file_size, 1):.1%}" for name, size in _shares_by_format(plan).items())),
    ]


def _proof(plan: Plan) -> str:
    return f"proven by {plan.solver}" if plan.proven else f"not proven ({plan.solver})"


def summarize_plan(plan: Plan) -> Group:
    """The plan as `edgemoe plan` prints it: what stays, in which formats, for how many bytes and nats, and what is proven."""
    from rich.console import Group
    from rich.text import Text

    parts = [f"{word} {format_bytes(plan.memory[part])}" for part, word in _MEMORY_PARTS.items() if plan.memory.get(part)]
    facts = [
        ("model", plan.model_name),
        *([("prices", plan.origin)] if plan.origin else []),
        *_common_facts(plan),
        ("file", f"{format_bytes(plan.file_size)}, {plan.file_size} bytes; the budget allows {_allowed_size(plan)}"),
        ("peak memory", f"{format_bytes(plan.memory['peak'])}: {', '.join(parts)}"),
        ("KL", f"{_nats(plan.predicted_kl)} nats per token predicted; cost {plan.q:.6g}, of it {_nats(plan.drop_q)} for dropping"),
        ("bound", f"no plan costs less than {plan.bound:.6g}, gap {plan.gap:.3%}, {_proof(plan)}"),
    ]
    n_layers = len(plan.kept)
    shown = range(n_layers) if n_layers <= 12 else [*range(6), n_layers - 2, n_layers - 1]
    layers = [(str(layer), _ranges(plan.kept[layer], 40), _ranges(_dropped(plan, layer), 26)) for layer in shown]
    roles = [(group, ", ".join(formats), format_bytes(sum(formats.values()))) for group, formats in _shares_by_group(plan).items()]
    tables = [_grid(("bytes by role", "formats", "bytes"), roles), _grid(("layer", "kept", "dropped"), layers, justify="left")]
    more = [Text(f"and {n_layers - len(layers)} layers between", style="dim")] if len(layers) < n_layers else []
    return Group(_pairs(facts), *tables, *more)


def summarize_sweep(points: Iterable[tuple[int, Plan | None, bool]]) -> RenderableType:
    """A sweep as `edgemoe plan --sweep` prints it, a line for each (budget, plan, carried over from the budget below)."""
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
        kept = f"{plan.count} of {plan.n_experts}"
        rows.append((*sizes, f"{plan.file_size / ten:.2f}", f"{plan.file_size / two:.2f}", kept, _nats(plan.predicted_kl), proof))
    heads = (f"budget {unit}B", f"{unit}iB", f"file {unit}B", f"{unit}iB", "kept", "KL predicted", "gap")
    return _grid(heads, rows)


def summarize_report(report: Report) -> Group:
    """The report as `edgemoe build` prints it at the end: promised beside measured, and where everything lies."""
    from rich.console import Group
    from rich.text import Text

    plan, model = report.plan, report.model
    size = "as predicted" if report.artifact.size == plan.file_size else f"{plan.file_size} predicted"
    peak = f"{format_bytes(report.measured_peak)} measured" if report.measured_peak else "not measured"
    loss = f"{_nats(report.measured_kl)} measured" if report.scores else "not measured"
    speed = f"{report.prompt_tokens_per_second:.1f} prompt, {report.decode_tokens_per_second:.1f} decode tokens per second"
    speed += f"; memory bandwidth would allow {report.decode_ceiling:.0f} (estimate)" if report.decode_ceiling else ""
    facts = [
        ("model", f"{model['name']} ({model['model_type']}, {_billions(model['n_weights'])} weights)"),
        *_common_facts(plan),
        ("bits per weight", f"{_bpw(report.units, plan):.3f}"),
        ("file", f"{format_bytes(report.artifact.size)}, {report.artifact.size} bytes, {size}"),
        ("peak memory", f"{peak}, {format_bytes(plan.memory['peak'])} predicted"),
        ("KL", f"{loss}, {_nats(plan.predicted_kl)} predicted (mean, nats per token)"),
        ("speed", speed if report.decode_tokens_per_second else "not measured"),
        ("plan", f"{_proof(plan)}, gap {plan.gap:.3%}"),
        ("artifact", str(report.artifact.path)),
        ("report", str(Path(report.artifact.folder) / "report.html")),
    ]
    heads = ("held-out text", "tokens", "KL mean", "median", "99%", "max", "top-1", "ppl was", "is")
    rows = [
        (s.name, str(s.tokens), *map(_nats, (s.kl_mean, s.kl_median, s.kl_p99, s.kl_max)), f"{s.top1_agreement:.1%}", *_perplexities(s))
        for s in report.scores
    ]
    problems = [Text(f"problem: {_plain(p)}", style="bold red") for p in report.problems]
    return Group(_pairs(facts), *([_grid(heads, rows)] if rows else []), *problems)


def _perplexities(score: TextScore) -> tuple[str, str]:
    return f"{score.original_perplexity:.3f}", f"{score.perplexity:.3f}"


# ----------------------------------------------------------------------------------------------------------------- page
def _mix(stops: tuple[str, ...], t: float) -> str:
    """The colour at `t` in [0, 1] along `stops`."""
    position = min(max(t, 0.0), 1.0) * (len(stops) - 1)
    i = min(int(position), len(stops) - 2)
    low, high = ([int(s[k : k + 2], 16) for k in (1, 3, 5)] for s in stops[i : i + 2])
    return "#" + "".join(f"{round(a + (b - a) * (position - i)):02x}" for a, b in zip(low, high, strict=True))


def _format_keys(report: Report) -> dict[str, dict[str, Any]]:
    """Every format in use, fewest bits first: its class in the page, bits per weight, bytes, and its colour on light and dark paper."""
    plan, totals = report.plan, _shares_by_format(report.plan)
    bits = {name: max(_bpw([u for u in report.units if plan.formats[u.name] == name], plan), 0.1) for name in totals}
    low, high = min(bits.values(), default=1.0), min(max(bits.values(), default=1.0), _TOP_BITS)
    keys = {}
    for index, name in enumerate(sorted(totals, key=lambda n: (bits[n], n))):
        t = math.log(bits[name] / low) / math.log(max(high / low, 2.0))
        stacked = any(plan.formats[u.name] == name for u in report.units if u.role.endswith("_exps"))
        key = {"css": f"f{index}", "bpw": bits[name], "size": totals[name], "stacked": stacked}
        keys[name] = {**key, "light": _mix(_LIGHT, t), "dark": _mix(_DARK, t)}
    return keys


def _map_row(units: list[Unit], plan: Plan, keys: dict[str, dict[str, Any]], row: int, box: dict[str, Any]) -> dict[str, Any]:
    """One layer of the map: a path for each band of kept cells, one for the holes, and a rectangle with a tooltip for each cell or run."""
    dropped, y, step, height = _dropped(plan, row), row * box["pitch"], box["step"], box["cell"] / max(len(units), 1)
    solid, holes = (_runs(ids) if box["merged"] else [(e, e) for e in ids] for ids in (plan.kept[row], dropped))

    def cells(runs: Iterable[tuple[int, int]], top: float, tall: float) -> str:
        widths = [(a * step, (b - a + 1) * step - box["gap"]) for a, b in runs]
        return "".join(f"M{x} {top:g}h{w}v{tall:g}h{-w}z" for x, w in widths)

    words = (
        ", ".join(f"{u.role.removeprefix('ffn_').removesuffix('_exps')} {plan.formats[u.name]} {_bpw([u], plan):.2f}" for u in units)
        or "kept"
    )
    hits = sorted([(a, b, words) for a, b in solid] + [(a, b, "dropped") for a, b in holes])
    return {
        "y": y,
        "bands": [(keys[plan.formats[u.name]]["css"], cells(solid, y + k * height, height)) for k, u in enumerate(units)],
        "holes": cells(holes, y, box["cell"]),
        "hits": [(a * step, (b - a + 1) * step, f"expert {a}" if a == b else f"experts {a}-{b}", text) for a, b, text in hits],
        "words": words,
        "dropped": _ranges(dropped),
    }


def _expert_map(report: Report, keys: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """Geometry of the layer x expert map: a row for each layer, a band for each projection; large maps merge equal neighbours."""
    plan, n_layers, n_experts = report.plan, len(report.plan.kept), report.plan.n_experts
    step, band = min(max(1152 // n_experts, 2), 36), min(max(640 // (3 * n_layers), 2), 10)
    pitch = 3 * band + (4 if band > 6 else 1)
    beside = pitch >= 13 and n_experts * step <= 760
    box = {
        "step": step,
        "gap": 2 if step >= 10 else int(step >= 5),
        "cell": 3 * band,
        "pitch": pitch,
        "merged": n_experts * n_layers > 10_000,
        "beside": beside,  # room for the formats at the right of each row
        "width": n_experts * step,
        "height": n_layers * pitch,
        "total": n_experts * step + 44 + (290 if beside else 8),
        "columns": range(0, n_experts, next(s for s in (1, 2, 4, 8, 16, 32, 64, n_experts) if s * step >= 26 or s >= n_experts)),
        "labelled": next(s for s in (1, 2, 5, 10, 20, n_layers) if s * pitch >= 13 or s >= n_layers),
    }
    stacks: dict[int, list[Unit]] = {}
    for unit in report.units:
        if unit.role.endswith("_exps"):
            stacks.setdefault(unit.layer, []).append(unit)
    layers = sorted(stacks) if len(stacks) == n_layers else range(n_layers)
    rows = [{"layer": layer, **_map_row(stacks.get(layer, []), plan, keys, i, box)} for i, layer in enumerate(layers)]
    return {**box, "rows": rows}


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
    """Geometry of KL against size, or None when there is no positive KL to draw."""
    plan, allowed = report.plan, _allowed_size(report.plan)
    curve = sorted((p["file_size"], p["predicted_kl"]) for p in report.frontier if p["predicted_kl"] > 0)
    marks = {"predicted": (plan.file_size, plan.predicted_kl), "measured": (report.artifact.size, report.measured_kl)}
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
        "curve": [(x(s), y(k), f"{format_bytes(round(s))}: {_nats(k)} nats per token predicted") for s, k in curve],
        "marks": {m: (x(s), y(k)) for m, (s, k) in marks.items()},
        "allowed": x(allowed) if x0 <= allowed <= x1 else None,
        "x_ticks": [(x(t * unit), f"{t:g}") for t in _ticks(x0 / unit, x1 / unit)],
        "y_ticks": [(y(t), f"{t:g}") for t in _log_ticks(10**y0, 10**y1)],
        "unit": name,
    }


def render_html(report: Report) -> str:
    """The report as one HTML page: pictures are inline SVG, nothing is fetched, nothing runs."""
    from jinja2 import Environment, StrictUndefined

    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    environment.filters.update(
        bytes=format_bytes,
        sum_values=lambda sizes: sum(sizes.values()),
        nats=_nats,
        plain=_plain,
        billions=_billions,
        perplexities=_perplexities,
    )
    template = environment.from_string(files("edgemoe").joinpath("report.html.j2").read_text(encoding="utf-8"))
    plan, keys = report.plan, _format_keys(report)
    page = template.render(
        report=report,
        plan=plan,
        model=report.model,
        keys=keys,
        map=_expert_map(report, keys),
        groups=_shares_by_group(plan),
        chart=_kl_chart(report),
        allowed=_allowed_size(plan),
        memory=[(word, plan.memory[part]) for part, word in _MEMORY_PARTS.items() if plan.memory.get(part)],
        tensors=[(u, plan.formats[u.name], plan.sizes[u.name], _bpw([u], plan)) for u in report.units],
        bpw=_bpw(report.units, plan),
        agreement=_agreement(report),
        proof=_proof(plan),
        launch=_launch_lines(report),
    )
    return page.encode("utf-8", "replace").decode("utf-8")


# ----------------------------------------------------------------------------------------------------------------- card
def _markdown(text: object) -> str:
    """Text that Markdown and the HTML inside it show as it is, on one line and in one table cell."""
    return re.sub(r"[\\`*\[\]<>|~$&]|(?<![A-Za-z0-9])_|_(?![A-Za-z0-9])", r"\\\g<0>", _plain(text))


def _fence(text: str, language: str = "") -> str:
    """A code block that its own text cannot close."""
    ticks = "`" * max(3, 1 + max(map(len, re.findall("`+", text)), default=0))
    return f"{ticks}{language}\n{text}\n{ticks}\n"


def _table(columns: tuple[str, ...], rows: Iterable[Iterable[object]]) -> str:
    lines = [columns, ("---",) * len(columns), *([_markdown(cell) for cell in row] for row in rows)]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"


def render_card(report: Report) -> str:
    """The model card, README.md beside the artifact: front matter, files, what was done, measured quality, launch lines, limits."""
    import yaml

    plan, model = report.plan, report.model
    drop = (
        f"keeps {plan.count} of its {plan.n_experts} experts, chosen layer by layer"
        if plan.count < plan.n_experts
        else "keeps all its experts"
    )
    known = {key: model[key] for key in ("license", "base_model") if model.get(key)}
    tags = [plan.target, "moe", "imatrix", "edgemoe"]
    front = {**known, "base_model_relation": "quantized", "library_name": plan.target, "pipeline_tag": "text-generation", "tags": tags}
    largest = next(iter(_shares_by_format(plan)), "")
    parts = [
        f"---\n{yaml.safe_dump(front, sort_keys=False, width=10**6)}---\n",
        f"# {_markdown(model['name'])}, {plan.count} of {plan.n_experts} experts, {_bpw(report.units, plan):.2f} bits per weight\n",
        f"Made by edgemoe to run within {format_bytes(plan.budget)} at a context of {plan.context} tokens.\n",
        _table(("file", "mostly", "bytes", "size"), [(f.name, largest, f.size, format_bytes(f.size)) for f in report.artifact.files]),
        "## What was dropped, and how the rest is stored\n",
        f"Each of the {len(plan.kept)} layers {drop}; the router picks {plan.top_k} for every token. Router and norms stay F32.\n",
        _table(("part", "formats", "size"), [(g, ", ".join(f), format_bytes(sum(f.values()))) for g, f in _shares_by_group(plan).items()]),
        "Which experts were kept is in `report.json` and, as a picture, in `report.html`.\n",
        "## Measured against the original\n",
        *_quality(report),
    ]
    if plan.target == "gguf":
        ollama = [f"FROM ./{report.artifact.files[0].name}", *_OLLAMA.format(context=plan.context).splitlines()]
        launch = _fence("\n".join(_launch_lines(report)), "sh")
        parts += ["## Run it\n", launch, "Ollama, as a `Modelfile` (its memory was not measured):\n", _fence("\n".join(ollama))]
    if model.get("command"):
        parts += ["## How it was made\n", _fence(_plain(model["command"]), "sh")]
    parts += ["## Limits\n", "\n".join(f"- {limit}" for limit in _limits(report)) + "\n"]
    return "\n".join(parts).encode("utf-8", "replace").decode("utf-8")


def _quality(report: Report) -> Iterator[str]:
    if report.scores:
        heads = ("held-out text", "tokens", "KL mean", "KL median", "KL 99%", "same top-1", "perplexity", "here")
        losses = [tuple(map(_nats, (s.kl_mean, s.kl_median, s.kl_p99))) for s in report.scores]
        pairs = zip(report.scores, losses, strict=True)
        yield _table(heads, [(s.name, s.tokens, *loss, f"{s.top1_agreement:.1%}", *_perplexities(s)) for s, loss in pairs])
    loss = f"{_nats(report.measured_kl)} on average" if report.scores else "not measured"
    yield f"KL in nats per token: {loss}, {_nats(report.plan.predicted_kl)} predicted.\n"
    peak = format_bytes(report.measured_peak) if report.measured_peak else "not measured"
    yield f"Peak memory: {peak}, {format_bytes(report.plan.memory['peak'])} predicted.\n"
    if report.decode_tokens_per_second:
        speed = f"{report.prompt_tokens_per_second:.1f} prompt and {report.decode_tokens_per_second:.1f} decode tokens per second"
        yield f"Speed: {speed} with {_markdown(report.runtime)} on {_markdown(report.machine)}.\n"
    yield from (f"**Problem:** {_markdown(problem)}\n" for problem in report.problems)


def _limits(report: Report) -> Iterator[str]:
    plan, tokens = report.plan, sum(s.tokens for s in report.scores)
    if plan.count < plan.n_experts:
        gone = plan.n_experts - plan.count
        yield f"{gone} experts of every layer are gone: what only they knew, and calibration never asked for, is lost."
    if tokens:
        yield f"Quality was measured on {tokens} tokens of the texts named above; try your own task before you rely on it."
    yield f"Memory holds for one sequence of {plan.context} tokens without memory mapping; more context, more slots or a GPU need more."
    yield "Faults of the original are faults of this file too."


def write_report(report: Report, folder: Path) -> None:
    """Write report.json, report.html and README.md; each appears whole or not at all.

    Raises:
        MachineError: the folder cannot be written.
    """
    page, card = render_html(report), render_card(report)
    try:
        save_record(folder / "report.json", report)
        write_text(folder / "report.html", page)
        write_text(folder / "README.md", card)
    except OSError as error:
        raise MachineError(f"{folder}: the report cannot be written: {error}", hint="check the folder and the space left") from error
