"""Model, a changed Model, texts -> the changed one's experts, refitted a layer at a time (docs/pricing.md, 10, 12 and 15).

Two streams run side by side: the original, and the changed one as refitted so far.  In each layer the experts that are left are fitted so
that the changed stream leaves the layer as the original does, which also undoes what earlier layers left.  New weights lie in the work
folder, one file per layer; after each layer everything is on disk, so a killed run goes on with the next and gives the same bytes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial, reduce
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from edgemoe.base.progress import Progress
from edgemoe.base.storage import array_file, load_arrays, save_arrays
from edgemoe.base.types import F32, F64
from edgemoe.base.work import Steps
from edgemoe.ir import PROJECTIONS, Model, is_stack
from edgemoe.model.checkpoint import DTYPES, read_tensor
from edgemoe.repair.align import PairSums, refit_matrix, sum_pairs
from edgemoe.repair.experts import Experts, Tokens, fill_residual, refit_layer
from edgemoe.repair.output_map import HeadInputs, descend_map
from edgemoe.repair.quantize_layer import Packed, QuantizePlan, quantize_experts, quantize_matrices
from edgemoe.repair.router_gram import RouterGram, add_flips
from edgemoe.repair.vocabulary import GROUPS, gradient_sums, group_metrics, group_rows, masses, quantize_rows_by_group
from edgemoe.stream.adapter import weights_of
from edgemoe.stream.gradients import open_gradients
from edgemoe.stream.layers import LayerStream, Recorder, apply_norm, only_experts, recording
from edgemoe.stream.passes import map_ordered, token_kl
from edgemoe.stream.states import States
from edgemoe.stream.texts import Text, text_weights
from edgemoe.stream.windows import WINDOW, tokenize

GUARD_EVERY = 7  # windows: one of them decides whether a refit helps, the others are fitted to
DOMAIN_POWER = 0.5  # domains count by (weight / tokens) / residual^0.5: between equal tokens and equal relative errors
Pair = tuple[torch.Tensor, torch.Tensor]  # what matrices receive, and what they should give
Change = Callable[[int, Tokens, Experts], Experts]  # layer, what its experts see, its experts -> those to refit


# ------------------------------------------------------------------------------------------------------------ two streams
class Reconstruction:
    """The original and a changed model, side by side over the calibration texts."""

    def __init__(
        self,
        model: Model,
        start: Model,
        texts: Sequence[Text],
        max_tokens: int,
        work: Path,
        key: str,
        quantize_plan: QuantizePlan | None = None,
    ) -> None:
        """Open both models and the texts.

        Args:
            model: the original.
            start: the changed model as it starts.
            texts: calibration texts.
            max_tokens: of them together.
            work: folder for what is made.
            key: of what is made.
            quantize_plan: round every matrix as the stream reaches it; None: weights stay unrounded.
        """
        self.model, self.work, self.steps, self.quantize_plan = model, work, Steps(work, key), quantize_plan
        self.original = LayerStream(model)
        self.changed = self.original if start is model else LayerStream(start)
        self.windows = windows = tokenize(model, texts, max_tokens, WINDOW)
        self.weights, self.routers = text_weights(texts), RouterGram(start)
        work.mkdir(parents=True, exist_ok=True)
        self.real = windows.real
        self.first = np.concatenate([[0], np.cumsum(windows.lengths)])  # row of each window's first token
        number = np.array([np.sum(windows.domain[:i] == d) for i, d in enumerate(windows.domain)])  # of each window in its domain
        self.guard_windows = number % GUARD_EVERY == GUARD_EVERY // 2
        self.guard = np.repeat(self.guard_windows, windows.lengths)
        self.each = np.repeat(windows.token_weights(self.weights), windows.lengths).astype(np.float32)  # weight of every token

    def states(self, name: str, layer: int) -> States:
        """Hidden states before a layer: "original" or "changed"."""
        return States(self.work / f"{name}-{layer}.bin", (*self.windows.tokens.shape, self.model.hidden_size))

    def rows(self, index: NDArray[np.int64]) -> slice:
        """Token rows of a chunk of windows."""
        return slice(int(self.first[index[0]]), int(self.first[index[-1] + 1]))

    def resume(self, progress: Progress | None) -> range:
        """The layers still to do, after a fresh start or a killed run."""
        start = int(self.steps.read()["done"])
        if start == 0:
            original, changed = self.states("original", 0), self.states("changed", 0)
            table = self._quantize_embedding() if self.quantize_plan else None
            for index in self.windows.chunks():
                original.write(index, self.original.embed(self.windows.tokens[index]))
                changed.write(index, self.original.embed(self.windows.tokens[index], table))
            original.close()
            changed.close()
        if progress:
            progress(start, self.model.n_layers)
        return range(start, self.model.n_layers)

    def refit_layer(self, layer: int, kept: Sequence[int], *, epochs: int, change: Change | None = None) -> None:
        """Run both streams through a layer, refit and quantize what is asked for, leave weights and states on disk.

        Args:
            layer: the next one.
            kept: experts that stay; none where the layer has no experts.
            epochs: of descent after the closed form; 0 refits W_down alone, -1 nothing.
            change: what is done to the experts before they are refitted.
        """
        module = self.original.load_layer(layer)
        following, attended = self.states("original", layer + 1), self.states("attended", layer)
        shared = self.states("shared", layer) if self.model.find("ffn_down_shexp", layer) else None
        self._run_original(module, layer, following, attended, shared)
        if self.changed is not self.original:
            self.original.unload_layer(layer)
            module = self.changed.load_layer(layer)
        arrays = self._quantize_steps(module, layer, following, attended, shared) if self.quantize_plan else {}
        for states in (attended, shared):
            if states is not None:
                states.close(delete=True)
        if layer in self.model.moe_layers:
            arrays |= self._refit_experts(module, layer, kept, following, epochs=epochs, change=change)
        else:
            self._run_dense(module, layer)
        self.changed.unload_layer(layer)
        following.close()
        save_arrays(self.work / array_file(layer), arrays)
        self.steps.note(layer + 1)
        for old in self.work.glob(f"*-{layer}.bin"):
            old.unlink()

    def _refit_experts(
        self, module: Any, layer: int, kept: Sequence[int], following: States, *, epochs: int, change: Change | None
    ) -> Packed:
        """Refit the experts if any went or were changed, quantize them, and write the changed stream as they leave it."""
        tokens = self._run_changed(module, layer, np.array(kept), following)
        views = [weights_of(module, f"ffn_{p}_exps") for p in PROJECTIONS]
        gate, up, down = (view[list(kept)] for view in views)
        experts = Experts(gate=gate.clone(), up=up.clone(), down=down.clone())
        del views, gate, up, down
        self.changed.unload_layer(layer)
        residual = self._array("residual", self.model.hidden_size)
        if change is not None:
            experts = change(layer, tokens, experts)
            fill_residual(tokens, experts, residual)
            domains = np.repeat(self.windows.domain, self.windows.lengths)
            error = np.bincount(domains, np.square(residual).sum(axis=1, dtype=np.float64), len(self.weights))
            tokens = replace(tokens, weights=self._weigh(error.astype(np.float64)))
        dtype = DTYPES[self.model.get("ffn_down_exps", layer, 0).dtype]
        if epochs >= 0 and (change is not None or len(kept) < self.model.n_experts):
            refit_layer(tokens, experts, residual, epochs=epochs, store=lambda e: _round(e, dtype))
        else:
            fill_residual(tokens, experts, residual)
        if self.quantize_plan:
            arrays = quantize_experts(self.quantize_plan, layer, tokens, experts, residual, kept, self.routers.from_layer(layer + 1))[0]
        else:
            arrays = {
                f"ffn_{p}_exps.{expert}": stack[n].cpu().numpy().astype(dtype)
                for p, stack in zip(PROJECTIONS, experts.stacks, strict=True)
                for n, expert in enumerate(kept)
            }
        self._leave(layer, following, residual)
        return arrays

    def _run_original(self, module: Any, layer: int, following: States, attended: States, shared: States | None) -> None:
        """Write the original's states after the layer; where matrices are quantized, also after attention, and what shared experts give."""
        before = self.states("original", layer)

        def run(index: NDArray[np.int64]) -> None:
            with recording(Recorder(outputs={})) as seen:
                out = self.original.run_layer(module, before.read(index))
            following.write(index, out)
            if self.quantize_plan:
                assert seen.ffn_output is not None
                attended.write(index, out - seen.ffn_output.view_as(out))
                if shared is not None and seen.outputs is not None:
                    shared.write(index, seen.outputs["ffn_down_shexp"].view_as(out))

        for _ in map_ordered(run, self.windows.chunks(), device=self.original.device):
            pass
        before.close()

    def _run_dense(self, module: Any, layer: int) -> None:
        """Write the changed stream as a layer without experts leaves it."""
        before, after = self.states("changed", layer), self.states("changed", layer + 1)
        run = partial(self.changed.run_layer, module)
        for _ in map_ordered(lambda index: after.write(index, run(before.read(index))), self.windows.chunks(), device=self.changed.device):
            pass
        before.close()
        after.close()

    def _run_changed(self, module: Any, layer: int, kept: NDArray[np.int64], original: States) -> Tokens:
        """What the survivors receive in the changed stream, and what they would have to give for it to leave the layer as the original."""
        before, k, hidden = self.states("changed", layer), self.changed.model.top_k, self.model.hidden_size
        x, target = self._array("input", hidden), self._array("target", hidden)
        gradients = self._read_gradients(layer)
        chosen, gates = np.zeros((len(x), k), np.int32), np.zeros((len(x), k), np.float32)
        position = {int(expert): n for n, expert in enumerate(kept)}

        def run(index: NDArray[np.int64]) -> F64:
            real = torch.from_numpy(self.real[index].ravel())
            slots = torch.zeros(len(real), dtype=torch.int64)
            who, how_much = torch.zeros(len(real), k, dtype=torch.int32), torch.zeros(len(real), k)

            def note(expert: int, token: torch.Tensor, _: Any, __: Any, ___: Any, gate: torch.Tensor) -> None:
                token = token.cpu()
                who[token, slots[token]], how_much[token, slots[token]] = position[expert], gate.cpu()
                slots[token] += 1

            with recording(Recorder(on_expert=note)) as seen:
                out = self.changed.run_layer(module, before.read(index))
            assert seen.moe_input is not None
            assert seen.moe_output is not None
            wanted = original.read(index).to(out.device) - out + seen.moe_output.view_as(out)
            rows = self.rows(index)
            x[rows] = seen.moe_input.cpu()[real].numpy()
            target[rows] = wanted.flatten(0, 1).cpu()[real].numpy()
            chosen[rows], gates[rows] = who[real].numpy(), how_much[real].numpy()
            error = (wanted - seen.moe_output.view_as(out)).square().sum(-1).cpu().double().numpy() * self.real[index]
            sums: F64 = np.bincount(self.windows.domain[index], error.sum(axis=1), len(self.weights)).astype(np.float64)
            return sums

        with only_experts(module, kept):
            error = sum(map_ordered(run, self.windows.chunks(), device=self.changed.device))
        before.close()
        weights = self._weigh(np.asarray(error))
        return Tokens(x=x, target=target, chosen=chosen, gates=gates, weights=weights, guard=self.guard, gradients=gradients)

    def _read_gradients(self, layer: int) -> F32 | None:
        """Gradients of the loss with respect to what leaves a layer, by the root of the token's weight [tokens, H]."""
        if not self.quantize_plan:
            return None
        rows = self._array("gradients", self.model.hidden_size)
        with open_gradients(self.quantize_plan.gradients, layer, self.windows, self.model.hidden_size) as kept:
            for index in self.windows.chunks():
                real, at = torch.from_numpy(self.real[index].ravel()), self.rows(index)
                rows[at] = kept.read(index).flatten(0, 1)[real].numpy() * np.sqrt(self.each[at])[:, None]
        return rows

    def _weigh(self, error: F64) -> F32:
        """Weight of every token, mean one, from the summed squared residual of each domain [D]."""
        n = self.windows.count_tokens(len(error))
        each = self.weights / n / np.maximum(error / n, 1e-30) ** DOMAIN_POWER
        tokens = np.repeat(each[self.windows.domain], self.windows.lengths)
        weights: F32 = (tokens / tokens.mean()).astype(np.float32)
        return weights

    def _array(self, name: str, width: int) -> F32:
        """Scratch [tokens, width] in a file."""
        return np.memmap(self.work / f"{name}.bin", np.float32, "w+", shape=(int(self.first[-1]), width))

    def _sums(
        self,
        changed: States,
        original: States,
        pair: Callable[[torch.Tensor, torch.Tensor], Pair],
        factors: F32 | None = None,
    ) -> tuple[PairSums, PairSums]:
        """What a matrix receives and should give, as `pair` makes it of both streams' states, summed over fitted and guard tokens.

        `factors` [tokens], if given, say how much more than by their weight tokens count.
        """
        each = self.each if factors is None else self.each * factors

        def chunk(index: NDArray[np.int64]) -> tuple[PairSums, PairSums]:
            rows, real = self.rows(index), torch.from_numpy(self.real[index].ravel())
            x, y = (side.flatten(0, 1).cpu()[real] for side in pair(changed.read(index), original.read(index)))
            weights, guard = torch.from_numpy(each[rows]), torch.from_numpy(self.guard[rows])
            return sum_pairs(x, y, weights * ~guard), sum_pairs(x, y, weights * guard)

        parts: Iterator[tuple[PairSums, PairSums]] = map_ordered(chunk, self.windows.chunks(), device=self.changed.device)
        return reduce(lambda a, b: (a[0] + b[0], a[1] + b[1]), parts)  # as they come: each is as large as the matrix

    def _quantize_steps(self, module: Any, layer: int, following: States, attended: States, shared: States | None) -> Packed:
        """Refit and quantize the layer's matrices that are no experts', step by step, on what the changed stream brings each.

        What reads a norm, routers and experts too, is refitted to read what the original norm gives; what writes the stream is refitted to
        the difference that the original makes there, a shared expert's W_down to what the original's gives.
        """
        assert self.quantize_plan is not None
        model, packed = self.changed.model, Packed()
        before, original = self.states("changed", layer), self.states("original", layer)
        wanted = {"attn_norm": original, "attn_mix": attended, "ffn_norm": attended}
        wanted |= {"dense_hidden": following, **({"shared_hidden": shared} if shared else {})}
        for step in model.steps(layer):
            plain = {role: weights_of(module, role) for role in model.plain_roles(layer, step)}
            target = wanted.get(step.reads)
            if target is None:
                continue  # read by experts alone, which come last
            if step.reads.endswith("norm"):
                sums = self._sums(before, target, partial(self._pair_norms, module, step.reads))
                readers = {role: weights_of(module, role) for role in step.roles}
                fold_map(read_map(sums), *readers.values())
                packed |= {
                    f"{role}.-1": view.cpu().numpy().reshape(model.get(role, layer).shape).copy()
                    for role, view in readers.items()
                    if role not in plain and not is_stack(role)
                }
                routers = None
            else:
                sums = self._sums(before, target, partial(self._pair_outputs, module, step.reads))
                for view in plain.values():
                    view.copy_(torch.from_numpy(refit_matrix(view.cpu().numpy(), *sums)))
                routers = self.routers.from_layer(layer if step.reads == "attn_mix" else layer + 1)
            if plain:
                packed |= quantize_matrices(self.quantize_plan, plain, layer, sums, routers)
        before.close()
        original.close()
        return packed

    def _attend(self, module: Any, states: torch.Tensor) -> tuple[torch.Tensor, Recorder]:
        """The changed stream after a layer's attention, and what attention saw."""
        with recording(Recorder(attention_only=True)) as seen:
            return self.changed.run_layer(module, states), seen

    def _pair_norms(self, module: Any, activation: str, changed: torch.Tensor, original: torch.Tensor) -> Pair:
        """What a norm gives in both streams: of the layer's input, or of the stream after attention."""
        if activation == "ffn_norm":
            changed = self._attend(module, changed)[0]
        return normed(changed, original, weights_of(module, activation), self.model.norm_eps)

    def _pair_outputs(self, module: Any, activation: str, changed: torch.Tensor, original: torch.Tensor) -> Pair:
        """What a matrix that writes the stream reads in the changed one, and what it should add to it."""
        device = self.changed.device
        if activation == "attn_mix":
            seen, start = self._attend(module, changed)[1], changed
        else:
            with recording(Recorder(skip_experts=True)) as seen:
                self.changed.run_layer(module, changed)
            start = self._attend(module, changed)[0] if activation == "dense_hidden" else torch.zeros(())
        x = seen.inputs[activation].view(*changed.shape[:2], -1)
        return x, original.to(device) - start.to(device)

    def _quantize_embedding(self) -> F32:
        """Pack the embedding and leave it on disk; what it decodes to: the changed stream starts from that."""
        assert self.quantize_plan is not None
        weights = read_tensor(self.model.folder, self.model.get("token_embd"))
        group, gradients = group_rows(weights), self._read_gradients(-1)
        assert gradients is not None
        metrics = None  # of a matrix that is the output's too, what follows is not the whole story
        if not self.model.is_tied:
            of_token = group[np.concatenate([w[:n] for w, n in zip(self.windows.tokens, self.windows.lengths, strict=True)])]
            seen = np.bincount(of_token[~self.guard], minlength=GROUPS)
            sums, routers = gradient_sums(of_token, gradients, self.guard), self.routers.from_layer(0)
            fitted, guard = ([add_flips(one[side], routers, self.quantize_plan.flips) for one in sums] for side in (0, 1))
            metrics = group_metrics(list(zip(fitted, guard, strict=True)), seen.tolist())
        packed, values = quantize_rows_by_group(self.quantize_plan, "token_embd", weights, group, metrics)
        save_arrays(self.work / array_file(-1), {"token_embd.-1": packed})
        return values

    def quantize_output(self) -> None:
        """Pack the output matrix, if there is one, on what the changed stream brings it; the embedding was packed first of all."""
        if self.quantize_plan and not self.model.is_tied:
            before, original = (self.states(name, self.model.n_layers) for name in ("changed", "original"))
            norm, output, eps = self.original.head()
            sums = self._sums(before, original, lambda x, y: normed(x, y, norm, eps))

            def read(window: int) -> HeadInputs:
                index, n = np.array([window]), int(self.windows.lengths[window])
                x, y = normed(before.read(index)[0, :n], original.read(index)[0, :n], norm, eps)
                return HeadInputs(x, y, torch.from_numpy(self.each[self.rows(index)]).to(output.device))

            fitted, guard = np.flatnonzero(~self.guard_windows).tolist(), np.flatnonzero(self.guard_windows).tolist()
            group = group_rows(output.cpu().numpy())
            windows = range(len(self.windows.lengths))
            mass = np.concatenate(list(map_ordered(lambda w: masses(read(w).original, output, group), windows, device=output.device)))
            fold_map(descend_map(read_map(sums).to(output.device), output, read, fitted, guard), output)
            own = [self._sums(before, original, lambda x, y: normed(x, y, norm, eps), mass[:, i]) for i in range(GROUPS)]
            share = mass[~self.guard].sum(axis=0) / max(mass[~self.guard].sum(), 1e-30)
            seen = share * int((~self.guard).sum())
            metrics = group_metrics([(fitted.gram, guard.gram) for fitted, guard in own], seen.tolist())
            packed = quantize_rows_by_group(self.quantize_plan, "output", output.cpu().numpy(), group, metrics)[0]
            save_arrays(self.work / array_file(-1), {**load_arrays(self.work / array_file(-1)), "output.-1": packed})
            before.close()
            original.close()

    def _leave(self, layer: int, following: States, residual: F32) -> None:
        """Write the changed stream as it leaves the repaired layer: the original less the residual."""
        changed = self.states("changed", layer + 1)
        for index in self.windows.chunks():
            out = following.read(index)
            out[torch.from_numpy(self.real[index])] -= torch.from_numpy(np.asarray(residual[self.rows(index)]))
            changed.write(index, out)
        changed.close()

    def measure(self) -> tuple[float, ...]:
        """KL(original || changed) in nats per token, by domain, after the last layer: on the windows that nothing was fitted to.

        A text too short to have such windows is measured on what it has.
        """
        norm, output, eps = self.original.head()
        original, changed = (self.states(name, self.model.n_layers) for name in ("original", "changed"))
        domains = self.windows.domain
        fresh = np.array([self.guard_windows[i] or not self.guard_windows[domains == d].any() for i, d in enumerate(domains)])

        def one(window: int) -> float:
            index, n = np.array([window]), int(self.windows.lengths[window])
            before, after = (apply_norm(s.read(index)[0, :n], norm, eps) @ output.T for s in (original, changed))
            return float(token_kl(before.double().log_softmax(-1), after).sum())

        chosen = np.flatnonzero(fresh)
        sums = np.array(list(map_ordered(one, chosen.tolist(), device=self.original.device)))
        original.close()
        changed.close()
        n = len(self.weights)
        kl = np.bincount(domains[chosen], sums, n) / np.bincount(domains[chosen], self.windows.lengths[chosen], n)
        return tuple(float(v) for v in kl)


def normed(changed: torch.Tensor, original: torch.Tensor, norm: torch.Tensor, eps: float) -> Pair:
    """Both streams' states after a norm."""
    return apply_norm(changed, norm, eps), apply_norm(original, norm, eps)


def read_map(sums: tuple[PairSums, PairSums]) -> torch.Tensor:
    """The map [H, H] from what the changed stream brings to what the original reads."""
    return torch.from_numpy(refit_matrix(np.eye(len(sums[0].gram), dtype=np.float32), *sums))


def fold_map(read_map: torch.Tensor, *matrices: torch.Tensor) -> None:
    """Let matrices [.., H] read through a map, in place."""
    for matrix in matrices:
        matrix.copy_(matrix @ read_map.to(matrix.device))


def _round(experts: Experts, dtype: Any) -> None:
    """As the files hold them: in the checkpoint's own type, so that a repair costs no more bytes than what it repairs."""
    for stack in experts.stacks:
        stack.copy_(torch.from_numpy(stack.cpu().numpy().astype(dtype).astype(np.float32)))
