"""This module prices a model without weights or calibration, from measurements of other models; `origin` in Costs says so.

The prices are good enough to plan with before a download, and never as good as those of `price_choices`.

Quantize.  cost(tensor, format) = whole * types[format] * share(tensor).
- `types` is measured on ten large MoE models.  For each type it is the median of (KLD of the model in this type, less the floor) / (the
  same in Q4_K).  The floor is the KLD that any rounding causes by flipped router choices, 0.006 nats in the median.  `whole` is the median
  KLD, less the floor, of models stored in Q4_K.  The medians follow the squared rounding error, which stands in for types that fewer than
  three models have.
- share is measured on 16 MoE models: the KLD of degrading a single tensor to a type of 1 or 2 bits, less the 2 % quantile of the model's
  tensors, as a share of the model's sum.  It is a mean by role and by relative depth.  The depth profile counts by its square root, because
  models differ in it.  Over the 16 pairs of an MoE model and a type, the median sum over single tensors is 0.99 times the KLD of the whole
  model (benchmarks/additivity.py).
- A layer weighs as much against embedding and output as in a model of 61 layers, the median of the measured ones, however many layers the
  model has.  The alternative gives all layers together a fixed share.  The measured models (40 to 94 layers) fit both equally well; the
  bundled models (2 and 4 layers) fit the first much better.
- We assume that these shares hold for a model that nobody measured (benchmarks/results/generic.md says how badly they can fail), and for
  every type.  We also assume that the number of kept experts does not change the cost of rounding, because the kept experts serve the
  tokens of the dropped ones.
- Prices leave the floor out.  So kappa is 0.

Drop.  cost(set of a layer, domain) = nats[domain] * w_layer * (0.14 lost + 0.86 lost^2), where lost is the dropped share of the layer's
saliency (REAP sum) in this domain.
- The source is GLM-5.2 alone: others measured the saliency of every expert in ten domains, and perplexities of three pruned files on code
  and on general text.  The linear part and two `nats` (of dropping everything: 1.1 on code, 2.6 on general text) are fitted to these six
  perplexities and meet them to 14 %.  The files lose a third to two thirds of the saliency; smaller drops are an extrapolation.
- w_layer is the sum of share(tensor) over the layer's expert stacks, scaled so that all layers sum to 1.  Raw saliency is compared inside a
  layer only, because it grows with depth, while the damage of a drop falls with depth.
- We assume that mathematics and reasoning behave as general text, that another model loses as much as GLM-5.2 for the same lost share, and
  that its experts differ as much as GLM-5.2's at the same relative depth.  Its saliencies are drawn from GLM-5.2's by a fixed seed, so the
  choice of experts has no meaning.  Up to 16 experts, the logarithms of the saliencies spread 0.25 times as much.  This factor is assumed:
  Mixtral-8x7B uses its experts more evenly than models of many experts do.
- Single experts are priced along the tangent where half of the experts are gone; `drop_curve` adds the rest, as a mean over domains.
"""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgemoe.base.errors import ModelError, UsageError
from edgemoe.base.storage import hash_json, read_json
from edgemoe.base.types import F64
from edgemoe.ir import PROJECTIONS, Costs, Model, Unit
from edgemoe.ir.memory import DEFAULT_CONTEXT
from edgemoe.model.describe import describe, load_shape
from edgemoe.model.routing.kept_sets import kept_groups, offered_counts
from edgemoe.quantize.reference import round_to_int8
from edgemoe.targets import Target, count_bytes, find_target

PRIORS = ("pooled", "glm-5.2")
_DATA = Path(__file__).parent / "data"
_SEED = 20261125  # of the draw that stands in for experts nobody measured
_FEW_EXPERTS, _FEW_SPREAD = 16, 0.25  # assumed (see the module's docstring)
_DEPTH_TRUST = 0.5  # exponent of the depth profile: the best mean rank correlation for models left out (benchmarks/results/generic.md)
_MEASURED_LAYERS = 61  # median of the measured models
_LEAST_QUANTILE = 0.02  # of a model's own measured nats: no tensor is believed to cost less
_LEAST_DEPTH = 0.02  # least value of a depth profile, whose mean is 1
_ROUNDED = (64, 1024)  # normal numbers on which formats that nobody measured are compared
_Q4_0_ERROR = 0.00741  # mean squared error of Q4_0 on them (llama.cpp 0c1e570)


