"""`edgemoe build` as users run it: what it promises holds, whatever interrupts it and however many cores there are."""

from __future__ import annotations

import dataclasses
import json
import math
import random
import shutil
import signal
from collections.abc import Callable
from pathlib import Path

import pytest
from command import MODEL, TOKENS, error_of, run_cli, stop_when
from tiny import make_checkpoint

from edgemoe.ir import Costs, Plan, Stats
from edgemoe.model.describe import resize_experts
from edgemoe.model.inspect import inspect_model
from edgemoe.pipeline.emit import emit_artifact
from edgemoe.pipeline.request import choose_context
from edgemoe.plan.solve import solve_plan
from edgemoe.price.choices import least_process
from edgemoe.repair.width import choose_widths
from edgemoe.stream.texts import SHIPPED
from edgemoe.targets import find_target

BUDGET = 45_000_000
TIGHT = 100_000  # bytes beyond the least that the random checkpoint may need; all experts, in the fewest bits, would take 106,496
GUARDED = 8192  # tokens: four windows of each shipped text, the least of which one is set aside to judge what was fitted
ONE_CORE = ("taskset", "-c", "0") if shutil.which("taskset") else ()


@dataclasses.dataclass(frozen=True)
class Built:
    """One finished build and what it was made with."""

    model: Path
    budget: int
    tokens: int
    out: Path
    work: Path
    heldout: Path
    stderr: str = ""

    def command(self, out: Path, *more: object, work: Path | None = None, budget: int = 0) -> list[object]:
        start = ["build", self.model, "--memory", f"{budget or self.budget}B", "--calibration-tokens", self.tokens]
        return [*start, "--heldout", self.heldout, "--work", work or self.work, "-o", out, *more]


def make_build(folder: Path, work: Path, model: Path, budget: int, tokens: int) -> Built:
    heldout = folder / "heldout.txt"
    heldout.write_text((SHIPPED / "heldout" / "english.txt").read_text(encoding="utf-8")[:6000], encoding="utf-8")
    made = Built(model, budget, tokens, folder / "out", work, heldout)
    done = run_cli(*made.command(made.out))
    assert done.returncode == 0, done.stderr
    return dataclasses.replace(made, stderr=done.stderr)


@pytest.fixture(scope="module")
def built(work: Path, gguf_costs: Costs, tmp_path_factory: pytest.TempPathFactory) -> Built:
    """A build of the bundled model, with statistics and prices that were there."""
    return make_build(tmp_path_factory.mktemp("build"), work, MODEL, BUDGET, TOKENS)


@pytest.fixture(scope="module")
def quick(tmp_path_factory: pytest.TempPathFactory) -> Built:
    """A build of a small random checkpoint, all stages, that must drop experts: soon done again."""
    folder = tmp_path_factory.mktemp("quick")
    source = make_checkpoint(folder / "random", "mixtral", n_experts=4, hidden=128, expert_size=128)
    model, target = inspect_model(source), find_target("gguf")
    least = least_process(model, target, choose_context(model, None))
    return make_build(folder, folder / "work", source, least + TIGHT, GUARDED)


def gguf_of(out: Path) -> Path:
    (file,) = out.glob("*.gguf")
    return file


def assert_same_result(out: Path, expected: Path) -> None:
    assert gguf_of(out).name == gguf_of(expected).name
    assert gguf_of(out).read_bytes() == gguf_of(expected).read_bytes()
    assert (out / "plan.json").read_bytes() == (expected / "plan.json").read_bytes()


# -------------------------------------------------------------------------------------------------------------- promises
def test_the_output_holds_the_gguf_and_its_papers_and_nothing_else(built: Built) -> None:
    names = {p.name for p in built.out.iterdir()}
    assert names == {gguf_of(built.out).name, "plan.json", "report.json", "report.html", "README.md"}


def test_the_file_has_exactly_the_planned_bytes_and_runs_within_the_budget(built: Built) -> None:
    plan, report = (json.loads((built.out / name).read_text()) for name in ("plan.json", "report.json"))
    assert gguf_of(built.out).stat().st_size == plan["file_size"]
    assert plan["memory"]["peak"] <= plan["budget"] == BUDGET
    assert 0 < report["measured_peak"] <= BUDGET
    assert math.isfinite(report["measured_kl"]) and 0 < report["measured_kl"] < 1


def test_progress_of_every_stage_goes_to_stderr(quick: Built) -> None:
    for stage in ("calibrate", "price", "repair", "emit", "verify"):
        assert f"{stage} done in " in quick.stderr


def test_no_path_of_this_machine_is_in_what_is_published(built: Built) -> None:
    needles = [str(built.out.parent).encode(), str(MODEL.parent).encode()]
    for file in (gguf_of(built.out), *(built.out / name for name in ("plan.json", "report.html", "README.md"))):
        body = file.read_bytes()
        assert not [n for n in needles if n in body], file.name


def test_the_stages_one_by_one_on_one_core_give_the_same_bytes(quick: Built, tmp_path: Path) -> None:
    def stage(*arguments: object) -> str:
        done = run_cli(*arguments, prefix=ONE_CORE)
        assert done.returncode == 0, done.stderr
        return done.stdout

    calibrated = stage("calibrate", quick.model, "--calibration-tokens", quick.tokens, "-o", tmp_path / "work", "--json")
    stats = json.loads(calibrated)["stats"]
    stage("price", quick.model, stats, "-o", tmp_path / "costs.json")
    stage("plan", tmp_path / "costs.json", "--memory", f"{quick.budget}B", "-o", tmp_path / "plan.json")
    out = tmp_path / "out"
    listed = stage("emit", quick.model, stats, tmp_path / "plan.json", "-o", out)
    assert str(gguf_of(out)) in listed
    assert_same_result(out, quick.out)
    report = json.loads(stage("verify", quick.model, out, "--heldout", quick.heldout, "--json"))
    assert report["measured_kl"] == pytest.approx(json.loads((quick.out / "report.json").read_text())["measured_kl"], rel=1e-3)
    assert report["plan"]["repair"] and len(report["plan"]["kept"][0]) < 4  # so the survivors were refitted
    page = (out / "report.html").read_bytes()
    stage("report", out / "report.json", "-o", tmp_path / "again")
    assert (tmp_path / "again" / "report.html").read_bytes() == page
    assert not list(tmp_path.rglob("*.part"))


