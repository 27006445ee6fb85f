"""A generic plan says how many experts stay, and never which: nobody measured that on this model."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from command import error_of, run_cli

from edgemoe.ir import Plan
from edgemoe.plan.diff import diff_plans
from edgemoe.plan.solve import solve_plan
from edgemoe.price.priors import price_config

SHAPE = ("--generic", "qwen3-30b-a3b", "--memory", "9GB")


def plan_of(memory: int, name: str = "qwen3-30b-a3b") -> Plan:
    return solve_plan(price_config(name), memory)


def test_the_summary_and_the_json_hold_numbers_of_experts(tmp_path: Path) -> None:
    plan = plan_of(9 * 10**9)
    assert plan.drawn and plan.count < plan.n_experts
    shown = run_cli("plan", *SHAPE).stdout
    assert "which experts stay is known only after `edgemoe calibrate`" in shown
    assert f"{plan.count} of {plan.n_experts}" in shown
    assert not re.search(r"\d+-\d+ \d+", shown)  # a list of runs, as of kept experts
    kept = json.loads(run_cli("plan", *SHAPE, "--json").stdout)["kept"]
    assert kept == [plan.count] * len(plan.kept)


def test_a_keep_list_is_not_exported_and_no_expert_is_explained(tmp_path: Path) -> None:
    for more, words in ((("--export", tmp_path / "export"), "--export"), (("--why", "3:5"), "--why 3:5")):
        refused = run_cli("plan", *SHAPE, *more)
        assert refused.returncode == 2
        assert words in error_of(refused.stderr)
    assert not (tmp_path / "export").exists()


def test_a_difference_counts_experts() -> None:
    lines = diff_plans(plan_of(9 * 10**9), plan_of(8 * 10**9))
    assert any(re.fullmatch(r"  experts of layer \d+: \d+ -> \d+", line) for line in lines)
    assert not any(" out " in line for line in lines)


def test_a_sweeps_map_has_no_order_of_experts(tmp_path: Path) -> None:
    done = run_cli("plan", "--generic", "qwen3-30b-a3b", "--sweep", "9GB:12GB:1GB", "-o", tmp_path)
    assert done.returncode == 0, done.stderr
    assert "the columns have no order" in (tmp_path / "sweep.html").read_text(encoding="utf-8")


@pytest.mark.parametrize(("name", "drawn"), [("glm-5.2", False), ("deepseek-v3", True)])
def test_only_a_model_whose_experts_somebody_measured_names_them(name: str, drawn: bool) -> None:
    assert plan_of(3 * 10**11, name).drawn == drawn
