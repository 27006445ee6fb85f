"""The command line: help, results on stdout, everything else on stderr, exit codes."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from command import MODEL, environment, error_of, run_cli

COMMANDS = ("build", "inspect", "calibrate", "price", "plan", "emit", "verify", "report", "devices", "doctor")


def test_help_lists_every_command() -> None:
    shown = run_cli("--help")
    assert shown.returncode == 0 and shown.stderr == ""
    assert all(f"  {name}" in shown.stdout for name in COMMANDS)


@pytest.mark.parametrize("command", COMMANDS)
def test_help_of_each_command(command: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    from edgemoe.cli.main import main

    monkeypatch.setattr(sys, "argv", ["edgemoe", command, "--help"])
    with pytest.raises(SystemExit) as stop:
        main()
    shown = capsys.readouterr()
    assert not stop.value.code and shown.err == ""
    assert f"edgemoe {command}" in shown.out and "Options:" in shown.out


def test_importing_the_command_line_brings_no_heavy_package() -> None:
    heavy = {"torch", "transformers", "pulp", "numpy", "pydantic", "highspy", "gguf", "llama_cpp"}
    script = f"import sys, edgemoe.cli.main; print(sorted({heavy!r} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, env=environment(), check=True)
    assert done.stdout.strip() == "[]"


def test_version() -> None:
    from edgemoe import __version__

    assert run_cli("--version").stdout == f"edgemoe {__version__}\n"


def test_inspect_says_what_the_checkpoint_holds_as_json() -> None:
    shown = run_cli("inspect", MODEL, "--json")
    facts = json.loads(shown.stdout)
    assert shown.returncode == 0 and shown.stderr == ""
    assert facts["name"] == "tiny-moe-b" and facts["model_type"] == "mixtral"
    assert (facts["n_layers"], facts["n_experts"], facts["top_k"]) == (2, 7, 2)


def test_inspect_reads_no_weights_and_needs_no_torch() -> None:
    script = (
        "import sys; sys.modules['torch'] = sys.modules['transformers'] = None\n"
        f"sys.argv = ['edgemoe', 'inspect', {str(MODEL)!r}]\nfrom edgemoe.cli.main import main; main()"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, env=environment(), check=False)
    assert done.returncode == 0 and "tiny-moe-b" in done.stdout and done.stderr == ""


def test_doctor_finds_what_these_tests_run_on() -> None:
    shown = run_cli("doctor", "--json")
    checks = {c["name"]: c for c in json.loads(shown.stdout)}
    assert checks["python"]["found"] and checks["torch"]["found"] and checks["llama-cpp-python"]["found"]
    assert all(c["found"] or c["remedy"] for c in checks.values())
    missing = [c["name"] for c in checks.values() if not c["found"]]
    assert shown.returncode == (5 if missing else 0)
    assert "MISSING" in run_cli("doctor").stdout if missing else shown.stderr == ""


@pytest.mark.parametrize("arguments", [("build", MODEL, "--memori", "1GB"), ("inspect",), ("bild",), ("build", MODEL, "--memory", "1GB")])
def test_a_command_line_that_is_not_understood_is_exit_2(arguments: tuple[object, ...], tmp_path: Path) -> None:
    shown = run_cli(*arguments, cwd=tmp_path)
    assert shown.returncode == 2 and shown.stdout == ""
    error, hint = shown.stderr.splitlines()  # one line, and what to do
    assert error.startswith("error: ") and hint.startswith("hint: ")
    assert not list(tmp_path.iterdir())


def test_a_folder_that_is_not_there_is_exit_2_with_a_hint(tmp_path: Path) -> None:
    shown = run_cli("inspect", tmp_path / "nowhere")
    assert shown.returncode == 2 and shown.stdout == ""
    assert shown.stderr.splitlines() == [
        f"error: {tmp_path / 'nowhere'}: no such folder",
        "hint: give a checkpoint folder, a GGUF, or a hub id such as Qwen/Qwen3-30B-A3B",
    ]


def test_a_size_without_unit_is_exit_2_with_a_hint(tmp_path: Path) -> None:
    shown = run_cli("build", MODEL, "--memory", "16", "-o", tmp_path / "out")
    assert shown.returncode == 2 and "no unit" in error_of(shown.stderr) and "hint: write 16GB" in shown.stderr
    assert not (tmp_path / "out").exists()


def test_debug_shows_where_an_error_was_raised(tmp_path: Path) -> None:
    shown = run_cli("--debug", "inspect", tmp_path / "nowhere")
    assert shown.returncode != 0 and "Traceback" in shown.stderr and "UsageError" in shown.stderr


def test_json_goes_to_stdout_alone_and_progress_to_stderr(tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("\n\n".join(f"Paragraph {i} speaks of rivers, of stones and of the number {i * i}." for i in range(200)))
    shown = run_cli("calibrate", MODEL, "--calibration", text, "--calibration-tokens", 1024, "-o", tmp_path / "work", "--json")
    assert shown.returncode == 0, shown.stderr
    result = json.loads(shown.stdout)
    assert result["tokens"]["text"] > 900 and (Path(result["stats"]) / "stats.json").is_file()
    assert shown.stderr and all(line.startswith(("hash ", "calibrate ")) for line in shown.stderr.splitlines())


def test_dry_run_prints_the_least_budget_and_writes_nothing(tmp_path: Path) -> None:
    out = tmp_path / "deep" / "out"
    shown = run_cli("build", MODEL, "--memory", "70MB", "-o", out, "--dry-run", "--json")
    needs = json.loads(shown.stdout)
    assert shown.returncode == 0 and shown.stderr == ""
    assert needs["budget"] == 70_000_000 and needs["beside_weights"] < needs["least_budget"] < 70_000_000
    assert not list(tmp_path.iterdir())
