"""`edgemoe build --target onnx` as users run it: the same command and the same promises, kept in onnxruntime."""

from __future__ import annotations

import dataclasses
import json
import math
import signal
from pathlib import Path

import pytest
from command import MODEL, TOKENS, error_of, run_cli, stop_when

from edgemoe.base.storage import load_record
from edgemoe.ir import Costs, Report, Stats
from edgemoe.model.inspect import inspect_model
from edgemoe.pipeline.emit import emit_artifact
from edgemoe.plan.infeasible import least_budget
from edgemoe.plan.solve import solve_plan
from edgemoe.price.choices import least_process
from edgemoe.stream.texts import SHIPPED
from edgemoe.targets import find_target

TARGET = find_target("onnx")
BUDGET, CONTEXT = 96_000_000, 512
CLOSE = 0.05  # of the measured peak, that its prediction may be off,
SMALL = 24 * 2**20  # or bytes: 6 for formats of a layer that a plan does not use, 18 by which the mapped libraries differ (decision 8)
PAPERS = {"plan.json", "report.json", "report.html", "README.md"}


@dataclasses.dataclass(frozen=True)
class Built:
    """One finished build and what it was made with."""

    out: Path
    work: Path
    costs: Costs
    heldout: Path

    def command(self, out: Path, *more: object) -> list[object]:
        start = ["build", MODEL, "--target", "onnx", "--memory", f"{BUDGET}B", "--context", CONTEXT, "--calibration-tokens", TOKENS]
        return [*start, "--heldout", self.heldout, "--work", self.work, "-o", out, *more]


@pytest.fixture(scope="module")
def built(work: Path, onnx_costs: Costs, tmp_path_factory: pytest.TempPathFactory) -> Built:
    folder = tmp_path_factory.mktemp("onnx")
    heldout = folder / "heldout.txt"
    heldout.write_text((SHIPPED / "heldout" / "english.txt").read_text(encoding="utf-8")[:6000], encoding="utf-8")
    made = Built(folder / "out", work, onnx_costs, heldout)
    done = run_cli(*made.command(made.out))
    assert done.returncode == 0, done.stderr
    assert "onnx" in done.stdout and "as predicted" in done.stdout and "8-bit experts in floats" in done.stdout
    return made


def report_of(out: Path) -> Report:
    return load_record(out / "report.json", Report)


def assert_same_model(out: Path, expected: Path) -> None:
    for name in ("model.onnx", "model.onnx.data", "plan.json"):
        assert (out / name).read_bytes() == (expected / name).read_bytes(), name


# -------------------------------------------------------------------------------------------------------------- promises
def test_the_folder_holds_what_the_report_lists(built: Built) -> None:
    report = report_of(built.out)
    listed = {f.name: f.size for f in report.artifact.files}
    assert list(listed)[:2] == ["model.onnx", "model.onnx.data"] and "tokenizer.json" in listed
    assert {p.name: p.stat().st_size for p in built.out.iterdir() if p.name not in PAPERS} == listed
    assert set(listed) <= set(TARGET.fixed_names)


def test_bytes_are_the_plans_and_the_process_stays_within_the_budget(built: Built) -> None:
    report = report_of(built.out)
    both = sum((built.out / name).stat().st_size for name in ("model.onnx", "model.onnx.data"))
    assert both == report.plan.file_size == report.artifact.model_size
    assert report.measured_peak <= report.plan.memory["peak"] <= report.plan.budget == BUDGET
    assert report.plan.memory["peak"] == pytest.approx(report.measured_peak, rel=CLOSE, abs=SMALL)
    assert math.isfinite(report.measured_kl) and 0 < report.measured_kl < 1
    assert report.beside_kl == pytest.approx(report.measured_kl, rel=0.5)
    assert "onnxruntime" in report.runtime
    assert not [p for p in report.problems if not p.startswith("note:")]


def test_page_and_card_speak_of_onnxruntime(built: Built) -> None:
    page, card = ((built.out / name).read_text(encoding="utf-8") for name in ("report.html", "README.md"))
    for text in (page, card):
        assert "onnxruntime_genai" in text and "llama" not in text.lower() and "8-bit experts in floats" in text
    assert "library_name: onnxruntime" in card
    assert not [n for n in (str(built.out.parent), str(MODEL.parent)) if n in page + card]


