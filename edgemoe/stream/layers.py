"""This module runs a model with one decoder layer in memory at a time.

The layers are transformers' own modules, filled from safetensors.  Only the experts run in our function, which gives the same numbers as
transformers' own and is installed by transformers' documented hook (`ALL_EXPERTS_FUNCTIONS`), so that a recorder sees the inputs of every
expert.
Work is split into fixed chunks of windows.  Each chunk is computed with one thread, and chunks are merged in order (passes.py), so results
do not depend on the number of cores.
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from edgemoe.base.errors import ModelError
from edgemoe.base.types import F32
from edgemoe.ir import Model, Tensor, is_stack
from edgemoe.model.checkpoint import read_tensor
from edgemoe.model.config import inference_fields
from edgemoe.stream.adapter import (
    count_experts,
    experts_of,
    ffn_of,
    layer_of,
    linear_of,
    make_rotary,
    only_experts,
    router_of,
    run_expert,
    weights_of,
)
from edgemoe.stream.rounded import rounded_weights

_local = threading.local()


@dataclass
class Recorder:
    """The activations of one chunk inside one layer; hooks fill it in the thread that runs the chunk."""

    inputs: dict[str, torch.Tensor] = field(default_factory=dict)  # activation -> inputs of the matrices that read it [tokens, cols]
    outputs: dict[str, torch.Tensor] | None = None  # role -> output [.., rows] of planned matrices of no routed expert
    logits: torch.Tensor | None = None  # router [tokens, experts]
    moe_input: torch.Tensor | None = None  # [tokens, hidden]
    moe_output: torch.Tensor | None = None  # of the routed experts [tokens, hidden]
    ffn_output: torch.Tensor | None = None  # of the whole feed-forward part [windows, length, hidden]
    skip_experts: bool = False  # the output of routed experts is zero
    attention_only: bool = False  # stop before the feed-forward part, and return the stream after attention
    on_expert: Callable[[int, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor], None] | None = None


class _AttentionDone(Exception):
    """Ends a layer's forward pass where the recorder wants no more, and carries the stream after attention; it is no error."""

    def __init__(self, states: torch.Tensor) -> None:
        self.states = states


def _experts_forward(module: Any, x: torch.Tensor, index: torch.Tensor, gates: torch.Tensor) -> torch.Tensor:
    """Sum of the chosen experts' outputs, each times its gate [tokens, hidden].

    It tells the recorder (expert, tokens, input, hidden, output, gate) of each chosen expert.
    """
    recorder = current_recorder()
    out = torch.zeros_like(x)
    if recorder is not None:
        recorder.moe_input, recorder.moe_output = x, out
        if recorder.skip_experts:
            return out
    kept: torch.Tensor | None = getattr(module, "kept", None)  # only_experts sets it: the router then counts the kept experts alone
    if kept is not None:
        index = kept.to(index.device)[index]
    for expert in index.unique().tolist():
        if expert >= count_experts(module):  # transformers' mark for "no expert"
            continue
        token, slot = torch.where(index == expert)
        part, gate = x[token], gates[token, slot]
        h, f = run_expert(module, expert, part)
        out.index_add_(0, token, f * gate[:, None].to(f.dtype))
        if recorder is not None and recorder.on_expert is not None:
            recorder.on_expert(expert, token, part, h, f, gate.float())
    return out


@contextmanager
def recording(recorder: Recorder) -> Iterator[Recorder]:
    """Let `recorder` see the layers that this thread runs."""
    _local.recorder = recorder
    try:
        yield recorder
    finally:
        _local.recorder = None


def current_recorder() -> Recorder | None:
    """The recorder that sees what this thread runs."""
    found: Recorder | None = getattr(_local, "recorder", None)
    return found


def default_device() -> str:
    """The device that runs layers: a GPU if there is one, else the CPU."""
    return "cuda" if torch.cuda.is_available() else "cpu"


