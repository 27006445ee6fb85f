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
from command import MODEL, error_of, run_cli, stop_when

from edgemoe.emit import emit_artifact
from edgemoe.inspect import inspect_model
from edgemoe.ir import Costs, Plan, Stats, load_record
from edgemoe.pipeline import choose_context
from edgemoe.plan import solve_plan
from edgemoe.price import least_process
from edgemoe.targets import find_target
from edgemoe.texts import SHIPPED

BUDGET = 45_000_000
TOKENS = ("--calibration-tokens", 8192)
ONE_CORE = ("taskset", "-c", "0") if shutil.which("taskset") else ()


@dataclasses.dataclass(frozen=True)
class Built:
    """One finished build and what it was made with."""

    out: Path
    work: Path
    heldout: Path
    stderr: str

    def command(self, out: Path, *more: object, work: Path | None = None, budget: int = BUDGET) -> list[object]:
        return [*self.start(budget), *("--heldout", self.heldout, "--work", work or self.work, "-o", out), *more]

    def start(self, budget: int) -> list[object]:
        return ["build", MODEL, "--memory", f"{budget}B", *TOKENS]

    @property
    def stats(self) -> Path:
        return next(self.work.glob("stats-*"))

    @property
    def costs(self) -> Path:
        return next(self.work.glob("costs-*.json"))


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Built:
    folder = tmp_path_factory.mktemp("build")
    heldout = folder / "heldout.txt"
    heldout.write_text((SHIPPED / "heldout" / "english.txt").read_text(encoding="utf-8")[:6000], encoding="utf-8")
    made = Built(folder / "out", folder / "work", heldout, "")
    done = run_cli(*made.command(made.out))
    assert done.returncode == 0, done.stderr
    return Built(made.out, made.work, made.heldout, done.stderr)


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


def test_progress_of_every_stage_goes_to_stderr(built: Built) -> None:
    for stage in ("calibrate", "price", "emit", "verify"):
        assert f"{stage} 100 %" in built.stderr


def test_no_path_of_this_machine_is_in_what_is_published(built: Built) -> None:
    needles = [str(built.out.parent).encode(), str(MODEL.parent).encode()]
    for file in (gguf_of(built.out), *(built.out / name for name in ("plan.json", "report.html", "README.md"))):
        body = file.read_bytes()
        assert not [n for n in needles if n in body], file.name


def test_the_stages_one_by_one_on_one_core_give_the_same_bytes(built: Built, tmp_path: Path) -> None:
    def stage(*arguments: object) -> str:
        done = run_cli(*arguments, prefix=ONE_CORE)
        assert done.returncode == 0, done.stderr
        return done.stdout

    stats = json.loads(stage("calibrate", MODEL, *TOKENS, "-o", tmp_path / "work", "--json"))["stats"]
    stage("price", MODEL, stats, "-o", tmp_path / "costs.json")
    stage("plan", tmp_path / "costs.json", "--memory", f"{BUDGET}B", "-o", tmp_path / "plan.json")
    out = tmp_path / "out"
    listed = stage("emit", MODEL, stats, tmp_path / "plan.json", "-o", out)
    assert str(gguf_of(out)) in listed
    assert_same_result(out, built.out)
    report = json.loads(stage("verify", MODEL, out, "--heldout", built.heldout, "--json"))
    assert report["measured_kl"] == pytest.approx(json.loads((built.out / "report.json").read_text())["measured_kl"], rel=1e-3)
    page = (out / "report.html").read_bytes()
    stage("report", out / "report.json", "-o", tmp_path / "again")
    assert (tmp_path / "again" / "report.html").read_bytes() == page
    assert not list(tmp_path.rglob("*.part"))


# -------------------------------------------------------------------------------------------------------- the same folder
def test_a_finished_result_is_replaced_only_with_force(built: Built, tmp_path: Path) -> None:
    out = tmp_path / "out"
    shutil.copytree(built.out, out)
    before = {p.name: p.stat().st_mtime_ns for p in out.iterdir()}
    refused = run_cli(*built.command(out))
    assert refused.returncode == 2 and str(out) in error_of(refused.stderr) and "--force" in refused.stderr
    assert {p.name: p.stat().st_mtime_ns for p in out.iterdir()} == before
    forced = run_cli(*built.command(out, "--force"))
    assert forced.returncode == 0, forced.stderr
    assert_same_result(out, built.out)
    assert {p.name for p in out.iterdir()} == set(before)
    assert gguf_of(out).stat().st_mtime_ns != before[gguf_of(out).name]


