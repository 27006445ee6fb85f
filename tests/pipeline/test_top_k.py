"""Fewer active experts: files compute what transformers does with so many, their price is what was measured, and a build says so."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx_tiny
import pytest
import torch
from command import MODEL, error_of, run_cli
from gguf import GGUFReader
from numpy.typing import NDArray
from onnx_tiny import Runner, hand_plan
from strategies import random_costs
from tiny import EXAMPLES, FAMILIES, flat_plan, flat_stats, make_checkpoint

from edgemoe.base.errors import ModelError, UsageError
from edgemoe.calibrate.collect import collect_stats
from edgemoe.ir import Model
from edgemoe.model.checkpoint import read_tensor
from edgemoe.model.inspect import inspect_model
from edgemoe.pipeline.emit import emit_artifact
from edgemoe.repair.width import UNSEEN, charge, choose_top_k, narrow_experts
from edgemoe.stream.layers import LayerStream, apply_norm
from edgemoe.stream.texts import SHIPPED, Text, read_text
from edgemoe.stream.windows import tokenize
from edgemoe.targets import gguf
from edgemoe.targets.gguf.run import run

OWN = 3  # experts that the routers of these checkpoints pick
LEAST_FEWER = (1, 2)


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("checkpoints")
    shape = {"n_experts": 5, "top_k": OWN, "hidden": 128, "expert_size": 96}
    return {family: make_checkpoint(root / family, family, seed=i, **shape) for i, family in enumerate(FAMILIES)}


@pytest.fixture(scope="module")
def texts() -> list[Text]:
    return [read_text(str(SHIPPED / "calibration" / f"{name}.txt")) for name in ("english", "python")]


@pytest.fixture(scope="module")
def trained() -> Model:
    return inspect_model(EXAMPLES / "tiny-moe-b")


def log_probabilities(source: str, top_k: int, tokens: NDArray[np.int64]) -> torch.Tensor:
    """Of transformers' own model, its router told to pick so many."""
    from transformers import AutoModelForCausalLM

    module: Any = AutoModelForCausalLM.from_pretrained(source, num_experts_per_tok=top_k, dtype=torch.float32).eval()
    assert {layer.mlp.gate.top_k for layer in module.model.layers if hasattr(layer.mlp, "gate")} == {top_k}
    with torch.inference_mode():
        result: torch.Tensor = module(torch.from_numpy(tokens)).logits.double().log_softmax(-1)
    return result


def mean_kl(p: torch.Tensor, logits: NDArray[np.float32]) -> float:
    q = torch.from_numpy(logits.copy()).double().log_softmax(-1)
    return float((p.exp() * (p - q)).sum(-1).mean())


def some_tokens(model: Model, n: int) -> NDArray[np.int64]:
    return tokenize(model, [read_text(str(SHIPPED / "heldout" / "english.txt"))], n, n).tokens


# ----------------------------------------------------------------------------------------------------------------- parity
@pytest.mark.parametrize("top_k", LEAST_FEWER)
@pytest.mark.parametrize("family", FAMILIES)
def test_llama_cpp_computes_what_transformers_does(family: str, top_k: int, sources: dict[str, Path], tmp_path: Path) -> None:
    model = inspect_model(sources[family]).with_top_k(top_k)
    plan = flat_plan(model)
    artifact = emit_artifact(model, flat_stats(model, tmp_path / "stats"), plan, gguf, tmp_path / "out")  # type: ignore[arg-type]
    assert artifact.size == plan.file_size
    assert f"-K{top_k}-" in artifact.path.name
    fields = {name: field.contents() for name, field in GGUFReader(artifact.path).fields.items() if "expert_used" in name}
    (arch,) = (name for name in fields if not name.startswith("edgemoe."))
    assert fields == {arch: top_k, "edgemoe.expert_used_count_original": OWN}
    tokens = some_tokens(model, 256)
    found: list[NDArray[np.float32]] = []
    job = {"windows": tokens.tolist(), "vocab_size": model.vocab_size, "exact": True, "repack": False}
    run(artifact.path, job, lambda _, logits: found.append(logits))
    assert mean_kl(log_probabilities(model.folder, top_k, tokens)[0], found[0]) <= 1e-6
    assert mean_kl(log_probabilities(model.folder, OWN, tokens)[0], found[0]) > 1e-3  # so the line above can tell


