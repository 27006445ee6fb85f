"""llama.cpp and transformers as engines of one model: the same tokens go to the same experts, and all sums of calibration agree."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from tiny import EXAMPLES, FAMILIES, flat_plan, flat_stats

from edgemoe.base.storage import array_file, load_arrays
from edgemoe.calibrate.collect import collect_stats
from edgemoe.calibrate.observer import LayerObserver
from edgemoe.model.inspect import inspect_model
from edgemoe.stream.engine.stream import EngineStream
from edgemoe.stream.layers import LayerStream, recording
from edgemoe.stream.texts import choose_texts
from edgemoe.stream.windows import CHUNK_TOKENS, WINDOW, tokenize
from edgemoe.targets import find_target

LENGTH, AT_ONCE, WITHIN, TOKENS = 256, 4, 1e-5, 2048
ROUNDED = 8e-3  # of values that are stored in bfloat16
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


def close(found: object, expected: object, name: str, within: float = WITHIN) -> None:
    a, b = np.asarray(found, np.float64), np.asarray(expected, np.float64)
    assert a.shape == b.shape, name
    assert np.abs(a - b).max() <= within * np.abs(b).max(), f"{name}: {np.abs(a - b).max() / np.abs(b).max():.1e}"


def test_calibration_through_llama_cpp_gives_the_same_stats_and_probes(sources: dict[str, Path], tmp_path: Path) -> None:
    """A random model, because this takes long; benchmarks/engines.py compares the bundled models."""
    model, texts = inspect_model(sources["olmoe"]), choose_texts((), ())[0]
    target = find_target("gguf")
    path = target.write(model, flat_stats(model, tmp_path / "stats"), flat_plan(model, "F32"), tmp_path, 0, None).path
    stream = EngineStream(model, path, windows=CHUNK_TOKENS // WINDOW, length=WINDOW, threads=1)
    theirs = collect_stats(model, texts, tmp_path / "theirs", max_tokens=TOKENS)
    ours = collect_stats(model, texts, tmp_path / "ours", max_tokens=TOKENS, stream=stream)
    stream.close()
    for layer in range(-1, model.n_layers):
        expected, found = (load_arrays(Path(stats.folder) / array_file(layer)) for stats in (theirs, ours))
        assert set(found) == set(expected)
        for key, value in found.items():
            if key in ("count", "candidates", "tokens", "token_count", "replay_domain"):
                np.testing.assert_array_equal(value, expected[key], f"{layer}: {key}")
            else:
                close(value, expected[key], f"{layer}: {key}", ROUNDED if key in ("replay_x", "gram") else WITHIN)
    assert [(p.kind, p.role, p.layer, p.kept) for p in ours.probes] == [(p.kind, p.role, p.layer, p.kept) for p in theirs.probes]
    kl, wanted = (np.array([p.kl for p in stats.probes]) for stats in (ours, theirs))
    apart = np.abs(kl / wanted - 1)
    # Random routers nearly toss a coin for some tokens, and one that falls on the other side changes the KL of its text.
    assert (apart > 3 * WITHIN).sum() <= apart.size // 100
