"""Sweeps of budgets, from generic prices of a shipped shape."""

import csv
import io
import re
import subprocess
from pathlib import Path

import pytest
from strategies import budget_between, random_costs

from edgemoe.base.errors import UsageError
from edgemoe.ir import Costs
from edgemoe.plan.sweep import COLUMNS, parse_budgets, render_sweep, sweep_budgets, write_csv
from edgemoe.price.priors import price_config

GB = 10**9
CHROMIUM = ("chromium", "--headless", "--no-sandbox", "--disable-gpu", "--disable-background-networking", "--virtual-time-budget=2000")


@pytest.fixture(scope="module")
def costs() -> Costs:
    """OLMoE-1B-7B, 16 layers of 64 experts, which nobody measured here."""
    return price_config("OLMoE-1B-7B", 4096)


def test_more_memory_never_costs_more_and_what_is_too_little_is_told(costs: Costs) -> None:
    points = sweep_budgets(costs, parse_budgets("400MB:7GB:1100MB"))
    plans = [p.plan for p in points if p.plan is not None]
    assert points[0].plan is None and len(plans) >= 5
    assert [p.q for p in plans] == sorted((p.q for p in plans), reverse=True)
    assert all(p.memory["peak"] <= p.budget for p in plans)


def test_a_sweep_with_a_loose_gap_carries_the_better_plan_over() -> None:
    costs = random_costs(0, "stacks", layers=3, experts=6, formats=4)
    points = sweep_budgets(costs, sorted({budget_between(costs, i / 40) for i in range(1, 30)}), solver="lagrange", gap=0.9)
    q = [p.plan.q for p in points if p.plan is not None]
    assert q == sorted(q, reverse=True)
    assert all(p.plan is not None and p.plan.budget == p.budget and p.plan.bound <= p.plan.q for p in points)
    carried = [p.plan for p in points if p.carried_over and p.plan is not None]
    assert carried and all(p.gap == pytest.approx(1 - p.bound / p.q) for p in carried)


def test_the_csv_is_the_sweep(costs: Costs) -> None:
    points = sweep_budgets(costs, [GB // 4, 4 * GB])
    rows = list(csv.DictReader(io.StringIO(write_csv(points))))
    assert list(rows[0]) == list(COLUMNS)
    assert rows[0]["file_size"] == "" and points[1].plan is not None
    assert int(rows[1]["file_size"]) == points[1].plan.file_size


@pytest.mark.parametrize("text", ["64GB", "64GB:32GB:1GB", "1GB:2TB:1MB", "1GB:2GB:0B", "a:b:c"])
def test_a_range_that_is_none_is_refused(text: str) -> None:
    with pytest.raises(UsageError):
        parse_budgets(text)


def test_the_page_shows_every_plan_and_a_hostile_name_stays_text(costs: Costs, tmp_path: Path) -> None:
    from dataclasses import replace

    hostile = replace(costs, model_name="</script><script>document.title='owned'</script>", origin="<img src=x onerror=alert(1)>")
    points = sweep_budgets(hostile, [3 * GB, 4 * GB])
    page = render_sweep(hostile, points)
    assert "<script>document" not in page and "<img" not in page
    (tmp_path / "sweep.html").write_text(page)
    try:
        shown = subprocess.run(
            [*CHROMIUM, "--dump-dom", tmp_path / "sweep.html"], capture_output=True, text=True, timeout=120, check=True
        ).stdout
    except FileNotFoundError:
        pytest.skip("chromium is not installed: apt-get install chromium")
    assert "predicted KL" in shown and "of 64" in shown  # what only the script writes
    assert re.search(r"<canvas[^>]* width=\"\d+", shown)
    assert "<title>owned" not in shown
