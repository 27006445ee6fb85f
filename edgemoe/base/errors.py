"""This module defines the one exception tree; `cli.main` turns each kind into its exit code and one clear line.

EdgemoeError            1   internal: should not happen
UsageError            2   wrong arguments, OUT not usable, bad recipe
BudgetError           3   no plan fits the budget and the rules
UnsolvedError         3   the solver found none in its time
ModelError            4   model or input file bad or unsupported
MachineError          5   package missing, disk full, not writable, offline
VerifyError           6   the artifact does not run or breaks its promise
"""

from __future__ import annotations

from pathlib import Path

LONGEST = 1000  # characters of a message


def one_line(text: object) -> str:
    """The text as one printable line: names from files may hold line breaks and escape sequences, and may be endless."""
    line = "".join(c if c.isprintable() else repr(c)[1:-1] for c in str(text)[: 2 * LONGEST])
    return line if len(line) <= LONGEST else line[: LONGEST - 4] + " ..."


class EdgemoeError(Exception):
    """Base of all errors that edgemoe raises on purpose; `hint` says what to do next.  Both are one printable line."""

    exit_code = 1

    def __init__(self, message: str, *, hint: str = "") -> None:
        super().__init__(one_line(message))
        self.hint = one_line(hint)


class UsageError(EdgemoeError):
    """The command was given something it cannot take: an option, a recipe, an output folder."""

    exit_code = 2


class BudgetError(EdgemoeError):
    """No plan fits the budget and the rules; the message names the least bytes with which one fits."""

    exit_code = 3


class ConflictError(BudgetError):
    """Rules contradict each other, so no budget helps; the message names these rules."""


class UnsolvedError(EdgemoeError):
    """The solver found no plan in its time, and did not prove that there is none."""

    exit_code = BudgetError.exit_code


class ModelError(EdgemoeError):
    """A model, text or record file is malformed or not supported; names the file and the field."""

    exit_code = 4


class DamagedError(ModelError):
    """A file that edgemoe wrote, or hashed, is missing or holds something else now; whoever can make it again does so."""

    def __init__(self, path: Path, message: str = "was changed or damaged after edgemoe wrote it", *, hint: str = "") -> None:
        super().__init__(f"{path}: {message}", hint=hint or "give the same command again: the file is made anew")
        self.path = path


class MachineError(EdgemoeError):
    """This machine lacks something: a package, disk space, permission, the network."""

    exit_code = 5


class VerifyError(EdgemoeError):
    """The artifact was written but does not run, or breaks what the plan promised."""

    exit_code = 6
