"""The bench's peers: golden values, sizes that are kept, searches beside every possible choice, and who wins."""

from __future__ import annotations

import itertools
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edgemoe.ir import Model, Unit
from edgemoe.model.inspect import inspect_model
from edgemoe.price.saliency import SCORES
from edgemoe.targets.gguf.formats import FORMATS

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))

import recipes
import searches
import table
import yardstick

MODELS = Path(__file__).parents[1] / "examples"


@pytest.fixture(scope="module", params=["tiny-moe", "tiny-moe-b"])
def model(request: pytest.FixtureRequest) -> Model:
    return inspect_model(str(MODELS / request.param))


# ----------------------------------------------------------------------------------------------------------------- scores
# Six tokens of four experts, two each: z[t, e] = 2 sin(0.7 t + 1.3 e + 0.2), f[t, e, i] = (0.5 + 0.25 e) cos(0.9 t + 0.4 e + 1.1 i).
LOGITS = 2 * np.sin(0.7 * np.arange(6)[:, None] + 1.3 * np.arange(4) + 0.2)
COUNT = np.array([4.0, 3, 2, 3])


def test_the_scores_that_drop_experts_give_the_golden_values() -> None:
    sums = {"count": COUNT, "gate": np.array([2.442256, 1.481963, 0.339844, 1.735938])}
    sums["gate_norm"] = np.array([1.489379, 1.376260, 0.417523, 2.620120])
    assert SCORES["reap"](sums) == pytest.approx([0.372345, 0.458753, 0.208761, 0.873373], abs=1e-6)
    raw = np.array([2.270480, 1.322046, 0.300116, 1.606852])
    assert recipes.collaborative_score(COUNT, raw, 6) == pytest.approx([0.617143, 0.470341, 0.241696, 0.517809], abs=1e-6)


def test_routing_is_counted_as_by_hand() -> None:
    stats = SimpleNamespace(arrays=lambda layer: {"replay_logits": LOGITS})
    count, gate, tokens = recipes.routing_sums(SimpleNamespace(top_k=2), stats, 0)  # type: ignore[arg-type]
    assert count.tolist() == COUNT.tolist() and tokens == 6
    assert gate == pytest.approx([2.270480, 1.322046, 0.300116, 1.606852], abs=1e-6)


@pytest.mark.parametrize(("n", "share", "kept"), [(128, 0.75, 96), (128, 0.5, 64), (7, 0.75, 6), (7, 0.5, 4), (8, 0.1, 2)])
def test_reap_drops_as_many_as_its_own_code_and_leaves_the_router_enough(n: int, share: float, kept: int) -> None:
    assert recipes.reap_count(SimpleNamespace(n_experts=n, top_k=2), share) == kept  # type: ignore[arg-type]


def test_the_best_experts_stay_in_order() -> None:
    assert recipes.keep_best(np.array([0.1, 0.9, 0.5, 0.7]), 2) == (1, 3)


# -------------------------------------------------------------------------------------------------------------------- PMQ
def test_mcs_rounding_is_that_of_its_quantizer() -> None:
    weights = np.array([[0.0, 1.0, 2.2, 3.0], [-2.0, 1.0, 3.0, -5.0]], np.float32)
    assert recipes.round_group(weights, 2).tolist() == [[0, 1, 2, 3], [pytest.approx(x, abs=1e-5) for x in (-7 / 3, 1 / 3, 3, -5)]]
    assert recipes.round_group(weights[1:], 1).tolist() == [[-2.75, 2.75, 2.75, -2.75]]


@pytest.mark.parametrize(("bits", "kind"), [(1.75, "IQ1_M"), (2.0, "IQ2_XXS"), (2.25, "IQ2_XS"), (2.5, "IQ2_S"), (4.25, "IQ4_XS")])
def test_widths_go_to_the_nearest_type(bits: float, kind: str) -> None:
    assert recipes.nearest_type(bits) == kind


def test_pmq_stores_the_mean_width_of_each_layer(model: Model) -> None:
    widths = [np.array([1, 1, 2, 2]), *[np.array([2, 2, 2, 3])] * (model.n_layers - 1)]
    types = recipes.pmq_types(model, widths)
    assert types["blk.0.ffn_down_exps.weight"] == "IQ1_M" and types["blk.1.ffn_gate_exps.weight"] == "IQ2_S"
    assert types["output.weight"] == types["blk.0.attn_q.weight"] == "IQ4_XS"


