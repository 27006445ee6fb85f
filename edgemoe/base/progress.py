"""This module defines the callbacks by which a stage reports its progress."""

from __future__ import annotations

from collections.abc import Callable

Progress = Callable[[int, int], None]  # (steps done, all steps) of one stage
StageProgress = Callable[[str, int, int], None]  # (stage, steps done, all steps)
GapProgress = Callable[[float], None]  # (proven relative gap so far) of a search; inf: no choice is known yet
