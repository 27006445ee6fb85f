"""What llama.cpp's kernels round of their inputs: a checkpoint whose weights are exact in a format loses nothing else when stored in it."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import EXAMPLES, flat_plan

from edgemoe.calibrate.collect import collect_stats
from edgemoe.model.inspect import inspect_model
from edgemoe.price.choices import price_choices
from edgemoe.stream.texts import choose_texts
from edgemoe.targets import Target, find_target
from edgemoe.verify.logits import compare_logits, reference_states, tokenize_heldout

TOKENS = 4096


def with_formats(target: Target, names: tuple[str, ...]) -> Target:
    """The target with these formats alone, which takes a third of the time that pricing all of them takes."""
    return replace(
        target, offered=names, offered_formats=lambda model, unit: tuple(n for n in target.offered_formats(model, unit) if n in names)
    )


@pytest.mark.parametrize("name", ["Q8_0", "Q6_K"])  # inputs in blocks of 32, and of 256
def test_rounded_inputs_are_priced_at_what_they_lose_in_llama_cpp(tmp_path: Path, name: str) -> None:
    folder = tmp_path / "exact"
    target = with_formats(find_target("gguf"), ("Q8_0", "Q6_K"))
    shutil.copytree(EXAMPLES / "tiny-moe-b", folder)
    tensors = {key: value.float() for key, value in load_file(folder / "model.safetensors").items()}
    for key, value in tensors.items():
        if value.dim() > 1 and not key.endswith("gate.weight"):  # all but norms and routers
            rows = target.round_rows(np.ascontiguousarray(value.reshape(-1, value.shape[-1]).numpy()), name, None)
            tensors[key] = torch.from_numpy(rows).reshape(value.shape)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "dtype": "float32"}))

    model, (texts, _) = inspect_model(folder), choose_texts([], [])
    stats = collect_stats(model, texts, tmp_path / "work", max_tokens=TOKENS)
    costs = price_choices(model, stats, target, 512)
    f = costs.formats.index(name)
    assert (costs.cost - costs.input_cost)[-1, :, f].sum() < 0.01 * costs.input_cost[-1, :, f].sum()

    (tmp_path / "out").mkdir()
    path = target.write(model, stats, flat_plan(model, name), tmp_path / "out", 0, None).path
    windows = tokenize_heldout(model, texts, TOKENS)
    scores = compare_logits(path, model, windows, reference_states(model, windows, tmp_path), [t.name for t in texts], target)
    measured = np.mean([s.kl_mean for s in scores])
    assert measured > 5e-5  # as much as the weights of the largest plans lose
    assert 0.7 < costs.predict_kl(float(costs.input_cost[-1, :, f].sum())) / measured < 1.6
