"""Gradients of the loss, a layer at a time: what autograd of transformers' whole model says, kept for every token."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny import EXAMPLES, backpropagate_draws

from edgemoe.model.inspect import inspect_model
from edgemoe.stream.adapter import linear_of
from edgemoe.stream.gradients import collect_gradients, load_gradients, open_gradients
from edgemoe.stream.states import HASH_BYTES, States
from edgemoe.stream.texts import SHIPPED, read_text
from edgemoe.stream.windows import tokenize

TOKENS = 300
ATTENTION = ("attn_q", "attn_k", "attn_v", "attn_output")


def test_gradients_are_what_autograd_of_the_whole_model_says(tmp_path: Path) -> None:
    """Of the other family; test_width.py holds what is summed over neurons against autograd on all three."""
    from transformers import AutoModelForCausalLM

    name = "tiny-moe-b"
    model = inspect_model(EXAMPLES / name)
    texts = [read_text(str(path)) for path in sorted((SHIPPED / "calibration").glob("*.txt"))][:2]
    whole = AutoModelForCausalLM.from_pretrained(EXAMPLES / name, dtype=torch.float32, attn_implementation="eager").eval()
    given: dict[tuple[str, int], torch.Tensor] = {}

    def keep(role: str, layer: int) -> Any:
        def hook(_: Any, __: Any, output: Any) -> None:
            given[role, layer] = output[0] if isinstance(output, tuple) else output
            given[role, layer].retain_grad()

        return hook

    whole.model.embed_tokens.register_forward_hook(keep("layer", -1))
    for layer, module in enumerate(whole.model.layers):
        module.register_forward_hook(keep("layer", layer))
        for role in ATTENTION:
            linear_of(module, role).register_forward_hook(keep(role, layer))
    windows = tokenize(model, texts, TOKENS, 512)
    folder = collect_gradients(model, texts, tmp_path, max_tokens=TOKENS)
    sums: dict[tuple[str, int], Any] = {}
    for chunk in windows.chunks():
        real = backpropagate_draws(whole, windows, chunk)
        weight = torch.from_numpy(0.5 / np.bincount(windows.domain, windows.lengths)[windows.domain[chunk]])[:, None].expand(real.shape)
        for (role, layer), tensor in given.items():
            assert tensor.grad is not None
            g = tensor.grad[real].double()
            if role == "layer":
                with open_gradients(folder, layer, windows, model.hidden_size) as kept:
                    found = kept.read(chunk)[real].double()
                assert (found - g).norm() < 0.01 * g.norm()  # kept as bfloat16
            else:
                sums[role, layer] = sums.get((role, layer), 0) + ((g * weight[real][:, None]).T @ g).numpy()
    for (role, layer), expected in sums.items():
        found = load_gradients(folder, layer)[role]
        assert np.abs(found - expected).max() < 0.01 * np.abs(expected).max(), (role, layer)


def test_a_killed_pass_goes_on_and_gives_the_same_gradients(tmp_path: Path) -> None:
    model = inspect_model(EXAMPLES / "tiny-moe-b")
    texts = [read_text(str(path)) for path in sorted((SHIPPED / "calibration").glob("*.txt"))][:1]
    whole = collect_gradients(model, texts, tmp_path / "whole", max_tokens=TOKENS)
    for last in (1, model.n_layers + 1):  # forward and backward

        def kill(done: int, _: int, last: int = last) -> None:
            if done == last:
                raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            collect_gradients(model, texts, tmp_path / str(last), max_tokens=TOKENS, progress=kill)
        again = collect_gradients(model, texts, tmp_path / str(last), max_tokens=TOKENS)
        assert {f.name for f in again.iterdir()} == {f.name for f in whole.iterdir()}
        for file in whole.iterdir():
            assert (again / file.name).read_bytes() == file.read_bytes(), file.name


def test_half_states_keep_three_digits(tmp_path: Path) -> None:
    values = torch.from_numpy(np.random.default_rng(0).normal(size=(3, 4, 8)).astype(np.float32)) * 1e-5
    states, index = States(tmp_path / "half.bin", (3, 4, 8), half=True), np.array([2, 0, 1])
    states.write(index, values)
    torch.testing.assert_close(states.read(index), values, rtol=4e-3, atol=0)
    assert (tmp_path / "half.bin").stat().st_size == 2 * values.numel() + 3 * HASH_BYTES
