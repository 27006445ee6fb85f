"""This module watches one layer of the calibration stream and fills its arrays of Stats, for every expert and for the replay tokens."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from edgemoe.base.errors import ModelError
from edgemoe.base.storage import array_file, save_arrays
from edgemoe.base.types import F32, F64
from edgemoe.ir import Model
from edgemoe.model.routing.rule import choice_scores
from edgemoe.stream.layers import Recorder, apply_norm, recording
from edgemoe.stream.passes import map_ordered
from edgemoe.stream.states import States
from edgemoe.stream.verbs import Stream
from edgemoe.stream.windows import Windows

CANDIDATES = 64  # experts per replay token whose outputs are computed, so that kept sets can be priced


@dataclass(frozen=True, slots=True)
class CalibrationRun:
    """The data that all steps of one calibration share."""

    model: Model
    stream: Stream
    windows: Windows
    probe_index: NDArray[np.int64]  # the windows that the probes use
    replay: NDArray[np.int64]  # [N, 2] window and position of the replay tokens
    work: Path
    weights: F64


def observe_layer(run: CalibrationRun, module: Any, layer: int, main: States, following: States) -> dict[str, NDArray[Any]]:
    """Run the main stream through a layer, and return the sums over it (arrays of Stats)."""
    windows, domains = run.windows, len(run.weights)
    total: dict[str, NDArray[Any]] = {}
    replayed: list[tuple[NDArray[Any], ...]] = []
    routes = layer in run.model.moe_layers
    factor = run.weights / np.maximum(windows.count_tokens(domains), 1)
    factor = factor / factor.max()  # importance: every domain counts by its weight, not its length

    def watch(index: NDArray[np.int64]) -> tuple[dict[str, NDArray[Any]], tuple[NDArray[Any], ...]]:
        seen = LayerObserver(run.model, windows.take(index), domains, factor)
        with recording(seen.recorder):
            out = run.stream.run_layer(module, main.read(index))
        if not bool(torch.isfinite(out).all()):
            raise ModelError(f"{run.model.folder}: the model gives NaN or infinite states in calibration")
        following.write(index, out)
        largest = {"largest": seen.largest_of(out)}
        if not routes:
            return seen.input_sums() | largest, ()
        mine = np.isin(run.replay[:, 0], index)
        rows = (run.replay[mine, 0] - index[0]) * windows.tokens.shape[1] + run.replay[mine, 1]
        return seen.finish(out) | seen.input_sums() | largest, seen.at(rows, out)

    for sums, rows in map_ordered(watch, windows.chunks(), device=run.stream.device):
        total = {name: (np.maximum if name == "largest" else np.add)(total.get(name, 0), value) for name, value in sums.items()}
        replayed.append(rows)
    total["tokens"] = windows.count_tokens(domains)
    if not routes:
        return total
    x, logits, domain, stream = (np.concatenate(parts) for parts in zip(*replayed, strict=True))
    biased = run.model.router.biased
    bias = run.stream.values(module, "exp_probs_b.bias") if biased else np.zeros(logits.shape[1], np.float32)
    choice = choice_scores(run.model.router, logits, bias)
    candidates = np.argsort(-choice, axis=1, kind="stable")[:, : min(run.model.n_experts, max(CANDIDATES, 3 * run.model.top_k))]
    total |= {"replay_x": x, "replay_logits": logits, "replay_domain": domain, "replay_stream": stream}
    total["candidates"] = candidates.astype(np.int32)
    total["gram"] = gram_of_candidates(run, module, x, candidates)
    if biased:
        total["router_bias"] = bias
    return total


class LayerObserver:
    """Sums over the real tokens of one chunk of windows, filled while the layer runs."""

    def __init__(self, model: Model, windows: Windows, domains: int, factor: F64) -> None:
        length = windows.tokens.shape[1]
        self.real = torch.from_numpy(windows.real.ravel())
        self.domain = torch.from_numpy(np.repeat(windows.domain, length))
        self.factor = torch.from_numpy(factor.astype(np.float32))
        self.domains = domains
        e, (rows, h, m) = model.n_experts, expert_widths(model)
        names = ("count", "gate", "gate_sq", "norm", "norm_sq", "gate_norm", "energy")
        self.experts = {name: torch.zeros(domains, e, dtype=torch.float64) for name in names}
        self.in_sq, self.mid_sq = torch.zeros(e, h), torch.zeros(e, m)
        self.importance, self.output = torch.zeros(e), torch.zeros(e, rows)
        self.parts: list[tuple[int, torch.Tensor, torch.Tensor]] = []  # expert, its tokens, g|f| of each
        self.largest = 0.0  # magnitude in what experts read and give
        self.recorder = Recorder(on_expert=self._on_expert)

    def _on_expert(self, expert: int, token: torch.Tensor, x: torch.Tensor, h: torch.Tensor, f: torch.Tensor, gate: torch.Tensor) -> None:
        token = token.cpu()
        real = self.real[token]
        token, g, x, h = token[real], gate.cpu()[real], x.cpu()[real], h.cpu()[real]
        f = f.float().cpu()[real]
        self.largest = max([self.largest, *(float(part.abs().max()) for part in (h, f) if len(part))])
        norm = f.norm(dim=1)
        domain = self.domain[token]
        values = {"count": torch.ones_like(g), "gate": g, "gate_sq": g**2, "norm": norm, "norm_sq": norm**2}
        values |= {"gate_norm": g * norm, "energy": (g * norm) ** 2}
        for name, value in values.items():
            self.experts[name][:, expert].index_add_(0, domain, value.double())
        weight = g**2 * self.factor[domain]
        self.in_sq[expert] = weight @ x.float() ** 2
        self.mid_sq[expert] = weight @ h.float() ** 2
        self.importance[expert] = weight.sum()
        self.output[expert] = self.factor[domain] @ f
        self.parts.append((expert, token, (g * norm).double()))

    def finish(self, states: torch.Tensor) -> dict[str, NDArray[Any]]:
        """The sums as arrays; `states` are those after the layer."""
        turned = self._turned(states)
        residual = torch.zeros_like(self.experts["gate"])
        for expert, token, gate_norm in self.parts:
            residual[:, expert].index_add_(0, self.domain[token], gate_norm * turned[token])
        out: dict[str, NDArray[Any]] = {name: value.numpy() for name, value in self.experts.items()}
        out |= {"count": out["count"].astype(np.int64), "residual": residual.numpy()}
        out |= {"expert_in_sq": self.in_sq.double().numpy(), "expert_mid_sq": self.mid_sq.double().numpy()}
        out |= {"expert_importance": self.importance.double().numpy(), "expert_out": self.output.double().numpy()}
        return out

    def input_sums(self) -> dict[str, NDArray[Any]]:
        """Sums of squares of the inputs of matrices outside the routed experts [D, cols], by the activation that they read."""
        found: dict[str, NDArray[Any]] = {}
        for activation, x in self.recorder.inputs.items():
            sums = torch.zeros(self.domains, x.shape[1])
            squares = x.float().cpu() ** 2
            sums.index_add_(0, self.domain[self.real], squares[self.real])
            found[f"in_sq.{activation}"] = sums.numpy().astype(np.float64)
        return found

    def largest_of(self, states: torch.Tensor) -> F64:
        """The largest magnitude of an activation in the layer [1]: inputs of matrices, experts' outputs, and `states` after the layer."""
        seen = [x.cpu()[self.real] for x in self.recorder.inputs.values()] + [states.flatten(0, -2).cpu()[self.real]]
        return np.array([max([self.largest, *(float(x.abs().max()) for x in seen)])])

    def _turned(self, states: torch.Tensor) -> torch.Tensor:
        """1 - cos of each token's stream before and after the experts' output is added [tokens], not below 0 (EASY-EP)."""
        assert self.recorder.moe_output is not None
        after, output = states.flatten(0, -2), self.recorder.moe_output
        if after.shape != output.shape:  # experts in a latent space: what they add to the stream is not seen
            return torch.zeros(len(after), dtype=torch.float64)
        turned: torch.Tensor = 1 - torch.nn.functional.cosine_similarity(after - output, after, dim=-1)
        return turned.clamp(min=0).cpu().double()

    def at(self, rows: NDArray[np.int64], states: torch.Tensor) -> tuple[NDArray[Any], ...]:
        """MoE inputs, router logits, domains, and squared norms of the states after the layer, of some tokens of the chunk."""
        assert self.recorder.moe_input is not None
        assert self.recorder.logits is not None
        picked = torch.from_numpy(rows)
        x = self.recorder.moe_input.float().cpu()[picked].bfloat16().float().numpy()
        stream = states.flatten(0, -2).cpu()[picked].float().square().sum(dim=1)
        return x, self.recorder.logits.cpu()[picked].numpy(), self.domain[picked].numpy().astype(np.int32), stream.numpy()


