"""A build under a fault: how it is started and ended, and how its exit status, its files and its processes are judged (faults.py)."""

from __future__ import annotations

import contextlib
import hashlib
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import psutil

ROOT = Path(__file__).parents[1]
SIGNALS = {signal.SIGINT: 130, signal.SIGTERM: 143, signal.SIGHUP: 129}
MINE = "mine.txt"  # a file of the user in every OUT
PATIENCE = 600.0


@dataclass
class Row:
    """What came of the cases of one kind."""

    cases: int = 0
    same: int = 0
    refused: int = 0
    ended: int = 0  # the build was over before the fault, or had no need of what broke
    wrong: list[str] = field(default_factory=list)  # silent wrong artifacts, and any other broken promise
    orphans: int = 0
    lost: int = 0


@dataclass(frozen=True)
class Bench:
    """The checkpoint, and what a build without faults gave."""

    folder: Path
    model: Path
    budget: int
    sha256: str = ""
    seconds: float = 0.0

    def command(self, case: Path, model: Path | None = None, work: Path | None = None) -> list[str]:
        """A build of the checkpoint into a folder of the case, where a file of the user lies."""
        (case / "out").mkdir(parents=True, exist_ok=True)
        (case / "out" / MINE).write_text("the user's own\n")
        texts = ROOT / "edgemoe" / "stream" / "data"
        words = ["build", model or self.model, "--memory", f"{self.budget}B", "--calibration", texts / "calibration" / "english.txt"]
        words += ["--calibration-tokens", 2048, "--heldout", self.folder / "heldout.txt", "--width", "full", "--force"]
        words += ["--work", work or case / "work", "-o", case / "out"]
        return [sys.executable, "-m", "edgemoe", *map(str, words)]


def start(command: list[str], case: Path) -> subprocess.Popen[str]:
    """Begin a command whose children can be told by the case's name in their environment."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "EDGEMOE_CASE": str(case), "XDG_CACHE_HOME": str(case / "cache")}

    def hear() -> None:  # a shell in the background lets its children ignore SIGINT, and nohup SIGHUP
        for number in SIGNALS:
            signal.signal(number, signal.SIG_DFL)

    return subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, env=environment, preexec_fn=hear)


def finish(child: subprocess.Popen[str]) -> tuple[int, str]:
    """Exit status and stderr."""
    _, errors = child.communicate(timeout=PATIENCE)
    return child.returncode, errors


def orphans(case: Path, patience: float = 5.0) -> int:
    """Processes of a case that are left after its command ended."""

    def left() -> list[psutil.Process]:
        found = []
        for process in psutil.process_iter():
            with contextlib.suppress(psutil.Error):
                if process.environ().get("EDGEMOE_CASE") == str(case) and process.status() != psutil.STATUS_ZOMBIE:
                    found.append(process)
        return found

    until = time.monotonic() + patience
    while (found := left()) and time.monotonic() < until:
        time.sleep(0.1)
    for process in found:
        with contextlib.suppress(psutil.Error):
            process.kill()
    return len(found)


def artifact_of(out: Path) -> str:
    """SHA-256 of the GGUF under its final name; empty if there is none."""
    files = sorted(out.glob("*.gguf"))
    return hashlib.sha256(b"".join(path.read_bytes() for path in files)).hexdigest() if files else ""


def judge(bench: Bench, row: Row, name: str, case: Path, code: int, errors: str, right: tuple[int, ...]) -> None:
    """Judge a run under a fault: its exit status, what lies under final names, processes and files of the user."""
    row.orphans += orphans(case)
    row.lost += (case / "out" / MINE).read_text() != "the user's own\n" if (case / "out" / MINE).exists() else 1
    if artifact_of(case / "out") not in ("", bench.sha256):
        row.wrong.append(f"{name}: another file under its final name, exit {code}")
    told = [line for line in errors.splitlines() if line.startswith("error: ")]
    if code in right:
        row.refused += 1
    elif code == 0:
        row.ended += 1
    elif code != -signal.SIGKILL:
        row.wrong.append(f"{name}: exit {code}: {errors.strip().splitlines()[-2:]}")
    if code > 0 and (len(told) != 1 or "Traceback" in errors):
        row.wrong.append(f"{name}: not one line: {errors[-300:]}")


def again(bench: Bench, row: Row, name: str, case: Path, **more: Path) -> None:
    """Run without the fault: the bytes must be those of the first build."""
    code, errors = finish(start(bench.command(case, **more), case))
    if code == 0 and artifact_of(case / "out") == bench.sha256:
        row.same += 1
    else:
        row.wrong.append(f"{name}: exit {code} afterwards, {errors.strip().splitlines()[-2:]}")
    row.orphans += orphans(case)
    shutil.rmtree(case, ignore_errors=True)


Case = tuple[str, Callable[[Row, str, Path], None]]
