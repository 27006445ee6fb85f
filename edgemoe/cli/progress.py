"""What commands print: results to stdout, progress to stderr."""

from __future__ import annotations

import math
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

from edgemoe.base.errors import one_line
from edgemoe.base.units import format_seconds

if TYPE_CHECKING:
    from edgemoe.ir import Model

EVERY = 10.0  # seconds between two lines where stderr is no terminal
SEARCH = "plan"  # the stage whose end nobody can foresee


def say(*lines: object, error: bool = False) -> None:
    """Print lines to stdout, or to stderr: names from files may hold line breaks and escape sequences."""
    for line in lines:
        print(one_line(line), file=sys.stderr if error else sys.stdout, flush=error)


def print_rich(renderable: Any) -> None:
    """Print a table or group to stdout."""
    from rich.console import Console

    Console().print(renderable)


def open_model(source: str) -> Model:
    """Inspect a checkpoint or a GGUF, with a bar while its tensors are hashed."""
    from edgemoe.pipeline import build

    with show_progress() as progress:
        return build.open_model(source, lambda done, total: progress("hash", done, total))


class Display(Protocol):
    """Shows stages as they go on."""

    def __call__(self, stage: str, done: int, total: int) -> None:
        """So many steps of a stage are done."""

    def gap(self, gap: float) -> None:
        """The search for a plan has come so near to the optimum (inf: no plan yet)."""


@dataclass(slots=True)
class Clock:
    """The pace of one stage, from which the time that is left follows."""

    began: float
    first: int  # steps that were done already: a killed run left them
    done: int = 0
    total: int = 0
    stepped: float = 0.0  # when the last step ended
    told: float = 0.0  # when the last line was printed

    def step(self, now: float, done: int, total: int) -> None:
        """So many steps are done now."""
        self.done, self.total, self.stepped = done, total, now

    def left(self, now: float) -> float | None:
        """Seconds that are left; None before the first step.

        They follow from the pace of the steps so far.  While a step takes longer than that, they follow from a step that ends now, so the
        figure never stands still.
        """
        steps, ahead = self.done - self.first, self.total - self.done
        if steps <= 0 or ahead <= 0:
            return None
        at_pace = (self.stepped - self.began) / steps * ahead - (now - self.stepped)
        if_now = (now - self.began) / (steps + 1) * (ahead - 1)
        return max(at_pace, if_now, 0.0)


def describe_gap(gap: float) -> str:
    """A gap in words."""
    return f"gap {gap:.2%}" if math.isfinite(gap) else "no plan yet"


@contextmanager
def show_progress(stages: Sequence[str] = ()) -> Iterator[Display]:
    """Progress on stderr: bars on a terminal, else a line every ten seconds; `stages` are shown before they begin."""
    from rich.console import Console

    console = Console(stderr=True)
    if console.is_terminal:
        with _show_bars(console, stages) as bars:
            yield bars
        return
    lines = _Lines(list(stages))
    ticker = threading.Thread(target=lines.tick, daemon=True)
    ticker.start()
    try:
        yield lines
    finally:
        lines.over.set()
        ticker.join()


