"""Embedding and output matrix in groups of alike rows: every row keeps its place, and rounding costs less KL for it."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from command import MODEL
from numpy.typing import NDArray

from edgemoe.ir import Stats
from edgemoe.model.checkpoint import read_tensor
from edgemoe.model.inspect import inspect_model
from edgemoe.quantize.gptq import factor_hessian
from edgemoe.repair.quantize_layer import ErrorMetric, QuantizePlan, quantize_matrix
from edgemoe.repair.vocabulary import GROUPS, gradient_sums, group_metrics, group_rows, masses, quantize_rows_by_group
from edgemoe.stream.passes import final_states, token_kl
from edgemoe.stream.texts import choose_texts
from edgemoe.stream.windows import tokenize
from edgemoe.targets import find_target


def test_rows_of_one_direction_share_a_group() -> None:
    rng = np.random.default_rng(0)
    rows = np.repeat(rng.normal(size=(200, 64)), 2, axis=0).astype(np.float32)
    rows[1::2] *= rng.uniform(0.1, 10, (200, 1)).astype(np.float32)
    group = group_rows(rows)
    np.testing.assert_array_equal(group[::2], group[1::2])
    np.testing.assert_array_equal(group, group_rows(rows))
    assert set(group.tolist()) == set(range(GROUPS))


def test_a_vocabulary_smaller_than_the_groups_is_grouped() -> None:
    assert len(set(group_rows(np.eye(3, 8, dtype=np.float32)).tolist())) == 3


def test_masses_are_the_variances_of_the_groups_tokens() -> None:
    rng = np.random.default_rng(1)
    states, output = (rng.normal(size=(n, 8)).astype(np.float32) for n in (5, 20))
    group = rng.integers(0, GROUPS, 20)
    found = masses(torch.from_numpy(states), torch.from_numpy(output), group)
    logits = states @ output.T
    p = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    np.testing.assert_allclose(found, [[(q * (1 - q))[group == g].sum() for g in range(GROUPS)] for q in p], atol=1e-6)


def test_gradients_are_summed_by_group_and_side() -> None:
    rng = np.random.default_rng(2)
    gradients, group, guard = rng.normal(size=(9000, 6)).astype(np.float32), rng.integers(0, 3, 9000), rng.random(9000) < 0.2
    sums = gradient_sums(group, gradients, guard)
    np.testing.assert_allclose(sums[1][1], gradients[(group == 1) & guard].T @ gradients[(group == 1) & guard], rtol=1e-3, atol=1e-2)
    np.testing.assert_allclose(np.sum(sums, axis=(0, 1)), gradients.T @ gradients, rtol=1e-3, atol=1e-1)
    metrics = group_metrics(sums, [1.0] * GROUPS)
    whole = factor_hessian(np.sum([fitted for fitted, _ in sums], axis=0))
    np.testing.assert_allclose(metrics[7].inputs.h, whole.h)  # a group that nothing was seen of


def test_groups_take_a_tenth_off_the_kl_of_a_rounded_output_matrix(shipped_stats: Stats, tmp_path: Path) -> None:
    """Held-out text; both ways see the same tokens and store the same bytes."""
    model, gguf, kind = inspect_model(MODEL), find_target("gguf"), "Q4_K"
    tensor = model.find("output")
    assert tensor is not None
    output = read_tensor(model.folder, tensor)
    calibration, heldout = choose_texts([], [])

    def states(texts: object, tokens: int) -> torch.Tensor:
        windows = tokenize(model, texts, tokens, 512)  # type: ignore[arg-type]
        found = final_states(model, windows, tmp_path)
        return torch.from_numpy(np.concatenate([found[i, :n] for i, n in enumerate(windows.lengths)]))

    seen, fresh = states(calibration, 8192), states(heldout, 2048)
    group = group_rows(output)
    mass = masses(seen, torch.from_numpy(output), group)
    x, guard = seen.numpy(), np.arange(len(seen)) % 7 == 3
    sums = [tuple((x[side] * mass[side, i : i + 1]).T @ x[side] for side in (~guard, guard)) for i in range(GROUPS)]
    metrics = group_metrics(sums, (mass.sum(axis=0) / mass.sum() * len(seen)).tolist())  # type: ignore[arg-type]
    quantize_plan = QuantizePlan(model=model, stats=shipped_stats, target=gguf, formats={("output", -1, -1): kind}, gradients=tmp_path)

    def kl(values: NDArray[np.float32]) -> float:
        logs = (fresh.double() @ torch.from_numpy(output).double().T).log_softmax(-1)
        return float(token_kl(logs, fresh @ torch.from_numpy(values).T).mean())

    packed, grouped = quantize_rows_by_group(quantize_plan, "output", output, group, metrics)
    np.testing.assert_array_equal(gguf.unpack_rows(packed, kind, output.shape[1]), grouped)
    with ThreadPoolExecutor(1) as pool:
        together = ErrorMetric(inputs=factor_hessian(x[~guard].T @ x[~guard]), guard=x[guard].T @ x[guard])
        _, alike = quantize_matrix(gguf, output, kind, None, together, pool)
    assert kl(grouped) < 0.9 * kl(alike)
