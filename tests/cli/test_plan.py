"""`edgemoe plan`: rules, explanations, and one line for what cannot be planned."""

from pathlib import Path

import pytest
from command import run_cli

from edgemoe.base.storage import load_record, save_record
from edgemoe.ir import Costs, Plan
from edgemoe.price.priors import price_config


@pytest.fixture(scope="module")
def costs() -> Costs:
    """OLMoE-1B-7B, 16 layers of 64 experts, which nobody measured here."""
    return price_config("OLMoE-1B-7B", 4096)


def test_plan_on_the_command_line_takes_rules_and_explains(costs: Costs, tmp_path: Path) -> None:
    save_record(tmp_path / "costs.json", costs)
    out = tmp_path / "plan.json"
    rule = "bytes(tensors='attention') <= 100*MB"
    done = run_cli(
        "plan", tmp_path / "costs.json", "--memory", "3GB", "--rule", rule, "--gap", "0.01", "--explain", "--why", "output", "-o", out
    )
    assert done.returncode == 0, done.stderr
    assert f"rule {rule} binds" in done.stdout and "a byte is worth" in done.stdout
    made = load_record(out, Plan)
    assert sum(size for name, size in made.sizes.items() if "attn" in name) <= 100 * 10**6
    assert [r.name for r in made.rules] == [rule]
    assert made.origin.startswith("generic")


@pytest.mark.parametrize(
    ("arguments", "status", "word"),
    [
        (("--memory", "3GB", "--rule", "bytes() < 3"), 2, "<="),
        (("--memory", "3GB", "--rule", "__import__('os').system('true') <= 1"), 2, "called"),
        (("--memory", "3GB", "--objective", "best"), 2, "objective"),
        (("--sweep", "1GB:2GB", ), 2, "sweep"),
        (("--memory", "3GB", "--rule", "kept() >= 1024", "--rule", "kept(layers=3) <= 60"), 3, "kept(layers=3)"),
        (("--memory", "0.3GB"), 3, "least"),
    ],
)  # fmt: skip
def test_what_cannot_be_planned_is_told_in_one_line(
    costs: Costs, tmp_path: Path, arguments: tuple[str, ...], status: int, word: str
) -> None:
    save_record(tmp_path / "costs.json", costs)
    done = run_cli("plan", tmp_path / "costs.json", *arguments)
    assert done.returncode == status and word in done.stderr
    assert done.stderr.count("error:") == 1 and "Traceback" not in done.stderr
