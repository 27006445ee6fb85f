"""This module prices a model from files that people already have: an imatrix, and a table of expert scores if there is one.

Quantize.  cost(unit, format) = generic cost of the unit in Q4_K * error(format) / error(Q4_K).  The error is the squared rounding error of
the target's quantizer on sampled rows of the real weights.  Columns are weighted by the file's mean x^2, and the experts of a stack by how
often each was chosen.  So the best format of a unit, and which experts are hard to round, are measured on this model.  The weight of one
unit against another, and the scale in nats, come from other models (priors.py).

Drop.  The generic curve gives the cost from the dropped share of a layer's scores.  Scores are the user's (saliency).  Without them, the
score is how often the imatrix file saw each expert chosen, which is weaker, because it leaves out gates and outputs (docs/pricing.md, 7).
"""

from __future__ import annotations

import csv
import math
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np

from edgemoe.base.errors import ModelError
from edgemoe.base.progress import Progress
from edgemoe.base.threads import open_threads
from edgemoe.base.types import F32, F64
from edgemoe.ir import PROJECTIONS, Costs, Model, Stats, Tensor, Unit
from edgemoe.model.checkpoint import read_tensor
from edgemoe.model.routing.kept_sets import drop_floor
from edgemoe.price.matrices import LEAST_ROWS, sample_rows
from edgemoe.price.priors import Saliency, layer_nats, price_drops, price_generic
from edgemoe.quantize.importance import importance_of
from edgemoe.targets import Target, settle

MAX_CSV = 64 * 2**20  # bytes; ten domains of 75 layers of 256 experts take 6 MiB
MAX_DOMAIN = 64  # characters; names are printed in tables
COLUMNS = ("layer", "expert", "score")
SAMPLE_WEIGHTS = 2**16  # weights that are rounded of a stack or matrix, for each format: a quarter of those in matrices.py, within 7 %
REFERENCE_BITS = 4.5  # bits of Q4_K, for which `whole` of priors.py is known best; the offered format nearest to it is the reference
Key = tuple[str, int, int]  # domain, layer, expert


# --------------------------------------------------------------------------------------------------------------- saliency
def read_saliency(path: Path, model: Model) -> Saliency:
    """Scores of experts from a CSV with the header `layer,expert,score` or `layer,expert,score,domain`; larger means keep.

    Every expert of every layer has one line in every domain.  Scores are compared inside a layer and domain only, so their unit is free.

    Raises:
        ModelError: the file is too large or malformed, or lacks a score; the message names the line.
    """
    scores: dict[Key, float] = {}
    try:
        if path.stat().st_size > MAX_CSV:
            raise ModelError(f"{path}: {path.stat().st_size} bytes is too large for a table of scores (limit {MAX_CSV})")
        with path.open(encoding="utf-8-sig", newline="") as file:
            reader = csv.reader(file, strict=True)
            header = tuple(cell.strip() for cell in next(reader, []))
            if header not in (COLUMNS, (*COLUMNS, "domain")):
                raise ModelError(
                    f"{path}: line 1: the header is {','.join(header)!r}", hint="expected layer,expert,score or layer,expert,score,domain"
                )
            for row in reader:
                if row:
                    key, score = _parse_row(f"{path}: line {reader.line_num}", row, len(header), model)
                    if key in scores:
                        raise ModelError(
                            f"{path}: line {reader.line_num}: layer {key[1]}, expert {key[2]} is there twice{_in_domain(key[0])}"
                        )
                    scores[key] = score
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise ModelError(f"{path}: cannot be read as CSV: {error}") from error
    return _fill_table(path, scores, model)


def _parse_row(where: str, row: list[str], n_columns: int, model: Model) -> tuple[Key, float]:
    if len(row) != n_columns:
        raise ModelError(f"{where}: {len(row)} columns, the header has {n_columns}")
    cells = [cell.strip() for cell in row]
    numbers = []
    for name, cell, limit in (("layer", cells[0], model.n_layers), ("expert", cells[1], model.n_experts)):
        if not (cell.isascii() and cell.isdigit() and int(cell[:9]) < limit and len(cell) <= 9):
            raise ModelError(f"{where}: {name} {cell[:40]!r} is not one of 0 to {limit - 1}")
        numbers.append(int(cell))
    try:
        score = float(cells[2])
    except ValueError:
        score = math.nan
    if not (math.isfinite(score) and score >= 0):
        raise ModelError(f"{where}: score {cells[2][:40]!r} is not a number from 0 up")
    domain = cells[3] if n_columns > len(COLUMNS) else "imatrix"
    if not domain or not domain.isprintable() or len(domain) > MAX_DOMAIN:
        raise ModelError(f"{where}: domain {domain[:40]!r} is not a name of 1 to {MAX_DOMAIN} printable characters")
    return (domain, numbers[0], numbers[1]), score


