"""The terminal summary: promised and measured numbers in eighty columns."""

from __future__ import annotations

import re

from reports import make_hostile, make_report, print_at

from edgemoe.report.terminal import summarize_plan, summarize_report


def test_summary_prints_promised_and_measured_numbers() -> None:
    report = make_report()
    text = print_at(summarize_report(report), 120)
    numbers = (
        "12 of 16 kept",
        str(report.artifact.size),
        "0.0371 measured, 0.0312 predicted",
        "812.4 prompt, 73.2 decode",
        "90.8%",
        "11.700",
    )
    words = ("acme/tiny-moe", "as predicted", "Q3_K", "german", "12.308", "proven by ilp-highs", "report.html")
    for expected in (*numbers, *words):
        assert expected in text
    weights = sum(u.n_weights * (0.75 if u.role.endswith("exps") else 1) for u in report.plan.units)
    assert f"{8 * sum(report.plan.sizes.values()) / weights:.3f}" in text


def test_summary_fits_a_terminal_of_eighty_columns_and_carries_no_escapes() -> None:
    for report in (make_report(), make_hostile()):
        for renderable in (summarize_report(report), summarize_plan(report.plan)):
            text = print_at(renderable, 80)
            assert max(map(len, text.splitlines())) <= 80
            assert all(c.isprintable() or c == "\n" for c in text)
    assert "[bold]x[/bold]" in print_at(summarize_report(make_hostile()), 200)
    assert re.search(r"english +4096 .* 9\.702", print_at(summarize_report(make_report()), 80))


def test_plan_summary_lists_kept_experts_and_bound() -> None:
    plan = make_report().plan
    text = print_at(summarize_plan(plan), 120)
    for layer in range(4):
        kept = re.search(rf"^ ?{layer} +([\d -]+?)  ", text, re.MULTILINE)
        assert kept is not None
        spans = [(int(s.split("-")[0]), int(s.split("-")[-1])) for s in kept.group(1).split()]
        assert tuple(e for a, b in spans for e in range(a, b + 1)) == plan.kept[layer]
    assert "no plan costs less than 0.02209, gap 0.045%, proven by ilp-highs" in text
    assert str(plan.file_size) in text
    assert "52 layers between" in print_at(summarize_plan(make_report(60, 384, count=192).plan), 100)
