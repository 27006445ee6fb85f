"""This module sums R'R over the routers after a layer, which weighs errors of its output by the routing choices that they flip."""

from __future__ import annotations

import numpy as np

from edgemoe.base.types import F64
from edgemoe.ir import Model
from edgemoe.model.checkpoint import read_tensor


class RouterGram:
    """R'R of the routers after a change in the stream, with R a router's rows less their mean, times its norm's weights.

    A token changes its expert where two logits trade places, so an error e of the stream matters to a router by |R e|^2.  Each R'R is
    scaled to a trace of one over the number of routers (docs/pricing.md, 5).  A new sum for each of L layers would take L^2 / 2 products.
    We sum over all layers once and subtract each layer when it is passed, which takes 2 L products.  Layers are subtracted in their order,
    so a build that was killed and resumed computes with the same bits.
    """

    def __init__(self, model: Model) -> None:
        self.model = model
        self._after: list[int] = []
        self._total: F64 | None = None
        self._first = 0

    def from_layer(self, first: int) -> F64:
        """The sum over the routers from layer `first` on [H, H]; valid until the next call.  Callers ask for layers in their order."""
        if self._total is None or first < self._first:
            self._after, self._total = list(self.model.moe_layers), np.zeros((self.model.hidden_size,) * 2)
            for layer in self._after:
                self._total += self._of(layer)
        self._first = first
        while self._after and self._after[0] < first:
            self._total -= self._of(self._after.pop(0))
        if not self._after:
            self._total[:] = 0  # exactly zero, without the rounding errors of the subtractions
        return self._total

    def _of(self, layer: int) -> F64:
        rows = read_tensor(self.model.folder, self.model.get("ffn_gate_inp", layer))
        moved = (rows - rows.mean(axis=0)) * read_tensor(self.model.folder, self.model.norm_of(layer, "ffn_norm"))
        gram: F64 = (moved.T @ moved).astype(np.float64)
        gram /= max(float(np.square(moved).sum()), 1e-30) * len(self.model.moe_layers)
        return gram


def add_flips(gram: F64, routers: F64, flip_weight: float) -> F64:
    """G [H, H] of the stream's gradients, plus the flips that they do not see: `flip_weight` times G's trace, times the routers' sum."""
    total: F64 = gram + flip_weight * np.trace(gram) * routers
    return total