# ---------------------------------------------------------------------------------------------------------------- recipes
def shape(layers: int) -> Model:
    """Only what recipes ask of a model: experts and attention of some layers, rows of 256."""
    roles = ("attn_q", "attn_output", "ffn_gate_exps", "ffn_up_exps", "ffn_down_exps")
    places = [("token_embd", -1), ("output", -1), *((role, layer) for layer in range(layers) for role in roles)]
    tensors = tuple(
        SimpleNamespace(role=r, layer=n, expert=0 if "exps" in r else -1, shape=(256, 256), n_weights=65536, dtype="BF16")
        for r, n in places
    )
    return SimpleNamespace(n_layers=layers, n_experts=1, top_k=1, tensors=tensors)  # type: ignore[return-value]


def test_apex_gives_a_model_of_forty_layers_what_its_script_writes() -> None:
    """generate_config.sh --profile quality: layers 0-4 and 35-39 Q6_K, 5-9 and 30-34 Q5_K, the others IQ4_XS."""
    types = recipes.apex_types(shape(40), "quality")
    got = [types[f"blk.{layer}.ffn_up_exps.weight"] for layer in range(40)]
    assert got == ["Q6_K"] * 5 + ["Q5_K"] * 5 + ["IQ4_XS"] * 20 + ["Q5_K"] * 5 + ["Q6_K"] * 5
    attention = [recipes.apex_types(shape(40), "mini")[f"blk.{layer}.attn_q.weight"] for layer in range(40)]
    assert attention == ["Q4_K"] * 3 + ["Q3_K"] * 34 + ["Q4_K"] * 3


def test_ccmoe_raises_the_outer_eighths() -> None:
    types = recipes.ccmoe_types(shape(16), "IQ1_S")
    assert [types[f"blk.{n}.ffn_down_exps.weight"] for n in range(16)] == ["IQ2_XXS"] * 2 + ["IQ1_M"] * 12 + ["IQ2_XXS"] * 2
    assert [types[f"blk.{n}.ffn_gate_exps.weight"] for n in range(16)] == ["IQ1_M"] * 2 + ["IQ1_S"] * 12 + ["IQ1_M"] * 2
    assert types["output.weight"] == "Q5_K" and types["token_embd.weight"] == "Q2_K" and types["blk.0.attn_output.weight"] == "IQ4_XS"


def test_every_recipe_names_a_type_for_every_tensor_that_can_hold_its_rows(model: Model) -> None:
    cols = recipes.row_lengths(model)
    found = [recipes.apex_types(model, tier) for tier in recipes.APEX]
    found += [recipes.published_types(model, name) for name in recipes.PUBLISHED]
    found += [recipes.dq3_types(model), recipes.ccmoe_types(model, "IQ1_S"), recipes.ccmoe_types(model, "IQ1_M")]
    for types in found:
        assert types.keys() == cols.keys()
        assert all(cols[name] % FORMATS[kind].block == 0 for name, kind in types.items())


# --------------------------------------------------------------------------------------------------------------- searches
def random_shelf(seed: int, n: int = 4) -> tuple[searches.Shelf, np.ndarray]:
    """Units of different sizes, four types, errors that mostly fall with bits."""
    rng = np.random.default_rng(seed)
    types = ("Q8_0", "Q4_K", "Q2_K", "IQ1_S")
    roles = ["output", "attn_v", "ffn_gate_exps", "ffn_up_exps", "ffn_down_exps"][:n]
    units = tuple(Unit(name=f"u{i}", role=role, layer=-1 if role == "output" else 0, n_weights=1) for i, role in enumerate(roles))
    weights = rng.integers(1, 9, n) * 1000
    size = np.array([[int(w * FORMATS[t].bpw / 8) for t in types] for w in weights], np.int64)
    errors = rng.lognormal(0, 1, (n, 1)) * np.array([0.01, 0.1, 0.5, 1.0]) * rng.lognormal(0, 0.3, (n, 4))
    return searches.Shelf(units=units, types=types, size=size, offered=np.ones(size.shape, bool), fixed=100), errors


