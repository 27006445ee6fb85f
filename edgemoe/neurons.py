"""Model, texts -> what every neuron of every expert is worth: one streamed pass forward, one backward.

A neuron of an expert is a row of W_gate, a row of W_up and a column w_j of W_down: f = sum_j h_j w_j.  With gamma_t the gradient of the
loss with respect to the expert's output, deleting neuron j costs to second order (HEAPr, arXiv 2509.22299, without its mean over gamma
gamma')

    s_j = 1/2 sum_t lambda_t (h_tj <gamma_t, w_j>)^2

The loss is the cross-entropy of tokens drawn from the model itself, so that s_j is an unbiased estimate of the KL that the deletion causes,
in nats per token.  Every layer adds to the residual stream, so gamma_t is the gate times the gradient with respect to the layer's output:
the backward pass needs one gradient per token and layer, and no matrix of hidden size squared for an expert.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from edgemoe import __version__
from edgemoe.ir import Model
from edgemoe.storage import alone, array_file, hash_json, load_arrays, save_arrays, write_text
from edgemoe.stream import LayerStream, Recorder, States, Windows, apply_norm, map_ordered, recording, tokenize
from edgemoe.texts import Text

WINDOW = 512
TOKENS = 16_384  # of all texts together
CAMERA_MAX = 0.9  # share of the largest token in CAMERA's energy: its published script (xuyuzhuang11/CAMERA)
Progress = Callable[[int, int], None]
Arrays = dict[str, NDArray[Any]]


# ---------------------------------------------------------------------------------------------------------------- formulas
def heapr_sums(h: torch.Tensor, gamma: torch.Tensor, down: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """1/2 sum_t lambda_t (h_tj <gamma_t, w_j>)^2 of each neuron [M].

    Args:
        h: hidden activations [n, M] of the tokens routed to the expert.
        gamma: gradient of the loss with respect to the expert's output [n, H], gate included.
        down: W_down [H, M].
        weights: lambda [n].
    """
    return 0.5 * (weights @ (h * (gamma @ down)).square())


def camera_energy(phi_sq: NDArray[Any], phi_sq_max: NDArray[Any], down_sq: NDArray[Any], share: float = CAMERA_MAX) -> NDArray[np.float64]:
    """|w_j|^2 ((1 - a) sum_t (g_t h_tj)^2 + a max_t (g_t h_tj)^2) of each neuron: CAMERA, arXiv 2508.02322.

    Args:
        phi_sq: sum of (g_t h_tj)^2 over the routed tokens.
        phi_sq_max: the largest of them.
        down_sq: |w_j|^2.
        share: a; 0 is HEAPr's score with the identity in place of the gradients.
    """
    energy: NDArray[np.float64] = down_sq * ((1 - share) * phi_sq + share * phi_sq_max)
    return energy


# ---------------------------------------------------------------------------------------------------------------- the pass
class _Pass:
    """One forward and one backward pass under way; step s is a layer forward (s < L) or backward."""

    def __init__(self, model: Model, windows: Windows, weights: NDArray[np.float64], work: Path, key: str) -> None:
        self.model, self.windows, self.work, self.key = model, windows, work, key
        self.stream = LayerStream(model)
        share = weights / np.bincount(windows.domain, windows.lengths, len(weights))
        real = np.arange(windows.tokens.shape[1])[None] < windows.lengths[:, None]
        self.weights = torch.from_numpy((share[windows.domain][:, None] * real).astype(np.float32))  # lambda [windows, length]

    def file(self, name: str, layer: int) -> States:
        """States before a layer, or gradients of the loss with respect to them."""
        return States(self.work / f"{name}-{layer}.bin", (*self.windows.tokens.shape, self.model.hidden_size))

    def run(self, progress: Progress | None) -> None:
        """All steps that are still to do."""
        path, n = self.work / "progress.json", self.model.n_layers
        saved = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
        first = int(saved["step"]) if saved.get("key") == self.key else 0
        if first == 0:
            states = self.file("state", 0)
            for index in self.windows.chunks():
                states.write(index, self.stream.embed(self.windows.tokens[index]))
            states.close()
        for step in range(first, 2 * n):
            if progress:
                progress(step, 2 * n)
            layer = step if step < n else 2 * n - 1 - step
            if step < n:
                self._forward(layer)
            else:
                self._backward(layer)
            if step == n - 1:
                self._start_backward()
            write_text(path, json.dumps({"key": self.key, "step": step + 1}))
            if step >= n:
                for old in (f"state-{layer}.bin", f"gradient-{layer + 1}.bin"):
                    (self.work / old).unlink(missing_ok=True)
        for scratch in self.work.glob("*.bin"):
            scratch.unlink()

    def _each(self, work: Callable[[NDArray[np.int64]], Any]) -> list[Any]:
        return list(map_ordered(work, self.windows.chunks(), device=self.stream.device))

    def _forward(self, layer: int) -> None:
        module, before, after = self.stream.load_layer(layer), self.file("state", layer), self.file("state", layer + 1)
        self._each(lambda index: after.write(index, self.stream.run_layer(module, before.read(index))))
        self.stream.unload_layer(layer)
        before.close()
        after.close()

    def _start_backward(self) -> None:
        """Gradient of the cross-entropy of drawn tokens with respect to the last states."""
        norm, output, eps = self.stream.head()
        states, gradients = self.file("state", self.model.n_layers), self.file("gradient", self.model.n_layers)

        def head(index: NDArray[np.int64]) -> None:
            with torch.enable_grad():
                last = states.read(index).to(self.stream.device).requires_grad_()
                logits = (apply_norm(last, norm, eps) @ output.T).float().flatten(0, 1)
                draw = torch.Generator().manual_seed(int(index[0]))
                tokens = torch.multinomial(logits.detach().cpu().softmax(-1), 1, generator=draw)[:, 0].to(logits.device)
                real = (self.weights[index] > 0).flatten().to(logits.device)
                loss = torch.nn.functional.cross_entropy(logits[real], tokens[real], reduction="sum")
                gradients.write(index, torch.autograd.grad(loss, last)[0])

        self._each(head)
        states.close()
        gradients.close()

    def _backward(self, layer: int) -> None:
        """Scores of a layer's neurons, and the gradient with respect to what the layer received."""
        module, states = self.stream.load_layer(layer), self.file("state", layer)
        after, before = self.file("gradient", layer + 1), self.file("gradient", layer)
        down = module.mlp.experts.down_proj.data

        def chunk(index: NDArray[np.int64]) -> Arrays:
            given = after.read(index).to(self.stream.device)
            sums = self._sums(given, self.weights[index].to(self.stream.device), down)
            received = states.read(index).to(self.stream.device).requires_grad_()
            with recording(Recorder(on_expert=sums.pop("note"))):
                out = self.stream.run_layer(module, received, gradients=True)
            before.write(index, torch.autograd.grad(out, received, given)[0])
            return {name: value.cpu().numpy() for name, value in sums.items()}

        parts = self._each(chunk)
        arrays: Arrays = {name: np.sum([p[name].astype(np.float64) for p in parts], axis=0) for name in ("heapr", "phi_sq")}
        arrays |= {"phi_sq_max": np.max([p["phi_sq_max"] for p in parts], axis=0).astype(np.float64)}
        arrays |= {"down_sq": down.double().square().sum(dim=1).cpu().numpy()}
        save_arrays(self.work / array_file(layer), arrays)
        self.stream.unload_layer(layer)
        for file in (states, after, before):
            file.close()

    def _sums(self, given: torch.Tensor, weights: torch.Tensor, down: torch.Tensor) -> dict[str, Any]:
        """Sums [E, M] of one chunk, and the function that fills them while the layer runs."""
        gradient, each = given.flatten(0, 1), weights.flatten()
        shape = down.shape[0], down.shape[2]
        sums: dict[str, Any] = {name: torch.zeros(shape, device=down.device) for name in ("heapr", "phi_sq", "phi_sq_max")}

        def note(expert: int, token: torch.Tensor, _: Any, h: torch.Tensor, __: Any, gate: torch.Tensor) -> None:
            h, g, lam = h.detach().float(), gate.detach()[:, None], each[token]
            sums["heapr"][expert] = heapr_sums(h, gradient[token] * g, down[expert], lam)
            phi_sq = (g * h).square() * lam[:, None]
            sums["phi_sq"][expert], sums["phi_sq_max"][expert] = phi_sq.sum(dim=0), phi_sq.amax(dim=0)

        return {**sums, "note": note}


