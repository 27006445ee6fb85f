"""Files made or edited to do harm, or damaged past guessing: exit code 4, one line that names the file, nothing half-written."""

from __future__ import annotations

import json
import resource
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from command import COMMAND, MODEL, environment, error_of
from tiny import edit_config, flat_plan, flat_stats

from edgemoe.base.storage import array_file, load_record, save_record
from edgemoe.cli.main import main
from edgemoe.ir import Costs, Unit
from edgemoe.model.inspect import inspect_model
from edgemoe.stream.texts import SHIPPED

BUDGET = ("--memory", "70MB")
Run = Callable[..., tuple[int, str]]


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """The command line, in this process; gives exit code and stderr."""

    def run(*arguments: object) -> tuple[int, str]:
        monkeypatch.setattr(sys, "argv", ["edgemoe", *map(str, arguments)])
        with pytest.raises(SystemExit) as stop:
            main()
        shown = capsys.readouterr()
        assert shown.out == ""
        return int(str(stop.value.code)), shown.err

    return run


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """A copy of the bundled model that may be spoilt; the weights are a link, so replace them, never edit."""
    folder = tmp_path / "model"
    folder.mkdir()
    for file in MODEL.iterdir():
        if file.suffix == ".safetensors":
            (folder / file.name).symlink_to(file)
        else:
            shutil.copy(file, folder)
    return folder


def assert_nothing_left(out: Path) -> None:
    """No file but the unfinished work, from which a repaired command may go on."""
    assert [p.name for p in out.glob("*") if p.name != ".work"] == []


# ------------------------------------------------------------------------------------------------------------ checkpoints
HEADERS: dict[str, Any] = {
    "not json": b"{]",
    "not an object": b"[1]",
    "deep": b'{"a":' * 50_000,
    "unknown dtype": {"dtype": "I8", "shape": [2], "data_offsets": [0, 2]},
    "dtype of words": {"dtype": ["F32"], "shape": [1], "data_offsets": [0, 4]},
    "no dtype": {"shape": [2], "data_offsets": [0, 4]},
    "negative shape": {"dtype": "F16", "shape": [-1, -2], "data_offsets": [0, 4]},
    "shape of words": {"dtype": "F16", "shape": ["two"], "data_offsets": [0, 4]},
    "endless shape": {"dtype": "F32", "shape": [1e400], "data_offsets": [0, 4]},
    "huge shape": {"dtype": "F32", "shape": [2**62, 2**62], "data_offsets": [0, 4]},
    "wrong length": {"dtype": "F16", "shape": [2], "data_offsets": [0, 40]},
    "beyond the end": {"dtype": "F16", "shape": [2], "data_offsets": [10**12, 10**12 + 4]},
    "endless offsets": {"dtype": "F32", "shape": [1], "data_offsets": [0, 1e400]},
    "text": "weights",
}


@pytest.mark.parametrize("header", HEADERS.values(), ids=HEADERS)
def test_a_malformed_header_is_named(run: Run, model: Path, header: Any) -> None:
    raw = header if isinstance(header, bytes) else json.dumps({"lm_head.weight": header}).encode()
    file = model / "model.safetensors"
    file.unlink()
    file.write_bytes(len(raw).to_bytes(8, "little") + raw + bytes(64))
    code, errors = run("inspect", model)
    assert code == 4
    assert error_of(errors).startswith(f"error: {file.resolve()}: ")


@pytest.mark.parametrize("length", [2**63, 2**64 - 1, 10**6])
def test_a_header_longer_than_its_file_is_not_read(run: Run, model: Path, length: int) -> None:
    file = model / "model.safetensors"
    file.unlink()
    file.write_bytes(length.to_bytes(8, "little") + b"{}" + bytes(64))
    code, errors = run("inspect", model)
    assert code == 4
    assert str(length) in error_of(errors)


@pytest.mark.parametrize("place", ["/etc/passwd", "a/b.safetensors", "..", ""])
def test_an_index_cannot_point_out_of_its_folder(run: Run, model: Path, place: str) -> None:
    index = model / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"lm_head.weight": place}}))
    code, errors = run("inspect", model)
    assert code == 4
    assert str(model) in error_of(errors)


@pytest.mark.parametrize("body", ["{}", '{"weight_map": {}}', '{"weight_map": []}', "[]", "{"])
def test_an_index_that_is_none_is_named(run: Run, model: Path, body: str) -> None:
    index = model / "model.safetensors.index.json"
    index.write_text(body)
    code, errors = run("inspect", model)
    assert code == 4
    assert str(index) in error_of(errors)