# -------------------------------------------------------------------------------------------------------- the same folder
def test_a_finished_result_is_replaced_only_with_force(quick: Built, tmp_path: Path) -> None:
    out = tmp_path / "out"
    shutil.copytree(quick.out, out)
    before = {p.name: p.stat().st_mtime_ns for p in out.iterdir()}
    refused = run_cli(*quick.command(out))
    assert refused.returncode == 2 and str(out) in error_of(refused.stderr) and "--force" in refused.stderr
    assert {p.name: p.stat().st_mtime_ns for p in out.iterdir()} == before
    forced = run_cli(*quick.command(out, "--force"))
    assert forced.returncode == 0, forced.stderr
    assert_same_result(out, quick.out)
    assert {p.name for p in out.iterdir()} == set(before)
    assert gguf_of(out).stat().st_mtime_ns != before[gguf_of(out).name]


def test_a_refused_budget_keeps_what_force_would_replace(quick: Built, tmp_path: Path) -> None:
    out = tmp_path / "out"
    shutil.copytree(quick.out, out)
    assert run_cli(*quick.command(out, "--force", budget=10_000_000)).returncode == 3
    assert_same_result(out, quick.out)


def test_a_budget_below_the_least_is_refused_before_calibration_and_names_the_least(tmp_path: Path) -> None:
    model, target = inspect_model(MODEL), find_target("gguf")
    narrowest = resize_experts(model, choose_widths(model, "")[-1])  # unasked, half the width is tried where the whole does not fit
    least = least_process(narrowest, target, choose_context(model, None))
    done = run_cli("build", MODEL, "--memory", f"{least - 1}B", "-o", tmp_path / "out")
    assert done.returncode == 3 and str(least) in error_of(done.stderr)
    assert "calibrate" not in done.stderr and done.stdout == ""
    assert not (tmp_path / "out").exists()
    dry = run_cli("build", MODEL, "--memory", f"{least - 1}B", "-o", tmp_path / "out", "--dry-run")
    assert dry.returncode == 3 and str(least) in error_of(dry.stderr) and "least budget" in dry.stdout
    assert not list(tmp_path.iterdir())


# ------------------------------------------------------------------------------------------------------------ interruptions
def test_a_build_killed_in_every_stage_goes_on_to_the_same_bytes(quick: Built, tmp_path: Path) -> None:
    out, work = tmp_path / "out", tmp_path / "work"
    rng = random.Random(20)
    stages: dict[str, tuple[Callable[[], bool], float]] = {  # what shows that it has begun, and how late at most it is killed
        "calibrate": (lambda: any(work.glob("stats-*/progress.json")), 0.2),
        "price": (lambda: any(work.glob("stats-*/stats.json")), 0.3),
        "repair": (lambda: any(work.glob("repair-*/progress.json")), 0.3),
        "emit": (lambda: any(work.glob("repair-*/model.json")), 0.02),  # packed rows are copied: it takes no longer
        "verify": (lambda: any(out.glob("*.gguf")), 0.5),
    }
    for name, (begun, latest) in stages.items():
        status, errors = stop_when(quick.command(out, work=work), begun, rng.uniform(0, latest), signal.SIGKILL)
        assert begun(), f"{name} did not begin: {errors}"
        assert status == -signal.SIGKILL, f"{name}: {errors}"
        assert not (out / "report.json").exists()
    done = run_cli(*quick.command(out, work=work))
    assert done.returncode == 0, done.stderr
    assert_same_result(out, quick.out)
    assert {p.name for p in out.iterdir()} == {p.name for p in quick.out.iterdir()}


def test_an_interrupt_is_exit_130_and_one_line(quick: Built, tmp_path: Path) -> None:
    out, work = tmp_path / "out", tmp_path / "work"
    status, errors = stop_when(quick.command(out, work=work), lambda: any(work.glob("stats-*/main-0.bin")), 0.3, signal.SIGINT)
    assert status == 130
    assert error_of(errors) == "error: interrupted"
    assert not list(out.glob("*.gguf"))


# ----------------------------------------------------------------------------------------------------------------- budgets
@pytest.mark.parametrize("percent", [90, 60, 40, 25, 15])
def test_every_budget_is_kept_to_the_byte(shipped_stats: Stats, gguf_costs: Costs, tmp_path: Path, percent: int) -> None:
    model, target = inspect_model(MODEL), find_target("gguf")
    context = choose_context(model, None)
    parts = target.memory_parts(model, context)
    budget = model.n_bytes * percent // 100 + sum(size for name, size in parts.items() if name != "context")
    plan: Plan = solve_plan(gguf_costs, budget)
    artifact = emit_artifact(model, shipped_stats, plan, target, tmp_path)
    assert artifact.path.stat().st_size == artifact.size == plan.file_size
    assert plan.memory["peak"] <= budget
    tokens = [1 + i % (model.vocab_size - 1) for i in range(context)]
    measured = target.run(artifact.path, {"context": context, "tokens": tokens, "prompts": [], "generate": 0, "repack": True}, None)
    assert measured["peak"] <= budget