def _in_domain(domain: str) -> str:
    return "" if domain == "imatrix" else f" in domain {domain!r}"


def _fill_table(path: Path, scores: dict[Key, float], model: Model) -> Saliency:
    """Shares [D, L, E]; the first gap is found before anything is allocated."""
    domains = tuple(dict.fromkeys(key[0] for key in scores))
    if not domains:
        raise ModelError(f"{path}: line 2: there is no score")
    for domain in domains:
        for layer in model.moe_layers:
            for expert in range(model.n_experts):
                if (domain, layer, expert) not in scores:
                    raise ModelError(
                        f"{path}: layer {layer}, expert {expert} is missing{_in_domain(domain)}", hint="one line for each expert"
                    )
    table = np.array([[[scores[d, n, e] for e in range(model.n_experts)] for n in model.moe_layers] for d in domains])
    largest = table.max(axis=2, keepdims=True)
    if not (largest > 0).all():
        d, layer = np.argwhere(largest[:, :, 0] <= 0)[0]
        raise ModelError(f"{path}: layer {model.moe_layers[layer]} has no score above 0{_in_domain(domains[d])}")
    table /= largest  # so that no sum overflows
    return Saliency(domains=domains, share=table / table.sum(axis=2, keepdims=True), kept={})


def _frequency(model: Model, stats: Stats) -> Saliency:
    """Shares of the routed tokens [1, L, E]; experts that saw little count at least as much as `drop_floor` says."""
    share = np.empty((1, len(model.moe_layers), model.n_experts))
    for row, layer in enumerate(model.moe_layers):
        count = stats.arrays(layer)["count"].sum(axis=0)
        share[0, row] = np.maximum(count, drop_floor(count, count.astype(np.float64)))
    return Saliency(domains=("imatrix",), share=share / share.sum(axis=2, keepdims=True), kept={})


# ---------------------------------------------------------------------------------------------------------------- pricing
def price_imported(
    model: Model, stats: Stats, target: Target, context: int, saliency: Saliency | None = None, progress: Progress | None = None
) -> Costs:
    """Price a checkpoint that was not calibrated.

    Args:
        model: from `inspect_model`.
        stats: from `save_imported_stats`: the importance that `emit` will use too.
        target: whose formats and bytes count.
        context: tokens of context that the process must have memory for.
        saliency: from `read_saliency`; None: how often the file saw each expert chosen.
        progress: called with (layers done, all layers).

    Raises:
        ModelError: a file of the checkpoint is damaged.
    """
    target = settle(target, model, stats)
    base = price_generic(model, target, context)
    scores = saliency or _frequency(model, stats)
    weights = np.full(len(scores.domains), 1 / len(scores.domains))
    reference = _reference_costs(model, target, base)
    of_layer = layer_nats(base.units, reference, model.moe_layers)
    drops = price_drops(scores.domains, weights, scores.share, of_layer / of_layer.sum(), base.counts, base.n_groups)
    cost = np.full(base.cost.shape, np.inf)
    if progress:
        progress(0, model.n_layers)
    rows = {layer: row for row, layer in enumerate(model.moe_layers)}
    with open_threads() as pool:
        for layer in range(-1, model.n_layers):
            mine = [u for u, unit in enumerate(base.units) if unit.layer == layer]
            row = rows.get(layer)
            count = np.ones(model.n_experts) if row is None else stats.arrays(layer)["count"].sum(axis=0)
            busy = drops["kept"][:, row or 0] * np.maximum(count, 1e-30)
            busy = busy / busy.sum(axis=1, keepdims=True)
            errors = _layer_errors(model, stats, target, layer, [base.units[u] for u in mine], pool)
            nats = {u: reference[u] for u in mine}
            if target.form == "experts" and row is not None:  # a layer's nats go to its experts by the tokens of the file
                nats |= {u: of_layer[row] * busy[-1, base.units[u].expert] for u in mine if base.units[u].expert >= 0}
            for u, ratios in zip(mine, _relative_errors(model, target, [base.units[u] for u in mine], errors, busy), strict=True):
                for name, ratio in ratios.items():
                    cost[:, u, base.formats.index(name)] = nats[u] * ratio
            if progress:
                progress(layer + 1, model.n_layers)
    return replace(
        base,
        stats=stats.key,
        cold=stats.cold,
        domains=scores.domains,
        domain_weights=tuple(float(w) for w in weights),
        origin=_origin(stats, saliency),
        cost=cost,
        factor=np.ones((len(scores.domains), len(base.units))),
        usage=scores.share,
        **drops,
    )