def expert_widths(model: Model) -> tuple[int, int, int]:
    """Outputs, inputs and neurons of an expert, by its matrices."""
    if not model.moe_layers:
        return model.hidden_size, model.hidden_size, model.expert.size
    shapes = {role: tensor.shape for (role, expert), tensor in model.of_layer(model.moe_layers[0]).items() if expert == 0}
    rows, neurons = shapes.pop("ffn_down_exps")
    return rows, next(iter(shapes.values()))[1], neurons


def gram_of_candidates(run: CalibrationRun, module: Any, x: F32, candidates: NDArray[np.int64]) -> F32:
    """Upper triangle of the Gram matrix of each token's candidate outputs [N, K(K+1)/2]."""
    rows, cols = np.triu_indices(candidates.shape[1])

    def block(index: NDArray[np.int64]) -> F32:
        outputs = run.stream.candidate_outputs(module, x[index], candidates[index])
        result: F32 = (outputs @ outputs.transpose(1, 2)).cpu().numpy()[:, rows, cols]
        return result

    with torch.inference_mode():
        blocks = [np.arange(i, min(i + 128, len(x))) for i in range(0, len(x), 128)]
        return np.concatenate(list(map_ordered(block, blocks, device=run.stream.device)))


def save_outer_sums(run: CalibrationRun, main: States) -> None:
    """Save token counts, statistics of the output matrix's inputs, and the sensitivity of the replay tokens' last states."""
    model, windows = run.model, run.windows
    domains = len(run.weights)
    counts, squares = np.zeros((domains, model.vocab_size), np.int64), np.zeros((domains, model.hidden_size))
    # Only experts that are priced one by one need the tokens' sensitivity, and a GGUF stacks them.
    head = None if model.architecture else run.stream.head()
    fisher = []
    for index in windows.chunks():
        real = windows.take(index).real
        last = main.read(index)
        states = run.stream.normed(last).double().cpu().numpy()
        for row, i in enumerate(index):
            np.add.at(counts[windows.domain[i]], windows.tokens[i][real[row]], 1)
            squares[windows.domain[i]] += (states[row][real[row]] ** 2).sum(axis=0)
        if head is not None:
            window, position = run.replay[np.isin(run.replay[:, 0], index)].T
            fisher.append(fisher_of_states(last[window - index[0], position], *head).cpu().numpy())
    arrays = {"token_count": counts, "output_in_sq": squares}
    save_arrays(run.work / array_file(-1), arrays | ({"replay_fisher": np.concatenate(fisher)} if fisher else {}))


def fisher_of_states(states: torch.Tensor, norm: torch.Tensor, output: torch.Tensor, eps: float) -> torch.Tensor:
    """Sensitivity s [n] to a change of each token's last state [n, H]: KL = 1/2 s |change|^2, as a mean over directions.

    Let p be the token's prediction, w the norm's weights, h_v rows of the output matrix and r the state's root mean square.  The Fisher
    matrix is J' cov_p(h) J with J = diag(w) / r; the norm's own projection is left out, which is one direction of H.  The trace over H
    needs no matrix: tr cov_p(w h) = sum_v p_v |w h_v|^2 - |sum_v p_v w h_v|^2.
    """
    states, weight = states.to(output.device), norm.to(output.device)
    squares = torch.cat([(rows * weight).square().sum(dim=1) for rows in output.split(4096)])  # in parts: as large as the matrix itself
    found = []
    for part in states.split(512):
        p = (apply_norm(part, norm, eps) @ output.T).softmax(-1)
        spread = p @ squares - ((p @ output) * weight).square().sum(dim=1)
        found.append(spread.clamp(min=0) / part.square().sum(dim=1).clamp(min=1e-30))
    return torch.cat(found) if found else torch.zeros(0)