@dataclass(slots=True)
class _Lines:
    """Prints a line when a stage ends, and every ten seconds, also while a single step takes longer than that."""

    stages: list[str]
    clocks: dict[str, Clock] = field(default_factory=dict)
    current: str = ""
    over: threading.Event = field(default_factory=threading.Event)
    lock: Any = field(default_factory=threading.Lock)

    def __call__(self, stage: str, done: int, total: int) -> None:
        """Note a step, and print a line if it is the last one."""
        now = time.monotonic()
        with self.lock:
            clock = self.clocks.setdefault(stage, Clock(began=now, first=done, told=now))
            self.current = stage
            clock.step(now, done, total)
            if done >= total:
                self._print(f"{stage} done in {format_seconds(now - clock.began)}{self._following(stage)}")
            elif now - clock.told >= EVERY:
                self._print_clock(stage, clock, now)

    def gap(self, gap: float) -> None:
        """Print the gap every ten seconds."""
        now = time.monotonic()
        with self.lock:
            clock = self.clocks.setdefault(SEARCH, Clock(began=now, first=0, told=now))
            self.current = SEARCH
            if now - clock.told >= EVERY:
                clock.told = now
                self._print(f"{SEARCH} {format_seconds(now - clock.began)}, {describe_gap(gap)}")

    def tick(self) -> None:
        """Print a line whenever ten seconds passed without one, until the end."""
        while not self.over.wait(1.0):
            with self.lock:
                clock, now = self.clocks.get(self.current), time.monotonic()
                if clock is not None and clock.done < clock.total and now - clock.told >= EVERY:
                    self._print_clock(self.current, clock, now)

    def _print_clock(self, stage: str, clock: Clock, now: float) -> None:
        clock.told = now
        left = clock.left(now)
        tail = "" if left is None else f", about {format_seconds(left)} left in this stage"
        self._print(f"{stage} {100 * clock.done // max(clock.total, 1)} %, {format_seconds(now - clock.began)}{tail}")

    def _following(self, stage: str) -> str:
        """The stages that are still to come after one of the known stages."""
        base = stage.split()[0]
        after = self.stages[self.stages.index(base) + 1 :] if base in self.stages else []
        return f"; then {', '.join(after)}" if after else ""

    def _print(self, line: str) -> None:
        say(line, error=True)


@contextmanager
def _show_bars(console: Any, stages: Sequence[str]) -> Iterator[Display]:
    """Bars with spinner, share, time spent and time left; stages that have not begun have an empty bar."""
    from rich.progress import BarColumn, Progress, ProgressColumn, SpinnerColumn, TextColumn, TimeElapsedColumn
    from rich.text import Text

    clocks: dict[str, Clock] = {}

    class LeftColumn(ProgressColumn):
        """The time that is left in the stage, or the gap of the search."""

        max_refresh = 0.5

        def render(self, task: Any) -> Text:
            clock = clocks.get(task.fields["stage"])
            left = None if clock is None else clock.left(time.monotonic())
            return Text(task.fields["told"] or ("" if left is None else f"about {format_seconds(left)} left"))

    columns = (SpinnerColumn(), TextColumn("{task.description:10s}", markup=False), BarColumn(), TextColumn("{task.percentage:3.0f} %"))
    with Progress(*columns, TimeElapsedColumn(), LeftColumn(), console=console) as bars:
        tasks: dict[str, Any] = {}

        def begin(stage: str) -> Any:
            if stage not in tasks:
                tasks[stage] = bars.add_task(one_line(stage), total=1, start=False, stage=stage, told="")
            if stage not in clocks:
                bars.start_task(tasks[stage])
            return tasks[stage]

        for stage in stages:
            tasks[stage] = bars.add_task(stage, total=1, start=False, stage=stage, told="")

        class Bars:
            def __call__(self, stage: str, done: int, total: int) -> None:
                task = begin(stage)
                clock = clocks.setdefault(stage, Clock(began=time.monotonic(), first=done))
                clock.step(time.monotonic(), done, total)
                bars.update(task, completed=done, total=max(total, 1))
                self.end_search(stage)

            def gap(self, gap: float) -> None:
                task = begin(SEARCH)
                clocks.setdefault(SEARCH, Clock(began=time.monotonic(), first=0))
                bars.update(task, total=None, told=describe_gap(gap))

            def end_search(self, stage: str) -> None:
                """Whatever follows the search shows that it is over; it may never have asked a solver."""
                follows = stage in stages and SEARCH in stages and list(stages).index(stage) > list(stages).index(SEARCH)
                if stage != SEARCH and SEARCH in tasks and (SEARCH in clocks or follows):
                    bars.update(tasks[SEARCH], total=1, completed=1)

        shown = Bars()
        yield shown
        shown.end_search("")
