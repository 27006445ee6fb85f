"""This module runs llama.cpp with its evaluation callback: it records graphs, skips nodes, puts values in place, and lets others be seen.

A node whose COMPUTE flag is cleared is passed over by every backend.  So a pass may begin after any node, with the values that are live
there, and one layer costs its own share of a forward pass.  What was skipped is exact: the same operations run on the same values.
"""

from __future__ import annotations

import ctypes
import importlib
import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgemoe.base.errors import MachineError, ModelError
from edgemoe.stream.engine.graph import Graph, Leaf, Node
from edgemoe.stream.engine.layout import COMPUTE, Ggml, open_ggml, struct_at

INSTALL = "pip install 'edgemoe[llama]'"
F32, NO_FLASH, MMAP = 0, 0, 1  # ggml's type of the cache, llama.cpp's flash attention, its way to load
F32_BYTES = 4
_RUN, _SKIP, _SEE, _PUT = range(4)


@dataclass(frozen=True)
class Seen:
    """A node that has just been computed: its values, and those of its sources."""

    ggml: Ggml
    pointer: int

    def values(self) -> NDArray[Any]:
        """The node's values, copied."""
        return self.ggml.read(self.pointer)

    def source(self, number: int) -> NDArray[Any]:
        """The values of a source, copied."""
        return self.ggml.read(struct_at(self.pointer).src[number])

    def replace(self, values: NDArray[Any]) -> None:
        """Let all later nodes read other values."""
        self.ggml.write(self.pointer, values)


Watch = Callable[[Seen], None]


