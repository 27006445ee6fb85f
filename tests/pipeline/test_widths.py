"""Narrower experts in a build: what is left is what transformers computes, and when they are tried."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import EXAMPLES, FAMILIES, flat_plan, flat_stats, make_checkpoint

from edgemoe.base.errors import ModelError
from edgemoe.base.storage import array_file, save_arrays
from edgemoe.ir import Model
from edgemoe.model.checkpoint import read_tensor
from edgemoe.model.config import Config
from edgemoe.model.describe import resize_experts
from edgemoe.model.families import find_family
from edgemoe.model.inspect import inspect_model
from edgemoe.model.overlay import save_overlay
from edgemoe.pipeline.emit import emit_artifact
from edgemoe.pipeline.request import BuildRequest, Job
from edgemoe.pipeline.widths import plan_widths
from edgemoe.repair.width import FEW_BITS, choose_widths
from edgemoe.stream.texts import SHIPPED, Text, read_text
from edgemoe.stream.windows import tokenize
from edgemoe.targets import find_target, gguf
from edgemoe.targets.gguf.run import run
from edgemoe.targets.gguf.writer import fixed_sizes
from edgemoe.targets.stacks import list_units

WIDTH = 96  # of 160: no multiple of 64, nor half


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("checkpoints")
    shape = {"n_experts": 4, "hidden": 128, "expert_size": 160}
    return {family: make_checkpoint(root / family, family, seed=i, **shape) for i, family in enumerate(FAMILIES)}


@pytest.fixture(scope="module")
def texts() -> list[Text]:
    return [read_text(str(SHIPPED / "calibration" / f"{name}.txt")) for name in ("english", "python")]


def narrow_by_hand(source: Path, layers: Sequence[int], neurons: np.ndarray, out: Path) -> Path:
    """The checkpoint with only some neurons [MoE layers, E, width] of its experts, for transformers to run."""
    shutil.copytree(source, out)
    config = json.loads((source / "config.json").read_text())
    family, weights = find_family(config["model_type"]), load_file(source / "model.safetensors")
    specs = {spec.role: spec for block in family.layer(Config(config), layers[0]) for spec in block.specs}
    for row, e in np.ndindex(neurons.shape[:2]):
        for projection in ("gate", "up", "down"):
            name = f"model.layers.{layers[row]}." + specs[f"ffn_{projection}_exps"].names[0].format(expert=e)
            index = torch.from_numpy(neurons[row, e])
            weights[name] = weights[name].index_select(1 if projection == "down" else 0, index).contiguous()
    save_file(weights, out / "model.safetensors", metadata={"format": "pt"})
    if family.shared_count:  # of the shared expert, in routed experts
        config[family.shared_count] = config[family.shared_count] * config[family.expert_size] // neurons.shape[2]
    (out / "config.json").write_text(json.dumps({**config, family.expert_size: neurons.shape[2]}))
    return out


def narrow_by_overlay(model: Model, neurons: np.ndarray, work: Path) -> Model:
    """The same through our own record."""
    work.mkdir()
    for row, layer in enumerate(model.moe_layers):
        arrays = {}
        for (role, e), tensor in model.of_layer(layer).items():
            if e >= 0:
                arrays[f"{role}.{e}"] = np.take(read_tensor(model.folder, tensor), neurons[row, e], axis=int(role == "ffn_down_exps"))
        save_arrays(work / array_file(layer), arrays)
    return save_overlay(resize_experts(model, neurons.shape[2]), work, {})


@pytest.mark.parametrize("family", FAMILIES)
def test_a_narrowed_file_gives_the_logits_of_the_sliced_original(family: str, sources: dict[str, Path], tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    model = inspect_model(sources[family])
    rng = np.random.default_rng(1)
    neurons = np.array([[np.sort(rng.permutation(160)[:WIDTH]) for _ in range(4)] for _ in range(2)])
    narrow = narrow_by_overlay(model, neurons, tmp_path / "work")
    plan = replace(flat_plan(narrow), width=WIDTH)
    artifact = emit_artifact(narrow, flat_stats(narrow, tmp_path / "stats"), plan, gguf, tmp_path / "out")  # type: ignore[arg-type]
    by_hand = narrow_by_hand(sources[family], model.moe_layers, neurons, tmp_path / "sliced" / family)  # named alike
    tokens = tokenize(model, [read_text(str(SHIPPED / "heldout" / "english.txt"))], 256, 256).tokens
    whole = AutoModelForCausalLM.from_pretrained(by_hand, dtype=torch.float32).eval()
    with torch.inference_mode():
        expected = whole(torch.from_numpy(tokens)).logits[0].numpy()
    found: list[np.ndarray] = []
    job = {"windows": tokens.tolist(), "vocab_size": model.vocab_size, "exact": True, "repack": False}
    run(artifact.path, job, lambda _, logits: found.append(logits))
    assert np.median(np.abs(found[0] - expected).max(axis=1)) < 1e-3
    assert artifact.size == plan.file_size == fixed_sizes(inspect_model(by_hand), [4])[0] + sum(plan.sizes.values())
    assert [u.n_weights for u in list_units(narrow)] == [u.n_weights for u in list_units(inspect_model(by_hand))]
    assert f"-W{WIDTH}-" in artifact.path.name


@pytest.fixture(scope="module")
def trained() -> Model:
    return inspect_model(EXAMPLES / "tiny-moe-b")


def test_unasked_narrower_experts_are_tried_where_bits_are_few_alone(texts: list[Text], tmp_path: Path) -> None:
    model = inspect_model(make_checkpoint(tmp_path / "source", "mixtral", seed=0, n_experts=4, hidden=256, expert_size=512, layers=1))
    target, context = find_target("gguf"), 512

    def narrowed(bits: float, asked: str = "") -> list[str]:
        beside = sum(target.memory_parts(model, context).values())
        memory = beside + round(bits / 8 * model.n_weights)
        request = BuildRequest(model="", memory=memory, out=tmp_path, calibration_tokens=1024, repair=False, width=asked)
        job = Job(
            request=request,
            model=model,
            target=target,
            context=context,
            widths=choose_widths(model, asked),
            top_k=model.top_k,
            calibration=tuple(texts),
            heldout=(),
        )
        plan_widths(job, tmp_path, lambda stage, done, total: None)
        return [path.name.split("-")[1] for path in tmp_path.glob("narrow-*")]

    assert narrowed(FEW_BITS + 1) == []
    assert narrowed(FEW_BITS - 0.5, "full") == []
    assert narrowed(FEW_BITS - 0.5) == ["256"]


def test_a_plan_for_narrower_experts_is_not_written_from_wide_ones(trained: Model, tmp_path: Path) -> None:
    plan = replace(flat_plan(trained), width=256)
    with pytest.raises(ModelError, match="256 neurons") as found:
        emit_artifact(trained, flat_stats(trained, tmp_path / "stats"), plan, gguf, tmp_path / "out")  # type: ignore[arg-type]
    assert "--width 256" in found.value.hint
