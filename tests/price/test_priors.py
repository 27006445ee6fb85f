"""Prices without weights: against the published measurements that they were distilled from, and what any price list must keep."""

import math
import sys
from pathlib import Path

import numpy as np
import pytest

from edgemoe.base.errors import ModelError, UsageError
from edgemoe.ir import Costs
from edgemoe.model.describe import describe, load_shape
from edgemoe.plan.solve import solve_plan
from edgemoe.price.priors import load_saliency, pooled_share, price_config, price_generic
from edgemoe.targets import find_target

sys.path.insert(0, str(Path(__file__).parents[2] / "examples"))

from headline import domain_coverage, price_coverage

CODE, GENERAL = ("code_instruct", "code_raw"), ("web", "news", "wiki", "books", "chat", "science")


def price(name: str, prior: str = "pooled") -> Costs:
    return price_generic(describe(load_shape(name), name), find_target("gguf"), 8192, prior=prior)


@pytest.fixture(scope="module")
def glm() -> Costs:
    return price("GLM-5.2", "glm-5.2")


@pytest.fixture(scope="module")
def qwen() -> Costs:
    return price("Qwen3-30B-A3B")


def whole(costs: Costs, name: str) -> float:
    """Nats of the whole model in one format (where rows allow it)."""
    column = costs.cost[-1, :, costs.formats.index(name)]
    return float(column[np.isfinite(column)].sum())


# ------------------------------------------------------------------------------------------------------------------------ published results
@pytest.mark.parametrize(("kept", "worst"), [("mix108_maxmin", 0.814), ("mix108_uniform", 0.720), ("code_108", 0.46)])
def test_worst_domain_coverages_of_published_keep_lists_are_reproduced(kept: str, worst: float) -> None:
    saliency = load_saliency()  # published: Dorijan10/glm-expert-pruning @ 6cb44696, README
    assert domain_coverage(saliency.share, saliency.kept[kept]).min() == pytest.approx(worst, abs=2.5e-3)


def test_coverage_is_one_for_a_domains_own_best_set_and_counts_layers_alike() -> None:
    saliency = np.array([[[4.0, 3.0, 2.0, 1.0], [100.0, 0.0, 0.0, 300.0]]])
    assert domain_coverage(saliency, np.array([[True, True, False, False], [True, False, False, True]])) == pytest.approx([1.0])
    assert domain_coverage(saliency, np.array([[False, False, True, True], [True, False, False, True]])) == pytest.approx([(3 / 7 + 1) / 2])


# GLM-5.2 stored in one type: KLD to Q8_0 in nats per token (Thireus/GGUF-Tool-Suite @ 384c1f85, group0).
WHOLE = {"Q6_K": 0.017785, "Q5_K": 0.029117, "Q4_K": 0.058203, "IQ4_XS": 0.063799, "Q3_K": 0.16277, "IQ3_S": 0.160411, "Q2_K": 0.58529}
WHOLE |= {"IQ2_XXS": 1.1788, "IQ1_S": 2.82993}
FLOOR = 0.0153  # what the finest types converge to


@pytest.mark.parametrize(("name", "published"), WHOLE.items())
def test_one_type_for_all_of_glm_costs_what_was_measured(glm: Costs, name: str, published: float) -> None:
    assert whole(glm, name) + FLOOR == pytest.approx(published, rel=0.06)  # attn_k_b's rows take no 256-blocks: up to 5 % less


def test_pooled_prices_lie_among_the_models_they_are_pooled_from(qwen: Costs) -> None:
    for name, low, high in (("Q4_K", 0.0080, 0.043), ("Q3_K", 0.054, 0.15), ("Q2_K", 0.089, 0.57)):  # least and most, GLM-4.7-Flash apart
        assert low < whole(qwen, name) < high


# Perplexity of pruned GLM-5.2 over the parent's, held-out code and general text (same source as the keep lists).
PRUNED = [("mix108_maxmin", 1.297, 1.645), ("code_108", 1.179, 2.786), ("code_96", 1.231, 3.283)]


@pytest.mark.parametrize(("name", "code", "general"), PRUNED)
def test_dropping_the_published_sets_costs_what_was_measured_to_a_fifth(glm: Costs, name: str, code: float, general: float) -> None:
    kept = load_saliency().kept[name]
    c = int(np.argmin(np.abs(np.array(glm.counts) - kept[0].sum())))
    changed = (glm.expert_drop * (glm.kept[c] & ~kept)).sum(axis=(1, 2)) - (glm.expert_drop * (~glm.kept[c] & kept)).sum(axis=(1, 2))
    nats = dict(zip(glm.domains, glm.drop_cost[:, c].sum(axis=1) + changed, strict=True))
    assert np.mean([nats[d] for d in CODE]) == pytest.approx(math.log(code), rel=0.2)
    assert np.mean([nats[d] for d in GENERAL]) == pytest.approx(math.log(general), rel=0.2)


