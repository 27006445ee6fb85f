"""`edgemoe devices` and `--device`: the same budget as text and as JSON, and said on stderr."""

import json
import subprocess
import sys
from pathlib import Path

import psutil
import pytest
from boxes import GOOD
from command import MODEL, environment, error_of, run_cli

from edgemoe.devices.profiles import budget_of, find_device


def test_list_and_show_print_the_same_budget_as_text_and_json() -> None:
    listed = json.loads(run_cli("devices", "list", "--json").stdout)
    shown = json.loads(run_cli("devices", "show", "mac-128gb", "--json").stdout)
    assert shown in listed and shown["budget"] == shown["pools"][0]["budget"] == budget_of(find_device("mac-128gb"))
    text = run_cli("devices", "list")
    assert text.returncode == 0 and text.stderr == "" and len(text.stdout.splitlines()) == len(listed) + 1
    assert "106.52 GiB" in text.stdout and "106.52 GiB" in run_cli("devices", "show", "mac-128gb").stdout


def test_show_says_the_ceiling_of_a_read_with_its_uncertainty() -> None:
    shown = run_cli("devices", "show", "rpi5-16gb", "--read", "1GB")
    assert "17.0 tokens/s (peak bandwidth), 11.4 tokens/s (measured bandwidth)" in shown.stdout and "times slower" in shown.stdout


def test_detect_measures_this_machine() -> None:
    done = run_cli("devices", "detect", "--json")
    facts = json.loads(done.stdout)
    assert done.returncode == 0 and done.stderr == ""
    assert facts["id"] == "here" and facts["pools"][0]["measured"] > 5e8 and 0 < facts["budget"] < psutil.virtual_memory().total


def test_a_device_is_a_budget_that_is_said_on_stderr(tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text(GOOD.replace("15GiB", "70MB").replace("reserve: 1GiB", "reserve: 4MB"))
    done = run_cli("build", MODEL, "--device", "mine.yaml#box", "-o", "out", "--dry-run", "--json", cwd=tmp_path)
    assert done.returncode == 0 and json.loads(done.stdout)["budget"] == 66_000_000
    assert (
        "box: budget 66.00 MB" in done.stderr and "70.00 MB" in done.stderr and "4.00 MB" in done.stderr and "not verified" in done.stderr
    )
    assert not (tmp_path / "out").exists()


def test_pools_that_are_not_planned_for_and_limits_that_can_be_raised_are_said(tmp_path: Path) -> None:
    said = run_cli("build", MODEL, "--device", "rtx4090-128gb", "-o", tmp_path / "out", "--dry-run").stderr
    assert "of vram are not planned for" in said
    said = run_cli("build", MODEL, "--device", "mac-128gb", "-o", tmp_path / "out", "--dry-run").stderr
    assert "--device mac-128gb:raised plans for 111.00 GiB; needs sudo sysctl iogpu.wired_limit_mb=114688" in said


@pytest.mark.parametrize("command", [("build", MODEL, "-o", "out"), ("plan", "costs.json")])
@pytest.mark.parametrize(
    ("options", "message", "hint"),
    [
        ((), "how much memory", "--device NAME"),
        (("--memory", "16GB", "--device", "rpi5-16gb"), "both given", "give one"),
        (("--device", "rpi5"), "'rpi5' is not known", "rpi5-16gb"),
    ],
)
def test_exactly_one_known_budget_is_wanted(
    command: tuple[object, ...], options: tuple[str, ...], message: str, hint: str, tmp_path: Path
) -> None:
    done = run_cli(*command, *options, cwd=tmp_path)
    assert done.returncode == 2 and message in error_of(done.stderr) and hint in done.stderr and done.stdout == ""
    assert not list(tmp_path.iterdir())


def test_help_brings_neither_yaml_nor_psutil() -> None:
    heavy = "{'yaml', 'psutil', 'numpy', 'edgemoe.devices.profiles', 'edgemoe.devices.detect'}"
    script = f"import sys, edgemoe.cli.main; print(sorted({heavy} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, env=environment(), check=False)
    assert done.stdout.strip() == "[]", done.stderr