@pytest.mark.slow
def test_the_stages_one_by_one_give_the_same_bytes(built: Built, tmp_path: Path) -> None:
    def stage(*arguments: object) -> str:
        done = run_cli(*arguments)
        assert done.returncode == 0, done.stderr
        return done.stdout

    stats = next(built.work.glob("stats-*"))
    stage("price", MODEL, stats, "--target", "onnx", "--context", CONTEXT, "-o", tmp_path / "costs.json")
    stage("plan", tmp_path / "costs.json", "--memory", f"{BUDGET}B", "-o", tmp_path / "plan.json")
    stage("emit", MODEL, stats, tmp_path / "plan.json", "-o", tmp_path / "out")
    assert_same_model(tmp_path / "out", built.out)
    report = json.loads(stage("verify", MODEL, tmp_path / "out", "--heldout", built.heldout, "--json"))
    assert report["measured_kl"] == pytest.approx(report_of(built.out).measured_kl, rel=1e-3)


@pytest.mark.parametrize("share", [1.0, 0.6, 0.35, 0.15, 0.02])
def test_every_budget_is_kept_to_the_byte(built: Built, tmp_path: Path, share: float) -> None:
    model = inspect_model(MODEL)
    costs = built.costs
    least = least_budget(costs) or 0
    budget = least + int(share * sum(int(costs.size[0, u].max()) for u in range(len(costs.units))))
    plan = solve_plan(costs, budget)
    folder = next(built.work.glob("stats-*"))
    artifact = emit_artifact(
        model, dataclasses.replace(load_record(folder / "stats.json", Stats), folder=str(folder)), plan, TARGET, tmp_path
    )
    assert artifact.model_size == plan.file_size
    tokens = [1 + i % (model.vocab_size - 1) for i in range(CONTEXT)]
    measured = TARGET.run(artifact.path, {"context": CONTEXT, "tokens": tokens, "prompts": [], "generate": 0}, None)
    assert measured["peak"] <= plan.memory["peak"] <= budget
    assert plan.memory["peak"] == pytest.approx(measured["peak"], rel=CLOSE, abs=SMALL)


# --------------------------------------------------------------------------------------------------------- interruptions
@pytest.mark.slow
def test_a_build_killed_while_it_writes_and_while_it_runs_goes_on_to_the_same_bytes(built: Built, tmp_path: Path) -> None:
    out = tmp_path / "out"
    for begun in (lambda: any(out.glob(".part/*")), lambda: (out / "model.onnx").exists()):
        status, errors = stop_when(built.command(out), begun, 0.05, signal.SIGKILL)
        assert status == -signal.SIGKILL, errors
        assert not (out / "report.json").exists()
    done = run_cli(*built.command(out))
    assert done.returncode == 0, done.stderr
    assert_same_model(out, built.out)
    assert {p.name for p in out.iterdir()} == {p.name for p in built.out.iterdir()}


# --------------------------------------------------------------------------------------------------------------- refusals
def test_files_of_others_are_never_overwritten_not_even_with_force(built: Built, tmp_path: Path) -> None:
    out = tmp_path / "checkpoint"
    out.mkdir()
    (out / "config.json").write_text("mine")
    done = run_cli(*built.command(out))
    assert done.returncode == 2 and "not empty" in error_of(done.stderr)
    done = run_cli(*built.command(out, "--force"))
    assert done.returncode == 2 and "config.json" in error_of(done.stderr)
    assert {p.name: p.read_text() for p in out.iterdir()} == {"config.json": "mine"}


def test_a_budget_below_the_least_is_refused_before_calibration_and_names_the_least(tmp_path: Path) -> None:
    least = least_process(inspect_model(MODEL), TARGET, CONTEXT)
    command = ["build", MODEL, "--target", "onnx", "--context", CONTEXT, "-o", tmp_path / "out"]
    done = run_cli(*command, "--memory", f"{least - 1}B")
    assert done.returncode == 3 and str(least) in error_of(done.stderr)
    assert not (tmp_path / "out").exists()


def test_an_unknown_target_is_refused_by_name(tmp_path: Path) -> None:
    done = run_cli("build", MODEL, "--target", "tflite", "--memory", "1GB", "-o", tmp_path / "out")
    assert done.returncode == 2 and "gguf, onnx" in done.stderr
    assert not (tmp_path / "out").exists()
