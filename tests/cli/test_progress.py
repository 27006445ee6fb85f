"""Progress says what is really going on: time left that never stands still, and the stages that follow."""

from __future__ import annotations

import contextlib
import math
import os
import pty
import re
import subprocess
import sys
import threading

import pytest

from edgemoe.cli.progress import Clock, _Lines, describe_gap


def test_time_left_falls_between_steps_and_grows_while_a_step_takes_longer_than_those_before() -> None:
    clock = Clock(began=0.0, first=0)
    clock.step(100.0, 2, 10)  # 50 s a step
    left = [clock.left(now) for now in (100.0, 120.0, 140.0, 300.0, 500.0)]
    assert left[:3] == [400.0, 380.0, 360.0]
    assert left[3] == pytest.approx(300 / 3 * 7)
    assert left[4] == pytest.approx(500 / 3 * 7)


def test_steps_that_a_killed_run_left_do_not_count_as_pace() -> None:
    clock = Clock(began=0.0, first=30)
    clock.step(0.0, 30, 48)
    assert clock.left(5.0) is None
    clock.step(10.0, 31, 48)
    assert clock.left(10.0) == pytest.approx(170.0)


def test_a_stage_that_ends_says_which_stages_follow(capsys: pytest.CaptureFixture[str]) -> None:
    lines = _Lines(["calibrate", "price", "plan", "repair"])
    lines("calibrate 48", 0, 2)
    lines("calibrate 48", 2, 2)
    lines("repair", 1, 1)
    told = capsys.readouterr().err.splitlines()
    assert told[0].startswith("calibrate 48 done in ") and told[0].endswith("; then price, plan, repair")
    assert told[1].startswith("repair done in ") and "then" not in told[1]


def test_a_line_comes_also_while_one_step_takes_long(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("edgemoe.cli.progress.EVERY", 0.5)
    lines = _Lines([])
    ticker = threading.Thread(target=lines.tick)
    lines("repair", 1, 4)
    ticker.start()
    lines.over.wait(2.5)
    lines.over.set()
    ticker.join()
    assert capsys.readouterr().err.count("repair 25 %") >= 1


def test_a_gap_is_told_in_words() -> None:
    assert describe_gap(0.0123) == "gap 1.23%"
    assert describe_gap(math.inf) == "no plan yet"


def test_names_of_stages_are_printable_and_the_ticker_ends_with_the_command() -> None:
    code = "from edgemoe.cli.progress import show_progress\nwith show_progress() as p: p('a\\x1b[31m\\nb', 1, 1)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert done.stderr.startswith("a\\x1b[31m\\nb done in ") and done.stderr.count("\n") == 1


def test_on_a_terminal_the_search_ends_when_a_later_stage_begins_even_if_no_solver_was_asked() -> None:
    code = (
        "from edgemoe.cli.progress import show_progress\n"
        "with show_progress(('price', 'plan', 'repair')) as p:\n"
        "    p('price', 1, 1)\n"
        "    p('repair', 1, 2)\n"
    )
    ours, theirs = pty.openpty()
    with subprocess.Popen(
        [sys.executable, "-c", code], stdin=theirs, stdout=theirs, stderr=theirs, env={**os.environ, "TERM": "xterm"}
    ) as child:
        os.close(theirs)
        told = b""
        with contextlib.suppress(OSError):  # how the end of a terminal is told
            while part := os.read(ours, 4096):
                told += part
    os.close(ours)
    assert child.returncode == 0
    plain = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", told.decode())
    assert re.findall(r"(\d+) %", plain)[-3:] == ["100", "100", "50"]