class LayerStream:
    """The skeleton of a model without weights; one layer at a time is filled from the checkpoint."""

    def __init__(self, model: Model, *, device: str | None = None) -> None:
        from transformers import AutoConfig, AutoModelForCausalLM
        from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

        ALL_EXPERTS_FUNCTIONS.register("edgemoe", _experts_forward)
        self.model, self.width = model, model.hidden_size
        self.device = torch.device(device or default_device())
        own = {"num_experts_per_tok": model.top_k, "num_key_value_heads": model.attention.kv_heads, "sliding_window": None}
        try:
            config = AutoConfig.for_model(**{**inference_fields(model.config), **own})
            config._experts_implementation = "edgemoe"
            with torch.device("meta"):
                self._skeleton: Any = AutoModelForCausalLM.from_config(
                    config, dtype=torch.float32, attn_implementation="sdpa", trust_remote_code=False
                )
        except Exception as error:  # each class checks its config in its own way
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
            raise ModelError(f"{Path(model.folder) / 'config.json'}: transformers cannot make this model: {reason[:300]}") from error
        self._skeleton.set_experts_implementation("edgemoe")
        self._skeleton.eval().requires_grad_(requires_grad=False)
        self._rotary: Any = make_rotary(self._skeleton).to(self.device)
        for layer in range(model.n_layers):
            self._watch(layer)

    def read(self, tensor: Tensor) -> torch.Tensor:
        """A tensor of the checkpoint on the device, float32."""
        return torch.from_numpy(read_tensor(self.model.folder, tensor)).to(self.device)

    def load_layer(self, layer: int) -> Any:
        """The decoder layer as a module, filled from the checkpoint; its hooks feed the recorder of the running thread."""
        module = layer_of(self._skeleton, layer)
        if next(module.parameters()).is_meta:
            module.to_empty(device=self.device)
        for (role, expert), tensor in self.model.of_layer(layer).items():
            target = weights_of(module, role, expert if is_stack(role) else slice(None))
            target.copy_(self.read(tensor).view_as(target))
        return module

    def _watch(self, layer: int) -> None:
        """Add the hooks of a layer, which stay while its weights come and go."""
        module = layer_of(self._skeleton, layer)
        for step in self.model.steps(layer):
            plain = self.model.plain_roles(layer, step)
            if plain:
                linear_of(module, plain[0]).register_forward_pre_hook(_record_input(step.reads))
            for role in plain:
                linear_of(module, role).register_forward_hook(_record_output(role))
        linear_of(module, "ffn_norm").register_forward_pre_hook(_stop_after_attention)
        ffn_of(module).register_forward_hook(_record_ffn)
        if layer in self.model.moe_layers:
            router_of(module).register_forward_hook(_record_logits)

    def unload_layer(self, layer: int) -> None:
        """Give the layer's memory back."""
        layer_of(self._skeleton, layer).to("meta")

    def run_layer(self, module: Any, states: torch.Tensor, *, gradients: bool = False) -> torch.Tensor:
        """Output states [windows, length, hidden] of a loaded layer, with a graph behind them if gradients are wanted.

        If the recorder is `attention_only`, these are the stream after attention.
        """
        states = states.to(self.device)
        positions = torch.arange(states.shape[1], device=self.device)[None]
        with torch.enable_grad() if gradients else torch.inference_mode():
            try:
                out = module(states, attention_mask=None, position_ids=positions, position_embeddings=self._rotary(states, positions))
            except _AttentionDone as done:
                return done.states
        result: torch.Tensor = out[0] if isinstance(out, tuple) else out
        return result

    @property
    def name(self) -> str:
        """The kind of device that computes the layers."""
        return self.device.type

    def values(self, module: Any, role: str) -> F32:
        """The weights of a role in a loaded layer."""
        found: F32 = weights_of(module, role).cpu().numpy()
        return found

    @contextmanager
    def rounded(self, module: Any, bits: Mapping[str, int]) -> Iterator[None]:
        """Let the weights of these roles be rounded to so many bits while the context lasts."""
        with ExitStack() as stack:
            for role, n in bits.items():
                stack.enter_context(rounded_weights(weights_of(module, role), n))
            yield

    def only(self, module: Any, kept: NDArray[np.int64]) -> only_experts:
        """Let the router choose among these experts alone while the context lasts."""
        return only_experts(module, kept)

    def candidate_outputs(self, module: Any, x: F32, chosen: NDArray[np.int64]) -> torch.Tensor:
        """Outputs [n, K, hidden] of chosen experts [n, K] for inputs [n, hidden]."""
        experts, part = experts_of(module), torch.from_numpy(x).to(self.device)
        outputs = torch.zeros(*chosen.shape, x.shape[1], device=self.device)
        for expert in np.unique(chosen):
            token, slot = np.nonzero(chosen == expert)
            outputs[token, slot] = run_expert(experts, int(expert), part[token])[1]
        return outputs

    def embedding(self) -> F32:
        """The checkpoint's embedding [vocab, hidden]."""
        return read_tensor(self.model.folder, self.model.get("token_embd"))

    def embed(self, tokens: NDArray[np.int64], table: F32 | None = None) -> torch.Tensor:
        """First states [windows, length, hidden], from the checkpoint's embedding or another table."""
        return torch.from_numpy((self.embedding() if table is None else table)[tokens])

    def head(self) -> tuple[torch.Tensor, torch.Tensor, float]:
        """Weights of the last norm [hidden] and of the output matrix [vocab, hidden], and the norm's epsilon."""
        return self._head

    @functools.cached_property
    def _head(self) -> tuple[torch.Tensor, torch.Tensor, float]:
        return self.read(self.model.get("output_norm")), self.read(self.model.output_matrix), self.model.norm_eps

    def output(self) -> torch.Tensor:
        """The output matrix [vocab, hidden]."""
        return self._head[1]

    def normed(self, states: torch.Tensor) -> torch.Tensor:
        """What the output matrix reads [windows, length, hidden], from the states after the last layer."""
        return apply_norm(states, self._head[0], self._head[2])

    def logits(self, states: torch.Tensor, output: torch.Tensor | None = None) -> torch.Tensor:
        """Logits [windows, length, vocab] from the states after the last layer, with the model's output matrix or another."""
        return self.normed(states) @ (self._head[1] if output is None else output).T

    def close(self) -> None:
        """Nothing, for Python gives the memory back."""


def apply_norm(states: torch.Tensor, norm: torch.Tensor, eps: float) -> torch.Tensor:
    """RMSNorm over the last axis."""
    return nn.functional.rms_norm(states.to(norm.device), (states.shape[-1],), norm, eps)


def _record_input(activation: str) -> Callable[[Any, Any], None]:
    def hook(_: Any, args: Any) -> None:
        recorder = current_recorder()
        if recorder is not None:
            recorder.inputs[activation] = args[0].flatten(0, -2)

    return hook


def _record_output(role: str) -> Callable[[Any, Any, Any], None]:
    def hook(_: Any, __: Any, output: torch.Tensor) -> None:
        recorder = current_recorder()
        if recorder is not None and recorder.outputs is not None:
            recorder.outputs[role] = output

    return hook


def _record_logits(_: Any, __: Any, output: Any) -> None:
    recorder = current_recorder()
    if recorder is not None:
        recorder.logits = output[0].float()


def _record_ffn(_: Any, __: Any, output: Any) -> None:
    recorder = current_recorder()
    if recorder is not None:
        recorder.ffn_output = output


def _stop_after_attention(_: Any, args: Any) -> None:
    recorder = current_recorder()
    if recorder is not None and recorder.attention_only:
        raise _AttentionDone(args[0])