# ---------------------------------------------------------------------------------------------------------------------------- price lists
def test_small_always_used_tensors_cost_more_per_byte_than_experts(qwen: Costs, glm: Costs) -> None:
    for costs in (qwen, glm):
        f = costs.formats.index("Q4_K")
        per_byte = costs.cost[-1, :, f] / np.maximum(costs.size[-1, :, f], 1)
        stack = np.array([u.is_stack for u in costs.units])
        always = np.array([u.role in ("output", "attn_output", "attn_v", "attn_kv_a_mqa", "ffn_down_shexp") for u in costs.units])
        assert np.median(per_byte[always]) > 10 * np.median(per_byte[stack])


def test_finer_types_cost_less_and_take_more_bytes(qwen: Costs) -> None:
    order = [qwen.formats.index(f) for f in ("F16", "Q8_0", "Q6_K", "Q5_K", "Q4_K", "Q3_K", "Q2_K", "IQ2_XXS", "IQ1_S")]
    assert (np.diff(qwen.cost[-1][:, order], axis=1) > 0).all()
    assert (np.diff(qwen.size[-1][:, order], axis=1) < 0).all()


@pytest.mark.parametrize("name", ["Qwen3-30B-A3B", "Mixtral-8x7B", "Kimi-K2"])
def test_menus_are_nested_and_cost_nothing_when_all_stay(name: str) -> None:
    costs = price(name)
    assert (costs.kept.sum(axis=2) == np.array(costs.counts)[:, None]).all()
    assert (costs.kept[:-1] <= costs.kept[1:]).all()
    assert not costs.drop_cost[:, -1].any()
    assert (np.diff(costs.drop_cost, axis=1) <= 1e-15).all()
    assert costs.usage.sum(axis=2) == pytest.approx(np.ones(costs.usage.shape[:2]))
    along = (costs.expert_drop[:, None] * ~costs.kept[None]).sum(axis=3) + np.stack(
        [costs.drop_curve[:, costs.n_experts - n] for n in costs.counts]
    )
    assert costs.weights @ along.sum(axis=2) == pytest.approx(costs.weights @ costs.drop_cost.sum(axis=2), abs=1e-9)


def test_a_layer_weighs_the_same_against_the_output_however_many_there_are() -> None:
    roles = {"output": {"density": 0.1, "profile": [1.0] * 4}, "attn_q": {"density": 0.2, "profile": [1.0] * 4}}
    shallow, deep = (
        [pooled_share(role, layer, n, roles) for role, layer in (("attn_q", 1), ("unknown", 1), ("output", -1))] for n in (4, 80)
    )
    assert shallow == deep


def test_few_experts_are_used_more_evenly(qwen: Costs) -> None:
    few = price("Mixtral-8x7B")
    assert np.log(few.usage).std(axis=2).mean() < 0.5 * np.log(qwen.usage).std(axis=2).mean()


def test_prices_say_that_they_are_generic_and_never_change(qwen: Costs, glm: Costs) -> None:
    again = price("Qwen3-30B-A3B")
    assert again == qwen
    assert all((getattr(again, n) == getattr(qwen, n)).all() for n in ("cost", "size", "kept", "drop_cost", "expert_drop", "usage"))
    assert qwen.origin.startswith("generic: ")
    assert "GLM-5.2" in glm.origin


def test_a_generic_plan_fits_and_carries_its_origin(qwen: Costs) -> None:
    plan = solve_plan(qwen, 16 * 10**9)
    assert plan.memory["peak"] <= 16 * 10**9
    assert plan.origin == qwen.origin
    assert plan.predicted_kl < whole(qwen, "Q3_K")  # of the same size


# ------------------------------------------------------------------------------------------------------------------------------ bad input
def test_what_cannot_be_priced_is_refused() -> None:
    target = find_target("gguf")
    air = load_shape("GLM-4.5-Air")
    with pytest.raises(ModelError, match=r"glm-5\.2"):
        price_generic(describe(air, "air"), target, 8192, prior="glm-5.2")
    with pytest.raises(UsageError, match="prior"):
        price_generic(describe(air, "air"), target, 8192, prior="best")


def test_the_worst_domain_is_covered_no_worse_than_by_the_published_list_that_maximised_it() -> None:
    """Dorijan10/glm-expert-pruning: 108 of 256 experts of each of 75 layers, worst of ten domains 0.814."""
    saliency = load_saliency()
    plan = solve_plan(price_coverage(saliency, 108), 10**9, objective="worst", gap=0.005)
    kept = np.zeros(saliency.share.shape[1:], bool)
    for layer, experts in enumerate(plan.kept):
        kept[layer, list(experts)] = True
    found = domain_coverage(saliency.share, kept)
    assert found.min() >= domain_coverage(saliency.share, saliency.kept["mix108_maxmin"]).min() > 0.81
    assert found.min() == pytest.approx(1 - max(plan.domain_q.values()), abs=1e-9)


def test_glm_5_2_is_priced_from_its_own_measurements_however_its_name_is_spelt() -> None:
    assert price_config("GLM-5.2").origin == price_config("glm-5.2").origin != price_config("OLMoE-1B-7B").origin
