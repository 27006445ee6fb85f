"""This module runs the original and a changed model side by side over the calibration texts: states, sums over both, and the KL."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from functools import reduce
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from edgemoe.base.types import F32, F64
from edgemoe.base.work import Steps
from edgemoe.ir import Model
from edgemoe.repair.align import PairSums, sum_pairs
from edgemoe.repair.quantize_layer import QuantizePlan
from edgemoe.repair.router_gram import RouterGram
from edgemoe.stream.gradients import open_gradients
from edgemoe.stream.layers import apply_norm
from edgemoe.stream.open import open_stream
from edgemoe.stream.passes import map_ordered, token_kl
from edgemoe.stream.states import States
from edgemoe.stream.texts import Text, text_weights
from edgemoe.stream.windows import WINDOW, tokenize

GUARD_EVERY = 7  # one window in so many is a guard, which decides whether a refit helps; refits use the others
DOMAIN_POWER = 0.5  # domains count by (weight / tokens) / residual^0.5, which lies between equal tokens and equal relative errors
Pair = tuple[torch.Tensor, torch.Tensor]  # inputs of matrices, and their wanted outputs


class TwoStreams:
    """The original and a changed model, side by side over the calibration texts."""

    def __init__(
        self,
        model: Model,
        start: Model,
        texts: Sequence[Text],
        max_tokens: int,
        work: Path,
        key: str,
        quantize_plan: QuantizePlan | None = None,
    ) -> None:
        """Open both models and the texts.

        Args:
            model: the original.
            start: the changed model as it starts.
            texts: calibration texts.
            max_tokens: of them together.
            work: folder for the results.
            key: of the results.
            quantize_plan: if given, every matrix is rounded when the stream reaches it; else weights stay unrounded.
        """
        self.model, self.work, self.steps, self.quantize_plan = model, work, Steps(work, key), quantize_plan
        self.original: Any = open_stream(model)
        self.changed: Any = self.original if start is model else open_stream(start)
        self.windows = windows = tokenize(model, texts, max_tokens, WINDOW)
        self.weights, self.routers = text_weights(texts), RouterGram(start)
        work.mkdir(parents=True, exist_ok=True)
        self.real = windows.real
        self.first = np.concatenate([[0], np.cumsum(windows.lengths)])  # row of each window's first token
        number = np.array([np.sum(windows.domain[:i] == d) for i, d in enumerate(windows.domain)])  # of each window in its domain
        self.guard_windows = number % GUARD_EVERY == GUARD_EVERY // 2
        self.guard = np.repeat(self.guard_windows, windows.lengths)
        self.each = np.repeat(windows.token_weights(self.weights), windows.lengths).astype(np.float32)  # weight of every token

    def states(self, name: str, layer: int) -> States:
        """Hidden states before a layer: "original" or "changed"."""
        return States(self.work / f"{name}-{layer}.bin", (*self.windows.tokens.shape, self.original.width))

    def rows(self, index: NDArray[np.int64]) -> slice:
        """Token rows of a chunk of windows."""
        return slice(int(self.first[index[0]]), int(self.first[index[-1] + 1]))

    def array(self, name: str, width: int) -> F32:
        """Scratch [tokens, width] in a file whose bytes are taken first: a full disk would kill a process that writes to the map."""
        path, shape = self.work / f"{name}.bin", (int(self.first[-1]), width)
        with path.open("w+b") as file:
            if hasattr(os, "posix_fallocate"):
                os.posix_fallocate(file.fileno(), 0, max(4 * shape[0] * shape[1], 1))
            else:
                file.truncate(4 * shape[0] * shape[1])
        return np.memmap(path, np.float32, "r+", shape=shape)

    def read_gradients(self, layer: int) -> F32 | None:
        """Gradients of the loss with respect to a layer's output, times the root of the token's weight [tokens, H]."""
        if not self.quantize_plan:
            return None
        rows = self.array("gradients", self.model.hidden_size)
        with open_gradients(self.quantize_plan.gradients, layer, self.windows, self.model.hidden_size) as kept:
            for index in self.windows.chunks():
                real, at = torch.from_numpy(self.real[index].ravel()), self.rows(index)
                rows[at] = kept.read(index).flatten(0, 1)[real].numpy() * np.sqrt(self.each[at])[:, None]
        return rows

    def weigh_tokens(self, error: F64) -> F32:
        """Weight of every token, mean one, from the summed squared residual of each domain [D]."""
        n = self.windows.count_tokens(len(error))
        each = self.weights / n / np.maximum(error / n, 1e-30) ** DOMAIN_POWER
        tokens = np.repeat(each[self.windows.domain], self.windows.lengths)
        weights: F32 = (tokens / tokens.mean()).astype(np.float32)
        return weights

    def sums(
        self,
        changed: States,
        original: States,
        pair: Callable[[torch.Tensor, torch.Tensor], Pair],
        factors: F32 | None = None,
    ) -> tuple[PairSums, PairSums]:
        """Sums of a matrix's inputs and wanted outputs, which `pair` makes from both streams' states, over fitted and over guard tokens.

        `factors` [tokens], if given, multiply the tokens' weights.
        """
        each = self.each if factors is None else self.each * factors

        def chunk(index: NDArray[np.int64]) -> tuple[PairSums, PairSums]:
            rows, real = self.rows(index), torch.from_numpy(self.real[index].ravel())
            x, y = (side.flatten(0, 1).cpu()[real] for side in pair(changed.read(index), original.read(index)))
            weights, guard = torch.from_numpy(each[rows]), torch.from_numpy(self.guard[rows])
            return sum_pairs(x, y, weights * ~guard), sum_pairs(x, y, weights * guard)

        parts: Iterator[tuple[PairSums, PairSums]] = map_ordered(chunk, self.windows.chunks(), device=self.changed.device)
        return reduce(lambda a, b: (a[0] + b[0], a[1] + b[1]), parts)  # added as they come, because each part is as large as the matrix

    def leave(self, layer: int, following: States, residual: F32) -> None:
        """Write the changed stream after the repaired layer, which is the original's less the residual."""
        changed = self.states("changed", layer + 1)
        for index in self.windows.chunks():
            out = following.read(index)
            out[torch.from_numpy(self.real[index])] -= torch.from_numpy(np.asarray(residual[self.rows(index)]))
            changed.write(index, out)
        changed.close()

    def measure(self) -> tuple[float, ...]:
        """KL(original || changed) in nats per token, by domain, after the last layer, on the guard windows.

        A text that is too short to have guard windows is measured on all of its windows.
        """
        norm, output, eps = self.original.head()
        original, changed = (self.states(name, self.model.n_layers) for name in ("original", "changed"))
        domains = self.windows.domain
        fresh = np.array([self.guard_windows[i] or not self.guard_windows[domains == d].any() for i, d in enumerate(domains)])

        def one(window: int) -> float:
            index, n = np.array([window]), int(self.windows.lengths[window])
            before, after = (apply_norm(s.read(index)[0, :n], norm, eps) @ output.T for s in (original, changed))
            return float(token_kl(before.double().log_softmax(-1), after).sum())

        chosen = np.flatnonzero(fresh)
        sums = np.array(list(map_ordered(one, chosen.tolist(), device=self.original.device)))
        original.close()
        changed.close()
        n = len(self.weights)
        kl = np.bincount(domains[chosen], sums, n) / np.bincount(domains[chosen], self.windows.lengths[chosen], n)
        return tuple(float(v) for v in kl)
