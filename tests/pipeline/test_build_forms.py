"""Checkpoints of another form than the bundled models are built to the report: a tied embedding, shared experts, a dense first layer."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from command import run_cli
from tiny import make_checkpoint

from edgemoe.stream.texts import SHIPPED


@pytest.mark.parametrize(("target", "room"), [("gguf", 1_500_000), ("onnx", 2_500_000)])
@pytest.mark.parametrize(("family", "tied"), [("mixtral", True), ("qwen2_moe", False), ("glm4_moe", False)])
def test_a_checkpoint_is_built_to_the_report(tmp_path: Path, family: str, tied: bool, target: str, room: int) -> None:
    source = make_checkpoint(tmp_path / "model", family, n_experts=4, hidden=128, expert_size=128, tied=tied)
    heldout = tmp_path / "heldout.txt"
    heldout.write_text((SHIPPED / "heldout" / "english.txt").read_text(encoding="utf-8")[:4000], encoding="utf-8")
    least = json.loads(run_cli("build", source, "--memory", "1GB", "--target", target, "--dry-run", "--json", "-o", tmp_path / "x").stdout)
    budget, tokens = least["least_budget"] + room, ("--calibration-tokens", 4096)
    done = run_cli("build", source, "--memory", f"{budget}B", "--target", target, *tokens, "--heldout", heldout, "-o", tmp_path / "out")
    assert done.returncode == 0, done.stderr
    report = json.loads((tmp_path / "out" / "report.json").read_text(encoding="utf-8"))
    assert report["measured_peak"] <= budget
    assert report["measured_kl"] < 0.5
    assert (tmp_path / "out" / "report.html").stat().st_size > 10_000
