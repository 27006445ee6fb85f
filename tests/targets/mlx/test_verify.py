"""Verification of MLX folders: with stock mlx_lm, without it, and of folders that are not what was written."""

from __future__ import annotations

import json
import re
import shutil
import signal
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from command import error_of, run_cli, stop_when
from tiny import WHOLE_VOCAB, make_checkpoint

from edgemoe.base.storage import load_record
from edgemoe.ir import Plan, Report
from edgemoe.model.inspect import inspect_model
from edgemoe.pipeline.output_folder import find_artifact
from edgemoe.report.model_card import render_card
from edgemoe.stream.texts import SHIPPED, choose_texts
from edgemoe.stream.windows import tokenize
from edgemoe.targets import MISSING, find_target
from edgemoe.targets.mlx.words import CHIPS, speed_range
from edgemoe.verify.artifact import _note_beside, verify_artifact
from edgemoe.verify.logits import compare_logits, reference_states

Built = tuple[Path, Path, Path]  # checkpoint, held-out text, output


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Built:
    """A build of a tied model with dropped experts to the report."""
    root = tmp_path_factory.mktemp("mlx")
    shape = {"hidden": 128, "expert_size": 128, "n_experts": 6, "layers": 1, "vocab": WHOLE_VOCAB}
    source = make_checkpoint(root / "model", "qwen3_moe", tied=True, **shape)
    heldout = root / "heldout.txt"
    heldout.write_text((SHIPPED / "heldout" / "english.txt").read_text(encoding="utf-8")[:2500], encoding="utf-8")
    done = run_cli(*command(source, heldout, root / "work", root / "out"))
    assert done.returncode == 0, done.stderr
    return source, heldout, root / "out"


def command(source: Path, heldout: Path, work: Path, out: Path) -> list[object]:
    options = ["--memory", "4.9MB", "--context", 256, "--target", "mlx", "--rule", "kept() <= 4", "--calibration-tokens", 2048]
    return ["build", source, *options, "--heldout", heldout, "--work", work, "-o", out]


@pytest.mark.slow
def test_a_build_killed_while_it_writes_goes_on_to_the_same_bytes(built: Built, tmp_path: Path) -> None:
    source, heldout, made = built
    again = command(source, heldout, made.with_name("work"), tmp_path / "out")
    status, errors = stop_when(again, lambda: any((tmp_path / "out").glob(".part/*")), 0.01, signal.SIGKILL)
    assert status == -signal.SIGKILL, errors
    assert not (tmp_path / "out" / "report.json").exists()
    done = run_cli(*again)
    assert done.returncode == 0, done.stderr
    for name in ("model.safetensors", "config.json", "model.safetensors.index.json", "plan.json"):
        assert (tmp_path / "out" / name).read_bytes() == (made / name).read_bytes(), name
    assert {p.name for p in (tmp_path / "out").iterdir()} == {p.name for p in made.iterdir()}


def test_the_stages_one_by_one_give_the_same_bytes(built: Built, tmp_path: Path) -> None:
    source, _, made = built
    stats = next(made.with_name("work").glob("**/stats.json")).parent
    for stage in (
        ("price", source, stats, "--target", "mlx", "--context", 256, "-o", tmp_path / "costs.json"),
        ("plan", tmp_path / "costs.json", "--memory", "4.9MB", "--rule", "kept() <= 4", "-o", tmp_path / "plan.json"),
        ("emit", source, stats, tmp_path / "plan.json", "--calibration-tokens", 2048, "-o", tmp_path / "out"),
    ):
        done = run_cli(*stage)
        assert done.returncode == 0, done.stderr
    assert (tmp_path / "out" / "model.safetensors").read_bytes() == (made / "model.safetensors").read_bytes()


def test_a_build_ends_with_a_report_that_keeps_its_promises(built: Built) -> None:
    report = json.loads((built[2] / "report.json").read_text())
    plan = report["plan"]
    assert plan["target"] == "mlx-f16"  # as calibration settled it
    assert {len(kept) for kept in plan["kept"]} == {4}
    assert sum(f["size"] for f in report["artifact"]["files"] if f["name"].endswith(".safetensors")) == plan["file_size"]
    assert report["measured_peak"] == 0  # measured on a Mac alone
    assert "not measured on this machine" in (built[2] / "report.html").read_text()
    assert 0 < report["measured_kl"] < 1
    assert report["beside_kl"] > 0
    assert report["runtime"].startswith("mlx ")
    card = (built[2] / "README.md").read_text()
    assert "library_name: mlx" in card
    assert "mlx_lm.generate --model ." in card
    assert "Router and norms stay float16" in card


def test_without_mlx_the_bytes_are_decoded_and_the_report_says_so(built: Built, tmp_path: Path) -> None:
    source, heldout, out = built
    model, plan, artifact = inspect_model(source), load_record(out / "plan.json", Plan), find_artifact(out)
    _, texts = choose_texts([], [str(heldout)])
    target = find_target(plan.target)
    found = {
        there: verify_artifact(artifact, model, plan, texts, target if there else replace(target, runtime=lambda: MISSING), tmp_path)
        for there in (True, False)
    }
    assert found[False].measured_kl == pytest.approx(found[True].measured_kl, rel=1e-4)
    assert found[False].measured_peak == 0
    assert found[False].decode_tokens_per_second == 0
    assert found[False].runtime == "edgemoe's own decoding"
    assert any("nothing was run" in problem for problem in found[False].problems)


