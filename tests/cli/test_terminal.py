"""What a person at a terminal sees: help at once, colours only where wanted, one line instead of a traceback."""

from __future__ import annotations

import os
import pty
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from command import COMMAND, MODEL, environment, error_of

from edgemoe.cli.main import main
from edgemoe.model import inspect
from edgemoe.model.checkpoint import read_header


@pytest.mark.parametrize("arguments", [["--help"], ["build", "--help"], ["--version"]])
def test_help_comes_at_once(arguments: list[str]) -> None:
    with subprocess.Popen([*COMMAND, *arguments], stdout=subprocess.DEVNULL, env=environment()) as child:
        _, status, used = os.wait4(child.pid, 0)
        child.returncode = os.waitstatus_to_exitcode(status)
    assert child.returncode == 0
    assert used.ru_utime + used.ru_stime < 1.0  # wanted: 0.5, on a machine with nothing else to do


def on_a_terminal(*arguments: object, **extra: str) -> tuple[int, str]:
    """Run with stdout and stderr on a terminal of its own; exit code and what it showed."""
    ours, theirs = pty.openpty()
    env = {**environment(TERM="xterm-256color"), **extra}
    for name in ("CI", "FORCE_COLOR", "TTY_COMPATIBLE", *(() if "NO_COLOR" in extra else ("NO_COLOR",))):
        env.pop(name, None)
    with subprocess.Popen([*COMMAND, *map(str, arguments)], stdin=theirs, stdout=theirs, stderr=theirs, env=env) as child:
        os.close(theirs)
        shown = b""
        while True:
            try:
                block = os.read(ours, 65536)
            except OSError:  # how Linux says that the other end is closed
                break
            if not block:
                break
            shown += block
        code = child.wait()
    os.close(ours)
    return code, shown.decode()


SEQUENCE = re.compile(r"\x1b\[([\d;?]*)([A-Za-z])")


def colours(shown: str) -> list[str]:
    """The codes that set a colour, not those for bold or for the cursor."""
    codes = [code for numbers, kind in SEQUENCE.findall(shown) if kind == "m" for code in numbers.split(";")]
    return [code for code in codes if len(code) > 1 and code[0] in "349"]


@pytest.fixture
def spoilt(tmp_path: Path) -> Path:
    """The bundled model with a weight that is no number in its first layer: calibration ends as soon as its bar is shown."""
    model = Path(shutil.copytree(MODEL, tmp_path / "model"))
    offset = read_header(model / "model.safetensors")["model.layers.0.self_attn.q_proj.weight"][2]
    with (model / "model.safetensors").open("r+b") as file:
        file.seek(offset)
        file.write(np.array([0x7FC0], "<u2").tobytes())
    return model


def test_colours_are_for_terminals_that_want_them(spoilt: Path, tmp_path: Path) -> None:
    command = ("build", spoilt, "--memory", "70MB", "--calibration-tokens", 1024, "-o", tmp_path / "out")
    for extra in ({}, {"NO_COLOR": "1"}):
        code, shown = on_a_terminal(*command, **extra)
        assert code == 4 and "calibrate" in shown
        assert bool(colours(shown)) == (not extra)
        lines = SEQUENCE.sub("", shown).splitlines()
        (number,) = (i for i, line in enumerate(lines) if line.startswith("error: "))
        assert "q_proj" in lines[number]
        assert "Traceback" not in shown


@pytest.fixture
def fail(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Let `edgemoe inspect` raise something."""

    def fail(error: BaseException, *options: str) -> None:
        def inspect_model(_: str, **__: object) -> None:
            raise error

        monkeypatch.setattr(inspect, "inspect_model", inspect_model)
        monkeypatch.setattr(sys, "argv", ["edgemoe", *options, "inspect", "anything"])
        main()

    return fail


ERRORS = [
    (RuntimeError("of ours"), 1, "error: internal: RuntimeError: of ours"),
    (OSError(28, "No space left on device", "/full"), 5, "error: [Errno 28] No space left on device: '/full'"),
    (PermissionError(13, "Permission denied", "/shut"), 5, "error: [Errno 13] Permission denied: '/shut'"),
    (ModuleNotFoundError("No module named 'torch'"), 5, "error: a package is missing: No module named 'torch'"),
    (MemoryError(), 5, "error: this machine has too little memory"),
    (KeyboardInterrupt(), 130, "error: interrupted"),
]


@pytest.mark.parametrize(("error", "code", "line"), ERRORS, ids=[type(e[0]).__name__ for e in ERRORS])
def test_every_error_is_one_line_and_a_hint(
    fail: Callable[..., None], capsys: pytest.CaptureFixture[str], error: BaseException, code: int, line: str
) -> None:
    with pytest.raises(SystemExit) as stop:
        fail(error)
    shown = capsys.readouterr()
    assert stop.value.code == code
    assert shown.out == "" and error_of(shown.err) == line and "hint: " in shown.err


def test_debug_lets_errors_through_for_their_traceback(fail: Callable[..., None]) -> None:
    with pytest.raises(RuntimeError, match="of ours"):
        fail(RuntimeError("of ours"), "--debug")
