"""What packages offer is there and in order: every name of an `__all__` can be imported, and lists are as ruff sorts them."""

from __future__ import annotations

import importlib
import inspect
import pkgutil
import re

import pytest

import edgemoe

PACKAGES = ["edgemoe", *sorted(m.name for m in pkgutil.walk_packages(edgemoe.__path__, "edgemoe.") if m.ispkg)]
OFFERING = [name for name in PACKAGES if hasattr(importlib.import_module(name), "__all__")]


def isort_key(name: str) -> tuple[int, list[str | int]]:
    """Ruff's order (RUF022): CONSTANTS, then Classes, then the others; numbers within a name count as numbers."""
    kind = 0 if name.isupper() else 1 if name[0].isupper() else 2
    return kind, [int(part) if part.isdigit() else part for part in re.split(r"(\d+)", name)]


def test_the_walk_reaches_every_package() -> None:
    assert {"edgemoe.ir", "edgemoe.model.families", "edgemoe.solvers", "edgemoe.targets.gguf"} <= set(PACKAGES)
    assert {"edgemoe", "edgemoe.ir"} <= set(OFFERING)


@pytest.mark.parametrize("package", OFFERING)
def test_every_offered_name_can_be_imported(package: str) -> None:
    module = importlib.import_module(package)
    missing = [name for name in module.__all__ if not hasattr(module, name)]
    assert missing == []
    assert set(module.__all__) <= set(dir(module))


@pytest.mark.parametrize("package", OFFERING)
def test_offered_names_are_sorted_and_none_is_there_twice(package: str) -> None:
    offered = [name for name in importlib.import_module(package).__all__ if name != "__version__"]
    assert offered in (sorted(offered), sorted(offered, key=isort_key))
    assert len(set(offered)) == len(offered)


@pytest.mark.parametrize("package", OFFERING)
def test_nothing_that_a_package_made_is_left_out(package: str) -> None:
    """Public functions and classes that were written in its `__init__`."""
    module = importlib.import_module(package)
    made = {name: value for name, value in vars(module).items() if inspect.isfunction(value) or inspect.isclass(value)}
    own = [name for name, value in made.items() if value.__module__ == package and not name.startswith("_")]
    assert set(own) <= set(module.__all__)