@dataclass(frozen=True, slots=True, kw_only=True)
class Saliency:
    """Shares of each expert in its layer's saliency [D, L, E], and published keep lists by name [L, E]."""

    domains: tuple[str, ...]
    share: F64
    kept: Mapping[str, NDArray[np.bool_]]


@functools.cache
def _read_priors() -> dict[str, Any]:
    priors: dict[str, Any] = json.loads((_DATA / "priors.json").read_text(encoding="utf-8"))
    return priors


def load_saliency() -> Saliency:
    """What Dorijan10/glm-expert-pruning measured on GLM-5.2: 10 domains, 75 layers, 256 experts."""
    with np.load(_DATA / "glm-5.2.npz") as file:
        share = file["share"].astype(np.float64)
        kept = {n.removeprefix("keep_"): np.unpackbits(file[n], axis=1).astype(bool) for n in file.files if n.startswith("keep_")}
        domains = tuple(str(d) for d in file["domains"])
    return Saliency(domains=domains, share=share / share.sum(axis=2, keepdims=True), kept=kept)


def price_config(source: str, context: int | None = None, target: str = "gguf", *, also: Sequence[int] = ()) -> Costs:
    """Generic prices of a known shape (`load_shape` of model/describe.py), of a config.json, or of the folder that holds one.

    GLM-5.2 is priced from its own published measurements.  `also`: kept counts to offer beside the usual ones.

    Raises:
        UsageError: no such shape or file.
        ModelError: the config is malformed, or of a family whose shapes are not known.
    """
    path = Path(source) / "config.json" if Path(source).is_dir() else Path(source)
    config = read_json(path) if path.is_file() else load_shape(source)
    name = re.sub(r"[^\w.-]+", "-", path.parent.name if path.is_file() else source).strip("-.") or "model"
    model = describe(config, name)
    prior = "glm-5.2" if source.lower() == "glm-5.2" else "pooled"
    return price_generic(model, find_target(target), context or min(DEFAULT_CONTEXT, model.context_length), prior=prior, also=also)


def price_generic(model: Model, target: Target, context: int, *, prior: str = "pooled", also: Sequence[int] = ()) -> Costs:
    """Price a model of which only the shapes are known.

    Args:
        model: from `describe` (or from `inspect_model`).
        target: whose formats and bytes count.
        context: tokens of context that the process must have memory for.
        prior: "pooled" over the measured models, or "glm-5.2": that model's own tensors, types and experts, for shapes like its.
        also: kept counts to offer beside the usual ones, where layers share a count.

    Raises:
        UsageError: unknown prior.
        ModelError: the model's shapes are not those of the prior.
    """
    if prior not in PRIORS:
        raise UsageError(f"prior {prior!r} is not known", hint=f"known: {', '.join(PRIORS)}")
    saliency = load_saliency()
    weights = np.full(len(saliency.domains), 1 / len(saliency.domains))
    units = target.list_units(model)
    layers = model.moe_layers
    groups = kept_groups(model.router)
    offered = offered_counts(model.n_experts, model.router)
    counts = (model.n_experts,) if target.form == "experts" else tuple(sorted({*offered, *also}))
    share = _expert_shares(saliency, len(layers), model.n_experts, prior)
    nats = _tensor_nats(model, units, prior, dict(zip(layers, np.tensordot(weights, share, axes=1), strict=True)))
    of_layer = layer_nats(units, nats, layers)
    drops = price_drops(saliency.domains, weights, share, of_layer / of_layer.sum(), counts, groups)
    sizes = count_bytes(model, target, units, counts)
    cost = np.where(sizes.offered, nats[:, None] * _type_nats(target, prior), np.inf)
    key = hash_json("generic", _read_priors(), prior, model.fingerprint)
    return Costs(
        model=model.fingerprint,
        model_name=model.name,
        stats=key,
        target=target.name,
        form=target.form,
        formats=target.offered,
        units=tuple(units),
        counts=counts,
        n_experts=model.n_experts,
        top_k=model.top_k,
        kappa=0.0,
        memory={"context": context, **target.memory_parts(model, context)},
        cold=(),
        domains=saliency.domains,
        domain_weights=tuple(float(w) for w in weights),
        origin=_origin(prior),
        drawn=prior == "pooled",
        n_groups=groups,
        cost=np.repeat(cost[None], len(counts), axis=0),
        input_cost=np.zeros(sizes.size.shape),
        size=sizes.size,
        extra=sizes.extra,
        staging=sizes.staging,
        fixed_size=np.array(target.fixed_sizes(model, counts)),
        factor=np.ones((len(saliency.domains), len(units))),
        usage=share,
        **drops,
    )


