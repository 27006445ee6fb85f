"""This module writes a Report's model card, README.md beside the artifact, in Markdown with every untrusted text escaped."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator

from edgemoe.base.units import format_bytes, plain
from edgemoe.ir import Report, counts_text
from edgemoe.report.words import mean_bits, nats, perplexities, picks, shares_by_format, shares_by_group
from edgemoe.targets import find_target

PLAIN = {"F32", "F16", "BF16"}  # formats that a checkpoint may have too


def _markdown(text: object) -> str:
    """Text that Markdown and the HTML inside it show unchanged, on one line and in one table cell."""
    return re.sub(r"[\\`*\[\]<>|~$&]|(?<![A-Za-z0-9])_|_(?![A-Za-z0-9])", r"\\\g<0>", plain(text))


def _fence(text: str, language: str = "") -> str:
    """A code block that its own text cannot close."""
    ticks = "`" * max(3, 1 + max(map(len, re.findall("`+", text)), default=0))
    return f"{ticks}{language}\n{text}\n{ticks}\n"


def _table(columns: tuple[str, ...], rows: Iterable[Iterable[object]]) -> str:
    lines = [columns, ("---",) * len(columns), *([_markdown(cell) for cell in row] for row in rows)]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"


def render_card(report: Report) -> str:
    """The model card, README.md beside the artifact: front matter, files, decisions, measured quality, launch lines, limits."""
    import yaml

    plan, model, words = report.plan, report.model, find_target(report.plan.target).words
    counts = counts_text(plan)
    whole = min(map(len, plan.kept)) == plan.n_experts
    drop = "keeps all its experts" if whole else f"keeps {counts} of its {plan.n_experts} experts, chosen layer by layer"
    drop += f", each cut to its {plan.width} best neurons and refitted" if plan.width else ""
    known = {key: model[key] for key in ("license", "license_name", "license_link", "language", "base_model") if model.get(key)}
    quantized = any(name not in PLAIN for name in plan.formats.values())
    tags = [plan.target.partition("-")[0], "moe", *(["imatrix"] if quantized else []), "edgemoe"]
    front = {
        **known,
        **({"base_model_relation": "quantized"} if quantized else {}),
        "library_name": words.library,
        "pipeline_tag": "text-generation",
        "tags": tags,
    }
    largest = next(iter(shares_by_format(plan)), "")
    parts = [
        f"---\n{yaml.safe_dump(front, sort_keys=False, width=10**6)}---\n",
        f"# {_markdown(model['name'])}, {counts} of {plan.n_experts} experts, {mean_bits(report.plan.units, plan):.2f} bits per weight\n",
        f"Made by edgemoe to run within {format_bytes(plan.budget)} at a context of {plan.context} tokens.\n",
        _table(
            ("file", "mostly", "bytes", "size"),
            [(f.name, largest if f.holds_model else "", f.size, format_bytes(f.size)) for f in report.artifact.files],
        ),
        "## What was dropped, and how the rest is stored\n",
        f"Each of the {len(plan.kept)} layers {drop}; {picks(plan, int(model['top_k']))} for every token. "
        f"Router and norms stay {find_target(plan.target).words.plain}.\n",
        _table(("part", "formats", "size"), [(g, ", ".join(f), format_bytes(sum(f.values()))) for g, f in shares_by_group(plan).items()]),
        "Which experts were kept is in `report.json` and, as a picture, in `report.html`.\n",
        "## Measured against the original\n",
        *_quality(report),
    ]
    launch = _fence("\n".join(words.launch_lines(report)), words.language)
    if words.modelfile is not None:
        ollama = _fence("\n".join(words.modelfile(report)))
        parts += ["## Run it\n", launch, "Ollama, as a `Modelfile` (its memory was not measured):\n", ollama]
    else:
        parts += ["## Run it\n", f"{words.launch_note}\n", launch]
    if model.get("command"):
        parts += ["## How it was made\n", _fence(plain(model["command"]), "sh")]
    parts += ["## Limits\n", "\n".join(f"- {limit}" for limit in _limits(report)) + "\n"]
    return "\n".join(parts).encode("utf-8", "replace").decode("utf-8")


def _quality(report: Report) -> Iterator[str]:
    if report.scores:
        heads = ("held-out text", "tokens", "KL mean", "KL median", "KL 99%", "same top-1", "perplexity", "here")
        losses = [tuple(map(nats, (s.kl_mean, s.kl_median, s.kl_p99))) for s in report.scores]
        pairs = zip(report.scores, losses, strict=True)
        yield _table(heads, [(s.name, s.tokens, *loss, f"{s.top1_agreement:.1%}", *perplexities(s)) for s, loss in pairs])
    loss = f"{nats(report.measured_kl)} on average" if report.scores else "not measured"
    words = find_target(report.plan.target).words
    beside = f"; {words.beside} {nats(report.beside_kl)}" if report.beside_kl else ""
    yield f"KL in nats per token: {loss}, {nats(report.plan.predicted_kl)} predicted{beside}. {words.beside_note}\n"
    peak = format_bytes(report.measured_peak) if report.measured_peak else "not measured"
    yield f"Peak memory: {peak}, {format_bytes(report.plan.memory['peak'])} predicted.\n"
    if report.decode_tokens_per_second:
        speed = f"{report.prompt_tokens_per_second:.1f} prompt and {report.decode_tokens_per_second:.1f} decode tokens per second"
        yield f"Speed: {speed} with {_markdown(report.runtime)} on {_markdown(report.machine)}.\n"
    yield from (f"**Problem:** {_markdown(problem)}\n" for problem in report.problems)


def _limits(report: Report) -> Iterator[str]:
    plan, tokens = report.plan, sum(s.tokens for s in report.scores)
    gone = [plan.n_experts - len(kept) for kept in plan.kept]
    if max(gone, default=0):
        told = f"{gone[0]} experts of every layer" if plan.has_one_count else f"{sum(gone)} experts, up to {max(gone)} of a layer,"
        yield f"{told} are gone: what only they knew, and calibration never asked for, is lost."
    if plan.width:
        yield f"Every expert was cut to {plan.width} neurons: what the others did is made good in part only."
    if plan.top_k < int(report.model["top_k"]):
        fewer = f"{plan.top_k} instead of {report.model['top_k']}"
        yield f"Fewer experts compute a token, {fewer}: that is faster, and less good where several were needed."
    if tokens:
        yield f"Quality was measured on {tokens} tokens of the texts named above; try your own task before you rely on it."
    yield f"Memory holds for one sequence of {plan.context} tokens{find_target(plan.target).words.more}."
    yield "Faults of the original are faults of this file too."
