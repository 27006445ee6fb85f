"""This module computes the loss's gradients in every layer by one streamed pass forward and one backward, with one layer in memory.

The loss is the cross-entropy of tokens drawn from the model itself.  The mean of the gradients' outer products is then the Fisher matrix,
so a change that moves an output by d costs 1/2 (gradient d)^2 nats of KL.  Every layer adds to the residual stream, so the gradient for an
expert's output is the layer's gradient times the gate: one gradient per token and layer serves all experts.
The results stay on disk for rounding (repair/quantize_layer.py, which weighs errors of a matrix's rows together) and narrowing
(repair/width.py).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from edgemoe.base.files import write_text
from edgemoe.base.progress import Progress
from edgemoe.base.storage import array_file, check_arrays, load_arrays, save_arrays
from edgemoe.base.types import F64
from edgemoe.base.work import Steps, key_of, open_or_make, path_of
from edgemoe.ir import Model
from edgemoe.stream.adapter import weights_of
from edgemoe.stream.layers import LayerStream, Recorder, apply_norm, recording
from edgemoe.stream.passes import map_ordered
from edgemoe.stream.states import States
from edgemoe.stream.texts import Text, text_weights, texts_key
from edgemoe.stream.windows import WINDOW, Windows, tokenize

Arrays = dict[str, NDArray[Any]]


def collect_gradients(model: Model, texts: Sequence[Text], work: Path, *, max_tokens: int, progress: Progress | None = None) -> Path:
    """Watch the original model forward and backward; all plans and widths share the result.

    Args:
        model: the original.
        texts: calibration texts with weights.
        work: folder for the result and for the state of a killed run.
        max_tokens: of all texts together; every text gives the same number.
        progress: called with (steps done, all steps).

    Returns:
        A folder with, for each layer, the gradients for its output (`open_gradients`) and arrays (`load_gradients`): "heapr" [E, M] (nats
        per token), and for every planned matrix outside the routed experts sum lambda g g' [R, R] of the gradients for its output.
    """
    key = key_of("gradients", model.fingerprint, texts_key(texts), WINDOW, max_tokens)
    folder = path_of(work.absolute(), "gradients", key)

    def make() -> Path:
        folder.mkdir(parents=True, exist_ok=True)
        _Pass(model, tokenize(model, texts, max_tokens, WINDOW), text_weights(texts), folder, key).run(progress)
        write_text(folder / "done", "")
        return folder

    def read() -> Path | None:
        if not (folder / "done").exists():
            return None
        for layer in range(model.n_layers):
            check_arrays(folder / array_file(layer))
        windows = tokenize(model, texts, max_tokens, WINDOW)
        for layer in range(-1, model.n_layers):
            with open_gradients(folder, layer, windows, model.hidden_size) as kept:
                kept.check()
        return folder

    return open_or_make(folder, read, make)


def load_gradients(folder: Path, layer: int) -> Arrays:
    """The arrays of one layer that `collect_gradients` left."""
    return load_arrays(folder / array_file(layer))


def open_gradients(folder: Path, layer: int, windows: Windows, hidden: int) -> States:
    """Gradients [windows, length, hidden] of the loss with respect to the output of a layer; layer -1 is the embedding.

    Args:
        folder: that `collect_gradients` left.
        layer: its number.
        windows: those that the gradients were collected on.
        hidden: size.
    """
    return States(folder / f"gradient-{layer + 1}.bin", (*windows.tokens.shape, hidden), half=True)


class _Pass:
    """One forward and one backward pass under way; step s is a layer forward (s < L) or backward."""

    def __init__(self, model: Model, windows: Windows, weights: F64, work: Path, key: str) -> None:
        self.model, self.windows, self.work, self.steps = model, windows, work, Steps(work, key)
        self.stream = LayerStream(model)
        shared = windows.token_weights(weights)[:, None] * windows.real
        self.weights = torch.from_numpy(shared.astype(np.float32))  # lambda [windows, length]

    def states(self, layer: int) -> States:
        """The states before a layer."""
        return States(self.work / f"state-{layer}.bin", (*self.windows.tokens.shape, self.model.hidden_size))

    def gradients(self, layer: int) -> States:
        """Gradients with respect to the output of a layer."""
        return open_gradients(self.work, layer, self.windows, self.model.hidden_size)

    def run(self, progress: Progress | None) -> None:
        """All steps that are still to do."""
        n, first = self.model.n_layers, int(self.steps.read()["done"])
        if first == 0:
            states = self.states(0)
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
            self.steps.note(step + 1)
            if step >= n:
                (self.work / f"state-{layer}.bin").unlink(missing_ok=True)
        (self.work / f"state-{n}.bin").unlink(missing_ok=True)

    def _each(self, work: Callable[[NDArray[np.int64]], Any]) -> list[Any]:
        return list(map_ordered(work, self.windows.chunks(), device=self.stream.device))

    def _forward(self, layer: int) -> None:
        module, before, after = self.stream.load_layer(layer), self.states(layer), self.states(layer + 1)
        self._each(lambda index: after.write(index, self.stream.run_layer(module, before.read(index))))
        self.stream.unload_layer(layer)
        before.close()
        after.close()

    def _start_backward(self) -> None:
        """Gradient of the cross-entropy of drawn tokens with respect to the last states."""
        norm, output, eps = self.stream.head()
        states, gradients = self.states(self.model.n_layers), self.gradients(self.model.n_layers - 1)

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
        """Compute the sums over a layer's neurons and matrix outputs, and the gradient with respect to the layer's input."""
        module, states = self.stream.load_layer(layer), self.states(layer)
        after, before = self.gradients(layer), self.gradients(layer - 1)
        down = weights_of(module, "ffn_down_exps") if layer in self.model.moe_layers else None

        def chunk(index: NDArray[np.int64]) -> Arrays:
            given, weights = after.read(index).to(self.stream.device), self.weights[index].flatten().to(self.stream.device)
            neurons = None if down is None else _NeuronSums(given, weights, down)
            sums = neurons.sums if neurons else {}
            received = states.read(index).to(self.stream.device).requires_grad_()
            with recording(Recorder(on_expert=neurons.note if neurons else None, outputs={})) as seen:
                out = self.stream.run_layer(module, received, gradients=True)
            assert seen.outputs is not None
            first, *others = torch.autograd.grad(out, [received, *seen.outputs.values()], given)
            before.write(index, first)
            for role, gradient in zip(seen.outputs, others, strict=True):
                g = gradient.flatten(0, -2).float()
                sums[role] = (g * weights[:, None]).T @ g
            return {name: value.cpu().numpy() for name, value in sums.items()}

        arrays: Arrays = {}
        for part in self._each(chunk):
            for name, value in part.items():
                arrays[name] = arrays[name] + value if name in arrays else value.astype(np.float64)
        save_arrays(self.work / array_file(layer), arrays)
        self.stream.unload_layer(layer)
        for file in (states, after, before):
            file.close()


class _NeuronSums:
    """Sums [E, M] over the neurons of a chunk's experts, filled while the layer runs."""

    def __init__(self, given: torch.Tensor, weights: torch.Tensor, down: torch.Tensor) -> None:
        self.gradient, self.weights, self.down = given.flatten(0, 1), weights, down
        self.sums = {"heapr": torch.zeros(down.shape[0], down.shape[2], device=down.device)}

    def note(self, expert: int, token: torch.Tensor, _: Any, h: torch.Tensor, __: Any, gate: torch.Tensor) -> None:
        """Add one expert's part for some tokens."""
        h, g, lam = h.detach().float(), gate.detach()[:, None], self.weights[token]
        self.sums["heapr"][expert] = heapr_sums(h, self.gradient[token] * g, self.down[expert], lam)


def heapr_sums(h: torch.Tensor, gamma: torch.Tensor, down: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """1/2 sum_t lambda_t (h_tj <gamma_t, w_j>)^2 of each neuron [M].

    Args:
        h: hidden activations [n, M] of the tokens routed to the expert.
        gamma: gradient of the loss with respect to the expert's output [n, H], gate included.
        down: W_down [H, M].
        weights: lambda [n].
    """
    return 0.5 * (weights @ (h * (gamma @ down)).square())
