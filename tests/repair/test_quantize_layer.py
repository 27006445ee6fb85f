"""QuantizePlan in the stream: what the file holds is what the stream computed with, chosen by tokens set aside, the same on any machine."""

from __future__ import annotations

import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from command import ROOT
from numpy.typing import NDArray
from tiny import EXAMPLES, flat_plan

from edgemoe.base.errors import ModelError, UsageError
from edgemoe.calibrate.collect import collect_stats
from edgemoe.ir import Model, Plan, Stats
from edgemoe.model.checkpoint import read_packed, read_tensor
from edgemoe.model.inspect import inspect_model
from edgemoe.pipeline.store import store_weights
from edgemoe.quantize.gptq import factor_hessian, objective
from edgemoe.repair.quantize_layer import ErrorMetric, plan_quantization, quantize_matrix
from edgemoe.repair.router_gram import RouterGram, add_flips
from edgemoe.repair.survivors import repair_survivors
from edgemoe.stream.gradients import collect_gradients
from edgemoe.stream.texts import SHIPPED, Text, read_text
from edgemoe.targets import find_target, gguf
from edgemoe.targets.gguf.formats import dequantize, quantize, row_bytes

TOKENS = 2048


@pytest.fixture(scope="module")
def model() -> Model:
    return inspect_model(EXAMPLES / "tiny-moe-b")


@pytest.fixture(scope="module")
def texts() -> list[Text]:
    return [read_text(str(path)) for path in sorted((SHIPPED / "calibration").glob("*.txt"))][:2]


@pytest.fixture(scope="module")
def stats(model: Model, texts: list[Text], tmp_path_factory: pytest.TempPathFactory) -> Stats:
    return collect_stats(model, texts, tmp_path_factory.mktemp("stats"), max_tokens=TOKENS)


@pytest.fixture(scope="module")
def plan(model: Model) -> Plan:
    base = flat_plan(model, kept=[(0, 1, 4), (2, 3, 6)])
    names = {name: "Q2_K" if "_exps" in name else "Q4_K" for name in base.formats}
    return replace(base, formats=names, repair=True)


@pytest.fixture(scope="module")
def stored(model: Model, texts: list[Text], stats: Stats, plan: Plan, tmp_path_factory: pytest.TempPathFactory) -> Model:
    return store_weights(model, texts, stats, plan, tmp_path_factory.mktemp("work"), max_tokens=TOKENS)


def test_every_matrix_of_the_plan_is_packed_in_its_format(stored: Model, plan: Plan) -> None:
    formats = {(u.role, u.layer): plan.formats[u.name] for u in gguf.TARGET.list_units(stored)}
    for tensor in stored.tensors:
        survives = tensor.expert < 0 or tensor.expert in plan.kept_of[tensor.layer]
        assert tensor.packed == (formats.get((tensor.role, tensor.layer), "") if survives else ""), tensor


def test_the_file_holds_the_packed_rows(stored: Model, stats: Stats, plan: Plan, tmp_path: Path) -> None:
    from gguf import GGUFReader

    path = gguf.TARGET.write(stored, stats, plan, tmp_path, 0, None).path
    found = {t.name: t.data for t in GGUFReader(path).tensors}
    for tensor in stored.tensors:
        if tensor.packed and tensor.role in ("ffn_down_exps", "attn_v", "output"):
            rows = read_packed(stored.folder, tensor, row_bytes(tensor.packed, tensor.shape[1]))
            name = next(u.name for u in gguf.TARGET.list_units(stored) if (u.role, u.layer) == (tensor.role, tensor.layer))
            data = found[name]
            mine = data[plan.kept_of[tensor.layer].index(tensor.expert)] if tensor.expert >= 0 else data
            np.testing.assert_array_equal(np.asarray(mine).reshape(rows.shape), rows)


def test_packed_weights_are_not_taken_for_plain_ones(stored: Model, stats: Stats, plan: Plan, tmp_path: Path) -> None:
    tensor = next(t for t in stored.tensors if t.packed)
    with pytest.raises(ModelError, match="packed as"):
        read_tensor(stored.folder, tensor)
    other = replace(plan, formats=dict.fromkeys(plan.formats, "Q8_0"))
    with pytest.raises(ModelError, match="packed as"):
        gguf.TARGET.write(stored, stats, other, tmp_path, 0, None)


def test_guard_tokens_choose_between_stock_and_feedback() -> None:
    rng = np.random.default_rng(0)
    x = rng.normal(size=(512, 64)) @ rng.normal(size=(64, 256)) + 0.5 * rng.normal(size=(512, 256))
    rows, gram = rng.normal(size=(8, 256)).astype(np.float32), x.T @ x
    target, importance = find_target("gguf"), np.ones(256, np.float32)
    stock = quantize(rows, "Q2_K", importance)
    with ThreadPoolExecutor(1) as pool:
        metric = ErrorMetric(inputs=factor_hessian(gram), guard=gram)
        packed, values = quantize_matrix(target, rows, "Q2_K", importance, metric, pool)
        misled, _ = quantize_matrix(target, rows, "Q2_K", importance, replace(metric, guard=np.linalg.inv(gram)), pool)
        plain, _ = quantize_matrix(target, rows, "F16", importance, metric, pool)
    hessian = factor_hessian(gram)
    assert objective(rows, values, hessian).sum() < 0.5 * objective(rows, dequantize(stock, "Q2_K", 256), hessian).sum()
    np.testing.assert_array_equal(values, dequantize(packed, "Q2_K", 256))
    np.testing.assert_array_equal(misled, stock)
    np.testing.assert_array_equal(plain, quantize(rows, "F16"))


