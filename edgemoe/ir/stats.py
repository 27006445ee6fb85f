"""This module defines the Stats record, which holds calibration's statistics of a model."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgemoe.base.storage import array_file, load_arrays
from edgemoe.base.types import F64


@dataclass(frozen=True, slots=True, kw_only=True)
class Probe:
    """One perturbed copy of the stream: its change, and the KL that the change caused, by domain (nats per token)."""

    kind: str  # round (one tensor at `bits`), drop (keep `kept` in `layer`), all (every matrix at `bits`)
    role: str = ""
    layer: int = -1
    bits: int = 0
    kept: tuple[int, ...] = ()
    kl: tuple[float, ...] = ()  # [domains]


@dataclass(frozen=True, slots=True, kw_only=True)
class Domain:
    """One calibration text, its weight in every mean, and the number of its tokens that were used."""

    name: str
    weight: float
    tokens: int
    sha256: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Stats:
    """Statistics of a calibration; arrays lie in `folder`, one file per layer, and are read when a caller asks for them.

    Arrays of a layer (D domains, E experts, H hidden, M expert size, N replay tokens, K candidates; sums run over tokens):
        count [D, E]; gate, gate_sq, norm, norm_sq, gate_norm, energy, residual [D, E] (sums of g, g^2, |f|, |f|^2, g|f|, g^2|f|^2 and
        g|f|(1 - cos) over routed tokens, cos between the stream before and after the experts); in_sq.NAME [D, cols] (sums of x^2 of the
        inputs of other matrices than experts', by the activation's name); expert_in_sq [E, H], expert_mid_sq [E, M] (sums of g^2 x^2 over
        routed tokens, domains weighted: the importance matrix); expert_out [E, H] (sums of f, domains weighted so);
        replay_x [N, H] (the MoE block's inputs), replay_logits [N, E], replay_domain [N], replay_stream [N] (|s|^2 of the residual stream
        after the layer), candidates [N, K], gram [N, K(K+1)/2]; largest [1] (the largest magnitude of an activation).
    Arrays of layer -1: token_count [D, V], output_in_sq [D, H], replay_fisher [N] (observer.py: sensitivity to a change of the last state).
    """

    folder: str
    model: str  # fingerprint
    key: str  # SHA-256 of the model, the texts and the settings
    settings: dict[str, Any]
    domains: tuple[Domain, ...]
    probes: tuple[Probe, ...]
    cold: tuple[tuple[int, int], ...]  # (layer, expert) with too few tokens to be judged alone

    def arrays(self, layer: int) -> dict[str, NDArray[Any]]:
        """The arrays of one layer; -1 for those outside the layers."""
        return load_arrays(Path(self.folder) / array_file(layer))

    @property
    def weights(self) -> F64:
        """Weight of each domain [D], summing to 1."""
        weights = np.array([d.weight for d in self.domains], dtype=np.float64)
        result: F64 = weights / weights.sum()
        return result