def score_neurons(model: Model, texts: Sequence[Text], work: Path, *, max_tokens: int = TOKENS, progress: Progress | None = None) -> Path:
    """Watch the original model forward and backward; all widths share the result.

    Args:
        model: the original.
        texts: calibration texts with weights.
        work: folder for the result and for what a killed run goes on from.
        max_tokens: of all texts together; every text gives the same number.
        progress: called with (steps done, all steps).

    Returns:
        A folder with a file of arrays [E, M] for each layer: heapr (nats per token), phi_sq and phi_sq_max (sum and largest of
        lambda (g h)^2), down_sq (|w_j|^2).
    """
    stream_key = hash_json(model.fingerprint, [(t.name, t.weight, t.sha256) for t in texts], __version__, WINDOW, max_tokens)
    work = work.absolute() / f"neurons-{stream_key[:16]}"
    with alone(work):
        if (work / "done").exists():
            return work
        work.mkdir(parents=True, exist_ok=True)
        weights = np.array([t.weight for t in texts]) / sum(t.weight for t in texts)
        _Pass(model, tokenize(model, texts, max_tokens, WINDOW), weights, work, stream_key).run(progress)
        write_text(work / "done", "")
    return work


def load_scores(folder: Path, layer: int) -> Arrays:
    """The arrays of one layer that `score_neurons` left."""
    return load_arrays(folder / array_file(layer))
