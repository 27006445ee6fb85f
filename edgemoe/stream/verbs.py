"""This module says what calibration asks of whatever computes a model's layers: transformers' modules, or llama.cpp."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray

from edgemoe.base.types import F32


class Stream(Protocol):
    """A model of which one layer is loaded at a time; a loaded layer is whatever `load_layer` gives."""

    device: torch.device
    width: int  # of the states between layers

    @property
    def name(self) -> str:
        """What computes the layers."""

    def embedding(self) -> F32:
        """The embedding [vocab, hidden]."""

    def embed(self, tokens: NDArray[np.int64], table: F32 | None = None) -> torch.Tensor:
        """First states [windows, length, hidden], from the model's embedding or another table."""

    def load_layer(self, layer: int) -> Any:
        """The layer, loaded."""

    def unload_layer(self, layer: int) -> None:
        """Give the layer's memory back."""

    def run_layer(self, module: Any, states: torch.Tensor) -> torch.Tensor:
        """Output states [windows, length, hidden] of a loaded layer; the recorder of this thread sees it."""

    def values(self, module: Any, role: str) -> F32:
        """The weights of a role in a loaded layer."""

    def rounded(self, module: Any, bits: Mapping[str, int]) -> AbstractContextManager[Any]:
        """Let the weights of these roles be rounded to so many bits while the context lasts."""

    def only(self, module: Any, kept: NDArray[np.int64]) -> AbstractContextManager[Any]:
        """Let the router choose among these experts alone while the context lasts."""

    def candidate_outputs(self, module: Any, x: F32, chosen: NDArray[np.int64]) -> torch.Tensor:
        """Outputs [n, K, hidden] of chosen experts [n, K] for inputs [n, hidden]."""

    def output(self) -> torch.Tensor:
        """The output matrix [vocab, hidden]."""

    def normed(self, states: torch.Tensor) -> torch.Tensor:
        """What the output matrix reads [windows, length, hidden], from the states after the last layer."""

    def logits(self, states: torch.Tensor, output: torch.Tensor | None = None) -> torch.Tensor:
        """Logits [windows, length, vocab] from the states after the last layer, with the model's output matrix or another."""

    def head(self) -> tuple[torch.Tensor, torch.Tensor, float]:
        """Weights of the last norm [hidden] and of the output matrix [vocab, hidden], and the norm's epsilon."""

    def close(self) -> None:
        """Give the memory back."""
