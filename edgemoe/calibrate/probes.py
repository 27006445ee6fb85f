"""This module carries probes to the end of the model and measures their KL; a probe is a copy of the stream with one thing changed.

The change is one tensor rounded in one layer, experts dropped in one layer, or every matrix rounded (docs/pricing.md, 4).
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from edgemoe.base.storage import array_file, load_arrays
from edgemoe.base.types import F64
from edgemoe.calibrate.observer import CalibrationRun
from edgemoe.ir import Model, Probe
from edgemoe.ir.model import is_stack
from edgemoe.model.routing.kept_sets import build_menu, make_replay
from edgemoe.quantize.reference import EXPERT_BITS, OTHER_BITS, WHOLE_BITS, round_to_nearest
from edgemoe.stream.passes import map_ordered, token_kl
from edgemoe.stream.states import States

DROP_SHARES = (0.75, 0.5, 0.25)  # kept shares of the dropping probes


def count_probes(model: Model) -> int:
    """Probes that start in some layer: one for each role that gets a format, and those that drop experts."""
    return sum(len(model.planned_roles(layer)) + len(DROP_SHARES) * (layer in model.moe_layers) for layer in range(model.n_layers))


def first_probes() -> list[Probe]:
    """The probes that start before the first layer: a rounded embedding, and all matrices rounded."""
    return [Probe(kind="round", role="token_embd", bits=OTHER_BITS), *(Probe(kind="all", bits=b) for b in WHOLE_BITS)]


def _probe_states(run: CalibrationRun, number: int, layer: int, shape: tuple[int, int, int]) -> States:
    return States(run.work / f"probe{number}-{layer}.bin", shape)


def _probe_chunks(run: CalibrationRun) -> list[NDArray[np.int64]]:
    return run.windows.take(run.probe_index).chunks()


def advance(run: CalibrationRun, module: Any, number: int, layer: int, shape: tuple[int, int, int], source: States | None = None) -> None:
    """Carry one probe through a layer with its current weights; a probe that starts here reads `source`, the main stream."""
    before = source or _probe_states(run, number, layer, shape)
    after = _probe_states(run, number, layer + 1, shape)

    def step(index: NDArray[np.int64]) -> None:
        states = before.read(run.probe_index[index] if source else index)
        after.write(index, run.stream.run_layer(module, states))

    for _ in map_ordered(step, _probe_chunks(run), device=run.stream.device):
        pass
    after.close()
    if not source:
        before.close()


def add_first_states(run: CalibrationRun, shape: tuple[int, int, int]) -> None:
    """Start the probe of a rounded embedding (number 0) and those of the whole model (the next ones)."""
    table = run.stream.embedding()
    for number, bits in enumerate((OTHER_BITS, *WHOLE_BITS)):
        rounded = round_to_nearest(table, bits)
        states = _probe_states(run, number, 0, shape)
        for index in _probe_chunks(run):
            states.write(index, run.stream.embed(run.windows.tokens[run.probe_index[index]], rounded))
        states.close()


def add_probes(run: CalibrationRun, module: Any, layer: int, main: States, probes: list[Probe], shape: tuple[int, int, int]) -> list[Probe]:
    """Perturb this layer in one way after another and start a probe from each; carry the probes of the whole model."""
    new: list[Probe] = []
    roles = run.model.planned_roles(layer)
    for role in roles:
        bits = EXPERT_BITS if is_stack(role) else OTHER_BITS
        with run.stream.rounded(module, {role: bits}):
            advance(run, module, len(probes) + len(new), layer, shape, main)
        new.append(Probe(kind="round", role=role, layer=layer, bits=bits))
    for kept in _probe_sets(run, layer):
        with run.stream.only(module, kept):
            advance(run, module, len(probes) + len(new), layer, shape, main)
        new.append(Probe(kind="drop", layer=layer, kept=tuple(int(e) for e in kept)))
    for number, probe in enumerate(probes):
        if probe.kind == "all":
            with run.stream.rounded(module, dict.fromkeys(roles, probe.bits)):
                advance(run, module, number, layer, shape)
    return new


def _probe_sets(run: CalibrationRun, layer: int) -> list[NDArray[np.int64]]:
    """Kept sets to probe in this layer: the menu's own at three kept counts."""
    model = run.model
    if layer not in model.moe_layers:
        return []
    counts = sorted({max(model.top_k, round(model.n_experts * s)) for s in DROP_SHARES} - {model.n_experts}, reverse=True)
    if not counts:
        return []
    arrays = load_arrays(run.work / array_file(layer))
    menu = build_menu(make_replay(arrays, run.weights, model.router), tuple(counts))
    return [np.flatnonzero(kept) for kept in menu.kept]


# --------------------------------------------------------------------------------------------------------------- the head
def measure_probes(run: CalibrationRun, probes: list[Probe], main: States, shape: tuple[int, int, int]) -> tuple[Probe, ...]:
    """KL of every probe by domain; a probe of the rounded output matrix is added."""
    model, windows, last = run.model, run.windows, run.model.n_layers
    tied, stream = model.is_tied, run.stream
    output = stream.output().cpu().numpy()
    rounded = {b: torch.from_numpy(round_to_nearest(output, b)).to(stream.device) for b in (OTHER_BITS, *WHOLE_BITS)}
    states = [_probe_states(run, number, last, shape) for number in range(len(probes))]
    heads = [rounded[p.bits] if p.kind == "all" or (tied and p.role == "token_embd") else None for p in probes]
    chosen = windows.take(run.probe_index)
    length = windows.tokens.shape[1]

    def measure(index: NDArray[np.int64]) -> F64:
        real = torch.from_numpy(chosen.take(index).real.ravel())
        domain = torch.from_numpy(np.repeat(chosen.domain[index], length))[real]

        def logits(states: torch.Tensor, head: torch.Tensor | None) -> torch.Tensor:
            return stream.logits(states, head).flatten(0, 1)[real.to(stream.device)]

        base = main.read(run.probe_index[index])
        reference = logits(base, None).double().log_softmax(-1)
        kls = [token_kl(reference, logits(s.read(index), head)) for s, head in zip(states, heads, strict=True)]
        kls.append(token_kl(reference, logits(base, rounded[OTHER_BITS])))
        sums = torch.zeros(len(run.weights), len(kls), dtype=torch.float64)
        sums.index_add_(0, domain, torch.stack(kls, dim=1).cpu())
        totals: F64 = sums.numpy()
        return totals

    with torch.inference_mode():
        total = sum(map_ordered(measure, chosen.chunks(), device=run.stream.device))
    per_domain = np.maximum(chosen.count_tokens(len(run.weights)), 1)
    kl = np.asarray(total) / per_domain[:, None]
    for state in states:
        state.close()
    named = probes if tied else [*probes, Probe(kind="round", role="output", bits=OTHER_BITS)]
    return tuple(replace(p, kl=tuple(float(v) for v in kl[:, i])) for i, p in enumerate(named))
