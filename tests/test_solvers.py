"""The integer program against exhaustive search, and its promises."""

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edgemoe.solvers import exhaustive, ilp
from edgemoe.solvers.lagrange import relax_count
from edgemoe.solvers.program import Program


def random_program(seed: int, tightness: float) -> Program:
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
    fixed = np.array([100, 110, 120])
    least = min(Program(cost=cost, size=size, drop=drop, fixed=fixed, room=0).least_size(c) for c in range(counts))
    most = int(fixed[-1] + size[-1].max(axis=1).sum())
    return Program(cost=cost, size=size, drop=drop, fixed=fixed, room=int(least + tightness * (most - least)))


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 10**6), tightness=st.floats(0, 1))
def test_the_solver_finds_what_exhaustive_search_finds_and_its_bound_is_valid(seed: int, tightness: float) -> None:
    program = random_program(seed, tightness)
    best, found = exhaustive.solve(program), ilp.solve(program, 1e-6)
    assert best is not None and found is not None
    assert found.cost <= best.cost * (1 + 1e-6) + 1e-15
    assert found.bound <= best.cost * (1 + 1e-9) + 1e-15
    assert found.proven
    assert ilp.replay(program, found) == []


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 10**6), tightness=st.floats(0, 1))
def test_the_relaxation_bounds_every_count_from_below_and_its_choice_fits(seed: int, tightness: float) -> None:
    program = random_program(seed, tightness)
    best = exhaustive.solve(program)
    assert best is not None
    for c, (_, least) in enumerate(best.per_count):
        relaxed = relax_count(program, c)
        assert (relaxed is None) == (least is None)
        if relaxed is not None and least is not None:
            assert relaxed.bound <= least * (1 + 1e-9) + 1e-15
            assert program.evaluate(c, relaxed.picks)[1] <= program.room


def test_costs_of_a_millionth_nat_are_solved_as_well_as_costs_of_a_nat() -> None:
    program = random_program(7, 0.4)
    tiny = Program(cost=program.cost * 1e-6, size=program.size, drop=program.drop * 1e-6, fixed=program.fixed, room=program.room)
    large, small = ilp.solve(program, 1e-6), ilp.solve(tiny, 1e-6)
    assert large is not None and small is not None
    assert (large.picks == small.picks).all()


def test_nothing_fits_gives_no_solution() -> None:
    program = random_program(3, 0.5)
    assert ilp.solve(Program(cost=program.cost, size=program.size, drop=program.drop, fixed=program.fixed, room=50), 1e-4) is None


def test_a_forged_solution_is_caught_by_the_replay() -> None:
    from dataclasses import replace

    program = random_program(11, 0.3)
    found = ilp.solve(program, 1e-4)
    assert found is not None
    assert ilp.replay(program, replace(found, cost=found.cost / 2, bound=0.0))
    assert ilp.replay(program, replace(found, picks=np.full_like(found.picks, 4)))


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
    program = Program(cost=cost, size=size, drop=np.zeros(3), fixed=np.zeros(3, np.int64), room=budget)
    found = ilp.solve(program, 1e-6)
    assert found is not None
    assert found.cost == pytest.approx(expected, abs=5e-4)
