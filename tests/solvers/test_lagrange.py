"""The relaxation: layers are minimised exactly, and any prices bound every choice."""

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from programs import best, random_programs

from edgemoe.solvers.lagrange import minimise, plain_prices, relax
from edgemoe.solvers.program import Blocks, Prices, Program, Row


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


def random_blocks(seed: int) -> Program:
    """Two layers of four experts with pins, routing groups, a curve, and one other unit."""
    rng = np.random.default_rng(seed)
    n, size, options = 2, 4, 3
    cost = rng.lognormal(0, 1, (1, n * size + 1, options)) * 4.0 ** -np.arange(options)
    cost[0, : n * size, 0] = rng.lognormal(0, 1.5, n * size)
    cost[0, -1, 0] = np.inf
    pinned = rng.integers(-6, 3, n * size)  # now and then one way or the other
    cost[0, : n * size][pinned == 2, 0] = np.inf
    cost[0, : n * size][pinned == -6, 1:] = np.inf
    curve = np.cumsum(rng.uniform(-0.5, 1, (n, size + 1)), axis=1) * (rng.random() < 0.7)
    least = rng.integers(0, 4, n)
    blocks = Blocks(
        n=n,
        size=size,
        least=least,
        most=np.minimum(size, least + rng.integers(0, 4, n)),
        curve=curve - curve[:, :1],
        group=np.array([0, 0, 1, 1]),
        group_least=int(rng.integers(0, 3)),
    )
    bytes_of = np.concatenate([np.zeros((n * size + 1, 1)), rng.integers(1, 30, (n * size + 1, options - 1))], axis=1).astype(np.int64)
    return Program(cost=cost, size=bytes_of, constant=np.array([0.3]), fixed=5, room=10_000, blocks=blocks)


def cheapest(program: Program, price: float) -> float:
    """Least of cost + price * (bytes - room) over every choice that the blocks allow."""
    best, blocks = np.inf, program.blocks
    assert blocks is not None
    for choice in itertools.product(*(np.flatnonzero(np.isfinite(unit)) for unit in program.cost[0])):
        value = float(program.constant[0]) + price * (program.fixed - program.room)
        value += sum(float(program.cost[0, u, o]) + price * int(program.size[u, o]) for u, o in enumerate(choice))
        for b in range(blocks.n):
            kept = [e for e in range(blocks.size) if choice[b * blocks.size + e] != 0]
            value += float(blocks.curve[b, blocks.size - len(kept)])
            short = min(sum(blocks.group[e] == g for e in kept) for g in (0, 1)) < blocks.group_least
            if short or not blocks.least[b] <= len(kept) <= blocks.most[b]:
                value = np.inf
        best = min(best, value)
    return best


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 10**6), price=st.sampled_from([0.0, 1e-3, 0.05, 1.0]))
def test_layers_are_minimised_exactly_with_pins_groups_counts_and_curves(seed: int, price: float) -> None:
    program = random_blocks(seed)
    value, picks = minimise(program, plain_prices(program, price))
    best = cheapest(program, price)
    assert value == (np.inf if best == np.inf else pytest.approx(best, rel=1e-9, abs=1e-9))
    if best < np.inf:
        assert program.broken(picks) == []


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 10**6), tightness=st.floats(0.05, 0.95), more=st.integers(1, 300))
def test_the_price_of_a_byte_limits_what_another_byte_can_save(seed: int, tightness: float, more: int) -> None:
    program = random_programs(seed, tightness)[-1]
    here = relax(program)
    if here is None:
        return
    wider = relax(Program(cost=program.cost, size=program.size, constant=program.constant, fixed=program.fixed, room=program.room + more))
    assert wider is not None
    assert wider.bound >= here.bound - here.prices.byte * more - 1e-9 * abs(here.bound)


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 10**6), byte=st.floats(0, 1e-4), row=st.floats(0, 1e-2))
def test_any_prices_bound_every_choice_that_keeps_the_rules(seed: int, byte: float, row: float) -> None:
    rng = np.random.default_rng(seed)
    plain = random_programs(seed, 0.6)[1]
    rule = Row(name="r", coef=rng.integers(-3, 4, plain.size.shape).astype(float), limit=float(rng.integers(-2, 5)), soft=np.zeros(0))
    program = Program(cost=plain.cost, size=plain.size, constant=plain.constant, fixed=plain.fixed, room=plain.room, rows=(rule,))
    value = minimise(program, Prices(byte=byte, rows=np.array([row]), objectives=np.ones(1)))[0]
    oracle = best([program], "exhaustive")
    assert oracle is None or value <= oracle.cost * (1 + 1e-9) + 1e-15


def test_a_rule_that_only_a_much_dearer_choice_keeps_is_no_conflict() -> None:
    """Elastic rows once had a price that such a rule was not worth: the program was called infeasible."""
    n = 30
    cost = np.tile([1e-12, 1e-12, 1.0], (1, n, 1))
    size = np.tile([1, 2, 3], (n, 1)).astype(np.int64)
    rule = Row(name="dear", coef=np.tile([0.0, 0.0, -1.0], (n, 1)), limit=-7.0, soft=np.zeros(0))
    blocks = Blocks(
        n=3,
        size=10,
        least=np.ones(3, np.int64),
        most=np.full(3, 10),
        curve=np.zeros((3, 11)),
        group=np.zeros(10, np.int64),
        group_least=0,
    )
    for used in (None, blocks):
        program = Program(cost=cost, size=size, constant=np.zeros(1), fixed=0, room=1000, blocks=used, rows=(rule,))
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("edgemoe.solvers.search.MONOLITH", 0)
            found = best([program], "highs")
        assert found is not None
        assert found.cost == pytest.approx(7, rel=1e-6)
