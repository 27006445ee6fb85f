"""This module cuts every expert of a Model to its best neurons, lets fewer experts be active, and refits what remains.

Stock llama.cpp has one expert width and one top-k for all layers, so each is one number for the whole plan.  The program is solved for each
width on the prices of this width, in which the cost of narrowing itself is a constant (docs/pricing.md, 15 and 16).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from edgemoe.base.errors import UsageError
from edgemoe.base.progress import Progress
from edgemoe.base.storage import load_sealed, save_sealed
from edgemoe.base.types import F64
from edgemoe.base.work import key_of, open_or_make, path_of
from edgemoe.ir import Costs, Model
from edgemoe.model.describe import can_resize, resize_experts
from edgemoe.model.overlay import open_overlay, save_overlay
from edgemoe.model.routing.flips import without_flips
from edgemoe.repair.experts import RATE, RIDGE, Experts, Tokens
from edgemoe.repair.reconstruct import refit_layer, resume
from edgemoe.repair.two_streams import DOMAIN_POWER, GUARD_EVERY, TwoStreams
from edgemoe.stream.gradients import collect_gradients, load_gradients
from edgemoe.stream.layers import default_device
from edgemoe.stream.texts import Text, texts_key
from edgemoe.stream.windows import WINDOW

BLOCK, SUPER_BLOCK = 32, 256  # weights of a block; a row of W_down has one weight for each neuron, so the block must divide the width
AUTO_SHARES = (1.0, 0.75, 0.5)  # shares of the width that are tried, by "auto" and where no width was asked for
# Bits of the file for a weight of the checkpoint, below which narrower experts are tried unasked (benchmarks/results/width.md).
FEW_BITS = 2.75
# A narrowed model loses more on held-out text than on guard windows, because these lie in documents that were fitted to.  Plans without
# narrowing also lose more or less than predicted; UNSEEN is the quotient, which holds only what narrowing adds
# (docs/decisions/0010-narrow.md).
#
#                held-out KL / KL on guard windows,   held-out KL / predicted KL,   quotient
#                narrowed models                      plans without narrowing
#   tiny-moe-b   1.8                                  1.2                           1.5
#   tiny-moe     1.5                                  0.95                          1.6
UNSEEN = 1.5


@dataclass(frozen=True, slots=True, kw_only=True)
class Narrowed:
    """A narrowed model, the KL of narrowing by domain (nats per token, on windows that nothing was fitted to), and its work folder."""

    model: Model
    kl: tuple[float, ...]
    work: Path
    width: int = 0  # neurons of every expert; 0: as in the checkpoint
    unseen: float = UNSEEN  # KL expected on other text, over `kl`

    def loss(self, costs: Costs, objective: str) -> float:
        """Expected KL of narrowing alone on unseen text, by the objective: the weighted mean over domains, or the worst domain."""
        return self.unseen * (max(self.kl) if objective == "worst" else float(costs.weights @ np.array(self.kl)))


# ------------------------------------------------------------------------------------------------------------------ widths
def choose_widths(model: Model, asked: str, form: str = "stacks") -> tuple[int, ...]:
    """Widths to try, falling: the width that was asked for, or the whole, three quarters and half, if formats can store them.

    Args:
        model: the original.
        asked: a number of neurons; "full"; "auto" for those of the three that some format can store; "" for those that formats below 4 bits
            can store too.  In the experts form, "" means the full width.
        form: of the plan, as in Costs.

    Raises:
        UsageError: the width is not possible; the message names the possible ones.
    """
    if asked in ("full", str(model.expert.size)) or (not asked and form == "experts"):
        return (model.expert.size,)
    possible = [width for width in range(BLOCK, model.expert.size, BLOCK) if can_resize(model, width)]
    if asked in ("", "auto"):
        wanted, block = [round(model.expert.size * share) for share in AUTO_SHARES], BLOCK if asked else SUPER_BLOCK
        return tuple(w for w in wanted if w == model.expert.size or (w in possible and w % block == 0))
    if not asked.isdecimal() or int(asked) not in possible:
        best = [str(w) for w in possible if w % SUPER_BLOCK == 0]
        all_possible = len(possible) == (model.expert.size - 1) // BLOCK > 16
        every = f"multiples of {BLOCK} below {model.expert.size}" if all_possible else ", ".join(map(str, possible)) or "none"
        hint = f"give auto, full, or one of: {every}"
        raise UsageError(
            f"--width {asked}: {model.name} has experts of {model.expert.size} neurons and cannot have such ones",
            hint=f"{hint}; formats below 4 bits need {', '.join(best)}" if best else hint,
        )
    return (int(asked),)


def choose_top_k(model: Model, asked: int | None) -> int:
    """Experts that the router is to pick: the number that was asked for, or the checkpoint's.

    More experts than the checkpoint's k are refused, because the model was never trained to mix them in.

    Raises:
        UsageError: less than one, or more than the checkpoint's.
    """
    if asked is None:
        return model.top_k
    if not 1 <= asked <= model.top_k:
        raise UsageError(f"--top-k {asked}: the router of {model.name} picks {model.top_k}", hint=f"give 1 to {model.top_k}")
    return asked


# ------------------------------------------------------------------------------------------------------------------ scores
def magnitude(experts: Experts) -> F64:
    """Product of the norms of a neuron's gate row, up row and down column [E, M]; it breaks ties between HEAPr's scores."""
    norms = experts.gate.norm(dim=2) * experts.up.norm(dim=2) * experts.down.norm(dim=1)
    return np.asarray(norms.double().cpu().numpy())


def best_neurons(score: F64, ties: F64, width: int) -> NDArray[np.int64]:
    """The `width` best neurons of each expert [E, width], by rising index.

    `ties` decides if scores are equal, as they are in an expert that saw no token.
    """
    order = np.stack([np.lexsort((t, s))[::-1] for s, t in zip(score, ties, strict=True)])
    return np.sort(order[:, :width], axis=1)


def cut(experts: Experts, neurons: NDArray[np.int64]) -> Experts:
    """The experts with only these neurons [E, width] of each."""
    gate, up, down = (
        torch.stack([s.index_select(dim, torch.from_numpy(n).to(s.device)) for s, n in zip(stack, neurons, strict=True)])
        for stack, dim in zip(experts.stacks, (0, 0, 1), strict=True)
    )
    return Experts(gate=gate, up=up, down=down)


# ----------------------------------------------------------------------------------------------------------------- the job
def narrow_experts(
    model: Model,
    texts: Sequence[Text],
    width: int,
    work: Path,
    *,
    top_k: int | None = None,
    max_tokens: int,
    epochs: int = 0,
    progress: Progress | None = None,
) -> Narrowed:
    """Cut every expert to its best neurons and refit these to the original's outputs, layer by layer on the changed stream.

    With a smaller top-k, the router of the changed stream picks fewer experts, and the refit makes up for the experts that it leaves out.

    Args:
        model: the original.
        texts: calibration texts with weights.
        width: neurons that stay; the full width changes nothing.
        work: folder for the gradients (shared by all widths and by rounding), for the new weights (in a subfolder named by what they are
            made from), and for what a killed run goes on from.
        top_k: experts that the router picks, at most the checkpoint's; None: as many.
        max_tokens: of all texts together.
        epochs: of descent on all three matrices after W_down's closed form; -1 refits nothing.
        progress: called with (steps done, all steps).
    """
    start = model if top_k in (None, model.top_k) else model.with_top_k(top_k)
    whole = width == model.expert.size
    if whole and start is model:
        return Narrowed(model=model, kl=(0.0,) * len(texts), work=work)
    layers, base = model.n_layers, resize_experts(start, width)
    steps = layers if whole else 3 * layers

    def tell(done: int) -> None:
        if progress:
            progress(done, steps)

    fit = (WINDOW, max_tokens, GUARD_EVERY, epochs, RATE, RIDGE, DOMAIN_POWER, default_device(), width, start.top_k)
    key = key_of("narrow", model.fingerprint, texts_key(texts), fit)
    folder = path_of(work.absolute(), f"narrow-{width}-{start.top_k}", key)

    def make() -> Model:
        scores = None if whole else collect_gradients(model, texts, work, max_tokens=max_tokens, progress=lambda done, _: tell(done))
        streams = TwoStreams(model, start, texts, max_tokens, folder, key)

        def change(layer: int, _: Tokens, experts: Experts) -> Experts:
            if scores is None:
                return experts
            heapr = np.asarray(load_gradients(scores, layer)["heapr"], np.float64)
            return cut(experts, best_neurons(heapr, magnitude(experts), width))

        for layer in resume(streams, lambda done, _: tell(steps - layers + done)):
            refit_layer(streams, layer, range(model.n_experts), epochs=epochs, change=change)
            tell(steps - layers + layer + 1)
        save_sealed(folder / "kl.json", {"kl": streams.measure()})
        return save_overlay(base, folder, {})

    made = open_or_make(folder, lambda: _open_narrowed(base, folder), make)
    kl = tuple(load_sealed(folder / "kl.json")["kl"])
    return Narrowed(model=made, kl=kl, work=folder, width=0 if whole else width, unseen=UNSEEN if epochs >= 0 else 1.0)


def _open_narrowed(base: Model, folder: Path) -> Model | None:
    """The narrowed model that a folder holds, if its weights and its KL are whole; None if there is none."""
    made = open_overlay(base, folder, {})
    if made is not None:
        load_sealed(folder / "kl.json")
    return made


def charge(costs: Costs, narrowed: Narrowed) -> Costs:
    """The price list of a narrowed model, with the cost q of narrowing added to every plan and spread over the layers.

    A plan that does nothing else is then predicted to have `unseen` times the measured KL: q + kappa sqrt(q) = unseen * KL.
    """
    kl = narrowed.loss(costs, "mean")
    if not kl:
        return costs
    q = float(without_flips(kl, costs.kappa))
    each = narrowed.unseen * np.array(narrowed.kl) * q / kl / costs.n_layers  # [D]
    width = narrowed.width
    if costs.form == "stacks":
        return replace(costs, width=width, drop_cost=costs.drop_cost + each[:, None, None])
    return replace(costs, width=width, drop_curve=costs.drop_curve + float(costs.weights @ each))
