"""What commands print: results to stdout, progress to stderr."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from edgemoe.base.progress import StageProgress
from edgemoe.base.units import format_seconds

if TYPE_CHECKING:
    from edgemoe.ir import Model


def print_rich(renderable: Any) -> None:
    """Print a table or group to stdout."""
    from rich.console import Console

    Console().print(renderable)


def open_model(source: str) -> Model:
    """Inspect a checkpoint, with a bar while its tensors are hashed."""
    from edgemoe.model.inspect import inspect_model

    with show_progress() as progress:
        return inspect_model(source, progress=lambda done, total: progress("hash", done, total))


@contextmanager
def show_progress() -> Iterator[StageProgress]:
    """Progress on stderr: a bar with time left on a terminal, else a line every ten seconds."""
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

    console = Console(stderr=True)
    if not console.is_terminal:
        yield _line_progress()
        return
    columns = (
        TextColumn("{task.description:10s}"),
        BarColumn(),
        TextColumn("{task.percentage:3.0f} %"),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console) as bars:
        tasks: dict[str, Any] = {}

        def update(stage: str, done: int, total: int) -> None:
            if stage not in tasks:
                tasks[stage] = bars.add_task(stage, total=total)
            bars.update(tasks[stage], completed=done, total=total)

        yield update


def _line_progress() -> StageProgress:
    began: dict[str, float] = {}
    last = [0.0]

    def update(stage: str, done: int, total: int) -> None:
        now = time.monotonic()
        began.setdefault(stage, now)
        if done < total and now - last[0] < 10:
            return
        last[0] = now
        spent = now - began[stage]
        left = f", about {format_seconds(spent / done * (total - done))} left" if 0 < done < total else ""
        print(f"{stage} {100 * done // max(total, 1)} %, {format_seconds(spent)}{left}", file=sys.stderr, flush=True)

    return update
