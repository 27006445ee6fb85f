"""Narrower experts: which neurons stay, and what a narrowing costs."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from strategies import random_costs
from tiny import EXAMPLES, FAMILIES, backpropagate_draws, make_checkpoint

from edgemoe.base.errors import UsageError
from edgemoe.base.storage import array_file, load_arrays
from edgemoe.ir import Model
from edgemoe.model.describe import resize_experts
from edgemoe.model.inspect import inspect_model
from edgemoe.repair.experts import Experts
from edgemoe.repair.width import (
    UNSEEN,
    Narrowed,
    best_neurons,
    charge,
    choose_widths,
    cut,
    magnitude,
    narrow_experts,
)
from edgemoe.stream.gradients import collect_gradients, heapr_sums
from edgemoe.stream.texts import SHIPPED, Text, read_text
from edgemoe.stream.windows import tokenize

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

from width import camera_energy, cut_and_refit

WIDTH = 96  # of 160: no multiple of 64, nor half


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("checkpoints")
    shape = {"n_experts": 4, "hidden": 128, "expert_size": 160}
    return {family: make_checkpoint(root / family, family, seed=i, **shape) for i, family in enumerate(FAMILIES)}


@pytest.fixture(scope="module")
def texts() -> list[Text]:
    return [read_text(str(SHIPPED / "calibration" / f"{name}.txt")) for name in ("english", "python")]


# ----------------------------------------------------------------------------------------------------------------- scores
H = torch.tensor([[0.5, -1, 2], [1.5, 0.25, -0.5], [-0.75, 1, 0], [0.2, -0.4, 1]], dtype=torch.float64)
DOWN = torch.tensor([[1, 0, -1], [0.5, 2, 0.25]], dtype=torch.float64)
GAMMA = torch.tensor([[0.1, -0.2], [0.3, 0.1], [-0.2, 0.4], [0, 0.5]], dtype=torch.float64)
GATES = np.array([0.6, 0.4, 0.9, 0.3])


def test_heapr_gives_the_worked_example_token_by_token() -> None:
    found = heapr_sums(H, GAMMA, DOWN, torch.full((4,), 0.25, dtype=torch.float64))
    assert found.numpy() == pytest.approx([0.034766, 0.120313, 0.015566], abs=1e-6)


@pytest.mark.parametrize(("share", "expected"), [(0.0, [1.136531, 4.777600, 1.668125]), (0.9, [0.626231, 3.393760, 1.543813])])
def test_camera_gives_the_worked_example(share: float, expected: list[float]) -> None:
    phi_sq = (GATES[:, None] * H.numpy()) ** 2
    found = camera_energy(phi_sq.sum(axis=0), phi_sq.max(axis=0), (DOWN.numpy() ** 2).sum(axis=0), share)
    assert found == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("family", FAMILIES)
def test_scores_are_what_autograd_of_the_whole_model_says(family: str, sources: dict[str, Path], texts: list[Text], tmp_path: Path) -> None:
    """A factor of one on every hidden activation of every token, in transformers' own model: its gradient is h <gamma, w>."""
    from transformers import AutoModelForCausalLM
    from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

    model = inspect_model(sources[family])
    factors: list[torch.Tensor] = []

    def experts(module: Any, x: torch.Tensor, index: torch.Tensor, gates: torch.Tensor) -> torch.Tensor:
        factor = torch.ones(len(x), index.shape[1], model.expert.size, requires_grad=True)
        factor.chosen = index  # type: ignore[attr-defined]
        factors.append(factor)
        gate, up = (module.gate_up_proj[index] @ x[:, None, :, None])[..., 0].chunk(2, dim=-1)
        h = torch.nn.functional.silu(gate) * up * factor
        return ((module.down_proj[index] @ h[..., None])[..., 0] * gates[..., None]).sum(dim=1)

    ALL_EXPERTS_FUNCTIONS.register("factored", experts)
    options: Any = {"dtype": torch.float32, "attn_implementation": "eager", "experts_implementation": "factored"}
    whole = AutoModelForCausalLM.from_pretrained(sources[family], **options).eval()
    windows = tokenize(model, texts, 200, 512)
    expected = np.zeros((len(model.moe_layers), model.n_experts, model.expert.size))
    for chunk in windows.chunks():
        real = backpropagate_draws(whole, windows, chunk)
        count = np.bincount(windows.domain, windows.lengths)
        weight = torch.from_numpy(0.5 / count[windows.domain[chunk]])[:, None].expand(real.shape)[real]
        for row, factor in enumerate(factors):
            assert factor.grad is not None
            squares = factor.grad.double()[real.flatten()].square() * 0.5 * weight[:, None, None]
            chosen = factor.chosen[real.flatten()]  # type: ignore[attr-defined]
            for e in range(model.n_experts):
                expected[row, e] += squares[chosen == e].sum(dim=0).numpy()
        factors.clear()
    folder = collect_gradients(model, texts, tmp_path, max_tokens=200)
    for layer, heapr in zip(model.moe_layers, expected, strict=True):
        found = load_arrays(folder / array_file(layer))["heapr"]
        assert np.abs(found - heapr).max() < 1e-2 * heapr.max()  # gradients are kept as bfloat16
    assert not list(folder.glob("state-*.bin"))


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 10**6), st.integers(1, 12))
def test_the_best_neurons_stay_in_their_order(seed: int, width: int) -> None:
    rng = np.random.default_rng(seed)
    score, ties = rng.integers(0, 4, size=(3, 12)).astype(float), rng.permuted(np.tile(np.arange(12.0), (3, 1)), axis=1)
    found = best_neurons(score, ties, width)
    for e in range(3):
        assert found[e].tolist() == sorted(set(found[e].tolist()))
        gone = sorted(set(range(12)) - set(found[e].tolist()))
        pairs = [(score[e, i], ties[e, i]) for i in range(12)]
        assert len(found[e]) == width
        assert all(pairs[i] > pairs[j] for i in found[e] for j in gone)