def test_what_moves_a_routers_choice_is_dear_where_flips_are(model: Model, stats: Stats, plan: Plan, tmp_path: Path) -> None:
    """KL = q + kappa sqrt(q): the slope of its second term, for directions that part the logits of routers still to come."""
    q = 1e-4
    few = replace(plan, domain_q={d.name: q for d in stats.domains}, predicted_kl=q + 0.008 * q**0.5)
    quantize_plan = plan_quantization(model, stats, few, find_target("gguf"), tmp_path)
    assert quantize_plan.flip_weight == pytest.approx(0.4)
    assert plan_quantization(model, stats, replace(few, predicted_kl=q), find_target("gguf"), tmp_path).flip_weight == 0
    gram = np.eye(model.hidden_size)
    routers = RouterGram(model)
    watched = [add_flips(gram, routers.from_layer(first), quantize_plan.flip_weight) for first in range(model.n_layers + 1)]
    np.testing.assert_array_equal(watched[-1], gram)
    assert np.trace(watched[0]) == pytest.approx(1.4 * np.trace(gram))
    assert np.trace(watched[1]) == pytest.approx(1.2 * np.trace(gram))  # one of two routers is behind
    tensor = model.find("ffn_gate_inp", 1)
    assert tensor is not None
    even = np.linalg.svd(np.vstack([read_tensor(model.folder, tensor), np.ones(model.hidden_size)]))[2][-1]  # moves no logit
    norm = model.find("ffn_norm", 1)
    assert norm is not None
    still = even / read_tensor(model.folder, norm)
    assert still @ watched[1] @ still == pytest.approx(still @ still, rel=1e-3)


def test_the_routers_ahead_are_the_same_after_a_killed_run(model: Model) -> None:
    one = RouterGram(model)
    for layer in range(model.n_layers + 1):
        passed = one.from_layer(layer).copy()
        np.testing.assert_array_equal(passed, RouterGram(model).from_layer(layer))
        np.testing.assert_allclose(passed, alone(model, layer), atol=1e-8)  # products are of float32
    np.testing.assert_array_equal(one.from_layer(0), RouterGram(model).from_layer(0))  # asked out of order


def alone(model: Model, first: int) -> NDArray[np.float64]:
    """What RouterGram adds up, written down."""
    total = np.zeros((model.hidden_size,) * 2)
    for layer in range(first, model.n_layers):
        rows = read_tensor(model.folder, model.get("ffn_gate_inp", layer)).astype(np.float64)
        moved = (rows - rows.mean(axis=0)) * read_tensor(model.folder, model.get("ffn_norm", layer))
        total += moved.T @ moved / np.square(moved).sum() / model.n_layers
    return total


def test_without_feedback_or_drops_weights_stay_where_they_are(model: Model, texts: list[Text], stats: Stats, tmp_path: Path) -> None:
    whole = flat_plan(model)
    assert store_weights(model, texts, stats, whole, tmp_path, rounding="stock") is model
    assert store_weights(model, texts, replace(stats, probes=()), whole, tmp_path) is model  # from an imatrix: nothing was to be run
    with pytest.raises(UsageError, match="rounding"):
        store_weights(model, texts, stats, whole, tmp_path, rounding="coin")


def test_a_killed_packing_goes_on_and_gives_the_same_bytes(
    model: Model, texts: list[Text], stats: Stats, plan: Plan, stored: Model, tmp_path: Path
) -> None:
    gradients = collect_gradients(model, texts, tmp_path, max_tokens=TOKENS)
    quantize_plan = plan_quantization(model, stats, plan, find_target("gguf"), gradients)

    def kill(done: int, _: int) -> None:
        if done == 1:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        repair_survivors(model, texts, plan, tmp_path, max_tokens=TOKENS, quantize_plan=quantize_plan, progress=kill)
    resumed = repair_survivors(model, texts, plan, tmp_path, max_tokens=TOKENS, quantize_plan=quantize_plan)
    for ours, theirs in zip(resumed.tensors, stored.tensors, strict=True):
        if ours.packed:
            size = row_bytes(ours.packed, ours.shape[1])
            np.testing.assert_array_equal(read_packed("", ours, size), read_packed("", theirs, size))


CHILD = """
import hashlib, numpy as np
from edgemoe.quantize.gptq import factor_hessian
from edgemoe.targets.gguf.rounding import quantize_fed_back
rng = np.random.default_rng(3)
x = rng.normal(size=(600, 512)) @ rng.normal(size=(512, 512))
rows, hessian = rng.normal(size=(256, 512)).astype(np.float32), factor_hessian(x.T @ x)
print([hashlib.sha256(quantize_fed_back(rows, kind, hessian).tobytes()).hexdigest() for kind in ("Q3_K", "IQ2_XXS")])
"""


def test_bytes_do_not_depend_on_the_number_of_threads() -> None:
    found = set()
    for threads in ("1", "2"):
        env = {**os.environ, "OPENBLAS_NUM_THREADS": threads, "OMP_NUM_THREADS": threads, "PYTHONPATH": str(ROOT)}
        found.add(subprocess.run([sys.executable, "-c", CHILD], env=env, check=True, capture_output=True, text=True).stdout)
    assert len(found) == 1