def _origin(stats: Stats, saliency: Saliency | None) -> str:
    """What the prices are made of."""
    seen = f"{stats.settings['imatrix']} ({stats.domains[0].tokens} tokens)"
    experts = "experts by how often that file saw them chosen, a weaker score than saliency"
    if saliency is not None:
        experts = f"experts by a table of scores ({', '.join(saliency.domains)})"
    return f"imported: errors of this model's weights under {seen}; nats per tensor, and of drops, as in other MoE models; {experts}"


def _reference_format(target: Target, model: Model, unit: Unit) -> str:
    """The offered format nearest to Q4_K in bits per weight."""
    bits = {f: 8 * target.unit_size(model, unit, f, model.n_experts) / unit.n_weights for f in target.offered_formats(model, unit)}
    return min(bits, key=lambda name: abs(bits[name] - REFERENCE_BITS))


def _reference_costs(model: Model, target: Target, base: Costs) -> F64:
    """Generic nats of each unit in its reference format [U]."""
    return np.array([base.cost[-1, u, base.formats.index(_reference_format(target, model, unit))] for u, unit in enumerate(base.units)])


def _relative_errors(model: Model, target: Target, units: list[Unit], errors: list[dict[str, F64]], busy: F64) -> list[dict[str, F64]]:
    """Errors of each unit over those in its reference format, by format: [C] for each kept count, or [1] if the count does not matter.

    A stack's experts count by their tokens.  A single expert is compared with the mean expert, one projection after another, because errors
    of different projections have different units.
    """
    means: dict[int, F64] = {}
    alone = [(unit, e) for unit, e in zip(units, errors, strict=True) if unit.expert >= 0]
    if alone:
        reference = np.stack([e[_reference_format(target, model, unit)] for unit, e in alone])  # [E, projections]
        means = {unit.expert: busy[-1] @ reference for unit, _ in alone}
    found = []
    for unit, by_format in zip(units, errors, strict=True):
        if unit.expert >= 0:
            found.append({f: np.array([(e / np.maximum(means[unit.expert], 1e-300)).mean()]) for f, e in by_format.items()})
            continue
        use = busy if unit.is_stack else np.ones((1, 1))
        whole = max(float(use[-1] @ by_format[_reference_format(target, model, unit)]), 1e-300)
        found.append({f: use @ e / whole for f, e in by_format.items()})
    return found


def _tensors(of_layer: dict[tuple[str, int], Tensor], unit: Unit) -> list[Tensor]:
    """The matrices of a unit: one, one for each expert of a stack, or the three of an expert."""
    if unit.expert >= 0:
        return [of_layer[f"ffn_{p}_exps", unit.expert] for p in PROJECTIONS]
    return [of_layer[key] for key in sorted(of_layer) if key[0] == unit.role]


def _layer_errors(
    model: Model, stats: Stats, target: Target, layer: int, units: list[Unit], pool: ThreadPoolExecutor
) -> list[dict[str, F64]]:
    """Errors of each unit of a layer, by format: [E] for a stack, [3] for an expert, [1] for a matrix."""
    importance, of_layer = importance_of(model, stats, layer), model.of_layer(layer)
    jobs: list[list[Future[dict[str, float]]]] = []
    for unit in units:
        tensors, formats = _tensors(of_layer, unit), target.offered_formats(model, unit)
        wanted = SAMPLE_WEIGHTS // (model.n_experts if tensors[0].expert >= 0 else 1)
        jobs.append([pool.submit(_tensor_errors, model, target, t, formats, importance.get((t.role, t.expert)), wanted) for t in tensors])
    found = [[job.result() for job in own] for own in jobs]
    return [{name: np.array([each[name] for each in own]) for name in own[0]} for own in found]


def _tensor_errors(
    model: Model, target: Target, tensor: Tensor, formats: tuple[str, ...], importance: F32 | None, wanted: int
) -> dict[str, float]:
    """Mean squared error of one output of a matrix per token, by format, on about `wanted` of its weights; inputs are taken as exact."""
    matrix = read_tensor(model.folder, tensor)
    cols = matrix.shape[1]
    rows = matrix[sample_rows(matrix.shape[0], max(LEAST_ROWS, wanted // cols))]
    weights = np.ones(cols) if importance is None else importance.astype(np.float64)
    errors = {}
    for name in formats:
        delta = (target.round_rows(rows, name, importance) - rows).astype(np.float64)
        errors[name] = float((delta**2 @ weights).mean())
    return errors
