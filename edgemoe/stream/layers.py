"""The original model as a stream: one decoder layer in memory at a time, hidden states in a file between layers.

The layers are transformers' own modules, filled from safetensors; only the experts run in our function, which is transformers' documented
hook (`ALL_EXPERTS_FUNCTIONS`) and gives the same numbers, so that a recorder sees what every expert really receives.
Work is split into fixed chunks of windows, each computed by one thread with one-thread arithmetic and merged in order: results do not
depend on the number of cores.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from edgemoe.base.types import F32
from edgemoe.ir import Model, Tensor
from edgemoe.model.checkpoint import read_tensor
from edgemoe.model.families import MODULE_NAMES, find_family

_local = threading.local()


# --------------------------------------------------------------------------------------------------------------- windows


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
        self._outer = model.of_layer(-1)
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

    def embed(self, tokens: NDArray[np.int64], table: F32 | None = None) -> torch.Tensor:
        """First states [windows, length, hidden], from the checkpoint's embedding or another table."""
        if table is None:
            table = read_tensor(self.model.folder, self._outer["token_embd", -1])
        return torch.from_numpy(table[tokens])

    def head(self) -> tuple[torch.Tensor, torch.Tensor, float]:
        """Weights of the last norm [hidden] and of the output matrix [vocab, hidden], and the norm's epsilon."""
        output = self._outer.get(("output", -1)) or self._outer["token_embd", -1]
        norm = self.read(self._outer["output_norm", -1])
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
