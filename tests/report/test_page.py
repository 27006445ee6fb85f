"""The report page: hostile text stays text, nothing is asked for, and every number is there."""

from __future__ import annotations

import html
import json
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import yaml
from reports import BITS, REPORTS, Page, make_hostile, make_onnx_report, make_report, print_at

from edgemoe.base.errors import MachineError
from edgemoe.base.ownership import seal_text
from edgemoe.base.storage import load_record
from edgemoe.ir import Report, Round
from edgemoe.report.model_card import render_card
from edgemoe.report.page import render_html, write_report
from edgemoe.report.terminal import summarize_plan, summarize_report
from edgemoe.report.words import GROUP_ORDER, allowed_size, shares_by_group


@pytest.mark.parametrize("kind", REPORTS)
def test_page_asks_for_nothing_and_runs_nothing(kind: str) -> None:
    text = render_html(REPORTS[kind]())
    page = Page(text)
    tags = {tag for tag, _ in page.elements}
    assert not tags & {"script", "iframe", "object", "embed", "base", "form", "img", "video", "audio", "use", "image", "foreignobject"}
    for tag, attributes in page.elements:
        assert not [a for a in attributes if a.startswith("on")], tag
        for name in ("src", "href", "xlink:href", "srcset", "action", "data", "poster", "background"):
            assert (attributes.get(name) or "data:").startswith("data:"), (tag, attributes)
    styles = "".join(re.findall(r"<style>(.*?)</style>", text, re.DOTALL)) + "".join(a.get("style") or "" for _, a in page.elements)
    assert "url(" not in styles
    assert "@import" not in styles
    policies = [a["content"] for t, a in page.elements if t == "meta" and a.get("http-equiv") == "Content-Security-Policy"]
    assert policies == ["default-src 'none'; style-src 'unsafe-inline'; img-src data:"]


def test_page_shows_hostile_text_as_text() -> None:
    text = render_html(make_hostile())
    assert "<script" not in text
    assert "alert(1)</" not in text
    shown = " ".join(Page(text).text.split())
    assert "{{7*7}}" in shown
    assert shown.count("<script>alert(1)</script>") >= 8
    assert "\x1b" not in text.split("What it writes")[0]


@pytest.mark.parametrize(("n_layers", "n_experts", "count"), [(4, 16, 12), (48, 128, 80), (60, 384, 192), (3, 8, 8)])
def test_map_shows_every_dropped_expert_and_every_kept_one_with_its_formats(n_layers: int, n_experts: int, count: int) -> None:
    report = make_report(n_layers, n_experts, count=count)
    cells: dict[tuple[int, int], str] = {}
    for layer, first, last, what in re.findall(r"<title>layer (\d+), experts? (\d+)(?:-(\d+))?: ([^<]*)</title>", render_html(report)):
        cells |= {(int(layer), e): what for e in range(int(first), int(last or first) + 1)}
    assert len(cells) == n_layers * n_experts
    for (layer, expert), what in cells.items():
        names = [report.plan.formats[f"blk.{layer}.ffn_{p}_exps.weight"] for p in ("gate", "up", "down")]
        words = ", ".join(f"{p} {name} {BITS[name]:.2f}" for p, name in zip(("gate", "up", "down"), names, strict=True))
        assert what == (words if expert in report.plan.kept[layer] else "dropped")


def test_map_draws_as_many_cells_as_there_are_experts() -> None:
    report = make_report()
    holes = re.findall(r'<path class="hole" d="([^"]*)"', render_html(report))
    assert sum(path.count("M") for path in holes) == 4 * 4
    bands = re.findall(r'<path class="f\d+" d="([^"]*)"', render_html(report))
    assert [path.count("M") for path in bands] == [12] * 12


def test_map_labels_layers_by_their_number_in_the_model_when_the_first_is_dense() -> None:
    report = make_report()
    units = tuple(replace(u, layer=u.layer + 1) if u.layer >= 0 else u for u in report.plan.units)
    page = render_html(replace(report, plan=replace(report.plan, units=units)))
    assert "<title>layer 4, expert" in page
    assert "<title>layer 0, expert" not in page


@pytest.mark.parametrize("kind", REPORTS)
def test_everything_renders_whatever_was_measured(kind: str) -> None:
    report = REPORTS[kind]()
    for text in (
        render_html(report),
        render_card(report),
        print_at(summarize_report(report), 80),
        print_at(summarize_plan(report.plan), 80),
    ):
        assert len(text) > 500
        assert "None" not in text
        assert not re.search(r"\bnan\b|\binf\b", text)


