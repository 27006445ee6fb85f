"""This module runs one layer of two streams in llama.cpp: the original's, and that of the model whose matrices are being packed.

In the rounded stream, every matrix that was passed computes with its packed values.  Nothing here knows the architecture.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import reduce

import numpy as np
import torch
from numpy.typing import NDArray

from edgemoe.base.storage import array_file, save_arrays
from edgemoe.base.types import F32
from edgemoe.ir import is_stack
from edgemoe.quantize.importance import importance_of
from edgemoe.repair.align import PairSums, sum_pairs
from edgemoe.repair.two_streams import TwoStreams
from edgemoe.stream.engine.rounding import RoundingStream
from edgemoe.stream.layers import Recorder, recording
from edgemoe.stream.passes import map_ordered

Weights = dict[str, F32]  # by role, with which the rounded stream computes


class EngineLayer:
    """One layer of both streams, while its matrices are packed one after the other."""

    def __init__(self, streams: TwoStreams, layer: int, kept: Sequence[int]) -> None:
        """Run the original through the layer, and keep what its matrices read.

        Args:
            streams: the two streams, both of llama.cpp.
            layer: its number.
            kept: experts that stay; none where the layer has no experts.
        """
        assert isinstance(streams.original, RoundingStream)
        assert streams.quantize_plan is not None
        self.streams, self.layer, self.kept = streams, layer, np.array(kept, np.int64)
        self.stream, self.plan = streams.original, streams.quantize_plan
        self.importance = importance_of(self.plan.model, self.plan.stats, layer)
        self.before, self.changed = streams.states("changed", layer), Weights()
        self.originals: dict[str, F32] = {}
        self._run_original()

    # ---------------------------------------------------------------------------------------------------------------- passes
    def _run_original(self) -> None:
        streams, layer = self.streams, self.layer
        before, after = streams.states("original", layer), streams.states("original", layer + 1)

        def run(index: NDArray[np.int64]) -> None:
            with recording(Recorder()) as seen:
                after.write(index, self.stream.run_layer(layer, before.read(index)))
            for activation, x in self.inputs(seen, index).items():
                self.hold(self.originals, activation, x.shape[1])[streams.rows(index)] = x

        for _ in map_ordered(run, streams.windows.chunks()[:1], device=self.stream.device):
            pass  # the first chunk alone makes the files
        for _ in map_ordered(run, streams.windows.chunks()[1:], device=self.stream.device):
            pass
        before.close()
        after.close()

    def hold(self, held: dict[str, F32], name: str, width: int) -> F32:
        """Scratch for what is read under a name [tokens, width]."""
        if name not in held:
            held[name] = self.streams.array(f"{'original' if held is self.originals else 'rounded'}-{len(held)}-read", width)
        return held[name]

    def inputs(self, seen: Recorder, index: NDArray[np.int64]) -> dict[str, F32]:
        """What matrices read, real tokens alone; experts' inputs by the name "experts"."""
        real = self.streams.real[index].ravel()
        found = {activation: x.numpy()[real] for activation, x in seen.inputs.items()}
        if seen.moe_input is not None:
            found["experts"] = seen.moe_input.numpy()[real]
        return found

    @contextmanager
    def rounded(self) -> Iterator[None]:
        """Let the stream compute with what is packed already, and with the kept experts alone."""
        with self.stream.replaced(self.layer, self.changed):
            if len(self.kept) in (0, self.plan.model.n_experts):
                yield
                return
            with self.stream.only(self.layer, self.kept):
                yield

    def stays(self, role: str) -> bool:
        """Whether the plan keeps a tensor in the type that it has."""
        tensor = self.plan.model.get(role, self.layer, 0 if is_stack(role) else -1)
        return self.plan.format_of(role, self.layer) == tensor.dtype

    def pairs(self, activation: str, last: str) -> tuple[PairSums, PairSums]:
        """Sums of an activation in the rounded stream and in the original; a pass ends with the product of role `last`."""
        return self.sums(activation, last, lambda index: np.asarray(self.originals[activation][self.streams.rows(index)]))

    def pairs_of_output(self, activation: str, role: str) -> tuple[PairSums, PairSums]:
        """Sums of what a matrix reads and of what it should add to the stream: the original's stream behind it, less the rounded before."""
        original = self.streams.states("original", self.layer)

        def wanted(index: NDArray[np.int64]) -> F32:
            behind = self.stream.run_until(self.layer, original.read(index), role, added=True)
            assert behind is not None
            found: F32 = (behind - self.before.read(index).flatten(0, 1).numpy())[self.streams.real[index].ravel()]
            return found

        targets = self.streams.array("wanted", self.stream.width)
        for index in self.streams.windows.chunks():
            targets[self.streams.rows(index)] = wanted(index)
        original.close()
        return self.sums(activation, role, lambda index: np.asarray(targets[self.streams.rows(index)]))

    def sums(self, activation: str, last: str, wanted: Callable[[NDArray[np.int64]], F32]) -> tuple[PairSums, PairSums]:
        """Sums over fitted and over guard tokens of an activation in the rounded stream, and of what `wanted` gives for a chunk."""
        streams = self.streams

        def chunk(index: NDArray[np.int64]) -> tuple[PairSums, PairSums]:
            rows = streams.rows(index)
            with recording(Recorder()) as seen:
                self.stream.run_until(self.layer, self.before.read(index), last)
            x, y = torch.from_numpy(self.inputs(seen, index)[activation]), torch.from_numpy(wanted(index))
            weights, guard = torch.from_numpy(streams.each[rows]), torch.from_numpy(streams.guard[rows])
            return sum_pairs(x, y, weights * ~guard), sum_pairs(x, y, weights * guard)

        with self.rounded():
            parts: Iterator[tuple[PairSums, PairSums]] = map_ordered(chunk, streams.windows.chunks(), device=self.stream.device)
            return reduce(lambda a, b: (a[0] + b[0], a[1] + b[1]), parts)

    def finish(self, packed: Mapping[str, NDArray[np.generic]]) -> None:
        """Run the rounded stream through the layer, and leave states and packed rows on disk."""
        after = self.streams.states("changed", self.layer + 1)

        def run(index: NDArray[np.int64]) -> None:
            after.write(index, self.stream.run_layer(self.layer, self.before.read(index)))

        with self.rounded():
            for _ in map_ordered(run, self.streams.windows.chunks(), device=self.stream.device):
                pass
        after.close()
        self.before.close()
        save_arrays(self.streams.work / array_file(self.layer), dict(packed))
        self.streams.steps.note(self.layer + 1)
        for old in self.streams.work.glob(f"*-{self.layer}.bin"):
            old.unlink()
