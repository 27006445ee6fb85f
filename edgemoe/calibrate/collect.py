"""This module collects Stats from a Model and texts in one streamed pass over the layers, which also carries the probes.

In each layer the calibration windows run through the original layer while its experts are watched.  Then every probe runs through the
layer.  A probe is a copy of a few windows with one change: one tensor rounded, experts dropped in one layer, or every matrix rounded.  The
KL of the probe after the last layer tells what this change costs (docs/pricing.md, 4 and 5).  After each layer everything is on disk, so a
killed run goes on with the next layer and gives the same numbers.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgemoe import __version__
from edgemoe.base.progress import Progress
from edgemoe.base.storage import (
    FORMAT_VERSION,
    array_file,
    check_arrays,
    load_arrays,
    load_record,
    save_arrays,
    save_record,
)
from edgemoe.base.types import F64
from edgemoe.base.work import Steps, key_of, open_or_make, path_of
from edgemoe.calibrate.observer import CalibrationRun, observe_layer, save_outer_sums
from edgemoe.calibrate.probes import add_first_states, add_probes, advance, count_probes, first_probes, measure_probes
from edgemoe.ir import Domain, Model, Probe, Stats
from edgemoe.model.routing.kept_sets import COLD_TOKENS
from edgemoe.quantize.reference import EXPERT_BITS, OTHER_BITS, WHOLE_BITS
from edgemoe.stream.open import open_stream
from edgemoe.stream.states import States
from edgemoe.stream.texts import DEFAULT_TOKENS, Text, text_weights, texts_key
from edgemoe.stream.verbs import Stream
from edgemoe.stream.windows import WINDOW, Windows, tokenize

REPLAY_TOKENS = 2048  # of all texts: tokens whose expert inputs are stored, to price kept sets from
PROBE_TOKENS = 4096  # at most, in the windows of a probe

ARRAYS = 2  # version of the arrays; 2: `largest` was added
PROBE_EFFORT = 4  # probes may cost this many times the main pass; deep models get fewer probe tokens


# ------------------------------------------------------------------------------------------------------------ entry point
def collect_stats(
    model: Model,
    texts: Sequence[Text],
    work: Path,
    *,
    max_tokens: int = DEFAULT_TOKENS,
    progress: Progress | None = None,
    stream: Stream | None = None,
) -> Stats:
    """Watch the original model on `texts`, and return the Stats.

    Args:
        model: from `inspect_model`.
        texts: calibration texts with weights; statistics are kept per text.
        work: folder in which the result gets a subfolder, named by a hash of model, texts and settings; the state of a killed run lies
            there too.
        max_tokens: most tokens of all texts together; every text gives the same share at most.
        progress: called with (layers done, all layers); the head counts as a layer.
        stream: what computes the layers; None: what `open_stream` chooses for the model.

    Raises:
        ModelError: a text gives no tokens, or the model gives NaN or infinite states.
    """
    windows = tokenize(model, texts, max_tokens, WINDOW)
    settings = {"window": windows.tokens.shape[1], "max_tokens": max_tokens, "replay": REPLAY_TOKENS, "probe": PROBE_TOKENS}
    own, stream = stream is None, stream or open_stream(model)
    settings |= {
        "edgemoe": __version__,
        "format": FORMAT_VERSION,
        "expert_size": model.expert.size,
        "device": stream.name,
        "bits": (EXPERT_BITS, OTHER_BITS, *WHOLE_BITS),
        "arrays": ARRAYS,
    }
    if model.top_k != model.own_top_k:  # said only then, so that the keys of all other calibrations do not change
        settings["top_k"] = model.top_k
    key = key_of("stats", model.fingerprint, texts_key(texts), settings)
    folder = path_of(work, "stats", key)

    def read() -> Stats | None:
        if not (folder / "stats.json").exists():
            return None
        for layer in range(-1, model.n_layers):
            check_arrays(folder / array_file(layer))  # all of them, before anything is made from them
        return replace(load_record(folder / "stats.json", Stats), folder=str(folder))

    try:
        return open_or_make(folder, read, lambda: _observe_all(model, texts, windows, stream, folder, key, settings, progress))
    finally:
        if own:
            stream.close()


def _observe_all(
    model: Model,
    texts: Sequence[Text],
    windows: Windows,
    stream: Stream,
    work: Path,
    key: str,
    settings: dict[str, Any],
    progress: Progress | None,
) -> Stats:
    """Run the calibration, save the Stats in `work`, and delete the stream's files."""
    work.mkdir(parents=True, exist_ok=True)
    tokens = [int(windows.lengths[windows.domain == d].sum()) for d in range(len(texts))]
    domains = tuple(Domain(name=t.name, weight=t.weight, tokens=n, sha256=t.sha256) for t, n in zip(texts, tokens, strict=True))
    weights = text_weights(texts)
    probe_index = _choose_probe_windows(model, windows, weights)
    run = CalibrationRun(model, stream, windows, probe_index, _choose_replay(windows, weights), work, weights)
    probes = _run_layers(run, key, progress)
    stats = Stats(
        folder=str(work), model=model.fingerprint, key=key, settings=settings, domains=domains, probes=probes, cold=_find_cold(model, work)
    )
    save_record(work / "stats.json", stats)
    for name in work.glob("*.bin"):
        name.unlink()
    return stats


