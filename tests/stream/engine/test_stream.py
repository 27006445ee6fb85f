"""llama.cpp and transformers as engines of one model: the same tokens go to the same experts, and all sums of calibration agree."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from tiny import EXAMPLES, FAMILIES, flat_plan, flat_stats

from edgemoe.calibrate.observer import LayerObserver
from edgemoe.model.inspect import inspect_model
from edgemoe.stream.engine.stream import EngineStream
from edgemoe.stream.layers import LayerStream, recording
from edgemoe.stream.texts import choose_texts
from edgemoe.stream.windows import tokenize
from edgemoe.targets import find_target

LENGTH, AT_ONCE, WITHIN = 256, 4, 1e-5
BUNDLED = ("tiny-moe", "tiny-moe-b")


@pytest.mark.parametrize("name", [*BUNDLED, *FAMILIES])
def test_both_engines_see_the_same(name: str, sources: dict[str, Path], tmp_path: Path) -> None:
    model = inspect_model(EXAMPLES / name if name in BUNDLED else sources[name])
    target, plan = find_target("gguf"), flat_plan(model, "F32")
    path = target.write(model, flat_stats(model, tmp_path / "stats"), plan, tmp_path, 0, None).path
    windows = tokenize(model, choose_texts((), ())[0], 4 * LENGTH if name in BUNDLED else 2 * LENGTH, LENGTH)
    theirs, ours = LayerStream(model), EngineStream(model, path, windows=AT_ONCE, length=windows.tokens.shape[1], threads=1)
    factor = np.ones(int(windows.domain.max()) + 1)
    for start in range(0, len(windows.tokens), AT_ONCE):
        index = np.arange(start, min(start + AT_ONCE, len(windows.tokens)))
        part = windows.take(index)
        expected, found = theirs.embed(part.tokens), ours.embed(part.tokens)
        np.testing.assert_array_equal(found, expected)
        for layer in range(model.n_layers):
            module = theirs.load_layer(layer)
            seen = [LayerObserver(model, part, len(factor), factor) for _ in range(2)]
            with recording(seen[0].recorder):
                expected = theirs.run_layer(module, expected)
            with recording(seen[1].recorder):
                found = ours.run_layer(layer, found)
            close(found, expected, f"{layer}: states")
            assert list(seen[0].recorder.inputs) == list(seen[1].recorder.inputs)
            wanted = sums(seen[0], expected, routes=layer in model.moe_layers)
            for key, value in sums(seen[1], found, routes=layer in model.moe_layers).items():
                close(value, wanted[key], f"{layer}: {key}")
                assert key != "count" or (value == wanted[key]).all()
    ours.close()


def sums(seen: LayerObserver, states: torch.Tensor, *, routes: bool) -> dict[str, NDArray[np.float64]]:
    found = seen.input_sums() | {"largest": seen.largest_of(states)}
    if routes:
        x, logits, _, norms = seen.at(np.arange(0, states.shape[0] * states.shape[1], 7), states)
        found |= seen.finish(states) | {"logits": logits, "norms": norms}
        assert np.abs(x - x.astype(np.float32)).max() == 0
    return found


def close(found: object, expected: object, name: str) -> None:
    a, b = np.asarray(found, np.float64), np.asarray(expected, np.float64)
    assert a.shape == b.shape, name
    assert np.abs(a - b).max() <= WITHIN * np.abs(b).max(), f"{name}: {np.abs(a - b).max() / np.abs(b).max():.1e}"