def test_neurons_that_do_nothing_can_go_without_a_trace() -> None:
    rng = np.random.default_rng(0)
    gate, up, down = (torch.from_numpy(rng.normal(size=s).astype(np.float32)) for s in ((2, 6, 4), (2, 6, 4), (2, 4, 6)))
    down[0, :, 1] = 0
    up[1, 4] = 0
    experts, x = Experts(gate=gate, up=up, down=down), torch.from_numpy(rng.normal(size=(5, 4)).astype(np.float32))
    left = cut(experts, best_neurons(magnitude(experts), np.zeros((2, 6)), 5))
    for e in range(2):
        assert torch.allclose(left.hidden(e, x) @ left.down[e].T, experts.hidden(e, x) @ experts.down[e].T, atol=1e-6)


# ------------------------------------------------------------------------------------------------------------ a narrowing
@pytest.fixture(scope="module")
def trained() -> Model:
    return inspect_model(EXAMPLES / "tiny-moe-b")


def test_the_full_width_changes_nothing(trained: Model, texts: list[Text], tmp_path: Path) -> None:
    made = narrow_experts(trained, texts, 512, tmp_path / "none", max_tokens=4096)
    assert made.model is trained
    assert made.kl == (0.0, 0.0)
    assert not (tmp_path / "none").exists()
    costs = random_costs(0, "stacks")
    assert charge(costs, replace(made, kl=(0.0,) * len(costs.domains))) is costs


def test_a_killed_narrowing_goes_on_and_gives_the_same_bytes(sources: dict[str, Path], texts: list[Text], tmp_path: Path) -> None:
    class Killed(Exception):
        pass

    def kill(done: int, total: int) -> None:
        if done == total - 1:
            raise Killed

    model = inspect_model(sources["mixtral"])

    def narrow(work: Path, progress: Any = None) -> Narrowed:
        return narrow_experts(model, texts, WIDTH, work, max_tokens=2048, epochs=1, progress=progress)

    whole = narrow(tmp_path / "whole")
    with pytest.raises(Killed):
        narrow(tmp_path / "killed", kill)
    resumed = narrow(tmp_path / "killed")
    assert resumed.kl == whole.kl
    for name in [array_file(layer) for layer in range(model.n_layers)]:
        assert (whole.work / name).read_bytes() == (resumed.work / name).read_bytes()
    assert not list(resumed.work.glob("*.bin"))
    assert narrow(tmp_path / "killed") == resumed
    assert whole.model.expert.size == whole.model.config["intermediate_size"] == WIDTH
    assert whole.model.fingerprint == model.fingerprint


def test_best_neurons_cost_less_than_random_ones_and_what_is_charged_is_what_was_measured(
    trained: Model, texts: list[Text], tmp_path: Path
) -> None:
    best = narrow_experts(trained, texts, 256, tmp_path, max_tokens=2048)
    _, random = cut_and_refit(trained, texts, 256, "random", tmp_path, max_tokens=2048)
    assert sum(best.kl) < 0.8 * sum(random)
    costs = random_costs(0, "stacks")
    kl = tuple(0.01 * (d + 1) for d in range(len(costs.domains)))
    charged = charge(costs, replace(best, kl=kl))
    added = (charged.drop_cost - costs.drop_cost).sum(axis=2)  # [D, C]
    assert costs.predict_kl(float(costs.weights @ added[:, -1])) == pytest.approx(UNSEEN * float(costs.weights @ np.array(kl)))
    assert np.allclose(added, added[:, :1])
    assert charged.width == 256


# ------------------------------------------------------------------------------------------------------------------ words
@pytest.mark.parametrize("asked", ["0", "100", "544", "half", "-32", "1e2"])
def test_bad_widths_are_refused_with_those_that_are_possible(asked: str, trained: Model) -> None:
    with pytest.raises(UsageError, match=f"--width {asked}") as found:
        choose_widths(trained, asked)
    assert "32, 64, 96" in found.value.hint
    assert "256" in found.value.hint


def test_auto_tries_what_formats_can_store(trained: Model) -> None:
    assert choose_widths(trained, "auto") == (512, 384, 256)
    assert choose_widths(replace(trained, expert=replace(trained.expert, size=192)), "auto") == (192, 96)
    assert choose_widths(trained, "full") == choose_widths(trained, "512") == (512,)
    assert choose_widths(trained, "") == (512, 256)  # unasked, those that formats of few bits can store
    assert choose_widths(replace(trained, expert=replace(trained.expert, size=192)), "") == (192,)
    assert choose_widths(trained, "96") == (96,)


def test_a_width_that_would_change_a_shared_expert_is_not_offered(sources: dict[str, Path]) -> None:
    model = inspect_model(sources["glm4_moe"])  # a shared expert of 3 x 160 neurons, which the config counts in routed experts
    with pytest.raises(UsageError, match="--width 128") as caught:
        choose_widths(model, "128")
    assert "one of: 32, 96" in caught.value.hint
    assert choose_widths(model, "auto") == (160,)
    assert resize_experts(model, 96).config["n_shared_experts"] == 5
    assert choose_widths(inspect_model(sources["qwen2_moe"]), "128") == (128,)  # whose config gives the shared expert's size by itself
