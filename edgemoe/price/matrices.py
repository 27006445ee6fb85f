"""This module prices each format of one matrix in nats, from the matrix's statistics and weights (docs/pricing.md, 3 and 4).

The error of a format is a mean squared error of the output.  The target's own quantizer rounds sampled rows, and the inputs are rounded as
its kernels round them.  A slope turns the error into nats: the KL of the rounding probe over the error of the probe's rounding.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Generic, TypeVar

import numpy as np
from numpy.typing import NDArray

from edgemoe.base.types import F32
from edgemoe.ir import Model, Probe, Stats, Unit
from edgemoe.model.checkpoint import read_tensor
from edgemoe.quantize.reference import WHOLE_BITS, round_to_int8, round_to_nearest
from edgemoe.targets import Target

HALF_LARGEST = 65_504.0  # the largest finite half float
SAMPLE_WEIGHTS = 2**18  # weights of each stack or matrix that are really rounded, for each format
LEAST_ROWS = 4  # rows of a matrix, or of each expert in a stack, that are sampled at least
INPUT_TOKENS = 64  # tokens that stand for a matrix's inputs where kernels round them
SEED = 20261126  # of the draw of inputs of which only the second moments are known
Importance = dict[tuple[str, int], F32]
ErrorsByFormat = dict[str, float]  # format, or "probe" / "whole6" and so on for the reference roundings -> mean squared error
T = TypeVar("T")


@dataclass(frozen=True, slots=True, kw_only=True)
class ByCause(Generic[T]):
    """The effect of a format in two parts: from rounded weights, and from kernels that round their inputs."""

    weights: T
    inputs: T


def price_matrix(
    model: Model, stats: Stats, target: Target, unit: Unit, importance: Importance, probe: Probe, pool: ThreadPoolExecutor
) -> ByCause[ErrorsByFormat]:
    """Nats of storing one matrix, by format: its input-weighted squared error, scaled by its probe, and the part of rounded inputs.

    Args:
        model: from `inspect_model`.
        stats: from `collect_stats`.
        target: whose quantizers and kernels count.
        unit: the matrix.
        importance: mean squares of inputs by (role, expert) of its layer (`importance_of`).
        probe: of rounding this matrix alone.
        pool: threads that share the rows.
    """
    matrix = read_tensor(model.folder, model.get(unit.role, unit.layer))
    columns = importance.get((unit.role, -1))
    if unit.role == "token_embd" and columns is None:  # rows count as often as their token is read
        seen = (stats.weights[:, None] * stats.arrays(-1)["token_count"]).sum(axis=0)
        rows = np.argsort(-seen, kind="stable")[: max(LEAST_ROWS, 4 * SAMPLE_WEIGHTS // matrix.shape[1])]
        per_row = seen[rows].astype(np.float64)
    else:
        rows = sample_rows(matrix.shape[0], max(LEAST_ROWS, SAMPLE_WEIGHTS // matrix.shape[1]))
        per_row = np.ones(len(rows))
    weights = np.ones(matrix.shape[1]) if columns is None else columns.astype(np.float64)
    part, formats = matrix[rows], target.offered_formats(model, unit)

    @np.errstate(over="ignore", invalid="ignore")  # a format that cannot hold a weight gives infinity, and is then not offered
    def rounded_errors(index: NDArray[np.int64]) -> ErrorsByFormat:
        found = round_sampled(target, part[index], formats, columns, probe.bits)
        return {name: float(per_row[index] @ ((r - part[index]).astype(np.float64) ** 2 @ weights)) for name, r in found}

    blocks = [np.arange(i, min(i + 128, len(rows))) for i in range(0, len(rows), 128)]
    errors: ErrorsByFormat = {}
    for found in pool.map(rounded_errors, blocks):
        errors = {name: errors.get(name, 0.0) + value for name, value in found.items()}
    errors |= dict.fromkeys(formats_too_small(target, matrix, formats, columns), np.inf)
    slope = probe_kl(stats, probe) / max(errors["probe"], 1e-30)
    by_block = {0: 0.0}
    if columns is not None:
        inputs = _draw_inputs(stats, unit.layer if unit.layer >= 0 else model.n_layers - 1, columns)
        for block in {target.input_block(name, unit.role) for name in formats} - {0}:
            error = ((round_to_int8(inputs, block) - inputs) @ part.T).astype(np.float64)
            if unit.layer < 0:  # all logits moved alike change no prediction; errors of rounded rows have no such part
                error -= error.mean(axis=1, keepdims=True)
            by_block[block] = slope * float(per_row @ (error**2).mean(axis=0))
    from_inputs = {name: by_block.get(target.input_block(name, unit.role), 0.0) for name in formats}
    return ByCause(weights={name: slope * error for name, error in errors.items()}, inputs=from_inputs)


def formats_too_small(target: Target, matrix: F32, formats: tuple[str, ...], importance: F32 | None) -> list[str]:
    """Formats that cannot hold the largest weight of a matrix: half floats, and scales in half floats, end at 65,504."""
    largest = np.abs(matrix).max(axis=1)
    row = int(largest.argmax())
    if largest[row] <= HALF_LARGEST:
        return []
    with np.errstate(all="ignore"):
        rounded = {name: target.round_rows(matrix[row : row + 1], name, importance) for name in formats}
        return [name for name, values in rounded.items() if not np.isfinite(values).all()]


def _draw_inputs(stats: Stats, layer: int, second_moments: F32) -> F32:
    """Some inputs [64, cols] of a matrix of which calibration kept mean squares only.

    If the inputs are as wide as the layer's replay tokens, these tokens are taken, with each column scaled to its mean square.  (Replay
    tokens are the inputs of the MoE block, another norm of nearly the same states.)  This keeps the differences between tokens and between
    channels, which make int8 blocks lose accuracy.  Otherwise normal numbers are drawn.
    """
    replay = stats.arrays(layer).get("replay_x")
    if replay is not None and replay.shape[1] == len(second_moments):
        x = replay[sample_rows(len(replay), INPUT_TOKENS)].astype(np.float32)
        x /= np.sqrt(np.maximum((replay.astype(np.float32) ** 2).mean(axis=0), 1e-30))
        drawn: F32 = x * np.sqrt(np.maximum(second_moments, 0.0))
        return drawn
    return draw_normal(second_moments)


def draw_normal(second_moments: F32) -> F32:
    """Normal inputs [64, cols] with these mean squares."""
    x = np.random.default_rng(SEED).standard_normal((INPUT_TOKENS, len(second_moments)), np.float32)
    drawn: F32 = x * np.sqrt(np.maximum(second_moments, 0.0))
    return drawn


def probe_kl(stats: Stats, probe: Probe) -> float:
    """A probe's KL, mean over domains by weight."""
    return float(stats.weights @ np.array(probe.kl))


def sample_rows(n: int, wanted: int) -> NDArray[np.int64]:
    """Row numbers, evenly spread, the same every time."""
    return np.unique(np.linspace(0, n - 1, min(n, wanted)).round().astype(np.int64))


def round_sampled(target: Target, rows: F32, formats: tuple[str, ...], importance: F32 | None, probe_bits: int) -> list[tuple[str, F32]]:
    """These rows rounded to every offered format, and by the probes' reference roundings."""
    found = [(name, target.round_rows(rows, name, importance)) for name in formats]
    whole = [(f"whole{bits}", round_to_nearest(rows, bits)) for bits in WHOLE_BITS]
    return [*found, ("probe", round_to_nearest(rows, probe_bits)), *whole]
