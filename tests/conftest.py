"""What several files share: statistics and prices of the bundled model, made once."""

from __future__ import annotations

from pathlib import Path

import pytest
from command import MODEL, TOKENS

from edgemoe.ir import Costs, Stats
from edgemoe.model.inspect import inspect_model


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
