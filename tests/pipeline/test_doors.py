"""Whatever can be checked at the door is checked there, by `build` and by --dry-run, and nothing is written."""

from __future__ import annotations

import json
import re
import shutil
from collections import namedtuple
from pathlib import Path

import pytest
from command import MODEL, error_of, run_cli

from edgemoe.base.errors import BudgetError, ConflictError, MachineError, UsageError
from edgemoe.pipeline import doors
from edgemoe.pipeline.request import BuildRequest, Job, prepare
from edgemoe.rules import ByteLimit, Keep, Rule
from edgemoe.rules.recipe import expression_rule

BUDGET = 45_000_000


def job(tmp_path: Path, *rules: Rule, memory: int = BUDGET, shard_max: int = 0, **more: object) -> Job:
    options: dict[str, object] = {"model": str(MODEL), "memory": memory, "out": tmp_path / "out", "rules": rules, "shard_max": shard_max}
    return prepare(BuildRequest(**{**options, **more}))  # type: ignore[arg-type]


def test_a_request_that_can_be_met_passes(tmp_path: Path) -> None:
    doors.check_needs(job(tmp_path, Keep(layers=[1], experts=(3,)), expression_rule("bytes() <= 20*MB"), shard_max=10**8))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("rule", "error"),
    [
        (ByteLimit(at_most="100kB"), ConflictError),
        (expression_rule("bytes() >= 1*TB"), ConflictError),
        (expression_rule("bytes() >= 40*MB"), BudgetError),  # one plan is so large, but not within the budget
        (Keep(layers=[99], experts=(3,)), UsageError),
        (expression_rule("kept(domains='klingon') >= 3"), UsageError),
    ],
)
def test_a_rule_that_no_plan_keeps_is_refused_before_calibration(tmp_path: Path, rule: Rule, error: type[Exception]) -> None:
    with pytest.raises(error):
        doors.check_needs(job(tmp_path, rule))


def test_a_rule_that_only_narrower_experts_keep_is_not_refused(tmp_path: Path) -> None:
    wide, both = job(tmp_path, width="full"), job(tmp_path, width="auto")
    sizes = [sum(doors.least_sizes(doors.resize_experts(wide.model, w), wide.target).values()) for w in (both.widths[0], both.widths[-1])]
    rule = ByteLimit(at_most=f"{sum(sizes) // 2}B")
    with pytest.raises(ConflictError):
        doors.check_needs(job(tmp_path, rule, width="full"))
    doors.check_needs(job(tmp_path, rule, width="auto"))


def test_a_shard_below_the_smallest_form_of_a_tensor_with_its_header_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"--shard-max 100000B: \S+ and the header of its file take") as caught:
        doors.check_needs(job(tmp_path, shard_max=100_000))
    least = re.search(r"--shard-max (\d+)B", caught.value.hint)
    assert least
    doors.check_needs(job(tmp_path, shard_max=int(least[1])))


def test_a_disk_that_cannot_hold_the_build_is_told_before_it_begins(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = job(tmp_path)
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(10**9, 10**9, 10**6))
    with pytest.raises(MachineError, match=r"1\.00 MB .* free, the build needs about"):
        doors.check_needs(asked)
    (tmp_path / "out" / ".work").mkdir(parents=True)
    with (tmp_path / "out" / ".work" / "scratch").open("wb") as file:
        file.truncate(10**10)
    doors.check_needs(asked)  # what a killed run left is had already


@pytest.mark.parametrize(
    ("options", "code", "words"),
    [
        (("--rule", "bytes() >= 1*TB"), 3, "no plan keeps these rules"),
        (("--shard-max", "100kB"), 2, "--shard-max 100000B"),
        (("--calibration", "x.txt:nan"), 2, "nan"),
        (("--solver", "magic"), 2, "magic"),
        (("-o", "n" * 300), 2, "File name too long"),
    ],
)
def test_a_dry_run_makes_the_same_checks(tmp_path: Path, options: tuple[str, ...], code: int, words: str) -> None:
    (tmp_path / "x.txt").write_text("one line of text\n")
    for more in (("--dry-run",), ())[: 2 if "--rule" in options else 1]:
        done = run_cli("build", MODEL, "--memory", f"{BUDGET}B", "-o", "out", *options, *more, cwd=tmp_path)
        assert done.returncode == code, done.stderr
        assert words in error_of(done.stderr)
        assert [p.name for p in tmp_path.iterdir()] == ["x.txt"]


def test_no_command_writes_into_the_folder_of_the_checkpoint(tmp_path: Path) -> None:
    model = tmp_path / "model"
    shutil.copytree(MODEL, model)
    before = sorted(model.rglob("*"))
    inside, deeper = model / ".." / "model", model / "sub" / "deeper"
    commands: list[tuple[object, ...]] = [
        ("build", model, "--memory", f"{BUDGET}B", "-o", inside, "--force"),
        ("build", model, "--memory", f"{BUDGET}B", "-o", deeper, "--dry-run"),
        ("build", model, "--memory", f"{BUDGET}B", "-o", tmp_path / "out", "--work", inside),
        ("calibrate", model, "-o", deeper),
        ("price", model, tmp_path, "-o", inside / "costs.json"),
        ("emit", model, tmp_path, tmp_path / "plan.json", "-o", inside, "--force"),
    ]
    for command in commands:
        done = run_cli(*command, cwd=tmp_path)
        assert (done.returncode, "lies in the folder of the checkpoint" in error_of(done.stderr)) == (2, True), (command, done.stderr)
    assert sorted(model.rglob("*")) == before
    assert sorted(p.name for p in tmp_path.iterdir()) == ["model"]


def test_a_dry_run_says_as_json_what_a_build_would_take(tmp_path: Path) -> None:
    needs = json.loads(run_cli("build", MODEL, "--memory", f"{BUDGET}B", "-o", tmp_path / "out", "--dry-run", "--json").stdout)
    assert needs["least_budget"] <= needs["budget"] == BUDGET