FIELDS = ("hidden_size", "vocab_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "num_experts_per_tok")


@pytest.mark.parametrize("value", ["many", 0, 10**6, [2], 1e400])
@pytest.mark.parametrize("field", [*FIELDS, "intermediate_size"])
def test_a_config_that_does_not_fit_its_files_is_refused(run: Run, model: Path, field: str, value: object) -> None:
    edit_config(model, **{field: value})
    code, errors = run("inspect", model)
    assert code == 4
    assert str(model) in error_of(errors)


@pytest.mark.parametrize("field", [*FIELDS, "num_local_experts", "max_position_embeddings", "model_type"])
def test_a_missing_field_of_the_config_is_named(run: Run, model: Path, field: str) -> None:
    edit_config(model, **{field: None})
    code, errors = run("inspect", model)
    assert code == 4
    assert "config.json" in error_of(errors) and field in error_of(errors)


@pytest.mark.parametrize("kind", ["", "../../etc/passwd", "os", "mixtral ", 5, ["mixtral"], {"a": 1}])
def test_an_unknown_model_type_is_refused_with_the_known_ones(run: Run, model: Path, kind: object) -> None:
    edit_config(model, model_type=kind)
    code, errors = run("inspect", model)
    assert code == 4
    assert "config.json: model_type" in error_of(errors) and "hint: supported: dots1, glm4_moe" in errors


@pytest.mark.parametrize("body", [b"", b"{", b"{}", b"[]", b"\xff", b"[" * 100_000])
def test_a_tokenizer_that_is_none_is_refused(run: Run, model: Path, tmp_path: Path, body: bytes) -> None:
    (model / "tokenizer.json").write_bytes(body)
    code, errors = run("build", model, *BUDGET, "--calibration-tokens", 1024, "-o", tmp_path / "out")
    assert code == 4
    assert str(model) in error_of(errors)
    assert_nothing_left(tmp_path / "out")


# ----------------------------------------------------------------------------------------------------------------- texts
@pytest.mark.parametrize(
    ("name", "body", "says"),
    [
        ("wide.txt", "Some words. ".encode("utf-16") * 100, "is not UTF-8 text"),
        ("lines.jsonl", b'{"text": "good"}\n{"words": "bad"}\n', "line 2"),
        ("lines.jsonl", b'{"text": "good"}\n' + b"[" * 100_000, "line 2"),
        ("lines.jsonl", b'"text"\n', "line 1"),
    ],
)
def test_a_text_that_is_none_is_named(run: Run, tmp_path: Path, name: str, body: bytes, says: str) -> None:
    file = tmp_path / name
    file.write_bytes(body)
    code, errors = run("build", MODEL, *BUDGET, "--calibration", file, "-o", tmp_path / "out")
    assert code == 4
    assert str(file) in error_of(errors) and says in error_of(errors)
    assert not (tmp_path / "out").exists()


def test_held_out_text_that_calibration_has_seen_is_refused(run: Run, tmp_path: Path) -> None:
    seen = tmp_path / "seen.txt"
    seen.write_text((SHIPPED / "calibration" / "german.txt").read_text(encoding="utf-8")[2000:20_000], encoding="utf-8")
    for options in (("--heldout", seen), ("--calibration", seen, "--heldout", seen)):
        code, errors = run("build", MODEL, *BUDGET, *options, "-o", tmp_path / "out")
        assert code == 2
        assert "seen shares documents with the calibration text" in error_of(errors) and "--heldout" in errors
    assert not (tmp_path / "out").exists()


def test_two_calibration_texts_of_one_name_are_refused(run: Run, tmp_path: Path) -> None:
    english = SHIPPED / "calibration" / "english.txt"
    code, errors = run("build", MODEL, *BUDGET, "--calibration", english, "--calibration", f"{english}:2", "-o", tmp_path / "out")
    assert code == 2
    assert "same name" in error_of(errors)


# --------------------------------------------------------------------------------------------------------------- records
@pytest.fixture
def records(tmp_path: Path) -> Path:
    """A folder with statistics, costs and a plan of the bundled model, none of which anybody measured."""
    folder = tmp_path / "records"
    found = inspect_model(MODEL)
    save_record(folder / "stats.json", flat_stats(found, folder))
    save_record(folder / "plan.json", flat_plan(found, "Q8_0"))
    costs = Costs(
        model=found.fingerprint,
        model_name=found.name,
        stats="s" * 64,
        target="gguf",
        form="stacks",
        formats=("Q4_K", "Q8_0"),
        units=(
            Unit(name="output.weight", role="output", layer=-1, n_weights=2**20),
            *(Unit(name=f"blk.{i}.ffn_up_exps.weight", role="ffn_up_exps", layer=i, n_weights=7 * 2**10) for i in range(2)),
        ),
        counts=(4, 7),
        n_experts=7,
        top_k=2,
        kappa=0.0,
        memory={"context": 512, "kv": 0, "compute": 0, "output": 0, "runtime": 2**20},
        cold=(),
        domains=("none",),
        domain_weights=(1.0,),
        cost=np.array([[[2.0, 1.0]] * 3] * 2),
        input_cost=np.zeros((2, 3, 2)),
        size=np.array([[[2**19, 2**20]] * 3] * 2),
        extra=np.zeros((2, 3, 2), np.int64),
        staging=np.zeros((2, 3, 2), np.int64),
        drop_cost=np.array([[[1.0, 1.0], [0.0, 0.0]]]),
        expert_drop=np.ones((1, 2, 7)),
        drop_curve=np.zeros((2, 8)),
        usage=np.full((1, 2, 7), 1 / 7),
        factor=np.ones((1, 3)),
        fixed_size=np.array([1000, 2000]),
        kept=np.array([[[True] * 4 + [False] * 3] * 2, [[True] * 7] * 2]),
    )
    save_record(folder / "costs.json", costs)
    assert load_record(folder / "costs.json", Costs) == costs
    return folder


def starting_from(name: str, records: Path, out: Path) -> tuple[object, ...]:
    """The command that starts from a record."""
    if name == "costs":
        return ("plan", records / "costs.json", "--memory", "4MiB", "-o", out / "plan.json")
    return ("emit", MODEL, records, records / "plan.json", "-o", out)


@pytest.mark.parametrize("name", ["stats", "costs", "plan"])
@pytest.mark.parametrize(
    "changes",
    [{"format_version": 0}, {"format_version": None}, {"record": "Report"}, {"record": None}, {"model": 5}, {"model": None}, {"new": 1}],
    ids=str,
)
def test_an_edited_record_is_named(run: Run, records: Path, tmp_path: Path, name: str, changes: dict[str, Any]) -> None:
    file = records / f"{name}.json"
    body = {**json.loads(file.read_text()), **changes}
    file.write_text(json.dumps({field: value for field, value in body.items() if value is not None}))
    code, errors = run(*starting_from(name, records, tmp_path / "out"))
    assert code == 4
    assert error_of(errors).startswith(f"error: {file}: ")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", ["stats", "costs", "plan"])
@pytest.mark.parametrize("body", [b"", b"{", b"[]", b"\xff"], ids=["empty", "open", "list", "binary"])
def test_a_record_that_is_not_json_is_named(run: Run, records: Path, tmp_path: Path, name: str, body: bytes) -> None:
    (records / f"{name}.json").write_bytes(body)
    code, errors = run(*starting_from(name, records, tmp_path / "out"))
    assert code == 4
    assert error_of(errors).startswith(f"error: {records / name}.json: ")


@pytest.mark.parametrize("file", ["costs.safetensors", array_file(-1), array_file(1)])
@pytest.mark.parametrize("size", [None, 0, 100])
def test_damaged_or_missing_arrays_are_named(run: Run, records: Path, tmp_path: Path, file: str, size: int | None) -> None:
    path = records / file
    body = path.read_bytes()
    path.unlink()
    if size is not None:
        path.write_bytes(body[:size])
    code, errors = run(*starting_from("costs" if file.startswith("costs") else "stats", records, tmp_path / "out"))
    assert code == 4
    assert error_of(errors).startswith(f"error: {path}: ")
    assert_nothing_left(tmp_path / "out")


def test_a_report_that_is_none_is_named(run: Run, records: Path, tmp_path: Path) -> None:
    for file in (records / "plan.json", records / "missing.json"):
        code, errors = run("report", file, "-o", tmp_path / "out")
        assert code == 4
        assert str(file) in error_of(errors)
    assert not (tmp_path / "out").exists()


def test_verify_needs_a_folder_that_emit_or_build_made(run: Run, records: Path, tmp_path: Path) -> None:
    code, errors = run("verify", MODEL, tmp_path / "nowhere")
    assert code == 4 and f"{tmp_path / 'nowhere'}: no such folder" in error_of(errors)
    code, errors = run("verify", MODEL, records)
    assert code == 4 and f"{records}: neither artifact.json nor report.json" in error_of(errors)


# ------------------------------------------------------------------------------------------------------------------ disk
def test_a_limit_on_file_sizes_is_exit_5_and_leaves_no_part_of_the_artifact(records: Path, tmp_path: Path) -> None:
    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (2**20, 2**20))

    command = [*COMMAND, *map(str, starting_from("plan", records, tmp_path / "out"))]
    done = subprocess.run(command, capture_output=True, text=True, env=environment(), preexec_fn=limit, check=False)
    assert done.returncode == 5, done.stderr
    assert str(tmp_path / "out") in error_of(done.stderr)
    assert_nothing_left(tmp_path / "out")


@pytest.mark.skipif(not Path("/proc/self").exists(), reason="there is no /proc to fail to write to")
def test_an_output_that_cannot_be_made_is_exit_5(run: Run) -> None:
    code, errors = run("build", MODEL, *BUDGET, "-o", "/proc/edgemoe/out")
    assert code == 5
    assert "/proc/edgemoe/out" in error_of(errors)
