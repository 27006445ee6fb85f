"""The original model as a stream: one decoder layer in memory at a time, hidden states in a file between layers.

The layers are transformers' own modules, filled from safetensors; only the experts run in our function, which is transformers' documented
hook (`ALL_EXPERTS_FUNCTIONS`) and gives the same numbers, so that a recorder sees what every expert really receives.
Work is split into fixed chunks of windows, each computed by one thread with one-thread arithmetic and merged in order: results do not
depend on the number of cores.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from edgemoe.base.errors import MachineError, ModelError
from edgemoe.base.threads import count_cores
from edgemoe.ir import Model, Tensor
from edgemoe.model.checkpoint import read_tensor
from edgemoe.model.families import MODULE_NAMES, find_family
from edgemoe.stream.texts import Text

CHUNK_TOKENS = 2048
_local = threading.local()
T = TypeVar("T")


# --------------------------------------------------------------------------------------------------------------- windows
@dataclass(frozen=True, slots=True, kw_only=True)
class Windows:
    """Token windows [n, length], the last of a text padded; `lengths` [n] counts the real tokens of each."""

    tokens: NDArray[np.int64]
    lengths: NDArray[np.int64]
    domain: NDArray[np.int64]  # [n]

    def take(self, index: Sequence[int] | NDArray[np.int64]) -> Windows:
        """Some of the windows."""
        return Windows(tokens=self.tokens[index], lengths=self.lengths[index], domain=self.domain[index])

    def chunks(self) -> list[NDArray[np.int64]]:
        """Window indices in chunks of about CHUNK_TOKENS tokens."""
        step = max(1, CHUNK_TOKENS // self.tokens.shape[1])
        return [np.arange(i, min(i + step, len(self.tokens))) for i in range(0, len(self.tokens), step)]


def tokenize(model: Model, texts: Sequence[Text], max_tokens: int, window: int) -> Windows:
    """Texts as windows of the model's tokens, each text giving the same number at most.

    Raises:
        ModelError: no tokenizer, or a text without tokens.
    """
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(model.folder)
    except (OSError, ValueError, ImportError) as error:
        raise ModelError(f"{model.folder}: the tokenizer cannot be loaded: {str(error).splitlines()[0]}") from error
    length = min(window, model.context_length)
    share = max(max_tokens // len(texts), 2)
    tokens, lengths, domain = [], [], []
    for number, text in enumerate(texts):
        ids: list[int] = []
        for document in text.documents:
            ids += tokenizer(document, add_special_tokens=False, verbose=False)["input_ids"]
            if len(ids) >= share:
                break
        ids = ids[:share]
        if len(ids) < 2:
            raise ModelError(f"text {text.name!r} gives {len(ids)} tokens", hint="give a file with some thousands of words")
        if max(ids) >= model.vocab_size:
            raise ModelError(f"{model.folder}: the tokenizer gives id {max(ids)}, but vocab_size is {model.vocab_size}")
        for start in range(0, len(ids), length):
            part = ids[start : start + length]
            if len(part) > 1:
                tokens.append(part + [0] * (length - len(part)))
                lengths.append(len(part))
                domain.append(number)
    return Windows(tokens=np.array(tokens), lengths=np.array(lengths), domain=np.array(domain))


class States:
    """Hidden states [windows, length, hidden] in a file, read and written a window at a time (pread/pwrite: safe from any thread).

    float32, or `half` of that: bfloat16.
    """

    def __init__(self, path: Path, shape: tuple[int, int, int], *, half: bool = False) -> None:
        self.path, self.shape = path, shape
        self._dtype = torch.bfloat16 if half else torch.float32
        self._bytes = shape[1] * shape[2] * self._dtype.itemsize
        self._file = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)

    def read(self, index: NDArray[np.int64]) -> torch.Tensor:
        """States of these windows [len(index), length, hidden]."""
        out = torch.empty((len(index), *self.shape[1:]))
        for row, i in enumerate(index):
            read = bytearray(os.pread(self._file, self._bytes, int(i) * self._bytes))
            out[row] = torch.frombuffer(read, dtype=self._dtype).view(self.shape[1:])
        return out

    def write(self, index: NDArray[np.int64], values: torch.Tensor) -> None:
        """Replace the states of these windows."""
        rows = values.detach().to(self._dtype).cpu().contiguous().view(torch.uint8).numpy()
        for row, i in enumerate(index):
            if os.pwrite(self._file, rows[row].tobytes(), int(i) * self._bytes) < self._bytes:
                raise MachineError(f"{self.path.parent}: the disk is full", hint="free some space, or choose another --work")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self, *, delete: bool = False) -> None:
        """Close the file, and delete it if asked."""
        os.close(self._file)
        if delete:
            self.path.unlink(missing_ok=True)


# ---------------------------------------------------------------------------------------------------------------- layers
@dataclass
class Recorder:
    """What one chunk saw inside one layer; filled by hooks in the thread that runs the chunk."""

    inputs: dict[str, torch.Tensor] = field(default_factory=dict)  # attn_q, attn_output: inputs [tokens, cols]
    outputs: dict[str, torch.Tensor] | None = None  # if wanted, of all four attention matrices [windows, length, rows], in their graph
    logits: torch.Tensor | None = None  # router [tokens, experts]
    moe_input: torch.Tensor | None = None  # [tokens, hidden]
    moe_output: torch.Tensor | None = None  # [tokens, hidden]
    skip_experts: bool = False  # run attention alone: what leaves the layer is the stream after it
    on_expert: Callable[[int, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor], None] | None = None


def _experts_forward(module: Any, x: torch.Tensor, index: torch.Tensor, gates: torch.Tensor) -> torch.Tensor:
    """Sum of the chosen experts' outputs [tokens, hidden]; tells the recorder (expert, tokens, input, hidden, output, gate)."""
    recorder: Recorder | None = getattr(_local, "recorder", None)
    out = torch.zeros_like(x)
    if recorder is not None:
        recorder.moe_input, recorder.moe_output = x, out
        if recorder.skip_experts:
            return out
    for expert in index.unique().tolist():
        if expert >= module.gate_up_proj.shape[0]:  # transformers' mark for "no expert"
            continue
        token, slot = torch.where(index == expert)
        part, gate = x[token], gates[token, slot]
        h = module._apply_gate(nn.functional.linear(part, module.gate_up_proj[expert]))
        f = nn.functional.linear(h, module.down_proj[expert])
        out.index_add_(0, token, f * gate[:, None].to(f.dtype))
        if recorder is not None and recorder.on_expert is not None:
            recorder.on_expert(expert, token, part, h, f, gate.float())
    return out


