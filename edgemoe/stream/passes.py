"""This module maps functions over all windows in a fixed order, and computes a model's last states and KL."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray

from edgemoe.base.errors import ModelError
from edgemoe.base.threads import count_cores
from edgemoe.base.types import F32
from edgemoe.ir import Model
from edgemoe.model.checkpoint import read_tensor
from edgemoe.stream.open import open_stream
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
    """What `open_head` turns into logits [windows, length, hidden], computed one layer at a time; with `kept`, only these experts run.

    These are the normed last states; of a GGUF, whose head may have more than a norm and a matrix, the states after the last layer.
    """
    kept_of = {} if kept is None else dict(zip(model.moe_layers, kept, strict=True))
    stream = open_stream(model)
    states = States(work / "states.bin", (*windows.tokens.shape, stream.width))
    chunks = windows.chunks()
    try:
        for index in chunks:
            states.write(index, stream.embed(windows.tokens[index]))
        for layer in range(model.n_layers):
            module = stream.load_layer(layer)

            def run(index: NDArray[np.int64], module: Any = module) -> None:
                states.write(index, stream.run_layer(module, states.read(index)))

            with nullcontext() if layer not in kept_of else stream.only(module, np.array(kept_of[layer])):
                for _ in map_ordered(run, chunks, device=stream.device):
                    pass
            stream.unload_layer(layer)
        read = [states.read(index) for index in chunks] if model.architecture else [stream.normed(states.read(index)) for index in chunks]
        rows = [part.cpu().numpy() for part in read]
    finally:
        states.close(delete=True)
        stream.close()
    result: F32 = np.concatenate(rows)
    if not np.isfinite(result).all():
        raise ModelError(f"{model.folder}: the original model gives NaN or infinite states on the held-out text")
    return result


@contextmanager
def open_head(model: Model) -> Iterator[Callable[[F32], F32]]:
    """What turns states [length, hidden] that `final_states` gave into logits [length, vocab]."""
    if not model.architecture:
        head = read_tensor(model.folder, model.output_matrix)
        yield lambda states: states @ head.T
        return
    stream = open_stream(model)
    try:
        yield lambda states: stream.logits(torch.from_numpy(states[None]))[0].numpy()
    finally:
        stream.close()


def token_kl(reference: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
    """KL(reference || softmax(logits)) of each token, nats."""
    return kl_of_log_probs(reference, logits.double().log_softmax(-1))


def kl_of_log_probs(p: torch.Tensor, q: torch.Tensor) -> torch.Tensor:
    """KL(p || q) of distributions given by their logarithms [.., V], nats."""
    return (p.exp() * (p - q)).sum(-1)