def spent(shelf: searches.Shelf, types: dict[str, str]) -> int:
    return shelf.fixed + sum(int(shelf.size[u, shelf.types.index(types[unit.name])]) for u, unit in enumerate(shelf.units))


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 10**6), share=st.floats(0.0, 1.0))
def test_every_search_keeps_its_byte_target(seed: int, share: float) -> None:
    shelf, errors = random_shelf(seed, 5)
    least, most = int(shelf.size.min(axis=1).sum()), int(shelf.size.max(axis=1).sum())
    room = shelf.fixed + round(least + share * (most - least))
    curve = dict(zip(shelf.types, (0.001, 0.02, 0.3, 1.0), strict=True))
    found = [
        searches.search_target(shelf, errors, np.ones(5), room),
        searches.search_greedy(shelf, errors[:, -1], curve, room, 100_000, pinned=False),
        searches.raise_most_sensitive(shelf, errors[:, -1], room),
    ]
    assert all(types is not None and spent(shelf, types) <= room for types in found)
    pinned = searches.search_greedy(shelf, errors[:, -1], curve, room, 100_000, pinned=True)
    assert pinned is None or (spent(shelf, pinned) <= room and pinned["u0"] == "Q8_0")
    assert searches.search_target(shelf, errors, np.ones(5), shelf.fixed + least - 1) is None


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 10**6), share=st.floats(0.05, 0.95))
def test_the_target_size_search_is_no_worse_than_the_best_price_of_a_bit(seed: int, share: float) -> None:
    """Of all choices with one price for all units (found by trying every one that matters), none that fits has less error."""
    shelf, errors = random_shelf(seed)
    least, most = int(shelf.size.min(axis=1).sum()), int(shelf.size.max(axis=1).sum())
    room = shelf.fixed + round(least + share * (most - least))
    types = searches.search_target(shelf, errors, np.ones(4), room)
    assert types is not None
    mine = sum(errors[u, shelf.types.index(types[unit.name])] for u, unit in enumerate(shelf.units))
    prices = [0.0]
    for u in range(4):
        for f, g in itertools.combinations(range(4), 2):
            bits = 8 * (shelf.size[u, f] - shelf.size[u, g])
            prices.append(max((errors[u, g] - errors[u, f]) / bits, 0.0) * (1 + 1e-9))
    for price in prices:
        picks = np.argmin(errors + price * 8 * shelf.size, axis=1)
        if shelf.fixed + searches.total(shelf.size, picks) <= room:
            assert mine <= errors[np.arange(4), picks].sum() * (1 + 1e-6)


def test_the_greedy_search_takes_the_cheapest_steps_down_and_ties_gate_and_up() -> None:
    """By hand: of damage per byte, the experts' first step costs least, then their second; output stays."""
    units = tuple(
        Unit(name=n, role=r, layer=layer, n_weights=100)
        for n, r, layer in (("o", "output", -1), ("g", "ffn_gate_exps", 0), ("u", "ffn_up_exps", 0))
    )
    size = np.array([[85, 45, 26]] * 3, np.int64)
    shelf = searches.Shelf(units=units, types=("Q8_0", "Q4_K", "Q2_K"), size=size, offered=np.ones((3, 3), bool), fixed=0)
    curve = {"Q8_0": 0.0, "Q4_K": 0.1, "Q2_K": 1.0}
    sensitivity = np.array([10.0, 1.0, 1.0])
    down_once = searches.search_greedy(shelf, sensitivity, curve, 175, 300, pinned=False)
    assert down_once == {"o": "Q8_0", "g": "Q4_K", "u": "Q4_K"}
    # Output's step to Q4_K costs 1 for 40 bytes, the experts' to Q2_K 1.8 for 38.
    assert searches.search_greedy(shelf, sensitivity, curve, 174, 300, pinned=False) == {"o": "Q4_K", "g": "Q4_K", "u": "Q4_K"}
    assert searches.search_greedy(shelf, sensitivity, curve, 174, 300, pinned=True) == {"o": "Q8_0", "g": "Q2_K", "u": "Q2_K"}


def test_collaborative_compression_raises_the_most_sensitive_that_fit() -> None:
    shelf, _ = random_shelf(1, 3)
    base, above = shelf.size[:, 2], shelf.size[:, 1]
    room = shelf.fixed + int(base.sum()) + int(above[1] - base[1])
    gain = np.array([0.0, 0.2, 0.1])
    assert searches.raise_most_sensitive(shelf, gain, room) == {"u0": "Q2_K", "u1": "Q4_K", "u2": "Q2_K"}


