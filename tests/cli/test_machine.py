"""What the machine refuses ends in one line and exit 5, and a reader that has enough ends a command in silence."""

from __future__ import annotations

import os
import resource
import subprocess
import sys
from pathlib import Path

import pytest
from command import COMMAND, MODEL, environment, error_of, run_cli

LIMITED = """
import resource, sys, threading
kind, limit = sys.argv.pop(1), int(sys.argv.pop(1))
if kind == "files":
    resource.setrlimit(resource.RLIMIT_NOFILE, (limit, limit))
else:
    begin, left = threading.Thread.start, [limit]
    def start(self):
        left[0] -= 1
        if left[0] < 0:
            raise RuntimeError("can't start new thread")
        begin(self)
    threading.Thread.start = start
from edgemoe.cli.main import main
main()
"""


def run_limited(kind: str, limit: int, *arguments: object, cwd: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", LIMITED, kind, str(limit), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, cwd=cwd, env=environment(), timeout=300, check=False)


@pytest.mark.parametrize("limit", [12, 24])
def test_descriptors_that_run_out_are_the_machines_fault(tmp_path: Path, limit: int) -> None:
    assert resource.getrlimit(resource.RLIMIT_NOFILE)[1] > 100
    done = run_limited("files", limit, "calibrate", MODEL, "--calibration-tokens", 4096, "-o", "work", cwd=tmp_path)
    assert done.returncode == 5, done.stderr
    assert "files" in error_of(done.stderr)


@pytest.mark.parametrize("limit", [0, 2])
def test_threads_that_cannot_start_are_the_machines_fault(tmp_path: Path, limit: int) -> None:
    done = run_limited("threads", limit, "calibrate", MODEL, "--calibration-tokens", 4096, "-o", "work", cwd=tmp_path)
    assert done.returncode == 5, done.stderr
    assert "thread" in error_of(done.stderr)


PLAN = ("plan", "--generic", "olmoe-1b-7b", "--memory", "3GB")


def run_plain(command: list[object], stdout: int = subprocess.PIPE) -> subprocess.CompletedProcess[str]:
    words = [str(word) for word in command]
    return subprocess.run(words, stdout=stdout, stderr=subprocess.PIPE, text=True, env=environment(), timeout=60, check=False)


@pytest.mark.parametrize("command", [("inspect", MODEL), ("build", "m", "--memory", "45MB", "-o", "out"), PLAN])
def test_a_current_folder_that_is_gone_is_told(tmp_path: Path, command: tuple[object, ...]) -> None:
    gone = tmp_path / "gone"
    done = run_plain(["sh", "-c", f'mkdir "{gone}" && cd "{gone}" && rmdir "{gone}" && exec "$@"', "sh", *COMMAND, *command])
    assert done.returncode == 5, done.stderr
    assert "current folder" in error_of(done.stderr)


@pytest.mark.parametrize("command", [("inspect", MODEL), ("devices", "list"), PLAN, ("plan", "--help")])
def test_a_reader_that_has_enough_ends_the_command_in_silence(command: tuple[object, ...]) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    try:
        done = run_plain([*COMMAND, *command], stdout=writer)
    finally:
        os.close(writer)
    assert (done.returncode, done.stderr) == (141, "")


def test_names_from_files_reach_standard_output_as_one_printable_line(tmp_path: Path) -> None:
    evil = tmp_path / "m\x1b[31mred\nerror: forged"
    evil.symlink_to(MODEL)
    done = run_cli("inspect", evil)
    assert "\x1b" not in done.stdout + done.stderr
    assert not any(line.startswith("error: forged") for line in (done.stdout + done.stderr).splitlines())
