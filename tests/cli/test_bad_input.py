"""Whatever is wrong with the input: the documented exit code, one line that names the file and the field, nothing half-written."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from command import MODEL, error_of, run_cli

from edgemoe.base.storage import load_record, load_sealed, save_record, save_sealed
from edgemoe.ir import Domain, Plan, Probe, Stats
from edgemoe.model.checkpoint import read_header
from edgemoe.model.inspect import inspect_model
from edgemoe.stream.texts import choose_texts, read_text, recall_texts

BUDGET = "45MB"
Run = Callable[..., tuple[int, str]]


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Run:
    """Run the command line in this process: exit status and stderr."""
    from edgemoe.cli.main import main

    def call(*arguments: object) -> tuple[int, str]:
        monkeypatch.setattr(sys, "argv", ["edgemoe", *map(str, arguments)])
        capsys.readouterr()
        with pytest.raises(SystemExit) as stop:
            main()
        shown = capsys.readouterr()
        assert shown.out == ""
        return int(stop.value.code or 0), shown.err

    return call


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return Path(shutil.copytree(MODEL, tmp_path / "model"))


@pytest.fixture
def out(tmp_path: Path) -> Iterator[Path]:
    folder = tmp_path / "out"
    yield folder
    left = [str(p) for p in folder.rglob("*") if p.suffix in (".gguf", ".html", ".part") or p.name in ("plan.json", "report.json")]
    assert not left


def edit_json(path: Path, **values: Any) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text(encoding="utf-8")), **values}), encoding="utf-8")


def build(model: Path, out: Path, *more: object) -> tuple[object, ...]:
    return ("build", model, "--memory", BUDGET, "--calibration-tokens", 1024, "-o", out, *more)


# ------------------------------------------------------------------------------------------------------------ the checkpoint
def test_missing_weights(run: Run, model: Path, out: Path) -> None:
    (model / "model.safetensors").unlink()
    status, errors = run(*build(model, out))
    assert status == 4 and f"{model}: no model.safetensors" in error_of(errors)


def test_missing_shard(run: Run, model: Path, out: Path) -> None:
    names = list(read_header(model / "model.safetensors"))
    (model / "model.safetensors").rename(model / "model-00001-of-00002.safetensors")
    index = {name: f"model-0000{1 + i % 2}-of-00002.safetensors" for i, name in enumerate(names)}
    (model / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
    status, errors = run(*build(model, out))
    assert status == 4 and str(model / "model-00002-of-00002.safetensors") in error_of(errors)


def test_an_index_that_points_out_of_its_folder(run: Run, model: Path, out: Path) -> None:
    (model / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"lm_head.weight": "../model.safetensors"}}))
    status, errors = run(*build(model, out))
    assert status == 4 and "weight_map" in error_of(errors) and "index.json" in error_of(errors)


@pytest.mark.parametrize("left", [0, 5, 1000, 10_000_000, -1])
def test_truncated_shard(run: Run, model: Path, out: Path, left: int) -> None:
    shard = model / "model.safetensors"
    os.truncate(shard, left if left >= 0 else shard.stat().st_size + left)
    status, errors = run(*build(model, out))
    assert status == 4 and str(shard) in error_of(errors)


def test_nan_weights(run: Run, model: Path, out: Path) -> None:
    name = "model.layers.1.self_attn.q_proj.weight"
    offset = read_header(model / "model.safetensors")[name][2]
    with (model / "model.safetensors").open("r+b") as file:
        file.seek(offset)
        file.write(np.array([0x7FC0], "<u2").tobytes())
    status, errors = run(*build(model, out))
    assert status == 4 and str(model / "model.safetensors") in error_of(errors) and name in error_of(errors)


@pytest.mark.parametrize("count", [6, 8])
def test_config_with_a_wrong_expert_count(run: Run, model: Path, out: Path, count: int) -> None:
    edit_json(model / "config.json", num_local_experts=count)
    status, errors = run(*build(model, out))
    assert status == 4 and str(model) in error_of(errors) and "config.json asks for" in error_of(errors)


@pytest.mark.parametrize("value", [0, -7, "7", True, 7.0, [7]])
def test_config_with_an_expert_count_that_is_none(run: Run, model: Path, out: Path, value: object) -> None:
    edit_json(model / "config.json", num_local_experts=value)
    status, errors = run(*build(model, out))
    assert status == 4 and str(model / "config.json") in error_of(errors) and "num_local_experts" in error_of(errors)


def test_unknown_model_type(run: Run, model: Path, out: Path) -> None:
    edit_json(model / "config.json", model_type="bert")
    status, errors = run(*build(model, out))
    assert status == 4 and "'bert'" in error_of(errors)


@pytest.mark.parametrize("body", [b"{", b"", b"[1]", b"\xff\xfe{}", b"[" * 100_000])
def test_malformed_config(run: Run, model: Path, out: Path, body: bytes) -> None:
    (model / "config.json").write_bytes(body)
    status, errors = run(*build(model, out))
    assert status == 4 and str(model / "config.json") in error_of(errors)


def test_a_hub_id_without_network_says_how_to_fetch_it(tmp_path: Path) -> None:
    done = run_cli(*build(Path("some/model"), tmp_path / "out"), cwd=tmp_path, HF_HUB_OFFLINE="1", HF_HOME=str(tmp_path / "hf"))
    assert done.returncode == 5 and "some/model" in error_of(done.stderr)
    assert "hf download some/model" in done.stderr
    assert not (tmp_path / "out").exists()


# ------------------------------------------------------------------------------------------------------------------- output
def test_output_below_a_regular_file(run: Run, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    status, errors = run(*build(MODEL, tmp_path / "file" / "out"))
    assert status == 2 and str(tmp_path / "file") in error_of(errors)
    assert (tmp_path / "file").read_text() == "mine"


@pytest.mark.parametrize("name", ["notes.txt", "plan.json", "other.gguf"])
def test_output_that_holds_something_else(run: Run, tmp_path: Path, name: str) -> None:
    folder = tmp_path / "theirs"
    folder.mkdir()
    (folder / name).write_text("mine")
    status, errors = run(*build(MODEL, folder))
    assert status == 2 and f"{folder} is not empty" in error_of(errors)
    assert [p.name for p in folder.iterdir()] == [name] and (folder / name).read_text() == "mine"


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = (
        os.geteuid() == 0
        and subprocess.run(["mount", "-t", "tmpfs", "-o", "size=3m", "tmpfs", folder], capture_output=True).returncode == 0
    )
    if not mounted:
        pytest.skip("a small disk can be mounted by root alone")
    yield folder
    subprocess.run(["umount", folder], check=True)


def test_a_disk_that_is_full_while_calibrating(small_disk: Path) -> None:
    (small_disk / "ballast").write_bytes(bytes(2_900_000))
    done = run_cli("calibrate", MODEL, "--calibration-tokens", 1024, "-o", small_disk / "work")
    assert done.returncode == 5 and str(small_disk) in error_of(done.stderr)
    assert "hint: free some space" in done.stderr


def test_a_disk_too_small_for_the_artifact(run: Run, small_disk: Path, tmp_path: Path) -> None:
    status, errors = run("emit", MODEL, save_stats(tmp_path), save_plan(tmp_path), "-o", small_disk / "out")
    assert status == 5 and str(small_disk / "out") in error_of(errors) and "free" in errors
    assert not list(small_disk.rglob("*.gguf"))


# -------------------------------------------------------------------------------------------------------------------- texts
@pytest.mark.parametrize("option", ["--calibration", "--heldout"])
@pytest.mark.parametrize(
    ("name", "body"),
    [("a.txt", b""), ("a.txt", b" \n\n\f\n"), ("a.txt", b"caf\xe9 " * 99), ("a.jsonl", b'{"txt": 1}\n'), ("a.jsonl", b"{\n")],
)
def test_text_that_is_none(run: Run, tmp_path: Path, out: Path, option: str, name: str, body: bytes) -> None:
    (tmp_path / name).write_bytes(body)
    status, errors = run(*build(MODEL, out, option, tmp_path / name))
    assert status == 4 and str(tmp_path / name) in error_of(errors)
    assert "calibrate" not in errors and not out.exists()


def test_text_that_is_not_there(run: Run, tmp_path: Path, out: Path) -> None:
    status, errors = run(*build(MODEL, out, "--calibration", tmp_path / "nowhere.txt"))
    assert status == 4 and str(tmp_path / "nowhere.txt") in error_of(errors)


@pytest.mark.parametrize("weight", ["heavy", "0", "-1", "nan", "inf", ""])
def test_a_weight_that_is_no_positive_number(run: Run, tmp_path: Path, out: Path, weight: str) -> None:
    (tmp_path / "a.txt").write_text("word\n\n" * 99)
    status, errors = run(*build(MODEL, out, "--calibration", f"{tmp_path / 'a.txt'}:{weight}"))
    assert status == 2 and f"{tmp_path / 'a.txt'}:{weight}" in error_of(errors) and "weight" in error_of(errors)


# ------------------------------------------------------------------------------------------------------------------ options
@pytest.mark.parametrize(
    ("option", "value"),
    [("--solver", "gurobi"), ("--target", "exe"), ("--context", "0"), ("--context", "999999999"), ("--shard-max", "big")],
)
def test_an_option_with_an_impossible_value_is_refused_before_work(run: Run, out: Path, option: str, value: str) -> None:
    status, errors = run(*build(MODEL, out, option, value))
    assert status == 2 and value in error_of(errors)
    assert "calibrate" not in errors and not out.exists()


@pytest.mark.parametrize("target", ["onnx", "browser"])
def test_what_cannot_be_split_is_not_asked_to_be(run: Run, out: Path, target: str) -> None:
    status, errors = run(*build(MODEL, out, "--target", target, "--shard-max", "1MB"))
    assert status == 2 and "--shard-max" in error_of(errors) and not out.exists()


# ------------------------------------------------------------------------------------------------------------------ records
def make_plan() -> Plan:
    found = inspect_model(MODEL)
    everything = {"n_experts": 7, "top_k": 2, "kept": (tuple(range(7)),) * 2, "units": (), "formats": {}, "sizes": {}, "counts": ()}
    everything |= {"objective": "mean", "vram": (), "domain_q": {}, "rules": (), "repair": False, "origin": ""}
    numbers = {name: 0.0 for name in ("q", "drop_q", "predicted_kl", "bound", "gap", "price")}
    return Plan(
        model=found.fingerprint, model_name=found.name, costs="", target="gguf", budget=10**8, context=512, solver="highs",
        file_size=8 * 10**6, memory={"peak": 0}, proven=True, **everything, **numbers,
    )  # fmt: skip


def save_plan(folder: Path) -> Path:
    save_record(folder / "the-plan.json", make_plan())
    return folder / "the-plan.json"


def save_stats(folder: Path, domains: tuple[Domain, ...] = (), probes: tuple[Probe, ...] = ()) -> Path:
    (folder / "stats").mkdir()
    stats = Stats(folder="", model=inspect_model(MODEL).fingerprint, key="", settings={}, domains=domains, probes=probes, cold=())
    save_record(folder / "stats" / "stats.json", stats)
    return folder / "stats"


def dropped(body: dict[str, Any]) -> None:
    del body["kept"]


EDITS: dict[str, tuple[Callable[[dict[str, Any]], None], str]] = {
    "a field is gone": (dropped, "kept"),
    "a field is of another kind": (lambda b: b.update(file_size="many"), "file_size"),
    "experts out of range": (lambda b: b.update(kept=[[1, 2, 3, 4, 5, 6, 7]] * 2), "keeps"),
    "experts named twice": (lambda b: b.update(kept=[[0, 0, 1, 2, 3, 4, 5]] * 2), "keeps"),
    "fewer experts than the router picks": (lambda b: b.update(kept=[[0]] * 2), "router picks"),
    "no experts": (lambda b: b.update(kept=[[], []]), "router picks"),
    "another format version": (lambda b: b.update(format_version=99), "format_version"),
    "another record": (lambda b: b.update(record="Report"), "Plan"),
    "a field too many": (lambda b: b.update(surprise=1), "surprise"),
    "another checkpoint": (lambda b: b.update(model="0" * 64), "checkpoint"),
}


@pytest.mark.parametrize("edit", EDITS)
def test_an_edited_plan(run: Run, tmp_path: Path, out: Path, edit: str) -> None:
    plan, stats = save_plan(tmp_path), save_stats(tmp_path)
    change, field = EDITS[edit]
    body = load_sealed(plan)
    change(body)
    save_sealed(plan, body)  # as a program that writes records of its own would
    status, errors = run("emit", MODEL, stats, plan, "-o", out)
    assert status == 4 and field in error_of(errors)
    assert str(plan) in error_of(errors)


@pytest.mark.parametrize("body", ["", "{", "[]", "null", '{"record": "Costs"}', '{"record": "Costs", "format_version": 1}'])
def test_an_edited_costs_file(run: Run, tmp_path: Path, body: str) -> None:
    (tmp_path / "costs.json").write_text(body)
    status, errors = run("plan", tmp_path / "costs.json", "--memory", BUDGET, "-o", tmp_path / "plan.json")
    assert status == 4 and str(tmp_path / "costs") in error_of(errors)
    assert not (tmp_path / "plan.json").exists()


def test_statistics_of_another_checkpoint(run: Run, tmp_path: Path, out: Path) -> None:
    stats = save_stats(tmp_path)
    edit_json(stats / "stats.json", model="0" * 64)
    for command in (("price", MODEL, stats), ("emit", MODEL, stats, save_plan(tmp_path))):
        status, errors = run(*command, "-o", out)
        assert status == 4 and str(stats) in error_of(errors)


def test_emit_wants_the_texts_that_the_statistics_come_from(run: Run, tmp_path: Path, out: Path) -> None:
    mine = tmp_path / "mine.txt"
    mine.write_text("".join(f"Paragraph {i}.\n\n" for i in range(40)))
    (text,) = choose_texts([f"{mine}:3"], [])[0]  # without its last tenth
    domain = Domain(name="mine", weight=3.0, tokens=100, sha256=text.sha256)
    stats = save_stats(tmp_path, (domain,), (Probe(kind="all", bits=4, kl=(0.1,)),))
    for given in ((), ("--calibration", mine)):
        status, errors = run("emit", MODEL, stats, save_plan(tmp_path), "-o", out, *given)
        assert status == 2 and "mine (weight 3)" in error_of(errors) and "--calibration" in errors and not out.exists()
    saved = load_record(stats / "stats.json", Stats)
    assert recall_texts(saved, [f"{mine}:3"]) == (text,)
    whole = read_text(f"{mine}:3")  # as with --heldout
    assert recall_texts(dataclasses.replace(saved, domains=(dataclasses.replace(domain, sha256=whole.sha256),)), [f"{mine}:3"]) == (whole,)


def test_a_plan_survives_saving(tmp_path: Path) -> None:
    plan = make_plan()
    assert dataclasses.asdict(load_record(save_plan(tmp_path), Plan)) == dataclasses.asdict(plan)