def _origin(prior: str) -> str:
    if prior == "pooled":
        return "generic: types and tensors as in 16 other MoE models; which experts may go is a stand-in, not a measurement of this model"
    return "generic: published single-tensor KLD, type curve and expert saliency of GLM-5.2; nothing was measured here"


# -------------------------------------------------------------------------------------------------------------- quantize
def layer_nats(units: Sequence[Unit], nats: F64, layers: Sequence[int]) -> F64:
    """Nats of rounding the experts of each layer [L]."""
    experts = [(u, unit.layer) for u, unit in enumerate(units) if unit.of_experts]
    return np.array([sum(nats[u] for u, at in experts if at == layer) for layer in layers])


def _tensor_nats(model: Model, units: list[Unit], prior: str, share: Mapping[int, F64]) -> F64:
    """Each unit's share of the cost of rounding the whole model [U], summing to 1; a single expert gets its part `share` of its stacks'."""
    roles, own = _read_priors()["roles"], {} if prior == "pooled" else _read_priors()[prior]["nats"]

    def find(role: str, layer: int) -> float:
        if prior == "pooled":
            return pooled_share(role, layer, model.n_layers, roles)
        if str(layer) not in own.get(role, {}):
            raise ModelError(f"{model.name}: has not the shapes of {prior}, which has no {role} in layer {layer}")
        return float(own[role][str(layer)])

    if prior != "pooled" and model.n_experts != load_saliency().share.shape[2]:
        raise ModelError(f"{model.name}: has not the shapes of {prior}")
    stacks = {unit.layer: sum(find(f"ffn_{p}_exps", unit.layer) for p in PROJECTIONS) for unit in units if unit.expert >= 0}
    found = np.array([find(u.role, u.layer) if u.expert < 0 else stacks[u.layer] * share[u.layer][u.expert] for u in units])
    if prior != "pooled":
        found = np.maximum(found, np.quantile(found[found > 0], _LEAST_QUANTILE))
    shares: F64 = found / found.sum()
    return shares


def pooled_share(role: str, layer: int, n_layers: int, roles: Mapping[str, Any]) -> float:
    """A tensor's share, up to one factor, by its role and relative depth; a role that nobody measured counts as the median role.

    Args:
        role: of the tensor.
        layer: of the tensor; -1 outside the layers.
        n_layers: of its model.
        roles: "roles" of priors.json.
    """
    entry = roles.get(role)
    if entry is None:
        return float(np.median([r["density"] for r in roles.values()])) / _MEASURED_LAYERS
    if layer < 0:
        return float(entry["density"])
    profile = entry["profile"]
    depth = min(len(profile) - 1, int(len(profile) * (layer + 0.5) / n_layers))
    return float(entry["density"] * max(profile[depth], _LEAST_DEPTH) ** _DEPTH_TRUST / _MEASURED_LAYERS)


