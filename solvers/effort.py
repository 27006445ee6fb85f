"""This module says with which solver, how exactly and how long a program is solved, and who is told how far the search has come."""

from __future__ import annotations

import time
from dataclasses import dataclass

from edgemoe.base.progress import GapProgress

SECONDS = 60.0  # that a plan may take by default


def _ignore(gap: float) -> None:
    """Tell nobody."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Effort:
    """What may be spent on a search."""

    solver: str = "highs"  # highs, cbc, lagrange (the relaxation's answer without an integer program) or exhaustive
    gap: float = 1e-4  # relative distance to the optimum at which to stop
    until: float | None = None  # time.monotonic() at which to stop with the best choice so far; None: never
    watch: GapProgress = _ignore

    @property
    def seconds(self) -> float | None:
        """Seconds that are left, at least half a second, so that a last short solve can still find a choice; None: there is no limit."""
        return None if self.until is None else max(0.5, self.until - time.monotonic())

    @property
    def is_over(self) -> bool:
        """Whether the time is spent."""
        return self.until is not None and time.monotonic() > self.until


def deadline(seconds: float | None) -> float | None:
    """The `until` of an Effort that begins now."""
    return None if seconds is None else time.monotonic() + seconds