def test_errors_are_relative_weighted_and_trimmed() -> None:
    assert searches.trimmed_mean(np.array([1.0, 2.0, 6.0])) == 3.0
    assert searches.trimmed_mean(np.concatenate([[1e9, -1e9], np.full(98, 2.0)])) == 2.0
    rows = np.tile(np.linspace(-1, 1, 256, dtype=np.float32), (3, 1))
    assert searches.row_error(rows, "F16", None, 30) < 1e-5
    importance = np.zeros(256, np.float32)
    importance[:128] = 1
    worse, better = (searches.row_error(rows, "Q2_K", v, 30) for v in (np.ones(256, np.float32), importance))
    assert better < worse


# ------------------------------------------------------------------------------------------------------------- who stands where
def fake_yard() -> SimpleNamespace:
    """Two domains of three windows."""
    return SimpleNamespace(names=("a", "b"), split=lambda values: [np.array(values[:3]), np.array(values[3:])])


def entry(kind: str, recipe: str, size: int, kl: float, budget: int = -1) -> table.Entry:
    score = yardstick.Score(size=size, kl=(kl,) * 6, same=(1.0,) * 6, nll=(1.0,) * 6, p99=(kl,) * 2)
    return table.Entry(kind=kind, recipe=recipe, name=f"{size}", score=score, budget=budget)


def test_a_peer_stands_with_its_smallest_file_that_is_not_smaller_or_with_that_for_the_budget() -> None:
    mine = table.Ours(budget=3, count=4, predicted=0.1, score=entry("", "", 100, 0.1).score)
    peers = [entry("mix", "all", 99, 0.01), entry("mix", "all", 101, 0.3), entry("mix", "all", 120, 0.2)]
    peers += [entry("target size", "all", 98, 0.15, budget=3), entry("target size", "all", 300, 0.001, budget=1)]
    yard = fake_yard()
    mix, search = (table.best_of(yard, peers, kind, mine, [0, 1]) for kind in ("mix", "target size"))  # type: ignore[arg-type]
    assert mix is not None and mix.score.size == 101
    assert search is not None and search.score.size == 98


def test_random_drops_stand_with_the_middle_seed() -> None:
    mine = table.Ours(budget=0, count=4, predicted=0.1, score=entry("", "", 100, 0.1).score)
    peers = [entry("random", f"{seed} keep 75%", 110, kl) for seed, kl in enumerate((0.2, 0.9, 0.4))]
    found = table.best_of(fake_yard(), peers, "random", mine, [0, 1])  # type: ignore[arg-type]
    assert found is not None and found.score.kl[0] == 0.4


@pytest.mark.parametrize(("shift", "mark"), [(-0.02, table.WIN), (0.02, table.LOSS), (-0.0004, table.TIE)])
def test_a_difference_within_two_standard_errors_of_the_pairs_is_a_tie(shift: float, mark: str) -> None:
    noise = np.array([0.001, -0.001, 0.0, 0.001, -0.001, 0.0])
    peer = yardstick.Score(size=1, kl=(0.1, 0.5, 0.3, 0.2, 0.7, 0.9), same=(), nll=(), p99=())
    mine = yardstick.Score(size=1, kl=tuple(np.array(peer.kl) + shift + noise), same=(), nll=(), p99=())
    found, difference, error = table.verdict(fake_yard(), mine, peer, [0, 1], 1e-6)  # type: ignore[arg-type]
    assert found == mark and difference == pytest.approx(shift)
    assert error == pytest.approx(np.sqrt(2 * 1e-6 / 3) / 2)  # each domain: variance 1e-6 over three windows


def test_a_window_is_compared_as_the_definitions_say() -> None:
    """softmax of 2, 1, 0, -1 against the same logits with 0.05, -0.1, 0.02, 0.08 added: KL 0.001977354."""
    original = np.tile(np.array([[2.0, 1, 0, -1]], np.float32), (2, 1))
    other = original + np.array([0.05, -0.1, 0.02, 0.08], np.float32)
    kl, same, nll = yardstick.compare_window(original, other, np.array([0, 1]))
    assert kl == pytest.approx([0.001977354] * 2, abs=1e-7) and same.tolist() == [1, 1]
    assert nll == pytest.approx([np.log(np.exp(other[0] - other[0, 1]).sum())], rel=1e-6)