@pytest.mark.parametrize("top_k", LEAST_FEWER)
@pytest.mark.parametrize("family", FAMILIES)
def test_onnxruntime_computes_what_transformers_does(family: str, top_k: int, sources: dict[str, Path], tmp_path: Path) -> None:
    model = inspect_model(sources[family]).with_top_k(top_k)
    plan = hand_plan(model, "F32")
    artifact = onnx_tiny.emit(model, flat_stats(model, tmp_path / "stats"), plan, tmp_path / "out")
    assert artifact.model_size == plan.file_size
    assert json.loads((tmp_path / "out" / "config.json").read_text())["num_experts_per_tok"] == top_k
    tokens = some_tokens(model, 128)
    assert mean_kl(log_probabilities(model.folder, top_k, tokens), Runner(artifact.path, model).step(tokens)) <= 1e-6


@pytest.mark.parametrize("family", FAMILIES)
def test_the_stream_runs_so_many(family: str, sources: dict[str, Path]) -> None:
    model = inspect_model(sources[family]).with_top_k(2)
    tokens, stream = some_tokens(model, 64), LayerStream(model)
    states = stream.embed(tokens)
    for layer in range(model.n_layers):
        states = stream.run_layer(stream.load_layer(layer), states)
    norm, head, eps = stream.head()
    logits = apply_norm(states, norm, eps) @ head.T
    assert mean_kl(log_probabilities(model.folder, 2, tokens), logits.cpu().numpy()) <= 1e-6


def test_a_file_with_the_checkpoints_own_number_is_as_before(sources: dict[str, Path], tmp_path: Path) -> None:
    model = inspect_model(sources["olmoe"])
    artifact = emit_artifact(model, flat_stats(model, tmp_path / "stats"), flat_plan(model), gguf, tmp_path / "out")  # type: ignore[arg-type]
    assert [name for name in GGUFReader(artifact.path).fields if "expert_used" in name] == ["olmoe.expert_used_count"]
    assert "-K" not in artifact.path.name


# -------------------------------------------------------------------------------------------------------------- the price
def test_a_refit_makes_good_a_part_and_what_is_charged_was_measured(trained: Model, texts: list[Text], tmp_path: Path) -> None:
    whole, options = trained.expert.size, {"top_k": 1, "max_tokens": 4096}
    plain, fitted = (narrow_experts(trained, texts, whole, tmp_path, epochs=epochs, **options) for epochs in (-1, 0))  # type: ignore[arg-type]
    assert (plain.model.top_k, fitted.model.top_k, plain.width) == (1, 1, 0)
    assert sum(fitted.kl) < 0.9 * sum(plain.kl)
    for old, new in zip(trained.tensors, plain.model.tensors, strict=True):
        if old.layer == 1:
            assert np.array_equal(read_tensor(trained.folder, old), read_tensor(plain.model.folder, new))
    costs = random_costs(0, "stacks")
    kl = tuple(0.01 * (d + 1) for d in range(len(costs.domains)))
    for made, unseen in ((plain, 1.0), (fitted, UNSEEN)):
        charged = charge(costs, replace(made, kl=kl))
        added = float(costs.weights @ (charged.drop_cost - costs.drop_cost)[:, -1].sum(axis=1))
        assert costs.predict_kl(added) == pytest.approx(unseen * float(costs.weights @ np.array(kl)))
        assert charged.width == 0


