"""Plans made by hand for the ONNX target, their references in transformers, and onnxruntime to run them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from tiny import flat_plan

from edgemoe.base.types import F32
from edgemoe.ir import Artifact, Model, Plan, Stats, Unit
from edgemoe.model.checkpoint import read_tensor
from edgemoe.quantize.importance import importance_of
from edgemoe.quantize.reference import round_to_int8
from edgemoe.stream.adapter import linear_of, weights_of
from edgemoe.targets.onnx.formats import input_block, round_rows
from edgemoe.targets.onnx.writer import write

KEPT = ((0, 1, 3, 4, 6, 7), (2, 5))  # other experts and another number in each layer
MIX = ("INT2_128", "INT3_128", "INT4_32", "INT8_128", "F32", "INT4_64", "INT8_32", "INT3_64")
Case = tuple[Model, Stats]
hand_plan = partial(flat_plan, target="onnx")


def mixed(unit: Unit) -> str:
    """Another format for every expert; matrices in 4 and 8 bits."""
    if unit.expert >= 0:
        return MIX[unit.expert]
    return {"attn_k": "INT8_128", "token_embd": "INT4_64", "output": "INT8_32"}.get(unit.role, "INT4_32")


def emit(model: Model, stats: Stats, plan: Plan, folder: Path) -> Artifact:
    folder.mkdir()
    return write(model, stats, plan, folder)


def reference(model: Model, stats: Stats, plan: Plan) -> Any:
    """The transformers model that a plan describes: dropped experts cut away, matrices in their formats, inputs as kernels round them."""
    from transformers import AutoModelForCausalLM

    module: Any = AutoModelForCausalLM.from_pretrained(model.folder, dtype=torch.float32).eval()
    ends = {"token_embd": module.model.embed_tokens.weight, "output": module.lm_head.weight}
    for layer in range(-1, model.n_layers):
        importance = importance_of(model, stats, layer)

        def rounded(tensor: Any, unit: str, importance: Any = importance) -> torch.Tensor:
            values = read_tensor(model.folder, tensor)
            return torch.from_numpy(round_rows(values, plan.formats[unit], importance.get((tensor.role, tensor.expert))))

        block = module.model.layers[layer] if layer >= 0 else None
        for (role, expert), tensor in model.of_layer(layer).items():
            unit = f"blk.{layer}.{role}.weight" if layer >= 0 else f"{role}.weight"
            if expert < 0 and unit in plan.formats:
                (ends[role].data if block is None else weights_of(block, role)).copy_(rounded(tensor, unit))
                if block is not None:
                    _round_given(linear_of(block, role), plan.formats[unit], role)
        if block is not None and layer in plan.kept_of:
            found = model.of_layer(layer)
            kept = plan.kept_of[layer]
            parts = {p: [rounded(found[f"ffn_{p}_exps", e], f"blk.{layer}.ffn_exps.{e}") for e in kept] for p in ("gate", "up", "down")}
            experts, gate = block.mlp.experts, block.mlp.gate
            experts.gate_up_proj.data = torch.stack([torch.cat(pair) for pair in zip(parts["gate"], parts["up"], strict=True)])
            experts.down_proj.data = torch.stack(parts["down"])
            gate.weight.data = gate.weight.data[list(kept)]
            if model.router.biased:
                gate.e_score_correction_bias = gate.e_score_correction_bias[list(kept)]
            experts.num_experts = gate.num_experts = len(kept)
            experts.forward = _experts_forward(experts, [plan.formats[f"blk.{layer}.ffn_exps.{e}"] for e in kept])
    head = "output" if "output.weight" in plan.formats else "token_embd"
    _round_given(module.lm_head, plan.formats[f"{head}.weight"], head)
    return module


def _rounded(x: torch.Tensor, name: str, role: str) -> torch.Tensor:
    flat: F32 = x.reshape(-1, x.shape[-1]).numpy()
    if not flat.size:  # an expert that no token chose
        return x
    return torch.from_numpy(round_to_int8(flat, input_block(name, role))).reshape(x.shape)


def _round_given(linear: Any, name: str, role: str) -> None:
    """Round what a matrix is given."""
    linear.register_forward_pre_hook(lambda _, args: (_rounded(args[0], name, role),))


def _experts_forward(module: Any, formats: Sequence[str]) -> Callable[..., torch.Tensor]:
    """The sum of the chosen experts, each with its inputs rounded as its format has it."""

    def forward(x: torch.Tensor, index: torch.Tensor, gates: torch.Tensor) -> torch.Tensor:
        out = torch.zeros_like(x)
        for e, name in enumerate(formats):
            token, slot = torch.where(index == e)
            gate, up = (_rounded(x[token], name, "ffn_exps") @ module.gate_up_proj[e].T).chunk(2, -1)
            h = torch.nn.functional.silu(gate) * up
            out.index_add_(0, token, (_rounded(h, name, "ffn_exps") @ module.down_proj[e].T) * gates[token, slot, None])
        return out

    return forward


def reference_logits(module: Any, ids: NDArray[np.int64]) -> F32:
    with torch.no_grad():
        logits: F32 = module(torch.from_numpy(ids)).logits.numpy()
    return logits


class Runner:
    """A session with its cache: `step` feeds tokens and returns their logits."""

    def __init__(self, path: Path, model: Model) -> None:
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads, options.log_severity_level = 1, 3
        self.session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        self.names = [i.name for i in self.session.get_inputs()[2:]]
        self.empty = (model.attention.kv_heads, 0, model.attention.key_length)
        self.past: dict[str, F32] = {}
        self.mask: NDArray[np.int64] | None = None

    def step(self, ids: NDArray[np.int64], mask: NDArray[np.int64] | None = None) -> F32:
        """Logits [batch, tokens, vocabulary] of the next tokens; `mask` is of these tokens alone."""
        if self.mask is None:
            self.past = {name: np.zeros((len(ids), *self.empty), np.float32) for name in self.names}
            self.mask = np.zeros((len(ids), 0), np.int64)
        self.mask = np.concatenate([self.mask, np.ones_like(ids) if mask is None else mask], axis=1)
        logits, *present = self.session.run(None, {"input_ids": ids, "attention_mask": self.mask, **self.past})
        self.past = dict(zip(self.names, present, strict=True))
        result: F32 = logits
        return result


def mean_kl(want: F32, got: F32) -> float:
    """Mean over tokens of KL(want || got), nats."""
    p, q = (torch.log_softmax(torch.from_numpy(x).double(), -1) for x in (want, got))
    return float((p.exp() * (p - q)).sum(-1).mean())


def token_errors(want: F32, got: F32) -> F32:
    """Relative error of each token's logits."""
    error: F32 = np.linalg.norm(got - want, axis=-1) / np.linalg.norm(want, axis=-1)
    return error.ravel()