def _choose_probe_windows(model: Model, windows: Windows, weights: F64) -> NDArray[np.int64]:
    """Choose the windows of the probes, equally many of each domain.

    Together the probes should cost at most PROBE_EFFORT main passes.  On average a probe runs through half of the layers, hence the 2.
    At least 512 tokens and one window of each domain are taken, even if they cost more.
    """
    all_tokens = int(windows.lengths.sum())
    affordable = PROBE_EFFORT * all_tokens * 2 / max(count_probes(model), 1)
    n_windows = round(min(PROBE_TOKENS, max(affordable, 512)) / windows.tokens.shape[1])
    each = max(1, n_windows // len(weights))
    chosen = []
    for d in range(len(weights)):
        mine = np.flatnonzero(windows.domain == d)
        chosen.append(mine[np.linspace(0, len(mine) - 1, min(each, len(mine))).round().astype(int)])
    return np.sort(np.concatenate(chosen))


def _choose_replay(windows: Windows, weights: F64) -> NDArray[np.int64]:
    """Choose the replay tokens [N, 2] (window, position): evenly spaced in each text, and the share of each text is its weight."""
    rows = []
    for d, weight in enumerate(weights):
        mine = np.flatnonzero(windows.domain == d)
        places = np.concatenate([np.stack([np.full(windows.lengths[w], w), np.arange(windows.lengths[w])], axis=1) for w in mine])
        wanted = min(max(round(REPLAY_TOKENS * weight), 1), len(places))
        rows.append(places[np.linspace(0, len(places) - 1, wanted).round().astype(int)])
    return np.concatenate(rows)


def _find_cold(model: Model, work: Path) -> tuple[tuple[int, int], ...]:
    """Find the experts, as (layer, expert), that fewer than COLD_TOKENS calibration tokens chose."""
    cold = []
    for layer in model.moe_layers:
        count = load_arrays(work / array_file(layer))["count"].sum(axis=0)
        cold += [(layer, int(e)) for e in np.flatnonzero(count < COLD_TOKENS)]
    return tuple(cold)


# --------------------------------------------------------------------------------------------------------------- the pass
def _run_layers(run: CalibrationRun, key: str, progress: Progress | None) -> tuple[Probe, ...]:
    """Run the main stream and the probes through all layers and the head; return the probes with their KL."""
    model, shape = run.model, (*run.windows.tokens.shape, run.stream.width)
    probe_shape = (len(run.probe_index), *shape[1:])
    steps = Steps(run.work, key)
    probes, start = _resume(run, steps)
    main = States(run.work / f"main-{start}.bin", shape)
    if start == 0:
        for index in run.windows.chunks():
            main.write(index, run.stream.embed(run.windows.tokens[index]))
        add_first_states(run, probe_shape)
    if progress:
        progress(start, model.n_layers + 1)
    for layer in range(start, model.n_layers):
        module = run.stream.load_layer(layer)
        following = States(run.work / f"main-{layer + 1}.bin", shape)
        save_arrays(run.work / array_file(layer), observe_layer(run, module, layer, main, following))
        for number, probe in enumerate(probes):
            if probe.kind != "all":  # `add_probes` carries those, with every matrix of the layer rounded
                advance(run, module, number, layer, probe_shape)
        probes += add_probes(run, module, layer, main, probes, probe_shape)
        run.stream.unload_layer(layer)
        main.close()
        main = following
        steps.note(layer + 1, probes=[asdict(p) for p in probes])
        for old in run.work.glob(f"*-{layer}.bin"):
            old.unlink()
        if progress:
            progress(layer + 1, model.n_layers + 1)
    measured = measure_probes(run, probes, main, probe_shape)
    save_outer_sums(run, main)
    main.close()
    if progress:
        progress(model.n_layers + 1, model.n_layers + 1)
    return measured


def _resume(run: CalibrationRun, steps: Steps) -> tuple[list[Probe], int]:
    """Return the probes so far and the next layer, if a killed run left them; else delete old files of the stream and start at layer 0."""
    saved = steps.read()
    if saved["done"]:
        return [Probe(**{**p, "kept": tuple(p["kept"]), "kl": ()}) for p in saved["probes"]], int(saved["done"])
    for old in run.work.glob("*.bin"):
        old.unlink()
    return first_probes(), 0
