"""Jobs are the peers' files of one calibrated model: what each is made from, and how to make it.

A job is known by what it was made from (types and kept experts, or a mix and kept experts, with the importance matrix), so two recipes that
come to the same file are measured once, and a change of our own code measures no peer again.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from calibrated import CalibratedModel
from measure import Reference

from edgemoe.base.storage import hash_json, load_arrays, save_arrays
from edgemoe.targets.gguf.formats import WIDE
from peers import recipes, searches
from peers.recipes import Kept

MIXES = ("Q8_0", "Q6_K", "Q5_K_M", "Q5_K_S", "Q4_K_M", "Q4_K_S", "IQ4_XS", "Q3_K_L", "Q3_K_M", "Q3_K_S", "IQ3_M", "IQ3_XS", "IQ3_XXS")
SMALL_MIXES = ("Q2_K", "Q2_K_S", "IQ2_M", "IQ2_S", "IQ2_XS", "IQ2_XXS", "IQ1_M", "IQ1_S")
DROP_MIXES = ("Q8_0", "Q6_K", "Q5_K_M", "Q4_K_M", "IQ4_XS", "Q3_K_M", "IQ3_M", "IQ3_XXS", "Q2_K", "IQ2_M", "IQ2_XXS", "IQ1_M")
RANDOM_MIXES = ("Q6_K", "Q4_K_M", "IQ3_M", "IQ2_M", "IQ1_M")
SHARES = (0.75, 0.5, 0.25)  # of the experts that stay; REAP publishes 3/4 and 1/2
SCORES = {"frequency": "frequency", "reap": "REAP", "reap-sum": "REAP sum"}
RANDOM_SEEDS = 3
PMQ_AVERAGES = (1.5, 1.75, 2.0, 2.25, 2.5)  # bits; the paper's range
CCMOE_SHARES = (0.75, 0.625)  # 192 and 160 of 256 experts
WORST_TYPE = "IQ1_S"  # of the greedy search's single tensors
CLASSES = ("one type", "mix", "random", "frequency", "REAP", "REAP sum", "PMQ", "CC-MoE", "APEX", "published")
SEARCHES = ("target size", "greedy", "collaborative", "REAP + target size")  # these get our budget


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """A peer's file: its class, recipe and name; for a search the number of the budget that it was made for."""

    kind: str
    recipe: str
    name: str
    made_from: tuple[Any, ...]
    make: Callable[[], Path]
    budget: int = -1


def everyone(calibrated: CalibratedModel) -> Kept:
    """No drops."""
    return tuple(tuple(range(calibrated.model.n_experts)) for _ in range(calibrated.model.n_layers))


def typed(calibrated: CalibratedModel, kind: str, recipe: str, name: str, types: Mapping[str, str], kept: Kept, budget: int = -1) -> Job:
    """A file that our writer makes from a type for each unit."""
    made_from = ("types", calibrated.imatrix, sorted(types.items()), kept)
    return Job(kind=kind, recipe=recipe, name=name, made_from=made_from, make=lambda: calibrated.write(types, kept), budget=budget)


def mixed(calibrated: CalibratedModel, kind: str, recipe: str, mix: str, kept: Kept) -> Job:
    """A file that llama-quantize makes."""
    made_from = ("mix", calibrated.imatrix, mix, kept)
    return Job(kind=kind, recipe=recipe, name=mix, made_from=made_from, make=lambda: calibrated.quantize(mix, kept))


def mix_jobs(calibrated: CalibratedModel) -> Iterator[Job]:
    """One type for everything, and llama-quantize's mixes."""
    for name in WIDE:
        yield typed(calibrated, "16-bit" if name == "F16" else "one type", "one type", name, pure(calibrated, name), everyone(calibrated))
    for mix in (*MIXES, *SMALL_MIXES):
        yield mixed(calibrated, "mix", "all experts", mix, everyone(calibrated))


def drop_jobs(calibrated: CalibratedModel) -> Iterator[Job]:
    """Drops by a published score, or by lot, and then llama-quantize's mixes."""
    for share in SHARES:
        for method, kind in SCORES.items():
            kept = recipes.kept_sets(calibrated.model, calibrated.stats, method, share)
            for mix in DROP_MIXES:
                yield mixed(calibrated, kind, f"keep {share:.0%}", mix, kept)
        for seed in range(RANDOM_SEEDS):
            kept = recipes.kept_sets(calibrated.model, calibrated.stats, f"random{seed}", share)
            for mix in RANDOM_MIXES:
                yield mixed(calibrated, "random", f"{seed} keep {share:.0%}", mix, kept)


def recipe_jobs(calibrated: CalibratedModel) -> Iterator[Job]:
    """Recipes that say a type for every tensor."""
    model, stats, all_experts = calibrated.model, calibrated.stats, everyone(calibrated)
    for tier in recipes.APEX:
        yield typed(calibrated, "APEX", "tiers", tier, recipes.apex_types(model, tier), all_experts)
    for name in recipes.PUBLISHED:
        yield typed(calibrated, "published", name, name, recipes.published_types(model, name), all_experts)
    yield typed(calibrated, "published", "DQ3_K_M", "DQ3_K_M", recipes.dq3_types(model), all_experts)
    for average in PMQ_AVERAGES:
        widths = [recipes.pmq_widths(model, stats, layer, average) for layer in range(model.n_layers)]
        yield typed(calibrated, "PMQ", "projected", f"{average:g} bits", recipes.pmq_types(model, widths), all_experts)
    for share in CCMOE_SHARES:
        kept = recipes.collaborative_sets(model, stats, share, released=True)
        for base in ("IQ1_S", "IQ1_M"):
            yield typed(calibrated, "CC-MoE", f"keep {share:.1%}", base, recipes.ccmoe_types(model, base), kept)


