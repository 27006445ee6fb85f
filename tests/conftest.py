"""What several files share, made once: statistics and prices of the bundled model, a tiny checkpoint of every family."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from command import MODEL, TOKENS

from edgemoe.ir import Costs, Stats
from edgemoe.model.inspect import inspect_model


@pytest.fixture(scope="session", autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Hashes of checkpoints are kept here, not in the cache of whoever runs the tests."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="session")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A work folder for `build --work`, and for whatever else takes the shipped texts with TOKENS tokens."""
    return tmp_path_factory.mktemp("shared")


@pytest.fixture(scope="session")
def shipped_stats(work: Path) -> Stats:
    from edgemoe.calibrate.collect import collect_stats
    from edgemoe.stream.texts import choose_texts

    return collect_stats(inspect_model(MODEL), choose_texts((), ())[0], work, max_tokens=TOKENS)


def _priced(stats: Stats, work: Path, target: str) -> Costs:
    from edgemoe.pipeline.request import choose_context
    from edgemoe.pipeline.widths import price_cached
    from edgemoe.targets import find_target

    model = inspect_model(MODEL)
    return price_cached(model, stats, find_target(target), choose_context(model, None), work, None)[0]


@pytest.fixture(scope="session")
def gguf_costs(shipped_stats: Stats, work: Path) -> Costs:
    return _priced(shipped_stats, work, "gguf")


@pytest.fixture(scope="session")
def onnx_costs(shipped_stats: Stats, work: Path) -> Costs:
    return _priced(shipped_stats, work, "onnx")


@pytest.fixture(scope="session")
def sources(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    from tiny import FAMILIES, make_checkpoint

    root = tmp_path_factory.mktemp("checkpoints")
    return {family: make_checkpoint(root / family, family, seed=i) for i, family in enumerate(FAMILIES)}


@pytest.fixture
def copy(sources: dict[str, Path], tmp_path: Path) -> Callable[[str], Path]:
    """A copy of a family's checkpoint that a test may spoil."""
    return lambda family: shutil.copytree(sources[family], tmp_path / "spoilt" / family)