def test_a_quantized_cache_is_in_the_second_kl_and_a_rotating_one_forgets(built: Built, tmp_path: Path) -> None:
    source, heldout, out = built
    model, artifact = inspect_model(source), find_artifact(out)
    _, texts = choose_texts([], [str(heldout)])
    windows = tokenize(model, texts, 512, 256)
    states = reference_states(model, windows, tmp_path)
    loss = {}
    for name in ("mlx-f16", "mlx-f16-kv8", "mlx-f16-kv2", "mlx-f16-max64"):
        target = find_target(name)
        loss[name] = compare_logits(artifact.path, model, windows, states, ["english"], target, settings=target.runs.beside)[0].kl_mean
    assert loss["mlx-f16"] < loss["mlx-f16-kv8"] * 1.01 < loss["mlx-f16-kv2"]
    assert loss["mlx-f16-max64"] > 1.01 * loss["mlx-f16"]


def test_the_card_runs_the_cache_that_was_planned(built: Built) -> None:
    report = load_record(built[2] / "report.json", Report)
    for name, said in (
        ("mlx-f16-kv2", "--prefill-step-size 256 --kv-bits 2 --kv-group-size 64 --quantized-kv-start 0"),
        ("mlx-f16-max64", "--prefill-step-size 256 --max-kv-size 64"),
    ):
        card = render_card(replace(report, plan=replace(report.plan, target=name)))
        assert f"mlx_lm.generate --model . --max-tokens 256 {said} --prompt" in card
        assert ("mlx_lm.server --model ." in card) == (name == "mlx-f16-kv2")


def test_a_window_through_a_quantized_cache_is_what_mlx_lm_decodes_token_by_token(built: Built) -> None:
    mx = pytest.importorskip("mlx.core")
    from mlx_lm.models.cache import make_prompt_cache

    from edgemoe.targets.mlx.child import Runner

    tokens = list(range(40, 60))
    runner = Runner({"path": str(built[2] / "model.safetensors"), "kv_bits": 4, "kv_group": 64}, full=True)
    cache = [each.to_quantized(group_size=64, bits=4) for each in make_prompt_cache(runner.model)]
    steps = [runner.model(mx.array([[token]]), cache=cache)[0, 0] for token in tokens]
    assert np.abs(np.array(runner.logits(tokens)) - np.array(mx.stack(steps))).max() < 1e-4


def test_a_large_cost_of_the_runtimes_own_settings_is_noted() -> None:
    target = find_target("mlx-f16-kv2")
    assert _note_beside(target, 0.01, 0.029) == []
    assert _note_beside(target, 0.0, 0.002) == []
    assert "16-bit activations, 2-bit KV, KL is 0.1250" in _note_beside(target, 0.0003, 0.125)[0]


def spoil_byte(out: Path) -> None:
    path = out / "model.safetensors"
    raw = bytearray(path.read_bytes())
    raw[-5] ^= 64
    path.write_bytes(raw)


def change_entry(out: Path) -> None:
    config = json.loads((out / "config.json").read_text())
    config["quantization"]["model.embed_tokens"] = {"group_size": 128, "bits": 2, "mode": "affine"}
    (out / "config.json").write_text(json.dumps(config))


def lose_shard(out: Path) -> None:
    (out / "model.safetensors").unlink()


@pytest.mark.parametrize("spoil", [spoil_byte, change_entry, lose_shard])
def test_a_folder_that_was_changed_is_refused_in_one_line(built: Built, tmp_path: Path, spoil: Callable[[Path], None]) -> None:
    source, heldout, out = built
    copy = Path(shutil.copytree(out, tmp_path / "out", ignore=shutil.ignore_patterns(".work")))
    spoil(copy)
    refused = run_cli("verify", source, copy, "--heldout", heldout)
    assert refused.returncode == 6
    assert re.search(r"was changed or damaged after edgemoe wrote it|is missing", error_of(refused.stderr))
    assert refused.stderr.endswith("hint: build or emit it again\n")


def test_a_folder_that_another_program_made_is_refused(built: Built, tmp_path: Path) -> None:
    source, heldout, out = built
    foreign = tmp_path / "foreign"
    foreign.mkdir()
    for name in ("config.json", "model.safetensors"):
        shutil.copy(out / name, foreign)
    refused = run_cli("verify", source, foreign, "--heldout", heldout)
    assert refused.returncode == 4
    assert "plan.json" in error_of(refused.stderr)
    assert refused.stderr.endswith("hint: give the folder that build or emit made\n")


@pytest.mark.parametrize(("name", "said"), [("nowhere", "no such folder"), ("heldout.txt", "is a file")])
def test_what_is_no_folder_is_refused_at_once(built: Built, name: str, said: str) -> None:
    refused = run_cli("verify", built[0], built[1].with_name(name))
    assert refused.returncode == 4
    assert error_of(refused.stderr).endswith(said)


def test_the_speed_on_a_mac_is_a_range_that_holds_apples_own_figures() -> None:
    """Qwen3-30B-A3B decodes at 113.33, 101.00, 94.14 and 83.16 tokens per second on an M4 Max (mlx_lm/BENCHMARKS.md)."""
    for active, speed in ((1.87e9, 113.33), (2.28e9, 101.00), (2.70e9, 94.14), (3.53e9, 83.16)):
        plan = SimpleNamespace(active_bytes=active, memory={"kv": 0})
        low, high = speed_range(SimpleNamespace(plan=plan, model={"n_layers": 48}), CHIPS["M4 Max"])  # type: ignore[arg-type]
        assert low * 0.96 <= speed <= high
