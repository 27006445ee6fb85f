"""This module maps functions over all windows in a fixed order, and computes a model's last states and KL."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray

from edgemoe.base.errors import ModelError
from edgemoe.base.threads import count_cores
from edgemoe.base.types import F32
from edgemoe.ir import Model
from edgemoe.stream.adapter import only_experts
from edgemoe.stream.layers import LayerStream, apply_norm
from edgemoe.stream.states import States
from edgemoe.stream.windows import Windows

T = TypeVar("T")


def map_ordered(function: Callable[[T], Any], items: Sequence[T], *, device: torch.device) -> Iterator[Any]:
    """`map` over threads with one-thread arithmetic, results in order: the same numbers on any number of cores."""
    workers = count_cores() if device.type == "cpu" else 1
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with ThreadPoolExecutor(workers) as pool:
            pending: list[Any] = []
            for item in items:
                pending.append(pool.submit(function, item))
                if len(pending) > 2 * workers:
                    yield pending.pop(0).result()
            for future in pending:
                yield future.result()
    finally:
        torch.set_num_threads(before)


def final_states(
    model: Model,
    windows: Windows,
    work: Path,
    kept: Sequence[Sequence[int]] | None = None,
) -> F32:
    """Normed last hidden states of the model [windows, length, hidden], one layer at a time; with `kept`, only these experts run."""
    kept_of = {} if kept is None else dict(zip(model.moe_layers, kept, strict=True))
    stream = LayerStream(model)
    states = States(work / "states.bin", (*windows.tokens.shape, model.hidden_size))
    chunks = windows.chunks()
    try:
        for index in chunks:
            states.write(index, stream.embed(windows.tokens[index]))
        for layer in range(model.n_layers):
            module = stream.load_layer(layer)

            def run(index: NDArray[np.int64], module: Any = module) -> None:
                states.write(index, stream.run_layer(module, states.read(index)))

            with nullcontext() if layer not in kept_of else only_experts(module, np.array(kept_of[layer])):
                for _ in map_ordered(run, chunks, device=stream.device):
                    pass
            stream.unload_layer(layer)
        norm, _, eps = stream.head()
        rows = [apply_norm(states.read(index), norm, eps).cpu().numpy() for index in chunks]
    finally:
        states.close(delete=True)
    result: F32 = np.concatenate(rows)
    if not np.isfinite(result).all():
        raise ModelError(f"{model.folder}: the original model gives NaN or infinite states on the held-out text")
    return result


def token_kl(reference: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
    """KL(reference || softmax(logits)) of each token, nats."""
    return kl_of_log_probs(reference, logits.double().log_softmax(-1))


def kl_of_log_probs(p: torch.Tensor, q: torch.Tensor) -> torch.Tensor:
    """KL(p || q) of distributions given by their logarithms [.., V], nats."""
    return (p.exp() * (p - q)).sum(-1)
