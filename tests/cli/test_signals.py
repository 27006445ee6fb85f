"""Signals end a command with one line, its own exit code, and no process or scratch left behind."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from pathlib import Path

import psutil
import pytest
from command import COMMAND, MODEL, environment, error_of
from parity import emit
from tiny import flat_plan, make_checkpoint

from edgemoe.base.storage import save_record
from edgemoe.model.inspect import inspect_model


def stop(command: list[object], number: int, patience: float = 120) -> tuple[int, str, list[psutil.Process]]:
    """Send a signal to a command alone once it has a child process; exit status, stderr, and the children that are left."""
    full = [*COMMAND, *map(str, command)]
    restore = lambda: [signal.signal(n, signal.SIG_DFL) for n in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)]  # noqa: E731
    with subprocess.Popen(
        full, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, env=environment(), preexec_fn=restore
    ) as child:
        process, deadline, children = psutil.Process(child.pid), time.monotonic() + patience, []
        while child.poll() is None and time.monotonic() < deadline:
            children = [c for c in process.children(recursive=True) if any("child_main" in part for part in c.cmdline())]
            if children:
                break
            time.sleep(0.01)
        assert children, "no child process was seen"
        os.kill(child.pid, number)
        _, errors = child.communicate(timeout=patience)
    _, left = psutil.wait_procs(children, timeout=10)
    return child.returncode, errors, left


@pytest.fixture(scope="module")
def emitted(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("signals")
    source = make_checkpoint(folder / "model", "mixtral", n_experts=4, hidden=128, expert_size=64)
    model, out = inspect_model(source), folder / "out"
    save_record(out / "artifact.json", emit(model, out))
    save_record(out / "plan.json", flat_plan(model))
    return source, out


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGHUP, 129)])
def test_a_signal_to_the_command_alone_ends_its_children_too(emitted: tuple[Path, Path], number: int, status: int) -> None:
    source, out = emitted
    code, errors, left = stop(["verify", source, out], number)
    assert code == status and not left
    assert "interrupted" in error_of(errors) or "stopped by SIG" in error_of(errors)
    assert "give the same command again" in errors
    assert not list(out.rglob("*.part")) and not (out / "report.json").exists()


@pytest.mark.skipif(os.uname().sysname != "Linux", reason="only Linux tells a child that its parent was killed")
def test_children_of_a_killed_command_end(emitted: tuple[Path, Path]) -> None:
    code, _, left = stop(["verify", *emitted], signal.SIGKILL)
    assert code == -signal.SIGKILL and not left


def test_a_child_that_the_system_killed_is_named_as_that(emitted: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    from edgemoe.base.errors import MachineError
    from edgemoe.targets import child_process
    from edgemoe.targets.gguf.run import run

    def kill(child: subprocess.Popen[bytes], *_: object) -> None:
        child.kill()

    monkeypatch.setattr(child_process, "_read_logits", kill)
    (gguf,) = emitted[1].glob("*.gguf")
    with pytest.raises(MachineError, match="memory runs out") as caught:
        run(gguf, {"windows": [[1, 2]], "vocab_size": 4096}, None)
    assert caught.value.exit_code == 5
    assert inspect_model(MODEL).name  # and this process goes on