def search_jobs(calibrated: CalibratedModel, probe: Reference, budgets: list[int]) -> Iterator[Job]:
    """What chooses types for a size: each at every one of our budgets; `probe_jobs` are measured on `probe`."""
    model, all_experts, fewer = calibrated.model, everyone(calibrated), fewer_experts(calibrated)
    shelf, errors = searches.make_shelf(model, model.n_experts), cached_errors(calibrated)
    fewer_shelf = searches.make_shelf(model, len(fewer[0]))
    sensitivity = np.array([probe_kl(calibrated, probe, types, all_experts) for types in single_types(calibrated).values()])
    curve = {name: probe_kl(calibrated, probe, types, all_experts) for name, types in curve_types(calibrated).items()}
    start, *raised = (probe_kl(calibrated, probe, types, fewer) for types in raised_types(calibrated).values())
    gains = start - np.array(raised)
    for i, room in enumerate(budgets):
        found = [("target size", "all experts", all_experts, search_target(calibrated, shelf, errors, all_experts, room))]
        for pinned in (False, True):
            types = searches.search_greedy(shelf, sensitivity, curve, room, model.n_weights, pinned=pinned)
            found.append(("greedy", "ends Q8_0" if pinned else "free", all_experts, types))
        found.append(("collaborative", "keep 75%", fewer, searches.raise_most_sensitive(fewer_shelf, gains, room)))
        for share in SHARES:
            kept = recipes.kept_sets(model, calibrated.stats, "reap", share)
            types = search_target(calibrated, searches.make_shelf(model, len(kept[0])), errors, kept, room)
            found.append(("REAP + target size", f"keep {share:.0%}", kept, types))
        for kind, recipe, kept, types in found:
            if types is not None:
                yield typed(calibrated, kind, recipe, f"budget {i}", types, kept, i)


def search_target(
    calibrated: CalibratedModel, shelf: searches.Shelf, errors: Mapping[str, np.ndarray], kept: Kept, room: int
) -> dict[str, str] | None:
    """The target-size search over the experts that stay."""
    table = np.stack([errors[u.name][list(kept[u.layer]) if u.is_stack else [0]].sum(axis=0) for u in shelf.units])
    boosts = searches.target_boosts(shelf.units, 8 * room / calibrated.model.n_weights)
    return searches.search_target(shelf, table, boosts, room)


def cached_errors(calibrated: CalibratedModel) -> dict[str, np.ndarray]:
    """The target-size search's errors, kept in the work folder."""
    path = calibrated.work / f"errors-{hash_json(calibrated.model.fingerprint, calibrated.imatrix)[:16]}.safetensors"
    if not path.exists():
        save_arrays(path, searches.output_errors(calibrated.model, calibrated.stats))
    return load_arrays(path)


# ---------------------------------------------------------------------------------------- what the searches measure themselves
def probe_jobs(calibrated: CalibratedModel) -> Iterator[Job]:
    """Files that the searches want to know the KL of, on calibration text."""
    for kind, files in (("single tensors", single_types(calibrated)), ("curve", curve_types(calibrated))):
        yield from (typed(calibrated, kind, kind, name, types, everyone(calibrated)) for name, types in files.items())
    fewer = fewer_experts(calibrated)
    yield from (typed(calibrated, "raised", "raised", name, types, fewer) for name, types in raised_types(calibrated).items())


def probe_kl(calibrated: CalibratedModel, probe: Reference, types: Mapping[str, str], kept: Kept) -> float:
    """KL on calibration text of one file, mean over domains."""
    job = typed(calibrated, "", "", "", types, kept)
    return probe.mean_kl(probe.measure(job.make, *job.made_from))


def fewer_experts(calibrated: CalibratedModel) -> Kept:
    """The drop of collaborative compression, 3/4 stay."""
    return recipes.collaborative_sets(calibrated.model, calibrated.stats, CCMOE_SHARES[0], released=False)


def pure(calibrated: CalibratedModel, name: str) -> dict[str, str]:
    """One type for every unit, in file order."""
    return recipes.storable(calibrated.model, dict.fromkeys((u.name for u in calibrated.target.list_units(calibrated.model)), name))


def single_types(calibrated: CalibratedModel) -> dict[str, dict[str, str]]:
    """Each unit alone at the worst type, all else in 16 bits: the greedy search's sensitivities."""
    plain, worst = pure(calibrated, "F16"), pure(calibrated, WORST_TYPE)
    return {name: {**plain, name: worst[name]} for name in plain}


def curve_types(calibrated: CalibratedModel) -> dict[str, dict[str, str]]:
    """The whole model at each type: its curve."""
    return {name: pure(calibrated, name) for name in WIDE if name != "F16"}


def raised_types(calibrated: CalibratedModel) -> dict[str, dict[str, str]]:
    """All at IQ1_M, then each unit alone at IQ2_XXS, after the drop (arXiv 2509.25689, step 4)."""
    base, above = pure(calibrated, "IQ1_M"), pure(calibrated, "IQ2_XXS")
    return {"none": base} | {name: {**base, name: above[name]} for name in base}