class Session:
    """A GGUF in llama.cpp whose passes can be watched, cut and fed; windows are sequences of one batch."""

    def __init__(self, path: Path, *, windows: int, length: int, threads: int, mmap: bool = True) -> None:
        """Load the file with room for so many windows of so many tokens at a time.

        Raises:
            MachineError: llama-cpp-python is missing, or its ggml is another.
            ModelError: llama.cpp does not load the file.
        """
        self.llama, libraries = load_bindings()
        self._log: list[str] = []
        self._on_log = self.llama.llama_log_callback(lambda _, text, __: self._log.append(text.decode(errors="replace")))
        self.llama.llama_log_set(self._on_log, ctypes.c_void_p(0))
        self.llama.llama_backend_init()
        params = self.llama.llama_model_default_params()
        params.n_gpu_layers, params.load_mode, params.use_extra_bufts = 0, MMAP if mmap else 0, False
        self.model = self.llama.llama_model_load_from_file(str(path).encode(), params)
        if not self.model:
            raise ModelError(f"{path}: llama.cpp does not load it: {self._last_words()}")
        self.ggml = open_ggml(libraries, self.llama.GGML_TYPE_COUNT)
        self.n_vocab: int = self.llama.llama_vocab_n_tokens(self.llama.llama_model_get_vocab(self.model))
        self._open(windows, length, threads)
        self._graphs: dict[tuple[int, int, bool], Graph] = {}
        self._computes: dict[tuple[int, int, bool], list[bool]] = {}  # whether each node is computed at all
        self._pointers: dict[str, int] = {}  # of weights
        self._recorded: list[int] | None = None
        self._flagged: list[bool] = []
        self._orders: list[int] = []
        self._watches: Mapping[int, Watch] = {}
        self._values: Mapping[int, NDArray[Any]] = {}
        self._asked = self._current = 0
        self._now: list[int] = []  # pointers of the nodes of this pass
        self._error: BaseException | None = None

    def _open(self, windows: int, length: int, threads: int) -> None:
        options = self.llama.llama_context_default_params()
        options.n_ctx = options.n_batch = options.n_ubatch = windows * length
        options.n_seq_max, options.n_threads, options.n_threads_batch = windows, threads, threads
        options.type_k = options.type_v = F32
        options.flash_attn_type, options.op_offload, options.kv_unified = NO_FLASH, False, False
        self._on_node = self.llama.ggml_backend_sched_eval_callback(self._called)
        options.cb_eval = self._on_node
        self.context = self.llama.llama_init_from_model(self.model, options)
        if not self.context:
            raise ModelError(f"llama.cpp makes no context: {self._last_words()}")
        self._memory = self.llama.llama_get_memory(self.context)

    def _last_words(self) -> str:
        lines = "".join(self._log).strip().splitlines() or ["it says nothing"]
        return next((line for line in reversed(lines) if "error" in line), lines[-1])[:300]

    def close(self) -> None:
        """Give the memory back."""
        self.llama.llama_free(self.context)
        self.llama.llama_model_free(self.model)

    # ---------------------------------------------------------------------------------------------------------------- passes
    def graph(self, windows: NDArray[np.int64], *, logits: bool = True) -> Graph:
        """The graph of so many windows of such a length; it is recorded when a shape comes for the first time."""
        key = (*windows.shape, logits)
        if key not in self._graphs:
            self._recorded = []
            self._decode(windows, logits=logits)
            recorded, self._recorded = self._recorded, None
            self._computes[key] = [bool(struct_at(pointer).flags & COMPUTE) for pointer in recorded]
            self._graphs[key] = self._read_graph(recorded)
        return self._graphs[key]

    def run(
        self,
        windows: NDArray[np.int64],
        *,
        after: int = -1,
        values: Mapping[int, NDArray[Any]] | None = None,
        until: int | None = None,
        watch: Mapping[int, Watch] | None = None,
        logits: bool = True,
    ) -> NDArray[np.float32] | None:
        """One pass over windows, each of which is a sequence.

        Args:
            windows: tokens [windows, length].
            after: skip all nodes up to this one, apart from masks and positions.
            values: of the nodes that are live there (`Graph.live`).
            until: skip all nodes behind this one.
            watch: what to call when a node has been computed, by its number.
            logits: whether every token has logits; else the last alone, and the last layer works on it alone.

        Returns:
            Logits [tokens, vocab], if wanted and not skipped.

        Raises:
            ModelError: llama.cpp fails.
        """
        graph = self.graph(windows, logits=logits)
        end = len(graph.nodes) if until is None else until + 1
        orders = [_RUN] * end + [_SKIP] * (len(graph.nodes) - end)
        for number in range(after + 1):
            orders[number] = _RUN if graph.independent[number] else _SKIP
        for number in watch or {}:
            if orders[number] == _RUN:
                orders[number] = _SEE
        for number in values or {}:
            orders[number] = _PUT
        self._orders, self._watches, self._values, self._asked, self._now = orders, watch or {}, values or {}, 0, []
        self._flagged = self._computes[*windows.shape, logits]
        whole = logits and until is None
        self._decode(windows, logits=logits)
        self._orders = []
        if not whole:
            return None
        shape = (windows.size, self.n_vocab)
        return np.ctypeslib.as_array(self.llama.llama_get_logits(self.context), shape=shape).copy()

    def live_values(
        self, windows: NDArray[np.int64], at: int, *, also: Mapping[int, Watch] | None = None, **cut: Any
    ) -> dict[int, NDArray[Any]]:
        """The values of the nodes that are live after node `at`, which a pass must be given to begin there.

        `also` is watched on the way, and `cut` goes to `run`.
        """
        graph, found = self.graph(windows), {}

        def take(seen: Seen) -> None:  # each value is read here and not when it is made, because later nodes may overwrite it in place
            if also and at in also:
                also[at](seen)
            found.update({number: self.ggml.read(self._now[number]) for number in graph.live(at)})

        self.run(windows, until=at, watch={**(also or {}), at: take}, **cut)
        return found

    def _decode(self, windows: NDArray[np.int64], *, logits: bool) -> None:
        self.llama.llama_memory_clear(self._memory, True)  # recurrent states too
        tokens = windows.size
        batch = self.llama.llama_batch_init(tokens, 0, 1)
        batch.n_tokens = tokens
        for i, token in enumerate(windows.reshape(-1).tolist()):
            sequence, position = divmod(i, windows.shape[1])
            batch.token[i], batch.pos[i], batch.n_seq_id[i], batch.seq_id[i][0] = token, position, 1, sequence
            batch.logits[i] = logits or i == tokens - 1
        result = self.llama.llama_decode(self.context, batch)
        self.llama.llama_batch_free(batch)
        if self._error is not None:
            error, self._error = self._error, None
            raise error
        if result:
            raise ModelError(f"llama.cpp fails to decode ({result}): {self._last_words()}")

    # --------------------------------------------------------------------------------------------------------------- weights
    def weight(self, name: str) -> NDArray[np.float32]:
        """The values of a weight that a recorded graph reads."""
        import gguf

        pointer = self._pointers[name]
        tensor, raw = struct_at(pointer), self.ggml.read_bytes(pointer)
        kind = gguf.GGMLQuantizationType(tensor.type)
        values = gguf.quants.dequantize(raw.reshape(*tensor.shape[:-1], -1) if len(tensor.shape) > 1 else raw, kind)
        return values.astype(np.float32).reshape(tensor.shape)

    @contextmanager
    def pointed(self, weights: Mapping[str, NDArray[np.float32]]) -> Iterator[None]:
        """Let weights have other values while the context lasts: each points to our array instead of the file's bytes.

        Nothing is copied, so the file's own bytes are there again afterwards.  A recorded graph must read the weights.

        Raises:
            ValueError: an array has another shape than the weight.
        """
        f32, before = self.ggml.type_number("f32"), []
        held = {name: np.ascontiguousarray(values, np.float32) for name, values in weights.items()}
        try:
            for name, values in held.items():
                tensor = struct_at(self._pointers[name])
                if values.shape != tensor.shape:
                    raise ValueError(f"{name}: {values.shape} for {tensor.shape}")
                before.append((tensor, tensor.type, tensor.data, list(tensor.nb)))
                tensor.type, tensor.data = f32, values.ctypes.data
                for axis in range(4):
                    tensor.nb[axis] = F32_BYTES * math.prod(tensor.ne[:axis])
            yield
        finally:
            for tensor, kind, data, strides in before:
                tensor.type, tensor.data = kind, data
                for axis, stride in enumerate(strides):
                    tensor.nb[axis] = stride

    # -------------------------------------------------------------------------------------------------------------- callback
    def _called(self, pointer: int, ask: bool, _: Any) -> bool:
        """What llama.cpp calls for every node: first to ask whether it is to be seen, and if so again when it has been computed."""
        try:
            return self._asked_for(pointer) if ask else self._computed(pointer)
        except BaseException as error:  # noqa: BLE001  (ctypes would print and swallow it)
            self._error = error
            return False

    def _asked_for(self, pointer: int) -> bool:
        if self._recorded is not None:
            self._recorded.append(pointer)
            return False
        if not self._orders:
            return False
        self._current, self._asked = self._asked, self._asked + 1
        self._now.append(pointer)
        order, tensor = self._orders[self._current], struct_at(pointer)
        if order in (_SKIP, _PUT):
            tensor.flags &= ~COMPUTE
        elif self._flagged[self._current]:
            tensor.flags |= COMPUTE
        return order >= _SEE

    def _computed(self, pointer: int) -> bool:
        if self._orders[self._current] == _PUT:
            self.ggml.write(pointer, self._values[self._current])
        if self._current in self._watches:
            self._watches[self._current](Seen(self.ggml, pointer))
        return True

    def _read_graph(self, recorded: list[int]) -> Graph:
        numbers, nodes = {pointer: number for number, pointer in enumerate(recorded)}, []
        for pointer in recorded:
            tensor = struct_at(pointer)
            pointers = [source for source in tensor.src if source]
            if tensor.view_src and tensor.view_src not in pointers:
                pointers.append(tensor.view_src)
            sources = tuple(numbers[s] if s in numbers else self._leaf(s) for s in pointers)
            nodes.append(Node(tensor.label, self.ggml.ops[tensor.op], self.ggml.types[tensor.type], tensor.shape, sources))
        return Graph(tuple(nodes))

    def _leaf(self, pointer: int) -> Leaf:
        leaf = Leaf(struct_at(pointer).label, self.ggml.is_weight(pointer))
        if leaf.is_weight:
            self._pointers[leaf.name] = pointer
        return leaf


def load_bindings() -> tuple[Any, Path]:
    """llama-cpp-python's ctypes bindings, and the folder of its shared libraries.

    Raises:
        MachineError: it is not installed, or cannot be loaded.
    """
    try:
        bindings = importlib.import_module("llama_cpp.llama_cpp")
    except (ImportError, OSError, RuntimeError) as error:
        raise MachineError(f"llama-cpp-python cannot be used: {error}", hint=INSTALL) from error
    return bindings, Path(str(bindings.__file__)).parent / "lib"
