"""The integer program against exhaustive search, and its promises."""

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edgemoe.solvers.lagrange import least_size, relax
from edgemoe.solvers.program import Program, Solution
from edgemoe.solvers.search import solve


def random_programs(seed: int, tightness: float) -> list[Program]:
    """Three counts, four units, five formats: sizes rise with bits, costs fall roughly with them; some formats are not offered."""
    rng = np.random.default_rng(seed)
    counts, units, formats = 3, 4, 5
    bits = np.array([1.5, 2.6, 4.5, 6.5, 16])
    weights = rng.integers(50, 400, units)
    keep = np.linspace(0.5, 1, counts)
    size = np.ceil(keep[:, None, None] * weights[None, :, None] * bits / 8).astype(np.int64)
    cost = keep[:, None, None] * rng.lognormal(0, 1, (1, units, 1)) * 4.0**-bits * rng.lognormal(0, 0.3, (counts, units, formats)) * 1e-3
    offered = rng.random((units, formats)) < 0.85
    offered[:, 2] = True
    cost = np.where(offered[None], cost, np.inf)
    drop = np.sort(rng.lognormal(-6, 1, counts))[::-1].copy()
    drop[-1] = 0
    fixed = [100, 110, 120]
    least = min(fixed[c] + int(np.where(np.isfinite(cost[c]), size[c], 10**9).min(axis=1).sum()) for c in range(counts))
    room = int(least + tightness * (fixed[-1] + size[-1].max(axis=1).sum() - least))
    return [Program(cost=cost[c][None], size=size[c], constant=drop[c : c + 1], fixed=fixed[c], room=room) for c in range(counts)]


def best(programs: list[Program], solver: str, gap: float = 1e-6) -> Solution | None:
    """The best choice over all kept counts."""
    return solve(programs.__getitem__, len(programs), gap, solver=solver)


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 10**6), tightness=st.floats(0, 1))
def test_the_solver_finds_what_exhaustive_search_finds_and_its_bound_is_valid(seed: int, tightness: float) -> None:
    programs = random_programs(seed, tightness)
    oracle, found = best(programs, "exhaustive"), best(programs, "highs")
    assert oracle is not None and found is not None
    assert found.cost <= oracle.cost * (1 + 1e-6) + 1e-15
    assert found.bound <= oracle.cost * (1 + 1e-9) + 1e-15
    assert found.proven
    assert programs[found.count_index].broken(found.picks) == []


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 10**6), tightness=st.floats(0, 1))
def test_the_relaxation_bounds_every_count_from_below_and_its_choice_fits(seed: int, tightness: float) -> None:
    programs = random_programs(seed, tightness)
    oracle = best(programs, "exhaustive")
    assert oracle is not None
    for program, (_, least) in zip(programs, oracle.per_count, strict=True):
        relaxed = relax(program)
        assert (relaxed is None) == (least is None)
        if relaxed is not None and least is not None and relaxed.picks is not None:
            assert relaxed.bound <= least * (1 + 1e-9) + 1e-15
            assert program.evaluate(relaxed.picks)[1] <= program.room


def test_costs_of_a_millionth_nat_are_solved_as_well_as_costs_of_a_nat() -> None:
    programs = random_programs(7, 0.4)
    tiny = [Program(cost=p.cost * 1e-6, size=p.size, constant=p.constant * 1e-6, fixed=p.fixed, room=p.room) for p in programs]
    large, small = best(programs, "highs"), best(tiny, "highs")
    assert large is not None and small is not None
    assert (large.picks == small.picks).all()


def test_nothing_fits_gives_no_solution() -> None:
    programs = random_programs(3, 0.5)
    assert least_size(programs[0]) > 50
    assert best([Program(cost=p.cost, size=p.size, constant=p.constant, fixed=p.fixed, room=50) for p in programs], "highs") is None


@pytest.mark.parametrize(("budget", "expected"), [(12, 0.560), (16, 0.434), (20, 0.276)])
def test_golden_program_of_two_layers_of_four_experts(budget: int, expected: float) -> None:
    """Stock GGUF form: equal kept counts, one bit width per layer; at most two drops (optimal values by enumeration elsewhere)."""
    drop = [[0.9, 0.05, 0.02, 1.2], [0.3, 0.6, 0.04, 0.5]]
    quant = {2: [[0.08, 0.02, 0.01, 0.2], [0.05, 0.09, 0.03, 0.06]], 4: [[0.005, 0.001, 0.001, 0.01], [0.004, 0.006, 0.002, 0.003]]}
    counts = (2, 3, 4)
    options = [(kept, bits) for n in counts for kept in itertools.combinations(range(4), n) for bits in (2, 4)]
    cost = np.full((len(counts), 2, len(options)), np.inf)
    size = np.zeros(cost.shape, np.int64)
    for c, n in enumerate(counts):
        for layer in range(2):
            for o, (kept, bits) in enumerate(options):
                if len(kept) == n:
                    gone = sum(drop[layer][e] for e in range(4) if e not in kept)
                    cost[c, layer, o] = gone + sum(quant[bits][layer][e] for e in kept)
                    size[c, layer, o] = n * bits
    programs = [Program(cost=cost[c][None], size=size[c], constant=np.zeros(1), fixed=0, room=budget) for c in range(3)]
    found = best(programs, "highs")
    assert found is not None
    assert found.cost == pytest.approx(expected, abs=5e-4)
