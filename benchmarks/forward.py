"""A Forward runs plans in transformers instead of llama.cpp: any experts dropped, any tensor in any format, KL in a second or two.

The whole model is held in memory, so this is for small ones.  Rounded tensors are the target's own, kept between plans.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import nullcontext
from typing import Any

import numpy as np
import torch

from edgemoe.ir import Model, Stats
from edgemoe.quantize.importance import importance_of
from edgemoe.quantize.reference import round_to_nearest
from edgemoe.stream.adapter import only_experts, weights_of
from edgemoe.stream.layers import LayerStream, apply_norm
from edgemoe.stream.passes import map_ordered
from edgemoe.stream.windows import Windows
from edgemoe.targets import Target

Unit = tuple[str, int]  # role, layer
STACKS = ("ffn_gate_exps", "ffn_up_exps", "ffn_down_exps")
MATRICES = ("attn_q", "attn_k", "attn_v", "attn_output")
ENDS = ("token_embd", "output")


class Forward:
    """A model in memory, some windows, and how any plan for it does on them."""

    def __init__(self, model: Model, stats: Stats, target: Target, windows: Windows) -> None:
        self.model, self.target, self.windows = model, target, windows
        self.stream = LayerStream(model, device="cpu")
        self.modules = [self.stream.load_layer(layer) for layer in range(model.n_layers)]
        self.importance = {layer: importance_of(model, stats, layer) for layer in range(-1, model.n_layers)}
        self.norm, output, self.eps = self.stream.head()
        ends = model.of_layer(-1)
        self.weights: dict[Unit, torch.Tensor] = {("token_embd", -1): self.stream.read(ends["token_embd", -1]), ("output", -1): output}
        for layer, module in enumerate(self.modules):
            self.weights |= {(role, layer): view.clone() for role, view in self._views(module).items()}
        self.rounded: dict[tuple[Unit, str], torch.Tensor] = {}
        self.chunks = windows.chunks()
        self.before: dict[int, list[torch.Tensor]] = {}  # the original's states before each layer, a chunk each
        self.there: dict[Unit, Any] = {}  # what the layers hold now
        with torch.inference_mode():
            last = self._states({}, None, {})
            self.original = [self._log_p(x, output, number) for number, x in enumerate(last)]

    def _views(self, module: Any) -> dict[str, torch.Tensor]:
        params = dict(module.named_parameters())
        views = {role: params[f"self_attn.{role[5] if role != 'attn_output' else 'o'}_proj.weight"].data for role in MATRICES}
        return views | {role: weights_of(module, role) for role in STACKS}

    def store(self, unit: Unit, name: str) -> torch.Tensor:
        """The unit's weights as a format (or `rtnN`: round to nearest in N bits) leaves them; F32 is what they are."""
        if name == "F32":
            return self.weights[unit]
        if (unit, name) not in self.rounded:
            role, layer = unit
            whole, known = self.weights[unit].numpy(), self.importance[layer]
            if name.startswith("rtn"):
                found = round_to_nearest(whole, int(name[3:]))
            elif whole.ndim == 3:
                found = np.stack([self.target.round_rows(w, name, known[role, e]) for e, w in enumerate(whole)])
            else:
                found = self.target.round_rows(whole, name, known.get((role, -1)))
            self.rounded[unit, name] = torch.from_numpy(found)
        return self.rounded[unit, name]

    def _states(self, formats: Mapping[Unit, str], kept: Any, experts: Mapping[Unit, torch.Tensor]) -> list[torch.Tensor]:
        """Normed last states of each chunk of windows, from the first layer on that differs from the original."""
        first = min([layer for _, layer in {**formats, **experts} if layer >= 0], default=self.model.n_layers)
        if kept is not None:
            first = min([first, *(n for n, k in enumerate(kept) if len(k) < self.model.n_experts)])
        if ("token_embd", -1) in formats or not self.before:
            table, first = self.store(("token_embd", -1), formats.get(("token_embd", -1), "F32")), 0
            states = [table[torch.from_numpy(self.windows.tokens[index])] for index in self.chunks]
        else:
            states = self.before[first]
        fresh = not self.before
        for layer in range(first, self.model.n_layers):
            module = self.modules[layer]
            if fresh:
                self.before[layer] = states
            self._fill(layer, formats, experts)

            def run(x: torch.Tensor, module: Any = module) -> torch.Tensor:
                return self.stream.run_layer(module, x)

            with nullcontext() if kept is None else only_experts(module, np.array(kept[layer])):
                states = list(map_ordered(run, states, device=self.stream.device))
        if fresh:
            self.before[self.model.n_layers] = states
        return [apply_norm(x, self.norm, self.eps) for x in states]

    def _fill(self, layer: int, formats: Mapping[Unit, str], experts: Mapping[Unit, torch.Tensor]) -> None:
        """Put the asked weights into a layer, leaving alone those that are there already."""
        for role, view in self._views(self.modules[layer]).items():
            unit = (role, layer)
            wanted = experts.get(unit, formats.get(unit, "F32"))
            if self.there.get(unit) is not wanted and self.there.get(unit) != wanted:
                view.copy_(self.store(unit, wanted) if isinstance(wanted, str) else wanted)
                self.there[unit] = wanted

    def layer_output(self, layer: int, formats: Mapping[Unit, str], kept: Any) -> list[torch.Tensor]:
        """States after one changed layer that receives what the original does."""
        self._fill(layer, formats, {})
        with only_experts(self.modules[layer], np.array(kept[layer])):
            return [self.stream.run_layer(self.modules[layer], x) for x in self.before[layer]]

    def _log_p(self, states: torch.Tensor, head: torch.Tensor, number: int) -> torch.Tensor:
        length = self.windows.tokens.shape[1]
        real = torch.from_numpy((np.arange(length)[None] < self.windows.lengths[self.chunks[number]][:, None]).ravel())
        return (states.flatten(0, 1)[real] @ head.T).double().log_softmax(-1)

    def kl(self, formats: Mapping[Unit, str], kept: Any = None, experts: Mapping[Unit, torch.Tensor] | None = None) -> np.ndarray:
        """KL(original || plan) of every real token, nats, in the order of the windows.

        Args:
            formats: of tensors by (role, layer); those not named stay as they are.
            kept: experts of each layer; None: all.
            experts: weights that take the place of whole tensors.
        """
        changed = self._states(formats, kept, experts or {})
        head = self.store(("output", -1), formats.get(("output", -1), "F32"))

        def measure(number: int) -> np.ndarray:
            p, q = self.original[number], self._log_p(changed[number], head, number)
            return (p.exp() * (p - q)).sum(-1).numpy()

        with torch.inference_mode():
            return np.concatenate(list(map_ordered(measure, range(len(self.chunks)), device=self.stream.device)))