def _type_nats(target: Target, prior: str) -> F64:
    """Nats of storing the whole model in each format [F].

    If a prior lacks a type, the pooled models stand in.  A format that nobody measured costs as much as Q4_0 times the ratio of their
    squared errors on normal numbers, rounded inputs included.
    """
    priors = _read_priors()
    own = priors if prior == "pooled" else priors[prior]
    known = {**priors["types"], **own["types"]}
    x = np.random.default_rng(_SEED).standard_normal(_ROUNDED, np.float32)

    def ratio(name: str) -> float:
        if name in known:
            return float(known[name])
        inputs = round_to_int8(x, target.input_block(name, "ffn_exps"))
        error = ((target.round_rows(x, name, None) - x) ** 2).mean() + ((inputs - x) ** 2).mean()
        return float(known["Q4_0"] * error / _Q4_0_ERROR)

    return np.array([own["q4_k_nats"] * ratio(name) for name in target.offered], dtype=np.float64)


# ------------------------------------------------------------------------------------------------------------------ drop
def _expert_shares(saliency: Saliency, n_layers: int, n_experts: int, prior: str) -> F64:
    """Saliency shares [D, L, E]: as measured, or drawn from the measured layers at the same relative depth."""
    measured = saliency.share
    if prior != "pooled" and measured.shape[1:] == (n_layers, n_experts):
        return measured
    rng = np.random.default_rng(_SEED)
    result = np.empty((measured.shape[0], n_layers, n_experts))
    spread = _FEW_SPREAD if n_experts <= _FEW_EXPERTS else 1.0
    for layer in range(n_layers):
        source = measured[:, int(measured.shape[1] * (layer + 0.5) / n_layers)]
        draws = [rng.permutation(source.shape[1]) for _ in range(-(-n_experts // source.shape[1]))]
        result[:, layer] = source[:, np.concatenate(draws)[:n_experts]] ** spread
    shares: F64 = result / result.sum(axis=2, keepdims=True)
    return shares


def price_drops(
    domains: tuple[str, ...], weights: F64, share: F64, layer_weight: F64, counts: tuple[int, ...], groups: int = 1
) -> dict[str, Any]:
    """The menu of kept sets, and the cost of sets and of experts by domain.

    A set keeps the experts with the most saliency (domains by weight), and the same number in each routing group.

    Args:
        domains: D names; those that begin with "code" lose what code lost, all others what general text lost.
        weights: [D], summing to 1.
        share: of each expert in its layer's saliency [D, L, E].
        layer_weight: [L], summing to 1.
        counts: kept counts of the menu; the last is E.
        groups: routing groups of the model.

    Returns:
        The fields `kept`, `drop_cost`, `expert_drop` and `drop_curve` of Costs.
    """
    priors = _read_priors()
    linear = priors["drop"]["linear"]
    nats = np.array([priors["drop"]["nats"]["code" if d.startswith("code") else "general"] for d in domains])
    scale = nats[:, None] * layer_weight  # [D, L]
    n_layers, n_experts = share.shape[1:]
    mean = np.tensordot(weights, share, axes=1).reshape(n_layers, groups, -1)
    rank = np.argsort(np.argsort(mean, axis=2, kind="stable"), axis=2).reshape(n_layers, n_experts)  # 0: the first of its group to go
    kept = np.stack([rank >= (n_experts - count) // groups for count in counts])
    by_set = np.stack([(share * ~k).sum(axis=2) for k in kept], axis=1)  # [D, C, L] saliency lost
    gone = np.take_along_axis(share, np.argsort(mean.reshape(n_layers, -1), axis=1, kind="stable")[None], axis=2)
    lost = np.concatenate([np.zeros((*share.shape[:2], 1)), np.cumsum(gone, axis=2)], axis=2)  # [D, L, E + 1] when the k least are gone
    slope = scale * (linear + 2 * (1 - linear) * (weights @ lost[:, :, n_experts // 2]))
    price = scale[:, :, None] * (linear * lost + (1 - linear) * lost**2)
    return {
        "kept": kept,
        "drop_cost": scale[:, None] * (linear * by_set + (1 - linear) * by_set**2),
        "expert_drop": slope[:, :, None] * share,
        "drop_curve": np.tensordot(weights, price - slope[:, :, None] * lost, axes=1),
    }