@contextmanager
def recording(recorder: Recorder) -> Iterator[Recorder]:
    """Let `recorder` see what this thread runs."""
    _local.recorder = recorder
    try:
        yield recorder
    finally:
        _local.recorder = None


def default_device() -> str:
    """Where layers run: on a GPU if there is one."""
    return "cuda" if torch.cuda.is_available() else "cpu"


class LayerStream:
    """Skeleton of a model on no device, and one layer at a time filled from the checkpoint."""

    def __init__(self, model: Model, *, device: str | None = None) -> None:
        from transformers import AutoConfig, AutoModelForCausalLM
        from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

        ALL_EXPERTS_FUNCTIONS.register("edgemoe", _experts_forward)
        self.model, self.family = model, find_family(model.model_type)
        self.device = torch.device(device or default_device())
        config = AutoConfig.for_model(**{**model.config, "num_experts_per_tok": model.top_k})
        config._experts_implementation = "edgemoe"
        with torch.device("meta"):
            self._skeleton: Any = AutoModelForCausalLM.from_config(config, dtype=torch.float32, attn_implementation="sdpa")
        self._skeleton.set_experts_implementation("edgemoe")
        self._skeleton.eval().requires_grad_(requires_grad=False)
        self._rotary: Any = type(self._skeleton.model.rotary_emb)(config=self._skeleton.config).to(self.device)
        self._ends = model.of_layer(-1)
        self.eps = float(model.config.get("rms_norm_eps", 1e-6))  # of all norms

    def read(self, tensor: Tensor) -> torch.Tensor:
        """A tensor of the checkpoint on the device, float32."""
        return torch.from_numpy(read_tensor(self.model.folder, tensor)).to(self.device)

    def load_layer(self, layer: int) -> Any:
        """The decoder layer as a module, with hooks that feed the recorder of the running thread."""
        module = self._skeleton.model.layers[layer]
        if next(module.parameters()).is_meta:
            module.to_empty(device=self.device)
        params = dict(module.named_parameters())
        for (role, expert), tensor in self.model.of_layer(layer).items():
            if expert < 0:
                params[MODULE_NAMES[role]].data.copy_(self.read(tensor))
            else:
                self.expert_slice(module, role, expert).copy_(self.read(tensor))
        module.self_attn.q_proj.register_forward_pre_hook(_record_input("attn_q"))
        module.self_attn.o_proj.register_forward_pre_hook(_record_input("attn_output"))
        for role in ("attn_q", "attn_k", "attn_v", "attn_output"):
            module.get_submodule(MODULE_NAMES[role].removesuffix(".weight")).register_forward_hook(_record_output(role))
        module.mlp.gate.register_forward_hook(_record_logits)
        return module

    def unload_layer(self, layer: int) -> None:
        """Give the layer's memory back."""
        self._skeleton.model.layers[layer].to("meta")

    def expert_slice(self, module: Any, role: str, expert: int | slice = slice(None)) -> torch.Tensor:
        """View of one expert's (or all experts') gate, up or down rows in a loaded layer."""
        m = self.model.expert_size
        experts = module.mlp.experts
        if role == "ffn_down_exps":
            view: torch.Tensor = experts.down_proj.data[expert]
            return view
        rows = slice(0, m) if role == "ffn_gate_exps" else slice(m, 2 * m)
        both: torch.Tensor = experts.gate_up_proj.data
        return both[expert, rows]

    def run_layer(self, module: Any, states: torch.Tensor, *, gradients: bool = False) -> torch.Tensor:
        """Output states [windows, length, hidden] of a loaded layer, with a graph behind them if gradients are wanted."""
        states = states.to(self.device)
        positions = torch.arange(states.shape[1], device=self.device)[None]
        with torch.enable_grad() if gradients else torch.inference_mode():
            out = module(states, attention_mask=None, position_ids=positions, position_embeddings=self._rotary(states, positions))
        result: torch.Tensor = out[0] if isinstance(out, tuple) else out
        return result

    def embed(self, tokens: NDArray[np.int64], table: NDArray[np.float32] | None = None) -> torch.Tensor:
        """First states [windows, length, hidden], from the checkpoint's embedding or another table."""
        if table is None:
            table = read_tensor(self.model.folder, self._ends["token_embd", -1])
        return torch.from_numpy(table[tokens])

    def head(self) -> tuple[torch.Tensor, torch.Tensor, float]:
        """Weights of the last norm [hidden] and of the output matrix [vocab, hidden], and the norm's epsilon."""
        output = self._ends.get(("output", -1)) or self._ends["token_embd", -1]
        norm = self.read(self._ends["output_norm", -1])
        return norm, self.read(output), self.eps


