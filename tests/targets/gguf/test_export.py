"""Plans as options of llama.cpp: types for llama-quantize, flags for what stays in main memory."""

import json
import re
from pathlib import Path

import pytest

from edgemoe.ir import Costs, Plan
from edgemoe.plan.solve import solve_plan
from edgemoe.price.priors import price_config
from edgemoe.rules import Vram
from edgemoe.targets.gguf.export import export_plan, gpu_flags, tensor_type_lines

GB = 10**9


@pytest.fixture(scope="module")
def costs() -> Costs:
    """OLMoE-1B-7B, 16 layers of 64 experts, which nobody measured here."""
    return price_config("OLMoE-1B-7B", 4096)


@pytest.fixture(scope="module")
def plan(costs: Costs) -> Plan:
    return solve_plan(costs, 3 * GB)


def test_exported_types_are_the_plan_s_and_every_pattern_names_one_tensor(plan: Plan, tmp_path: Path) -> None:
    export_plan(plan, tmp_path / "out")
    keep = json.loads((tmp_path / "out" / "keep.json").read_text())
    assert [len(k) for k in keep["keep"]] == [plan.count] * 16
    for line in tensor_type_lines(plan):
        pattern, _, kind = line.partition("=")
        (name,) = (n for n in plan.formats if re.search(pattern, n))
        assert plan.formats[name].lower() == kind


def test_gpu_flags_name_exactly_the_stacks_that_stay_in_main_memory(costs: Costs) -> None:
    made = solve_plan(costs, 3 * GB, rules=[Vram(size="4GB", reserve="500MB")])
    patterns = [flag.split('"')[1].removesuffix("=CPU") for flag in gpu_flags(made) if flag.startswith("-ot")]
    on_cpu = {n for n in made.formats if any(re.search(p, n) for p in patterns)}
    assert on_cpu | {"token_embd.weight"} == set(made.formats) - set(made.vram)
    assert sum(made.sizes[n] for n in made.vram) + costs.memory["kv"] + costs.memory["compute"] + 500 * 10**6 <= 4 * GB
