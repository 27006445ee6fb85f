"""Rules as text say what the same rules as records say."""

import pytest

from edgemoe.ir import Costs
from edgemoe.plan.solve import solve_plan
from edgemoe.price.priors import price_config
from edgemoe.rules import MeanBits
from edgemoe.rules.recipe import expression_rule

GB = 10**9


@pytest.fixture(scope="module")
def costs() -> Costs:
    """OLMoE-1B-7B, 16 layers of 64 experts, which nobody measured here."""
    return price_config("OLMoE-1B-7B", 4096)


def test_text_rules_and_records_say_the_same(costs: Costs) -> None:
    record = solve_plan(costs, 3 * GB, rules=[MeanBits(tensors=("experts",), at_least=3.5)], gap=0.01)
    text = solve_plan(costs, 3 * GB, rules=[expression_rule("bits(tensors='experts') >= 3.5")], gap=0.01)
    assert record.formats == text.formats and record.kept == text.kept