def test_page_marks_the_file_on_the_curve_and_the_largest_file_allowed() -> None:
    report = make_report()
    page = render_html(report)
    predicted, measured = ([float(v) for v in re.search(f'<circle class="{m}" cx="([^"]*)" cy="([^"]*)" r="6.5"', page).groups()]  # type: ignore[union-attr]
                           for m in ("predicted", "measured"))  # fmt: skip
    assert predicted[0] == measured[0]
    assert predicted[1] > measured[1]  # more loss is higher up
    curve = [tuple(map(float, point.split())) for point in re.search(r'class="curve" d="M([^"]*)"', page).group(1).split("L")]  # type: ignore[union-attr]
    assert min(abs(x - predicted[0]) + abs(y - predicted[1]) for x, y in curve) < 0.2  # the frontier passes through the plan
    allowed = float(re.search(r'class="allowed" d="M([\d.]+)', page).group(1))  # type: ignore[union-attr]
    slope = (curve[-1][0] - curve[0][0]) / (report.frontier[-1]["file_size"] - report.frontier[0]["file_size"])
    assert allowed - predicted[0] == pytest.approx(slope * (report.plan.budget - report.plan.memory["peak"]), abs=0.3)


def test_page_says_so_when_a_promise_was_broken() -> None:
    report = make_report()
    assert "no problems found" in render_html(report)
    broken = replace(report, measured_peak=report.plan.budget * 2, problems=("peak memory is over the budget",))
    page = render_html(broken)
    assert "no problems found" not in page
    assert "peak memory is over the budget" in page
    assert "200.0 % of the budget" in page


def test_rounds_of_refinement_are_shown_in_page_and_terminal() -> None:
    first = Round(
        predicted=0.0123, expected=0.0345, predicted_drops=0.0021, expected_drops=0.0067, count=12, file_size=10**7, drop_factor=3.2,
        format_factor=2.6,
    )  # fmt: skip
    report = replace(make_report(), rounds=(first, replace(first, predicted=0.0289, expected=0.0291)))
    for text in (Page(render_html(report)).text, print_at(summarize_report(report), 80)):
        assert all(number in text for number in ("0.0123", "0.0345", "0.0021", "0.0067", "0.0289", "0.0291"))
    assert "refine" not in print_at(summarize_report(make_report()), 80)


def test_bytes_by_role_add_up_to_the_file() -> None:
    plan = make_report().plan
    shares = shares_by_group(plan)
    assert sum(sum(formats.values()) for formats in shares.values()) == plan.file_size
    assert list(shares) == [*GROUP_ORDER[1:7], "router, norms, header"]