class only_experts:
    """Let the router see only some experts, as if the others were cut out of the checkpoint."""

    def __init__(self, module: Any, kept: NDArray[np.int64]) -> None:
        self.gate, self.kept = module.mlp.gate, torch.from_numpy(kept)

    def __enter__(self) -> None:
        self.forward = self.gate.forward

        def forward(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
            logits = nn.functional.linear(x.reshape(-1, x.shape[-1]), self.gate.weight[self.kept])
            top, index = logits.float().softmax(-1).topk(self.gate.top_k, -1)
            if getattr(self.gate, "norm_topk_prob", True):
                top = top / top.sum(-1, keepdim=True)
            return logits, top.to(logits.dtype), self.kept.to(index.device)[index]

        self.gate.forward = forward

    def __exit__(self, *_: object) -> None:
        self.gate.forward = self.forward


def apply_norm(states: torch.Tensor, norm: torch.Tensor, eps: float) -> torch.Tensor:
    """RMSNorm over the last axis."""
    return nn.functional.rms_norm(states.to(norm.device), (states.shape[-1],), norm, eps)


def _record_input(name: str) -> Callable[[Any, Any], None]:
    def hook(_: Any, args: Any) -> None:
        recorder: Recorder | None = getattr(_local, "recorder", None)
        if recorder is not None:
            recorder.inputs[name] = args[0].flatten(0, -2)

    return hook


def _record_output(name: str) -> Callable[[Any, Any, Any], None]:
    def hook(_: Any, __: Any, output: torch.Tensor) -> None:
        recorder: Recorder | None = getattr(_local, "recorder", None)
        if recorder is not None and recorder.outputs is not None:
            recorder.outputs[name] = output

    return hook


def _record_logits(_: Any, __: Any, output: Any) -> None:
    recorder: Recorder | None = getattr(_local, "recorder", None)
    if recorder is not None:
        recorder.logits = output[0].float()


# ------------------------------------------------------------------------------------------------------------- the stream
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
) -> NDArray[np.float32]:
    """Normed last hidden states of the model [windows, length, hidden], a layer at a time; with `kept` of these experts alone."""
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

            with nullcontext() if kept is None else only_experts(module, np.array(kept[layer])):
                for _ in map_ordered(run, chunks, device=stream.device):
                    pass
            stream.unload_layer(layer)
        norm, _, eps = stream.head()
        rows = [apply_norm(states.read(index), norm, eps).cpu().numpy() for index in chunks]
    finally:
        states.close(delete=True)
    result: NDArray[np.float32] = np.concatenate(rows)
    if not np.isfinite(result).all():
        raise ModelError(f"{model.folder}: the original model gives NaN or infinite states on the held-out text")
    return result