def test_a_refused_budget_keeps_what_force_would_replace(built: Built, tmp_path: Path) -> None:
    out = tmp_path / "out"
    shutil.copytree(built.out, out)
    assert run_cli(*built.command(out, "--force", budget=10_000_000)).returncode == 3
    assert_same_result(out, built.out)


def test_a_budget_below_the_least_is_refused_before_calibration_and_names_the_least(tmp_path: Path) -> None:
    model, target = inspect_model(MODEL), find_target("gguf")
    least = least_process(model, target, choose_context(model, None))
    done = run_cli("build", MODEL, "--memory", f"{least - 1}B", "-o", tmp_path / "out")
    assert done.returncode == 3 and str(least) in error_of(done.stderr)
    assert "calibrate" not in done.stderr and done.stdout == ""
    assert not (tmp_path / "out").exists()
    dry = run_cli("build", MODEL, "--memory", f"{least - 1}B", "-o", tmp_path / "out", "--dry-run")
    assert dry.returncode == 3 and str(least) in error_of(dry.stderr) and "least budget" in dry.stdout
    assert not list(tmp_path.iterdir())


# ------------------------------------------------------------------------------------------------------------ interruptions
def test_a_build_killed_in_every_stage_goes_on_to_the_same_bytes(built: Built, tmp_path: Path) -> None:
    out, work = tmp_path / "out", tmp_path / "work"
    rng = random.Random(20)
    stages: dict[str, tuple[Callable[[], bool], float]] = {  # what shows that it has begun, and how late at most it is killed
        "first layer": (lambda: any(work.glob("stats-*/main-0.bin")), 0.5),
        "second layer": (lambda: any(work.glob("stats-*/progress.json")), 0.5),
        "price": (lambda: any(work.glob("stats-*/stats.json")), 1.0),
        "repair": (lambda: any(work.glob("repair-*/progress.json")), 1.0),
        "emit": (lambda: any(work.glob("repair-*/model.json")), 0.02),  # packed rows are copied: it takes no longer
        "verify": (lambda: any(out.glob("*.gguf")), 1.0),
    }
    for name, (begun, latest) in stages.items():
        status, errors = stop_when(built.command(out, work=work), begun, rng.uniform(0, latest), signal.SIGKILL)
        assert begun(), f"{name} did not begin: {errors}"
        assert status == -signal.SIGKILL, f"{name}: {errors}"
        assert not (out / "report.json").exists()
    done = run_cli(*built.command(out, work=work))
    assert done.returncode == 0, done.stderr
    assert_same_result(out, built.out)
    assert {p.name for p in out.iterdir()} == {p.name for p in built.out.iterdir()}


def test_an_interrupt_is_exit_130_and_one_line(built: Built, tmp_path: Path) -> None:
    out, work = tmp_path / "out", tmp_path / "work"
    status, errors = stop_when(built.command(out, work=work), lambda: any(work.glob("stats-*/main-0.bin")), 0.3, signal.SIGINT)
    assert status == 130
    assert error_of(errors) == "error: interrupted"
    assert not list(out.glob("*.gguf"))


# ----------------------------------------------------------------------------------------------------------------- budgets
@pytest.mark.parametrize("percent", [90, 60, 40, 25, 15])
def test_every_budget_is_kept_to_the_byte(built: Built, tmp_path: Path, percent: int) -> None:
    model, target = inspect_model(MODEL), find_target("gguf")
    context = choose_context(model, None)
    parts = target.memory_parts(model, context)
    budget = model.n_bytes * percent // 100 + sum(size for name, size in parts.items() if name != "context")
    plan: Plan = solve_plan(load_record(built.costs, Costs), budget)
    stats = dataclasses.replace(load_record(built.stats / "stats.json", Stats), folder=str(built.stats))
    artifact = emit_artifact(model, stats, plan, target, tmp_path)
    assert artifact.path.stat().st_size == artifact.size == plan.file_size
    assert plan.memory["peak"] <= budget
    tokens = [1 + i % (model.vocab_size - 1) for i in range(context)]
    measured = target.run(artifact.path, {"context": context, "tokens": tokens, "prompts": [], "generate": 0, "repack": True}, None)
    assert measured["peak"] <= budget