def test_written_report_opens_again_and_leaves_no_parts(tmp_path: Path) -> None:
    report = make_report()
    write_report(report, tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["README.md", "report.html", "report.json"]
    assert load_record(tmp_path / "report.json", Report) == report
    assert (tmp_path / "report.html").read_text(encoding="utf-8") == seal_text(render_html(report))
    assert (tmp_path / "README.md").read_text(encoding="utf-8") == seal_text(render_card(report))


def test_failed_write_keeps_the_old_page_and_says_why(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_report(make_report(), tmp_path)
    before = {p.name: p.read_bytes() for p in tmp_path.iterdir()}

    def full(*_: object, **__: object) -> int:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_text", full)
    with pytest.raises(MachineError, match="No space left"):
        write_report(make_report(count=10), tmp_path)
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir() if p.suffix != ".part"} == before


def test_text_that_is_no_unicode_does_not_stop_the_report(tmp_path: Path) -> None:
    report = make_report()
    samples = ({"prompt": "a\ud800b", "text": "\udfff", "loops": False},)
    model = {**report.model, "name": "n\ud800"}
    broken = replace(report, samples=samples, model=model)
    for text in (render_html(broken), render_card(broken)):
        (tmp_path / "x").write_text(text, encoding="utf-8")


def test_same_report_gives_the_same_bytes() -> None:
    assert render_html(make_report()) == render_html(make_report())
    assert render_card(make_report()) == render_card(make_report())


def test_import_is_light() -> None:
    code = "import sys, edgemoe.report; print([m for m in ('jinja2', 'rich', 'yaml', 'torch', 'transformers') if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == "[]"


def open_in_chromium(page: Path, folder: Path) -> tuple[str, list[str], list[str]]:
    """The DOM after loading, the console's lines, and the URLs that the page asked for.

    Chromium asks for updates of its own at every start; those have no origin, a page's requests have one.
    """
    log = folder / "net.json"
    quiet = ["--disable-background-networking", "--disable-component-update", "--disable-sync", "--host-resolver-rules=MAP * ~NOTFOUND"]
    flags = [
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        "--disable-quic",
        "--no-first-run",
        f"--user-data-dir={folder / 'profile'}",
        *quiet,
    ]
    flags += ["--enable-logging=stderr", "--v=0", f"--log-net-log={log}", "--dump-dom", page.as_uri()]
    run = subprocess.run([shutil.which("chromium") or "chromium", *flags], capture_output=True, text=True, timeout=120, check=True)
    events = json.loads(log.read_text(encoding="utf-8"))["events"]
    starts = [e["params"] for e in events if "initiator" in e.get("params", {}) and "url" in e["params"]]
    asked = [p["url"] for p in starts if p["initiator"] != "not an origin" and p["url"].startswith("http")]
    return run.stdout, [line for line in run.stderr.splitlines() if "CONSOLE" in line], asked


@pytest.mark.parametrize("kind", ["small", "large", "hostile"])
def test_page_opens_in_a_browser_without_errors_or_requests(kind: str, tmp_path: Path) -> None:
    if not shutil.which("chromium"):
        pytest.skip("chromium is not installed: apt-get install chromium")
    page = tmp_path / "report.html"
    page.write_text(render_html(REPORTS[kind]()), encoding="utf-8")
    dom, console, asked = open_in_chromium(page, tmp_path)
    assert "</main>" in dom
    assert html.unescape(dom).count("<title>layer ") > 10
    assert console == []
    assert asked == []


def test_browser_check_would_notice_a_request_or_a_script(tmp_path: Path) -> None:
    if not shutil.which("chromium"):
        pytest.skip("chromium is not installed: apt-get install chromium")
    text = render_html(make_report()).replace("</main>", '<img src="http://127.0.0.1:9/x.png"><script>alert(1)</script></main>')
    page = tmp_path / "report.html"
    page.write_text(text, encoding="utf-8")
    _, console, asked = open_in_chromium(page, tmp_path)
    assert len(console) == 2  # the page's own policy stops both
    assert asked == []
    page.write_text(re.sub(r"<meta http-equiv[^>]*>|<script>.*?</script>", "", text), encoding="utf-8")
    assert open_in_chromium(page, tmp_path)[2] == ["http://127.0.0.1:9/x.png"]


def test_map_colours_every_expert_by_its_own_format() -> None:
    report = make_onnx_report()
    page = render_html(report)
    for layer, kept in enumerate(report.plan.kept):
        for expert in range(report.plan.n_experts):
            told = report.plan.formats[f"blk.{layer}.ffn_exps.{expert}"] if expert in kept else "dropped"
            assert re.search(rf"<title>layer {layer}, expert {expert}: {told}", page), (layer, expert)
    cells = {name: len(re.findall(r"M", "".join(re.findall(rf'<path class="{name}" d="([^"]*)"', page)))) for name in ("f0", "f1", "f2")}
    assert sum(cells.values()) == sum(map(len, report.plan.kept))


def test_what_differs_by_layer_and_by_target_is_said_so() -> None:
    report = make_onnx_report()
    page, card, printed = render_html(report), render_card(report), print_at(summarize_report(report), 160)
    assert "10-16 of 16" in page and "10-16 of 16" in card and "10 to 16 of 16 kept in each of 4 layers, 13.0 on average" in printed
    for text in (page, card):
        assert "llama" not in text.lower() and "onnxruntime_genai" in text and "8-bit experts in floats" in text
    assert "12 experts, up to 6 of a layer, are gone" in card
    assert "equal to the byte" in page and "as predicted" in printed  # the tokenizer's bytes are not the model's
    assert yaml.safe_load(card.split("---")[1])["library_name"] == "onnxruntime"
    assert allowed_size(report.plan) == report.plan.budget - report.plan.memory["peak"] + report.plan.file_size


def test_bytes_of_single_experts_are_one_group() -> None:
    groups = shares_by_group(make_onnx_report().plan)
    assert set(groups["experts"]) == {"INT2_128", "INT3_128", "INT8_32"} and "attention" in groups


@pytest.mark.parametrize(("factor", "said"), [(1.0, "no problems found"), (1.6, "the KL is 1.6 times the predicted one")])
def test_a_kl_well_above_the_prediction_is_not_called_no_problem(factor: float, said: str) -> None:
    report = make_report()
    page = render_html(replace(report, problems=(), measured_kl=factor * report.plan.predicted_kl))
    assert said in page
    assert ("no problems found" in page) == (factor == 1.0)