def test_without_a_refit_the_measured_kl_is_that_of_transformers(sources: dict[str, Path], texts: list[Text], tmp_path: Path) -> None:
    """A text that is one window is measured where it was watched."""
    model = inspect_model(sources["olmoe"])
    made = narrow_experts(model, texts[:1], model.expert.size, tmp_path, top_k=1, max_tokens=256, epochs=-1)
    tokens = tokenize(model, texts[:1], 256, 256).tokens
    p, q = (log_probabilities(model.folder, top_k, tokens) for top_k in (OWN, 1))
    assert made.kl[0] == pytest.approx(float((p.exp() * (p - q)).sum(-1).mean()), rel=1e-3)


def test_statistics_are_those_of_so_many_active_experts(sources: dict[str, Path], texts: list[Text], tmp_path: Path) -> None:
    model = inspect_model(sources["mixtral"])
    own, fewer = (collect_stats(m, texts, tmp_path, max_tokens=1024) for m in (model, model.with_top_k(1)))
    tokens = sum(d.tokens for d in own.domains)
    assert own.key != fewer.key
    assert "top_k" not in own.settings  # the key of a calibration that asks for nothing is what it was
    assert [int(stats.arrays(0)["count"].sum()) for stats in (own, fewer)] == [OWN * tokens, tokens]


def test_fewer_active_experts_are_fewer_bytes_for_a_token(trained: Model) -> None:
    two, one = (flat_plan(trained.with_top_k(k)) for k in (2, 1))
    experts = [t.n_weights * 4 for t in trained.tensors if t.expert == 0]
    assert two.active_bytes - one.active_bytes == sum(experts)


# ------------------------------------------------------------------------------------------------------------------ words
@pytest.mark.parametrize("asked", [-1, 0, 3, 100])
def test_other_numbers_are_refused_before_any_work(asked: int, trained: Model, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=f"--top-k {asked}") as found:
        choose_top_k(trained, asked)
    assert "1 to 2" in found.value.hint
    if asked == 3:
        done = run_cli("build", MODEL, "--memory", "50MB", "--top-k", asked, "-o", tmp_path / "out")
        assert done.returncode == 2 and "picks 2" in error_of(done.stderr)
        assert not (tmp_path / "out").exists()


def test_a_plan_for_fewer_is_not_written_from_the_checkpoint(trained: Model, tmp_path: Path) -> None:
    plan = flat_plan(trained.with_top_k(1))
    with pytest.raises(ModelError, match="1 active experts") as found:
        emit_artifact(trained, flat_stats(trained, tmp_path / "stats"), plan, gguf, tmp_path / "out")  # type: ignore[arg-type]
    assert "--top-k 1" in found.value.hint


@pytest.mark.parametrize("target", ["gguf", "onnx"])
def test_a_build_with_fewer_says_so_everywhere(target: str, sources: dict[str, Path], tmp_path: Path) -> None:
    heldout, out = tmp_path / "heldout.txt", tmp_path / "out"
    heldout.write_text((SHIPPED / "heldout" / "english.txt").read_text(encoding="utf-8")[:2000], encoding="utf-8")
    command = ["build", sources["mixtral"], "--target", target, "--memory", "200MB", "--context", 128, "--top-k", 2, "--no-repair"]
    done = run_cli(*command, "--calibration-tokens", 1024, "--rounding", "stock", "--heldout", heldout, "-o", out)
    assert done.returncode == 0, done.stderr
    plan, report = (json.loads((out / name).read_text()) for name in ("plan.json", "report.json"))
    assert (plan["top_k"], plan["width"], report["model"]["top_k"]) == (2, 0, OWN)
    assert plan["drop_q"] > 0  # although no expert went
    assert report["measured_kl"] > 1e-3
    assert f"the router picks 2 instead of {OWN}" in " ".join(done.stdout.split())
    for name in ("README.md", "report.html"):
        assert f"instead of {OWN}" in (out / name).read_text(encoding="utf-8"), name
    assert "--top-k 2" in (out / "README.md").read_text(encoding="utf-8")
